// Tagger's group inputs and mixture costs on NVIDIA GPUs. Contract in ../tagger.h, formulas in ../math/tagger.h, how
// the work is cut in tagger.cuh. The variance's gradient is the only sum over pixels.
//
// Floor, in elements for each of z: forward reads z and m, and writes dz and likelihood (a cost only 1 / K); backward
// reads z, m and two gradients (of a cost 1 / K), and writes two. Arithmetic is below that: one exponential for each
// group, and one, a division or two and a logarithm for each pixel. Nothing of this has been measured on a GPU yet.
#include "tagger.cuh"

namespace ladderfast::cuda::tagger {
namespace {

// The passes. Each handles one row of a thread; `sum` gathers 2 v grad_variance.
template <class T, int N>
struct GaussianInputs {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    T *dz, *likelihood;
    using Scalar = GaussianScalar<V>;
    __device__ Scalar scalar(int64_t seed) const { return gaussian_scalar<V>(in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& v, int64_t r,
                                        Compute<T>&) const {
        Kept<V, held> e, w;
        const V x = in.x.template load<whole>(p, r, 0);
        GaussianPixel<V> pixel;
        LF_EACH_GROUP(k) {
            const V d = x - in.z.template load<whole>(p, r, k);
            if (held) e.at[k] = d;
            pixel.compare(d);
        }
        LF_EACH_GROUP(k) {
            const V weight = pixel.weigh(held ? e.at[k] : x - in.z.template load<whole>(p, r, k), v);
            if (held) w.at[k] = weight;
        }
        pixel.finish(v);
        LF_EACH_GROUP(k) {
            const V d = held ? e.at[k] : x - in.z.template load<whole>(p, r, k);
            const V weight = held ? w.at[k] : pixel.weight(d, v);
            V out_dz, out_likelihood;
            pixel.forward(d, in.m.template load<whole>(p, r, k), weight, out_dz, out_likelihood);
            write<whole>(dz, p, r * plan.groups + k, plan.pixels, out_dz);
            write<whole>(likelihood, p, r * plan.groups + k, plan.pixels, out_likelihood);
        }
    }
};

template <class T, int N>
struct GaussianInputsBackward {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    View<T, N> grad_dz, grad_likelihood;
    T *grad_x, *grad_z, *grad_m;
    using Scalar = GaussianScalar<V>;
    __device__ Scalar scalar(int64_t seed) const { return gaussian_scalar<V>(in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& v, int64_t r,
                                        Compute<T>& sum) const {
        Kept<V, held> e, w, h;
        const V x = in.x.template load<whole>(p, r, 0);
        GaussianPixel<V> pixel;
        LF_EACH_GROUP(k) {
            const V d = x - in.z.template load<whole>(p, r, k);
            if (held) e.at[k] = d;
            pixel.compare(d);
        }
        LF_EACH_GROUP(k) {
            const V grad = grad_likelihood.template load<whole>(p, r, k);
            const V weight = pixel.weigh(held ? e.at[k] : x - in.z.template load<whole>(p, r, k), v, grad);
            if (held) h.at[k] = grad;
            if (held) w.at[k] = weight;
        }
        pixel.finish(v);
        V sum_v = constant<V>(0);
        LF_EACH_GROUP(k) {
            const V d = held ? e.at[k] : x - in.z.template load<whole>(p, r, k);
            const V weight = held ? w.at[k] : pixel.weight(d, v);
            const V grad = held ? h.at[k] : grad_likelihood.template load<whole>(p, r, k);
            V out_z, out_m;
            pixel.backward(grad_dz.template load<whole>(p, r, k), grad, d, in.m.template load<whole>(p, r, k), weight,
                           v, out_z, out_m, sum_v);
            write<whole>(grad_z, p, r * plan.groups + k, plan.pixels, out_z);
            write<whole>(grad_m, p, r * plan.groups + k, plan.pixels, out_m);
        }
        if (grad_x != nullptr) write<whole>(grad_x, p, r, plan.pixels, pixel.sum_x);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += i < p.count ? sum_v.at[i] : Compute<T>(0);
    }
};

template <class T, int N>
struct BernoulliInputs {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    T *dz, *likelihood;
    using Scalar = BernoulliScalar<V>;
    __device__ Scalar scalar(int64_t seed) const { return bernoulli_scalar<V>(in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& b, int64_t r,
                                        Compute<T>&) const {
        Kept<V, held> density, m;
        BernoulliPixel<V> pixel(in.x.template load<whole>(p, r, 0), b);
        LF_EACH_GROUP(k) {
            const V mask = in.m.template load<whole>(p, r, k);
            const V found = pixel.gather(in.z.template load<whole>(p, r, k), mask, b);
            if (held) density.at[k] = found;
            if (held) m.at[k] = mask;
        }
        pixel.finish();
        LF_EACH_GROUP(k) {
            V out_dz, out_likelihood;
            pixel.forward(held ? m.at[k] : in.m.template load<whole>(p, r, k),
                          held ? density.at[k] : pixel.density(in.z.template load<whole>(p, r, k)), out_dz,
                          out_likelihood);
            write<whole>(dz, p, r * plan.groups + k, plan.pixels, out_dz);
            write<whole>(likelihood, p, r * plan.groups + k, plan.pixels, out_likelihood);
        }
    }
};

template <class T, int N>
struct BernoulliInputsBackward {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    View<T, N> grad_dz, grad_likelihood;
    T *grad_x, *grad_z, *grad_m;
    using Scalar = BernoulliScalar<V>;
    __device__ Scalar scalar(int64_t seed) const { return bernoulli_scalar<V>(in, seed); }

    // Four tensors of four groups are too many registers: the second pass reads again, from the first-level cache.
    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& b, int64_t r,
                                        Compute<T>&) const {
        BernoulliPixel<V> pixel(in.x.template load<whole>(p, r, 0), b);
        LF_EACH_GROUP(k)
        pixel.gather(in.z.template load<whole>(p, r, k), in.m.template load<whole>(p, r, k),
                     grad_dz.template load<whole>(p, r, k), grad_likelihood.template load<whole>(p, r, k), b);
        pixel.finish_backward();
        V sum_x = pixel.grad_t;
        LF_EACH_GROUP(k) {
            const V z = in.z.template load<whole>(p, r, k), density = pixel.density(z);
            const V from_likelihood = grad_likelihood.template load<whole>(p, r, k);
            V out_z, out_m;
            pixel.backward(grad_dz.template load<whole>(p, r, k), from_likelihood, z,
                           in.m.template load<whole>(p, r, k), density, b, out_z, out_m);
            sum_x = sum_x + pixel.grad_x(from_likelihood, z, density, b);
            write<whole>(grad_z, p, r * plan.groups + k, plan.pixels, out_z);
            write<whole>(grad_m, p, r * plan.groups + k, plan.pixels, out_m);
        }
        if (grad_x != nullptr) write<whole>(grad_x, p, r, plan.pixels, sum_x);
    }
};

template <class T, int N>
struct GaussianNll {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    T* nll;
    using Scalar = GaussianScalar<V>;
    __device__ Scalar scalar(int64_t seed) const { return gaussian_scalar<V>(in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& v, int64_t r,
                                        Compute<T>&) const {
        Kept<V, held> e, m;
        const V x = in.x.template load<whole>(p, r, 0);
        GaussianMixture<V> pixel;
        LF_EACH_GROUP(k) {
            const V d = x - in.z.template load<whole>(p, r, k);
            const V mask = in.m.template load<whole>(p, r, k);
            pixel.compare(d, mask, v);
            if (held) e.at[k] = d;
            if (held) m.at[k] = mask;
        }
        LF_EACH_GROUP(k)
        pixel.weigh(held ? e.at[k] : x - in.z.template load<whole>(p, r, k),
                    held ? m.at[k] : in.m.template load<whole>(p, r, k), v);
        write<whole>(nll, p, r, plan.pixels, pixel.nll(v));
    }
};

template <class T, int N>
struct GaussianNllBackward {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    View<T, N> grad;
    T *grad_x, *grad_z, *grad_m;
    using Scalar = GaussianScalar<V>;
    __device__ Scalar scalar(int64_t seed) const { return gaussian_scalar<V>(in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& v, int64_t r,
                                        Compute<T>& sum) const {
        Kept<V, held> e, m, w;
        const V x = in.x.template load<whole>(p, r, 0);
        GaussianMixture<V> pixel;
        LF_EACH_GROUP(k) {
            const V d = x - in.z.template load<whole>(p, r, k);
            const V mask = in.m.template load<whole>(p, r, k);
            pixel.compare(d, mask, v);
            if (held) e.at[k] = d;
            if (held) m.at[k] = mask;
        }
        LF_EACH_GROUP(k) {
            const V weight = pixel.weigh(held ? e.at[k] : x - in.z.template load<whole>(p, r, k),
                                         held ? m.at[k] : in.m.template load<whole>(p, r, k), v);
            if (held) w.at[k] = weight;
        }
        V sum_v = grad.template load<whole>(p, r, 0);
        pixel.finish(sum_v);
        LF_EACH_GROUP(k) {
            const V d = held ? e.at[k] : x - in.z.template load<whole>(p, r, k);
            const V weight = held ? w.at[k] : pixel.weight(d, v);
            V out_z, out_m;
            pixel.backward(d, held ? m.at[k] : in.m.template load<whole>(p, r, k), weight, v, out_z, out_m, sum_v);
            write<whole>(grad_z, p, r * plan.groups + k, plan.pixels, out_z);
            write<whole>(grad_m, p, r * plan.groups + k, plan.pixels, out_m);
        }
        if (grad_x != nullptr) write<whole>(grad_x, p, r, plan.pixels, pixel.sum_x);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += i < p.count ? sum_v.at[i] : Compute<T>(0);
    }
};

struct NoScalar {};

template <class T, int N>
struct BernoulliNll {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    T* nll;
    using Scalar = NoScalar;
    __device__ Scalar scalar(int64_t) const { return {}; }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar&, int64_t r, Compute<T>&) const {
        BernoulliMixture<V> pixel;
        LF_EACH_GROUP(k) pixel.gather(in.z.template load<whole>(p, r, k), in.m.template load<whole>(p, r, k));
        write<whole>(nll, p, r, plan.pixels, pixel.nll(in.x.template load<whole>(p, r, 0)));
    }
};

template <class T, int N>
struct BernoulliNllBackward {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;
    View<T, N> grad;
    T *grad_x, *grad_z, *grad_m;
    using Scalar = NoScalar;
    __device__ Scalar scalar(int64_t) const { return {}; }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar&, int64_t r, Compute<T>&) const {
        Kept<V, held> z, m;
        BernoulliMixture<V> pixel;
        LF_EACH_GROUP(k) {
            const V probability = in.z.template load<whole>(p, r, k);
            const V mask = in.m.template load<whole>(p, r, k);
            pixel.gather(probability, mask);
            if (held) z.at[k] = probability;
            if (held) m.at[k] = mask;
        }
        const V from = grad.template load<whole>(p, r, 0);
        const V slope = pixel.backward(from, in.x.template load<whole>(p, r, 0));
        if (grad_x != nullptr) write<whole>(grad_x, p, r, plan.pixels, pixel.grad_x(from));
        LF_EACH_GROUP(k) {
            write<whole>(grad_z, p, r * plan.groups + k, plan.pixels,
                         slope * (held ? m.at[k] : in.m.template load<whole>(p, r, k)));
            write<whole>(grad_m, p, r * plan.groups + k, plan.pixels,
                         slope * (held ? z.at[k] : in.z.template load<whole>(p, r, k)));
        }
    }
};

}  // namespace

extern "C" {

int ladderfast_tagger_inputs_cuda(int gaussian, const TaggerInputs* in, void* dz, void* likelihood, int dtype,
                                  int scalar_dtype, const TaggerShape* shape, void* stream) {
    return dispatch(dtype, scalar_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int n = kSlice<T>;
        if (empty(*shape)) return cudaSuccess;
        const bool whole = sliced<T>(shape->pixels, *in) && aligned_to(n * sizeof(T), dz, likelihood);
        const Inputs<T, n> inputs(*in, scalar_dtype == kFloat32);
        T *d = static_cast<T*>(dz), *l = static_cast<T*>(likelihood);
        if (gaussian) return run<T, false>(GaussianInputs<T, n>{inputs, d, l}, whole, nullptr, *shape, stream);
        return run<T, false>(BernoulliInputs<T, n>{inputs, d, l}, whole, nullptr, *shape, stream);
    });
}

int ladderfast_tagger_nll_cuda(int gaussian, const TaggerInputs* in, void* nll, int dtype, int scalar_dtype,
                               const TaggerShape* shape, void* stream) {
    return dispatch(dtype, scalar_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int n = kSlice<T>;
        if (empty(*shape)) return cudaSuccess;
        const bool whole = sliced<T>(shape->pixels, *in) && aligned_to(n * sizeof(T), nll);
        const Inputs<T, n> inputs(*in, scalar_dtype == kFloat32);
        T* out = static_cast<T*>(nll);
        if (gaussian) return run<T, false>(GaussianNll<T, n>{inputs, out}, whole, nullptr, *shape, stream);
        return run<T, false>(BernoulliNll<T, n>{inputs, out}, whole, nullptr, *shape, stream);
    });
}

int64_t ladderfast_tagger_workspace_cuda(const TaggerShape* shape) {
    if (empty(*shape) || !fits(*shape)) return 0;
    // The types differ in the elements of a slice, hence in their number of blocks.
    const int64_t a = blocks_of(plan_for(*shape, kSlice<double>), *shape);
    const int64_t b = blocks_of(plan_for(*shape, kSlice<float>), *shape);
    return (a > b ? a : b) * static_cast<int64_t>(sizeof(double));
}

int ladderfast_tagger_inputs_backward_cuda(int gaussian, const TaggerInput* grad_dz, const TaggerInput* grad_likelihood,
                                           const TaggerInputs* in, void* grad_x, void* grad_z, void* grad_m,
                                           void* grad_scalar, void* workspace, int dtype, int scalar_dtype,
                                           const TaggerShape* shape, void* stream) {
    return dispatch(dtype, scalar_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int n = kSlice<T>;
        double* partials = static_cast<double*>(workspace);
        cudaError_t error = cudaSuccess;
        if (!empty(*shape)) {
            const bool whole = sliced<T>(shape->pixels, *in) && sliced<T>(shape->pixels, *grad_dz) &&
                               sliced<T>(shape->pixels, *grad_likelihood) &&
                               aligned_to(n * sizeof(T), grad_x, grad_z, grad_m);
            const Inputs<T, n> inputs(*in, scalar_dtype == kFloat32);
            const View<T, n> gd(*grad_dz), gl(*grad_likelihood);
            T *gx = static_cast<T*>(grad_x), *gz = static_cast<T*>(grad_z), *gm = static_cast<T*>(grad_m);
            error = gaussian ? run<T, true>(GaussianInputsBackward<T, n>{inputs, gd, gl, gx, gz, gm}, whole, partials,
                                            *shape, stream)
                             : run<T, false>(BernoulliInputsBackward<T, n>{inputs, gd, gl, gx, gz, gm}, whole, nullptr,
                                             *shape, stream);
        }
        if (!gaussian || error != cudaSuccess) return error;
        return run_sum<T>(partials, in->scalar, grad_scalar, scalar_dtype == kFloat32, *shape, stream);
    });
}

int ladderfast_tagger_nll_backward_cuda(int gaussian, const TaggerInput* grad, const TaggerInputs* in, void* grad_x,
                                        void* grad_z, void* grad_m, void* grad_scalar, void* workspace, int dtype,
                                        int scalar_dtype, const TaggerShape* shape, void* stream) {
    return dispatch(dtype, scalar_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int n = kSlice<T>;
        double* partials = static_cast<double*>(workspace);
        cudaError_t error = cudaSuccess;
        if (!empty(*shape)) {
            const bool whole = sliced<T>(shape->pixels, *in) && sliced<T>(shape->pixels, *grad) &&
                               aligned_to(n * sizeof(T), grad_x, grad_z, grad_m);
            const Inputs<T, n> inputs(*in, scalar_dtype == kFloat32);
            const View<T, n> g(*grad);
            T *gx = static_cast<T*>(grad_x), *gz = static_cast<T*>(grad_z), *gm = static_cast<T*>(grad_m);
            error =
                gaussian
                    ? run<T, true>(GaussianNllBackward<T, n>{inputs, g, gx, gz, gm}, whole, partials, *shape, stream)
                    : run<T, false>(BernoulliNllBackward<T, n>{inputs, g, gx, gz, gm}, whole, nullptr, *shape, stream);
        }
        if (!gaussian || error != cudaSuccess) return error;
        return run_sum<T>(partials, in->scalar, grad_scalar, scalar_dtype == kFloat32, *shape, stream);
    });
}
}

}  // namespace ladderfast::cuda::tagger

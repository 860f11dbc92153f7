// What surrounds Tagger's network in an iteration, on NVIDIA GPUs. Contract in ../tagger_step.h, formulas in
// ../math/tagger.h, how the work is cut in tagger.cuh.
//
// Outputs: a thread stays with its pixels and keeps their columns' statistics and parameters. Statistics, and in
// backward the sums, take a pass of their own, whose blocks leave partial results for a small kernel to merge; the
// gradient is then computed a second time rather than written, rounded and read.
//
// Floor, in elements for each of z: the inputs read two and write four forward, read six and write two backward; the
// outputs read four and write two, and read eight and write two. Nothing of this has been measured on a GPU yet.
#include "../tagger_step.h"
#include "moments.cuh"
#include "tagger.cuh"

namespace ladderfast::cuda::tagger {
namespace {

template <class T, int N>
struct StepInputs {
    using V = Lanes<Compute<T>, N>;
    Inputs<T, N> in;  // m has the logits

    template <int held, bool whole>
    __device__ __forceinline__ void softmax(const Plan& plan, const Place& p, int64_t r, MaskPixel<V>& masks,
                                            Kept<V, held>& a) const {
        LF_EACH_GROUP(k) {
            const V l = logit_exponent(in.m.template load<whole>(p, r, k));
            if (held) a.at[k] = l;
            masks.compare(l);
        }
        LF_EACH_GROUP(k) {
            const V weight = masks.weigh(held ? a.at[k] : logit_exponent(in.m.template load<whole>(p, r, k)));
            if (held) a.at[k] = weight;
        }
        masks.finish();
    }
    template <int held, bool whole>
    __device__ __forceinline__ V mask(const Place& p, int64_t r, int k, const MaskPixel<V>& masks,
                                      const Kept<V, held>& a) const {
        return masks.mask(held ? a.at[k] : exp2_of(logit_exponent(in.m.template load<whole>(p, r, k)) - masks.top));
    }
    template <bool whole>
    __device__ __forceinline__ static void put(T* out, const Plan& plan, const Place& p, int64_t r, int k, const V& z,
                                               const V& m, const V& dz, const V& likelihood) {
        const int64_t row = (r * plan.groups + k) * 4;
        write<whole>(out, p, row, plan.pixels, z);
        write<whole>(out, p, row + 1, plan.pixels, m);
        write<whole>(out, p, row + 2, plan.pixels, dz);
        write<whole>(out, p, row + 3, plan.pixels, likelihood);
    }
};

template <class T, int N>
struct GaussianStepInputs : StepInputs<T, N> {
    using V = Lanes<Compute<T>, N>;
    using Scalar = GaussianScalar<V>;
    T* out;

    __host__ GaussianStepInputs(const Inputs<T, N>& in, T* out) : StepInputs<T, N>{in}, out(out) {}
    __device__ Scalar scalar(int64_t seed) const { return gaussian_scalar<V>(this->in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& v, int64_t r,
                                        Compute<T>&) const {
        Kept<V, held> w, a;
        const V x = this->in.x.template load<whole>(p, r, 0);
        GaussianPixel<V> pixel;
        MaskPixel<V> masks;
        LF_EACH_GROUP(k) {
            const V y = gaussian_exponent(x - this->in.z.template load<whole>(p, r, k), v);
            if (held) w.at[k] = y;
            pixel.compare(y);
        }
        LF_EACH_GROUP(k) {
            const V weight = pixel.weigh(
                held ? w.at[k] : gaussian_exponent(x - this->in.z.template load<whole>(p, r, k), v));
            if (held) w.at[k] = weight;
        }
        pixel.finish(v);
        this->template softmax<held, whole>(plan, p, r, masks, a);
        LF_EACH_GROUP(k) {
            const V z = this->in.z.template load<whole>(p, r, k), e = x - z;
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V dz, likelihood;
            pixel.forward(e, m, held ? w.at[k] : exp2_of(gaussian_exponent(e, v) - pixel.top), dz, likelihood);
            this->template put<whole>(out, plan, p, r, k, z, m, dz, likelihood);
        }
    }
};

template <class T, int N>
struct BernoulliStepInputs : StepInputs<T, N> {
    using V = Lanes<Compute<T>, N>;
    using Scalar = BernoulliScalar<V>;
    T* out;

    __host__ BernoulliStepInputs(const Inputs<T, N>& in, T* out) : StepInputs<T, N>{in}, out(out) {}
    __device__ Scalar scalar(int64_t seed) const { return bernoulli_scalar<V>(this->in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& b, int64_t r,
                                        Compute<T>&) const {
        Kept<V, held> a;
        BernoulliPixel<V> pixel(this->in.x.template load<whole>(p, r, 0));
        MaskPixel<V> masks;
        this->template softmax<held, whole>(plan, p, r, masks, a);
        LF_EACH_GROUP(k)
        pixel.gather(pixel.xi(this->in.z.template load<whole>(p, r, k), b),
                     this->template mask<held, whole>(p, r, k, masks, a));
        pixel.finish();
        LF_EACH_GROUP(k) {
            const V z = this->in.z.template load<whole>(p, r, k);
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V dz, likelihood;
            pixel.forward(pixel.xi(z, b), m, dz, likelihood);
            this->template put<whole>(out, plan, p, r, k, z, m, dz, likelihood);
        }
    }
};

// grad has four rows of pixels for each group.
template <class T, int N>
struct StepInputsBackward : StepInputs<T, N> {
    using V = Lanes<Compute<T>, N>;
    const T* grad;
    int64_t grad_row, grad_group;
    T *grad_x, *grad_z, *grad_logits;

    __host__ StepInputsBackward(const Inputs<T, N>& in, const TaggerInput& grad, T* grad_x, T* grad_z, T* grad_logits)
        : StepInputs<T, N>{in},
          grad(static_cast<const T*>(grad.data)),
          grad_row(grad.row),
          grad_group(grad.group),
          grad_x(grad_x),
          grad_z(grad_z),
          grad_logits(grad_logits) {}

    enum Part { kZ, kM, kDz, kLikelihood };
    template <bool whole>
    __device__ __forceinline__ V of(Part part, const Plan& plan, const Place& p, int64_t r, int k) const {
        V v;
        widen(cuda::load<whole, N>(grad + r * grad_row + k * grad_group + part * plan.pixels + p.pixel, p.count), v.at);
        return v;
    }
};

template <class T, int N>
struct GaussianStepInputsBackward : StepInputsBackward<T, N> {
    using V = Lanes<Compute<T>, N>;
    using Base = StepInputsBackward<T, N>;
    using Scalar = GaussianScalar<V>;
    using Base::Base;
    __device__ Scalar scalar(int64_t seed) const { return gaussian_scalar<V>(this->in, seed); }

    // Little is kept: what the later passes read again comes from the first-level cache.
    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& v, int64_t r,
                                        Compute<T>& sum) const {
        const auto& in = this->in;
        Kept<V, held> a;
        const V x = in.x.template load<whole>(p, r, 0);
        GaussianPixel<V> pixel;
        MaskPixel<V> masks;
        LF_EACH_GROUP(k) pixel.compare(gaussian_exponent(x - in.z.template load<whole>(p, r, k), v));
        LF_EACH_GROUP(k)
        pixel.weigh(gaussian_exponent(x - in.z.template load<whole>(p, r, k), v),
                    this->template of<whole>(Base::kLikelihood, plan, p, r, k));
        pixel.finish(v);
        this->template softmax<held, whole>(plan, p, r, masks, a);
        V sum_v = constant<V>(0);
        // The gradient of a mask is needed before that of its logit: it is made twice.
        LF_EACH_GROUP(k) {
            const V e = x - in.z.template load<whole>(p, r, k);
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V out_z, out_m;
            pixel.backward(this->template of<whole>(Base::kDz, plan, p, r, k),
                           this->template of<whole>(Base::kLikelihood, plan, p, r, k), e, m,
                           exp2_of(gaussian_exponent(e, v) - pixel.top), v, out_z, out_m, sum_v);
            masks.gather(m, out_m + this->template of<whole>(Base::kM, plan, p, r, k));
            write<whole>(this->grad_z, p, r * plan.groups + k, plan.pixels,
                         out_z + this->template of<whole>(Base::kZ, plan, p, r, k));
        }
        write<whole>(this->grad_x, p, r, plan.pixels, pixel.sum_x);
        LF_EACH_GROUP(k) {
            const V e = x - in.z.template load<whole>(p, r, k);
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V none_z, out_m, none = constant<V>(0);
            pixel.backward(this->template of<whole>(Base::kDz, plan, p, r, k),
                           this->template of<whole>(Base::kLikelihood, plan, p, r, k), e, m,
                           exp2_of(gaussian_exponent(e, v) - pixel.top), v, none_z, out_m, none);
            write<whole>(this->grad_logits, p, r * plan.groups + k, plan.pixels,
                         masks.backward(m, out_m + this->template of<whole>(Base::kM, plan, p, r, k)));
        }
#pragma unroll
        for (int i = 0; i < N; ++i) sum += i < p.count ? sum_v.at[i] : Compute<T>(0);
    }
};

template <class T, int N>
struct BernoulliStepInputsBackward : StepInputsBackward<T, N> {
    using V = Lanes<Compute<T>, N>;
    using Base = StepInputsBackward<T, N>;
    using Scalar = BernoulliScalar<V>;
    using Base::Base;
    __device__ Scalar scalar(int64_t seed) const { return bernoulli_scalar<V>(this->in, seed); }

    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, const Scalar& b, int64_t r,
                                        Compute<T>&) const {
        const auto& in = this->in;
        Kept<V, held> a;
        BernoulliPixel<V> pixel(in.x.template load<whole>(p, r, 0));
        MaskPixel<V> masks;
        this->template softmax<held, whole>(plan, p, r, masks, a);
        LF_EACH_GROUP(k)
        pixel.gather(pixel.xi(in.z.template load<whole>(p, r, k), b),
                     this->template mask<held, whole>(p, r, k, masks, a),
                     this->template of<whole>(Base::kDz, plan, p, r, k),
                     this->template of<whole>(Base::kLikelihood, plan, p, r, k));
        pixel.finish_backward();
        LF_EACH_GROUP(k) {
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V out_z, out_m;
            pixel.backward(this->template of<whole>(Base::kDz, plan, p, r, k),
                           this->template of<whole>(Base::kLikelihood, plan, p, r, k),
                           pixel.xi(in.z.template load<whole>(p, r, k), b), m, b, out_z, out_m);
            masks.gather(m, out_m + this->template of<whole>(Base::kM, plan, p, r, k));
            write<whole>(this->grad_z, p, r * plan.groups + k, plan.pixels,
                         out_z + this->template of<whole>(Base::kZ, plan, p, r, k));
        }
        write<whole>(this->grad_x, p, r, plan.pixels, pixel.sum_x);
        LF_EACH_GROUP(k) {
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V none, out_m;
            pixel.backward(this->template of<whole>(Base::kDz, plan, p, r, k),
                           this->template of<whole>(Base::kLikelihood, plan, p, r, k),
                           pixel.xi(in.z.template load<whole>(p, r, k), b), m, b, none, out_m);
            write<whole>(this->grad_logits, p, r * plan.groups + k, plan.pixels,
                         masks.backward(m, out_m + this->template of<whole>(Base::kM, plan, p, r, k)));
        }
    }
};

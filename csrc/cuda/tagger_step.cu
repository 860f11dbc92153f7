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
            const V l = in.m.template load<whole>(p, r, k);
            if (held) a.at[k] = l;
            masks.compare(l);
        }
        LF_EACH_GROUP(k) {
            const V weight = masks.weigh(held ? a.at[k] : in.m.template load<whole>(p, r, k));
            if (held) a.at[k] = weight;
        }
        masks.finish();
    }
    template <int held, bool whole>
    __device__ __forceinline__ V mask(const Place& p, int64_t r, int k, const MaskPixel<V>& masks,
                                      const Kept<V, held>& a) const {
        return masks.mask(held ? a.at[k] : masks.weight(in.m.template load<whole>(p, r, k)));
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
            const V e = x - this->in.z.template load<whole>(p, r, k);
            if (held) w.at[k] = e;
            pixel.compare(e);
        }
        LF_EACH_GROUP(k) {
            const V weight = pixel.weigh(held ? w.at[k] : x - this->in.z.template load<whole>(p, r, k), v);
            if (held) w.at[k] = weight;
        }
        pixel.finish(v);
        this->template softmax<held, whole>(plan, p, r, masks, a);
        LF_EACH_GROUP(k) {
            const V z = this->in.z.template load<whole>(p, r, k), e = x - z;
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V dz, likelihood;
            pixel.forward(e, m, held ? w.at[k] : pixel.weight(e, v), dz, likelihood);
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
        BernoulliPixel<V> pixel(this->in.x.template load<whole>(p, r, 0), b);
        MaskPixel<V> masks;
        this->template softmax<held, whole>(plan, p, r, masks, a);
        LF_EACH_GROUP(k)
        pixel.gather(this->in.z.template load<whole>(p, r, k), this->template mask<held, whole>(p, r, k, masks, a), b);
        pixel.finish();
        LF_EACH_GROUP(k) {
            const V z = this->in.z.template load<whole>(p, r, k);
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V dz, likelihood;
            pixel.forward(m, pixel.density(z), dz, likelihood);
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
        LF_EACH_GROUP(k) pixel.compare(x - in.z.template load<whole>(p, r, k));
        LF_EACH_GROUP(k)
        pixel.weigh(x - in.z.template load<whole>(p, r, k), v,
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
                           this->template of<whole>(Base::kLikelihood, plan, p, r, k), e, m, pixel.weight(e, v), v,
                           out_z, out_m, sum_v);
            masks.gather(m, out_m + this->template of<whole>(Base::kM, plan, p, r, k));
            write<whole>(this->grad_z, p, r * plan.groups + k, plan.pixels,
                         out_z + this->template of<whole>(Base::kZ, plan, p, r, k));
        }
        if (this->grad_x != nullptr) write<whole>(this->grad_x, p, r, plan.pixels, pixel.sum_x);
        LF_EACH_GROUP(k) {
            const V e = x - in.z.template load<whole>(p, r, k);
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            V none_z, out_m, none = constant<V>(0);
            pixel.backward(this->template of<whole>(Base::kDz, plan, p, r, k),
                           this->template of<whole>(Base::kLikelihood, plan, p, r, k), e, m, pixel.weight(e, v), v,
                           none_z, out_m, none);
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
        BernoulliPixel<V> pixel(in.x.template load<whole>(p, r, 0), b);
        MaskPixel<V> masks;
        this->template softmax<held, whole>(plan, p, r, masks, a);
        LF_EACH_GROUP(k)
        pixel.gather(in.z.template load<whole>(p, r, k), this->template mask<held, whole>(p, r, k, masks, a),
                     this->template of<whole>(Base::kDz, plan, p, r, k),
                     this->template of<whole>(Base::kLikelihood, plan, p, r, k), b);
        pixel.finish_backward();
        V sum_x = pixel.grad_t;
        LF_EACH_GROUP(k) {
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            const V z = in.z.template load<whole>(p, r, k), density = pixel.density(z);
            const V from_likelihood = this->template of<whole>(Base::kLikelihood, plan, p, r, k);
            V out_z, out_m;
            pixel.backward(this->template of<whole>(Base::kDz, plan, p, r, k), from_likelihood, z, m, density, b, out_z,
                           out_m);
            sum_x = sum_x + pixel.grad_x(from_likelihood, z, density, b);
            masks.gather(m, out_m + this->template of<whole>(Base::kM, plan, p, r, k));
            write<whole>(this->grad_z, p, r * plan.groups + k, plan.pixels,
                         out_z + this->template of<whole>(Base::kZ, plan, p, r, k));
        }
        if (this->grad_x != nullptr) write<whole>(this->grad_x, p, r, plan.pixels, sum_x);
        LF_EACH_GROUP(k) {
            const V m = this->template mask<held, whole>(p, r, k, masks, a);
            const V z = in.z.template load<whole>(p, r, k);
            V none, out_m;
            pixel.backward(this->template of<whole>(Base::kDz, plan, p, r, k),
                           this->template of<whole>(Base::kLikelihood, plan, p, r, k), z, m, pixel.density(z), b, none,
                           out_m);
            write<whole>(this->grad_logits, p, r * plan.groups + k, plan.pixels,
                         masks.backward(m, out_m + this->template of<whole>(Base::kM, plan, p, r, k)));
        }
    }
};

// What a thread knows of its pixels' columns: z before any squashing is (z_pre - mean_z) scale_z + b1, and the logit is
// (m_pre - mean_m) scale_m.
template <class V>
struct Columns {
    V mean_z, scale_z, b1, mean_m, scale_m;
};

template <class T, int N>
struct Outputs {
    using C = Compute<T>;
    using V = Lanes<C, N>;
    View<T, N> x, z, m, c1, b1;
    View<C, N> stats;
    const T* c2;
    const void* variance;
    bool float_variance;

    __host__ Outputs(const TaggerOutputs& in, const C* stats, const TaggerShape& s, bool float_variance)
        : x(in.x),
          z(in.z),
          m(in.m),
          c1({in.c1, s.pixels, 0}),
          b1({in.b1, s.pixels, 0}),
          stats({stats, s.pixels, 0}),
          c2(static_cast<const T*>(in.c2)),
          variance(in.variance),
          float_variance(float_variance) {}

    template <bool whole>
    __device__ __forceinline__ Columns<V> columns(const Place& p) const {
        const C c = load_either<T>(c2, sizeof(T) == sizeof(float), p.seed);
        return {stats.template load<whole>(p, p.seed * 4, 0),
                stats.template load<whole>(p, p.seed * 4 + 1, 0) * c1.template load<whole>(p, p.seed, 0),
                b1.template load<whole>(p, p.seed, 0), stats.template load<whole>(p, p.seed * 4 + 2, 0),
                stats.template load<whole>(p, p.seed * 4 + 3, 0) * constant<V>(c)};
    }
    template <bool gaussian>
    __device__ __forceinline__ GaussianScalar<V> scalars(int64_t seed) const {
        if constexpr (gaussian) return gaussian_scalar<V, T>(variance, float_variance, seed);
        return {};
    }
    template <bool gaussian, bool whole>
    __device__ __forceinline__ V z_of(const Columns<V>& c, const Place& p, int64_t r, int k) const {
        const V out = (z.template load<whole>(p, r, k) - c.mean_z) * c.scale_z + c.b1;
        if constexpr (gaussian) return out;
        return logistic(out);
    }
    template <bool whole>
    __device__ __forceinline__ V logit_of(const Columns<V>& c, const Place& p, int64_t r, int k) const {
        return (m.template load<whole>(p, r, k) - c.mean_m) * c.scale_m;
    }
};

// Passes over the outputs. A thread starts with its pixels, takes its rows, and where the pass sums over them all
// threads of a block end together.

// Moments of z_pre and m_pre, relative to the seed's first row and group; partials (seeds, chunks, 4, pixels) receive
// mean and squares of each.
template <class T, int N>
struct OutputsMoments {
    using C = Compute<T>;
    using V = Lanes<C, N>;
    View<T, N> z, m;
    C* partials;

    struct State {
        V first[2], mean[2], squares[2];
        C count;
    };
    template <bool whole>
    __device__ __forceinline__ void start(const Plan& plan, const Place& p, State& s) const {
        s.first[0] = z.template load<whole>(p, p.seed * plan.rows, 0);
        s.first[1] = m.template load<whole>(p, p.seed * plan.rows, 0);
    }
    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, State& s, int64_t r) const {
#pragma unroll 1
        for (int k = 0; k < plan.groups; ++k) {
            s.count += 1;
            const V share = constant<V>(C(1) / s.count);
            const V pre[2] = {z.template load<whole>(p, r, k), m.template load<whole>(p, r, k)};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const V value = pre[j] - s.first[j], apart = value - s.mean[j];
                s.mean[j] = s.mean[j] + apart * share;
                s.squares[j] = s.squares[j] + apart * (value - s.mean[j]);
            }
        }
    }
    __device__ __forceinline__ void end(const Plan& plan, const Place& p, State& s) const {
        __shared__ C shared[3][kThreads];
        shared[0][threadIdx.x] = s.count;
#pragma unroll
        for (int n = 0; n < 2 * N; ++n) {
            const int i = n / 2, j = n % 2;
            shared[1][threadIdx.x] = s.mean[j].at[i];
            shared[2][threadIdx.x] = s.squares[j].at[i];
            __syncthreads();
            if (static_cast<int>(threadIdx.x) < plan.across && i < p.count) {
                Moments<C> all = {shared[0][threadIdx.x], shared[1][threadIdx.x], shared[2][threadIdx.x]};
                for (int y = threadIdx.x + plan.across; y < plan.across * plan.down; y += plan.across)
                    all.merge(shared[0][y], shared[1][y], shared[2][y]);
                C* to = partials + ((blockIdx.x / plan.tiles) * 4 + 2 * j) * plan.pixels + p.pixel + i;
                to[0] = all.mean;
                to[plan.pixels] = all.squares;
            }
            __syncthreads();
        }
    }
};

template <bool gaussian, class T, int N>
struct OutputsForward {
    using V = Lanes<Compute<T>, N>;
    Outputs<T, N> in;
    T *z, *logits, *nll;

    struct State {
        Columns<V> columns;
        GaussianScalar<V> scalars;
    };
    template <bool whole>
    __device__ __forceinline__ void start(const Plan&, const Place& p, State& s) const {
        s = {in.template columns<whole>(p), in.template scalars<gaussian>(p.seed)};
    }
    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, State& s, int64_t r) const {
        Kept<V, held> l, other;
        const V x = in.x.template load<whole>(p, r, 0);
        MaskPixel<V> masks;
        MaskPixel<V, false> joint;
        LF_EACH_GROUP(k) {
            const V out = in.template z_of<gaussian, whole>(s.columns, p, r, k);
            const V logit = in.template logit_of<whole>(s.columns, p, r, k);
            write<whole>(z, p, r * plan.groups + k, plan.pixels, out);
            write<whole>(logits, p, r * plan.groups + k, plan.pixels, logit);
            masks.compare(logit);
            if (held) l.at[k] = logit;
            if (held) other.at[k] = out;
        }
        BernoulliMixture<V> mixture;
        const auto logit_of = [&](int k) { return held ? l.at[k] : in.template logit_of<whole>(s.columns, p, r, k); };
        const auto joint_exponent = [&](int k, const V& out) {
            return masks.exponent(logit_of(k)) + gaussian_exponent(x - out, s.scalars);
        };
        LF_EACH_GROUP(k) {
            const V weight = masks.weigh(logit_of(k));
            const V out = held ? other.at[k] : in.template z_of<gaussian, whole>(s.columns, p, r, k);
            if constexpr (gaussian) {
                const V exponent = joint_exponent(k, out);
                joint.compare(exponent);
                if (held) other.at[k] = exponent;
            } else {
                mixture.gather(out, weight);
            }
        }
        if constexpr (gaussian) {
            LF_EACH_GROUP(k)
            joint.weigh(held ? other.at[k] : joint_exponent(k, in.template z_of<true, whole>(s.columns, p, r, k)));
            write<whole>(nll, p, r, plan.pixels, gaussian_logits_nll(joint.top, masks.total / joint.total, s.scalars));
        } else {
            mixture.p = mixture.p / masks.total;
            write<whole>(nll, p, r, plan.pixels, mixture.nll(x));
        }
    }
};

// The gradients of z before any squashing and of the logits are computed twice: `finish` false sums them over rows and
// groups, alone and times z_pre or m_pre less its mean, into partials (seeds, chunks, 4, pixels); `finish` true takes
// their means and writes.
template <bool gaussian, bool finish, class T, int N>
struct OutputsBackward {
    using C = Compute<T>;
    using V = Lanes<C, N>;
    Outputs<T, N> in;
    View<T, N> grad_z, grad_logits, grad_nll;
    View<C, N> means;  // (seeds, 4, pixels): what is taken off: of z a constant and a multiple of z_pre - mean; of m
    T *to_x, *to_z, *to_m;
    C* partials;
    double* of_variance;  // by block

    struct State {
        Columns<V> columns;
        GaussianScalar<V> scalars;
        V four[4];  // sums, or means
        C sum_v;
    };
    template <bool whole>
    __device__ __forceinline__ void start(const Plan&, const Place& p, State& s) const {
        s.columns = in.template columns<whole>(p);
        s.scalars = in.template scalars<gaussian>(p.seed);
        if constexpr (finish) {
#pragma unroll
            for (int j = 0; j < 4; ++j) s.four[j] = means.template load<whole>(p, p.seed * 4 + j, 0);
        }
    }
    // Nothing is kept: what the later passes read again comes from the first-level cache.
    template <int held, bool whole>
    __device__ __forceinline__ void row(const Plan& plan, const Place& p, State& s, int64_t r) const {
        const V x = in.x.template load<whole>(p, r, 0), grad = grad_nll.template load<whole>(p, r, 0);
        MaskPixel<V> masks;
        MaskPixel<V, false> joint;
        const auto joint_exponent = [&](const V& logit, const V& out) {
            return masks.exponent(logit) + gaussian_exponent(x - out, s.scalars);
        };
        LF_EACH_GROUP(k) masks.compare(in.template logit_of<whole>(s.columns, p, r, k));
        BernoulliMixture<V> mixture;
        LF_EACH_GROUP(k) {
            const V logit = in.template logit_of<whole>(s.columns, p, r, k);
            const V out = in.template z_of<gaussian, whole>(s.columns, p, r, k), weight = masks.weigh(logit);
            if constexpr (gaussian)
                joint.compare(joint_exponent(logit, out));
            else
                mixture.gather(out, weight);
        }
        if constexpr (gaussian) {
            LF_EACH_GROUP(k)
            joint.weigh(joint_exponent(in.template logit_of<whole>(s.columns, p, r, k),
                                       in.template z_of<true, whole>(s.columns, p, r, k)));
        }
        masks.finish();
        V slope = constant<V>(0), grad_x = constant<V>(0), sum_v = grad;
        if constexpr (gaussian) {
            joint.finish();
        } else {
            mixture.p = mixture.p * masks.share;
            slope = mixture.backward(grad, x);
            if (finish && to_x != nullptr) grad_x = mixture.grad_x(grad);
        }
        LF_EACH_GROUP(k) {
            const V logit = in.template logit_of<whole>(s.columns, p, r, k);
            const V out = in.template z_of<gaussian, whole>(s.columns, p, r, k);
            const V m = masks.mask(masks.weight(logit));
            V out_z = grad_z.template load<whole>(p, r, k), out_m;
            if constexpr (gaussian) {
                V from_nll;
                gaussian_logits_backward(grad, x - out, m, joint.mask(joint.weight(joint_exponent(logit, out))),
                                         s.scalars, from_nll, out_m, sum_v);
                grad_x = grad_x - from_nll;
                out_z = out_z + from_nll;
            } else {
                out_z = (slope * m + out_z) * (out * (constant<V>(1) - out));
                out_m = slope * m * (out - mixture.p);
            }
            out_m = out_m + grad_logits.template load<whole>(p, r, k);
            const V of_z = in.z.template load<whole>(p, r, k) - s.columns.mean_z;
            const V of_m = in.m.template load<whole>(p, r, k) - s.columns.mean_m;
            if constexpr (finish) {
                write<whole>(to_z, p, r * plan.groups + k, plan.pixels,
                             s.columns.scale_z * ((out_z - s.four[0]) - of_z * s.four[1]));
                write<whole>(to_m, p, r * plan.groups + k, plan.pixels,
                             s.columns.scale_m * ((out_m - s.four[2]) - of_m * s.four[3]));
            } else {
                s.four[0] = s.four[0] + out_z;
                s.four[1] = s.four[1] + out_z * of_z;
                s.four[2] = s.four[2] + out_m;
                s.four[3] = s.four[3] + out_m * of_m;
            }
        }
        if constexpr (finish) {
            if (to_x != nullptr) write<whole>(to_x, p, r, plan.pixels, grad_x);
        } else if constexpr (gaussian) {
#pragma unroll
            for (int i = 0; i < N; ++i) s.sum_v += i < p.count ? sum_v.at[i] : C(0);
        }
    }
    __device__ __forceinline__ void end(const Plan& plan, const Place& p, State& s) const {
        if constexpr (finish) return;
        __shared__ C shared[kThreads];
#pragma unroll
        for (int n = 0; n < 4 * N; ++n) {
            const int i = n / 4, j = n % 4;
            shared[threadIdx.x] = s.four[j].at[i];
            __syncthreads();
            if (static_cast<int>(threadIdx.x) < plan.across && i < p.count) {
                C sum = 0;
                for (int y = threadIdx.x; y < plan.across * plan.down; y += plan.across) sum += shared[y];
                partials[((blockIdx.x / plan.tiles) * 4 + j) * plan.pixels + p.pixel + i] = sum;
            }
            __syncthreads();
        }
        if constexpr (gaussian) {
            const double total = block_sum(s.sum_v, plan.threads);
            if (threadIdx.x == 0) of_variance[blockIdx.x] = total;
        }
    }
};

template <class Pass, class T, int N, int held, bool whole, bool sums>
__global__ void __launch_bounds__(kThreads, 2) over_outputs(Pass pass, Plan plan) {
    const Place place(plan, N);
    typename Pass::State state = {};
    if (place.row < place.row_end) {
        pass.template start<whole>(plan, place, state);
#pragma unroll 1
        for (int64_t r = place.row; r < place.row_end; r += plan.down)
            pass.template row<held, whole>(plan, place, state, r);
    }
    if constexpr (sums) pass.end(plan, place, state);
}

constexpr int kMergeColumns = 32, kMergeDown = kThreads / kMergeColumns;

// The column and the seed of a thread that merges, of which a block has kMergeColumns.
struct MergePlace {
    int64_t seed, pixel;
    int x, y;
    bool there;

    __device__ explicit MergePlace(const Plan& plan) {
        const unsigned blocks = static_cast<unsigned>((plan.pixels + kMergeColumns - 1) / kMergeColumns);
        seed = blockIdx.x / blocks;
        x = threadIdx.x % kMergeColumns;
        y = threadIdx.x / kMergeColumns;
        pixel = static_cast<int64_t>(blockIdx.x % blocks) * kMergeColumns + x;
        there = pixel < plan.pixels;
    }
};

int64_t merge_blocks(const TaggerShape& s) { return s.seeds * ceil_div(s.pixels, kMergeColumns); }

// stats (seeds, 4, pixels): mean and 1 / sqrt(variance + eps) of z_pre, then of m_pre.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_moments(const T* __restrict__ z, const T* __restrict__ m, int64_t z_row, int64_t m_row,
                  const Compute<T>* __restrict__ partials, Compute<T>* __restrict__ stats, double eps, Plan plan) {
    using C = Compute<T>;
    __shared__ C shared[3][kThreads];
    const MergePlace p(plan);
    const int64_t most = static_cast<int64_t>(plan.down) * plan.steps;
#pragma unroll 1
    for (int j = 0; j < 2; ++j) {
        Moments<C> all = {};
        const C* from = partials + (p.seed * plan.chunks * 4 + 2 * j) * plan.pixels + p.pixel;
        if (p.there) {
#pragma unroll 4
            for (int chunk = p.y; chunk < plan.chunks; chunk += kMergeDown) {
                const int64_t rest = plan.rows - chunk * most;
                const C* at = from + static_cast<int64_t>(chunk) * 4 * plan.pixels;
                all.merge(static_cast<C>((rest < most ? rest : most) * plan.groups), at[0], at[plan.pixels]);
            }
        }
        shared[0][threadIdx.x] = all.count;
        shared[1][threadIdx.x] = all.mean;
        shared[2][threadIdx.x] = all.squares;
        __syncthreads();
        if (p.y == 0 && p.there) {
            for (int n = threadIdx.x + kMergeColumns; n < kThreads; n += kMergeColumns)
                all.merge(shared[0][n], shared[1][n], shared[2][n]);
            const int64_t first = p.seed * plan.rows * (j == 0 ? z_row : m_row) + p.pixel;
            C* to = stats + (p.seed * 4 + 2 * j) * plan.pixels + p.pixel;
            to[0] = load_either<T>(j == 0 ? z : m, sizeof(T) == sizeof(float), first) + all.mean;
            to[plan.pixels] = C(1) / sqrt(all.squares / all.count + static_cast<C>(eps));
        }
        __syncthreads();
    }
}

// From the sums: the gradients of b1 and c1, the block's part of that of c2, and what `finish` takes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_sums(const Compute<T>* __restrict__ partials, const Compute<T>* __restrict__ stats, T* __restrict__ b1,
               T* __restrict__ c1, double* __restrict__ of_c2, Compute<T>* __restrict__ means, Plan plan) {
    using C = Compute<T>;
    __shared__ double shared[kThreads];
    const MergePlace p(plan);
    const double share = 1.0 / (static_cast<double>(plan.rows) * plan.groups);
    double c2 = 0;
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
        const int64_t at = (p.seed * 4 + j) * plan.pixels + p.pixel;
        const C* from = partials + at + p.seed * 4 * (plan.chunks - 1) * plan.pixels;
        double total = 0;
        if (p.there) {
#pragma unroll 4
            for (int chunk = p.y; chunk < plan.chunks; chunk += kMergeDown)
                total += from[static_cast<int64_t>(chunk) * 4 * plan.pixels];
        }
        shared[threadIdx.x] = total;
        __syncthreads();
        if (p.y == 0 && p.there) {
            total = strided_sum(shared + threadIdx.x, kMergeColumns, kMergeDown);
            const double rstd = j % 2 == 1 ? stats[at] : 1;
            means[at] = static_cast<C>(total * share * rstd * rstd);
            const C sum = static_cast<C>(total * rstd);
            if (j < 2)
                store_either<T>(j == 0 ? b1 : c1, sizeof(T) == sizeof(float), p.seed * plan.pixels + p.pixel, sum);
            if (j == 3) c2 = total * rstd;
        }
        __syncthreads();
    }
    const double all = block_sum(c2, kThreads);
    if (threadIdx.x == 0) of_c2[blockIdx.x] = all;
}

// Sums over no rows.
template <class T>
__global__ void __launch_bounds__(kThreads) zeros(T* __restrict__ to, int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < count) to[i] = T{};
}

// The passes that sum: as few chunks as fill a chip, for each leaves partial results.
Plan sums_plan(const TaggerShape& s, int n) {
    Plan plan = plan_for(s, n);
    const int64_t blocks = s.seeds * plan.tiles * ceil_div(plan.rows, plan.down);
    constexpr int64_t kBlocks = 512;
    plan.steps = static_cast<int>(ceil_div(blocks, kBlocks));
    plan.chunks = static_cast<int>(ceil_div(plan.rows, static_cast<int64_t>(plan.down) * plan.steps));
    return plan;
}

// Scratch of the outputs: by blocks of merges and of sums, then by columns.
template <class C>
struct Scratch {
    double *of_c2, *of_variance;
    C *partials, *means;
    int64_t bytes;

    Scratch(void* workspace, const TaggerShape& s, const Plan& plan) {
        of_c2 = static_cast<double*>(workspace);
        of_variance = of_c2 + merge_blocks(s);
        partials = reinterpret_cast<C*>(of_variance + blocks_of(plan, s));
        means = partials + (s.seeds * plan.chunks * 4 * s.pixels + 3) / 4 * 4;
        bytes = reinterpret_cast<char*>(means + s.seeds * 4 * s.pixels) - static_cast<char*>(workspace);
    }
};

template <class T, bool sums, class Pass>
cudaError_t run_outputs(const Pass& pass, bool whole, const Plan& plan, const TaggerShape& shape, void* stream) {
    constexpr int n = kSlice<T>;
    auto kernel = over_outputs<Pass, T, n, 0, false, sums>;
    if (whole)
        kernel = shape.groups <= kHeld ? over_outputs<Pass, T, n, kHeld, true, sums>
                                       : over_outputs<Pass, T, n, 0, true, sums>;
    return launch(kernel, blocks_of(plan, shape), plan.threads, stream, pass, plan);
}

template <class T>
bool sliced(const TaggerShape& s, const TaggerOutputs& in, const void* stats) {
    constexpr int n = kSlice<T>;
    return sliced<T>(s.pixels, in.x) && sliced<T>(s.pixels, in.z) && sliced<T>(s.pixels, in.m) &&
           aligned_to(n * sizeof(T), in.c1, in.b1) && aligned_to(n * sizeof(Compute<T>), stats);
}

}  // namespace

extern "C" {

int ladderfast_tagger_step_inputs_cuda(int gaussian, const TaggerInputs* in, void* out, int dtype, int scalar_dtype,
                                       const TaggerShape* shape, void* stream) {
    return dispatch(dtype, scalar_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int n = kSlice<T>;
        if (empty(*shape)) return cudaSuccess;
        const bool whole = sliced<T>(shape->pixels, *in) && aligned_to(n * sizeof(T), out);
        const Inputs<T, n> inputs(*in, scalar_dtype == kFloat32);
        T* to = static_cast<T*>(out);
        if (gaussian) return run<T, false>(GaussianStepInputs<T, n>(inputs, to), whole, nullptr, *shape, stream);
        return run<T, false>(BernoulliStepInputs<T, n>(inputs, to), whole, nullptr, *shape, stream);
    });
}

int ladderfast_tagger_step_inputs_backward_cuda(int gaussian, const TaggerInput* grad, const TaggerInputs* in,
                                                void* grad_x, void* grad_z, void* grad_logits, void* grad_scalar,
                                                void* workspace, int dtype, int scalar_dtype, const TaggerShape* shape,
                                                void* stream) {
    return dispatch(dtype, scalar_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int n = kSlice<T>;
        double* partials = static_cast<double*>(workspace);
        cudaError_t error = cudaSuccess;
        if (!empty(*shape)) {
            const bool whole = sliced<T>(shape->pixels, *in) && sliced<T>(shape->pixels, *grad) &&
                               aligned_to(n * sizeof(T), grad_x, grad_z, grad_logits);
            const Inputs<T, n> inputs(*in, scalar_dtype == kFloat32);
            T *gx = static_cast<T*>(grad_x), *gz = static_cast<T*>(grad_z), *gl = static_cast<T*>(grad_logits);
            error = gaussian ? run<T, true>(GaussianStepInputsBackward<T, n>(inputs, *grad, gx, gz, gl), whole,
                                            partials, *shape, stream)
                             : run<T, false>(BernoulliStepInputsBackward<T, n>(inputs, *grad, gx, gz, gl), whole,
                                             nullptr, *shape, stream);
        }
        if (!gaussian || error != cudaSuccess) return error;
        return run_sum<T>(partials, in->scalar, grad_scalar, scalar_dtype == kFloat32, *shape, stream);
    });
}

int64_t ladderfast_tagger_step_outputs_workspace_cuda(const TaggerShape* shape) {
    if (empty(*shape) || !fits(*shape)) return 0;
    const int64_t a = Scratch<double>(nullptr, *shape, sums_plan(*shape, kSlice<double>)).bytes;
    const int64_t b = Scratch<float>(nullptr, *shape, sums_plan(*shape, kSlice<float>)).bytes;
    return a > b ? a : b;
}

int ladderfast_tagger_step_outputs_cuda(int gaussian, const TaggerOutputs* in, void* z, void* logits, void* nll,
                                        void* stats, void* workspace, double eps, int dtype, int variance_dtype,
                                        const TaggerShape* shape, void* stream) {
    return dispatch(dtype, variance_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using C = Compute<T>;
        constexpr int n = kSlice<T>;
        const TaggerShape& s = *shape;
        if (empty(s)) return cudaSuccess;
        const Plan plan = sums_plan(s, n);
        const Scratch<C> scratch(workspace, s, plan);
        C* found = static_cast<C*>(stats);
        const bool whole = sliced<T>(s, *in, stats) && aligned_to(n * sizeof(T), z, logits, nll);
        const OutputsMoments<T, n> moments{View<T, n>(in->z), View<T, n>(in->m), scratch.partials};
        if (const cudaError_t error = run_outputs<T, true>(moments, whole, plan, s, stream)) return error;
        if (const cudaError_t error =
                launch(merge_moments<T>, merge_blocks(s), kThreads, stream, static_cast<const T*>(in->z.data),
                       static_cast<const T*>(in->m.data), in->z.row, in->m.row, scratch.partials, found, eps, plan))
            return error;
        const Outputs<T, n> outputs(*in, found, s, variance_dtype == kFloat32);
        T *to_z = static_cast<T*>(z), *to_l = static_cast<T*>(logits), *to_n = static_cast<T*>(nll);
        const Plan rows = plan_for(s, n);
        if (gaussian)
            return run_outputs<T, false>(OutputsForward<true, T, n>{outputs, to_z, to_l, to_n}, whole, rows, s, stream);
        return run_outputs<T, false>(OutputsForward<false, T, n>{outputs, to_z, to_l, to_n}, whole, rows, s, stream);
    });
}

int ladderfast_tagger_step_outputs_backward_cuda(int gaussian, const TaggerOutputs* in, const TaggerInput* grad_z,
                                                 const TaggerInput* grad_logits, const TaggerInput* grad_nll,
                                                 const void* stats, void* grad_x, void* grad_z_pre, void* grad_m_pre,
                                                 void* grad_c1, void* grad_b1, void* grad_c2, void* grad_variance,
                                                 void* workspace, int dtype, int variance_dtype,
                                                 const TaggerShape* shape, void* stream) {
    return dispatch(dtype, variance_dtype, *shape, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using C = Compute<T>;
        constexpr int n = kSlice<T>;
        const TaggerShape& s = *shape;
        int64_t of_c2 = 0, of_variance = 0;  // partial sums of a seed
        double *c2 = nullptr, *variance = nullptr;
        if (!empty(s)) {
            const Plan plan = sums_plan(s, n), rows = plan_for(s, n);
            const Scratch<C> scratch(workspace, s, plan);
            const bool whole = sliced<T>(s, *in, stats) && sliced<T>(s.pixels, *grad_z) &&
                               sliced<T>(s.pixels, *grad_logits) && sliced<T>(s.pixels, *grad_nll) &&
                               aligned_to(n * sizeof(T), grad_x, grad_z_pre, grad_m_pre) &&
                               aligned_to(n * sizeof(C), scratch.means);
            const C* found = static_cast<const C*>(stats);
            const Outputs<T, n> outputs(*in, found, s, variance_dtype == kFloat32);
            const View<T, n> gz(*grad_z), gl(*grad_logits), gn(*grad_nll);
            const View<C, n> means({scratch.means, s.pixels, 0});
            T *to_x = static_cast<T*>(grad_x), *to_z = static_cast<T*>(grad_z_pre), *to_m = static_cast<T*>(grad_m_pre);
            const auto pass = [&](auto is_gaussian, auto finish) {
                constexpr bool kGaussian = decltype(is_gaussian)::value, kFinish = decltype(finish)::value;
                const OutputsBackward<kGaussian, kFinish, T, n> made{
                    outputs, gz, gl, gn, means, to_x, to_z, to_m, scratch.partials, scratch.of_variance};
                return run_outputs<T, !kFinish>(made, whole, kFinish ? rows : plan, s, stream);
            };
            if (const cudaError_t error =
                    gaussian ? pass(std::true_type(), std::false_type()) : pass(std::false_type(), std::false_type()))
                return error;
            if (const cudaError_t error =
                    launch(merge_sums<T>, merge_blocks(s), kThreads, stream, scratch.partials, found,
                           static_cast<T*>(grad_b1), static_cast<T*>(grad_c1), scratch.of_c2, scratch.means, plan))
                return error;
            if (const cudaError_t error =
                    gaussian ? pass(std::true_type(), std::true_type()) : pass(std::false_type(), std::true_type()))
                return error;
            of_c2 = merge_blocks(s) / s.seeds;
            of_variance = blocks_of(plan, s) / s.seeds;
            c2 = scratch.of_c2;
            variance = scratch.of_variance;
        } else {
            const int64_t count = s.seeds * s.pixels;
            for (void* to : {grad_c1, grad_b1})
                if (const cudaError_t error =
                        launch(zeros<T>, ceil_div(count, kThreads), kThreads, stream, static_cast<T*>(to), count))
                    return error;
        }
        if (const cudaError_t error =
                launch(sum_partials<T>, s.seeds, kThreads, stream, c2, nullptr, grad_c2, dtype == kFloat32, of_c2))
            return error;
        if (!gaussian) return cudaSuccess;
        return launch(sum_partials<T>, s.seeds, kThreads, stream, variance, in->variance, grad_variance,
                      variance_dtype == kFloat32, of_variance);
    });
}
}

}  // namespace ladderfast::cuda::tagger

// CPU kernels of the op `tagger_step`; contract in ../tagger_step.h, formulas in ../math/tagger.h.
//
// Inputs: as in tagger.cpp a vector, or a pair of them, covers neighbouring pixels of one row and goes over the groups
// a few times; what is dear to compute stays on the stack in between.
//
// Outputs: an item is a block of pixels of all rows of a seed, so that statistics, results and, in backward, the sums
// and what needs them read from the second-level cache what the first pass has brought there.
#undef LF_THIS_FILE
#define LF_THIS_FILE "tagger_step.cpp"

#ifndef LADDERFAST_CPU_TAGGER_STEP_PLAN
#define LADDERFAST_CPU_TAGGER_STEP_PLAN

#include "../tagger_step.h"
#include "isa.h"
#include "plan.h"
#include "tagger_plan.h"

namespace ladderfast::cpu {

static const int64_t kOutputsBlock = 64;  // pixels of an item of the outputs
static const int64_t kOutputsTile = 32;   // rows of x whose sums are kept in T

static inline int64_t outputs_blocks(const TaggerShape& s) { return ceil_div(s.pixels, kOutputsBlock); }

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "elementary.h"
#include "moments.h"
#include "../math/tagger.h"
#include "tagger_pass.h"

template <class T>
struct StepInputs : TaggerPass<T> {
    T* out;

    LF_HD StepInputs(const TaggerInputs& in, const TaggerShape& s, T* out) : TaggerPass<T>(in, s), out(out) {}

    // The masks' exponentials in a[k]; finishes `masks`.
    template <class V, bool whole>
    LF_HD void softmax(MaskPixel<V>& masks, V* a, int64_t r, int64_t d, int64_t n) const {
        for (int64_t k = 0; k < this->groups; ++k) {
            a[k] = logit_exponent(this->m.template load<V, whole>(r, k, d, n));
            masks.compare(a[k]);
        }
        for (int64_t k = 0; k < this->groups; ++k) a[k] = masks.weigh(a[k]);
        masks.finish();
    }
    template <class V, bool whole>
    LF_HD void put(int64_t r, int64_t k, int64_t d, int64_t n, V z, V m, V dz, V likelihood) const {
        T* to = out + (r * this->groups + k) * 4 * this->width + d;
        write<whole>(z, to, n);
        write<whole>(m, to + this->width, n);
        write<whole>(dz, to + 2 * this->width, n);
        write<whole>(likelihood, to + 3 * this->width, n);
    }
};

template <class T>
struct GaussianStepInputs : StepInputs<T> {
    GaussianScalar<T> scalars;

    LF_HD GaussianStepInputs(const TaggerInputs& in, const TaggerShape& s, T* out) : StepInputs<T>(in, s, out) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        V w[kKept], a[kKept];
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        GaussianPixel<V> pixel;
        MaskPixel<V> masks;
        for (int64_t k = 0; k < this->groups; ++k) {
            w[k] = gaussian_exponent(x - this->z.template load<V, whole>(r, k, d, n), v);
            pixel.compare(w[k]);
        }
        for (int64_t k = 0; k < this->groups; ++k) w[k] = pixel.weigh(w[k]);
        pixel.finish(v);
        this->template softmax<V, whole>(masks, a, r, d, n);
        for (int64_t k = 0; k < this->groups; ++k) {
            const V z = this->z.template load<V, whole>(r, k, d, n), m = masks.mask(a[k]);
            V dz, likelihood;
            pixel.forward(x - z, m, w[k], dz, likelihood);
            this->template put<V, whole>(r, k, d, n, z, m, dz, likelihood);
        }
    }
};

template <class T>
struct BernoulliStepInputs : StepInputs<T> {
    BernoulliScalar<T> scalars;

    LF_HD BernoulliStepInputs(const TaggerInputs& in, const TaggerShape& s, T* out) : StepInputs<T>(in, s, out) {}
    LF_HD void start(int64_t seed) { scalars = bernoulli_scalar<T>(this->scalar, seed); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto b = broadcast<V>(scalars);
        V a[kKept];
        BernoulliPixel<V> pixel(this->x.template load<V, whole>(r, 0, d, n));
        MaskPixel<V> masks;
        this->template softmax<V, whole>(masks, a, r, d, n);
        for (int64_t k = 0; k < this->groups; ++k) {
            a[k] = masks.mask(a[k]);
            pixel.gather(pixel.xi(this->z.template load<V, whole>(r, k, d, n), b), a[k]);
        }
        pixel.finish();
        for (int64_t k = 0; k < this->groups; ++k) {
            const V z = this->z.template load<V, whole>(r, k, d, n);
            V dz, likelihood;
            pixel.forward(pixel.xi(z, b), a[k], dz, likelihood);
            this->template put<V, whole>(r, k, d, n, z, a[k], dz, likelihood);
        }
    }
};

// grad: the four parts of a group's gradient are `width` apart.
template <class T>
struct StepInputsBackward : StepInputs<T> {
    TaggerView<T> grad;
    T *grad_x, *grad_z, *grad_logits;
    ItemSum<T> sum;

    LF_HD StepInputsBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                             T* grad_z, T* grad_logits, double* partials)
        : StepInputs<T>(in, s, nullptr),
          grad(grad),
          grad_x(grad_x),
          grad_z(grad_z),
          grad_logits(grad_logits),
          sum(partials) {}

    enum Part { kZ, kM, kDz, kLikelihood };
    template <class V, bool whole>
    LF_HD V of(Part part, int64_t r, int64_t k, int64_t d, int64_t n) const {
        return grad.template load<V, whole>(r, k, part * this->width + d, n);
    }

    // From masks in m[k] and the gradients that reach them in g[k].
    template <class V, bool whole>
    LF_HD void finish_logits(MaskPixel<V>& masks, const V* m, const V* g, int64_t r, int64_t d, int64_t n) const {
        for (int64_t k = 0; k < this->groups; ++k) masks.gather(m[k], g[k]);
        for (int64_t k = 0; k < this->groups; ++k)
            write<whole>(masks.backward(m[k], g[k]), grad_logits + this->packed(r, k, d), n);
    }
};

template <class T>
struct GaussianStepInputsBackward : StepInputsBackward<T> {
    GaussianScalar<T> scalars;

    LF_HD GaussianStepInputsBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                                     T* grad_z, T* grad_logits, double* partials)
        : StepInputsBackward<T>(grad, in, s, grad_x, grad_z, grad_logits, partials) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }
    LF_HD void end_row() { this->sum.end_row(); }
    LF_HD void end_item(int64_t item) { this->sum.end_item(item); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        V w[kKept], m[kKept], g[kKept];
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        GaussianPixel<V> pixel;
        MaskPixel<V> masks;
        for (int64_t k = 0; k < this->groups; ++k) {
            w[k] = gaussian_exponent(x - this->z.template load<V, whole>(r, k, d, n), v);
            pixel.compare(w[k]);
        }
        for (int64_t k = 0; k < this->groups; ++k)
            w[k] = pixel.weigh(w[k], this->template of<V, whole>(this->kLikelihood, r, k, d, n));
        pixel.finish(v);
        this->template softmax<V, whole>(masks, m, r, d, n);
        V sum_v = constant<V>(0);
        for (int64_t k = 0; k < this->groups; ++k) {
            m[k] = masks.mask(m[k]);
            V out_z;
            pixel.backward(this->template of<V, whole>(this->kDz, r, k, d, n),
                           this->template of<V, whole>(this->kLikelihood, r, k, d, n),
                           x - this->z.template load<V, whole>(r, k, d, n), m[k], w[k], v, out_z, g[k], sum_v);
            g[k] = g[k] + this->template of<V, whole>(this->kM, r, k, d, n);
            write<whole>(out_z + this->template of<V, whole>(this->kZ, r, k, d, n),
                         this->grad_z + this->packed(r, k, d), n);
        }
        this->template finish_logits<V, whole>(masks, m, g, r, d, n);
        write<whole>(pixel.sum_x, this->grad_x + r * this->width + d, n);
        this->sum.template add<whole>(sum_v, n);
    }
};

template <class T>
struct BernoulliStepInputsBackward : StepInputsBackward<T> {
    BernoulliScalar<T> scalars;

    LF_HD BernoulliStepInputsBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                                      T* grad_z, T* grad_logits, double* partials)
        : StepInputsBackward<T>(grad, in, s, grad_x, grad_z, grad_logits, partials) {}
    LF_HD void start(int64_t seed) { scalars = bernoulli_scalar<T>(this->scalar, seed); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto b = broadcast<V>(scalars);
        V m[kKept], g[kKept];
        BernoulliPixel<V> pixel(this->x.template load<V, whole>(r, 0, d, n));
        MaskPixel<V> masks;
        this->template softmax<V, whole>(masks, m, r, d, n);
        for (int64_t k = 0; k < this->groups; ++k) {
            m[k] = masks.mask(m[k]);
            pixel.gather(pixel.xi(this->z.template load<V, whole>(r, k, d, n), b), m[k],
                         this->template of<V, whole>(this->kDz, r, k, d, n),
                         this->template of<V, whole>(this->kLikelihood, r, k, d, n));
        }
        pixel.finish_backward();
        for (int64_t k = 0; k < this->groups; ++k) {
            V out_z;
            pixel.backward(this->template of<V, whole>(this->kDz, r, k, d, n),
                           this->template of<V, whole>(this->kLikelihood, r, k, d, n),
                           pixel.xi(this->z.template load<V, whole>(r, k, d, n), b), m[k], b, out_z, g[k]);
            g[k] = g[k] + this->template of<V, whole>(this->kM, r, k, d, n);
            write<whole>(out_z + this->template of<V, whole>(this->kZ, r, k, d, n),
                         this->grad_z + this->packed(r, k, d), n);
        }
        this->template finish_logits<V, whole>(masks, m, g, r, d, n);
        write<whole>(pixel.sum_x, this->grad_x + r * this->width + d, n);
    }
};

template <bool whole, class T>
static LF_HD Vec<T> read(const T* from, int64_t n) {
    if constexpr (whole) return Vec<T>::load(from);
    return Vec<T>::load(from, n);
}

// What a vector of pixels needs of its columns.
template <class T>
struct Columns {
    Vec<T> mean_z, rstd_z, mean_m, rstd_m, c1, b1;
};

// One item of the outputs: pixels [first, first + count) of the rows of a seed.
template <bool gaussian, class T>
struct OutputsItem {
    const TaggerOutputs& in;
    const TaggerShape& s;
    const T *z_pre, *m_pre, *c1, *b1;
    const T* stats;  // (4, pixels) of the seed
    TaggerView<T> x;
    int64_t seed, row, rows, first, count;
    Vec<T> c2;
    GaussianScalar<Vec<T>> scalars;

    OutputsItem(const TaggerOutputs& in, const TaggerShape& s, const T* all_stats, int64_t item)
        : in(in), s(s), x(in.x) {
        const int64_t blocks = outputs_blocks(s);
        seed = item / blocks;
        rows = s.rows / s.seeds;
        row = seed * rows;
        first = item % blocks * kOutputsBlock;
        count = min_of(kOutputsBlock, s.pixels - first);
        z_pre = static_cast<const T*>(in.z) + row * s.groups * s.pixels;
        m_pre = static_cast<const T*>(in.m) + row * s.groups * s.pixels;
        c1 = static_cast<const T*>(in.c1) + seed * s.pixels;
        b1 = static_cast<const T*>(in.b1) + seed * s.pixels;
        c2 = Vec<T>::broadcast(static_cast<const T*>(in.c2)[seed]);
        stats = all_stats + seed * 4 * s.pixels;
        if constexpr (gaussian) scalars = broadcast<Vec<T>>(gaussian_scalar<T>(in.variance, seed));
    }

    template <bool whole>
    LF_HD Columns<T> columns(int64_t d, int64_t n) const {
        return {read<whole>(stats + d, n),
                read<whole>(stats + s.pixels + d, n),
                read<whole>(stats + 2 * s.pixels + d, n),
                read<whole>(stats + 3 * s.pixels + d, n),
                read<whole>(c1 + d, n),
                read<whole>(b1 + d, n)};
    }

    // Normalised z and mask of group k of row r, both from the beginning of the seed, at pixel d.
    template <bool whole>
    LF_HD Vec<T> z_hat(const Columns<T>& c, int64_t r, int64_t k, int64_t d, int64_t n) const {
        return (read<whole>(z_pre + (r * s.groups + k) * s.pixels + d, n) - c.mean_z) * c.rstd_z;
    }
    template <bool whole>
    LF_HD Vec<T> m_hat(const Columns<T>& c, int64_t r, int64_t k, int64_t d, int64_t n) const {
        return (read<whole>(m_pre + (r * s.groups + k) * s.pixels + d, n) - c.mean_m) * c.rstd_m;
    }

    static LF_HD Vec<T> activated(Vec<T> z) {
        if constexpr (gaussian) return z;
        return logistic(z);
    }
};

template <class T>
static inline void outputs_statistics(const T* pre, T* stats, double eps, const TaggerShape& s, int64_t rows,
                                      int64_t first, int64_t count) {
    Moments all[kOutputsBlock] = {};
    add_column_moments<kOutputsBlock>(all, pre + first, s.pixels, rows * s.groups, count);
    for (int64_t d = 0; d < count; ++d) {
        stats[first + d] = (T)all[d].mean;
        stats[s.pixels + first + d] = all[d].n > 0 ? (T)(1.0 / sqrt(all[d].m2 / all[d].n + eps)) : (T)0;
    }
}

template <bool gaussian, bool whole, class T>
static LF_HD void outputs_pixels(const OutputsItem<gaussian, T>& item, T* z_out, T* logits_out, T* nll, int64_t r,
                                 int64_t d, int64_t n) {
    using V = Vec<T>;
    const auto c = item.template columns<whole>(d, n);
    const V x = item.x.template load<V, whole>(item.row + r, 0, d, n);
    V l[kKept], z[kKept];
    MaskPixel<V> masks, joint;
    for (int64_t k = 0; k < item.s.groups; ++k) {
        const int64_t at = ((item.row + r) * item.s.groups + k) * item.s.pixels + d;
        z[k] = item.activated(c.c1 * item.template z_hat<whole>(c, r, k, d, n) + c.b1);
        const V logit = item.c2 * item.template m_hat<whole>(c, r, k, d, n);
        write<whole>(z[k], z_out + at, n);
        write<whole>(logit, logits_out + at, n);
        l[k] = logit_exponent(logit);
        masks.compare(l[k]);
        if constexpr (gaussian) {
            z[k] = l[k] + gaussian_exponent(x - z[k], item.scalars);
            joint.compare(z[k]);
        }
    }
    V out;
    if constexpr (gaussian) {
        for (int64_t k = 0; k < item.s.groups; ++k) {
            masks.weigh(l[k]);
            joint.weigh(z[k]);
        }
        out = gaussian_logits_nll(masks, joint, item.scalars);
    } else {
        V p = constant<V>(0);
        for (int64_t k = 0; k < item.s.groups; ++k) p = p + masks.weigh(l[k]) * z[k];
        BernoulliMixture<V> mixture;
        mixture.p = p / masks.total;
        out = mixture.nll(x);
    }
    write<whole>(out, nll + (item.row + r) * item.s.pixels + d, n);
}

template <bool gaussian, class T>
static inline void outputs(const TaggerOutputs& in, T* z, T* logits, T* nll, T* stats, double eps, const TaggerShape& s,
                           int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const OutputsItem<gaussian, T> item(in, s, stats, i);
        T* own = stats + item.seed * 4 * s.pixels;
        outputs_statistics(item.z_pre, own, eps, s, item.rows, item.first, item.count);
        outputs_statistics(item.m_pre, own + 2 * s.pixels, eps, s, item.rows, item.first, item.count);
        for (int64_t r = 0; r < item.rows; ++r) {
            int64_t d = item.first;
            const int64_t last = item.first + item.count;
            for (; d + Vec<T>::width <= last; d += Vec<T>::width)
                outputs_pixels<gaussian, true>(item, z, logits, nll, r, d, 0);
            if (d < last) outputs_pixels<gaussian, false>(item, z, logits, nll, r, d, last - d);
        }
    }
}

// Sums over rows and groups for each pixel of an item: of the gradients of c1 z_hat + b1 and of the logits, each alone
// and times what is normalised.
template <class T>
struct OutputsSums {
    alignas(64) T at[4][kOutputsBlock];
    double total[4][kOutputsBlock];

    void flush() {
        for (int j = 0; j < 4; ++j)
            for (int64_t d = 0; d < kOutputsBlock; ++d) total[j][d] += at[j][d];
        memset(at, 0, sizeof(at));
    }
};

// Leaves the gradients of c1 z_hat + b1 and of the logits where those of z_pre and m_pre will be.
template <bool gaussian, bool whole, class T>
static LF_HD void outputs_backward_pixels(const OutputsItem<gaussian, T>& item, const TaggerView<T>& grad_z,
                                          const TaggerView<T>& grad_logits, const TaggerView<T>& grad_nll,
                                          const TaggerOutputsGradients<T>& to, OutputsSums<T>& sums, Vec<T>& variance,
                                          int64_t r, int64_t d, int64_t n) {
    using V = Vec<T>;
    const auto c = item.template columns<whole>(d, n);
    const int64_t row = item.row + r, groups = item.s.groups;
    const V x = item.x.template load<V, whole>(row, 0, d, n);
    const V grad = grad_nll.template load<V, whole>(row, 0, d, n);
    V l[kKept], z[kKept], w[kKept];
    MaskPixel<V> masks, joint;
    for (int64_t k = 0; k < groups; ++k) {
        z[k] = item.activated(c.c1 * item.template z_hat<whole>(c, r, k, d, n) + c.b1);
        l[k] = logit_exponent(item.c2 * item.template m_hat<whole>(c, r, k, d, n));
        masks.compare(l[k]);
        if constexpr (gaussian) {
            w[k] = l[k] + gaussian_exponent(x - z[k], item.scalars);
            joint.compare(w[k]);
        }
    }
    BernoulliMixture<V> mixture;
    for (int64_t k = 0; k < groups; ++k) {
        l[k] = masks.weigh(l[k]);
        if constexpr (gaussian)
            w[k] = joint.weigh(w[k]);
        else
            mixture.gather(z[k], l[k]);
    }
    masks.finish();
    V slope, grad_x = constant<V>(0), sum_v = grad;
    if constexpr (gaussian) {
        joint.finish();
    } else {
        mixture.p = mixture.p * masks.share;
        slope = mixture.backward(grad, x, grad_x);
    }
    V sum[4];
    for (int j = 0; j < 4; ++j) sum[j] = constant<V>(0);
    for (int64_t k = 0; k < groups; ++k) {
        const V m = masks.mask(l[k]);
        V out_z, out_m;
        if constexpr (gaussian) {
            gaussian_logits_backward(grad, x - z[k], m, joint.mask(w[k]), item.scalars, out_z, out_m, sum_v);
            grad_x = grad_x - out_z;
            out_z = out_z + grad_z.template load<V, whole>(row, k, d, n);
        } else {
            out_z = (slope * m + grad_z.template load<V, whole>(row, k, d, n)) * (z[k] * (constant<V>(1) - z[k]));
            out_m = slope * m * (z[k] - mixture.p);
        }
        out_m = out_m + grad_logits.template load<V, whole>(row, k, d, n);
        const int64_t at = (row * groups + k) * item.s.pixels + d;
        write<whole>(out_z, to.z_pre + at, n);
        write<whole>(out_m, to.m_pre + at, n);
        sum[0] = sum[0] + out_z;
        sum[1] = sum[1] + out_z * item.template z_hat<whole>(c, r, k, d, n);
        sum[2] = sum[2] + out_m;
        sum[3] = sum[3] + out_m * item.template m_hat<whole>(c, r, k, d, n);
    }
    write<whole>(grad_x, to.x + row * item.s.pixels + d, n);
    for (int j = 0; j < 4; ++j) {
        T* at = sums.at[j] + (d - item.first);
        (V::load(at) + sum[j]).store(at);
    }
    if constexpr (gaussian) {
        if constexpr (whole) {
            variance = variance + sum_v;
        } else {
            for (int64_t j = n; j < V::width; ++j) sum_v.raw[j] = 0;
            variance = variance + sum_v;
        }
    }
}

// grad holds the gradient of weight x_hat; sums over `count` rows of it and of it times x_hat.
template <bool whole, class T>
static LF_HD void finish_pixels(const T* pre, T* grad, Vec<T> mean, Vec<T> rstd, Vec<T> scale, Vec<T> sum, Vec<T> sum_x,
                                int64_t n) {
    const Vec<T> hat = (read<whole>(pre, n) - mean) * rstd;
    write<whole>(scale * (read<whole>(grad, n) - sum - hat * sum_x), grad, n);
}

template <bool gaussian, class T>
static inline void outputs_backward(const TaggerOutputs& in, const TaggerOutputsGradients<T>& to, const TaggerShape& s,
                                    int64_t begin, int64_t end) {
    using V = Vec<T>;
    const TaggerView<T> grad_z(to.z), grad_logits(to.logits), grad_nll(to.nll);
    for (int64_t i = begin; i < end; ++i) {
        const OutputsItem<gaussian, T> item(in, s, to.stats, i);
        const int64_t last = item.first + item.count;
        OutputsSums<T> sums;
        memset(&sums, 0, sizeof(sums));
        double variance = 0;
        for (int64_t tile = 0; tile < item.rows; tile += kOutputsTile) {
            V part = V::broadcast(0);
            for (int64_t r = tile; r < min_of(tile + kOutputsTile, item.rows); ++r) {
                int64_t d = item.first;
                for (; d + V::width <= last; d += V::width)
                    outputs_backward_pixels<gaussian, true>(item, grad_z, grad_logits, grad_nll, to, sums, part, r, d,
                                                            0);
                if (d < last)
                    outputs_backward_pixels<gaussian, false>(item, grad_z, grad_logits, grad_nll, to, sums, part, r, d,
                                                             last - d);
            }
            variance += part.sum();
            sums.flush();
        }
        double c2 = 0;
        const double share = 1.0 / (double)(item.rows * s.groups);
        for (int64_t d = 0; d < item.count; ++d) {
            to.b1[item.seed * s.pixels + item.first + d] = (T)sums.total[0][d];
            to.c1[item.seed * s.pixels + item.first + d] = (T)sums.total[1][d];
            c2 += sums.total[3][d];
            for (int j = 0; j < 4; ++j) sums.at[j][d] = (T)(sums.total[j][d] * share);
        }
        to.c2[i] = c2;
        if constexpr (gaussian) to.variance[i] = variance;

        const int64_t begin_row = item.row * s.groups, rows = item.rows * s.groups;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = r * s.pixels;
            T *gz = to.z_pre + begin_row * s.pixels + at, *gm = to.m_pre + begin_row * s.pixels + at;
            for (int64_t d = item.first; d < last; d += V::width) {
                const T(*mean)[kOutputsBlock] = sums.at;
                const int64_t e = d - item.first;
                V sum[4];
                for (int j = 0; j < 4; ++j) sum[j] = V::load(mean[j] + e);
                if (d + V::width <= last) {
                    const auto c = item.template columns<true>(d, 0);
                    finish_pixels<true>(item.z_pre + at + d, gz + d, c.mean_z, c.rstd_z, c.rstd_z * c.c1, sum[0],
                                        sum[1], 0);
                    finish_pixels<true>(item.m_pre + at + d, gm + d, c.mean_m, c.rstd_m, c.rstd_m * item.c2, sum[2],
                                        sum[3], 0);
                } else {
                    const auto c = item.template columns<false>(d, last - d);
                    finish_pixels<false>(item.z_pre + at + d, gz + d, c.mean_z, c.rstd_z, c.rstd_z * c.c1, sum[0],
                                         sum[1], last - d);
                    finish_pixels<false>(item.m_pre + at + d, gm + d, c.mean_m, c.rstd_m, c.rstd_m * item.c2, sum[2],
                                         sum[3], last - d);
                }
            }
        }
    }
}

#define LF_TAGGER_STEP_INSTANCES(T, suffix)                                                                           \
    static void inputs_##suffix(bool gaussian, const TaggerInputs& in, T* out, const TaggerShape& s, int64_t begin,   \
                                int64_t end) {                                                                        \
        if (gaussian)                                                                                                 \
            over_items<T>(GaussianStepInputs<T>(in, s, out), s, begin, end);                                          \
        else                                                                                                          \
            over_items<T>(BernoulliStepInputs<T>(in, s, out), s, begin, end);                                         \
    }                                                                                                                 \
    static void inputs_backward_##suffix(bool gaussian, const TaggerInput& g, const TaggerInputs& in, T* gx, T* gz,   \
                                         T* gl, double* partials, const TaggerShape& s, int64_t begin, int64_t end) { \
        if (gaussian)                                                                                                 \
            over_items<T>(GaussianStepInputsBackward<T>(g, in, s, gx, gz, gl, partials), s, begin, end);              \
        else                                                                                                          \
            over_items<T>(BernoulliStepInputsBackward<T>(g, in, s, gx, gz, gl, nullptr), s, begin, end);              \
    }                                                                                                                 \
    static void outputs_##suffix(bool gaussian, const TaggerOutputs& in, T* z, T* logits, T* nll, T* stats,           \
                                 double eps, const TaggerShape& s, int64_t begin, int64_t end) {                      \
        if (gaussian)                                                                                                 \
            outputs<true>(in, z, logits, nll, stats, eps, s, begin, end);                                             \
        else                                                                                                          \
            outputs<false>(in, z, logits, nll, stats, eps, s, begin, end);                                            \
    }                                                                                                                 \
    static void outputs_backward_##suffix(bool gaussian, const TaggerOutputs& in, const TaggerOutputsGradients<T>& g, \
                                          const TaggerShape& s, int64_t begin, int64_t end) {                         \
        if (gaussian)                                                                                                 \
            outputs_backward<true>(in, g, s, begin, end);                                                             \
        else                                                                                                          \
            outputs_backward<false>(in, g, s, begin, end);                                                            \
    }

LF_TAGGER_STEP_INSTANCES(float, f32)
LF_TAGGER_STEP_INSTANCES(double, f64)
#undef LF_TAGGER_STEP_INSTANCES

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t tagger_outputs_items(const TaggerShape& s) { return s.seeds * outputs_blocks(s); }

#define LF_TAGGER_STEP_DISPATCH(T, suffix)                                                                             \
    template <>                                                                                                        \
    void tagger_step_inputs<T>(bool gaussian, const TaggerInputs& in, T* out, const TaggerShape& s, int64_t begin,     \
                               int64_t end) {                                                                          \
        static const auto kernel = LF_SELECT(inputs_##suffix);                                                         \
        kernel(gaussian, in, out, s, begin, end);                                                                      \
    }                                                                                                                  \
    template <>                                                                                                        \
    void tagger_step_inputs_backward<T>(bool gaussian, const TaggerInput& g, const TaggerInputs& in, T* gx, T* gz,     \
                                        T* gl, double* partials, const TaggerShape& s, int64_t begin, int64_t end) {   \
        static const auto kernel = LF_SELECT(inputs_backward_##suffix);                                                \
        kernel(gaussian, g, in, gx, gz, gl, partials, s, begin, end);                                                  \
    }                                                                                                                  \
    template <>                                                                                                        \
    void tagger_step_outputs<T>(bool gaussian, const TaggerOutputs& in, T* z, T* logits, T* nll, T* stats, double eps, \
                                const TaggerShape& s, int64_t begin, int64_t end) {                                    \
        static const auto kernel = LF_SELECT(outputs_##suffix);                                                        \
        kernel(gaussian, in, z, logits, nll, stats, eps, s, begin, end);                                               \
    }                                                                                                                  \
    template <>                                                                                                        \
    void tagger_step_outputs_backward<T>(bool gaussian, const TaggerOutputs& in, const TaggerOutputsGradients<T>& g,   \
                                         const TaggerShape& s, int64_t begin, int64_t end) {                           \
        static const auto kernel = LF_SELECT(outputs_backward_##suffix);                                               \
        kernel(gaussian, in, g, s, begin, end);                                                                        \
    }

LF_TAGGER_STEP_DISPATCH(float, f32)
LF_TAGGER_STEP_DISPATCH(double, f64)
#undef LF_TAGGER_STEP_DISPATCH

}  // namespace ladderfast::cpu
#endif

// CPU kernels of the op `tagger_step`; contract in ../tagger_step.h, formulas in ../math/tagger.h.
//
// Inputs: as in tagger.cpp a vector, or a pair of them, covers neighbouring pixels of one row and goes over the groups
// a few times; what is dear to compute stays on the stack in between.
//
// Outputs: both directions go over rows and groups to sum, merge the sums of a seed by columns, and go over them again.
// Items of the first and last pass are the same stretches of whole rows: a thread finds in its cache what it has read,
// or written, and shares are equal.
#undef LF_THIS_FILE
#define LF_THIS_FILE "tagger_step.cpp"

#ifndef LADDERFAST_CPU_TAGGER_STEP_PLAN
#define LADDERFAST_CPU_TAGGER_STEP_PLAN

#include "../tagger_step.h"
#include "isa.h"
#include "plan.h"
#include "tagger_plan.h"

namespace ladderfast::cpu {

static const int64_t kOutputsBlock = 512;   // pixels of an item of the outputs, at most
static const int64_t kOutputsColumns = 64;  // columns of an item that merges

// An item is a chunk of a seed's rows, of at most 64 rows and groups, and a block of their pixels. The number of chunks
// is a multiple of eight where there are rows enough, so that threads have equal shares.
struct OutputsPlan {
    int64_t rows, chunks, blocks, column_blocks, pixels;

    explicit OutputsPlan(const TaggerShape& s) : pixels(s.pixels) {
        rows = s.seeds > 0 ? s.rows / s.seeds : 0;
        chunks = min_of(ceil_div(ceil_div(rows * s.groups, kMaxRows), 8) * 8, rows);
        blocks = ceil_div(pixels, kOutputsBlock);
        column_blocks = ceil_div(pixels, kOutputsColumns);
    }
    int64_t row_begin(int64_t chunk) const { return rows * chunk / chunks; }
};

struct OutputsPlace {
    int64_t seed, slot, row, row_end, first, count;  // slot: of the seed's chunk

    OutputsPlace(const OutputsPlan& plan, int64_t item) {
        slot = item / plan.blocks;
        seed = slot / plan.chunks;
        const int64_t chunk = slot % plan.chunks;
        row = seed * plan.rows + plan.row_begin(chunk);
        row_end = seed * plan.rows + plan.row_begin(chunk + 1);
        first = item % plan.blocks * kOutputsBlock;
        count = min_of(kOutputsBlock, plan.pixels - first);
    }
};

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

template <class T, int fixed>
struct StepInputs : TaggerPass<T> {
    T* out;

    LF_HD StepInputs(const TaggerInputs& in, const TaggerShape& s, T* out) : TaggerPass<T>(in, s), out(out) {}

    // The masks in a[k].
    template <class V, bool whole>
    LF_HD void softmax(MaskPixel<V>& masks, V* a, int64_t r, int64_t d, int64_t n) const {
        LF_EACH_GROUP(k, this->groups) {
            a[k] = logit_exponent(this->m.template load<V, whole>(r, k, d, n));
            masks.compare(a[k]);
        }
        LF_EACH_GROUP(k, this->groups) a[k] = masks.weigh(a[k]);
        masks.finish();
        LF_EACH_GROUP(k, this->groups) a[k] = masks.mask(a[k]);
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

template <class T, int fixed>
struct GaussianStepInputs : StepInputs<T, fixed> {
    GaussianScalar<T> scalars;

    LF_HD GaussianStepInputs(const TaggerInputs& in, const TaggerShape& s, T* out) : StepInputs<T, fixed>(in, s, out) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }

    template <class V, bool whole, bool scaled = false>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        V w[kept<fixed>], a[kept<fixed>];
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        GaussianPixel<V, scaled> pixel;
        MaskPixel<V> masks;
        GaussianPixel<V, false> unscaled;
        LF_EACH_GROUP(k, this->groups) {
            w[k] = gaussian_exponent(x - this->z.template load<V, whole>(r, k, d, n), v);
            if constexpr (scaled) {
                unscaled.weigh(w[k]);
                pixel.compare(w[k]);
            }
        }
        if constexpr (scaled) pixel.unless_enough(unscaled.total);
        LF_EACH_GROUP(k, this->groups) w[k] = pixel.weigh(w[k]);
        if constexpr (!scaled) {
            if (any_less(pixel.total, T(LF_TAGGER_ENOUGH), n)) {
                *this = scaled_pixels<V, whole>(*this, r, d, n);
                return;
            }
        }
        pixel.finish(v);
        this->template softmax<V, whole>(masks, a, r, d, n);
        LF_EACH_GROUP(k, this->groups) {
            const V z = this->z.template load<V, whole>(r, k, d, n);
            V dz, likelihood;
            pixel.forward(x - z, a[k], w[k], dz, likelihood);
            this->template put<V, whole>(r, k, d, n, z, a[k], dz, likelihood);
        }
    }
};

template <class T, int fixed>
struct BernoulliStepInputs : StepInputs<T, fixed> {
    BernoulliScalar<T> scalars;

    LF_HD BernoulliStepInputs(const TaggerInputs& in, const TaggerShape& s, T* out)
        : StepInputs<T, fixed>(in, s, out) {}
    LF_HD void start(int64_t seed) { scalars = bernoulli_scalar<T>(this->scalar, seed); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        V a[kept<fixed>], density[kept<fixed>];
        const auto b = broadcast<V>(scalars);
        BernoulliPixel<V> pixel(this->x.template load<V, whole>(r, 0, d, n), b);
        MaskPixel<V> masks;
        this->template softmax<V, whole>(masks, a, r, d, n);
        LF_EACH_GROUP(k, this->groups)
        density[k] = pixel.gather(this->z.template load<V, whole>(r, k, d, n), a[k]);
        pixel.finish(b);
        LF_EACH_GROUP(k, this->groups) {
            V dz, likelihood;
            pixel.forward(a[k], density[k], dz, likelihood);
            this->template put<V, whole>(r, k, d, n, this->z.template load<V, whole>(r, k, d, n), a[k], dz, likelihood);
        }
    }
};

// grad: the four parts of a group's gradient are `width` apart.
template <class T, int fixed>
struct StepInputsBackward : StepInputs<T, fixed> {
    TaggerView<T> grad;
    T *grad_x, *grad_z, *grad_logits;
    ItemSum<T> sum;

    LF_HD StepInputsBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                             T* grad_z, T* grad_logits, double* partials)
        : StepInputs<T, fixed>(in, s, nullptr),
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
        LF_EACH_GROUP(k, this->groups) masks.gather(m[k], g[k]);
        LF_EACH_GROUP(k, this->groups)
        write<whole>(masks.backward(m[k], g[k]), grad_logits + this->packed(r, k, d), n);
    }
};

template <class T, int fixed>
struct GaussianStepInputsBackward : StepInputsBackward<T, fixed> {
    GaussianScalar<T> scalars;

    LF_HD GaussianStepInputsBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                                     T* grad_z, T* grad_logits, double* partials)
        : StepInputsBackward<T, fixed>(grad, in, s, grad_x, grad_z, grad_logits, partials) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }
    LF_HD void end_row() { this->sum.end_row(); }
    LF_HD void end_item(int64_t item) { this->sum.end_item(item); }

    template <class V, bool whole, bool scaled = false>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        V w[kept<fixed>], m[kept<fixed>], g[kept<fixed>];
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        GaussianPixel<V, scaled> pixel;
        MaskPixel<V> masks;
        GaussianPixel<V, false> unscaled;
        LF_EACH_GROUP(k, this->groups) {
            w[k] = gaussian_exponent(x - this->z.template load<V, whole>(r, k, d, n), v);
            if constexpr (scaled) {
                unscaled.weigh(w[k]);
                pixel.compare(w[k]);
            }
        }
        if constexpr (scaled) pixel.unless_enough(unscaled.total);
        LF_EACH_GROUP(k, this->groups)
        w[k] = pixel.weigh(w[k], this->template of<V, whole>(this->kLikelihood, r, k, d, n));
        if constexpr (!scaled) {
            if (any_less(pixel.total, T(LF_TAGGER_ENOUGH), n)) {
                *this = scaled_pixels<V, whole>(*this, r, d, n);
                return;
            }
        }
        pixel.finish(v);
        this->template softmax<V, whole>(masks, m, r, d, n);
        V sum_v = constant<V>(0);
        LF_EACH_GROUP(k, this->groups) {
            V out_z;
            pixel.backward(this->template of<V, whole>(this->kDz, r, k, d, n),
                           this->template of<V, whole>(this->kLikelihood, r, k, d, n),
                           x - this->z.template load<V, whole>(r, k, d, n), m[k], w[k], v, out_z, g[k], sum_v);
            g[k] = g[k] + this->template of<V, whole>(this->kM, r, k, d, n);
            write<whole>(out_z + this->template of<V, whole>(this->kZ, r, k, d, n),
                         this->grad_z + this->packed(r, k, d), n);
        }
        this->template finish_logits<V, whole>(masks, m, g, r, d, n);
        if (this->grad_x != nullptr) write<whole>(pixel.sum_x, this->grad_x + r * this->width + d, n);
        this->sum.template add<whole>(sum_v, n);
    }
};

template <class T, int fixed>
struct BernoulliStepInputsBackward : StepInputsBackward<T, fixed> {
    BernoulliScalar<T> scalars;

    LF_HD BernoulliStepInputsBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                                      T* grad_z, T* grad_logits, double* partials)
        : StepInputsBackward<T, fixed>(grad, in, s, grad_x, grad_z, grad_logits, partials) {}
    LF_HD void start(int64_t seed) { scalars = bernoulli_scalar<T>(this->scalar, seed); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        V m[kept<fixed>], g[kept<fixed>], density[kept<fixed>];
        const auto b = broadcast<V>(scalars);
        BernoulliPixel<V> pixel(this->x.template load<V, whole>(r, 0, d, n), b);
        MaskPixel<V> masks;
        this->template softmax<V, whole>(masks, m, r, d, n);
        LF_EACH_GROUP(k, this->groups)
        density[k] = pixel.gather(this->z.template load<V, whole>(r, k, d, n), m[k],
                                  this->template of<V, whole>(this->kDz, r, k, d, n),
                                  this->template of<V, whole>(this->kLikelihood, r, k, d, n));
        pixel.finish_backward(b);
        if (this->grad_x != nullptr) {
            V sum_x = pixel.grad_t;
            LF_EACH_GROUP(k, this->groups)
            sum_x = sum_x + pixel.grad_x(this->template of<V, whole>(this->kLikelihood, r, k, d, n),
                                         this->z.template load<V, whole>(r, k, d, n), density[k], b);
            write<whole>(sum_x, this->grad_x + r * this->width + d, n);
        }
        LF_EACH_GROUP(k, this->groups) {
            V out_z;
            pixel.backward(this->template of<V, whole>(this->kDz, r, k, d, n),
                           this->template of<V, whole>(this->kLikelihood, r, k, d, n),
                           this->z.template load<V, whole>(r, k, d, n), m[k], density[k], b, out_z, g[k]);
            g[k] = g[k] + this->template of<V, whole>(this->kM, r, k, d, n);
            write<whole>(out_z + this->template of<V, whole>(this->kZ, r, k, d, n),
                         this->grad_z + this->packed(r, k, d), n);
        }
        this->template finish_logits<V, whole>(masks, m, g, r, d, n);
    }
};

template <bool whole, class V, class T>
static LF_HD V read(const T* from, int64_t n) {
    if constexpr (whole)
        return V::load(from);
    else
        return V::load(from, n);
}

// What pixels need of their columns: z before any squashing is (z_pre - mean_z) scale_z + b1, and the logit is
// (m_pre - mean_m) scale_m.
template <class V>
struct Columns {
    V mean_z, scale_z, b1, mean_m, scale_m;
};

// One item of the outputs: rows [row, row_end), pixels [first, last).
template <bool gaussian, int fixed, class T>
struct OutputsItem {
    int64_t groups, width, z_stride, m_stride;
    const T *z_pre, *m_pre, *c1, *b1;
    const T* stats;  // (4, pixels) of the seed
    TaggerView<T> x;
    int64_t seed, row, row_end, first, last;
    T c2;
    GaussianScalar<T> scalars = {};

    LF_HD OutputsItem(const TaggerOutputs& in, const TaggerShape& s, const T* all_stats, int64_t item)
        : groups(s.groups), width(s.pixels), z_stride(in.z.group), m_stride(in.m.group), x(in.x) {
        const OutputsPlan plan(s);
        const OutputsPlace place(plan, item);
        seed = place.seed;
        row = place.row;
        row_end = place.row_end;
        first = place.first;
        last = place.first + place.count;
        z_pre = static_cast<const T*>(in.z.data);
        m_pre = static_cast<const T*>(in.m.data);
        c1 = static_cast<const T*>(in.c1) + seed * s.pixels;
        b1 = static_cast<const T*>(in.b1) + seed * s.pixels;
        c2 = static_cast<const T*>(in.c2)[seed];
        stats = all_stats + seed * 4 * s.pixels;
        if constexpr (gaussian) scalars = gaussian_scalar<T>(in.variance, seed);
    }

    LF_HD int64_t packed(int64_t r, int64_t d) const { return r * groups * width + d; }
    LF_HD const T* z_at(int64_t r, int64_t d) const { return z_pre + r * groups * z_stride + d; }
    LF_HD const T* m_at(int64_t r, int64_t d) const { return m_pre + r * groups * m_stride + d; }

    template <class V, bool whole>
    LF_HD Columns<V> columns(int64_t d, int64_t n) const {
        return {read<whole, V>(stats + d, n), read<whole, V>(stats + width + d, n) * read<whole, V>(c1 + d, n),
                read<whole, V>(b1 + d, n), read<whole, V>(stats + 2 * width + d, n),
                read<whole, V>(stats + 3 * width + d, n) * V::broadcast(c2)};
    }

    template <class V>
    static LF_HD V activated(V z) {
        if constexpr (gaussian) return z;
        return logistic(z);
    }
};

// step<V, whole>(row, pixel, count) for the pixels [begin, end) of row r.
#define LF_OVER_PIXELS(step, r, begin, end)                                               \
    {                                                                                     \
        int64_t d = begin;                                                                \
        for (; d + Vec<T>::width <= end; d += Vec<T>::width) step<Vec<T>, true>(r, d, 0); \
        if (d < end) step<Vec<T>, false>(r, d, end - d);                                  \
    }

// Chains of operations are long: where a pass takes them in steps, over a tile of a row's pixels at a time, the
// processor has several in hand. What one step leaves for the next lies in the first-level cache.
static const int64_t kTile = 2048;  // pixels and groups of a tile; pixels are whole vectors

static inline int64_t tile_pixels(int64_t groups) {
    const int64_t most = kTile / groups / 16 * 16;
    return most < kOutputsBlock ? most : kOutputsBlock;
}

// Partial moments of an item's rows and groups: workspace (items' slots, 4, pixels) gets mean, relative to the item's
// first row, and squares of z, then of m.
template <class T>
static inline void outputs_moments(const TaggerOutputs& in, T* workspace, const TaggerShape& s, int64_t begin,
                                   int64_t end) {
    const OutputsPlan plan(s);
    for (int64_t i = begin; i < end; ++i) {
        const OutputsPlace place(plan, i);
        const TaggerInput* pre[2] = {&in.z, &in.m};
        for (int j = 0; j < 2; ++j) {
            const T* from = static_cast<const T*>(pre[j]->data) + place.row * s.groups * pre[j]->group + place.first;
            T* mean = workspace + (place.slot * 4 + 2 * j) * s.pixels + place.first;
            partial_column_moments(from, pre[j]->group, (place.row_end - place.row) * s.groups, place.count, mean,
                                   mean + s.pixels);
        }
    }
}

// Merges what the chunks of a seed have left, for a block of columns.
template <class T>
static inline void outputs_merge(const TaggerOutputs& in, const T* workspace, T* stats, double eps,
                                 const TaggerShape& s, int64_t begin, int64_t end) {
    const OutputsPlan plan(s);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t seed = i / plan.column_blocks, first = i % plan.column_blocks * kOutputsColumns;
        const int64_t count = min_of(kOutputsColumns, s.pixels - first);
        for (int j = 0; j < 2; ++j) {
            const TaggerInput& pre = j == 0 ? in.z : in.m;
            double mean[kOutputsColumns] = {}, squares[kOutputsColumns] = {}, n = 0;
            for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
                const int64_t row = seed * plan.rows + plan.row_begin(chunk);
                const double added = (double)((plan.row_begin(chunk + 1) - plan.row_begin(chunk)) * s.groups);
                const T* origin = static_cast<const T*>(pre.data) + row * s.groups * pre.group + first;
                const T* its_mean = workspace + ((seed * plan.chunks + chunk) * 4 + 2 * j) * s.pixels + first;
                const T* its_squares = its_mean + s.pixels;
                const double share = added / (n + added), weight = n * share;
                for (int64_t d = 0; d < count; ++d) {
                    const double delta = (double)origin[d] + (double)its_mean[d] - mean[d];
                    mean[d] += delta * share;
                    squares[d] += its_squares[d] + delta * delta * weight;
                }
                n += added;
            }
            T* to = stats + (seed * 4 + 2 * j) * s.pixels + first;
            for (int64_t d = 0; d < count; ++d) {
                to[d] = (T)mean[d];
                to[s.pixels + d] = (T)(n > 0 ? 1.0 / sqrt(squares[d] / n + eps) : 0.0);
            }
        }
    }
}

template <bool gaussian, int fixed, class T>
struct OutputsPass {
    OutputsItem<gaussian, fixed, T> item;
    T *z_out, *logits_out, *nll;
    // Of a row's pixels: the sum of weights that costs; Gaussian: of the masks' weights, and the tops' difference.
    alignas(64) T sum[kOutputsBlock], masks_sum[kOutputsBlock], top[kOutputsBlock];

    LF_HD void run() {
        for (int64_t r = item.row; r < item.row_end; ++r) {
            LF_OVER_PIXELS(groups, r, item.first, item.last)
            LF_OVER_PIXELS(cost, r, item.first, item.last)
        }
    }

    template <class V, bool whole>
    LF_HD void groups(int64_t r, int64_t d, int64_t n) {
        const auto c = item.template columns<V, whole>(d, n);
        const V x = item.x.template load<V, whole>(r, 0, d, n);
        const auto scalars = broadcast<V>(item.scalars);
        const T *z_at = item.z_at(r, d), *m_at = item.m_at(r, d);
        T *to_z = z_out + item.packed(r, d), *to_logits = logits_out + item.packed(r, d);
        V l[kept<fixed>], z[kept<fixed>];
        MaskPixel<V> masks, joint;
        LF_EACH_GROUP(k, item.groups) {
            z[k] = item.activated((read<whole, V>(z_at + k * item.z_stride, n) - c.mean_z) * c.scale_z + c.b1);
            const V logit = (read<whole, V>(m_at + k * item.m_stride, n) - c.mean_m) * c.scale_m;
            write<whole>(z[k], to_z + k * item.width, n);
            write<whole>(logit, to_logits + k * item.width, n);
            l[k] = logit_exponent(logit);
            masks.compare(l[k]);
            if constexpr (gaussian) {
                z[k] = l[k] + gaussian_exponent(x - z[k], scalars);
                joint.compare(z[k]);
            }
        }
        const int64_t at = d - item.first;
        if constexpr (gaussian) {
            LF_EACH_GROUP(k, item.groups) {
                masks.weigh(l[k]);
                joint.weigh(z[k]);
            }
            joint.total.store(sum + at);
            (masks.top - joint.top).store(top + at);
        } else {
            BernoulliMixture<V> mixture;
            LF_EACH_GROUP(k, item.groups) mixture.gather(z[k], masks.weigh(l[k]));
            mixture.p.store(sum + at);
        }
        masks.total.store(masks_sum + at);
    }

    template <class V, bool whole>
    LF_HD void cost(int64_t r, int64_t d, int64_t n) const {
        const int64_t at = d - item.first;
        V out;
        if constexpr (gaussian) {
            out = gaussian_logits_nll(V::load(top + at), V::load(masks_sum + at) / V::load(sum + at),
                                      broadcast<V>(item.scalars));
        } else {
            BernoulliMixture<V> mixture;
            mixture.p = V::load(sum + at) / V::load(masks_sum + at);
            const V x = item.x.template load<V, whole>(r, 0, d, n);
            out = all_binary(x, whole ? V::width : n) ? mixture.binary_nll(x) : mixture.nll(x);
        }
        write<whole>(out, nll + r * item.width + d, n);
    }
};

template <bool gaussian, int fixed, class T>
static inline void outputs(const TaggerOutputs& in, T* z, T* logits, T* nll, const T* stats, const TaggerShape& s,
                           int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        OutputsPass<gaussian, fixed, T> pass{OutputsItem<gaussian, fixed, T>(in, s, stats, i), z, logits, nll};
        pass.run();
    }
}

// Leaves the gradients of c1 z_hat + b1 and of the logits where those of z_pre and m_pre will be, and their sums over
// the item's rows and groups, each alone and times z_pre or m_pre less its mean.
template <bool gaussian, int fixed, class T>
struct OutputsBackward {
    OutputsItem<gaussian, fixed, T> item;
    TaggerView<T> grad_z, grad_logits, grad_nll;
    const TaggerOutputsGradients<T>& to;
    Vec<T> of_variance;
    int64_t tile, begin;  // pixels of a tile, and its first
    alignas(64) T sums[4][kOutputsBlock];
    // Of a tile, by group: the masks' weights, and Gaussian the joint ones, Bernoulli z.
    alignas(64) T masks_at[kTile], other_at[kTile];
    // By pixel: share of the masks' weights; Gaussian that of the joint ones, Bernoulli p and then the gradient of p.
    alignas(64) T share_at[kOutputsBlock], joint_at[kOutputsBlock], slope_at[kOutputsBlock];

    LF_HD OutputsBackward(const OutputsItem<gaussian, fixed, T>& item, const TaggerOutputsGradients<T>& to)
        : item(item),
          grad_z(to.z),
          grad_logits(to.logits),
          grad_nll(to.nll),
          to(to),
          of_variance(Vec<T>::broadcast(0)),
          tile(tile_pixels(item.groups)) {
        memset(sums, 0, sizeof(sums));
    }

    LF_HD void run() {
        for (int64_t r = item.row; r < item.row_end; ++r)
            for (begin = item.first; begin < item.last; begin += tile) {
                const int64_t end = min_of(begin + tile, item.last);
                LF_OVER_PIXELS(weights, r, begin, end)
                LF_OVER_PIXELS(mixtures, r, begin, end)
                LF_OVER_PIXELS(gradients, r, begin, end)
            }
    }

    template <class V, bool whole>
    LF_HD void weights(int64_t r, int64_t d, int64_t n) {
        const auto c = item.template columns<V, whole>(d, n);
        const V x = item.x.template load<V, whole>(r, 0, d, n);
        const auto scalars = broadcast<V>(item.scalars);
        const T *z_at = item.z_at(r, d), *m_at = item.m_at(r, d);
        const int64_t at = d - begin;
        V l[kept<fixed>], other[kept<fixed>];
        MaskPixel<V> masks, joint;
        LF_EACH_GROUP(k, item.groups) {
            other[k] = item.activated((read<whole, V>(z_at + k * item.z_stride, n) - c.mean_z) * c.scale_z + c.b1);
            l[k] = logit_exponent((read<whole, V>(m_at + k * item.m_stride, n) - c.mean_m) * c.scale_m);
            masks.compare(l[k]);
            if constexpr (gaussian) {
                other[k] = l[k] + gaussian_exponent(x - other[k], scalars);
                joint.compare(other[k]);
            }
        }
        BernoulliMixture<V> mixture;
        LF_EACH_GROUP(k, item.groups) {
            const V weight = masks.weigh(l[k]);
            if constexpr (gaussian)
                other[k] = joint.weigh(other[k]);
            else
                mixture.gather(other[k], weight);
            weight.store(masks_at + k * tile + at);
            other[k].store(other_at + k * tile + at);
        }
        masks.total.store(share_at + at);
        (gaussian ? joint.total : mixture.p).store(joint_at + at);
    }

    template <class V, bool whole>
    LF_HD void mixtures(int64_t r, int64_t d, int64_t n) {
        const int64_t at = d - begin;
        const V share = constant<V>(1) / V::load(share_at + at);
        share.store(share_at + at);
        if constexpr (gaussian) {
            (constant<V>(1) / V::load(joint_at + at)).store(joint_at + at);
        } else {
            const V x = item.x.template load<V, whole>(r, 0, d, n);
            const V grad = grad_nll.template load<V, whole>(r, 0, d, n);
            BernoulliMixture<V> mixture;
            mixture.p = V::load(joint_at + at) * share;
            mixture.p.store(joint_at + at);
            mixture.backward(grad, x).store(slope_at + at);
            if (to.x != nullptr) write<whole>(mixture.grad_x(grad), to.x + r * item.width + d, n);
        }
    }

    template <class V, bool whole>
    LF_HD void gradients(int64_t r, int64_t d, int64_t n) {
        const auto c = item.template columns<V, whole>(d, n);
        const auto scalars = broadcast<V>(item.scalars);
        const V x = item.x.template load<V, whole>(r, 0, d, n);
        const V grad = grad_nll.template load<V, whole>(r, 0, d, n);
        const T *z_at = item.z_at(r, d), *m_at = item.m_at(r, d);
        const T *grad_z_at = grad_z.data + r * grad_z.row + d, *grad_l_at = grad_logits.data + r * grad_logits.row + d;
        T *to_z = to.z_pre + item.packed(r, d), *to_m = to.m_pre + item.packed(r, d);
        const int64_t at = d - begin;
        const V share = V::load(share_at + at), joint = V::load(joint_at + at);
        V slope, grad_x = constant<V>(0), sum_v = grad;
        if constexpr (!gaussian) slope = V::load(slope_at + at);
        V sum[4];
        for (int j = 0; j < 4; ++j) sum[j] = constant<V>(0);
        LF_EACH_GROUP(k, item.groups) {
            const V m = V::load(masks_at + k * tile + at) * share, other = V::load(other_at + k * tile + at);
            const V from_z = read<whole, V>(grad_z_at + k * grad_z.group, n);
            const V z_centred = read<whole, V>(z_at + k * item.z_stride, n) - c.mean_z;
            V out_z, out_m;
            if constexpr (gaussian) {
                const V z = z_centred * c.scale_z + c.b1;
                gaussian_logits_backward(grad, x - z, m, other * joint, scalars, out_z, out_m, sum_v);
                grad_x = grad_x - out_z;
                out_z = out_z + from_z;
            } else {
                const V pull = slope * m;
                out_z = (pull + from_z) * (other * (constant<V>(1) - other));
                out_m = pull * (other - joint);
            }
            out_m = out_m + read<whole, V>(grad_l_at + k * grad_logits.group, n);
            write<whole>(out_z, to_z + k * item.width, n);
            write<whole>(out_m, to_m + k * item.width, n);
            sum[0] = sum[0] + out_z;
            sum[1] = sum[1] + out_z * z_centred;
            sum[2] = sum[2] + out_m;
            sum[3] = sum[3] + out_m * (read<whole, V>(m_at + k * item.m_stride, n) - c.mean_m);
        }
        for (int j = 0; j < 4; ++j) {
            T* sum_at = sums[j] + (d - item.first);
            (V::load(sum_at) + sum[j]).store(sum_at);
        }
        if constexpr (gaussian) {
            if (to.x != nullptr) write<whole>(grad_x, to.x + r * item.width + d, n);
            if constexpr (!whole)
                for (int64_t j = n; j < V::width; ++j) sum_v.raw[j] = 0;
            of_variance = of_variance + sum_v;
        }
    }
};

template <bool gaussian, int fixed, class T>
static inline void outputs_backward(const TaggerOutputs& in, const TaggerOutputsGradients<T>& to, T* workspace,
                                    const TaggerShape& s, int64_t begin, int64_t end) {
    const OutputsPlan plan(s);
    for (int64_t i = begin; i < end; ++i) {
        const OutputsItem<gaussian, fixed, T> item(in, s, to.stats, i);
        OutputsBackward<gaussian, fixed, T> pass(item, to);
        pass.run();
        T* partial = workspace + OutputsPlace(plan, i).slot * 4 * s.pixels + item.first;
        for (int j = 0; j < 4; ++j) memcpy(partial + j * s.pixels, pass.sums[j], (item.last - item.first) * sizeof(T));
        if constexpr (gaussian) to.variance[i] = pass.of_variance.sum();
    }
}

// Sums over the chunks of a seed, for a block of columns: the gradients of c1 and b1, the block's part of that of c2,
// and into `means` (seeds, 4, pixels) the means over rows and groups.
template <class T>
static inline void outputs_backward_merge(const TaggerOutputsGradients<T>& to, const T* workspace, T* means,
                                          const TaggerShape& s, int64_t begin, int64_t end) {
    const OutputsPlan plan(s);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t seed = i / plan.column_blocks, first = i % plan.column_blocks * kOutputsColumns;
        const int64_t count = min_of(kOutputsColumns, s.pixels - first);
        const double share = 1.0 / (double)(plan.rows * s.groups);
        for (int j = 0; j < 4; ++j) {
            const T* rstd = to.stats + (seed * 4 + j) * s.pixels + first;  // for the sums that lack it, of odd j
            double total[kOutputsColumns] = {};
            for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
                const T* from = workspace + ((seed * plan.chunks + chunk) * 4 + j) * s.pixels + first;
                for (int64_t d = 0; d < count; ++d) total[d] += from[d];
            }
            if (j % 2 == 1)
                for (int64_t d = 0; d < count; ++d) total[d] *= rstd[d];
            T* mean = means + (seed * 4 + j) * s.pixels + first;
            for (int64_t d = 0; d < count; ++d) mean[d] = (T)(total[d] * share);
            if (j < 2) {
                T* sum = (j == 0 ? to.b1 : to.c1) + seed * s.pixels + first;
                for (int64_t d = 0; d < count; ++d) sum[d] = (T)total[d];
            }
            if (j == 3) {
                double c2 = 0;
                for (int64_t d = 0; d < count; ++d) c2 += total[d];
                to.c2[i] = c2;
            }
        }
    }
}

// From the gradient of scale x_hat to that of x, through the normalisation.
template <bool gaussian, int fixed, class T>
struct OutputsFinish {
    OutputsItem<gaussian, fixed, T> item;
    const TaggerOutputsGradients<T>& to;
    const T* means;  // (4, pixels) of the seed

    LF_HD void run() const {
        for (int64_t r = item.row; r < item.row_end; ++r) LF_OVER_PIXELS(pixels, r, item.first, item.last)
    }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) const {
        const auto c = item.template columns<V, whole>(d, n);
        const T *stats = item.stats + item.width + d, *mean = means + d;
        const V mean_z = read<whole, V>(mean, n), mean_m = read<whole, V>(mean + 2 * item.width, n);
        const V pull_z = read<whole, V>(stats, n) * read<whole, V>(mean + item.width, n);
        const V pull_m = read<whole, V>(stats + 2 * item.width, n) * read<whole, V>(mean + 3 * item.width, n);
        const T *z_at = item.z_at(r, d), *m_at = item.m_at(r, d);
        T *to_z = to.z_pre + item.packed(r, d), *to_m = to.m_pre + item.packed(r, d);
        LF_EACH_GROUP(k, item.groups) {
            T *z = to_z + k * item.width, *m = to_m + k * item.width;
            const V from_z = read<whole, V>(z_at + k * item.z_stride, n) - c.mean_z;
            const V from_m = read<whole, V>(m_at + k * item.m_stride, n) - c.mean_m;
            write<whole>(c.scale_z * ((read<whole, V>(z, n) - mean_z) - from_z * pull_z), z, n);
            write<whole>(c.scale_m * ((read<whole, V>(m, n) - mean_m) - from_m * pull_m), m, n);
        }
    }
};

template <int fixed, class T>
static inline void outputs_backward_finish(const TaggerOutputs& in, const TaggerOutputsGradients<T>& to, const T* means,
                                           const TaggerShape& s, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const OutputsItem<false, fixed, T> item(in, s, to.stats, i);
        OutputsFinish<false, fixed, T>{item, to, means + item.seed * 4 * s.pixels}.run();
    }
}

#define LF_TAGGER_STEP_INSTANCES(T, suffix)                                                                           \
    static void inputs_##suffix(bool gaussian, const TaggerInputs& in, T* out, const TaggerShape& s, int64_t begin,   \
                                int64_t end) {                                                                        \
        if (gaussian)                                                                                                 \
            LF_BY_GROUPS(T, GaussianStepInputs, in, s, out)                                                           \
        else                                                                                                          \
            LF_BY_GROUPS(T, BernoulliStepInputs, in, s, out)                                                          \
    }                                                                                                                 \
    static void inputs_backward_##suffix(bool gaussian, const TaggerInput& g, const TaggerInputs& in, T* gx, T* gz,   \
                                         T* gl, double* partials, const TaggerShape& s, int64_t begin, int64_t end) { \
        if (gaussian)                                                                                                 \
            LF_BY_GROUPS(T, GaussianStepInputsBackward, g, in, s, gx, gz, gl, partials)                               \
        else                                                                                                          \
            LF_BY_GROUPS(T, BernoulliStepInputsBackward, g, in, s, gx, gz, gl, nullptr)                               \
    }                                                                                                                 \
    static void outputs_moments_##suffix(const TaggerOutputs& in, T* workspace, const TaggerShape& s, int64_t begin,  \
                                         int64_t end) {                                                               \
        outputs_moments(in, workspace, s, begin, end);                                                                \
    }                                                                                                                 \
    static void outputs_merge_##suffix(const TaggerOutputs& in, const T* workspace, T* stats, double eps,             \
                                       const TaggerShape& s, int64_t begin, int64_t end) {                            \
        outputs_merge(in, workspace, stats, eps, s, begin, end);                                                      \
    }                                                                                                                 \
    static void outputs_##suffix(bool gaussian, const TaggerOutputs& in, T* z, T* logits, T* nll, const T* stats,     \
                                 const TaggerShape& s, int64_t begin, int64_t end) {                                  \
        if (gaussian)                                                                                                 \
            s.groups == kFew ? outputs<true, kFew>(in, z, logits, nll, stats, s, begin, end)                          \
                             : outputs<true, 0>(in, z, logits, nll, stats, s, begin, end);                            \
        else                                                                                                          \
            s.groups == kFew ? outputs<false, kFew>(in, z, logits, nll, stats, s, begin, end)                         \
                             : outputs<false, 0>(in, z, logits, nll, stats, s, begin, end);                           \
    }                                                                                                                 \
    static void outputs_backward_##suffix(bool gaussian, const TaggerOutputs& in, const TaggerOutputsGradients<T>& g, \
                                          T* workspace, const TaggerShape& s, int64_t begin, int64_t end) {           \
        if (gaussian)                                                                                                 \
            s.groups == kFew ? outputs_backward<true, kFew>(in, g, workspace, s, begin, end)                          \
                             : outputs_backward<true, 0>(in, g, workspace, s, begin, end);                            \
        else                                                                                                          \
            s.groups == kFew ? outputs_backward<false, kFew>(in, g, workspace, s, begin, end)                         \
                             : outputs_backward<false, 0>(in, g, workspace, s, begin, end);                           \
    }                                                                                                                 \
    static void outputs_backward_merge_##suffix(const TaggerOutputsGradients<T>& g, const T* workspace, T* means,     \
                                                const TaggerShape& s, int64_t begin, int64_t end) {                   \
        outputs_backward_merge(g, workspace, means, s, begin, end);                                                   \
    }                                                                                                                 \
    static void outputs_backward_finish_##suffix(const TaggerOutputs& in, const TaggerOutputsGradients<T>& g,         \
                                                 const T* means, const TaggerShape& s, int64_t begin, int64_t end) {  \
        s.groups == kFew ? outputs_backward_finish<kFew>(in, g, means, s, begin, end)                                 \
                         : outputs_backward_finish<0>(in, g, means, s, begin, end);                                   \
    }

LF_TAGGER_STEP_INSTANCES(float, f32)
LF_TAGGER_STEP_INSTANCES(double, f64)
#undef LF_TAGGER_STEP_INSTANCES
#undef LF_EACH_GROUP
#undef LF_OVER_PIXELS

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t tagger_outputs_items(const TaggerShape& s) {
    const OutputsPlan plan(s);
    return s.seeds * plan.chunks * plan.blocks;
}
int64_t tagger_outputs_merge_items(const TaggerShape& s) { return s.seeds * OutputsPlan(s).column_blocks; }
int64_t tagger_outputs_workspace(const TaggerShape& s) { return s.seeds * OutputsPlan(s).chunks * 4 * s.pixels; }

#define LF_TAGGER_STEP_DISPATCH(T, suffix)                                                                           \
    template <>                                                                                                      \
    void tagger_step_inputs<T>(bool gaussian, const TaggerInputs& in, T* out, const TaggerShape& s, int64_t begin,   \
                               int64_t end) {                                                                        \
        static const auto kernel = LF_SELECT(inputs_##suffix);                                                       \
        kernel(gaussian, in, out, s, begin, end);                                                                    \
    }                                                                                                                \
    template <>                                                                                                      \
    void tagger_step_inputs_backward<T>(bool gaussian, const TaggerInput& g, const TaggerInputs& in, T* gx, T* gz,   \
                                        T* gl, double* partials, const TaggerShape& s, int64_t begin, int64_t end) { \
        static const auto kernel = LF_SELECT(inputs_backward_##suffix);                                              \
        kernel(gaussian, g, in, gx, gz, gl, partials, s, begin, end);                                                \
    }                                                                                                                \
    template <>                                                                                                      \
    void tagger_step_outputs_moments<T>(const TaggerOutputs& in, T* workspace, const TaggerShape& s, int64_t begin,  \
                                        int64_t end) {                                                               \
        static const auto kernel = LF_SELECT(outputs_moments_##suffix);                                              \
        kernel(in, workspace, s, begin, end);                                                                        \
    }                                                                                                                \
    template <>                                                                                                      \
    void tagger_step_outputs_merge<T>(const TaggerOutputs& in, const T* workspace, T* stats, double eps,             \
                                      const TaggerShape& s, int64_t begin, int64_t end) {                            \
        static const auto kernel = LF_SELECT(outputs_merge_##suffix);                                                \
        kernel(in, workspace, stats, eps, s, begin, end);                                                            \
    }                                                                                                                \
    template <>                                                                                                      \
    void tagger_step_outputs<T>(bool gaussian, const TaggerOutputs& in, T* z, T* logits, T* nll, const T* stats,     \
                                const TaggerShape& s, int64_t begin, int64_t end) {                                  \
        static const auto kernel = LF_SELECT(outputs_##suffix);                                                      \
        kernel(gaussian, in, z, logits, nll, stats, s, begin, end);                                                  \
    }                                                                                                                \
    template <>                                                                                                      \
    void tagger_step_outputs_backward<T>(bool gaussian, const TaggerOutputs& in, const TaggerOutputsGradients<T>& g, \
                                         T* workspace, const TaggerShape& s, int64_t begin, int64_t end) {           \
        static const auto kernel = LF_SELECT(outputs_backward_##suffix);                                             \
        kernel(gaussian, in, g, workspace, s, begin, end);                                                           \
    }                                                                                                                \
    template <>                                                                                                      \
    void tagger_step_outputs_backward_merge<T>(const TaggerOutputsGradients<T>& g, const T* workspace, T* means,     \
                                               const TaggerShape& s, int64_t begin, int64_t end) {                   \
        static const auto kernel = LF_SELECT(outputs_backward_merge_##suffix);                                       \
        kernel(g, workspace, means, s, begin, end);                                                                  \
    }                                                                                                                \
    template <>                                                                                                      \
    void tagger_step_outputs_backward_finish<T>(const TaggerOutputs& in, const TaggerOutputsGradients<T>& g,         \
                                                const T* means, const TaggerShape& s, int64_t begin, int64_t end) {  \
        static const auto kernel = LF_SELECT(outputs_backward_finish_##suffix);                                      \
        kernel(in, g, means, s, begin, end);                                                                         \
    }

LF_TAGGER_STEP_DISPATCH(float, f32)
LF_TAGGER_STEP_DISPATCH(double, f64)
#undef LF_TAGGER_STEP_DISPATCH

}  // namespace ladderfast::cpu
#endif

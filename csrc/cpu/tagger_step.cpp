// CPU kernels of the op `tagger_step`; contract in ../tagger_step.h, formulas in ../math/tagger.h.
//
// Inputs: as in tagger.cpp a vector, or a pair of them, covers neighbouring pixels of one row and goes over the groups
// a few times; what is dear to compute stays on the stack in between, for a pair more than there are registers: but for
// the Gaussian forward pass, single vectors are faster.
//
// Outputs: an item is a few neighbouring columns of all rows and groups of a seed. It goes over them twice in either
// direction, to sum and with what the sums say. The second time finds them in the second-level cache: where they were
// or, backward, packed in scratch, where rows of a width fall on few of that cache's sets.
//
// Floor: in float32 the inputs move 25 bytes for an element of z forward and 34 backward, the outputs 18 and 27. Two
// AVX-512 cores of an AMD EPYC that nobody else uses take, at 100 x 4 x 784 and without the call, .27 and .42 ns an
// element for Bernoulli inputs (.31 and .40 Gaussian), near the third-level cache's 100 GB/s, and .29 and .49 for
// Bernoulli outputs (.34 and .61).
// Beside others who use that cache, as on the machine in bench/results, they take more.
// Of the latter's 58 cycles for a vector of 16 backward, 48 remain with all data in the first-level cache: 16 for the
// weights, where multiplications and additions need 12 (chains are longer than the processor's window), 19 for the
// gradients, 9 for `finish`. At 100 x 4 x 1024 scratch saves a quarter of the backward pass, at 40 x 4 x 4096 a third;
// forward, copying costs more than it saves.
#undef LF_THIS_FILE
#define LF_THIS_FILE "tagger_step.cpp"

#ifndef LADDERFAST_CPU_TAGGER_STEP_PLAN
#define LADDERFAST_CPU_TAGGER_STEP_PLAN

#include "../tagger_step.h"
#include "isa.h"
#include "plan.h"
#include "tagger_plan.h"

namespace ladderfast::cpu {

static const int64_t kOutputsBlock = 64;   // pixels of an item of the outputs, at most
static const int64_t kOutputsLanes = 16;   // its pixels are a multiple of these but for the last
static const int64_t kOutputsTile = 1024;  // values that a tile of rows may leave: by pixel or by pixel and group
static const int64_t kOutputsCalm = 110;   // exponents to the base 2 that neither overflow nor underflow in a sum of 64
static const int64_t kOutputsParts = 4;  // of a row and group in scratch: z_pre, m_pre and what becomes their gradients

// Items of a seed: their number is a multiple of eight where there are pixels enough, so that threads have equal
// shares. Sums over a chunk of about 64 rows and groups are made in T and added up in double.
struct OutputsPlan {
    int64_t rows, blocks, chunks, lanes, pixels;

    explicit OutputsPlan(const TaggerShape& s) : pixels(s.pixels) {
        rows = s.seeds > 0 ? s.rows / s.seeds : 0;
        chunks = min_of(ceil_div(rows * s.groups, kMaxRows), rows);
        lanes = ceil_div(pixels, kOutputsLanes);
        blocks = min_of(ceil_div(ceil_div(pixels, kOutputsBlock), 8) * 8, lanes);
    }
    int64_t row_begin(int64_t chunk) const { return rows * chunk / chunks; }
    int64_t pixel_begin(int64_t block) const { return min_of(lanes * block / blocks * kOutputsLanes, pixels); }
    int64_t most_pixels() const { return blocks > 0 ? ceil_div(lanes, blocks) * kOutputsLanes : 0; }
};

// Whether what an item of the backward pass goes over twice, four tensors, is twice what a cache of 2048 sets of 8
// lines has room for on the sets where places that are so many elements apart fall.
template <class T>
static bool outputs_collide(int64_t apart, const TaggerShape& s) {
    const OutputsPlan plan(s);
    const int64_t line = 64 / sizeof(T);
    int64_t shared = apart % line == 0 ? 1 : 0;  // sets by which a step from place to place is a multiple
    while (shared > 0 && shared < 2048 && apart % (2 * shared * line) == 0) shared *= 2;
    const int64_t lines = ceil_div(plan.most_pixels(), line);
    const int64_t sets = shared > lines ? 2048 / shared * lines : 2048;
    return plan.rows * s.groups * lines * 4 > 2 * 8 * sets;
}

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
            a[k] = this->m.template load<V, whole>(r, k, d, n);
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
            w[k] = x - this->z.template load<V, whole>(r, k, d, n);
            if constexpr (scaled) {
                unscaled.weigh(w[k], v);
                pixel.compare(w[k]);
            }
        }
        if constexpr (scaled) pixel.unless_enough(unscaled.total);
        LF_EACH_GROUP(k, this->groups) w[k] = pixel.weigh(w[k], v);
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
    static constexpr bool pairs = false;

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
        density[k] = pixel.gather(this->z.template load<V, whole>(r, k, d, n), a[k], b);
        pixel.finish();
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
    static constexpr bool pairs = false;

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
            w[k] = x - this->z.template load<V, whole>(r, k, d, n);
            if constexpr (scaled) {
                unscaled.weigh(w[k], v);
                pixel.compare(w[k]);
            }
        }
        if constexpr (scaled) pixel.unless_enough(unscaled.total);
        LF_EACH_GROUP(k, this->groups)
        w[k] = pixel.weigh(w[k], v, this->template of<V, whole>(this->kLikelihood, r, k, d, n));
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
    static constexpr bool pairs = false;

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
                                  this->template of<V, whole>(this->kLikelihood, r, k, d, n), b);
        pixel.finish_backward();
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

// What pixels need of their columns: z before any squashing is (z_pre - mean_z) scale_z + b1, and the logit is
// (m_pre - mean_m) scale_m.
template <class V>
struct Columns {
    V mean_z, scale_z, b1, mean_m, scale_m;

    // For Bernoulli groups, whose z is `logistic_of` of it: the argument of that.
    template <bool gaussian>
    LF_HD V z(V centred) const {
        const V down = constant<V>(-LF_TAGGER_LOG2E);
        return gaussian ? centred * scale_z + b1 : centred * (scale_z * down) + b1 * down;
    }
    LF_HD V logit(V centred) const { return centred * scale_m; }
    LF_HD V exponent(V centred) const { return centred * (scale_m * constant<V>(LF_TAGGER_LOG2E)); }
};

// One item of the outputs: pixels [first, last) of the rows of a seed, the first of which is `row`.
template <bool gaussian, int fixed, class T>
struct OutputsItem {
    OutputsPlan plan;
    int64_t groups, width, z_stride, m_stride;
    const T *z_pre, *m_pre, *c1, *b1;
    const T* stats;  // (4, pixels) of the seed
    TaggerView<T> x;
    int64_t seed, row, first, last;
    T c2;
    GaussianScalar<T> scalars = {};

    LF_HD OutputsItem(const TaggerOutputs& in, const TaggerShape& s, const T* all_stats, int64_t item)
        : plan(s), groups(s.groups), width(s.pixels), z_stride(in.z.group), m_stride(in.m.group), x(in.x) {
        seed = item / plan.blocks;
        row = seed * plan.rows;
        first = plan.pixel_begin(item % plan.blocks);
        last = plan.pixel_begin(item % plan.blocks + 1);
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

    // Whether Bernoulli groups need not look for large differences of logits and arguments of a sigmoid. Of n values,
    // one is at most sqrt(n - 1) standard deviations from their mean, and n / sqrt(n - 1) from their mean as T has it:
    // rounding goes to the nearest number, so that it errs by no more than the nearest of the values is away. Two are
    // at most sqrt(2 n) from each other.
    LF_HD bool is_calm() const {
        const double n = (double)(plan.rows * groups);
        const T most = (T)(kOutputsCalm / LF_TAGGER_LOG2E), reach = n > 1 ? (T)(n / sqrt(n - 1)) : 0;
        bool calm = (T)1.5 * reach * magnitude(c2) <= most;
        for (int64_t d = first; d < last; ++d) calm &= reach * magnitude(c1[d]) + magnitude(b1[d]) <= most;
        return calm;
    }

  private:
    static LF_HD T magnitude(T x) { return x < 0 ? -x : x; }
};

// Where an item finds for the second time what it goes over twice: where it was or, packed, in scratch.
template <class T>
struct OutputsCopy {
    bool packed;
    int64_t row, first;  // of the item
    struct Part {
        T* data;         // of the item's first pixel
        int64_t stride;  // from group to group; `groups` of them from row to row
    } z, m, grad_z, grad_m;

    // Without scratch it stays where it was, or will be.
    template <class Item>
    LF_HD OutputsCopy(const Item& item, T* scratch, T* grad_z_pre, T* grad_m_pre)
        : packed(scratch != nullptr),
          row(item.row),
          first(item.first),
          z{const_cast<T*>(item.z_at(item.row, item.first)), item.z_stride},
          m{const_cast<T*>(item.m_at(item.row, item.first)), item.m_stride},
          grad_z{grad_z_pre + item.packed(item.row, item.first), item.width},
          grad_m{grad_m_pre + item.packed(item.row, item.first), item.width} {
        if (!packed) return;
        const int64_t count = ceil_div(item.last - item.first, kOutputsLanes) * kOutputsLanes;
        z = {scratch, kOutputsParts * count};
        m = {scratch + count, z.stride};
        grad_z = {scratch + 2 * count, z.stride};
        grad_m = {scratch + 3 * count, z.stride};
    }
    LF_HD T* at(const Part& part, int64_t r, int64_t groups, int64_t d) const {
        return part.data + (r - row) * groups * part.stride + (d - first);
    }
};

// step<V, whole>(pixel, count, row, row_end) for the pixels of an item.
#define LF_OVER_PIXELS(step, r, r_end)                                                                 \
    {                                                                                                  \
        int64_t d = item.first;                                                                        \
        for (; d + Vec<T>::width <= item.last; d += Vec<T>::width) step<Vec<T>, true>(d, 0, r, r_end); \
        if (d < item.last) step<Vec<T>, false>(d, item.last - d, r, r_end);                            \
    }

// Chains of operations are long: where a pass takes them in steps, over a tile of rows at a time, the processor has
// several in hand. What one step leaves for the next lies in the first-level cache.
static inline int64_t tile_rows(int64_t groups) {
    const int64_t most = kOutputsTile / (groups * kOutputsBlock);
    return most > 0 ? most : 1;
}

// Of n vectors of columns over `places`: their mean less the first place, and the sum of squares about it. Squares are
// of distances from the mean of the first few places, which costs few digits and spares column_moments' second pass.
template <int n, bool whole, class T>
LF_HD void moments_of_places(const T* x, int64_t stride, int64_t places, int64_t lanes, T* mean, T* squares) {
    using V = Vec<T>;
    const int64_t head = min_of(places, 4);
    V first[n], center[n], sum[n], square[n];
    for (int j = 0; j < n; ++j) {
        first[j] = read<whole, V>(x + j * V::width, lanes);
        V total = constant<V>(0);
        for (int64_t p = 1; p < head; ++p)
            total = total + (read<whole, V>(x + p * stride + j * V::width, lanes) - first[j]);
        center[j] = first[j] + total * V::broadcast((T)1 / (T)head);
        sum[j] = square[j] = constant<V>(0);
    }
    for (int64_t p = 0; p < places; ++p) {
        for (int j = 0; j < n; ++j) {
            const V d = read<whole, V>(x + p * stride + j * V::width, lanes) - center[j];
            sum[j] = sum[j] + d;
            square[j] = square[j] + d * d;
        }
    }
    const V share = V::broadcast((T)1 / (T)places);
    for (int j = 0; j < n; ++j) {
        const V rest = sum[j] * share;
        ((center[j] - first[j]) + rest).store(mean + j * V::width);
        larger(constant<V>(0), square[j] - sum[j] * rest).store(squares + j * V::width);
    }
}

// Writes mean and 1 / std of z and m for the item's columns.
template <class Item, class T>
static inline void outputs_statistics(const Item& item, T* stats, double eps) {
    using V = Vec<T>;
    const int64_t count = item.last - item.first;
    const struct {
        const T* at;
        int64_t stride;
    } pre[2] = {{item.z_at(item.row, item.first), item.z_stride}, {item.m_at(item.row, item.first), item.m_stride}};
    for (int j = 0; j < 2; ++j) {
        alignas(64) T its_mean[kOutputsBlock], its_squares[kOutputsBlock];
        alignas(64) double mean[kOutputsBlock] = {}, squares[kOutputsBlock] = {};
        double n = 0;
        for (int64_t chunk = 0; chunk < item.plan.chunks; ++chunk) {
            const int64_t begin = item.plan.row_begin(chunk) * item.groups, stride = pre[j].stride;
            const int64_t places = item.plan.row_begin(chunk + 1) * item.groups - begin;
            const T* from = pre[j].at + begin * stride;
            const auto moments = [&](const auto& of, int64_t c, int64_t lanes) {
                of(from + c, stride, places, lanes, its_mean + c, its_squares + c);
            };
            int64_t c = 0;
            for (; c + 4 * V::width <= count; c += 4 * V::width) moments(moments_of_places<4, true, T>, c, 0);
            const int64_t vectors = (count - c) / V::width;
            if (vectors == 3) moments(moments_of_places<3, true, T>, c, 0);
            if (vectors == 2) moments(moments_of_places<2, true, T>, c, 0);
            if (vectors == 1) moments(moments_of_places<1, true, T>, c, 0);
            c += vectors * V::width;
            if (c < count) moments(moments_of_places<1, false, T>, c, count - c);
            merge_partials<true>(its_mean, its_squares, 1, from, 1, count, (double)places, n, mean, squares);
        }
        T* to = stats + (item.seed * 4 + 2 * j) * item.width + item.first;
        for (int64_t d = 0; d < count; ++d) {
            to[d] = (T)mean[d];
            to[item.width + d] = (T)(n > 0 ? 1.0 / sqrt(squares[d] / n + eps) : 0.0);
        }
    }
}

// Bernoulli groups that are calm: from the arguments of z's sigmoids and, but for the first group, the logits less that
// of the first to z and the masks' weights, of which the first is 1.
template <int fixed, class T>
LF_HD void calm_weights(Vec<T>* z, Vec<T>* weights, int64_t groups) {
    if constexpr (fixed > 0)
        in_step_of_calm<fixed, fixed - 1>(z, weights + 1);
    else
        for (int64_t k = 0; k < groups; ++k) {
            z[k] = logistic_of_calm(z[k]);
            if (k > 0) weights[k] = exp2_of_calm(weights[k]);
        }
}

template <bool gaussian, bool calm, int fixed, class T>
struct OutputsPass {
    OutputsItem<gaussian, fixed, T> item;
    T *z_out, *logits_out, *nll;
    // Of a tile's pixels: the sum of weights that costs; of the masks' weights; Gaussian: the top of the former.
    alignas(64) T sum[kOutputsTile], masks_sum[kOutputsTile], top[kOutputsTile];

    // The arrays stay as they are.
    LF_HD OutputsPass(const OutputsItem<gaussian, fixed, T>& item, T* z_out, T* logits_out, T* nll)
        : item(item), z_out(z_out), logits_out(logits_out), nll(nll) {}

    LF_HD void run() {
        // Groups leave nothing of their own here.
        const int64_t tile = kOutputsTile / kOutputsBlock, row_end = item.row + item.plan.rows;
        for (int64_t r = item.row; r < row_end; r += tile) {
            const int64_t end = min_of(r + tile, row_end);
            LF_OVER_PIXELS(groups, r, end)
            LF_OVER_PIXELS(cost, r, end)
        }
    }

    template <class V, bool whole>
    LF_HD void groups(int64_t d, int64_t n, int64_t begin, int64_t end) {
        const auto c = item.template columns<V, whole>(d, n);
        const auto scalars = broadcast<V>(item.scalars);
        const int64_t groups = item.groups, width = item.width, z_stride = item.z_stride, m_stride = item.m_stride;
        for (int64_t r = begin; r < end; ++r) {
            const V x = item.x.template load<V, whole>(r, 0, d, n);
            const T *z_at = item.z_at(r, d), *m_at = item.m_at(r, d);
            T *to_z = z_out + item.packed(r, d), *to_logits = logits_out + item.packed(r, d);
            const int64_t at = (r - begin) * kOutputsBlock + d - item.first;
            V l[kept<fixed>], z[kept<fixed>];
            LF_EACH_GROUP(k, groups) {
                z[k] = c.template z<gaussian>(read<whole, V>(z_at + k * z_stride, n) - c.mean_z);
                l[k] = c.logit(read<whole, V>(m_at + k * m_stride, n) - c.mean_m);
                write<whole>(l[k], to_logits + k * width, n);
            }
            if constexpr (calm) {
                LF_EACH_GROUP(k, groups) if (k > 0) l[k] = logit_exponent(l[k] - l[0]);
                calm_weights<fixed>(z, l, groups);
                BernoulliMixture<V> mixture;
                mixture.p = z[0];
                V total = constant<V>(1);
                LF_EACH_GROUP(k, groups) {
                    write<whole>(z[k], to_z + k * width, n);
                    if (k == 0) continue;
                    mixture.gather(z[k], l[k]);
                    total = total + l[k];
                }
                mixture.p.store(sum + at);
                total.store(masks_sum + at);
                continue;
            }
            MaskPixel<V> masks;
            MaskPixel<V, false> joint;
            LF_EACH_GROUP(k, groups) {
                if constexpr (!gaussian) z[k] = logistic_of(z[k]);
                write<whole>(z[k], to_z + k * width, n);
                masks.compare(l[k]);
                if constexpr (gaussian) z[k] = gaussian_exponent(x - z[k], scalars);
            }
            if constexpr (gaussian) {
                LF_EACH_GROUP(k, groups) {
                    masks.weigh(l[k]);
                    z[k] = masks.exponent(l[k]) + z[k];
                    joint.compare(z[k]);
                }
                LF_EACH_GROUP(k, groups) joint.weigh(z[k]);
                joint.total.store(sum + at);
                joint.top.store(top + at);
            } else {
                BernoulliMixture<V> mixture;
                LF_EACH_GROUP(k, groups) mixture.gather(z[k], masks.weigh(l[k]));
                mixture.p.store(sum + at);
            }
            masks.total.store(masks_sum + at);
        }
    }

    template <class V, bool whole>
    LF_HD void cost(int64_t d, int64_t n, int64_t begin, int64_t end) const {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t at = (r - begin) * kOutputsBlock + d - item.first;
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
    }
};

template <bool gaussian, int fixed, class T>
static inline void outputs(const TaggerOutputs& in, T* z, T* logits, T* nll, T* stats, double eps, const TaggerShape& s,
                           int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const OutputsItem<gaussian, fixed, T> item(in, s, stats, i);
        outputs_statistics(item, stats, eps);
        if constexpr (!gaussian) {
            if (item.is_calm()) {
                OutputsPass<gaussian, true, fixed, T>(item, z, logits, nll).run();
                continue;
            }
        }
        OutputsPass<gaussian, false, fixed, T>(item, z, logits, nll).run();
    }
}

// First leaves the gradients of c1 z_hat + b1 and of the logits, where those of z_pre and m_pre will be or in scratch,
// and their sums over rows and groups, each alone and times z_pre or m_pre less its mean; then goes on through the
// normalisation.
template <bool gaussian, bool calm, int fixed, class T>
struct OutputsBackward {
    OutputsItem<gaussian, fixed, T> item;
    OutputsCopy<T> copy;
    TaggerView<T> grad_z, grad_logits, grad_nll;
    const TaggerOutputsGradients<T>& to;
    Vec<T> of_variance;
    double variance, c2;  // the item's parts
    // Of a chunk, and of all; then means over rows and groups.
    alignas(64) T sums[4][kOutputsBlock];
    alignas(64) double totals[4][kOutputsBlock];
    // Of a tile, by row and group: the masks' weights, and Gaussian the joint ones, Bernoulli z.
    static constexpr int64_t kMost =
        kTaggerGroups * kOutputsBlock > kOutputsTile ? kTaggerGroups * kOutputsBlock : kOutputsTile;
    alignas(64) T masks_at[kMost], other_at[kMost];
    // By pixel: share of the masks' weights; Gaussian that of the joint ones, Bernoulli p and the gradient of p.
    alignas(64) T share_at[kOutputsTile], joint_at[kOutputsTile], slope_at[kOutputsTile];

    LF_HD OutputsBackward(const OutputsItem<gaussian, fixed, T>& item, const TaggerOutputsGradients<T>& to, T* scratch)
        : item(item),
          copy(item, scratch, to.z_pre, to.m_pre),
          grad_z(to.z),
          grad_logits(to.logits),
          grad_nll(to.nll),
          to(to),
          variance(0),
          c2(0) {
        memset(totals, 0, sizeof(totals));
    }

    LF_HD void run(int64_t item_index) {
        const int64_t tile = tile_rows(item.groups), count = item.last - item.first;
        for (int64_t chunk = 0; chunk < item.plan.chunks; ++chunk) {
            const int64_t row_end = item.row + item.plan.row_begin(chunk + 1);
            memset(sums, 0, sizeof(sums));
            of_variance = Vec<T>::broadcast(0);
            for (int64_t r = item.row + item.plan.row_begin(chunk); r < row_end; r += tile) {
                const int64_t end = min_of(r + tile, row_end);
                LF_OVER_PIXELS(weights, r, end)
                LF_OVER_PIXELS(mixtures, r, end)
                LF_OVER_PIXELS(gradients, r, end)
            }
            for (int j = 0; j < 4; ++j)
                for (int64_t d = 0; d < count; ++d) totals[j][d] += sums[j][d];
            variance += of_variance.sum();
        }
        parameters(count);
        LF_OVER_PIXELS(finish, item.row, item.row + item.plan.rows)
        to.c2[item_index] = c2;
        if constexpr (gaussian) to.variance[item_index] = variance;
    }

    // Writes the gradients of c1 and b1 and leaves the means for `finish` in sums.
    LF_HD void parameters(int64_t count) {
        const double share = 1.0 / (double)(item.plan.rows * item.groups);
        for (int j = 0; j < 4; ++j) {
            const T* rstd = item.stats + j * item.width + item.first;  // for the sums that lack it, of odd j
            if (j % 2 == 1)
                for (int64_t d = 0; d < count; ++d) totals[j][d] *= rstd[d];
            for (int64_t d = 0; d < count; ++d) sums[j][d] = (T)(totals[j][d] * share);
        }
        const int64_t at = item.seed * item.width + item.first;
        for (int64_t d = 0; d < count; ++d) {
            to.b1[at + d] = (T)totals[0][d];
            to.c1[at + d] = (T)totals[1][d];
            c2 += totals[3][d];
        }
    }

    LF_HD int64_t tile_at(int64_t r, int64_t d) const { return r * kOutputsBlock + d - item.first; }

    template <class V, bool whole>
    LF_HD void weights(int64_t d, int64_t n, int64_t begin, int64_t end) {
        const auto c = item.template columns<V, whole>(d, n);
        const auto scalars = broadcast<V>(item.scalars);
        const int64_t groups = item.groups, z_stride = item.z_stride, m_stride = item.m_stride;
        const int64_t copy_stride = copy.z.stride;
        const bool packed = copy.packed;
        for (int64_t r = begin; r < end; ++r) {
            const T *z_at = item.z_at(r, d), *m_at = item.m_at(r, d);
            T *z_copy = copy.at(copy.z, r, groups, d), *m_copy = copy.at(copy.m, r, groups, d);
            const int64_t at = tile_at(r - begin, d), groups_at = tile_at((r - begin) * groups, d);
            V l[kept<fixed>], other[kept<fixed>];
            const auto take = [&](int64_t k) {
                const V z = read<whole, V>(z_at + k * z_stride, n);
                l[k] = read<whole, V>(m_at + k * m_stride, n);
                if (packed) {
                    write<whole>(z, z_copy + k * copy_stride, n);
                    write<whole>(l[k], m_copy + k * copy_stride, n);
                }
                other[k] = c.template z<gaussian>(z - c.mean_z);
            };
            if constexpr (calm) {
                LF_EACH_GROUP(k, groups) take(k);
                LF_EACH_GROUP(k, groups) if (k > 0) l[k] = c.exponent(l[k] - l[0]);
                calm_weights<fixed>(other, l, groups);
                BernoulliMixture<V> mixture;
                mixture.p = other[0];
                V total = constant<V>(1);
                LF_EACH_GROUP(k, groups) {
                    other[k].store(other_at + groups_at + k * kOutputsBlock);
                    if (k == 0) continue;
                    l[k].store(masks_at + groups_at + k * kOutputsBlock);
                    mixture.gather(other[k], l[k]);
                    total = total + l[k];
                }
                mixture.p.store(joint_at + at);
                total.store(share_at + at);
                continue;
            }
            const V x = item.x.template load<V, whole>(r, 0, d, n);
            MaskPixel<V> masks;
            MaskPixel<V, false> joint;
            LF_EACH_GROUP(k, groups) {
                take(k);
                l[k] = c.logit(l[k] - c.mean_m);
                masks.compare(l[k]);
                other[k] = gaussian ? gaussian_exponent(x - other[k], scalars) : logistic_of(other[k]);
            }
            BernoulliMixture<V> mixture;
            LF_EACH_GROUP(k, groups) {
                const V weight = masks.weigh(l[k]);
                weight.store(masks_at + groups_at + k * kOutputsBlock);
                if constexpr (gaussian) {
                    other[k] = masks.exponent(l[k]) + other[k];
                    joint.compare(other[k]);
                } else {
                    mixture.gather(other[k], weight);
                    other[k].store(other_at + groups_at + k * kOutputsBlock);
                }
            }
            if constexpr (gaussian) {
                LF_EACH_GROUP(k, groups) joint.weigh(other[k]).store(other_at + groups_at + k * kOutputsBlock);
            }
            masks.total.store(share_at + at);
            (gaussian ? joint.total : mixture.p).store(joint_at + at);
        }
    }

    template <class V, bool whole>
    LF_HD void mixtures(int64_t d, int64_t n, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t at = tile_at(r - begin, d);
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
    }

    template <class V, bool whole>
    LF_HD void gradients(int64_t d, int64_t n, int64_t begin, int64_t end) {
        const auto c = item.template columns<V, whole>(d, n);
        const auto scalars = broadcast<V>(item.scalars);
        const int64_t groups = item.groups, z_stride = copy.z.stride, m_stride = copy.m.stride;
        const int64_t to_z_stride = copy.grad_z.stride, to_m_stride = copy.grad_m.stride;
        const int64_t grad_z_stride = grad_z.group, grad_l_stride = grad_logits.group;
        T* to_x = to.x;
        V sum[4], variance = constant<V>(0);
        for (int j = 0; j < 4; ++j) sum[j] = V::load(sums[j] + d - item.first);
        for (int64_t r = begin; r < end; ++r) {
            const T* grad_z_at = grad_z.data + r * grad_z.row + d;
            const T* grad_l_at = grad_logits.data + r * grad_logits.row + d;
            const T *z_at = copy.at(copy.z, r, groups, d), *m_at = copy.at(copy.m, r, groups, d);
            T *to_z = copy.at(copy.grad_z, r, groups, d), *to_m = copy.at(copy.grad_m, r, groups, d);
            const int64_t at = tile_at(r - begin, d), groups_at = tile_at((r - begin) * groups, d);
            const V share = V::load(share_at + at), joint = V::load(joint_at + at);
            V x, grad, slope, of_x = constant<V>(0), sum_v;
            if constexpr (gaussian) {
                x = item.x.template load<V, whole>(r, 0, d, n);
                sum_v = grad = grad_nll.template load<V, whole>(r, 0, d, n);
            } else {
                slope = V::load(slope_at + at);
            }
            LF_EACH_GROUP(k, groups) {
                V m = share;
                if (!calm || k > 0) m = V::load(masks_at + groups_at + k * kOutputsBlock) * share;
                const V other = V::load(other_at + groups_at + k * kOutputsBlock);
                const V from_z = read<whole, V>(grad_z_at + k * grad_z_stride, n);
                const V z_centred = read<whole, V>(z_at + k * z_stride, n) - c.mean_z;
                const V m_centred = read<whole, V>(m_at + k * m_stride, n) - c.mean_m;
                V out_z, out_m;
                if constexpr (gaussian) {
                    gaussian_logits_backward(grad, x - c.template z<true>(z_centred), m, other * joint, scalars, out_z,
                                             out_m, sum_v);
                    of_x = of_x - out_z;
                    out_z = out_z + from_z;
                } else {
                    const V pull = slope * m;
                    out_z = (pull + from_z) * (other - other * other);
                    out_m = pull * (other - joint);
                }
                out_m = out_m + read<whole, V>(grad_l_at + k * grad_l_stride, n);
                write<whole>(out_z, to_z + k * to_z_stride, n);
                write<whole>(out_m, to_m + k * to_m_stride, n);
                sum[0] = sum[0] + out_z;
                sum[1] = sum[1] + out_z * z_centred;
                sum[2] = sum[2] + out_m;
                sum[3] = sum[3] + out_m * m_centred;
            }
            if constexpr (gaussian) {
                if (to_x != nullptr) write<whole>(of_x, to_x + r * item.width + d, n);
                if constexpr (!whole)
                    for (int64_t j = n; j < V::width; ++j) sum_v.raw[j] = 0;
                variance = variance + sum_v;
            }
        }
        for (int j = 0; j < 4; ++j) sum[j].store(sums[j] + d - item.first);
        if constexpr (gaussian) of_variance = of_variance + variance;
    }

    // From the gradient of scale x_hat to that of x.
    template <class V, bool whole>
    LF_HD void finish(int64_t d, int64_t n, int64_t begin, int64_t end) const {
        const auto c = item.template columns<V, whole>(d, n);
        const T* rstd = item.stats + item.width + d;
        const int64_t at = d - item.first, groups = item.groups, width = item.width;
        const int64_t z_stride = copy.z.stride, m_stride = copy.m.stride;
        const int64_t grad_z_stride = copy.grad_z.stride, grad_m_stride = copy.grad_m.stride;
        const V mean_z = V::load(sums[0] + at), mean_m = V::load(sums[2] + at);
        const V pull_z = read<whole, V>(rstd, n) * V::load(sums[1] + at);
        const V pull_m = read<whole, V>(rstd + 2 * width, n) * V::load(sums[3] + at);
        for (int64_t r = begin; r < end; ++r) {
            const T *z_at = copy.at(copy.z, r, groups, d), *m_at = copy.at(copy.m, r, groups, d);
            const T *grad_z_at = copy.at(copy.grad_z, r, groups, d), *grad_m_at = copy.at(copy.grad_m, r, groups, d);
            T *to_z = to.z_pre + item.packed(r, d), *to_m = to.m_pre + item.packed(r, d);
            LF_EACH_GROUP(k, groups) {
                const V z = read<whole, V>(z_at + k * z_stride, n) - c.mean_z;
                const V m = read<whole, V>(m_at + k * m_stride, n) - c.mean_m;
                const V of_z = read<whole, V>(grad_z_at + k * grad_z_stride, n) - mean_z;
                const V of_m = read<whole, V>(grad_m_at + k * grad_m_stride, n) - mean_m;
                write<whole>(c.scale_z * (of_z - z * pull_z), to_z + k * width, n);
                write<whole>(c.scale_m * (of_m - m * pull_m), to_m + k * width, n);
            }
        }
    }
};

template <bool gaussian, int fixed, class T>
static inline void outputs_backward(const TaggerOutputs& in, const TaggerOutputsGradients<T>& to, T* scratch,
                                    const TaggerShape& s, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const OutputsItem<gaussian, fixed, T> item(in, s, to.stats, i);
        if constexpr (!gaussian) {
            if (item.is_calm()) {
                OutputsBackward<gaussian, true, fixed, T>(item, to, scratch).run(i);
                continue;
            }
        }
        OutputsBackward<gaussian, false, fixed, T>(item, to, scratch).run(i);
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
    static void outputs_##suffix(bool gaussian, const TaggerOutputs& in, T* z, T* logits, T* nll, T* stats,           \
                                 double eps, const TaggerShape& s, int64_t begin, int64_t end) {                      \
        if (gaussian)                                                                                                 \
            s.groups == kFew ? outputs<true, kFew>(in, z, logits, nll, stats, eps, s, begin, end)                     \
                             : outputs<true, 0>(in, z, logits, nll, stats, eps, s, begin, end);                       \
        else                                                                                                          \
            s.groups == kFew ? outputs<false, kFew>(in, z, logits, nll, stats, eps, s, begin, end)                    \
                             : outputs<false, 0>(in, z, logits, nll, stats, eps, s, begin, end);                      \
    }                                                                                                                 \
    static void outputs_backward_##suffix(bool gaussian, const TaggerOutputs& in, const TaggerOutputsGradients<T>& g, \
                                          T* scratch, const TaggerShape& s, int64_t begin, int64_t end) {             \
        if (gaussian)                                                                                                 \
            s.groups == kFew ? outputs_backward<true, kFew>(in, g, scratch, s, begin, end)                            \
                             : outputs_backward<true, 0>(in, g, scratch, s, begin, end);                              \
        else                                                                                                          \
            s.groups == kFew ? outputs_backward<false, kFew>(in, g, scratch, s, begin, end)                           \
                             : outputs_backward<false, 0>(in, g, scratch, s, begin, end);                             \
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

int64_t tagger_outputs_items(const TaggerShape& s) { return s.seeds * OutputsPlan(s).blocks; }

#define LF_TAGGER_STEP_DISPATCH(T, suffix)                                                                             \
    template <>                                                                                                        \
    int64_t tagger_outputs_scratch<T>(const TaggerOutputs& in, const TaggerShape& s) {                                 \
        const OutputsPlan plan(s);                                                                                     \
        const bool collide =                                                                                           \
            outputs_collide<T>(s.pixels, s) || outputs_collide<T>(in.z.group, s) || outputs_collide<T>(in.m.group, s); \
        return collide ? plan.rows * s.groups * kOutputsParts * plan.most_pixels() : 0;                                \
    }                                                                                                                  \
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
                                         T* scratch, const TaggerShape& s, int64_t begin, int64_t end) {               \
        static const auto kernel = LF_SELECT(outputs_backward_##suffix);                                               \
        kernel(gaussian, in, g, scratch, s, begin, end);                                                               \
    }

LF_TAGGER_STEP_DISPATCH(float, f32)
LF_TAGGER_STEP_DISPATCH(double, f64)
#undef LF_TAGGER_STEP_DISPATCH

}  // namespace ladderfast::cpu
#endif

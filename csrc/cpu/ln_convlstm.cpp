// CPU kernels of the op `ln_convlstm`; contract in ../ln_convlstm.h.
//
// Floor, for each cell in float32 with one input: forward reads 9 numbers and writes 2, backward reads 11 and writes 9.
// The statistics of a sample need the whole sample, and so do the two means in the gradient of a normalised input: an
// item takes whole samples where there are enough of them, so that what is read again comes from a cache.
//
// Two ways through a sample:
//
//   columns  channels-last, dense, or fewer than 16 positions: a row is `width` cells, each gate of which is
//   contiguous.
//            A vector covers neighbouring cells, each with its own parameters.
//   runs     a vector runs along the positions of a channel, whose parameters are broadcast.
//
// Work items and the partial sums they leave depend on the shape alone.
#undef LF_THIS_FILE
#define LF_THIS_FILE "ln_convlstm.cpp"

#ifndef LADDERFAST_CPU_LN_CONVLSTM_PLAN
#define LADDERFAST_CPU_LN_CONVLSTM_PLAN

#include "../ln_convlstm.h"
#include "isa.h"

namespace ladderfast::cpu {

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static const int64_t kBlock = 256;       // cells of a row whose parameters and sums are kept in the first-level cache
static const int64_t kTile = 16;         // rows that are summed in registers
static const int64_t kRunTile = 64;      // vectors of a run that are summed in registers
static const int64_t kLongRun = 16;      // from here on by runs
static const int64_t kItem = 16384;      // gates of an item, at least
static const int64_t kSplit = 65536;     // gates of a sample, from which on it may be split
static const int64_t kItems = 8;         // samples enough to leave them whole
static const int64_t kMostSamples = 64;  // of an item
static const int64_t kReduceBlock = 64;  // channels of one item of the final sums
static const int64_t kAhead = 1024;      // bytes to prefetch ahead in runs; in columns it is the next tile

// How a shape is cut; compiled once, before any instruction set is chosen. An item is one of `groups` groups of samples
// of a seed, and one of `chunks` chunks of them: rows, or channels where the walk is by runs. One of the two is whole.
struct LnPlan {
    bool columns;
    int64_t cells;        // of a sample
    int64_t rows, width;  // columns: rows of a sample and cells of a row; runs: 1 and channels
    int64_t inner;        // cells of a row that share a channel
    int64_t group, groups, chunk, chunks;

    explicit LnPlan(const LnConvLstmShape& s) {
        cells = s.channels * s.positions;
        columns = s.channels_last || s.positions < kLongRun;
        rows = s.channels_last ? s.positions : 1;
        inner = s.channels_last || !columns ? 1 : s.positions;
        width = s.channels * inner;
        const int64_t units = columns ? rows : s.channels;
        group = groups = chunk = chunks = 0;
        if (cells == 0 || s.samples == 0 || s.seeds == 0) return;
        group = min_of(min_of(ceil_div(kItem, 4 * cells), kMostSamples), s.samples);
        groups = ceil_div(s.samples, group);
        chunks = 4 * cells < kSplit ? 1 : min_of(ceil_div(kItems, s.samples * s.seeds), units);
        chunk = ceil_div(units, chunks);
        chunks = ceil_div(units, chunk);
    }

    int64_t items(const LnConvLstmShape& s) const { return s.seeds * groups * chunks; }
    int64_t slots() const { return groups * chunks; }  // of partial sums, for each seed
    static int64_t sums(const LnConvLstmShape& s) { return 4 * (1 + s.inputs); }
};

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "../math/ln_convlstm.h"

// Mean and sum of squared deviations of a growing number of elements.
struct Moments {
    double n, mean, m2;

    LF_HD void merge(double count, double other_mean, double other_m2) {
        if (count == 0) return;
        const double total = n + count, delta = other_mean - mean;
        m2 += other_m2 + delta * delta * (n * count / total);
        mean += delta * (count / total);
        n = total;
    }
};

// Adds `count` neighbouring elements. Each block is summed less the mean of what came before it: one pass, in which a
// large mean does no harm.
template <class T>
static inline void add_moments(Moments& all, const T* x, int64_t count) {
    using V = Vec<T>;
    const int64_t block = 1024;
    while (count > 0) {
        const int64_t n = min_of(block, count);
        T shift = (T)all.mean;
        if (all.n == 0) {
            V sum = V::broadcast(0);
            int64_t i = 0;
            for (; i + V::width <= n; i += V::width) sum = sum + V::load(x + i);
            shift = sum.sum();
            for (; i < n; ++i) shift += x[i];
            shift /= (T)n;
        }
        const V s = V::broadcast(shift);
        V d[4], q[4];
        for (int k = 0; k < 4; ++k) d[k] = q[k] = V::broadcast(0);
        int64_t i = 0;
        for (; i + 4 * V::width <= n; i += 4 * V::width) {
            for (int k = 0; k < 4; ++k) {
                const V e = V::load(x + i + k * V::width) - s;
                d[k] = d[k] + e;
                q[k] = q[k] + e * e;
            }
        }
        double sum = 0, squares = 0;
        for (; i < n; ++i) {
            const double e = (double)x[i] - (double)shift;
            sum += e;
            squares += e * e;
        }
        sum += ((d[0] + d[1]) + (d[2] + d[3])).sum();
        squares += ((q[0] + q[1]) + (q[2] + q[3])).sum();
        all.merge((double)n, shift + sum / n, squares - sum * sum / n);
        x += n;
        count -= n;
    }
}

static inline double inverse_root(double x) {
    // No C++ header, and sqrt of math.h is an instruction.
    return 1.0 / __builtin_sqrt(x);
}

// One item: samples [first, first + count) of all seeds' samples, units [unit, unit_end) of each.
struct LnItem {
    int64_t seed, slot, first, count, unit, unit_end;

    LnItem(const LnPlan& plan, const LnConvLstmShape& s, int64_t item) {
        const int64_t chunk = item % plan.chunks;
        const int64_t group = item / plan.chunks % plan.groups;
        seed = item / plan.chunks / plan.groups;
        slot = group * plan.chunks + chunk;
        count = min_of(plan.group, s.samples - group * plan.group);
        first = seed * s.samples + group * plan.group;
        unit = chunk * plan.chunk;
        unit_end = min_of(unit + plan.chunk, plan.columns ? plan.rows : s.channels);
    }
};

// Moments of the units [unit, unit_end) of one sample.
template <class T>
static inline Moments moments_of(const T* x, const LnPlan& plan, const LnConvLstmShape& s, int64_t unit,
                                 int64_t unit_end) {
    Moments all = {0, 0, 0};
    if (plan.columns) {
        add_moments(all, x + unit * 4 * plan.width, (unit_end - unit) * 4 * plan.width);
    } else {
        for (int gate = 0; gate < 4; ++gate)
            add_moments(all, x + (gate * s.channels + unit) * s.positions, (unit_end - unit) * s.positions);
    }
    return all;
}

template <class T>
static inline void statistics(const LnConvLstmInputs<T>& in, double* split, const LnConvLstmShape& s,
                              const LnPlan& plan, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        for (int64_t k = 0; k < s.inputs; ++k) {
            const Moments all = moments_of(in.x[k] + item.first * 4 * plan.cells, plan, s, item.unit, item.unit_end);
            double* to = split + ((item.first * plan.chunks + i % plan.chunks) * s.inputs + k) * 3;
            to[0] = all.n;
            to[1] = all.mean;
            to[2] = all.m2;
        }
    }
}

// mean and 1 / std of one input of a sample.
template <class T>
struct Stat {
    Vec<T> mean, rstd;

    LF_HD static Stat load(const T* stats) { return {Vec<T>::broadcast(stats[0]), Vec<T>::broadcast(stats[1])}; }
};

// How far ahead of a vector of cells to prefetch, in elements of gates and of cells.
struct Ahead {
    int64_t gates, cells;

    Ahead(const LnPlan& plan, int64_t size) {
        const int64_t rows = plan.rows > 1 ? kTile : 1;
        gates = plan.columns ? rows * 4 * plan.width : kAhead / size;
        cells = plan.columns ? rows * plan.width : kAhead / size;
    }
};

// Parameters of a vector of cells.
template <int K, class T>
struct CellParams {
    Vec<T> weight[K > 0 ? K : 1][4], bias[4];
};

// The four gates of n cells at `at`, gates `stride` apart; n is ignored where `whole`.
template <int K, bool whole, class T>
static LF_HD void load_gates(const T* const (&x)[2], const T* rec, int64_t at, int64_t stride, int64_t n,
                             const Stat<T> (&stat)[2], const CellParams<K, T>& p, Vec<T> (&x_hat)[K > 0 ? K : 1][4],
                             Vec<T> (&a)[4]) {
    using V = Vec<T>;
    for (int gate = 0; gate < 4; ++gate) {
        const int64_t i = at + gate * stride;
        V sum = (whole ? V::load(rec + i) : V::load(rec + i, n)) + p.bias[gate];
        for (int k = 0; k < K; ++k) {
            x_hat[k][gate] = ((whole ? V::load(x[k] + i) : V::load(x[k] + i, n)) - stat[k].mean) * stat[k].rstd;
            sum = sum + x_hat[k][gate] * p.weight[k][gate];
        }
        if (K == 0) sum = sum + (whole ? V::load(x[0] + i) : V::load(x[0] + i, n));
        a[gate] = sum;
    }
}

template <int K, bool whole, class T>
static LF_HD void forward_cells(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, int64_t gates,
                                int64_t stride, int64_t cells, int64_t n, const Ahead& ahead, const Stat<T> (&stat)[2],
                                const CellParams<K, T>& p) {
    using V = Vec<T>;
    if (whole) {
        for (int gate = 0; gate < 4; ++gate) {
            const int64_t i = gates + gate * stride + ahead.gates;
            __builtin_prefetch(in.rec + i);
            if (K == 0) __builtin_prefetch(in.x[0] + i);
        }
        __builtin_prefetch(in.c + cells + ahead.cells);
        __builtin_prefetch(out.h + cells + ahead.cells, 1);
        __builtin_prefetch(out.c_new + cells + ahead.cells, 1);
    }
    V x_hat[K > 0 ? K : 1][4], a[4], c_new, h;
    load_gates<K, whole>(in.x, in.rec, gates, stride, n, stat, p, x_hat, a);
    lstm_forward(a, whole ? V::load(in.c + cells) : V::load(in.c + cells, n), c_new, h);
    if (whole) {
        c_new.store(out.c_new + cells);
        h.store(out.h + cells);
    } else {
        c_new.store(out.c_new + cells, n);
        h.store(out.h + cells, n);
    }
}

// sums[0]: of grad_a; sums[1 + k]: of grad_a x_hat of input k. With `project` the same weighted, over the four gates:
// projection[k].
template <int K, bool whole, bool project, class T>
static LF_HD void backward_cells(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, int64_t gates,
                                 int64_t stride, int64_t cells, int64_t n, const Ahead& ahead, const Stat<T> (&stat)[2],
                                 const CellParams<K, T>& p, Vec<T> (&sums)[1 + K][4], Vec<T> (&projection)[2][2]) {
    using V = Vec<T>;
    if (whole) {
        for (int gate = 0; gate < 4; ++gate) {
            const int64_t i = gates + gate * stride + ahead.gates;
            for (int k = 0; k < (K > 0 ? K : 1); ++k) __builtin_prefetch(in.x[k] + i);
            __builtin_prefetch(in.rec + i);
            __builtin_prefetch(grad.rec + i, 1);
        }
        __builtin_prefetch(in.c + cells + ahead.cells);
        __builtin_prefetch(grad.h + cells + ahead.cells);
        __builtin_prefetch(grad.c_new + cells + ahead.cells);
        __builtin_prefetch(grad.c + cells + ahead.cells, 1);
    }
    V x_hat[K > 0 ? K : 1][4], a[4], grad_a[4], grad_c;
    load_gates<K, whole>(in.x, in.rec, gates, stride, n, stat, p, x_hat, a);
    lstm_backward(whole ? V::load(grad.h + cells) : V::load(grad.h + cells, n),
                  whole ? V::load(grad.c_new + cells) : V::load(grad.c_new + cells, n), a,
                  whole ? V::load(in.c + cells) : V::load(in.c + cells, n), grad_a, grad_c);
    if (whole)
        grad_c.store(grad.c + cells);
    else
        grad_c.store(grad.c + cells, n);
    for (int gate = 0; gate < 4; ++gate) {
        if (whole)
            grad_a[gate].store(grad.rec + gates + gate * stride);
        else
            grad_a[gate].store(grad.rec + gates + gate * stride, n);
        sums[0][gate] = sums[0][gate] + grad_a[gate];
        for (int k = 0; k < K; ++k) {
            sums[1 + k][gate] = sums[1 + k][gate] + grad_a[gate] * x_hat[k][gate];
            if (project) {
                const V weighted = p.weight[k][gate] * grad_a[gate];
                projection[k][0] = projection[k][0] + weighted;
                projection[k][1] = projection[k][1] + weighted * x_hat[k][gate];
            }
        }
    }
}

template <int K, class T>
static LF_HD CellParams<K, T> broadcast_params(const LnConvLstmInputs<T>& in, const LnConvLstmShape& s, int64_t seed,
                                               int64_t channel) {
    CellParams<K, T> p;
    for (int gate = 0; gate < 4; ++gate) {
        const int64_t i = (seed * 4 + gate) * s.channels + channel;
        p.bias[gate] = Vec<T>::broadcast(in.bias[i]);
        for (int k = 0; k < K; ++k) p.weight[k][gate] = Vec<T>::broadcast(in.weight[k][i]);
    }
    return p;
}

// The parameters of a block of cells, rows padded to whole vectors: bias, then each weight, four gates each.
template <int K, class T>
struct Table {
    alignas(64) T at[(1 + K) * 4][kBlock];

    void fill(const LnConvLstmInputs<T>& in, const LnPlan& plan, const LnConvLstmShape& s, int64_t seed, int64_t first,
              int64_t count) {
        for (int j = 0; j < (1 + K) * 4; ++j) {
            const T* from = (j < 4 ? in.bias : in.weight[j / 4 - 1]) + (seed * 4 + j % 4) * s.channels;
            if (plan.inner == 1) {
                memcpy(at[j], from + first, count * sizeof(T));
            } else {
                for (int64_t i = 0; i < count; ++i) at[j][i] = from[(first + i) / plan.inner];
            }
            for (int64_t i = count; i % Vec<T>::width != 0; ++i) at[j][i] = 0;
        }
    }

    LF_HD CellParams<K, T> load(int64_t i) const {
        CellParams<K, T> p;
        for (int gate = 0; gate < 4; ++gate) {
            p.bias[gate] = Vec<T>::load(at[gate] + i);
            for (int k = 0; k < K; ++k) p.weight[k][gate] = Vec<T>::load(at[4 * (1 + k) + gate] + i);
        }
        return p;
    }
};

// The statistics of an item's samples, from `split` where a sample is spread over items.
template <class T>
static inline void finish_statistics(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out,
                                     const double* split, double eps, const LnConvLstmShape& s, const LnPlan& plan,
                                     const LnItem& item, T (&stats)[kMostSamples][2][2]) {
    for (int64_t n = 0; n < item.count; ++n) {
        for (int64_t k = 0; k < s.inputs; ++k) {
            Moments all = {0, 0, 0};
            if (plan.chunks == 1) {
                add_moments(all, in.x[k] + (item.first + n) * 4 * plan.cells, 4 * plan.cells);
            } else {
                for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
                    const double* from = split + ((item.first * plan.chunks + chunk) * s.inputs + k) * 3;
                    all.merge(from[0], from[1], from[2]);
                }
            }
            const T mean = (T)all.mean, rstd = (T)inverse_root(all.m2 / all.n + eps);
            stats[n][k][0] = mean;
            stats[n][k][1] = rstd;
            if (item.unit == 0) {
                T* to = out.stats + ((item.first + n) * s.inputs + k) * 2;
                to[0] = mean;
                to[1] = rstd;
            }
        }
    }
}

template <int K, class T>
static inline void forward(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split,
                           double eps, const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    T stats[kMostSamples][2][2] = {};
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        finish_statistics(in, out, split, eps, s, plan, item, stats);
        if (plan.columns) {
            Table<K, T> table;
            for (int64_t block = 0; block < plan.width; block += kBlock) {
                const int64_t count = min_of(kBlock, plan.width - block);
                table.fill(in, plan, s, item.seed, block, count);
                for (int64_t n = 0; n < item.count; ++n) {
                    const Stat<T> stat[2] = {Stat<T>::load(stats[n][0]), Stat<T>::load(stats[n][1])};
                    for (int64_t row = item.unit; row < item.unit_end; ++row) {
                        const int64_t at = (item.first + n) * plan.cells + row * plan.width;
                        const int64_t gates = 4 * at + block, cells = at + block;
                        int64_t e = 0;
                        for (; e + V::width <= count; e += V::width)
                            forward_cells<K, true>(in, out, gates + e, plan.width, cells + e, 0, ahead, stat,
                                                   table.load(e));
                        if (e < count)
                            forward_cells<K, false>(in, out, gates + e, plan.width, cells + e, count - e, ahead, stat,
                                                    table.load(e));
                    }
                }
            }
        } else {
            for (int64_t n = 0; n < item.count; ++n) {
                const Stat<T> stat[2] = {Stat<T>::load(stats[n][0]), Stat<T>::load(stats[n][1])};
                for (int64_t channel = item.unit; channel < item.unit_end; ++channel) {
                    const auto p = broadcast_params<K>(in, s, item.seed, channel);
                    const int64_t gates = (item.first + n) * 4 * plan.cells + channel * s.positions;
                    const int64_t cells = (item.first + n) * plan.cells + channel * s.positions;
                    int64_t e = 0;
                    for (; e + V::width <= s.positions; e += V::width)
                        forward_cells<K, true>(in, out, gates + e, plan.cells, cells + e, 0, ahead, stat, p);
                    if (e < s.positions)
                        forward_cells<K, false>(in, out, gates + e, plan.cells, cells + e, s.positions - e, ahead, stat,
                                                p);
                }
            }
        }
    }
}

// grad_x of n neighbouring gates whose weight is w.
template <bool whole, class T>
static LF_HD void finish_gates(const T* x, const T* grad_a, T* grad_x, int64_t n, const Stat<T>& stat, Vec<T> weight,
                               Vec<T> mean, Vec<T> projection) {
    using V = Vec<T>;
    const V x_hat = ((whole ? V::load(x) : V::load(x, n)) - stat.mean) * stat.rstd;
    const V grad =
        normalised_backward(whole ? V::load(grad_a) : V::load(grad_a, n), x_hat, weight, stat.rstd, mean, projection);
    if (whole)
        grad.store(grad_x);
    else
        grad.store(grad_x, n);
}

// grad_x of an item whose rows hold each gate's channels once: whole rows, as the weights lie beside each other too.
template <int K, class T>
static inline void finish_rows(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const LnPlan& plan,
                               const LnItem& item, const double (&means)[kMostSamples][2][2]) {
    using V = Vec<T>;
    const int64_t width = 4 * plan.width;
    for (int64_t n = 0; n < item.count; ++n) {
        for (int k = 0; k < K; ++k) {
            const int64_t sample = item.first + n;
            const auto stat = Stat<T>::load(grad.stats + (sample * K + k) * 2);
            const V mean = V::broadcast((T)means[n][k][0]), projection = V::broadcast((T)means[n][k][1]);
            const T* weight = in.weight[k] + item.seed * width;
            for (int64_t row = item.unit; row < item.unit_end; ++row) {
                const int64_t at = sample * 4 * plan.cells + row * width;
                const T *x = in.x[k] + at, *grad_a = grad.rec + at;
                T* grad_x = grad.x[k] + at;
                int64_t e = 0;
                for (; e + V::width <= width; e += V::width) {
                    __builtin_prefetch(grad_x + e + kAhead / sizeof(T), 1);
                    finish_gates<true>(x + e, grad_a + e, grad_x + e, 0, stat, V::load(weight + e), mean, projection);
                }
                if (e < width)
                    finish_gates<false>(x + e, grad_a + e, grad_x + e, width - e, stat, V::load(weight + e, width - e),
                                        mean, projection);
            }
        }
    }
}

// grad_x of an item; `means` of w grad_a and of w grad_a x_hat for each of its samples and inputs.
template <int K, class T>
static inline void finish_item(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,
                               const LnConvLstmShape& s, const LnPlan& plan, const LnItem& item,
                               const double (&means)[kMostSamples][2][2]) {
    using V = Vec<T>;
    if (plan.columns && plan.inner == 1) return finish_rows<K>(in, grad, plan, item, means);
    Table<K, T> table;
    for (int64_t block = 0; block < (plan.columns ? plan.width : 1); block += kBlock) {
        const int64_t count = min_of(kBlock, plan.width - block);
        if (plan.columns) table.fill(in, plan, s, item.seed, block, count);
        for (int64_t n = 0; n < item.count; ++n) {
            for (int k = 0; k < K; ++k) {
                const int64_t sample = item.first + n;
                const auto stat = Stat<T>::load(grad.stats + (sample * s.inputs + k) * 2);
                const V mean = V::broadcast((T)means[n][k][0]), projection = V::broadcast((T)means[n][k][1]);
                for (int64_t unit = item.unit; unit < item.unit_end; ++unit) {
                    for (int gate = 0; gate < 4; ++gate) {
                        int64_t at = sample * 4 * plan.cells, length = s.positions;
                        V weight = V::broadcast(0);
                        if (plan.columns) {
                            at += (unit * 4 + gate) * plan.width + block;
                            length = count;
                        } else {
                            at += (gate * s.channels + unit) * s.positions;
                            weight = V::broadcast(in.weight[k][(item.seed * 4 + gate) * s.channels + unit]);
                        }
                        const T* row = table.at[4 * (1 + k) + gate];
                        const T *x = in.x[k] + at, *grad_a = grad.rec + at;
                        T* grad_x = grad.x[k] + at;
                        int64_t e = 0;
                        for (; e + V::width <= length; e += V::width) {
                            if (plan.columns) weight = V::load(row + e);
                            __builtin_prefetch(grad_x + e + kAhead / sizeof(T), 1);
                            finish_gates<true>(x + e, grad_a + e, grad_x + e, 0, stat, weight, mean, projection);
                        }
                        if (e < length) {
                            if (plan.columns) weight = V::load(row + e);
                            finish_gates<false>(x + e, grad_a + e, grad_x + e, length - e, stat, weight, mean,
                                                projection);
                        }
                    }
                }
            }
        }
    }
}

// What a tile adds to the sums of w grad_a and of w grad_a x_hat over its sample.
template <int K, class T>
static LF_HD void add_projections(const CellParams<K, T>& p, const Vec<T> (&sums)[1 + K][4], Vec<T> (&to)[2][2]) {
    for (int k = 0; k < K; ++k) {
        for (int gate = 0; gate < 4; ++gate) {
            to[k][0] = to[k][0] + p.weight[k][gate] * sums[0][gate];
            to[k][1] = to[k][1] + p.weight[k][gate] * sums[1 + k][gate];
        }
    }
}

template <int K, class T>
static LF_HD void add_to_totals(Table<K, T>& totals, int64_t e, const Vec<T> (&sums)[1 + K][4]) {
    for (int j = 0; j < 4 * (1 + K); ++j) {
        T* total = totals.at[j] + e;
        (Vec<T>::load(total) + sums[j / 4][j % 4]).store(total);
    }
}

template <int K, class T>
static LF_HD void load_stats(const LnConvLstmGradients<T>& grad, int64_t sample, Stat<T> (&stat)[2]) {
    for (int k = 0; k < K; ++k) stat[k] = Stat<T>::load(grad.stats + (sample * K + k) * 2);
}

template <int K, class T>
static inline void backward_columns(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, T* out,
                                    const LnConvLstmShape& s, const LnPlan& plan, const LnItem& item,
                                    double (&projections)[kMostSamples][2][2]) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    const V zero = V::broadcast(0);
    Table<K, T> table, totals;
    for (int64_t block = 0; block < plan.width; block += kBlock) {
        const int64_t count = min_of(kBlock, plan.width - block);
        table.fill(in, plan, s, item.seed, block, count);
        memset(totals.at, 0, sizeof(totals.at));
        for (int64_t n = 0; n < item.count; ++n) {
            Stat<T> stat[2] = {};
            load_stats<K>(grad, item.first + n, stat);
            for (int64_t tile = item.unit; tile < item.unit_end; tile += kTile) {
                const int64_t tile_end = min_of(tile + kTile, item.unit_end);
                V projection[2][2] = {{zero, zero}, {zero, zero}};
                for (int64_t e = 0; e < count; e += V::width) {
                    const auto p = table.load(e);
                    V sums[1 + K][4];
                    for (int j = 0; j < 4 * (1 + K); ++j) sums[j / 4][j % 4] = zero;
                    for (int64_t row = tile; row < tile_end; ++row) {
                        const int64_t at = (item.first + n) * plan.cells + row * plan.width;
                        const int64_t gates = 4 * at + block + e, cells = at + block + e;
                        if (e + V::width <= count)
                            backward_cells<K, true, false>(in, grad, gates, plan.width, cells, 0, ahead, stat, p, sums,
                                                           projection);
                        else
                            backward_cells<K, false, false>(in, grad, gates, plan.width, cells, count - e, ahead, stat,
                                                            p, sums, projection);
                    }
                    add_to_totals<K>(totals, e, sums);
                    add_projections<K>(p, sums, projection);
                }
                for (int k = 0; k < K; ++k)
                    for (int j = 0; j < 2; ++j) projections[n][k][j] += projection[k][j].sum();
            }
        }
        for (int j = 0; j < 4 * (1 + K); ++j) memcpy(out + j * plan.width + block, totals.at[j], count * sizeof(T));
    }
}

// A sample that is a single row: what is summed in registers goes down the samples of the item instead.
template <int K, class T>
static inline void backward_samples(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, T* out,
                                    const LnConvLstmShape& s, const LnPlan& plan, const LnItem& item,
                                    double (&projections)[kMostSamples][2][2]) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    const V zero = V::broadcast(0);
    Table<K, T> table, totals;
    V projection[kMostSamples][2][2];
    for (int64_t block = 0; block < plan.width; block += kBlock) {
        const int64_t count = min_of(kBlock, plan.width - block);
        table.fill(in, plan, s, item.seed, block, count);
        memset(totals.at, 0, sizeof(totals.at));
        for (int64_t n = 0; n < item.count; ++n)
            for (int j = 0; j < 2 * K; ++j) projection[n][j / 2][j % 2] = zero;
        for (int64_t e = 0; e < count; e += V::width) {
            const auto p = table.load(e);
            for (int64_t tile = 0; tile < item.count; tile += kTile) {
                V sums[1 + K][4];
                for (int j = 0; j < 4 * (1 + K); ++j) sums[j / 4][j % 4] = zero;
                for (int64_t n = tile; n < min_of(tile + kTile, item.count); ++n) {
                    Stat<T> stat[2] = {};
                    load_stats<K>(grad, item.first + n, stat);
                    const int64_t cells = (item.first + n) * plan.cells + block + e;
                    const int64_t gates = cells + (item.first + n) * 3 * plan.cells;
                    if (e + V::width <= count)
                        backward_cells<K, true, true>(in, grad, gates, plan.width, cells, 0, ahead, stat, p, sums,
                                                      projection[n]);
                    else
                        backward_cells<K, false, true>(in, grad, gates, plan.width, cells, count - e, ahead, stat, p,
                                                       sums, projection[n]);
                }
                add_to_totals<K>(totals, e, sums);
            }
        }
        for (int64_t n = 0; n < item.count; ++n)
            for (int j = 0; j < 2 * K; ++j) projections[n][j / 2][j % 2] += projection[n][j / 2][j % 2].sum();
        for (int j = 0; j < 4 * (1 + K); ++j) memcpy(out + j * plan.width + block, totals.at[j], count * sizeof(T));
    }
}

template <int K, class T>
static inline void backward_runs(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, T* out,
                                 const LnConvLstmShape& s, const LnPlan& plan, const LnItem& item,
                                 double (&projections)[kMostSamples][2][2]) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    const V zero = V::broadcast(0);
    for (int64_t channel = item.unit; channel < item.unit_end; ++channel) {
        const auto p = broadcast_params<K>(in, s, item.seed, channel);
        double totals[1 + K][4] = {};
        for (int64_t n = 0; n < item.count; ++n) {
            Stat<T> stat[2] = {};
            load_stats<K>(grad, item.first + n, stat);
            const int64_t gates = (item.first + n) * 4 * plan.cells + channel * s.positions;
            const int64_t cells = (item.first + n) * plan.cells + channel * s.positions;
            for (int64_t e = 0; e < s.positions;) {
                V sums[1 + K][4], projection[2][2] = {{zero, zero}, {zero, zero}};
                for (int j = 0; j < 4 * (1 + K); ++j) sums[j / 4][j % 4] = zero;
                const int64_t tile_end = min_of(e + kRunTile * V::width, s.positions);
                for (; e + V::width <= tile_end; e += V::width)
                    backward_cells<K, true, false>(in, grad, gates + e, plan.cells, cells + e, 0, ahead, stat, p, sums,
                                                   projection);
                if (e < tile_end) {
                    backward_cells<K, false, false>(in, grad, gates + e, plan.cells, cells + e, tile_end - e, ahead,
                                                    stat, p, sums, projection);
                    e = tile_end;
                }
                add_projections<K>(p, sums, projection);
                for (int k = 0; k < K; ++k)
                    for (int j = 0; j < 2; ++j) projections[n][k][j] += projection[k][j].sum();
                for (int j = 0; j < 4 * (1 + K); ++j) totals[j / 4][j % 4] += sums[j / 4][j % 4].sum();
            }
        }
        for (int j = 0; j < 4 * (1 + K); ++j) out[j * plan.width + channel] = (T)totals[j / 4][j % 4];
    }
}

template <int K, class T>
static inline void backward(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,
                            T* workspace, const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        double projections[kMostSamples][2][2] = {};
        T* out = workspace + i * LnPlan::sums(s) * plan.width;
        if (plan.columns && plan.rows == 1)
            backward_samples<K>(in, grad, out, s, plan, item, projections);
        else if (plan.columns)
            backward_columns<K>(in, grad, out, s, plan, item, projections);
        else
            backward_runs<K>(in, grad, out, s, plan, item, projections);
        if (plan.chunks > 1) {
            memcpy(split + i * s.inputs * 2, projections[0], s.inputs * 2 * sizeof(double));
        } else if (K > 0) {
            for (int64_t n = 0; n < item.count; ++n)
                for (int j = 0; j < 4; ++j) projections[n][j / 2][j % 2] /= (double)(4 * plan.cells);
            finish_item<K>(in, grad, s, plan, item, projections);
        }
    }
}

template <int K, class T>
static inline void finish(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const double* split,
                          const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        double means[kMostSamples][2][2] = {};
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
            for (int64_t j = 0; j < s.inputs * 2; ++j)
                means[0][j / 2][j % 2] += split[(item.first * plan.chunks + chunk) * s.inputs * 2 + j];
        for (int j = 0; j < 4; ++j) means[0][j / 2][j % 2] /= (double)(4 * plan.cells);
        finish_item<K>(in, grad, s, plan, item, means);
    }
}

// Final sums of kReduceBlock channels of one gate, in double, in the order of the slots.
template <class T>
static inline void reduce(const T* workspace, const LnConvLstmGradients<T>& grad, const LnConvLstmShape& s,
                          const LnPlan& plan, int64_t begin, int64_t end) {
    const int64_t blocks = ceil_div(s.channels, kReduceBlock), rows = LnPlan::sums(s);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % blocks * kReduceBlock, row = item / blocks % rows, seed = item / blocks / rows;
        const int64_t count = min_of(kReduceBlock, s.channels - first);
        double sums[kReduceBlock] = {};
        for (int64_t slot = 0; slot < plan.slots(); ++slot) {
            const T* from = workspace + ((seed * plan.slots() + slot) * rows + row) * plan.width + first * plan.inner;
            if (plan.inner == 1 && !plan.columns) {
                // Every chunk of channels left its own.
                const int64_t chunk = slot % plan.chunks * plan.chunk;
                for (int64_t c = max_of(0, chunk - first); c < min_of(count, chunk + plan.chunk - first); ++c)
                    sums[c] += from[c];
            } else if (plan.inner == 1) {
                for (int64_t c = 0; c < count; ++c) sums[c] += from[c];
            } else {
                for (int64_t c = 0; c < count; ++c)
                    for (int64_t k = 0; k < plan.inner; ++k) sums[c] += from[c * plan.inner + k];
            }
        }
        T* to = (row < 4 ? grad.bias : grad.weight[row / 4 - 1]) + (seed * 4 + row % 4) * s.channels + first;
        for (int64_t c = 0; c < count; ++c) to[c] = (T)sums[c];
    }
}

#define LF_LN_CONVLSTM_BY_INPUTS(function, ...)  \
    const LnPlan plan(s);                        \
    if (s.inputs == 0) function<0>(__VA_ARGS__); \
    if (s.inputs == 1) function<1>(__VA_ARGS__); \
    if (s.inputs == 2) function<2>(__VA_ARGS__);

#define LF_LN_CONVLSTM_INSTANCES(T, suffix)                                                                           \
    static void statistics_##suffix(const LnConvLstmInputs<T>& in, double* split, const LnConvLstmShape& s,           \
                                    int64_t begin, int64_t end) {                                                     \
        statistics(in, split, s, LnPlan(s), begin, end);                                                              \
    }                                                                                                                 \
    static void forward_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split, \
                                 double eps, const LnConvLstmShape& s, int64_t begin, int64_t end) {                  \
        LF_LN_CONVLSTM_BY_INPUTS(forward, in, out, split, eps, s, plan, begin, end)                                   \
    }                                                                                                                 \
    static void backward_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,   \
                                  T* workspace, const LnConvLstmShape& s, int64_t begin, int64_t end) {               \
        LF_LN_CONVLSTM_BY_INPUTS(backward, in, grad, split, workspace, s, plan, begin, end)                           \
    }                                                                                                                 \
    static void finish_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,                    \
                                const double* split, const LnConvLstmShape& s, int64_t begin, int64_t end) {          \
        LF_LN_CONVLSTM_BY_INPUTS(finish, in, grad, split, s, plan, begin, end)                                        \
    }                                                                                                                 \
    static void reduce_##suffix(const T* workspace, const LnConvLstmGradients<T>& grad, const LnConvLstmShape& s,     \
                                int64_t begin, int64_t end) {                                                         \
        reduce(workspace, grad, s, LnPlan(s), begin, end);                                                            \
    }

LF_LN_CONVLSTM_INSTANCES(float, f32)
LF_LN_CONVLSTM_INSTANCES(double, f64)
#undef LF_LN_CONVLSTM_INSTANCES
#undef LF_LN_CONVLSTM_BY_INPUTS

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t ln_convlstm_items(const LnConvLstmShape& s) { return LnPlan(s).items(s); }

int64_t ln_convlstm_split_items(const LnConvLstmShape& s) {
    const LnPlan plan(s);
    return plan.chunks > 1 && s.inputs > 0 ? plan.items(s) : 0;
}

int64_t ln_convlstm_reduce_items(const LnConvLstmShape& s) {
    return s.seeds * LnPlan::sums(s) * ceil_div(s.channels, kReduceBlock);
}

int64_t ln_convlstm_split_workspace(const LnConvLstmShape& s) { return 3 * s.inputs * ln_convlstm_split_items(s); }

int64_t ln_convlstm_reduce_workspace(const LnConvLstmShape& s) {
    const LnPlan plan(s);
    return plan.items(s) * LnPlan::sums(s) * plan.width;
}

#define LF_LN_CONVLSTM_DISPATCH(T, suffix)                                                                             \
    template <>                                                                                                        \
    void ln_convlstm_statistics<T>(const LnConvLstmInputs<T>& in, double* split, const LnConvLstmShape& s,             \
                                   int64_t begin, int64_t end) {                                                       \
        static const auto kernel = LF_SELECT(statistics_##suffix);                                                     \
        kernel(in, split, s, begin, end);                                                                              \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_forward<T>(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split,   \
                                double eps, const LnConvLstmShape& s, int64_t begin, int64_t end) {                    \
        static const auto kernel = LF_SELECT(forward_##suffix);                                                        \
        kernel(in, out, split, eps, s, begin, end);                                                                    \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_backward<T>(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,     \
                                 T* workspace, const LnConvLstmShape& s, int64_t begin, int64_t end) {                 \
        static const auto kernel = LF_SELECT(backward_##suffix);                                                       \
        kernel(in, grad, split, workspace, s, begin, end);                                                             \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_finish<T>(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const double* split, \
                               const LnConvLstmShape& s, int64_t begin, int64_t end) {                                 \
        static const auto kernel = LF_SELECT(finish_##suffix);                                                         \
        kernel(in, grad, split, s, begin, end);                                                                        \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_reduce<T>(const T* workspace, const LnConvLstmGradients<T>& grad, const LnConvLstmShape& s,       \
                               int64_t begin, int64_t end) {                                                           \
        static const auto kernel = LF_SELECT(reduce_##suffix);                                                         \
        kernel(workspace, grad, s, begin, end);                                                                        \
    }

LF_LN_CONVLSTM_DISPATCH(float, f32)
LF_LN_CONVLSTM_DISPATCH(double, f64)
#undef LF_LN_CONVLSTM_DISPATCH

}  // namespace ladderfast::cpu
#endif

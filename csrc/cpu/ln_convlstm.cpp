// CPU kernels of the op `ln_convlstm`; contract in ../ln_convlstm.h.
//
// Floor, for each cell in float32 with one input: forward reads 9 numbers and writes 2, backward reads 11 and writes 9.
// The statistics of a sample need the whole sample, and so do the two means in the gradient of a normalised input: an
// item takes whole samples where there are enough of them, so that what is read again comes from a cache.
//
// Two ways through a sample:
//
//   columns  channels-last, dense, or fewer than 16 positions where only the inputs are normalised, by sample: a row is
//            `width` cells, each gate of which is contiguous. A vector covers neighbouring cells, each with its own
//            parameters.
//   runs     a vector runs along the positions of a channel, whose parameters are broadcast.
//
// Statistics by channel are made before, and the gradient of an input is finished when the sums over the batch, which
// are the gradients of bias and weight, are there. A normalised cell has passes of its own: h holds s(o) in between,
// and in backward the gradient of the normalised cell lies where that of c will be.
//
// Work items and the partial sums they leave depend on the shape alone.
#undef LF_THIS_FILE
#define LF_THIS_FILE "ln_convlstm.cpp"

#ifndef LADDERFAST_CPU_LN_CONVLSTM_PLAN
#define LADDERFAST_CPU_LN_CONVLSTM_PLAN

#include "../ln_convlstm.h"
#include "isa.h"
#include "plan.h"

namespace ladderfast::cpu {

static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

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
// Where what backward reads and writes is larger, caches would not hold grad_x until somebody reads it: it then goes
// straight to memory, which spares reading each line before it is written.
static const int64_t kCached = int64_t(32) << 20;  // bytes

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
        columns = s.channels_last || s.positions == 1 || (s.positions < kLongRun && !s.batch && !s.cell);
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

    // For elements of item_size bytes; vectors begin at multiples of their size if grad_x, its beginning, does.
    bool past_caches(const LnConvLstmShape& s, int64_t item_size, const void* grad_x) const {
        const int64_t stretch = columns ? (inner == 1 ? 4 * width : width) : s.positions;
        return (8 * s.inputs + 12) * s.seeds * s.samples * cells * item_size > kCached && stretch % 16 == 0 &&
               (uintptr_t)grad_x % 64 == 0;
    }

    int64_t items(const LnConvLstmShape& s) const { return s.seeds * groups * chunks; }
    int64_t slots() const { return groups * chunks; }  // of partial sums, for each seed
    // Rows of the sums of an item: of bias and each weight, then of the cell's.
    static int64_t sums(const LnConvLstmShape& s) { return 4 * (1 + s.inputs) + 2 * s.cell; }
    // Doubles that passes over the cell leave for each other, before what the others leave.
    int64_t cell_split(const LnConvLstmShape& s) const { return s.cell ? 3 * s.seeds * s.samples * chunks : 0; }
};

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "moments.h"
#include "../math/ln_convlstm.h"

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
static inline void split_statistics(const LnConvLstmInputs<T>& in, double* split, const LnConvLstmShape& s,
                                    const LnPlan& plan, int64_t begin, int64_t end) {
    split += plan.cell_split(s);
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

// Of kReduceBlock of the 4C channels of one input and seed, over samples and positions.
template <class T>
static inline void batch_statistics(const LnConvLstmInputs<T>& in, T* stats, double eps, const LnConvLstmShape& s,
                                    const LnPlan& plan, int64_t begin, int64_t end) {
    const int64_t gates = 4 * s.channels, blocks = ceil_div(gates, kReduceBlock);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % blocks * kReduceBlock, k = item / blocks % s.inputs,
                      seed = item / blocks / s.inputs;
        const int64_t count = min_of(kReduceBlock, gates - first);
        const T* x = in.x[k] + seed * s.samples * 4 * plan.cells;
        Moments all[kReduceBlock] = {};
        if (plan.columns) {
            add_column_moments<kReduceBlock>(all, x + first, gates, s.samples * s.positions, count);
        } else {
            for (int64_t c = 0; c < count; ++c)
                for (int64_t n = 0; n < s.samples; ++n)
                    add_moments(all[c], x + (n * gates + first + c) * s.positions, s.positions);
        }
        T* to = stats + (seed * s.inputs + k) * 3 * gates + first;
        for (int64_t c = 0; c < count; ++c) {
            const double variance = all[c].n > 0 ? all[c].m2 / all[c].n : 0;
            to[c] = (T)all[c].mean;
            to[gates + c] = (T)inverse_root(variance + eps);
            to[2 * gates + c] = (T)variance;
        }
    }
}

template <class T>
static inline void statistics(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, double* split, double eps,
                              const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    if (s.batch)
        batch_statistics(in, out.stats, eps, s, plan, begin, end);
    else
        split_statistics(in, split, s, plan, begin, end);
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

// How the inputs are normalised; `kind` where it matters.
enum Kind { kBySample, kByChannel };

// Parameters of a vector of cells; mean and rstd where they are the channel's.
template <int K, Kind kind, class T>
struct CellParams {
    static constexpr int own = kind == kByChannel ? K : 1;
    Vec<T> weight[K > 0 ? K : 1][4], bias[4], mean[own][4], rstd[own][4];
};

// Of a sample, for the gradient of its normalised cell: its statistics, and the means of w grad_n and of w grad_n
// c_hat.
template <class T>
struct CellStat {
    Stat<T> stat;
    Vec<T> mean, projection;
};

// The four gates of n cells at `at`, gates `stride` apart; n is ignored where `whole`.
template <int K, Kind kind, bool whole, class T>
static LF_HD void load_gates(const T* const (&x)[2], const T* rec, int64_t at, int64_t stride, int64_t n,
                             const Stat<T> (&stat)[2], const CellParams<K, kind, T>& p,
                             Vec<T> (&x_hat)[K > 0 ? K : 1][4], Vec<T> (&a)[4]) {
    using V = Vec<T>;
    for (int gate = 0; gate < 4; ++gate) {
        const int64_t i = at + gate * stride;
        V sum = (whole ? V::load(rec + i) : V::load(rec + i, n)) + p.bias[gate];
        for (int k = 0; k < K; ++k) {
            const V value = whole ? V::load(x[k] + i) : V::load(x[k] + i, n);
            if constexpr (kind == kByChannel)
                x_hat[k][gate] = (value - p.mean[k][gate]) * p.rstd[k][gate];
            else
                x_hat[k][gate] = (value - stat[k].mean) * stat[k].rstd;
            sum = sum + x_hat[k][gate] * p.weight[k][gate];
        }
        if (K == 0) sum = sum + (whole ? V::load(x[0] + i) : V::load(x[0] + i, n));
        a[gate] = sum;
    }
}

template <int K, Kind kind, bool cell, bool whole, class T>
static LF_HD void forward_cells(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, int64_t gates,
                                int64_t stride, int64_t cells, int64_t n, const Ahead& ahead, const Stat<T> (&stat)[2],
                                const CellParams<K, kind, T>& p) {
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
    load_gates<K, kind, whole>(in.x, in.rec, gates, stride, n, stat, p, x_hat, a);
    const V c = whole ? V::load(in.c + cells) : V::load(in.c + cells, n);
    if (cell)
        normalised_cell_forward(a, c, c_new, h);
    else
        lstm_forward(a, c, c_new, h);
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
template <int K, Kind kind, bool cell, bool whole, bool project, class T>
static LF_HD void backward_cells(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, int64_t gates,
                                 int64_t stride, int64_t cells, int64_t n, const Ahead& ahead, const Stat<T> (&stat)[2],
                                 const CellStat<T>& of_cell, const CellParams<K, kind, T>& p, Vec<T> (&sums)[1 + K][4],
                                 Vec<T> (&projection)[2][2]) {
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
    load_gates<K, kind, whole>(in.x, in.rec, gates, stride, n, stat, p, x_hat, a);
    const V grad_c_new = whole ? V::load(grad.c_new + cells) : V::load(grad.c_new + cells, n);
    const V c = whole ? V::load(in.c + cells) : V::load(in.c + cells, n);
    if constexpr (cell) {
        // What cell_backward has left: w grad_n, and the gradient of the output gate.
        const T* o = grad.rec + gates + 3 * stride;
        const V c_hat = ((whole ? V::load(grad.after + cells) : V::load(grad.after + cells, n)) - of_cell.stat.mean) *
                        of_cell.stat.rstd;
        V total =
            grad_c_new + normalised_backward(whole ? V::load(grad.c + cells) : V::load(grad.c + cells, n), c_hat,
                                             V::broadcast(1), of_cell.stat.rstd, of_cell.mean, of_cell.projection);
        if (!whole) {  // nothing of cells that are not there
            total.store(grad.c + cells, n);
            total = V::load(grad.c + cells, n);
        }
        grad_a[3] = whole ? V::load(o) : V::load(o, n);
        normalised_cell_backward(total, a, c, grad_a, grad_c);
    } else {
        lstm_backward(whole ? V::load(grad.h + cells) : V::load(grad.h + cells, n), grad_c_new, a, c, grad_a, grad_c);
    }
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

template <int K, Kind kind, class T>
static LF_HD CellParams<K, kind, T> broadcast_params(const LnConvLstmInputs<T>& in, const T* stats,
                                                     const LnConvLstmShape& s, int64_t seed, int64_t channel) {
    CellParams<K, kind, T> p = {};
    for (int gate = 0; gate < 4; ++gate) {
        const int64_t i = (seed * 4 + gate) * s.channels + channel;
        p.bias[gate] = Vec<T>::broadcast(in.bias[i]);
        for (int k = 0; k < K; ++k) {
            p.weight[k][gate] = Vec<T>::broadcast(in.weight[k][i]);
            if constexpr (kind == kByChannel) {
                const T* of = stats + (seed * K + k) * 12 * s.channels + gate * s.channels + channel;
                p.mean[k][gate] = Vec<T>::broadcast(of[0]);
                p.rstd[k][gate] = Vec<T>::broadcast(of[4 * s.channels]);
            }
        }
    }
    return p;
}

// The parameters of a block of cells, rows padded to whole vectors: bias, each weight and, where they are the
// channel's, mean and rstd of each input; four gates each. Also the sums for bias and each weight.
template <int K, Kind kind, class T>
struct Table {
    static constexpr int rows = 4 * (1 + (kind == kByChannel ? 3 : 1) * K);
    alignas(64) T at[rows][kBlock];

    void fill(const LnConvLstmInputs<T>& in, const T* stats, const LnPlan& plan, const LnConvLstmShape& s, int64_t seed,
              int64_t first, int64_t count) {
        for (int j = 0; j < rows; ++j) {
            const T* from = nullptr;
            if (j < 4 * (1 + K)) {
                from = (j < 4 ? in.bias : in.weight[j / 4 - 1]) + (seed * 4 + j % 4) * s.channels;
            } else {
                const int row = j / 4 - 1 - K;  // mean and rstd of the first input, then of the second
                from = stats + ((seed * K + row / 2) * 12 + row % 2 * 4 + j % 4) * s.channels;
            }
            if (plan.inner == 1) {
                memcpy(at[j], from + first, count * sizeof(T));
            } else {
                for (int64_t i = 0; i < count; ++i) at[j][i] = from[(first + i) / plan.inner];
            }
            for (int64_t i = count; i % Vec<T>::width != 0; ++i) at[j][i] = 0;
        }
    }

    LF_HD CellParams<K, kind, T> load(int64_t i) const {
        CellParams<K, kind, T> p;
        for (int gate = 0; gate < 4; ++gate) {
            p.bias[gate] = Vec<T>::load(at[gate] + i);
            for (int k = 0; k < K; ++k) {
                p.weight[k][gate] = Vec<T>::load(at[4 * (1 + k) + gate] + i);
                if constexpr (kind == kByChannel) {
                    p.mean[k][gate] = Vec<T>::load(at[4 * (1 + K + 2 * k) + gate] + i);
                    p.rstd[k][gate] = Vec<T>::load(at[4 * (2 + K + 2 * k) + gate] + i);
                }
            }
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
                    const double* from =
                        split + plan.cell_split(s) + ((item.first * plan.chunks + chunk) * s.inputs + k) * 3;
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

template <int K, Kind kind, bool cell, class T>
static inline void forward(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split,
                           double eps, const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    T stats[kMostSamples][2][2] = {};
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        if (kind == kBySample) finish_statistics(in, out, split, eps, s, plan, item, stats);
        if (plan.columns) {
            Table<K, kind, T> table;
            for (int64_t block = 0; block < plan.width; block += kBlock) {
                const int64_t count = min_of(kBlock, plan.width - block);
                table.fill(in, out.stats, plan, s, item.seed, block, count);
                for (int64_t n = 0; n < item.count; ++n) {
                    const Stat<T> stat[2] = {Stat<T>::load(stats[n][0]), Stat<T>::load(stats[n][1])};
                    for (int64_t row = item.unit; row < item.unit_end; ++row) {
                        const int64_t at = (item.first + n) * plan.cells + row * plan.width;
                        const int64_t gates = 4 * at + block, cells = at + block;
                        int64_t e = 0;
                        for (; e + V::width <= count; e += V::width)
                            forward_cells<K, kind, cell, true>(in, out, gates + e, plan.width, cells + e, 0, ahead,
                                                               stat, table.load(e));
                        if (e < count)
                            forward_cells<K, kind, cell, false>(in, out, gates + e, plan.width, cells + e, count - e,
                                                                ahead, stat, table.load(e));
                    }
                }
            }
        } else {
            for (int64_t n = 0; n < item.count; ++n) {
                const Stat<T> stat[2] = {Stat<T>::load(stats[n][0]), Stat<T>::load(stats[n][1])};
                for (int64_t channel = item.unit; channel < item.unit_end; ++channel) {
                    const auto p = broadcast_params<K, kind>(in, out.stats, s, item.seed, channel);
                    const int64_t gates = (item.first + n) * 4 * plan.cells + channel * s.positions;
                    const int64_t cells = (item.first + n) * plan.cells + channel * s.positions;
                    int64_t e = 0;
                    for (; e + V::width <= s.positions; e += V::width)
                        forward_cells<K, kind, cell, true>(in, out, gates + e, plan.cells, cells + e, 0, ahead, stat,
                                                           p);
                    if (e < s.positions)
                        forward_cells<K, kind, cell, false>(in, out, gates + e, plan.cells, cells + e, s.positions - e,
                                                            ahead, stat, p);
                }
            }
        }
    }
}

// grad_x of n neighbouring gates whose weight is w; n is ignored where `whole`, and past_caches where it is not.
template <bool whole, class T>
static LF_HD void finish_gates(const T* x, const T* grad_a, T* grad_x, int64_t n, bool past_caches, const Stat<T>& stat,
                               Vec<T> weight, Vec<T> mean, Vec<T> projection) {
    using V = Vec<T>;
    const V x_hat = ((whole ? V::load(x) : V::load(x, n)) - stat.mean) * stat.rstd;
    const V grad =
        normalised_backward(whole ? V::load(grad_a) : V::load(grad_a, n), x_hat, weight, stat.rstd, mean, projection);
    if (!whole)
        grad.store(grad_x, n);
    else if (past_caches)
        grad.stream(grad_x);
    else
        grad.store(grad_x);
}

// grad_x of an item whose rows hold each gate's channels once: whole rows, as the weights lie beside each other too.
template <int K, class T>
static inline void finish_rows(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const LnPlan& plan,
                               const LnItem& item, const double (&means)[kMostSamples][2][2], bool past_caches) {
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
                    if (!past_caches) __builtin_prefetch(grad_x + e + kAhead / sizeof(T), 1);
                    finish_gates<true>(x + e, grad_a + e, grad_x + e, 0, past_caches, stat, V::load(weight + e), mean,
                                       projection);
                }
                if (e < width)
                    finish_gates<false>(x + e, grad_a + e, grad_x + e, width - e, false, stat,
                                        V::load(weight + e, width - e), mean, projection);
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
    bool past_caches = true;
    for (int k = 0; k < K; ++k) past_caches = past_caches && plan.past_caches(s, sizeof(T), grad.x[k]);
    if (plan.columns && plan.inner == 1) {
        finish_rows<K>(in, grad, plan, item, means, past_caches);
        if (past_caches) order_streams();
        return;
    }
    Table<K, kBySample, T> table;
    for (int64_t block = 0; block < (plan.columns ? plan.width : 1); block += kBlock) {
        const int64_t count = min_of(kBlock, plan.width - block);
        if (plan.columns) table.fill(in, grad.stats, plan, s, item.seed, block, count);
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
                            if (!past_caches) __builtin_prefetch(grad_x + e + kAhead / sizeof(T), 1);
                            finish_gates<true>(x + e, grad_a + e, grad_x + e, 0, past_caches, stat, weight, mean,
                                               projection);
                        }
                        if (e < length) {
                            if (plan.columns) weight = V::load(row + e);
                            finish_gates<false>(x + e, grad_a + e, grad_x + e, length - e, false, stat, weight, mean,
                                                projection);
                        }
                    }
                }
            }
        }
    }
    if (past_caches) order_streams();
}

// What a tile adds to the sums of w grad_a and of w grad_a x_hat over its sample.
template <int K, class T>
static LF_HD void add_projections(const CellParams<K, kBySample, T>& p, const Vec<T> (&sums)[1 + K][4],
                                  Vec<T> (&to)[2][2]) {
    for (int k = 0; k < K; ++k) {
        for (int gate = 0; gate < 4; ++gate) {
            to[k][0] = to[k][0] + p.weight[k][gate] * sums[0][gate];
            to[k][1] = to[k][1] + p.weight[k][gate] * sums[1 + k][gate];
        }
    }
}

template <int K, class T>
static LF_HD void add_to_totals(Table<K, kBySample, T>& totals, int64_t e, const Vec<T> (&sums)[1 + K][4]) {
    for (int j = 0; j < 4 * (1 + K); ++j) {
        T* total = totals.at[j] + e;
        (Vec<T>::load(total) + sums[j / 4][j % 4]).store(total);
    }
}

template <int K, class T>
static LF_HD void load_stats(const LnConvLstmGradients<T>& grad, int64_t sample, Stat<T> (&stat)[2]) {
    for (int k = 0; k < K; ++k) stat[k] = Stat<T>::load(grad.stats + (sample * K + k) * 2);
}

// The sums that cell_backward has left for a sample, made means.
template <bool cell, class T>
static LF_HD CellStat<T> load_cell_stat(const LnConvLstmGradients<T>& grad, const double* split, const LnPlan& plan,
                                        int64_t sample) {
    CellStat<T> of_cell = {};
    if (!cell) return of_cell;
    double sums[2] = {0, 0};
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
        for (int j = 0; j < 2; ++j) sums[j] += split[(sample * plan.chunks + chunk) * 3 + j];
    of_cell.stat = Stat<T>::load(grad.cell_stats + sample * 2);
    of_cell.mean = Vec<T>::broadcast((T)(sums[0] / (double)plan.cells));
    of_cell.projection = Vec<T>::broadcast((T)(sums[1] / (double)plan.cells));
    return of_cell;
}

template <int K, Kind kind, bool cell, class T>
static inline void backward_columns(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,
                                    const double* split, T* out, const LnConvLstmShape& s, const LnPlan& plan,
                                    const LnItem& item, double (&projections)[kMostSamples][2][2]) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    const V zero = V::broadcast(0);
    Table<K, kind, T> table;
    Table<K, kBySample, T> totals;
    for (int64_t block = 0; block < plan.width; block += kBlock) {
        const int64_t count = min_of(kBlock, plan.width - block);
        table.fill(in, grad.stats, plan, s, item.seed, block, count);
        memset(totals.at, 0, sizeof(totals.at));
        for (int64_t n = 0; n < item.count; ++n) {
            Stat<T> stat[2] = {};
            if (kind == kBySample) load_stats<K>(grad, item.first + n, stat);
            const auto of_cell = load_cell_stat<cell>(grad, split, plan, item.first + n);
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
                            backward_cells<K, kind, cell, true, false>(in, grad, gates, plan.width, cells, 0, ahead,
                                                                       stat, of_cell, p, sums, projection);
                        else
                            backward_cells<K, kind, cell, false, false>(in, grad, gates, plan.width, cells, count - e,
                                                                        ahead, stat, of_cell, p, sums, projection);
                    }
                    add_to_totals<K>(totals, e, sums);
                    if constexpr (kind == kBySample) add_projections<K>(p, sums, projection);
                }
                for (int k = 0; k < K; ++k)
                    for (int j = 0; j < 2; ++j) projections[n][k][j] += projection[k][j].sum();
            }
        }
        for (int j = 0; j < 4 * (1 + K); ++j) memcpy(out + j * plan.width + block, totals.at[j], count * sizeof(T));
    }
}

// A sample that is a single row: what is summed in registers goes down the samples of the item instead.
template <int K, Kind kind, bool cell, class T>
static inline void backward_samples(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,
                                    const double* split, T* out, const LnConvLstmShape& s, const LnPlan& plan,
                                    const LnItem& item, double (&projections)[kMostSamples][2][2]) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    const V zero = V::broadcast(0);
    Table<K, kind, T> table;
    Table<K, kBySample, T> totals;
    V projection[kMostSamples][2][2];
    for (int64_t block = 0; block < plan.width; block += kBlock) {
        const int64_t count = min_of(kBlock, plan.width - block);
        table.fill(in, grad.stats, plan, s, item.seed, block, count);
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
                    if (kind == kBySample) load_stats<K>(grad, item.first + n, stat);
                    const auto of_cell = load_cell_stat<cell>(grad, split, plan, item.first + n);
                    const int64_t cells = (item.first + n) * plan.cells + block + e;
                    const int64_t gates = cells + (item.first + n) * 3 * plan.cells;
                    if (e + V::width <= count)
                        backward_cells<K, kind, cell, true, kind == kBySample>(
                            in, grad, gates, plan.width, cells, 0, ahead, stat, of_cell, p, sums, projection[n]);
                    else
                        backward_cells<K, kind, cell, false, kind == kBySample>(in, grad, gates, plan.width, cells,
                                                                                count - e, ahead, stat, of_cell, p,
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

template <int K, Kind kind, bool cell, class T>
static inline void backward_runs(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const double* split,
                                 T* out, const LnConvLstmShape& s, const LnPlan& plan, const LnItem& item,
                                 double (&projections)[kMostSamples][2][2]) {
    using V = Vec<T>;
    const Ahead ahead(plan, sizeof(T));
    const V zero = V::broadcast(0);
    for (int64_t channel = item.unit; channel < item.unit_end; ++channel) {
        const auto p = broadcast_params<K, kind>(in, grad.stats, s, item.seed, channel);
        double totals[1 + K][4] = {};
        for (int64_t n = 0; n < item.count; ++n) {
            Stat<T> stat[2] = {};
            if (kind == kBySample) load_stats<K>(grad, item.first + n, stat);
            const auto of_cell = load_cell_stat<cell>(grad, split, plan, item.first + n);
            const int64_t gates = (item.first + n) * 4 * plan.cells + channel * s.positions;
            const int64_t cells = (item.first + n) * plan.cells + channel * s.positions;
            for (int64_t e = 0; e < s.positions;) {
                V sums[1 + K][4], projection[2][2] = {{zero, zero}, {zero, zero}};
                for (int j = 0; j < 4 * (1 + K); ++j) sums[j / 4][j % 4] = zero;
                const int64_t tile_end = min_of(e + kRunTile * V::width, s.positions);
                for (; e + V::width <= tile_end; e += V::width)
                    backward_cells<K, kind, cell, true, false>(in, grad, gates + e, plan.cells, cells + e, 0, ahead,
                                                               stat, of_cell, p, sums, projection);
                if (e < tile_end) {
                    backward_cells<K, kind, cell, false, false>(in, grad, gates + e, plan.cells, cells + e,
                                                                tile_end - e, ahead, stat, of_cell, p, sums,
                                                                projection);
                    e = tile_end;
                }
                if constexpr (kind == kBySample) add_projections<K>(p, sums, projection);
                for (int k = 0; k < K; ++k)
                    for (int j = 0; j < 2; ++j) projections[n][k][j] += projection[k][j].sum();
                for (int j = 0; j < 4 * (1 + K); ++j) totals[j / 4][j % 4] += sums[j / 4][j % 4].sum();
            }
        }
        for (int j = 0; j < 4 * (1 + K); ++j) out[j * plan.width + channel] = (T)totals[j / 4][j % 4];
    }
}

template <int K, Kind kind, bool cell, class T>
static inline void backward(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,
                            T* workspace, const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        double projections[kMostSamples][2][2] = {};
        T* out = workspace + i * LnPlan::sums(s) * plan.width;
        if (plan.columns && plan.rows == 1)
            backward_samples<K, kind, cell>(in, grad, split, out, s, plan, item, projections);
        else if (plan.columns)
            backward_columns<K, kind, cell>(in, grad, split, out, s, plan, item, projections);
        else
            backward_runs<K, kind, cell>(in, grad, split, out, s, plan, item, projections);
        if (kind == kByChannel) continue;
        if (plan.chunks > 1) {
            memcpy(split + plan.cell_split(s) + i * s.inputs * 2, projections[0], s.inputs * 2 * sizeof(double));
        } else if (K > 0) {
            for (int64_t n = 0; n < item.count; ++n)
                for (int j = 0; j < 4; ++j) projections[n][j / 2][j % 2] /= (double)(4 * plan.cells);
            finish_item<K>(in, grad, s, plan, item, projections);
        }
    }
}

// The same by channel: the sums over samples and positions are the gradients of bias and weight.
template <int K, class T>
static inline void finish_batch(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,
                                const LnConvLstmShape& s, const LnPlan& plan, const LnItem& item) {
    using V = Vec<T>;
    const int64_t gates = 4 * s.channels, of_seed = item.seed * gates;
    const V share = V::broadcast((T)(1.0 / (double)(s.samples * s.positions)));
    for (int k = 0; k < K; ++k) {
        const bool past_caches = plan.past_caches(s, sizeof(T), grad.x[k]);
        const T *weight = in.weight[k] + of_seed, *stats = grad.stats + (item.seed * K + k) * 3 * gates;
        const T *sum = grad.bias + of_seed, *sum_x = grad.weight[k] + of_seed;
        for (int64_t n = item.first; n < item.first + item.count; ++n) {
            if (plan.columns) {
                for (int64_t row = item.unit; row < item.unit_end; ++row) {
                    const int64_t at = n * 4 * plan.cells + row * gates;
                    const T *x = in.x[k] + at, *grad_a = grad.rec + at;
                    T* grad_x = grad.x[k] + at;
                    int64_t e = 0;
                    for (; e + V::width <= gates; e += V::width) {
                        const V w = V::load(weight + e), scale = w * share;
                        finish_gates<true>(x + e, grad_a + e, grad_x + e, 0, past_caches,
                                           {V::load(stats + e), V::load(stats + gates + e)}, w,
                                           scale * V::load(sum + e), scale * V::load(sum_x + e));
                    }
                    if (e < gates) {
                        const int64_t rest = gates - e;
                        const V w = V::load(weight + e, rest), scale = w * share;
                        finish_gates<false>(x + e, grad_a + e, grad_x + e, rest, false,
                                            {V::load(stats + e, rest), V::load(stats + gates + e, rest)}, w,
                                            scale * V::load(sum + e, rest), scale * V::load(sum_x + e, rest));
                    }
                }
            } else {
                for (int64_t unit = item.unit; unit < item.unit_end; ++unit) {
                    for (int64_t channel = unit; channel < gates; channel += s.channels) {
                        const int64_t at = (n * gates + channel) * s.positions;
                        const T *x = in.x[k] + at, *grad_a = grad.rec + at;
                        T* grad_x = grad.x[k] + at;
                        const V w = V::broadcast(weight[channel]), scale = w * share;
                        const Stat<T> stat = {V::broadcast(stats[channel]), V::broadcast(stats[gates + channel])};
                        const V mean = scale * V::broadcast(sum[channel]);
                        const V projection = scale * V::broadcast(sum_x[channel]);
                        int64_t e = 0;
                        for (; e + V::width <= s.positions; e += V::width)
                            finish_gates<true>(x + e, grad_a + e, grad_x + e, 0, past_caches, stat, w, mean,
                                               projection);
                        if (e < s.positions)
                            finish_gates<false>(x + e, grad_a + e, grad_x + e, s.positions - e, false, stat, w, mean,
                                                projection);
                    }
                }
            }
        }
        if (past_caches) order_streams();
    }
}

template <int K, Kind kind, bool cell, class T>
static inline void finish(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const double* split,
                          const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    split += plan.cell_split(s);
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        if (kind == kByChannel) {
            finish_batch<K>(in, grad, s, plan, item);
            continue;
        }
        double means[kMostSamples][2][2] = {};
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
            for (int64_t j = 0; j < s.inputs * 2; ++j)
                means[0][j / 2][j % 2] += split[(item.first * plan.chunks + chunk) * s.inputs * 2 + j];
        for (int j = 0; j < 4; ++j) means[0][j / 2][j % 2] /= (double)(4 * plan.cells);
        finish_item<K>(in, grad, s, plan, item, means);
    }
}

// Where the cells of unit `unit` of a sample begin, and how many they are: a row, or a channel's positions.
static inline int64_t unit_size(const LnPlan& plan, const LnConvLstmShape& s) {
    return plan.columns ? plan.width : s.positions;
}

template <class T>
static inline void cell_statistics(const LnConvLstmOutputs<T>& out, double* split, const LnConvLstmShape& s,
                                   const LnPlan& plan, int64_t begin, int64_t end) {
    const int64_t size = unit_size(plan, s);
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        for (int64_t n = item.first; n < item.first + item.count; ++n) {
            Moments all = {0, 0, 0};
            add_moments(all, out.c_new + n * plan.cells + item.unit * size, (item.unit_end - item.unit) * size);
            double* to = split + (n * plan.chunks + i % plan.chunks) * 3;
            to[0] = all.n;
            to[1] = all.mean;
            to[2] = all.m2;
        }
    }
}

template <bool whole, class T>
static LF_HD void cell_output(const T* c, T* h, int64_t n, const Stat<T>& stat, Vec<T> weight, Vec<T> bias) {
    using V = Vec<T>;
    const V c_hat = ((whole ? V::load(c) : V::load(c, n)) - stat.mean) * stat.rstd;
    const V out = normalised_cell_output(whole ? V::load(h) : V::load(h, n), c_hat, weight, bias);
    if (whole)
        out.store(h);
    else
        out.store(h, n);
}

template <class T>
static inline void cell_forward(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split,
                                double eps, const LnConvLstmShape& s, const LnPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const int64_t size = unit_size(plan, s);
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        const T *weight = in.cell_weight + item.seed * s.channels, *bias = in.cell_bias + item.seed * s.channels;
        for (int64_t n = item.first; n < item.first + item.count; ++n) {
            Moments all = {0, 0, 0};
            for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
                const double* from = split + (n * plan.chunks + chunk) * 3;
                all.merge(from[0], from[1], from[2]);
            }
            const T stats[2] = {(T)all.mean, (T)inverse_root(all.m2 / all.n + eps)};
            if (item.unit == 0) memcpy(out.cell_stats + n * 2, stats, sizeof(stats));
            const auto stat = Stat<T>::load(stats);
            for (int64_t unit = item.unit; unit < item.unit_end; ++unit) {
                const T* c = out.c_new + n * plan.cells + unit * size;
                T* h = out.h + n * plan.cells + unit * size;
                V w = V::broadcast(weight[plan.columns ? 0 : unit]), b = V::broadcast(bias[plan.columns ? 0 : unit]);
                int64_t e = 0;
                for (; e + V::width <= size; e += V::width) {
                    if (plan.columns) w = V::load(weight + e), b = V::load(bias + e);
                    cell_output<true>(c + e, h + e, 0, stat, w, b);
                }
                if (e < size) {
                    if (plan.columns) w = V::load(weight + e, size - e), b = V::load(bias + e, size - e);
                    cell_output<false>(c + e, h + e, size - e, stat, w, b);
                }
            }
        }
    }
}

// The part of load_gates that makes the output gate, without parameters of its own for each vector.
template <int K, Kind kind, class T>
struct OutputGate {
    const T *x[K > 0 ? K : 1], *rec, *weight[K > 0 ? K : 1], *bias, *stats;
    int64_t channels;

    OutputGate(const LnConvLstmInputs<T>& in, const T* stats, const LnConvLstmShape& s, int64_t seed)
        : rec(in.rec), bias(in.bias + (seed * 4 + 3) * s.channels), stats(stats), channels(s.channels) {
        for (int k = 0; k < K; ++k) weight[k] = in.weight[k] + (seed * 4 + 3) * s.channels;
        for (int k = 0; k < (K > 0 ? K : 1); ++k) x[k] = in.x[k];
        if (kind == kByChannel) this->stats += (seed * 12 * K + 3) * s.channels;
    }

    // n values from `from` on, or one of them for all where a vector stays in a channel.
    template <bool columns, bool whole>
    static LF_HD Vec<T> of_channels(const T* from, int64_t n) {
        using V = Vec<T>;
        if constexpr (!columns) return V::broadcast(from[0]);
        if constexpr (whole) return V::load(from);
        return V::load(from, n);
    }

    template <bool columns, bool whole>
    LF_HD Vec<T> load(int64_t at, int64_t channel, int64_t n, const Stat<T> (&stat)[2]) const {
        using V = Vec<T>;
        V sum = (whole ? V::load(rec + at) : V::load(rec + at, n)) + of_channels<columns, whole>(bias + channel, n);
        for (int k = 0; k < (K > 0 ? K : 1); ++k) {
            V value = whole ? V::load(x[k] + at) : V::load(x[k] + at, n);
            if constexpr (K > 0 && kind == kByChannel) {
                const T* of = stats + k * 12 * channels + channel;
                value =
                    (value - of_channels<columns, whole>(of, n)) * of_channels<columns, whole>(of + 4 * channels, n);
            } else if constexpr (K > 0) {
                value = (value - stat[k].mean) * stat[k].rstd;
            }
            sum = sum + (K > 0 ? value * of_channels<columns, whole>(weight[k] + channel, n) : value);
        }
        return sum;
    }
};

// Of a vector of cells, the first step of backward: leaves w grad_n where the gradient of c will be and the gradient of
// the output gate; returns grad_n and grad_n c_hat, and adds their products with w to `projection`.
template <int K, Kind kind, bool columns, bool whole, class T>
static LF_HD void cell_gradient(const OutputGate<K, kind, T>& gate, const LnConvLstmInputs<T>& in,
                                const LnConvLstmGradients<T>& grad, int64_t at, int64_t cells, int64_t parameter,
                                int64_t channel, int64_t n, const Stat<T> (&stat)[2], const Stat<T>& of_cell,
                                Vec<T> (&sums)[2], Vec<T> (&projection)[2]) {
    using V = Vec<T>;
    using Gate = OutputGate<K, kind, T>;
    const V weight = Gate::template of_channels<columns, whole>(in.cell_weight + parameter, n);
    const V bias = Gate::template of_channels<columns, whole>(in.cell_bias + parameter, n);
    const V c_hat =
        ((whole ? V::load(grad.after + cells) : V::load(grad.after + cells, n)) - of_cell.mean) * of_cell.rstd;
    V grad_o, grad_n;
    normalised_cell_output_backward(whole ? V::load(grad.h + cells) : V::load(grad.h + cells, n),
                                    gate.template load<columns, whole>(at, channel, n, stat), c_hat, weight, bias,
                                    grad_o, grad_n);
    const V weighted = weight * grad_n;
    if (whole) {
        grad_o.store(grad.rec + at);
        weighted.store(grad.c + cells);
    } else {
        grad_o.store(grad.rec + at, n);
        weighted.store(grad.c + cells, n);
    }
    sums[0] = sums[0] + grad_n * c_hat;
    sums[1] = sums[1] + grad_n;
    projection[0] = projection[0] + weighted;
    projection[1] = projection[1] + weighted * c_hat;
}

template <int K, Kind kind, bool cell, class T>
static inline void cell_backward(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,
                                 T* workspace, const LnConvLstmShape& s, const LnPlan& plan, int64_t begin,
                                 int64_t end) {
    using V = Vec<T>;
    const V zero = V::broadcast(0);
    const int64_t size = unit_size(plan, s);
    for (int64_t i = begin; i < end; ++i) {
        const LnItem item(plan, s, i);
        const OutputGate<K, kind, T> gate(in, grad.stats, s, item.seed);
        T* total_x = workspace + (i * LnPlan::sums(s) + 4 * (1 + K)) * plan.width;
        T* total = total_x + plan.width;
        memset(total_x, 0, 2 * plan.width * sizeof(T));
        for (int64_t n = item.first; n < item.first + item.count; ++n) {
            const auto of_cell = Stat<T>::load(grad.cell_stats + n * 2);
            Stat<T> stat[2] = {};
            if (kind == kBySample) load_stats<K>(grad, n, stat);
            double projections[2] = {0, 0};
            for (int64_t unit = item.unit; unit < item.unit_end; ++unit) {
                const int64_t cells = n * plan.cells + unit * size;
                V projection[2] = {zero, zero};
                int64_t e = 0;
                if (plan.columns) {
                    const int64_t at = 4 * cells + 3 * plan.width, first = item.seed * s.channels;
                    for (; e < size; e += V::width) {
                        V sums[2] = {zero, zero};
                        if (e + V::width <= size) {
                            cell_gradient<K, kind, true, true>(gate, in, grad, at + e, cells + e, first + e, e, 0, stat,
                                                               of_cell, sums, projection);
                            (V::load(total_x + e) + sums[0]).store(total_x + e);
                            (V::load(total + e) + sums[1]).store(total + e);
                        } else {
                            const int64_t rest = size - e;
                            cell_gradient<K, kind, true, false>(gate, in, grad, at + e, cells + e, first + e, e, rest,
                                                                stat, of_cell, sums, projection);
                            (V::load(total_x + e, rest) + sums[0]).store(total_x + e, rest);
                            (V::load(total + e, rest) + sums[1]).store(total + e, rest);
                        }
                    }
                } else {
                    const int64_t at = (n * 4 + 3) * plan.cells + unit * size, first = item.seed * s.channels + unit;
                    while (e < size) {
                        const int64_t tile_end = min_of(e + kRunTile * V::width, size);
                        V sums[2] = {zero, zero};
                        for (; e + V::width <= tile_end; e += V::width)
                            cell_gradient<K, kind, false, true>(gate, in, grad, at + e, cells + e, first, unit, 0, stat,
                                                                of_cell, sums, projection);
                        if (e < tile_end)
                            cell_gradient<K, kind, false, false>(gate, in, grad, at + e, cells + e, first, unit,
                                                                 tile_end - e, stat, of_cell, sums, projection);
                        e = tile_end;
                        total_x[unit] += sums[0].sum();
                        total[unit] += sums[1].sum();
                    }
                }
                for (int j = 0; j < 2; ++j) projections[j] += projection[j].sum();
            }
            memcpy(split + (n * plan.chunks + i % plan.chunks) * 3, projections, sizeof(projections));
        }
    }
}

// Final sums of kReduceBlock channels of one gate, or of the cell, in double, in the order of the slots.
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
        const int64_t gate_rows = 4 * (1 + s.inputs);
        T* to = row >= gate_rows ? (row == gate_rows ? grad.cell_weight : grad.cell_bias) + seed * s.channels
                                 : (row < 4 ? grad.bias : grad.weight[row / 4 - 1]) + (seed * 4 + row % 4) * s.channels;
        to += first;
        for (int64_t c = 0; c < count; ++c) to[c] = (T)sums[c];
    }
}

#define LF_LN_CONVLSTM_BY_KIND(function, cell, ...)                           \
    if (s.inputs == 0) function<0, kBySample, cell>(__VA_ARGS__);             \
    if (s.inputs == 1 && !s.batch) function<1, kBySample, cell>(__VA_ARGS__); \
    if (s.inputs == 2 && !s.batch) function<2, kBySample, cell>(__VA_ARGS__); \
    if (s.inputs == 1 && s.batch) function<1, kByChannel, cell>(__VA_ARGS__); \
    if (s.inputs == 2 && s.batch) function<2, kByChannel, cell>(__VA_ARGS__);

#define LF_LN_CONVLSTM_BY_CELL(function, ...)                \
    const LnPlan plan(s);                                    \
    if (s.cell) {                                            \
        LF_LN_CONVLSTM_BY_KIND(function, true, __VA_ARGS__)  \
    } else {                                                 \
        LF_LN_CONVLSTM_BY_KIND(function, false, __VA_ARGS__) \
    }

#define LF_LN_CONVLSTM_INSTANCES(T, suffix)                                                                           \
    static void statistics_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, double* split,    \
                                    double eps, const LnConvLstmShape& s, int64_t begin, int64_t end) {               \
        statistics(in, out, split, eps, s, LnPlan(s), begin, end);                                                    \
    }                                                                                                                 \
    static void forward_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split, \
                                 double eps, const LnConvLstmShape& s, int64_t begin, int64_t end) {                  \
        LF_LN_CONVLSTM_BY_CELL(forward, in, out, split, eps, s, plan, begin, end)                                     \
    }                                                                                                                 \
    static void cell_statistics_##suffix(const LnConvLstmOutputs<T>& out, double* split, const LnConvLstmShape& s,    \
                                         int64_t begin, int64_t end) {                                                \
        cell_statistics(out, split, s, LnPlan(s), begin, end);                                                        \
    }                                                                                                                 \
    static void cell_forward_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out,                 \
                                      const double* split, double eps, const LnConvLstmShape& s, int64_t begin,       \
                                      int64_t end) {                                                                  \
        cell_forward(in, out, split, eps, s, LnPlan(s), begin, end);                                                  \
    }                                                                                                                 \
    static void cell_backward_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,             \
                                       double* split, T* workspace, const LnConvLstmShape& s, int64_t begin,          \
                                       int64_t end) {                                                                 \
        const LnPlan plan(s);                                                                                         \
        LF_LN_CONVLSTM_BY_KIND(cell_backward, true, in, grad, split, workspace, s, plan, begin, end)                  \
    }                                                                                                                 \
    static void backward_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,   \
                                  T* workspace, const LnConvLstmShape& s, int64_t begin, int64_t end) {               \
        LF_LN_CONVLSTM_BY_CELL(backward, in, grad, split, workspace, s, plan, begin, end)                             \
    }                                                                                                                 \
    static void reduce_##suffix(const T* workspace, const LnConvLstmGradients<T>& grad, const LnConvLstmShape& s,     \
                                int64_t begin, int64_t end) {                                                         \
        reduce(workspace, grad, s, LnPlan(s), begin, end);                                                            \
    }                                                                                                                 \
    static void finish_##suffix(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,                    \
                                const double* split, const LnConvLstmShape& s, int64_t begin, int64_t end) {          \
        const LnPlan plan(s);                                                                                         \
        LF_LN_CONVLSTM_BY_KIND(finish, false, in, grad, split, s, plan, begin, end)                                   \
    }

LF_LN_CONVLSTM_INSTANCES(float, f32)
LF_LN_CONVLSTM_INSTANCES(double, f64)
#undef LF_LN_CONVLSTM_INSTANCES
#undef LF_LN_CONVLSTM_BY_CELL
#undef LF_LN_CONVLSTM_BY_KIND

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t ln_convlstm_items(const LnConvLstmShape& s) { return LnPlan(s).items(s); }

int64_t ln_convlstm_cell_items(const LnConvLstmShape& s) { return s.cell ? LnPlan(s).items(s) : 0; }

int64_t ln_convlstm_statistics_items(const LnConvLstmShape& s) {
    const LnPlan plan(s);
    if (s.batch) return s.seeds * s.inputs * ceil_div(4 * s.channels, kReduceBlock);
    return plan.chunks > 1 && s.inputs > 0 ? plan.items(s) : 0;
}

int64_t ln_convlstm_finish_items(const LnConvLstmShape& s) {
    const LnPlan plan(s);
    return (plan.chunks > 1 || s.batch) && s.inputs > 0 ? plan.items(s) : 0;
}

int64_t ln_convlstm_reduce_items(const LnConvLstmShape& s) {
    return s.seeds * LnPlan::sums(s) * ceil_div(s.channels, kReduceBlock);
}

int64_t ln_convlstm_split_workspace(const LnConvLstmShape& s) {
    const LnPlan plan(s);
    return plan.cell_split(s) + (plan.chunks > 1 ? 3 * s.inputs * plan.items(s) : 0);
}

int64_t ln_convlstm_reduce_workspace(const LnConvLstmShape& s) {
    const LnPlan plan(s);
    return plan.items(s) * LnPlan::sums(s) * plan.width;
}

#define LF_LN_CONVLSTM_DISPATCH(T, suffix)                                                                             \
    template <>                                                                                                        \
    void ln_convlstm_statistics<T>(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, double* split,      \
                                   double eps, const LnConvLstmShape& s, int64_t begin, int64_t end) {                 \
        static const auto kernel = LF_SELECT(statistics_##suffix);                                                     \
        kernel(in, out, split, eps, s, begin, end);                                                                    \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_forward<T>(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split,   \
                                double eps, const LnConvLstmShape& s, int64_t begin, int64_t end) {                    \
        static const auto kernel = LF_SELECT(forward_##suffix);                                                        \
        kernel(in, out, split, eps, s, begin, end);                                                                    \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_cell_statistics<T>(const LnConvLstmOutputs<T>& out, double* split, const LnConvLstmShape& s,      \
                                        int64_t begin, int64_t end) {                                                  \
        static const auto kernel = LF_SELECT(cell_statistics_##suffix);                                                \
        kernel(out, split, s, begin, end);                                                                             \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_cell_forward<T>(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out,                   \
                                     const double* split, double eps, const LnConvLstmShape& s, int64_t begin,         \
                                     int64_t end) {                                                                    \
        static const auto kernel = LF_SELECT(cell_forward_##suffix);                                                   \
        kernel(in, out, split, eps, s, begin, end);                                                                    \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_cell_backward<T>(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad,               \
                                      double* split, T* workspace, const LnConvLstmShape& s, int64_t begin,            \
                                      int64_t end) {                                                                   \
        static const auto kernel = LF_SELECT(cell_backward_##suffix);                                                  \
        kernel(in, grad, split, workspace, s, begin, end);                                                             \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_backward<T>(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,     \
                                 T* workspace, const LnConvLstmShape& s, int64_t begin, int64_t end) {                 \
        static const auto kernel = LF_SELECT(backward_##suffix);                                                       \
        kernel(in, grad, split, workspace, s, begin, end);                                                             \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_reduce<T>(const T* workspace, const LnConvLstmGradients<T>& grad, const LnConvLstmShape& s,       \
                               int64_t begin, int64_t end) {                                                           \
        static const auto kernel = LF_SELECT(reduce_##suffix);                                                         \
        kernel(workspace, grad, s, begin, end);                                                                        \
    }                                                                                                                  \
    template <>                                                                                                        \
    void ln_convlstm_finish<T>(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const double* split, \
                               const LnConvLstmShape& s, int64_t begin, int64_t end) {                                 \
        static const auto kernel = LF_SELECT(finish_##suffix);                                                         \
        kernel(in, grad, split, s, begin, end);                                                                        \
    }

LF_LN_CONVLSTM_DISPATCH(float, f32)
LF_LN_CONVLSTM_DISPATCH(double, f64)
#undef LF_LN_CONVLSTM_DISPATCH

}  // namespace ladderfast::cpu
#endif

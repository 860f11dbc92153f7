// CPU kernels of the op `ladder_decoder`; contract in ../ladder_decoder.h.
//
// Floor, in elements moved: forward reads u, then u, z and clean_z, and writes z_hat; backward reads grad_z_hat, u, z
// and clean_z and writes three gradients, then reads u and grad_u and writes grad_u. How the layout is cut into work
// items is written in plan.h.
#undef LF_THIS_FILE
#define LF_THIS_FILE "ladder_decoder.cpp"

#ifndef LADDERFAST_CPU_LADDER_DECODER
#define LADDERFAST_CPU_LADDER_DECODER

#include "../ladder_decoder.h"
#include "isa.h"
#include "plan.h"

namespace ladderfast::cpu {

static const int64_t kBlock = 256;     // columns of one item: their 18 values and 12 sums fit the first-level cache
static const int64_t kTable = 18;      // values of a column: the combinator's, then DecoderColumn
static const int64_t kSums = 12;       // sums of a column: for ten parameters, and two for mean and var
static const int64_t kTile = 16;       // rows, or vectors of a run, that are summed in registers
static const int64_t kTiles = 32;      // tiles of runs that are summed in vectors before their sum is taken in double
static const int64_t kCostRows = 4;    // rows whose squared errors are summed in a vector
static const int64_t kCostRun = 1024;  // elements of runs likewise
static const int64_t kAhead = 128;     // bytes to prefetch ahead in the rows of a tile
static const int64_t kForwardAhead = 2048, kBackwardAhead = 1024;  // in runs

static inline PartsPlan plan_of(const LadderDecoderShape& s) {
    return PartsPlan(s.seeds, s.rows, s.channels, s.inner, 1, &s.rows, kBlock);
}

// Names as in the contract.
template <class S>
struct DecoderForward {
    using T = Wide<S>;
    const S *u, *z;
    const T* params;
    const S* clean_z;
    const T *mean, *var, *u_mean, *u_var;
    S* z_hat;
    T* squares;  // of each item
    T eps;
};

template <class S>
struct DecoderBackward {
    using T = Wide<S>;
    const S* grad_z_hat;
    const T* grad_cost;
    const S *u, *z;
    const T* params;
    const S* clean_z;
    const T *mean, *var, *u_mean, *u_var;
    T* reaching;
    S *grad_u, *grad_z, *grad_clean_z;
    T* partial;      // (seeds, slots, kSums, columns)
    const T* means;  // (seeds, 2, channels): of what reaches the normalised u, and of that times the normalised u
    T eps;
};

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "columns.h"
#include "combinator_table.h"
#include "moments.h"
#include "../math/ladder_decoder.h"

static LF_HD float square_root(float x) { return __builtin_sqrtf(x); }
static LF_HD double square_root(double x) { return __builtin_sqrt(x); }

template <bool whole, class S>
static LF_HD Vec<Wide<S>> take(const S* p, int64_t n) {
    return whole ? Vec<Wide<S>>::load(p) : Vec<Wide<S>>::load(p, n);
}

template <bool whole, class S>
static LF_HD void put(Vec<Wide<S>> x, S* p, int64_t n) {
    if (whole)
        x.store(p);
    else
        x.store(p, n);
}

// x in the first n lanes, 0 in the others, whatever they hold.
template <bool whole, class T>
static LF_HD Vec<T> kept(Vec<T> x, int64_t n) {
    if (whole) return x;
    alignas(64) T buffer[Vec<T>::width];
    x.store(buffer);
    return Vec<T>::load(buffer, n);
}

template <class T>
static inline void fill_rstd(T* row, const T* var, T eps, const PartsPlan& plan, int64_t first, int64_t count) {
    fill_row(row, var, plan, first, count);
    for (int64_t i = 0; i < count; ++i) row[i] = 1 / square_root(row[i] + eps);
}

// The kTable values of an item's columns. Args is DecoderForward or DecoderBackward.
template <class T, class Args>
static inline void fill_table(T* table, const Args& d, const PartsPlan& plan, const PartsItem& item) {
    const int64_t first = item.first, count = item.count, at = item.seed * plan.channels;
    for (int j = 0; j < 10; ++j)
        fill_row(table + j * kBlock, d.params + 10 * at + j * plan.channels, plan, first, count);
    fill_arguments(table, kBlock, count);
    table += kCombinatorRows * kBlock;
    fill_row(table, d.u_mean + at, plan, first, count);
    fill_rstd(table + kBlock, d.u_var + at, d.eps, plan, first, count);
    if (d.mean != nullptr) {
        fill_row(table + 2 * kBlock, d.mean + at, plan, first, count);
        fill_rstd(table + 3 * kBlock, d.var + at, d.eps, plan, first, count);
    } else {
        for (int64_t i = 0; i < kBlock; ++i) table[2 * kBlock + i] = 0, table[3 * kBlock + i] = 1;
    }
}

template <class T>
static LF_HD DecoderColumn<Vec<T>> load_decoder(const T* table, int64_t column) {
    const T* at = table + kCombinatorRows * kBlock + column;
    return {Vec<T>::load(at), Vec<T>::load(at + kBlock), Vec<T>::load(at + 2 * kBlock), Vec<T>::load(at + 3 * kBlock)};
}

// What normalises u; for z_hat what leaves it as it is.
template <class T, class Args>
static LF_HD DecoderColumn<Vec<T>> broadcast_normal(const Args& d, int64_t at) {
    using V = Vec<T>;
    return {V::broadcast(d.u_mean[at]), V::broadcast(1 / square_root(d.u_var[at] + d.eps)), V::broadcast(0),
            V::broadcast(1)};
}

template <class T, class Args>
static LF_HD DecoderColumn<Vec<T>> broadcast_decoder(const Args& d, int64_t at) {
    DecoderColumn<Vec<T>> q = broadcast_normal<T>(d, at);
    if (d.mean != nullptr) {
        q.mean = Vec<T>::broadcast(d.mean[at]);
        q.rstd = Vec<T>::broadcast(1 / square_root(d.var[at] + d.eps));
    }
    return q;
}

template <bool squash, bool cost, bool whole, class S, class T = Wide<S>>
static LF_HD void forward_vector(const DecoderForward<S>& d, int64_t at, int64_t n, const Combinator<Vec<T>>& p,
                                 const DecoderColumn<Vec<T>>& q, Vec<T>& squares) {
    using V = Vec<T>;
    const V normal = kept<whole>(decoder_normal(take<whole>(d.u + at, n), q), n);
    const V z_hat = combinator_forward<squash>(take<whole>(d.z + at, n), normal, p);
    put<whole>(z_hat, d.z_hat + at, n);
    if (cost) {
        const V error = kept<whole>(decoder_error(z_hat, take<whole>(d.clean_z + at, n), q), n);
        squares = squares + error * error;
    }
}

template <bool squash, bool cost, class S, class T = Wide<S>>
static inline void forward_columns(const DecoderForward<S>& args, const PartsPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const DecoderForward<S> d = args;
    alignas(64) T table[kTable * kBlock];
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        fill_table(table, d, plan, item);
        double total = 0;
        for (int64_t r = item.row; r < item.row_end;) {
            V squares = V::broadcast(0);
            for (const int64_t stop = min_of(r + kCostRows, item.row_end); r < stop; ++r) {
                const int64_t at = item.offset + item.at(plan, r), count = item.columns_of(plan, r);
                int64_t c = 0;
                for (; c + V::width <= count; c += V::width) {
                    // The next row: a block is too short a stretch for the hardware to run ahead by itself.
                    const int64_t next = at + c + plan.width;
                    __builtin_prefetch(d.u + next);
                    __builtin_prefetch(d.z + next);
                    if (cost) __builtin_prefetch(d.clean_z + next);
                    __builtin_prefetch(d.z_hat + next, 1);
                    forward_vector<squash, cost, true>(d, at + c, 0, load_columns(table, kBlock, c),
                                                       load_decoder(table, c), squares);
                }
                if (c < count)
                    forward_vector<squash, cost, false>(d, at + c, count - c, load_columns(table, kBlock, c),
                                                        load_decoder(table, c), squares);
            }
            if (cost) total += squares.sum();
        }
        if (cost) d.squares[i] = (T)total;
    }
}

template <bool squash, bool cost, class S, class T = Wide<S>>
static inline void forward_runs(const DecoderForward<S>& args, const PartsPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const DecoderForward<S> d = args;
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        const auto p = broadcast_channel(d.params + item.seed * 10 * plan.channels, plan.channels, item.channel);
        const auto q = broadcast_decoder<T>(d, item.seed * plan.channels + item.channel);
        double total = 0;
        V squares = V::broadcast(0);
        int64_t pending = 0;
        for (int64_t r = item.row; r < item.row_end; ++r) {
            const int64_t at = item.offset + item.at(plan, r);
            for (int64_t c = 0; c < item.count;) {
                const int64_t stop = min_of(c + kCostRun, item.count);
                pending += stop - c;
                for (; c + V::width <= stop; c += V::width) {
                    const int64_t ahead = at + c + kForwardAhead / (int64_t)sizeof(S);
                    __builtin_prefetch(d.u + ahead);
                    __builtin_prefetch(d.z + ahead);
                    if (cost) __builtin_prefetch(d.clean_z + ahead);
                    forward_vector<squash, cost, true>(d, at + c, 0, p, q, squares);
                }
                if (c < stop) forward_vector<squash, cost, false>(d, at + c, stop - c, p, q, squares);
                c = stop;
                if (cost && pending >= kCostRun) {
                    total += squares.sum();
                    squares = V::broadcast(0);
                    pending = 0;
                }
            }
        }
        if (cost) d.squares[i] = (T)(total + squares.sum());
    }
}

// `cost`: 0 without one, 1 with one, 2 if mean and var have gradients as well.
template <bool squash, int cost, bool whole, class S, class T = Wide<S>>
static LF_HD void backward_vector(const DecoderBackward<S>& d, int64_t at, int64_t n, Vec<T> scale,
                                  const Combinator<Vec<T>>& p, const DecoderColumn<Vec<T>>& q, Vec<T> (&sums)[10],
                                  Vec<T> (&cost_sums)[2]) {
    using V = Vec<T>;
    const V normal = kept<whole>(decoder_normal(take<whole>(d.u + at, n), q), n);
    const V z = take<whole>(d.z + at, n);
    V grad = d.grad_z_hat != nullptr ? take<whole>(d.grad_z_hat + at, n) : V::broadcast(0);
    if (cost > 0) {
        const V z_hat = combinator_forward<squash>(z, normal, p), clean_z = take<whole>(d.clean_z + at, n);
        V grad_clean_z;
        grad = grad + decoder_cost_backward(z_hat, clean_z, kept<whole>(scale, n), q, grad_clean_z, cost_sums[0],
                                            cost_sums[1]);
        if (d.grad_clean_z != nullptr) put<whole>(grad_clean_z, d.grad_clean_z + at, n);
    }
    V grad_z, grad_normal;
    combinator_backward<squash>(grad, z, normal, p, grad_z, grad_normal, sums);
    if (d.grad_z != nullptr) put<whole>(grad_z, d.grad_z + at, n);
    put<whole>(grad_normal, d.reaching + at, n);
}

template <class S, class T = Wide<S>>
static LF_HD void prefetch_backward(const DecoderBackward<S>& d, int64_t at, bool cost) {
    __builtin_prefetch(d.u + at);
    __builtin_prefetch(d.z + at);
    if (d.grad_z_hat != nullptr) __builtin_prefetch(d.grad_z_hat + at);
    if (cost) __builtin_prefetch(d.clean_z + at);
    __builtin_prefetch(d.reaching + at, 1);
    if (d.grad_z != nullptr) __builtin_prefetch(d.grad_z + at, 1);
    if (d.grad_clean_z != nullptr) __builtin_prefetch(d.grad_clean_z + at, 1);
}

// 2 grad_cost / elements.
template <class S, class T = Wide<S>>
static LF_HD Vec<T> cost_scale(const DecoderBackward<S>& d, const PartsPlan& plan, int64_t seed) {
    return Vec<T>::broadcast(d.grad_cost != nullptr ? (T)(2.0 * d.grad_cost[seed] / plan.per_seed) : 0);
}

template <bool squash, int cost, class S, class T = Wide<S>>
static inline void backward_columns(const DecoderBackward<S>& args, const PartsPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const DecoderBackward<S> d = args;
    const int64_t used = cost == 2 ? kSums : 10;
    alignas(64) T table[kTable * kBlock];
    alignas(64) T sums_table[kSums * kBlock];
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        fill_table(table, d, plan, item);
        memset(sums_table, 0, used * kBlock * sizeof(T));
        const V scale = cost_scale(d, plan, item.seed);
        for (int64_t tile = item.row; tile < item.row_end; tile += kTile) {
            const int64_t tile_end = min_of(tile + kTile, item.row_end);
            for (int64_t c = 0; c < item.count; c += V::width) {
                const auto p = load_columns(table, kBlock, c);
                const auto q = load_decoder(table, c);
                V sums[10], cost_sums[2];
                for (int j = 0; j < 10; ++j) sums[j] = V::broadcast(0);
                cost_sums[0] = cost_sums[1] = V::broadcast(0);
                for (int64_t r = tile; r < tile_end; ++r) {
                    const int64_t at = item.offset + item.at(plan, r) + c;
                    const int64_t n = item.columns_of(plan, r) - c;
                    if (n >= V::width) {
                        // A tile is more streams than the hardware follows by itself.
                        prefetch_backward(d, at + kAhead / (int64_t)sizeof(S), cost > 0);
                        backward_vector<squash, cost, true>(d, at, 0, scale, p, q, sums, cost_sums);
                    } else if (n > 0) {
                        backward_vector<squash, cost, false>(d, at, n, scale, p, q, sums, cost_sums);
                    }
                }
                T* total = sums_table + c;
                for (int j = 0; j < 10; ++j, total += kBlock) (V::load(total) + sums[j]).store(total);
                if (cost == 2)
                    for (int j = 0; j < 2; ++j, total += kBlock) (V::load(total) + cost_sums[j]).store(total);
            }
        }
        T* out = d.partial + item.slot * kSums * plan.width + item.first;
        for (int j = 0; j < used; ++j) memcpy(out + j * plan.width, sums_table + j * kBlock, item.count * sizeof(T));
    }
}

template <bool squash, int cost, class S, class T = Wide<S>>
static inline void backward_runs(const DecoderBackward<S>& args, const PartsPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const DecoderBackward<S> d = args;
    const int used = cost == 2 ? kSums : 10;
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        const auto p = broadcast_channel(d.params + item.seed * 10 * plan.channels, plan.channels, item.channel);
        const auto q = broadcast_decoder<T>(d, item.seed * plan.channels + item.channel);
        const V scale = cost_scale(d, plan, item.seed);
        double total[kSums] = {};
        V pending[kSums];
        for (int j = 0; j < kSums; ++j) pending[j] = V::broadcast(0);
        int64_t tiles = 0;
        for (int64_t r = item.row; r < item.row_end; ++r) {
            const int64_t at = item.offset + item.at(plan, r);
            for (int64_t c = 0; c < item.count;) {
                V sums[10], cost_sums[2];
                for (int j = 0; j < 10; ++j) sums[j] = V::broadcast(0);
                cost_sums[0] = cost_sums[1] = V::broadcast(0);
                const int64_t stop = min_of(c + kTile * V::width, item.count);
                for (; c + V::width <= stop; c += V::width) {
                    const int64_t ahead = at + c + kBackwardAhead / (int64_t)sizeof(S);
                    prefetch_backward(d, ahead, cost > 0);
                    backward_vector<squash, cost, true>(d, at + c, 0, scale, p, q, sums, cost_sums);
                }
                if (c < stop) backward_vector<squash, cost, false>(d, at + c, stop - c, scale, p, q, sums, cost_sums);
                c = stop;
                for (int j = 0; j < 10; ++j) pending[j] = pending[j] + sums[j];
                if (cost == 2)
                    for (int j = 0; j < 2; ++j) pending[10 + j] = pending[10 + j] + cost_sums[j];
                if (++tiles == kTiles) {
                    for (int j = 0; j < used; ++j) {
                        total[j] += pending[j].sum();
                        pending[j] = V::broadcast(0);
                    }
                    tiles = 0;
                }
            }
        }
        T* out = d.partial + item.slot * kSums * plan.channels + item.channel;
        for (int j = 0; j < used; ++j) out[j * plan.channels] = (T)(total[j] + pending[j].sum());
    }
}

// Final sums of kChannelBlock channels.
template <class S, class T = Wide<S>>
static inline void reduce(const DecoderBackward<S>& d, T* means, T* grad_params, T* grad_mean, T* grad_var,
                          const PartsPlan& plan, int64_t begin, int64_t end) {
    const int64_t wanted = grad_mean != nullptr ? kSums : 10;
    const double inverse_n = plan.per_seed > 0 ? (double)plan.channels / plan.per_seed : 0;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t seed = i / plan.channel_blocks(), first = i % plan.channel_blocks() * kChannelBlock;
        const int64_t count = min_of(kChannelBlock, plan.channels - first);
        alignas(64) double sums[kSums][kChannelBlock];
        sum_slots(sums, d.partial + seed * plan.slots() * kSums * plan.slot_width(), kSums, wanted, plan, first, count);
        for (int64_t c = 0; c < count; ++c) {
            const int64_t channel = first + c, at = seed * plan.channels + channel;
            double channel_sums[10], at_mean, slope;
            for (int j = 0; j < 10; ++j) channel_sums[j] = sums[j][c];
            const int64_t from = seed * 10 * plan.channels;
            const auto p = load_channel(d.params + from, plan.channels, channel);
            decoder_finish_normal(channel_sums, p.a, inverse_n, at_mean, slope);
            finish_channel(channel_sums, p, grad_params + from, plan.channels, channel);
            means[at + seed * plan.channels] = (T)at_mean;
            means[at + (seed + 1) * plan.channels] = (T)slope;
            if (grad_mean != nullptr) {
                double for_mean, for_var;
                decoder_finish_cost(sums[10][c], sums[11][c], 1 / square_root((double)d.var[at] + d.eps), for_mean,
                                    for_var);
                grad_mean[at] = (T)for_mean;
                grad_var[at] = (T)for_var;
            }
        }
    }
}

template <bool whole, class S, class T = Wide<S>>
static LF_HD void apply_vector(const DecoderBackward<S>& d, int64_t at, int64_t n, Vec<T> at_mean, Vec<T> slope,
                               const DecoderColumn<Vec<T>>& q) {
    const Vec<T> g = take<whole>(d.reaching + at, n), u = take<whole>(d.u + at, n);
    put<whole>(decoder_grad_u(g, u, at_mean, slope, q), d.grad_u + at, n);
}

template <class S, class T = Wide<S>>
static inline void apply_columns(const DecoderBackward<S>& args, const PartsPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const DecoderBackward<S> d = args;
    alignas(64) T table[4 * kBlock];
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        const int64_t channel = item.seed * plan.channels;
        fill_row(table, d.u_mean + channel, plan, item.first, item.count);
        // A single element is its own mean, whatever the rounding of at_mean: nothing reaches u.
        if (plan.per_seed == plan.channels)
            memset(table + kBlock, 0, kBlock * sizeof(T));
        else
            fill_rstd(table + kBlock, d.u_var + channel, d.eps, plan, item.first, item.count);
        fill_row(table + 2 * kBlock, d.means + 2 * channel, plan, item.first, item.count);
        fill_row(table + 3 * kBlock, d.means + 2 * channel + plan.channels, plan, item.first, item.count);
        for (int64_t r = item.row; r < item.row_end; ++r) {
            const int64_t at = item.offset + item.at(plan, r), count = item.columns_of(plan, r);
            for (int64_t c = 0; c < count; c += V::width) {
                const V zero = V::broadcast(0), at_mean = V::load(table + 2 * kBlock + c);
                const V slope = V::load(table + 3 * kBlock + c);
                const DecoderColumn<V> q{V::load(table + c), V::load(table + kBlock + c), zero, zero};
                if (c + V::width <= count) {
                    __builtin_prefetch(d.u + at + c + plan.width);
                    __builtin_prefetch(d.reaching + at + c + plan.width, 1);
                    apply_vector<true>(d, at + c, 0, at_mean, slope, q);
                } else {
                    apply_vector<false>(d, at + c, count - c, at_mean, slope, q);
                }
            }
        }
    }
}

template <class S, class T = Wide<S>>
static inline void apply_runs(const DecoderBackward<S>& args, const PartsPlan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const DecoderBackward<S> d = args;
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        const T* means = d.means + item.seed * 2 * plan.channels + item.channel;
        const V at_mean = V::broadcast(means[0]), slope = V::broadcast(means[plan.channels]);
        const auto q = broadcast_normal<T>(d, item.seed * plan.channels + item.channel);
        for (int64_t r = item.row; r < item.row_end; ++r) {
            const int64_t at = item.offset + item.at(plan, r);
            int64_t c = 0;
            for (; c + V::width <= item.count; c += V::width) {
                __builtin_prefetch(d.u + at + c + kForwardAhead / (int64_t)sizeof(S));
                __builtin_prefetch(d.reaching + at + c + kForwardAhead / (int64_t)sizeof(S), 1);
                apply_vector<true>(d, at + c, 0, at_mean, slope, q);
            }
            if (c < item.count) apply_vector<false>(d, at + c, item.count - c, at_mean, slope, q);
        }
    }
}

template <class S, class T = Wide<S>>
static void statistics(const S* u, T* workspace, const PartsPlan& plan, int64_t begin, int64_t end) {
    partial_moments(u, workspace, plan, begin, end);
}

template <class S, class T = Wide<S>>
static void moments(const S* u, const T* workspace, T* u_mean, T* u_var, const PartsPlan& plan, int64_t begin,
                    int64_t end) {
    merge_moments(u, workspace, u_mean, u_var, plan, begin, end);
}

template <bool squash, bool cost, class S, class T = Wide<S>>
static inline void forward_of(const DecoderForward<S>& d, const PartsPlan& plan, int64_t begin, int64_t end) {
    if (plan.columns)
        forward_columns<squash, cost>(d, plan, begin, end);
    else
        forward_runs<squash, cost>(d, plan, begin, end);
}

template <class S, class T = Wide<S>>
static void forward(const DecoderForward<S>& d, bool squash, const PartsPlan& plan, int64_t begin, int64_t end) {
    const bool cost = d.clean_z != nullptr;
    if (squash && cost) forward_of<true, true>(d, plan, begin, end);
    if (squash && !cost) forward_of<true, false>(d, plan, begin, end);
    if (!squash && cost) forward_of<false, true>(d, plan, begin, end);
    if (!squash && !cost) forward_of<false, false>(d, plan, begin, end);
}

template <bool squash, int cost, class S, class T = Wide<S>>
static inline void backward_of(const DecoderBackward<S>& d, const PartsPlan& plan, int64_t begin, int64_t end) {
    if (plan.columns)
        backward_columns<squash, cost>(d, plan, begin, end);
    else
        backward_runs<squash, cost>(d, plan, begin, end);
}

template <class S, class T = Wide<S>>
static void backward(const DecoderBackward<S>& d, bool squash, bool statistics, const PartsPlan& plan, int64_t begin,
                     int64_t end) {
    const int cost = d.grad_cost == nullptr ? 0 : statistics ? 2 : 1;
    if (squash && cost == 0) backward_of<true, 0>(d, plan, begin, end);
    if (squash && cost == 1) backward_of<true, 1>(d, plan, begin, end);
    if (squash && cost == 2) backward_of<true, 2>(d, plan, begin, end);
    if (!squash && cost == 0) backward_of<false, 0>(d, plan, begin, end);
    if (!squash && cost == 1) backward_of<false, 1>(d, plan, begin, end);
    if (!squash && cost == 2) backward_of<false, 2>(d, plan, begin, end);
}

template <class S, class T = Wide<S>>
static void backward_apply(const DecoderBackward<S>& d, const PartsPlan& plan, int64_t begin, int64_t end) {
    if (plan.columns)
        apply_columns(d, plan, begin, end);
    else
        apply_runs(d, plan, begin, end);
}

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

static int64_t partial_size(const PartsPlan& plan) { return plan.seeds * plan.slots() * kSums * plan.slot_width(); }

int64_t ladder_decoder_apply_items(const LadderDecoderShape& s) { return plan_of(s).items(); }

int64_t ladder_decoder_reduce_items(const LadderDecoderShape& s) { return s.seeds * plan_of(s).channel_blocks(); }

int64_t ladder_decoder_workspace(const LadderDecoderShape& s) {
    const PartsPlan plan = plan_of(s);
    const int64_t statistics = baseline::moments_workspace(plan);
    return statistics > plan.items() ? statistics : plan.items();
}

int64_t ladder_decoder_backward_workspace(const LadderDecoderShape& s) {
    return partial_size(plan_of(s)) + 2 * s.seeds * s.channels;
}

template <class S, class T>
void ladder_decoder_statistics(const S* u, T* workspace, const LadderDecoderShape& s, int64_t begin, int64_t end) {
    static const auto kernel = LF_SELECT(statistics<S>);
    kernel(u, workspace, plan_of(s), begin, end);
}

template <class S, class T>
void ladder_decoder_moments(const S* u, const T* workspace, T* u_mean, T* u_var, const LadderDecoderShape& s,
                            int64_t begin, int64_t end) {
    static const auto kernel = LF_SELECT(moments<S>);
    kernel(u, workspace, u_mean, u_var, plan_of(s), begin, end);
}

template <class S, class T>
void ladder_decoder_apply(const S* u, const S* z, const T* params, const S* clean_z, const T* mean, const T* var,
                          const T* u_mean, const T* u_var, S* z_hat, T* workspace, const LadderDecoderOptions& options,
                          const LadderDecoderShape& s, int64_t begin, int64_t end) {
    static const auto kernel = LF_SELECT(forward<S>);
    const DecoderForward<S> d{u, z, params, clean_z, mean, var, u_mean, u_var, z_hat, workspace, (T)options.eps};
    kernel(d, options.squash_v, plan_of(s), begin, end);
}

template <class S, class T>
void ladder_decoder_cost(const T* workspace, T* cost, const LadderDecoderShape& s, int64_t begin, int64_t end) {
    const PartsPlan plan = plan_of(s);
    const int64_t items = plan.seeds > 0 ? plan.items() / plan.seeds : 0;
    for (int64_t seed = begin; seed < end; ++seed) {
        double total = 0;
        for (int64_t i = 0; i < items; ++i) total += workspace[seed * items + i];
        cost[seed] = plan.per_seed > 0 ? (T)(total / plan.per_seed) : (T)0;
    }
}

template <class S, class T>
void ladder_decoder_backward_sums(const S* grad_z_hat, const T* grad_cost, const S* u, const S* z, const T* params,
                                  const S* clean_z, const T* mean, const T* var, const T* u_mean, const T* u_var,
                                  T* reaching, S* grad_z, S* grad_clean_z, T* workspace, bool statistics,
                                  const LadderDecoderOptions& options, const LadderDecoderShape& s, int64_t begin,
                                  int64_t end) {
    static const auto kernel = LF_SELECT(backward<S>);
    const DecoderBackward<S> d{grad_z_hat, grad_cost,    u,         z,       params,        clean_z,
                               mean,       var,          u_mean,    u_var,   reaching,      nullptr,
                               grad_z,     grad_clean_z, workspace, nullptr, (T)options.eps};
    kernel(d, options.squash_v, statistics, plan_of(s), begin, end);
}

template <class S, class T>
void ladder_decoder_reduce(T* workspace, const T* params, const T* var, T* grad_params, T* grad_mean, T* grad_var,
                           const LadderDecoderOptions& options, const LadderDecoderShape& s, int64_t begin,
                           int64_t end) {
    static const auto kernel = LF_SELECT(reduce<S>);
    const PartsPlan plan = plan_of(s);
    DecoderBackward<S> d{};
    d.params = params;
    d.var = var;
    d.partial = workspace;
    d.eps = (T)options.eps;
    kernel(d, workspace + partial_size(plan), grad_params, grad_mean, grad_var, plan, begin, end);
}

template <class S, class T>
void ladder_decoder_backward_apply(const S* u, const T* u_mean, const T* u_var, const T* workspace, const T* reaching,
                                   S* grad_u, const LadderDecoderOptions& options, const LadderDecoderShape& s,
                                   int64_t begin, int64_t end) {
    static const auto kernel = LF_SELECT(backward_apply<S>);
    const PartsPlan plan = plan_of(s);
    DecoderBackward<S> d{};
    d.u = u;
    d.u_mean = u_mean;
    d.u_var = u_var;
    d.reaching = const_cast<T*>(reaching);  // which this pass reads only
    d.grad_u = grad_u;
    d.means = workspace + partial_size(plan);
    d.eps = (T)options.eps;
    kernel(d, plan, begin, end);
}

#define LF_DECODER_INSTANCES(S, T)                                                                                    \
    template void ladder_decoder_statistics<S>(const S*, T*, const LadderDecoderShape&, int64_t, int64_t);            \
    template void ladder_decoder_moments<S>(const S*, const T*, T*, T*, const LadderDecoderShape&, int64_t, int64_t); \
    template void ladder_decoder_apply<S>(const S*, const S*, const T*, const S*, const T*, const T*, const T*,       \
                                          const T*, S*, T*, const LadderDecoderOptions&, const LadderDecoderShape&,   \
                                          int64_t, int64_t);                                                          \
    template void ladder_decoder_cost<S>(const T*, T*, const LadderDecoderShape&, int64_t, int64_t);                  \
    template void ladder_decoder_backward_sums<S>(                                                                    \
        const S*, const T*, const S*, const S*, const T*, const S*, const T*, const T*, const T*, const T*, T*, S*,   \
        S*, T*, bool, const LadderDecoderOptions&, const LadderDecoderShape&, int64_t, int64_t);                      \
    template void ladder_decoder_reduce<S>(T*, const T*, const T*, T*, T*, T*, const LadderDecoderOptions&,           \
                                           const LadderDecoderShape&, int64_t, int64_t);                              \
    template void ladder_decoder_backward_apply<S>(const S*, const T*, const T*, const T*, const T*, S*,              \
                                                   const LadderDecoderOptions&, const LadderDecoderShape&, int64_t,   \
                                                   int64_t);

LF_DECODER_INSTANCES(float, float)
LF_DECODER_INSTANCES(double, double)
LF_DECODER_INSTANCES(BFloat16, float)
#undef LF_DECODER_INSTANCES

}  // namespace ladderfast::cpu
#endif

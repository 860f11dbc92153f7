// CPU kernels of the op `combinator`; contract in ../combinator.h.
//
// Floor: forward reads z, u and writes z_hat (12 bytes an element in float32), backward reads grad, z, u and writes
// grad_z, grad_u (20 bytes). Within the second-level cache one AVX-512 core of the machine in bench/results takes 0.19
// and 0.35 ns an element, from the third 0.20 and 0.38: its two units for products limit it, with 10 and 30 of them to
// a vector, two table lookups and two divisions (four products' time each). From memory it is the latency of loads,
// hence the prefetches, and the bytes: lines to be written are not read first (kCached), which takes a fifth to a third
// of the time away. Where z, u and the outputs are alike modulo 4096 bytes, and rows as long as a multiple of that, the
// columns way is up to three times slower, as all its lines share a few places of the first-level cache. Tensors that
// the allocator maps one by one, large and early ones, may lie so; those from its heap do not.
//
// Two ways through the packed layout (seeds, rows, channels, inner):
//
//   columns  inner < 16. A row is channels * inner columns; so many rows are taken as one that a row has at least 64
//            columns and, where there are rows enough, whole vectors. A vector covers neighbouring columns, each with
//            its own ten parameters; its ten sums over 64 rows stay in registers. With few rows and a column for each
//            channel, rows are not merged, an item has all of them, and writes the parameters' gradients itself.
//   runs     inner >= 16. A vector runs along `inner`, the ten parameters are broadcast.
//
// Work items and the partial sums they leave depend on the shape alone.
#undef LF_THIS_FILE
#define LF_THIS_FILE "combinator.cpp"

#ifndef LADDERFAST_CPU_COMBINATOR_PLAN
#define LADDERFAST_CPU_COMBINATOR_PLAN

#include "../combinator.h"
#include "isa.h"

namespace ladderfast::cpu {

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static const int64_t kBlock = 512;  // columns of one item, at most: parameters and sums fit the first-level cache
static const int64_t kRows = 64;    // rows over which columns are summed in registers; of an item, unless it has all
static const int64_t kTile = 64;    // vectors of a run that are summed in registers
// Bytes to prefetch ahead: in the rows of an item, and in runs forward and backward.
static const int64_t kAhead = 128, kForwardAhead = 2048, kBackwardAhead = 1024;
// With so few rows, and channels enough, an item takes all rows of so many columns that it has about kWholeItem
// elements, but kLeastBlock columns at least.
static const int64_t kWholeRows = 256, kWholeItem = 8192, kLeastBlock = 64;
static const int64_t kSegment = 8192;    // elements of a run that one item takes, at most
static const int64_t kLongInner = 16;    // from here on by runs
static const int64_t kReduceBlock = 64;  // channels of one item of the final sums
// Where inputs and outputs together are larger, caches would not hold the outputs until somebody reads them: they then
// go straight to memory, which spares reading each line before it is written.
static const int64_t kCached = int64_t(32) << 20;  // bytes

// How a shape is cut; compiled once, before any instruction set is chosen.
// `slots` partial sums are kept for each seed, each of 10 * width elements.
struct Plan {
    bool columns;
    bool whole;        // columns: an item has all rows and finishes its sums
    int64_t per_seed;  // elements of one seed
    int64_t width;     // columns of a (merged) row, or channels
    int64_t rows;      // (merged) rows, the last one possibly short
    int64_t rows_per_item, row_chunks;
    int64_t block;   // columns of an item
    int64_t blocks;  // columns: blocks of columns; runs: segments of a run
    int64_t slots;

    explicit Plan(const CombinatorShape& s) {
        per_seed = s.rows * s.channels * s.inner;
        columns = s.inner < kLongInner;
        whole = s.inner == 1 && s.rows <= kWholeRows && s.channels >= kLeastBlock && per_seed > 0;
        rows = s.rows;
        width = s.channels;
        if (columns && !whole) {
            const int64_t natural = s.channels * s.inner;
            width = natural;
            if (natural > 0) {
                int64_t merged = 1;  // the fewest rows that make whole vectors of 16, if enough merged rows are left
                while (natural * merged % 16 != 0 && (natural < 64 || s.rows >= 32 * merged)) merged *= 2;
                width = natural * merged;
                if (width < 64) width *= ceil_div(64, width);
            }
            rows = width > 0 ? ceil_div(per_seed, width) : 0;
        }
        block = whole ? kWholeItem / rows / kLeastBlock * kLeastBlock : kBlock;
        block = block < kLeastBlock ? kLeastBlock : min_of(block, kBlock);
        row_chunks = whole ? 1 : ceil_div(rows, kRows);
        rows_per_item = row_chunks > 0 ? ceil_div(rows, row_chunks) : 0;
        if (row_chunks > 0) row_chunks = ceil_div(rows, rows_per_item);
        blocks = columns ? ceil_div(width, block) : ceil_div(s.inner, kSegment);
        slots = whole ? 0 : columns ? row_chunks : row_chunks * blocks;
        if (per_seed == 0) row_chunks = blocks = slots = 0;
    }

    // Whether `tensors` tensors of the shape are beyond the caches, and all vectors of an output are whole and aligned
    // if `out`, its beginning, is.
    bool past_caches(const CombinatorShape& s, int tensors, int64_t item_size, const void* out) const {
        const int64_t stretch = columns ? width : s.inner;
        return tensors * s.seeds * per_seed * item_size > kCached && stretch % 16 == 0 &&
               (s.seeds == 1 || per_seed % 16 == 0) && (uintptr_t)out % 64 == 0;
    }

    template <class T>
    bool gradients_past_caches(const CombinatorShape& s, const T* grad_z, const T* grad_u) const {
        return past_caches(s, 5, sizeof(T), grad_z) && past_caches(s, 5, sizeof(T), grad_u);
    }

    int64_t items_per_seed(const CombinatorShape& s) const { return row_chunks * blocks * (columns ? 1 : s.channels); }
};

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "combinator_table.h"

// The parameters of columns [first, first + count), each row padded to whole vectors.
template <class T>
static inline void fill_table(T* table, const T* params, const CombinatorShape& s, int64_t first, int64_t count) {
    const int64_t natural = s.channels * s.inner;
    for (int j = 0; j < 10; ++j) {
        T* row = table + j * kBlock;
        const T* from = params + j * s.channels;
        int64_t channel = first % natural / s.inner, place = first % s.inner;
        for (int64_t i = 0; i < count;) {
            // As many columns as one copy has: of several channels, or of one channel's run.
            const int64_t part = min_of(count - i, s.inner == 1 ? s.channels - channel : s.inner - place);
            if (s.inner == 1)
                memcpy(row + i, from + channel, part * sizeof(T));
            else
                for (int64_t k = 0; k < part; ++k) row[i + k] = from[channel];
            i += part;
            place = 0;
            channel = s.inner == 1 || channel + 1 == s.channels ? 0 : channel + 1;
        }
        for (int64_t i = count; i % Vec<T>::width != 0; ++i) row[i] = 0;
    }
    fill_arguments(table, kBlock, count);
}

// One item of the columns way: rows [row, row_end) of one seed, columns [first, first + count) of each.
struct ColumnItem {
    int64_t seed, chunk, row, row_end, first, count;

    ColumnItem(const Plan& plan, int64_t item) {
        const int64_t block = item % plan.blocks;
        chunk = item / plan.blocks % plan.row_chunks;
        seed = item / plan.blocks / plan.row_chunks;
        first = block * plan.block;
        count = min_of(plan.block, plan.width - first);
        row = chunk * plan.rows_per_item;
        row_end = min_of(row + plan.rows_per_item, plan.rows);
    }

    // The rows from `r` on over which is summed in registers end before this one.
    int64_t chunk_end(int64_t r) const { return min_of(r + kRows, row_end); }

    // Columns of this block that row `r` has: all but for the last, short row.
    int64_t columns_of(const Plan& plan, int64_t r) const {
        const int64_t left = plan.per_seed - r * plan.width - first;
        return left < 0 ? 0 : min_of(count, left);
    }

    // The end of the rows that have all columns of this block.
    int64_t whole_rows(const Plan& plan) const { return columns_of(plan, row_end - 1) < count ? row_end - 1 : row_end; }
};

// One item of the runs way: one channel, one segment of its runs, rows [row, row_end).
struct RunItem {
    int64_t seed, slot, row, row_end, channel, first, count;

    RunItem(const Plan& plan, const CombinatorShape& s, int64_t item) {
        channel = item % s.channels;
        const int64_t segment = item / s.channels % plan.blocks;
        const int64_t chunk = item / s.channels / plan.blocks % plan.row_chunks;
        seed = item / s.channels / plan.blocks / plan.row_chunks;
        slot = chunk * plan.blocks + segment;
        first = segment * kSegment;
        count = min_of(kSegment, s.inner - first);
        row = chunk * plan.rows_per_item;
        row_end = min_of(row + plan.rows_per_item, plan.rows);
    }

    int64_t offset(const CombinatorShape& s, int64_t r) const {
        return ((seed * s.rows + r) * s.channels + channel) * s.inner + first;
    }
};

template <class T>
static LF_HD void put(Vec<T> x, T* p, bool past_caches) {
    if (past_caches)
        x.stream(p);
    else
        x.store(p);
}

template <bool squash, class T>
static inline void forward_columns(const T* z, const T* u, const T* params, T* z_hat, const CombinatorShape& s,
                                   const Plan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    alignas(64) T table[kCombinatorRows * kBlock];
    const bool past_caches = plan.past_caches(s, 3, sizeof(T), z_hat);
    for (int64_t i = begin; i < end; ++i) {
        const ColumnItem item(plan, i);
        fill_table(table, params + item.seed * 10 * s.channels, s, item.first, item.count);
        for (int64_t row = item.row, stop; row < item.row_end; row = stop) {
            stop = item.chunk_end(row);
            for (int64_t c = 0; c < item.count; c += V::width) {
                const auto p = load_columns(table, kBlock, c);
                int64_t at = item.seed * plan.per_seed + row * plan.width + item.first + c;
                const int64_t columns = min_of(item.count - c, V::width);
                int64_t r = row;
                for (const int64_t end = columns == V::width ? min_of(stop, item.whole_rows(plan)) : r; r < end;
                     ++r, at += plan.width) {
                    __builtin_prefetch(z + at + kAhead / sizeof(T));
                    __builtin_prefetch(u + at + kAhead / sizeof(T));
                    put(combinator_forward<squash>(V::load(z + at), V::load(u + at), p), z_hat + at, past_caches);
                }
                for (; r < stop; ++r, at += plan.width) {
                    const int64_t n = min_of(item.columns_of(plan, r) - c, V::width);
                    if (n <= 0) break;
                    combinator_forward<squash>(V::load(z + at, n), V::load(u + at, n), p).store(z_hat + at, n);
                }
            }
        }
    }
    if (past_caches) order_streams();
}

template <bool squash, class T>
static inline void forward_runs(const T* z, const T* u, const T* params, T* z_hat, const CombinatorShape& s,
                                const Plan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const bool past_caches = plan.past_caches(s, 3, sizeof(T), z_hat);
    for (int64_t i = begin; i < end; ++i) {
        const RunItem item(plan, s, i);
        const auto p = broadcast_channel(params + item.seed * 10 * s.channels, s.channels, item.channel);
        for (int64_t r = item.row; r < item.row_end; ++r) {
            const int64_t at = item.offset(s, r);
            int64_t c = 0;
            for (; c + V::width <= item.count; c += V::width) {
                __builtin_prefetch(z + at + c + kForwardAhead / sizeof(T));
                __builtin_prefetch(u + at + c + kForwardAhead / sizeof(T));
                const V y = combinator_forward<squash>(V::load(z + at + c), V::load(u + at + c), p);
                put(y, z_hat + at + c, past_caches);
            }
            if (c < item.count)
                combinator_forward<squash>(V::load(z + at + c, item.count - c), V::load(u + at + c, item.count - c), p)
                    .store(z_hat + at + c, item.count - c);
        }
    }
    if (past_caches) order_streams();
}

// What backward reads and writes.
template <class T>
struct BackwardPointers {
    const T *grad, *z, *u;
    T *grad_z, *grad_u;
    bool past_caches;  // go the gradients to memory

    template <class V>
    LF_HD void put_gradients(V gz, V gu, int64_t at) const {
        put(gz, grad_z + at, past_caches);
        put(gu, grad_u + at, past_caches);
    }
};

// `count` whole vectors, `step` elements apart. The sigmoids of the next vector are begun before this one is finished:
// together they are a longer chain of operations than the processor looks ahead. fetch(at) prefetches, and must be
// always_inline: GCC drops calls of a function that does nothing else.
template <bool squash, class T, class Fetch>
static LF_HD void backward_vectors(const BackwardPointers<T>& to, int64_t at, int64_t step, int64_t count,
                                   const Combinator<Vec<T>>& p, Vec<T> (&sums)[10], const Fetch& fetch) {
    using V = Vec<T>;
    if (count <= 0) return;
    V u_next = V::load(to.u + at);
    CombinatorSigmoids<V> next(u_next, p);
    for (int64_t i = 0; i < count; ++i, at += step) {
        fetch(at);
        const V u = u_next;
        const CombinatorSigmoids<V> sigmoids = next;
        u_next = V::load(to.u + (i + 1 < count ? at + step : at));
        next = CombinatorSigmoids<V>(u_next, p);
        V gz, gu;
        combinator_backward(V::load(to.grad + at), V::load(to.z + at), u, sigmoids, p, squash, gz, gu, sums);
        to.put_gradients(gz, gu, at);
    }
}

// The n elements left over, n less than a vector.
template <bool squash, class T>
static LF_HD void backward_rest(const BackwardPointers<T>& to, int64_t at, int64_t n, const Combinator<Vec<T>>& p,
                                Vec<T> (&sums)[10]) {
    using V = Vec<T>;
    V gz, gu;
    combinator_backward<squash>(V::load(to.grad + at, n), V::load(to.z + at, n), V::load(to.u + at, n), p, gz, gu,
                                sums);
    gz.store(to.grad_z + at, n);
    gu.store(to.grad_u + at, n);
}

template <bool squash, class T>
static inline void backward_columns(const T* grad, const T* z, const T* u, const T* params, T* grad_z, T* grad_u,
                                    T* grad_params, T* workspace, const CombinatorShape& s, const Plan& plan,
                                    int64_t begin, int64_t end) {
    using V = Vec<T>;
    alignas(64) T table[kCombinatorRows * kBlock];
    alignas(64) T begun[10 * kBlock];  // sums over the rows before
    const BackwardPointers<T> to = {grad, z, u, grad_z, grad_u, plan.gradients_past_caches(s, grad_z, grad_u)};
    const auto fetch = [&](int64_t at) __attribute__((always_inline)) {
        // So many rows are more streams than the hardware follows by itself.
        __builtin_prefetch(grad + at + kAhead / sizeof(T));
        __builtin_prefetch(z + at + kAhead / sizeof(T));
        __builtin_prefetch(u + at + kAhead / sizeof(T));
    };
    // The last item first: what forward read last may still be in a cache.
    for (int64_t i = end - 1; i >= begin; --i) {
        const ColumnItem item(plan, i);
        fill_table(table, params + item.seed * 10 * s.channels, s, item.first, item.count);
        for (int64_t row = item.row, stop; row < item.row_end; row = stop) {
            stop = item.chunk_end(row);
            for (int64_t c = 0; c < item.count; c += V::width) {
                const auto p = load_columns(table, kBlock, c);
                const int64_t columns = min_of(item.count - c, V::width);
                V sums[10];
                for (int j = 0; j < 10; ++j)
                    sums[j] = row == item.row ? V::broadcast(0) : V::load(begun + j * kBlock + c);
                int64_t at = item.seed * plan.per_seed + row * plan.width + item.first + c;
                const int64_t vectors = columns == V::width ? min_of(stop, item.whole_rows(plan)) - row : 0;
                backward_vectors<squash>(to, at, plan.width, vectors, p, sums, fetch);
                at += vectors * plan.width;
                for (int64_t r = row + vectors; r < stop; ++r, at += plan.width) {
                    const int64_t n = min_of(item.columns_of(plan, r) - c, V::width);
                    if (n <= 0) break;
                    backward_rest<squash>(to, at, n, p, sums);
                }
                if (stop < item.row_end) {
                    for (int j = 0; j < 10; ++j) sums[j].store(begun + j * kBlock + c);
                } else if (plan.whole) {
                    combinator_finish(sums, p);
                    T* out = grad_params + item.seed * 10 * s.channels + item.first + c;
                    for (int j = 0; j < 10; ++j) sums[j].store(out + j * s.channels, columns);
                } else {
                    T* out = workspace + (item.seed * plan.slots + item.chunk) * 10 * plan.width + item.first + c;
                    for (int j = 0; j < 10; ++j) sums[j].store(out + j * plan.width, columns);
                }
            }
        }
    }
    if (to.past_caches) order_streams();
}

template <bool squash, class T>
static inline void backward_runs(const T* grad, const T* z, const T* u, const T* params, T* grad_z, T* grad_u,
                                 T* workspace, const CombinatorShape& s, const Plan& plan, int64_t begin, int64_t end) {
    using V = Vec<T>;
    const BackwardPointers<T> to = {grad, z, u, grad_z, grad_u, plan.gradients_past_caches(s, grad_z, grad_u)};
    const auto fetch = [&](int64_t at) __attribute__((always_inline)) {
        const int64_t ahead = at + kBackwardAhead / sizeof(T);
        __builtin_prefetch(grad + ahead);
        __builtin_prefetch(z + ahead);
        __builtin_prefetch(u + ahead);
        if (!to.past_caches) {
            __builtin_prefetch(grad_z + ahead, 1);
            __builtin_prefetch(grad_u + ahead, 1);
        }
    };
    for (int64_t i = end - 1; i >= begin; --i) {
        const RunItem item(plan, s, i);
        const auto p = broadcast_channel(params + item.seed * 10 * s.channels, s.channels, item.channel);
        double total[10] = {};
        for (int64_t r = item.row; r < item.row_end; ++r) {
            const int64_t at = item.offset(s, r);
            for (int64_t c = 0; c < item.count; c += kTile * V::width) {
                const int64_t count = min_of(item.count - c, kTile * V::width), rest = count % V::width;
                V sums[10];
                for (int j = 0; j < 10; ++j) sums[j] = V::broadcast(0);
                backward_vectors<squash>(to, at + c, V::width, count / V::width, p, sums, fetch);
                if (rest > 0) backward_rest<squash>(to, at + c + count - rest, rest, p, sums);
                for (int j = 0; j < 10; ++j) total[j] += sums[j].sum();
            }
        }
        T* out = workspace + (item.seed * plan.slots + item.slot) * 10 * s.channels + item.channel;
        for (int j = 0; j < 10; ++j) out[j * s.channels] = (T)total[j];
    }
    if (to.past_caches) order_streams();
}

// Final sums of kReduceBlock channels, in double, in the order of the slots.
template <class T>
static inline void reduce(const T* workspace, const T* params, T* grad_params, const CombinatorShape& s,
                          const Plan& plan, int64_t begin, int64_t end) {
    const int64_t channel_blocks = ceil_div(s.channels, kReduceBlock);
    // Copies of a channel within a row of partial sums, and how far apart they are.
    const int64_t inner = plan.columns ? s.inner : 1;
    const int64_t natural = s.channels * inner;
    const int64_t copies = natural > 0 ? plan.width / natural : 0;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t seed = item / channel_blocks;
        const int64_t first = item % channel_blocks * kReduceBlock;
        const int64_t count = min_of(kReduceBlock, s.channels - first);
        alignas(64) double sums[10][kReduceBlock] = {};
        for (int64_t slot = 0; slot < plan.slots; ++slot) {
            for (int j = 0; j < 10; ++j) {
                const T* row = workspace + ((seed * plan.slots + slot) * 10 + j) * plan.width + first * inner;
                for (int64_t copy = 0; copy < copies; ++copy, row += natural) {
                    if (inner == 1) {
                        for (int64_t c = 0; c < count; ++c) sums[j][c] += row[c];
                    } else {
                        for (int64_t c = 0; c < count; ++c)
                            for (int64_t k = 0; k < inner; ++k) sums[j][c] += row[c * inner + k];
                    }
                }
            }
        }
        for (int64_t c = 0; c < count; ++c) {
            double channel[10];
            for (int j = 0; j < 10; ++j) channel[j] = sums[j][c];
            const int64_t at = seed * 10 * s.channels;
            finish_channel(channel, load_channel(params + at, s.channels, first + c), grad_params + at, s.channels,
                           first + c);
        }
    }
}

#define LF_COMBINATOR_INSTANCES(T, suffix)                                                                             \
    static void forward_##suffix(const T* z, const T* u, const T* params, T* z_hat, bool squash_v,                     \
                                 const CombinatorShape& s, int64_t begin, int64_t end) {                               \
        const Plan plan(s);                                                                                            \
        if (plan.columns && squash_v) forward_columns<true>(z, u, params, z_hat, s, plan, begin, end);                 \
        if (plan.columns && !squash_v) forward_columns<false>(z, u, params, z_hat, s, plan, begin, end);               \
        if (!plan.columns && squash_v) forward_runs<true>(z, u, params, z_hat, s, plan, begin, end);                   \
        if (!plan.columns && !squash_v) forward_runs<false>(z, u, params, z_hat, s, plan, begin, end);                 \
    }                                                                                                                  \
    static void backward_##suffix(const T* g, const T* z, const T* u, const T* params, T* gz, T* gu, T* gp,            \
                                  T* workspace, bool squash_v, const CombinatorShape& s, int64_t begin, int64_t end) { \
        const Plan plan(s);                                                                                            \
        if (plan.columns && squash_v)                                                                                  \
            backward_columns<true>(g, z, u, params, gz, gu, gp, workspace, s, plan, begin, end);                       \
        if (plan.columns && !squash_v)                                                                                 \
            backward_columns<false>(g, z, u, params, gz, gu, gp, workspace, s, plan, begin, end);                      \
        if (!plan.columns && squash_v) backward_runs<true>(g, z, u, params, gz, gu, workspace, s, plan, begin, end);   \
        if (!plan.columns && !squash_v) backward_runs<false>(g, z, u, params, gz, gu, workspace, s, plan, begin, end); \
    }                                                                                                                  \
    static void reduce_##suffix(const T* workspace, const T* params, T* grad_params, const CombinatorShape& s,         \
                                int64_t begin, int64_t end) {                                                          \
        reduce(workspace, params, grad_params, s, Plan(s), begin, end);                                                \
    }

LF_COMBINATOR_INSTANCES(float, f32)
LF_COMBINATOR_INSTANCES(double, f64)
#undef LF_COMBINATOR_INSTANCES

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t combinator_forward_items(const CombinatorShape& s) { return s.seeds * Plan(s).items_per_seed(s); }

int64_t combinator_backward_items(const CombinatorShape& s) { return s.seeds * Plan(s).items_per_seed(s); }

int64_t combinator_reduce_items(const CombinatorShape& s) {
    return Plan(s).whole ? 0 : s.seeds * ceil_div(s.channels, kReduceBlock);
}

int64_t combinator_workspace(const CombinatorShape& s) {
    const Plan plan(s);
    return s.seeds * plan.slots * 10 * plan.width;
}

#define LF_COMBINATOR_DISPATCH(T, suffix)                                                                            \
    template <>                                                                                                      \
    void combinator_forward<T>(const T* z, const T* u, const T* params, T* z_hat, bool squash_v,                     \
                               const CombinatorShape& s, int64_t begin, int64_t end) {                               \
        static const auto kernel = LF_SELECT(forward_##suffix);                                                      \
        kernel(z, u, params, z_hat, squash_v, s, begin, end);                                                        \
    }                                                                                                                \
    template <>                                                                                                      \
    void combinator_backward<T>(const T* g, const T* z, const T* u, const T* params, T* gz, T* gu, T* gp,            \
                                T* workspace, bool squash_v, const CombinatorShape& s, int64_t begin, int64_t end) { \
        static const auto kernel = LF_SELECT(backward_##suffix);                                                     \
        kernel(g, z, u, params, gz, gu, gp, workspace, squash_v, s, begin, end);                                     \
    }                                                                                                                \
    template <>                                                                                                      \
    void combinator_reduce<T>(const T* workspace, const T* params, T* grad_params, const CombinatorShape& s,         \
                              int64_t begin, int64_t end) {                                                          \
        static const auto kernel = LF_SELECT(reduce_##suffix);                                                       \
        kernel(workspace, params, grad_params, s, begin, end);                                                       \
    }

LF_COMBINATOR_DISPATCH(float, f32)
LF_COMBINATOR_DISPATCH(double, f64)
#undef LF_COMBINATOR_DISPATCH

}  // namespace ladderfast::cpu
#endif

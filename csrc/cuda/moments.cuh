// Mean and biased variance of every channel, by a method that a large mean does not harm: values are taken relative to
// the channel's first one, a thread merges the means and squared deviations of a few values at a time (Chan, Golub and
// LeVeque, 1983), and what threads, blocks and chunks have found is put together by
//
//   mean = sum n_i mean_i / n        squares = sum (squares_i + n_i (mean_i - mean)^2)
//
// in a fixed order. A constant channel has variance 0 exactly.
//
// There are two ways over a tensor: held in registers by one block for each group of channels (plan_held), or in
// chunks, whose moments the blocks of the next pass merge (plan_chunks, merge_chunks).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "elements.cuh"
#include "sums.cuh"
#include "walks.cuh"

namespace ladderfast::cuda {

// What a thread holds of its channels, at most: slices of a column walk or of a run walk.
constexpr int kHeldRows = 4;
template <class T>
constexpr int kHeldSlices = sizeof(T) == 2 ? 2 : 4;
template <class T>
constexpr int kHeldThreads = sizeof(T) == 8 ? 256 : 512;
// Slices side by side in a block that holds columns: together 32 bytes, of float64 64.
template <class T>
constexpr int kHeldAcross = sizeof(T) == 2 ? 8 : 4;

// One block holds all rows of kHeldAcross slices of columns or, where inner > 1, all of a channel. threads is 0 where
// the shape is too large for that.
template <class T, class Shape>
Plan plan_held(const Shape& shape) {
    Plan plan = {};
    plan.rows = shape.rows;
    plan.channels = shape.channels;
    plan.inner = shape.inner;
    plan.chunks = 1;
    plan.columns = shape.inner == 1;
    const int64_t warp = 32;
    if (plan.columns) {
        constexpr int64_t kAcross = kHeldAcross<T>;
        plan.width = shape.channels;
        plan.tiles = ceil_div(ceil_div(shape.channels, kColumns), kAcross);
        plan.across = kAcross;
        plan.steps = kHeldRows;
        const int64_t most = kHeldThreads<T> / kAcross;
        const int64_t down = shape.rows < most ? ceil_div(shape.rows * kAcross, warp) * warp / kAcross : most;
        plan.down = static_cast<int>(down);
        if (shape.rows > most * kHeldRows || shape.rows * plan.width > (int64_t{1} << 31)) return plan;
        plan.threads = static_cast<int>(down * kAcross);
    } else {
        plan.width = plan.tiles = shape.channels;
        plan.slices = static_cast<int>(ceil_div(shape.inner, kRun<T>));
        plan.steps = kHeldSlices<T>;
        const int64_t most = kHeldThreads<T>, slices = shape.rows * plan.slices;
        if (slices > most * plan.steps) return plan;
        plan.threads = static_cast<int>(slices < most ? ceil_div(slices, warp) * warp : most);
        plan.jump_rows = plan.threads / plan.slices;
        plan.jump_slices = plan.threads % plan.slices;
    }
    return plan;
}

// Chunks enough to fill a chip, and as few as that takes: each is a term that somebody must add up.
inline int64_t chunks_for(int64_t tiles) {
    constexpr int64_t kBlocks = 256, kMost = 64;
    const int64_t chunks = ceil_div(kBlocks, tiles);
    return chunks < kMost ? chunks : kMost;
}

constexpr int kWidestTile = 32 * kColumns;

// Tiles of whole channels, up to kWidestTile columns of them, or one channel where inner > 16.
template <class T, class Shape>
Plan plan_chunks(const Shape& shape) {
    Plan plan = {};
    plan.rows = shape.rows;
    plan.channels = shape.channels;
    plan.inner = shape.inner;
    plan.columns = shape.inner <= kLongestColumnRun;
    if (plan.columns) {
        plan.width = shape.channels * shape.inner;
        const int64_t slices = ceil_div(plan.width, kColumns);
        // Slices that are whole channels, or 32 bytes and more.
        const int64_t unit = shape.inner == 1 ? 8 : shape.inner % 2 == 0 ? shape.inner / 2 : shape.inner;
        const int64_t widest = kWidestTile / kColumns / unit * unit;
        plan.tiles = ceil_div(slices, widest);
        plan.across = static_cast<int>(plan.tiles == 1 ? slices : ceil_div(ceil_div(slices, plan.tiles), unit) * unit);
        plan.tiles = ceil_div(slices, plan.across);
        // A thread's offsets from the block's first element are 32 bits wide.
        const int64_t reach = (int64_t{1} << 30) / plan.width;
        int64_t down = kThreads / plan.across;
        if (down > reach) down = reach > 1 ? reach : 1;
        int64_t steps = ceil_div(shape.rows, chunks_for(plan.tiles * shape.seeds) * down);
        if (steps > 1 && steps * down > reach) steps = reach / down > 1 ? reach / down : 1;
        plan.down = static_cast<int>(down);
        plan.steps = static_cast<int>(steps);
        plan.threads = static_cast<int>(ceil_div(plan.across * down, 32) * 32);
        plan.chunks = ceil_div(shape.rows, down * steps);
    } else {
        plan.width = plan.tiles = shape.channels;
        plan.slices = static_cast<int>(ceil_div(shape.inner, kRun<T>));
        plan.threads = kThreads;
        const int64_t slices = shape.rows * plan.slices;
        int64_t steps = ceil_div(slices, chunks_for(plan.tiles * shape.seeds) * kThreads);
        if (steps > 1 << 20) steps = 1 << 20;
        plan.steps = static_cast<int>(steps);
        plan.chunks = ceil_div(slices, kThreads * steps);
        plan.jump_rows = kThreads / plan.slices;
        plan.jump_slices = kThreads % plan.slices;
    }
    return plan;
}

// The channels of a block of plan_chunks or plan_held.
struct Channels {
    int first, count;

    template <int N>
    static __device__ __forceinline__ Channels of(const Plan& plan, int tile) {
        const int all = static_cast<int>(plan.channels);
        if (!plan.columns) return {tile, 1};
        const int group = plan.across * N / static_cast<int>(plan.inner);
        if (plan.tiles == 1) return {0, all};
        return {tile * group, all - tile * group < group ? all - tile * group : group};
    }
};

template <class V>
struct Moments {
    V count, mean, squares;  // squares: sum of squared deviations from the mean

    __device__ __forceinline__ void merge(V n, V its_mean, V its_squares) {
        const V total = count + n, share = n / total, apart = its_mean - mean;
        mean += apart * share;
        squares += its_squares + apart * apart * (count * share);
        count = total;
    }

    // The first `valid` of M values, at least one.
    template <int M>
    __device__ __forceinline__ void add(const V (&x)[M], int valid) {
        V sum = 0;
#pragma unroll
        for (int i = 0; i < M; ++i)
            if (i < valid) sum += x[i];
        const V n = static_cast<V>(valid), its_mean = sum / n;
        V its_squares = 0;
#pragma unroll
        for (int i = 0; i < M; ++i)
            if (i < valid) its_squares += (x[i] - its_mean) * (x[i] - its_mean);
        merge(n, its_mean, its_squares);
    }
};

// U slices; more than one of a run walk only where all are complete.
template <int U, bool whole, class T, int N, template <int> class Walk>
__device__ __forceinline__ void moments_step(const T* __restrict__ x, const Compute<T> (&first)[Walk<N>::kOwn],
                                             Moments<Compute<T>> (&found)[Walk<N>::kOwn], Walk<N>& walk) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    Pack<T, N> packs[U];
    int count[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
        count[j] = walk.count;
        packs[j] = load<whole, N>(advance(x, walk.offset), count[j]);
        walk.next();
    }
    V values[U][N];
#pragma unroll
    for (int j = 0; j < U; ++j) widen(packs[j], values[j]);
    if constexpr (kOwn == 1) {
        V all[U * N];
#pragma unroll
        for (int n = 0; n < U * N; ++n) all[n] = values[n / N][n % N] - first[0];
        found[0].add(all, U > 1 ? U * N : count[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            V column[U];
#pragma unroll
            for (int j = 0; j < U; ++j) column[j] = values[j][i] - first[i];
            if (whole || i < count[0]) found[i].add(column, U);
        }
    }
    walk.left -= U;
}

// The first value of each of a thread's channels. x is that of the seed.
template <class T, int N, template <int> class Walk>
__device__ __forceinline__ void first_values(const T* __restrict__ x, const Plan& plan, const Walk<N>& walk,
                                             Compute<T> (&first)[Walk<N>::kOwn]) {
#pragma unroll
    for (int i = 0; i < Walk<N>::kOwn; ++i) first[i] = load_either<T>(x, false, walk.channel(plan, i) * plan.inner);
}

// The work of a block of plan_chunks: moments of its chunk, relative to each channel's first value; partials
// (seeds, chunks, 3, channels) receive count, mean and squares.
template <class T, int N, int U, template <int> class Walk, bool whole>
__device__ __forceinline__ void chunk_moments(const T* __restrict__ x, Compute<T>* __restrict__ partials,
                                              const Plan& plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    const Block block(plan);
    Walk<N> walk(plan, block);
    Moments<V> found[kOwn] = {};
    if (walk.left > 0) {
        V first[kOwn];
        first_values(x + block.seed * plan.rows * plan.channels * plan.inner, plan, walk, first);
        x += walk.base;
        // How values are grouped, like everything about sums, depends on the shape and not on `whole`.
        if (kOwn > 1 || plan.inner % N == 0) {
#pragma unroll 1
            while (walk.left >= U) moments_step<U, whole>(x, first, found, walk);
        }
#pragma unroll 1
        while (walk.left > 0) moments_step<1, whole>(x, first, found, walk);
    }
    partials += (block.seed * plan.chunks + block.chunk) * 3 * plan.channels;
    if constexpr (kOwn > 1) {
        __shared__ V shared[3][kOwn][kThreads];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            shared[0][i][threadIdx.x] = found[i].count;
            shared[1][i][threadIdx.x] = found[i].mean;
            shared[2][i][threadIdx.x] = found[i].squares;
        }
        __syncthreads();
        const Channels channels = Channels::of<N>(plan, block.tile);
        const int inner = static_cast<int>(plan.inner), c = threadIdx.x;
        if (c >= channels.count) return;
        V count = 0, sum = 0, squares = 0;
#pragma unroll 1
        for (int column = c * inner; column < (c + 1) * inner; ++column) {
            const int i = column % N;
#pragma unroll 4
            for (int y = 0, n = column / N; y < plan.down; ++y, n += plan.across) {
                count += shared[0][i][n];
                sum += shared[0][i][n] * shared[1][i][n];
            }
        }
        const V mean = sum / count;
#pragma unroll 1
        for (int column = c * inner; column < (c + 1) * inner; ++column) {
            const int i = column % N;
#pragma unroll 4
            for (int y = 0, n = column / N; y < plan.down; ++y, n += plan.across) {
                const V apart = shared[1][i][n] - mean;
                squares += shared[2][i][n] + shared[0][i][n] * apart * apart;
            }
        }
        partials += channels.first + c;
        partials[0] = count;
        partials[plan.channels] = mean;
        partials[2 * plan.channels] = squares;
    } else {
        __shared__ BlockSums<2, 1, kThreads, V> sums;
        V values[2] = {found[0].count, found[0].count * found[0].mean};
        block_sums(values, sums);
        const V count = sums.totals[0][0], mean = sums.totals[1][0] / count, apart = found[0].mean - mean;
        V squares[2] = {found[0].squares + found[0].count * apart * apart, 0};
        block_sums(squares, sums);
        if (threadIdx.x != 0) return;
        partials += block.tile;
        partials[0] = count;
        partials[plan.channels] = mean;
        partials[2 * plan.channels] = sums.totals[0][0];
    }
}

// What chunk_moments left, merged for the channels of a block; all of its threads must come. x is that of the seed,
// partials too. Afterwards every thread may read mean and var.
template <class V>
struct MergedMoments {
    V mean[kWidestTile], var[kWidestTile];
    V partial[3][kThreads];
};

template <class T>
__device__ __forceinline__ void merge_chunks(const T* __restrict__ x, const Compute<T>* __restrict__ partials,
                                             const Channels& channels, const Plan& plan,
                                             MergedMoments<Compute<T>>& shared) {
    using V = Compute<T>;
    const int c = threadIdx.x % channels.count, y = threadIdx.x / channels.count;
    const int room = blockDim.x / channels.count, down = room < 16 ? room : 16;
    if (y < down) {
        Moments<V> found = {};
        const V* from = partials + channels.first + c + y * 3 * plan.channels;
#pragma unroll 4
        for (int64_t chunk = y; chunk < plan.chunks; chunk += down, from += down * 3 * plan.channels)
            found.merge(from[0], from[plan.channels], from[2 * plan.channels]);
        shared.partial[0][threadIdx.x] = found.count;
        shared.partial[1][threadIdx.x] = found.mean;
        shared.partial[2][threadIdx.x] = found.squares;
    }
    __syncthreads();
    if (threadIdx.x < channels.count) {
        V count = 0, sum = 0, squares = 0;
#pragma unroll 1
        for (int n = c; n < down * channels.count; n += channels.count) {
            count += shared.partial[0][n];
            sum += shared.partial[0][n] * shared.partial[1][n];
        }
        const V mean = sum / count;
#pragma unroll 1
        for (int n = c; n < down * channels.count; n += channels.count) {
            const V apart = shared.partial[1][n] - mean;
            squares += shared.partial[2][n] + shared.partial[0][n] * apart * apart;
        }
        shared.mean[c] = load_either<T>(x, false, (channels.first + c) * plan.inner) + mean;
        shared.var[c] = squares / count;
    }
    __syncthreads();
}

// Mean and variance of what a block of plan_held holds in U slices, of which slice j has count[j] elements, or none.
// All of the block's threads must come.
template <class T, int N, int U, template <int> class Walk, int across, int threads>
__device__ __forceinline__ void held_moments(const Pack<T, N> (&packs)[U], const int (&count)[U],
                                             const Compute<T> (&first)[Walk<N>::kOwn], Compute<T> inverse_n,
                                             Compute<T> (&mean)[Walk<N>::kOwn], Compute<T> (&var)[Walk<N>::kOwn],
                                             BlockSums<Walk<N>::kOwn, across, threads, Compute<T>>& shared) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    V values[U][N], sums[kOwn] = {};
#pragma unroll
    for (int j = 0; j < U; ++j) {
        widen(packs[j], values[j]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            values[j][i] -= first[i % kOwn];
            if (i < count[j]) sums[i % kOwn] += values[j][i];
        }
    }
    block_sums(sums, shared);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        mean[i] = shared.totals[i][threadIdx.x % across] * inverse_n;
        sums[i] = 0;
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const V apart = values[j][i] - mean[i % kOwn];
            if (i < count[j]) sums[i % kOwn] += apart * apart;
        }
    }
    block_sums(sums, shared);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        var[i] = shared.totals[i][threadIdx.x % across] * inverse_n;
        mean[i] += first[i];
    }
}

}  // namespace ladderfast::cuda

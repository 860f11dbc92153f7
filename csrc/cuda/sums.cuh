// Sums over the threads of a block, in an order that depends on the block's shape alone.
#pragma once

#include <cuda_runtime.h>

namespace ladderfast::cuda {

// Sum of `down` values that lie `across` apart, in four strands.
template <class V>
__device__ __forceinline__ V strided_sum(const V* values, int across, int down) {
    V strand[4] = {};
    int y = 0;
#pragma unroll 1
    for (; y + 4 <= down; y += 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) strand[i] += values[(y + i) * across];
    }
#pragma unroll 1
    for (; y < down; ++y) strand[0] += values[y * across];
    return (strand[0] + strand[1]) + (strand[2] + strand[3]);
}

// How many of `live` values a lane holds after lane_sums.
__host__ __device__ constexpr int lane_share(int live, int stride, int last) {
    for (; stride >= last; stride /= 2) live = live % 2 == 0 ? live / 2 : live;
    return live;
}

// Sums `live` values over the lanes of a warp that are `stride`, `stride / 2`, .., `last` apart. While their number is
// even a lane gives half of them away and keeps the other half: values v[0..lane_share) are then the sums number
// result, result + 1, ... All 32 lanes must come.
template <int live, int stride, int last, int K, class V>
__device__ __forceinline__ int lane_sums(V (&v)[K]) {
    if constexpr (stride < last) {
        return 0;
    } else if constexpr (live % 2 == 0) {
        constexpr int half = live / 2;
        const bool upper = threadIdx.x & stride;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const V kept = upper ? v[i + half] : v[i], given = upper ? v[i] : v[i + half];
            v[i] = kept + __shfl_xor_sync(0xffffffffu, given, stride);
        }
        return (upper ? half : 0) + lane_sums<half, stride / 2, last>(v);
    } else {
#pragma unroll
        for (int i = 0; i < live; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], stride);
        return lane_sums<live, stride / 2, last>(v);
    }
}

// Memory that block_sums needs for blocks of up to `threads` threads.
template <int K, int across, int threads, class V>
struct BlockSums {
    V warps[threads / 32][K * across];
    V totals[K][across];
};

// Sums K values over the threads whose number is the same modulo `across`, a power of two up to 32; every thread may
// read shared.totals[k][threadIdx.x % across] then. Whole warps, all of which must come; `values` is overwritten.
template <int K, int across, int threads, class V>
__device__ __forceinline__ void block_sums(V (&values)[K], BlockSums<K, across, threads, V>& shared) {
    const int warp = threadIdx.x / 32, x = threadIdx.x % across;
    const int first = lane_sums<K, 16, across>(values);
#pragma unroll
    for (int i = 0; i < lane_share(K, 16, across); ++i) shared.warps[warp][(first + i) * across + x] = values[i];
    __syncthreads();
#pragma unroll 1
    for (int n = threadIdx.x; n < K * across; n += blockDim.x)
        shared.totals[n / across][n % across] = strided_sum(&shared.warps[0][n], K * across, blockDim.x / 32);
    __syncthreads();
}

}  // namespace ladderfast::cuda

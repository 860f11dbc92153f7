// How the threads of a pass go over the packed layout (seeds, rows, channels, inner). A thread stays with its channels
// and walks over slices of N neighbouring elements. There are two walks:
//
//   columns  inner <= 16, dense and channels-last tensors among them. A row is channels * inner columns; a thread owns
//            two of them and goes down the rows. Two, not more, because a column's parameters and sums take 22
//            registers or more in a backward pass.
//   runs     inner > 16. A block takes one channel and a stretch of its slices of 16 bytes, which its threads share.
//
// How the work is cut depends on the shape and the element type alone, never on the device or on an address: sums have
// the same bits everywhere. A plan is made by each op; what is common to all plans is here.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "elements.cuh"

namespace ladderfast::cuda {

constexpr int kThreads = 256;
constexpr int64_t kLongestColumnRun = 16;

constexpr int kColumns = 2;  // elements of a slice, columns
template <class T>
constexpr int kRun = 16 / sizeof(T);  // and runs

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a pass is cut into blocks. Blocks are counted tile first, then chunk, then seed, so that neighbours in time are
// neighbours in memory.
struct Plan {
    int64_t rows, channels, inner;
    int64_t width;   // partial sums in a row: columns, or channels where the walk is over runs
    int64_t tiles;   // columns: tiles of a row; runs: channels
    int64_t chunks;  // stretches of rows, or of a channel's slices
    int threads, steps;
    int across, down;            // columns: the threads of a block form `down` rows of `across` slices
    int slices;                  // runs: slices in a run
    int jump_rows, jump_slices;  // runs: the way to a thread's next slice
    bool columns;
};

struct Block {
    int64_t seed;
    int chunk, tile;

    __device__ explicit Block(const Plan& plan) {
        const unsigned tiles = static_cast<unsigned>(plan.tiles), chunks = static_cast<unsigned>(plan.chunks);
        const unsigned above = blockIdx.x / tiles;
        tile = blockIdx.x % tiles;
        chunk = above % chunks;
        seed = above / chunks;
    }
};

// A walk says where a thread's slices are: `base` is the same for the block, `offset` is added to it; `left` slices
// remain, and `count` elements of the present one exist.
template <int N>
struct ColumnWalk {
    static constexpr int kOwn = N;  // sets of parameters that a thread keeps
    int64_t base;
    uint32_t offset, stride;
    int left, count, column;

    __device__ ColumnWalk(const Plan& plan, const Block& block) {
        const int x = threadIdx.x % plan.across, y = threadIdx.x / plan.across;
        const int64_t first = static_cast<int64_t>(block.chunk) * (plan.down * plan.steps);
        const int64_t rest = plan.rows - first;
        const int rows = rest < plan.down * plan.steps ? static_cast<int>(rest) : plan.down * plan.steps;
        const int width = static_cast<int>(plan.width), tile = block.tile * (plan.across * N);
        column = tile + x * N;
        count = width - column < N ? width - column : N;
        base = (block.seed * plan.rows + first) * width + tile;
        offset = static_cast<uint32_t>(y) * width + x * N;
        stride = static_cast<uint32_t>(plan.down) * width;
        left = y < plan.down && y < rows && count > 0 ? (rows - y + plan.down - 1) / plan.down : 0;
    }

    __device__ void next() { offset += stride; }

    // Channel of the thread's element i, any channel where that does not exist.
    __device__ int channel(const Plan& plan, int i) const {
        if (i >= count) return 0;
        return plan.inner == 1 ? column + i : (column + i) / static_cast<int>(plan.inner);
    }
};

template <int N>
struct RunWalk {
    static constexpr int kOwn = 1;
    int64_t base, offset, stride, wrap;
    int left, count, slice, slices, jump, inner, tile;

    __device__ RunWalk(const Plan& plan, const Block& block) {
        const int64_t row = plan.channels * plan.inner;
        const uint32_t first = static_cast<uint32_t>(block.chunk) * (plan.threads * plan.steps) + threadIdx.x;
        const uint32_t all = static_cast<uint32_t>(plan.rows) * plan.slices;
        const uint32_t more = first < all ? (all - first + plan.threads - 1) / plan.threads : 0;
        const uint32_t r = first / plan.slices;
        tile = block.tile;
        slices = plan.slices;
        inner = static_cast<int>(plan.inner);
        slice = static_cast<int>(first - r * slices);
        jump = plan.jump_slices;
        base = (block.seed * plan.rows * plan.channels + block.tile) * plan.inner;
        offset = r * row + static_cast<int64_t>(slice) * N;
        stride = plan.jump_rows * row + static_cast<int64_t>(plan.jump_slices) * N;
        wrap = row - static_cast<int64_t>(slices) * N;
        left = more < static_cast<uint32_t>(plan.steps) ? static_cast<int>(more) : plan.steps;
        count = inner - slice * N < N ? inner - slice * N : N;
    }

    __device__ void next() {
        offset += stride;
        slice += jump;
        if (slice >= slices) {
            slice -= slices;
            offset += wrap;
        }
        count = inner - slice * N < N ? inner - slice * N : N;
    }

    __device__ int channel(const Plan&, int) const { return tile; }
};

// Walks count in 32 bits: a row of 2^31 columns and a channel of 2^33 elements are too much for them.
template <class Shape>
bool fits(const Shape& shape) {
    constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);
    if (shape.inner <= kLongestColumnRun) return shape.channels <= kMost / (shape.inner > 0 ? shape.inner : 1);
    return shape.inner <= kMost && shape.rows <= 2 * kMost / ceil_div(shape.inner, 2);
}

template <class Shape>
bool empty(const Shape& shape) {
    return shape.seeds == 0 || shape.rows == 0 || shape.channels == 0 || shape.inner == 0;
}

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
cudaError_t dispatch(int dtype, int params_dtype, const F& f) {
    if (params_dtype != dtype && params_dtype != kFloat32) return cudaErrorInvalidValue;
    switch (dtype) {
        case kFloat32:
            return f(static_cast<float*>(nullptr));
        case kFloat64:
            return f(static_cast<double*>(nullptr));
        case kBFloat16:
            return f(static_cast<bfloat16*>(nullptr));
        case kFloat16:
            return f(static_cast<float16*>(nullptr));
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace ladderfast::cuda

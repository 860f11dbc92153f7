// What the passes over Tagger's pixels share: how they are cut, and how groups are read.
//
// A thread takes N neighbouring pixels of a row and goes over their groups: up to four groups stay in registers, with
// more of them the later passes read again, from the caches. A block takes a tile of slices and some rows; how the work
// is cut depends on the shape and the element type alone, never on the device or on an address, so that sums over
// pixels have the same bits everywhere. Slices that are unaligned or incomplete are accessed by element.
#pragma once

#include "../tagger.h"

#include "../math/host_device.h"
#include "elements.cuh"
#include "lanes.cuh"
#include "launch.cuh"

#include <type_traits>

namespace ladderfast::cuda::tagger {
namespace {

#include "../math/tagger.h"

constexpr int kThreads = 256;
constexpr int kHeld = 4;  // groups that stay in registers
template <class T>
constexpr int kSlice = sizeof(T) == 8 ? 1 : 4;  // elements of a slice

// Blocks are counted tile first, then chunk of rows, then seed.
struct Plan {
    int64_t rows;    // of a seed
    int64_t pixels;  // of a row
    int groups, tiles, chunks;
    int threads, across, down, steps;  // `down` rows of `across` slices, `steps` times
};

// Where a thread works: `count` pixels from `pixel` on, rows [row, row_end) by `down`.
struct Place {
    int64_t row, row_end, pixel;
    int64_t seed;
    int count;

    __device__ Place(const Plan& plan, int n) {
        const unsigned tiles = static_cast<unsigned>(plan.tiles), chunks = static_cast<unsigned>(plan.chunks);
        const unsigned above = blockIdx.x / tiles, tile = blockIdx.x % tiles;
        const int x = threadIdx.x % plan.across, y = threadIdx.x / plan.across;
        seed = above / chunks;
        const int64_t first = static_cast<int64_t>(above % chunks) * (plan.down * plan.steps);
        const int64_t rest = plan.rows - first, most = plan.down * plan.steps;
        pixel = (static_cast<int64_t>(tile) * plan.across + x) * n;
        const int64_t left = plan.pixels - pixel;
        count = left < n ? static_cast<int>(left) : n;
        row = seed * plan.rows + first + y;
        row_end = y < plan.down && count > 0 ? seed * plan.rows + first + (rest < most ? rest : most) : row;
    }
};

template <class T, int N>
struct View {
    using V = Lanes<Compute<T>, N>;
    const T* data;
    int64_t row, group;

    __host__ explicit View(const TaggerInput& t) : data(static_cast<const T*>(t.data)), row(t.row), group(t.group) {}

    template <bool whole>
    __device__ __forceinline__ V load(const Place& p, int64_t r, int k) const {
        V v;
        widen(cuda::load<whole, N>(data + r * row + k * group + p.pixel, p.count), v.at);
        return v;
    }
};

template <class T, int N>
struct Inputs {
    View<T, N> x, z, m;
    const void* scalar;
    bool float_scalar;

    __host__ Inputs(const TaggerInputs& in, bool float_scalar)
        : x(in.x), z(in.z), m(in.m), scalar(in.scalar), float_scalar(float_scalar) {}
};

template <bool whole, class T, int N>
__device__ __forceinline__ void write(T* to, const Place& p, int64_t row, int64_t pixels,
                                      const Lanes<Compute<T>, N>& value) {
    store<whole, N>(to + row * pixels + p.pixel, value.at, p.count);
}

template <class V, class T>
__device__ __forceinline__ GaussianScalar<V> gaussian_scalar(const void* variance, bool float_variance, int64_t seed) {
    const double v = load_either<T>(variance, float_variance, seed);
    const double two_pi_v = 6.283185307179586 * v;
    return {constant<V>(-0.7213475204444817 / v),
            constant<V>(1 / sqrt(two_pi_v)),
            constant<V>(1 / v),
            constant<V>(0.5 * log(two_pi_v)),
            constant<V>(sizeof(Compute<T>) == 4 ? 126 : 1022),
            constant<V>(sizeof(Compute<T>) == 4 ? 0x1p126 : 0x1p1022)};
}

template <class V, class T, int N>
__device__ __forceinline__ GaussianScalar<V> gaussian_scalar(const Inputs<T, N>& in, int64_t seed) {
    return gaussian_scalar<V, T>(in.scalar, in.float_scalar, seed);
}

template <class V, class T, int N>
__device__ __forceinline__ BernoulliScalar<V> bernoulli_scalar(const Inputs<T, N>& in, int64_t seed) {
    const Compute<T> b = load_either<T>(in.scalar, in.float_scalar, seed);
    return {constant<V>(b), constant<V>(1 - 2 * b)};
}

// A loop over groups: unrolled over those that are held, `k < groups` guarding each; else over all.
#define LF_EACH_GROUP(k) \
    _Pragma("unroll") for (int k = 0; k < (held ? held : plan.groups); ++k) if (!held || k < plan.groups)

// A group's value from the first pass on: kept, or made again.
template <class V, int held>
struct Kept {
    V at[held ? held : 1];
};

// Sum of a value of each thread, in thread 0. The block has `threads` threads.
__device__ __forceinline__ double block_sum(double value, int threads) {
    __shared__ double shared[kThreads];
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int n = threads; n > 1;) {
        const int half = (n + 1) / 2;
        if (static_cast<int>(threadIdx.x) < n - half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
        n = half;
    }
    return shared[0];
}

// One pass; partials has an entry for each block where `sums`.
template <class Pass, class T, int N, int held, bool whole, bool sums>
__global__ void __launch_bounds__(kThreads, 2) over_rows(Pass pass, double* __restrict__ partials, Plan plan) {
    const Place place(plan, N);
    Compute<T> sum = 0;
    if (place.row < place.row_end) {
        const auto scalar = pass.scalar(place.seed);
#pragma unroll 1
        for (int64_t r = place.row; r < place.row_end; r += plan.down)
            pass.template row<held, whole>(plan, place, scalar, r, sum);
    }
    if constexpr (sums) {
        const double total = block_sum(sum, plan.threads);
        if (threadIdx.x == 0) partials[blockIdx.x] = total;
    }
}

// partials (seeds, per_seed) -> grad (seeds), a block for each: their sum or, for a variance v, that over 2 v.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const double* __restrict__ partials, const void* __restrict__ variance, void* __restrict__ grad,
                 bool is_float, int64_t per_seed) {
    double sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < per_seed; i += kThreads) sum += partials[blockIdx.x * per_seed + i];
    const double total = block_sum(sum, kThreads);
    if (threadIdx.x != 0) return;
    const double over = variance == nullptr ? 1 : 2.0 * load_either<T>(variance, is_float, blockIdx.x);
    store_either<T>(grad, is_float, blockIdx.x, static_cast<Compute<T>>(total / over));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool empty(const TaggerShape& s) { return s.seeds == 0 || s.rows == 0 || s.groups == 0 || s.pixels == 0; }

// Blocks are counted, and groups and slices of a row are, in 32 bits.
bool fits(const TaggerShape& s) {
    constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);
    return s.groups <= kMost && s.pixels <= kMost && s.rows <= kMost;
}

Plan plan_for(const TaggerShape& s, int n) {
    Plan plan = {};
    plan.rows = s.rows / s.seeds;
    plan.pixels = s.pixels;
    plan.groups = static_cast<int>(s.groups);
    const int64_t slices = ceil_div(s.pixels, n);
    plan.tiles = static_cast<int>(ceil_div(slices, kThreads));
    plan.across = static_cast<int>(ceil_div(slices, plan.tiles));
    plan.down = kThreads / plan.across;
    plan.threads = static_cast<int>(ceil_div(int64_t{plan.across} * plan.down, 32) * 32);
    // Several rows for a thread once the chip is full, so that there are fewer partial sums.
    plan.steps = 1;
    while (plan.steps < 16 && s.seeds * plan.tiles * ceil_div(plan.rows, int64_t{plan.down} * plan.steps) > 4096)
        plan.steps *= 2;
    plan.chunks = static_cast<int>(ceil_div(plan.rows, int64_t{plan.down} * plan.steps));
    return plan;
}

int64_t blocks_of(const Plan& plan, const TaggerShape& s) { return s.seeds * plan.chunks * plan.tiles; }

template <class... Strides>
bool all_multiples(int64_t n, Strides... strides) {
    return ((strides % n == 0) && ...);
}

// Whether every slice of these is whole and aligned.
template <class T>
bool sliced(int64_t pixels, const TaggerInput& t) {
    constexpr int n = kSlice<T>;
    return all_multiples(n, pixels, t.row, t.group) && aligned_to(n * sizeof(T), t.data);
}

template <class T>
bool sliced(int64_t pixels, const TaggerInputs& in) {
    return sliced<T>(pixels, in.x) && sliced<T>(pixels, in.z) && sliced<T>(pixels, in.m);
}

template <class T, bool sums, class Pass>
cudaError_t run(const Pass& pass, bool whole, double* partials, const TaggerShape& shape, void* stream) {
    constexpr int n = kSlice<T>;
    const Plan plan = plan_for(shape, n);
    auto kernel = over_rows<Pass, T, n, 0, false, sums>;
    if (whole)
        kernel =
            shape.groups <= kHeld ? over_rows<Pass, T, n, kHeld, true, sums> : over_rows<Pass, T, n, 0, true, sums>;
    return launch(kernel, blocks_of(plan, shape), plan.threads, stream, pass, partials, plan);
}

template <class T>
cudaError_t run_sum(const double* partials, const void* variance, void* grad_variance, bool float_variance,
                    const TaggerShape& shape, void* stream) {
    const int64_t per_seed = empty(shape) ? 0 : blocks_of(plan_for(shape, kSlice<T>), shape) / shape.seeds;
    return launch(sum_partials<T>, shape.seeds, kThreads, stream, partials, variance, grad_variance, float_variance,
                  per_seed);
}

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
cudaError_t dispatch(int dtype, int scalar_dtype, const TaggerShape& shape, const F& f) {
    if (scalar_dtype != dtype && scalar_dtype != kFloat32) return cudaErrorInvalidValue;
    if (!fits(shape)) return cudaErrorInvalidValue;
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

}  // namespace
}  // namespace ladderfast::cuda::tagger

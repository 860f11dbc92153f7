// The Gaussian combinator on NVIDIA GPUs. Contract in ../combinator.h, formulas in ../math/combinator.h.
//
// A thread stays with its channels: it keeps their parameters, and in the backward pass their ten sums, in registers
// and walks over slices of N neighbouring elements (walks.cuh), U of them in flight. Slices that are unaligned or
// incomplete are accessed by element.
//
// What bounds it, per element (float32 / 16 bits; instructions are those of the loop over whole slices on sm_90,
// without squash_v). Nothing of this has been measured on a GPU yet.
//
//                     bytes      special functions     instructions, columns     runs
//   forward           12 / 6     4, with squash_v 6           28 / 26           28 / 22
//   backward          20 / 10    4, with squash_v 6           52 / 51           50 / 45
//
// sum_partials reads, from the L2 cache, ten sums for each column or channel of a block: a few percent of the bytes of
// backward in large tensors. A multiprocessor takes 16 special functions and 128 other instructions in a cycle, so that
// an H200 should be bound by memory everywhere but in 16-bit forward with squash_v, which its special functions bound.
#include "../combinator.h"

#include "combinator.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "sums.cuh"
#include "walks.cuh"

#include <type_traits>

namespace ladderfast::cuda {
namespace {

constexpr int kSums = kCombinatorParams;

template <int U, bool whole, bool squash, class T, int N, template <int> class Walk>
__device__ __forceinline__ void forward_step(const T* __restrict__ z, const T* __restrict__ u, T* __restrict__ z_hat,
                                             const Params<T> (&p)[Walk<N>::kOwn], Walk<N>& walk) {
    Pack<T, N> zs[U], us[U];
    decltype(walk.offset) at[U];
    int count[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
        at[j] = walk.offset;
        count[j] = walk.count;
        us[j] = load<whole, N>(advance(u, at[j]), count[j]);
        zs[j] = load<whole, N>(advance(z, at[j]), count[j]);
        walk.next();
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
        Compute<T> z_[N], u_[N], out[N];
        widen(zs[j], z_);
        widen(us[j], u_);
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = combinator_forward<squash>(z_[i], u_[i], p[Walk<N>::kOwn == 1 ? 0 : i]);
        store<whole, N>(advance(z_hat, at[j]), out, count[j]);
    }
    walk.left -= U;
}

template <class T, int N, int U, template <int> class Walk, bool whole, bool squash>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ z, const T* __restrict__ u, const void* __restrict__ params, T* __restrict__ z_hat,
            bool float_params, Plan plan) {
    const Block block(plan);
    Walk<N> walk(plan, block);
    if (walk.left == 0) return;
    Params<T> p[Walk<N>::kOwn];
#pragma unroll
    for (int i = 0; i < Walk<N>::kOwn; ++i)
        p[i] = load_combinator<T>(params, float_params, block.seed, plan.channels, walk.channel(plan, i));
    z += walk.base;
    u += walk.base;
    z_hat += walk.base;
    if (whole)
        while (walk.left >= U) forward_step<U, whole, squash>(z, u, z_hat, p, walk);
#pragma unroll 1
    while (walk.left > 0) forward_step<1, whole, squash>(z, u, z_hat, p, walk);
}

template <int U, bool whole, bool squash, class T, int N, template <int> class Walk>
__device__ __forceinline__ void backward_step(const T* __restrict__ grad, const T* __restrict__ z,
                                              const T* __restrict__ u, T* __restrict__ grad_z, T* __restrict__ grad_u,
                                              const Params<T> (&p)[Walk<N>::kOwn],
                                              Compute<T> (&sums)[Walk<N>::kOwn][kSums], Walk<N>& walk) {
    Pack<T, N> gs[U], zs[U], us[U];
    decltype(walk.offset) at[U];
    int count[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
        at[j] = walk.offset;
        count[j] = walk.count;
        us[j] = load<whole, N>(advance(u, at[j]), count[j]);
        zs[j] = load<whole, N>(advance(z, at[j]), count[j]);
        gs[j] = load<whole, N>(advance(grad, at[j]), count[j]);
        walk.next();
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
        Compute<T> g_[N], z_[N], u_[N], out_z[N], out_u[N];
        widen(us[j], u_);
        widen(zs[j], z_);
        widen(gs[j], g_);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            // Elements that are not there are zero, and so are their terms.
            constexpr bool one = Walk<N>::kOwn == 1;
            combinator_backward<squash>(g_[i], z_[i], u_[i], p[one ? 0 : i], out_z[i], out_u[i], sums[one ? 0 : i]);
        }
        store<whole, N>(advance(grad_z, at[j]), out_z, count[j]);
        store<whole, N>(advance(grad_u, at[j]), out_u, count[j]);
    }
    walk.left -= U;
}

// Blocks of backward that a multiprocessor must have room for; 0 leaves it to the compiler. In columns of 16 bits
// arithmetic comes near the memory's time, and a third block hides more of it. In runs by element the compiler would go
// for a fourth one and spill.
template <class T>
constexpr int resident(bool columns, bool whole) {
    return columns == whole && sizeof(T) < (columns ? 4 : 8) ? 3 : 0;
}

// Gradients of z and u, and the block's sums for those of the parameters: partials (seeds, chunks, 10, width).
template <class T, int N, int U, template <int> class Walk, bool whole, bool squash>
__global__ void __launch_bounds__(kThreads, resident<T>(Walk<N>::kOwn > 1, whole))
    backward(const T* __restrict__ grad, const T* __restrict__ z, const T* __restrict__ u,
             const void* __restrict__ params, T* __restrict__ grad_z, T* __restrict__ grad_u,
             Compute<T>* __restrict__ partials, bool float_params, Plan plan) {
    constexpr int kOwn = Walk<N>::kOwn;
    // The padding puts neighbouring rows half the banks apart.
    __shared__ Compute<T> shared[kSums * kOwn][kThreads + 16];
    const Block block(plan);
    Walk<N> walk(plan, block);
    Compute<T> sums[kOwn][kSums] = {};

    if (walk.left > 0) {
        Params<T> p[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            p[i] = load_combinator<T>(params, float_params, block.seed, plan.channels, walk.channel(plan, i));
        grad += walk.base;
        z += walk.base;
        u += walk.base;
        grad_z += walk.base;
        grad_u += walk.base;
        if (whole)
            while (walk.left >= U) backward_step<U, whole, squash>(grad, z, u, grad_z, grad_u, p, sums, walk);
#pragma unroll 1
        while (walk.left > 0) backward_step<1, whole, squash>(grad, z, u, grad_z, grad_u, p, sums, walk);
    }

#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) shared[k * kOwn + i][threadIdx.x] = sums[i][k];
    }
    __syncthreads();
    partials += (block.seed * plan.chunks + block.chunk) * kSums * plan.width;
    if (kOwn > 1) {
        const int columns = plan.across * kOwn;
        const int64_t tile = block.tile * columns;
#pragma unroll 1
        for (int n = threadIdx.x; n < kSums * columns; n += blockDim.x) {
            const int k = n / columns, column = n % columns;
            if (tile + column >= plan.width) continue;
            partials[k * plan.width + tile + column] =
                strided_sum(&shared[k * kOwn + column % kOwn][column / kOwn], plan.across, plan.down);
        }
    } else {
        // Sixteen threads add up a row. A multiple of 32 of them in all, so that warps stay whole.
#pragma unroll 1
        for (int n = threadIdx.x; n < kSums * 16; n += blockDim.x) {
            const int k = n / 16, lane = n % 16;
            Compute<T> sum = strided_sum(&shared[k][lane], 16, plan.threads / 16);
#pragma unroll
            for (int apart = 8; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
            if (lane == 0) partials[k * plan.width + block.tile] = sum;
        }
    }
}

// partials (seeds, chunks, 10, channels * inner) -> grad_params (seeds, 10, channels). A block takes `across` channels
// of one of the ten; `down` threads share a channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const Compute<T>* __restrict__ partials, const void* __restrict__ params,
                 void* __restrict__ grad_params, bool float_params, int64_t chunks, int64_t channels, int inner,
                 int groups, int across, int down) {
    __shared__ double shared[kThreads];
    const unsigned group = blockIdx.x % groups, above = blockIdx.x / groups;
    const int row = above % kSums;
    const int64_t seed = above / kSums;
    const int x = threadIdx.x % across, y = threadIdx.x / across;
    const int64_t channel = static_cast<int64_t>(group) * across + x;
    const bool mine = y < down && channel < channels;

    double sum = 0.0;
    if (mine) {
        // Term n is that of chunk n / inner and of the channel's column n % inner.
        const int64_t width = channels * inner, terms = chunks * inner;
        const int jump = down % inner;
        const int64_t stride = (down / inner) * kSums * width + jump, wrap = kSums * width - inner;
        int column = y % inner;
        const Compute<T>* from =
            partials + ((seed * chunks + y / inner) * kSums + row) * width + channel * inner + column;
#pragma unroll 4
        for (int64_t n = y; n < terms; n += down) {
            sum += *from;
            from += stride;
            column += jump;
            if (column >= inner) {
                column -= inner;
                from += wrap;
            }
        }
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int n = down; n > 1;) {
        const int half = (n + 1) / 2;
        if (y < n - half) shared[threadIdx.x] += shared[threadIdx.x + half * across];
        __syncthreads();
        n = half;
    }
    if (!mine || y != 0) return;
    Compute<T> sums[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = static_cast<Compute<T>>(shared[threadIdx.x]);
    combinator_finish(sums, load_combinator<T>(params, float_params, seed, channels, channel));
    Compute<T> value = sums[0];
#pragma unroll
    for (int k = 1; k < kSums; ++k) value = k == row ? sums[k] : value;
    store_either<T>(grad_params, float_params, (seed * kSums + row) * channels + channel, value);
}

// Slices for a thread, 4 to 64: at first few, for enough blocks to fill the chip, then more, because what a block does
// once (parameters, partial sums) is spread over them.
int steps_for(int64_t slices) {
    int steps = 4;
    while (steps < 64 && slices > int64_t{steps} * kThreads * (steps < 8 ? 512 : 2048)) steps *= 2;
    return steps;
}

template <int N>
Plan plan_columns(const CombinatorShape& shape) {
    Plan plan = {};
    plan.rows = shape.rows;
    plan.channels = shape.channels;
    plan.inner = shape.inner;
    plan.width = shape.channels * shape.inner;
    plan.columns = true;
    const int64_t slices = ceil_div(plan.width, N);
    // 32 slices side by side are 128 bytes or more; more only where there are not rows enough for the block.
    int across = 32;
    while (across < kThreads && kThreads / across > shape.rows) across *= 2;
    plan.tiles = ceil_div(slices, across);
    plan.across = static_cast<int>(ceil_div(slices, plan.tiles));
    if (plan.tiles > 1) plan.across = static_cast<int>(ceil_div(plan.across, 8) * 8);
    // A thread's offsets from the block's first element are 32 bits wide.
    constexpr int64_t kReach = int64_t{1} << 31;
    int64_t down = kThreads / plan.across;
    if (down > 1 && down * plan.width > kReach) down = kReach / plan.width > 1 ? kReach / plan.width : 1;
    plan.down = static_cast<int>(down);
    plan.steps = steps_for(shape.seeds * shape.rows * slices);
    while (plan.steps > 1 && plan.steps * down * plan.width > kReach) plan.steps /= 2;
    plan.threads = static_cast<int>(ceil_div(plan.across * down, 32) * 32);
    plan.chunks = ceil_div(shape.rows, down * plan.steps);
    return plan;
}

template <int N>
Plan plan_runs(const CombinatorShape& shape) {
    Plan plan = {};
    plan.rows = shape.rows;
    plan.channels = shape.channels;
    plan.inner = shape.inner;
    plan.width = plan.tiles = shape.channels;
    plan.slices = static_cast<int>(ceil_div(shape.inner, N));
    const int64_t slices = shape.rows * plan.slices;
    plan.threads = kThreads;
    while (plan.threads > 32 && plan.threads * 4 > slices) plan.threads /= 2;
    plan.steps = steps_for(shape.seeds * shape.channels * slices);
    plan.chunks = ceil_div(slices, int64_t{plan.threads} * plan.steps);
    plan.jump_rows = plan.threads / plan.slices;
    plan.jump_slices = plan.threads % plan.slices;
    return plan;
}

template <class T>
Plan plan_for(const CombinatorShape& shape) {
    return shape.inner <= kLongestColumnRun ? plan_columns<kColumns>(shape) : plan_runs<kRun<T>>(shape);
}

template <class T, bool squash>
cudaError_t run_forward(const T* z, const T* u, const void* params, T* z_hat, bool float_params,
                        const CombinatorShape& shape, void* stream) {
    const Plan plan = plan_for<T>(shape);
    const int64_t blocks = plan.tiles * plan.chunks * shape.seeds;
    auto kernel = plan.columns ? forward<T, kColumns, 1, ColumnWalk, false, squash>
                               : forward<T, kRun<T>, 1, RunWalk, false, squash>;
    if constexpr (sizeof(T) < 8) {
        const int n = plan.columns ? kColumns : kRun<T>;
        if ((plan.columns ? plan.width : plan.inner) % n == 0 && aligned_to(n * sizeof(T), z, u, z_hat))
            kernel = plan.columns ? forward<T, kColumns, 4, ColumnWalk, true, squash>
                                  : forward<T, kRun<T>, 2, RunWalk, true, squash>;
    }
    return launch(kernel, blocks, plan.threads, stream, z, u, params, z_hat, float_params, plan);
}

template <class T, bool squash>
cudaError_t run_backward(const T* grad, const T* z, const T* u, const void* params, T* grad_z, T* grad_u,
                         Compute<T>* partials, bool float_params, const CombinatorShape& shape, void* stream) {
    const Plan plan = plan_for<T>(shape);
    const int64_t blocks = plan.tiles * plan.chunks * shape.seeds;
    auto kernel = plan.columns ? backward<T, kColumns, 1, ColumnWalk, false, squash>
                               : backward<T, kRun<T>, 1, RunWalk, false, squash>;
    if constexpr (sizeof(T) < 8) {
        const int n = plan.columns ? kColumns : kRun<T>;
        if ((plan.columns ? plan.width : plan.inner) % n == 0 && aligned_to(n * sizeof(T), grad, z, u, grad_z, grad_u))
            kernel = plan.columns ? backward<T, kColumns, 4, ColumnWalk, true, squash>
                                  : backward<T, kRun<T>, 2, RunWalk, true, squash>;
    }
    return launch(kernel, blocks, plan.threads, stream, grad, z, u, params, grad_z, grad_u, partials, float_params,
                  plan);
}

template <class T>
cudaError_t run_sums(const Compute<T>* partials, const void* params, void* grad_params, bool float_params,
                     const CombinatorShape& shape, void* stream) {
    const bool none = empty(shape);
    const Plan plan = none ? Plan{} : plan_for<T>(shape);
    const int across = static_cast<int>(shape.channels < 32 ? shape.channels : 32);
    const int64_t groups = ceil_div(shape.channels, across);
    const int inner = plan.columns ? static_cast<int>(shape.inner) : 1;
    return launch(sum_partials<T>, groups * kSums * shape.seeds, kThreads, stream, partials, params, grad_params,
                  float_params, plan.chunks, shape.channels, inner, static_cast<int>(groups), across,
                  kThreads / across);
}

}  // namespace
}  // namespace ladderfast::cuda

extern "C" {

int ladderfast_combinator_forward_cuda(const void* z, const void* u, const void* params, void* z_hat, int dtype,
                                       int params_dtype, int squash_v, const CombinatorShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (empty(*shape)) return cudaSuccess;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        const auto run = squash_v ? run_forward<T, true> : run_forward<T, false>;
        return run(static_cast<const T*>(z), static_cast<const T*>(u), params, static_cast<T*>(z_hat),
                   params_dtype == kFloat32, *shape, stream);
    });
}

int64_t ladderfast_combinator_workspace_cuda(const CombinatorShape* shape) {
    using namespace ladderfast::cuda;
    if (empty(*shape) || !fits(*shape)) return 0;
    // The types differ in their number of chunks, and float64 takes 8 bytes for a sum.
    int64_t bytes = 0;
    const auto need = [&](const Plan& plan, size_t size) {
        const int64_t its = shape->seeds * plan.chunks * kSums * plan.width * static_cast<int64_t>(size);
        if (its > bytes) bytes = its;
    };
    need(plan_for<double>(*shape), sizeof(double));
    need(plan_for<float>(*shape), sizeof(float));
    need(plan_for<bfloat16>(*shape), sizeof(float));
    return bytes;
}

int ladderfast_combinator_backward_cuda(const void* grad, const void* z, const void* u, const void* params,
                                        void* grad_z, void* grad_u, void* grad_params, void* workspace, int dtype,
                                        int params_dtype, int squash_v, const CombinatorShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (shape->seeds == 0 || shape->channels == 0) return cudaSuccess;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        const bool float_params = params_dtype == kFloat32;
        auto* const partials = static_cast<Compute<T>*>(workspace);
        if (!empty(*shape)) {
            const auto run = squash_v ? run_backward<T, true> : run_backward<T, false>;
            const cudaError_t error =
                run(static_cast<const T*>(grad), static_cast<const T*>(z), static_cast<const T*>(u), params,
                    static_cast<T*>(grad_z), static_cast<T*>(grad_u), partials, float_params, *shape, stream);
            if (error != cudaSuccess) return error;
        }
        return run_sums<T>(partials, params, grad_params, float_params, *shape, stream);
    });
}
}

// Pooling that keeps the where, and its unpooling, on NVIDIA GPUs, soft and hard. Contract in ../what_where.h, formulas
// in ../math/what_where.h.
//
// `kLanes` neighbouring threads share a window and its columns, `kRun` of them at a time, so that a warp reads whole
// stretches of a row; where channels are innermost a window is one thread's, and a warp reads neighbouring channels.
// Pooling goes over a window twice forward (maximum, sums) and three times backward; but for the first these reads are
// from the cache.
//
// What bounds it, per element of z in float32: k x k pooling moves 4 + 12 / k^2 bytes forward and 8 + 12 / k^2
// backward, with one special function each way. Unpooling moves 4 + 12 / k^2 forward and at most 4 + 24 / k^2 backward,
// where it reads four elements of a window. Hard, with where in bytes, pooling and unpooling move 4 + 5 / k^2 each, and
// the way back from unpooling one element of a window. Nothing of this has been measured on a GPU yet.
#include "../what_where.h"

#include "../math/host_device.h"
#include "elements.cuh"
#include "launch.cuh"

#include <type_traits>

namespace ladderfast::cuda {
namespace {

__device__ __forceinline__ float reciprocal(float x) { return 1.0f / x; }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// NaN stays NaN.
template <class V>
__device__ __forceinline__ V clamp_unit(V x) {
    return x < V(-1) ? V(-1) : x > V(1) ? V(1) : x;
}

__device__ __forceinline__ float exp2_of(float x) { return exp2_approx(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

template <class V>
__device__ __forceinline__ bool above_or_nan(V a, V b) {
    return a > b || a != a;
}
template <class V>
__device__ __forceinline__ V chosen(bool test, V a, V b) {
    return test ? a : b;
}

#include "../math/what_where.h"

constexpr int kThreads = 256;

struct Plan {
    int64_t height, width, inner;
    int64_t plane;  // outputs in one of `outer`
    uint32_t outputs, down, across, channels;
    int kernel_h, kernel_w;
};

// An output, its window in z, and the thread's part of it. Threads beyond the last output take part in warp operations
// with that one's window, and store nothing.
template <int kLanes>
struct Window {
    int64_t origin, position;  // in z, and in a channel of it
    uint32_t output, outer;
    int lane;
    bool exists;

    __device__ explicit Window(const Plan& plan) {
        uint32_t index = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
        lane = threadIdx.x % kLanes;
        exists = index < plan.outputs;
        if (!exists) index = plan.outputs - 1;
        uint32_t rest = index / plan.channels;
        const uint32_t channel = index - rest * plan.channels;
        uint32_t above = rest / plan.across;
        const uint32_t column = rest - above * plan.across;
        rest = above / plan.down;
        const uint32_t row = above - rest * plan.down;
        output = index;
        outer = rest;
        position =
            row * static_cast<int64_t>(plan.kernel_h) * plan.width + column * static_cast<int64_t>(plan.kernel_w);
        origin = (rest * plan.height * plan.width + position) * plan.inner + channel;
    }

    // Places in `where`.
    __device__ int64_t x(const Plan& plan) const { return output + outer * plan.plane; }
    __device__ int64_t y(const Plan& plan) const { return x(plan) + plan.plane; }
};

template <class T>
__device__ __forceinline__ Compute<T> read(const T* from) {
    return load_either<T>(from, false, 0);
}
template <class T>
__device__ __forceinline__ void write(T* to, Compute<T> value) {
    store_either<T>(to, false, 0, value);
}

// Coordinate of row or column k; `inverse` is 1 / (size - 1). Their product is exact at both ends.
template <class V>
__device__ __forceinline__ V coordinate(int k, int size, V inverse) {
    return static_cast<V>(2 * k - (size - 1)) * inverse;
}
template <class V>
__device__ __forceinline__ V inverse_of(int size) {
    return V(1) / static_cast<V>(size > 1 ? size - 1 : 1);
}

template <int kRun, class T>
__device__ __forceinline__ void read_run(const T* from, Compute<T> (&values)[kRun]) {
    if constexpr (kRun > 1)
        widen(load<true, kRun>(from, kRun), values);
    else
        values[0] = read(from);
}

template <int kRun, class T>
__device__ __forceinline__ void write_run(T* to, const Compute<T> (&values)[kRun]) {
    if constexpr (kRun > 1)
        store<true, kRun>(to, values, kRun);
    else
        write(to, values[0]);
}

template <int kLanes, class V>
__device__ __forceinline__ V sum_over_lanes(V value) {
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
    return value;
}

template <class V>
__device__ __forceinline__ V larger(V a, V b) {
    return a > b ? a : b;
}

// m, p and what the gradient needs with them; every lane has them. `most` is the window's maximum.
template <int kLanes, int kRun, class T>
__device__ __forceinline__ SoftPooled<Compute<T>> pool_window(const T* __restrict__ from, int lane, const Plan& plan,
                                                              Compute<T> scale, Compute<T>& most) {
    using V = Compute<T>;
    const int64_t pitch = plan.width * plan.inner;
    most = read(from);
    const T* at = from;
#pragma unroll 2
    for (int i = 0; i < plan.kernel_h; ++i, at += pitch)
#pragma unroll 1
        for (int j = lane * kRun; j < plan.kernel_w; j += kLanes * kRun) {
            V z[kRun];
            read_run<kRun>(at + j * plan.inner, z);
#pragma unroll
            for (int k = 0; k < kRun; ++k) most = larger(z[k], most);
        }
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) most = larger(__shfl_xor_sync(0xffffffffu, most, apart), most);

    const V across = inverse_of<V>(plan.kernel_w), down = inverse_of<V>(plan.kernel_h);
    SoftSums<V> sums = {};
    at = from;
#pragma unroll 2
    for (int i = 0; i < plan.kernel_h; ++i, at += pitch) {
        SoftSums<V> row = {};
#pragma unroll 1
        for (int j = lane * kRun; j < plan.kernel_w; j += kLanes * kRun) {
            V z[kRun];
            read_run<kRun>(at + j * plan.inner, z);
#pragma unroll
            for (int k = 0; k < kRun; ++k)
                soft_pool_add(z[k], exp2_of((z[k] - most) * scale), coordinate(j + k, plan.kernel_w, across), row);
        }
        soft_pool_add_row(row, coordinate(i, plan.kernel_h, down), sums);
    }
    sums.total = sum_over_lanes<kLanes>(sums.total);
    sums.z = sum_over_lanes<kLanes>(sums.z);
    sums.x = sum_over_lanes<kLanes>(sums.x);
    sums.y = sum_over_lanes<kLanes>(sums.y);
    return soft_pool_finish(sums);
}

// Of float64 the compiler would have six blocks on a multiprocessor, and spill.
template <class T, int kLanes, int kRun>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 4 : 0)
    pool_forward(const T* __restrict__ z, T* __restrict__ what, T* __restrict__ where, Compute<T> scale, Plan plan) {
    const Window<kLanes> window(plan);
    Compute<T> most;
    const auto pooled = pool_window<kLanes, kRun>(z + window.origin, window.lane, plan, scale, most);
    if (!window.exists || window.lane != 0) return;
    write(what + window.output, pooled.what);
    write(where + window.x(plan), pooled.x);
    write(where + window.y(plan), pooled.y);
}

template <class T, int kLanes, int kRun>
__global__ void __launch_bounds__(kThreads)
    pool_backward(const T* __restrict__ grad_what, const T* __restrict__ grad_where, const T* __restrict__ z,
                  T* __restrict__ grad_z, Compute<T> scale, Compute<T> beta, Plan plan) {
    using V = Compute<T>;
    const Window<kLanes> window(plan);
    const T* from = z + window.origin;
    V most;
    const SoftPooled<V> pooled = pool_window<kLanes, kRun>(from, window.lane, plan, scale, most);
    if (!window.exists) return;
    const SoftGradient<V> g =
        soft_pool_gradients(pooled, read(grad_what + window.output), read(grad_where + window.x(plan)),
                            read(grad_where + window.y(plan)), beta);
    const V across = inverse_of<V>(plan.kernel_w), down = inverse_of<V>(plan.kernel_h);
    const int64_t pitch = plan.width * plan.inner;
    T* to = grad_z + window.origin;
#pragma unroll 2
    for (int i = 0; i < plan.kernel_h; ++i, from += pitch, to += pitch) {
        const V of_row = soft_pool_row(g, coordinate(i, plan.kernel_h, down));
#pragma unroll 1
        for (int j = window.lane * kRun; j < plan.kernel_w; j += kLanes * kRun) {
            V values[kRun];
            read_run<kRun>(from + j * plan.inner, values);
#pragma unroll
            for (int k = 0; k < kRun; ++k) {
                const V e = exp2_of((values[k] - most) * scale);
                const V of_column = soft_pool_column(g, coordinate(j + k, plan.kernel_w, across));
                values[k] = soft_pool_gradient(g, values[k], e, of_column, of_row);
            }
            write_run<kRun>(to + j * plan.inner, values);
        }
    }
}

// Zeros for the columns and rows of z that fill no window: element `n` of those of one of `outer`. First come the
// columns at the right of windows, then the rows below them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    zero_rest(T* __restrict__ z, int64_t beside, int64_t all, int64_t count, int64_t columns, Plan plan) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (n >= count) return;
    const int64_t outer = n / all, in_plane = n - outer * all, pitch = plan.width * plan.inner;
    int64_t at = in_plane - beside + plan.down * static_cast<int64_t>(plan.kernel_h) * pitch;
    if (in_plane < beside) {
        const int64_t row = in_plane / columns;
        at = row * pitch + (pitch - columns) + (in_plane - row * columns);
    }
    write(z + outer * plan.height * pitch + at, Compute<T>(0));
}

// Where p places what along an axis: the first of two neighbours and the share of the second.
template <class V>
struct Place {
    int first;
    V share;

    // 32 eps: see `_placement` in the reference.
    __device__ Place(V p, int size) {
        const V at = unpool_place(p, static_cast<V>(size - 1) / 2);
        const V tolerance = sizeof(V) == 4 ? V(0x1p-18) : V(0x1p-47);
        const int last = size > 2 ? size - 2 : 0;
        first = at == at ? static_cast<int>(at + tolerance) : 0;
        if (first > last) first = last;
        share = at - static_cast<V>(first);
    }
};

template <class V>
__device__ __forceinline__ V slope_of(V p, int size) {
    return p >= V(-1) && p <= V(1) ? static_cast<V>(size - 1) / 2 : V(0);
}

template <class T, int kLanes, int kRun>
__global__ void __launch_bounds__(kThreads)
    unpool_forward_kernel(const T* __restrict__ what, const T* __restrict__ where, T* __restrict__ z, Plan plan) {
    using V = Compute<T>;
    const Window<kLanes> window(plan);
    if (!window.exists) return;
    const Place<V> across(read(where + window.x(plan)), plan.kernel_w),
        down(read(where + window.y(plan)), plan.kernel_h);
    const Corners<V> corners = unpool_forward(read(what + window.output), across.share, down.share);
    T* to = z + window.origin;
    const int64_t pitch = plan.width * plan.inner;
#pragma unroll 2
    for (int i = 0; i < plan.kernel_h; ++i, to += pitch) {
        const bool top = i == down.first, bottom = i == down.first + 1;
        const V left = top ? corners.top_left : bottom ? corners.bottom_left : V(0);
        const V right = top ? corners.top_right : bottom ? corners.bottom_right : V(0);
#pragma unroll 1
        for (int j = window.lane * kRun; j < plan.kernel_w; j += kLanes * kRun) {
            V values[kRun];
#pragma unroll
            for (int k = 0; k < kRun; ++k)
                values[k] = j + k == across.first ? left : j + k == across.first + 1 ? right : V(0);
            write_run<kRun>(to + j * plan.inner, values);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    unpool_backward_kernel(const T* __restrict__ grad_z, const T* __restrict__ what, const T* __restrict__ where,
                           T* __restrict__ grad_what, T* __restrict__ grad_where, Plan plan) {
    using V = Compute<T>;
    const Window<1> window(plan);
    if (!window.exists) return;
    const V x = read(where + window.x(plan)), y = read(where + window.y(plan));
    const Place<V> across(x, plan.kernel_w), down(y, plan.kernel_h);
    const int64_t pitch = plan.width * plan.inner;
    const int64_t right = plan.kernel_w > 1 ? plan.inner : 0, below = plan.kernel_h > 1 ? pitch : 0;
    const T* from = grad_z + window.origin + down.first * pitch + across.first * plan.inner;
    const Corners<V> grad = {read(from), read(from + right), read(from + below), read(from + below + right)};
    V of_what, of_x, of_y;
    unpool_backward(grad, read(what + window.output), across.share, down.share, slope_of(x, plan.kernel_w),
                    slope_of(y, plan.kernel_h), of_what, of_x, of_y);
    write(grad_what + window.output, of_what);
    write(grad_where + window.x(plan), of_x);
    write(grad_where + window.y(plan), of_y);
}

// Which element of its window `where` names: its number, row by row, or its position in the channel; -1 if it is none.
__device__ __forceinline__ int tap_of(uint8_t where, int64_t, const Plan& plan) {
    return where < plan.kernel_h * plan.kernel_w ? where : -1;
}
__device__ __forceinline__ int tap_of(int64_t where, int64_t first, const Plan& plan) {
    const int64_t offset = where - first;
    if (offset < 0 || offset >= plan.kernel_h * plan.width) return -1;
    const int row = static_cast<int>(offset / plan.width);
    const int64_t column = offset - row * plan.width;
    return column < plan.kernel_w ? row * plan.kernel_w + static_cast<int>(column) : -1;
}

__device__ __forceinline__ void write_tap(uint8_t* to, int tap, int64_t, const Plan&) {
    *to = static_cast<uint8_t>(tap);
}
__device__ __forceinline__ void write_tap(int64_t* to, int tap, int64_t first, const Plan& plan) {
    const int row = tap / plan.kernel_w;
    *to = first + row * plan.width + (tap - row * plan.kernel_w);
}

template <class T, class W, int kLanes, int kRun>
__global__ void __launch_bounds__(kThreads)
    max_pool_forward(const T* __restrict__ z, T* __restrict__ what, W* __restrict__ where, Plan plan) {
    using V = Compute<T>;
    const Window<kLanes> window(plan);
    const T* from = z + window.origin;
    const int64_t pitch = plan.width * plan.inner;
    V most = -static_cast<V>(INFINITY);
    int most_tap = window.lane == 0 ? 0 : plan.kernel_h * plan.kernel_w;
#pragma unroll 2
    for (int i = 0; i < plan.kernel_h; ++i, from += pitch)
#pragma unroll 1
        for (int j = window.lane * kRun; j < plan.kernel_w; j += kLanes * kRun) {
            V values[kRun];
            read_run<kRun>(from + j * plan.inner, values);
#pragma unroll
            for (int k = 0; k < kRun; ++k) max_pool_add(values[k], i * plan.kernel_w + j + k, most, most_tap);
        }
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
        const V other = __shfl_xor_sync(0xffffffffu, most, apart);
        const int other_tap = __shfl_xor_sync(0xffffffffu, most_tap, apart);
        max_pool_merge(other, other_tap, most, most_tap);
    }
    if (!window.exists || window.lane != 0) return;
    write(what + window.output, most);
    write_tap(where + window.output, most_tap, window.position, plan);
}

template <class T, class W, int kLanes, int kRun>
__global__ void __launch_bounds__(kThreads)
    max_unpool_forward(const T* __restrict__ what, const W* __restrict__ where, T* __restrict__ z, Plan plan) {
    using V = Compute<T>;
    const Window<kLanes> window(plan);
    if (!window.exists) return;
    const V value = read(what + window.output);
    const int tap = tap_of(where[window.output], window.position, plan);
    T* to = z + window.origin;
    const int64_t pitch = plan.width * plan.inner;
#pragma unroll 2
    for (int i = 0; i < plan.kernel_h; ++i, to += pitch)
#pragma unroll 1
        for (int j = window.lane * kRun; j < plan.kernel_w; j += kLanes * kRun) {
            V values[kRun];
#pragma unroll
            for (int k = 0; k < kRun; ++k) values[k] = i * plan.kernel_w + j + k == tap ? value : V(0);
            write_run<kRun>(to + j * plan.inner, values);
        }
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads)
    max_unpool_backward(const T* __restrict__ grad_z, const W* __restrict__ where, T* __restrict__ grad_what,
                        Plan plan) {
    const Window<1> window(plan);
    if (!window.exists) return;
    const int tap = tap_of(where[window.output], window.position, plan), row = tap / plan.kernel_w;
    const T* from = grad_z + window.origin + (row * plan.width + (tap - row * plan.kernel_w)) * plan.inner;
    write(grad_what + window.output, tap < 0 ? Compute<T>(0) : read(from));
}

bool empty(const WindowShape& s) {
    return s.outer == 0 || s.inner == 0 || s.height < s.kernel_h || s.width < s.kernel_w;
}

int64_t outputs_of(const WindowShape& s) {
    return s.outer * (s.height / s.kernel_h) * (s.width / s.kernel_w) * s.inner;
}

// Outputs are counted in 32 bits.
bool fits(const WindowShape& s) {
    if (s.kernel_h < 1 || s.kernel_h > 16 || s.kernel_w < 1 || s.kernel_w > 16) return false;
    return outputs_of(s) < (int64_t{1} << 31) - kThreads;
}

Plan plan_for(const WindowShape& s) {
    Plan plan;
    plan.height = s.height;
    plan.width = s.width;
    plan.inner = s.inner;
    plan.outputs = static_cast<uint32_t>(outputs_of(s));
    plan.down = static_cast<uint32_t>(s.height / s.kernel_h);
    plan.across = static_cast<uint32_t>(s.width / s.kernel_w);
    plan.channels = static_cast<uint32_t>(s.inner);
    plan.plane = int64_t{plan.down} * plan.across * s.inner;
    plan.kernel_h = static_cast<int>(s.kernel_h);
    plan.kernel_w = static_cast<int>(s.kernel_w);
    return plan;
}

template <int lanes>
int64_t blocks_for(const Plan& plan) {
    return (int64_t{plan.outputs} * lanes + kThreads - 1) / kThreads;
}

// How threads share a window; `pairs` where two neighbouring columns are one access.
template <int lanes, int run>
struct Way {
    static constexpr int kLanes = lanes, kRun = run;
};

template <class T, class F>
cudaError_t with_way(const WindowShape& s, bool aligned, const F& f) {
    const int64_t k = s.inner == 1 ? s.kernel_w : 1;
    if constexpr (sizeof(T) < 8) {
        if (aligned && k % 2 == 0 && s.width % 2 == 0)
            return k == 2 ? f(Way<1, 2>{}) : k < 8 ? f(Way<2, 2>{}) : f(Way<8, 2>{});
    }
    return k <= 2 ? f(Way<1, 1>{}) : k <= 8 ? f(Way<4, 1>{}) : f(Way<16, 1>{});
}

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
cudaError_t dispatch(int dtype, const F& f) {
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

// Calls f with null pointers to the element types of z and of a hard where, and the plan.
template <class F>
cudaError_t dispatch_max(int dtype, int positions, const WindowShape& s, const F& f) {
    return dispatch(dtype, [&](auto* type) {
        if (!fits(s)) return cudaErrorInvalidValue;
        if (empty(s)) return cudaSuccess;
        const Plan plan = plan_for(s);
        return positions ? f(type, static_cast<int64_t*>(nullptr), plan)
                         : f(type, static_cast<uint8_t*>(nullptr), plan);
    });
}

template <class T>
cudaError_t run_zero_rest(T* z, const WindowShape& s, const Plan& plan, void* stream) {
    const int64_t rows = plan.down * s.kernel_h;
    const int64_t columns = (s.width - plan.across * s.kernel_w) * s.inner;
    const int64_t beside = rows * columns, all = beside + (s.height - rows) * s.width * s.inner;
    const int64_t count = s.outer * all;
    return launch(zero_rest<T>, (count + kThreads - 1) / kThreads, kThreads, stream, z, beside, all, count, columns,
                  plan);
}

constexpr double kLog2E = 1.4426950408889634;

}  // namespace
}  // namespace ladderfast::cuda

extern "C" {

int ladderfast_soft_pool_forward_cuda(const void* z, void* what, void* where, double beta, int dtype,
                                      const WindowShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        if (empty(*shape)) return cudaSuccess;
        const Plan plan = plan_for(*shape);
        return with_way<T>(*shape, aligned_to(2 * sizeof(T), z), [&](auto way) {
            return launch(pool_forward<T, way.kLanes, way.kRun>, blocks_for<way.kLanes>(plan), kThreads, stream,
                          static_cast<const T*>(z), static_cast<T*>(what), static_cast<T*>(where),
                          static_cast<Compute<T>>(beta * kLog2E), plan);
        });
    });
}

int ladderfast_soft_pool_backward_cuda(const void* grad_what, const void* grad_where, const void* z, void* grad_z,
                                       double beta, int dtype, const WindowShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        if (empty(*shape)) return cudaSuccess;
        const Plan plan = plan_for(*shape);
        const cudaError_t error = with_way<T>(*shape, aligned_to(2 * sizeof(T), z, grad_z), [&](auto way) {
            return launch(pool_backward<T, way.kLanes, way.kRun>, blocks_for<way.kLanes>(plan), kThreads, stream,
                          static_cast<const T*>(grad_what), static_cast<const T*>(grad_where), static_cast<const T*>(z),
                          static_cast<T*>(grad_z), static_cast<Compute<T>>(beta * kLog2E),
                          static_cast<Compute<T>>(beta), plan);
        });
        return error != cudaSuccess ? error : run_zero_rest(static_cast<T*>(grad_z), *shape, plan, stream);
    });
}

int ladderfast_soft_unpool_forward_cuda(const void* what, const void* where, void* z, int dtype,
                                        const WindowShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        if (empty(*shape)) return cudaSuccess;
        const Plan plan = plan_for(*shape);
        return with_way<T>(*shape, aligned_to(2 * sizeof(T), z), [&](auto way) {
            return launch(unpool_forward_kernel<T, way.kLanes, way.kRun>, blocks_for<way.kLanes>(plan), kThreads,
                          stream, static_cast<const T*>(what), static_cast<const T*>(where), static_cast<T*>(z), plan);
        });
    });
}

int ladderfast_soft_unpool_backward_cuda(const void* grad_z, const void* what, const void* where, void* grad_what,
                                         void* grad_where, int dtype, const WindowShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        if (empty(*shape)) return cudaSuccess;
        const Plan plan = plan_for(*shape);
        return launch(unpool_backward_kernel<T>, blocks_for<1>(plan), kThreads, stream, static_cast<const T*>(grad_z),
                      static_cast<const T*>(what), static_cast<const T*>(where), static_cast<T*>(grad_what),
                      static_cast<T*>(grad_where), plan);
    });
}

int ladderfast_max_pool_forward_cuda(const void* z, void* what, void* where, int positions, int dtype,
                                     const WindowShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch_max(dtype, positions, *shape, [&](auto* type, auto* where_type, const Plan& plan) {
        using T = std::remove_pointer_t<decltype(type)>;
        using W = std::remove_pointer_t<decltype(where_type)>;
        return with_way<T>(*shape, aligned_to(2 * sizeof(T), z), [&](auto way) {
            return launch(max_pool_forward<T, W, way.kLanes, way.kRun>, blocks_for<way.kLanes>(plan), kThreads, stream,
                          static_cast<const T*>(z), static_cast<T*>(what), static_cast<W*>(where), plan);
        });
    });
}

int ladderfast_max_unpool_forward_cuda(const void* what, const void* where, void* z, int positions, int dtype,
                                       const WindowShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch_max(dtype, positions, *shape, [&](auto* type, auto* where_type, const Plan& plan) {
        using T = std::remove_pointer_t<decltype(type)>;
        using W = std::remove_pointer_t<decltype(where_type)>;
        const cudaError_t error = with_way<T>(*shape, aligned_to(2 * sizeof(T), z), [&](auto way) {
            return launch(max_unpool_forward<T, W, way.kLanes, way.kRun>, blocks_for<way.kLanes>(plan), kThreads,
                          stream, static_cast<const T*>(what), static_cast<const W*>(where), static_cast<T*>(z), plan);
        });
        return error != cudaSuccess ? error : run_zero_rest(static_cast<T*>(z), *shape, plan, stream);
    });
}

int ladderfast_max_unpool_backward_cuda(const void* grad_z, const void* where, void* grad_what, int positions,
                                        int dtype, const WindowShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch_max(dtype, positions, *shape, [&](auto* type, auto* where_type, const Plan& plan) {
        using T = std::remove_pointer_t<decltype(type)>;
        using W = std::remove_pointer_t<decltype(where_type)>;
        return launch(max_unpool_backward<T, W>, blocks_for<1>(plan), kThreads, stream, static_cast<const T*>(grad_z),
                      static_cast<const W*>(where), static_cast<T*>(grad_what), plan);
    });
}
}

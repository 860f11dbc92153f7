// Stands in for CUDA's cuda_runtime.h where the tests compile csrc/cuda for the host. What is declared here and defined
// in ../shim.cpp: launches, threads as fibers, barriers, warp operations, shared memory. See ../README.md.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
#define __align__(bytes) alignas(bytes)
// Function-local, hence one for all fibers; a library's thread-local block can be found and poisoned as a whole.
#define __shared__ thread_local

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x, y, z;
};

// clang-format off
#define CUDA_SHIM_VECTORS(T, name)                                                                             \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                         \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                         \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                 \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_SHIM_VECTORS(signed char, char)
CUDA_SHIM_VECTORS(unsigned char, uchar)
CUDA_SHIM_VECTORS(short, short)
CUDA_SHIM_VECTORS(unsigned short, ushort)
CUDA_SHIM_VECTORS(int, int)
CUDA_SHIM_VECTORS(unsigned, uint)
CUDA_SHIM_VECTORS(float, float)
CUDA_SHIM_VECTORS(double, double)
// clang-format on
#undef CUDA_SHIM_VECTORS

// Those of the running fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_shim {

enum class WarpOp { shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, sync };
enum class BlockOp { sync, count, all, any };

// Stops the launch: the message reaches the test, with the thread that ran into it.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

int barrier(BlockOp op, int predicate, const char* file, int line);
// `value` holds the lane's own bits and receives those of the lane that it reads.
void warp(WarpOp op, unsigned mask, uint64_t& value, int argument, int width, const char* file, int line);
void run(const dim3& grid, const dim3& block, size_t dynamic_bytes, const std::function<void()>& body, int& error);
void* dynamic_shared();

// A float up to `ulps` units in the last place off `exact`, to a side and by an amount that the argument's bits decide:
// as far off as the hardware is documented to be, so that a test that passes here holds there.
float approximate(double exact, double ulps, float argument);
inline float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int argument, int width, const char* file, int line) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    warp(op, mask, bits, argument, width, file, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace cuda_shim

// Barriers and warp operations remember where they were called: threads that wait in different places are an error.
#define CUDA_SHIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_SHIM_HERE) { cuda_shim::barrier(cuda_shim::BlockOp::sync, 0, file, line); }
inline int __syncthreads_count(int predicate, CUDA_SHIM_HERE) {
    return cuda_shim::barrier(cuda_shim::BlockOp::count, predicate, file, line);
}
inline int __syncthreads_and(int predicate, CUDA_SHIM_HERE) {
    return cuda_shim::barrier(cuda_shim::BlockOp::all, predicate, file, line);
}
inline int __syncthreads_or(int predicate, CUDA_SHIM_HERE) {
    return cuda_shim::barrier(cuda_shim::BlockOp::any, predicate, file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_SHIM_HERE) {
    return cuda_shim::shuffle(cuda_shim::WarpOp::shuffle, mask, value, lane, width, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_SHIM_HERE) {
    return cuda_shim::shuffle(cuda_shim::WarpOp::shuffle_up, mask, value, static_cast<int>(delta), width, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_SHIM_HERE) {
    return cuda_shim::shuffle(cuda_shim::WarpOp::shuffle_down, mask, value, static_cast<int>(delta), width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_SHIM_HERE) {
    return cuda_shim::shuffle(cuda_shim::WarpOp::shuffle_xor, mask, value, lanes, width, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_SHIM_HERE) {
    uint64_t bits = predicate != 0;
    cuda_shim::warp(cuda_shim::WarpOp::ballot, mask, bits, 0, 32, file, line);
    return static_cast<unsigned>(bits);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_SHIM_HERE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_SHIM_HERE) {
    return __ballot_sync(mask, predicate, file, line) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_SHIM_HERE) {
    uint64_t bits = 0;
    cuda_shim::warp(cuda_shim::WarpOp::sync, mask, bits, 0, 32, file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Fibers run one at a time and switch only in barriers and warp operations: plain code is atomic.
template <class T>
T atomicAdd(T* to, std::common_type_t<T> value) {
    const T before = *to;
    *to = before + value;
    return before;
}

template <class T>
T __ldg(const T* from) {
    return *from;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return cuda_shim::approximate(1.0 / sqrt(double{x}), 2.0, x); }
inline float __expf(float x) { return cuda_shim::approximate(exp(double{x}), 2.0 + floor(fabs(1.16 * double{x})), x); }
inline float __fdividef(float a, float b) {
    return fabsf(b) > 0x1p126f && !isinf(b) ? 0.0f : cuda_shim::approximate(double{a} / double{b}, 2.0, b);
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
    const std::tuple<Params...> copies(static_cast<Args&&>(args)...);
    int error = cudaSuccess;
    cuda_shim::run(
        config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, copies); }, error);
    return static_cast<cudaError_t>(error);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
    return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

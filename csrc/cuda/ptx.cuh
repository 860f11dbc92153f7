// Single instructions that CUDA C++ does not offer by name. A build for the host (tests/cuda_shim) defines this guard
// and brings functions of the same names.
#ifndef LADDERFAST_CUDA_PTX_CUH
#define LADDERFAST_CUDA_PTX_CUH

#include <cuda_runtime.h>
#include <stdint.h>

namespace ladderfast::cuda {

// 2^x: error at most two units in the last place, subnormal inputs and results are zero, overflow is inf.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The smaller one, or NaN if either is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// 1/x: error at most one unit in the last place, subnormal inputs and results are zero, 1/inf is 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Square root of x >= 0: relative error at most 2^-23, subnormal inputs are zero.
__device__ __forceinline__ float sqrt_approx(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to nearest even, `low` in the lower half of the word.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ float float16_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// base + n in one instruction, where the compiler takes two or more for an address of 64 bits. Global memory.
template <class T>
__device__ __forceinline__ T* advance(T* base, uint32_t n) {
    T* at;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(n), "n"(sizeof(T)), "l"(base));
    __builtin_assume(__isGlobal(at));
    return at;
}
template <class T>
__device__ __forceinline__ T* advance(T* base, int64_t n) {
    return base + n;
}

// One store of 4, 8 or 16 bytes; the compiler may split what is written as an assignment.
__device__ __forceinline__ void store_global(uint32_t* to, uint32_t value) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
}
__device__ __forceinline__ void store_global(uint2* to, uint2 value) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y)
                 : "memory");
}
__device__ __forceinline__ void store_global(uint4* to, uint4 value) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

}  // namespace ladderfast::cuda

#endif

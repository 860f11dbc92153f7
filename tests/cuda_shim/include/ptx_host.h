// Included before a kernel's source: takes the place of csrc/cuda/ptx.cuh, function by function.
#pragma once
#define LADDERFAST_CUDA_PTX_CUH

#include <cuda_runtime.h>

namespace ladderfast::cuda {

// PTX lists 2^0 among the exact results.
inline float exp2_approx(float x) {
    if (cuda_shim::flush(x) == 0.0f) return 1.0f;
    return cuda_shim::flush(cuda_shim::approximate(exp2(double{cuda_shim::flush(x)}), 2.0, x));
}

// Powers of two have an exact reciprocal; it is taken for granted that the hardware finds it.
inline float reciprocal_approx(float x) {
    if ((__float_as_uint(x) & 0x7fffffu) == 0) return cuda_shim::flush(1.0f / cuda_shim::flush(x));
    return cuda_shim::flush(cuda_shim::approximate(1.0 / double{cuda_shim::flush(x)}, 1.0, x));
}

inline float sqrt_approx(float x) { return cuda_shim::approximate(sqrt(double{cuda_shim::flush(x)}), 2.0, x); }

inline float min_or_nan(float a, float b) { return a != a || b != b ? NAN : fminf(a, b); }

inline uint32_t round_to_bfloat16(float value) {
    if (value != value) return 0x7fff;
    const uint32_t bits = __float_as_uint(value);
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

inline uint32_t round_to_float16(float value) {
    const uint32_t bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u;
    const float magnitude = fabsf(value);
    if (value != value) return 0x7fff;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    // Subnormal results count in steps of 2^-24, which is the last place of 0.5: adding that rounds there.
    if (magnitude < 0x1p-14f) return sign | (__float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f));
    const uint32_t above = (bits & 0x7fffffffu) - (112u << 23);
    return sign | ((above + 0xfffu + ((above >> 13) & 1)) >> 13);
}

inline uint32_t pack_bfloat16(float low, float high) { return round_to_bfloat16(low) | round_to_bfloat16(high) << 16; }
inline uint32_t pack_float16(float low, float high) { return round_to_float16(low) | round_to_float16(high) << 16; }

inline float float16_to_float(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return copysignf(static_cast<float>(mantissa) * 0x1p-24f, __uint_as_float(sign));
    return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}

// Dynamic shared memory; on CUDA the address of an `extern __shared__` array.
template <class T>
T* dynamic_shared() {
    return static_cast<T*>(cuda_shim::dynamic_shared());
}

template <class T, class Index>
T* advance(T* base, Index n) {
    return base + n;
}

template <class T>
void store_global(T* to, T value) {
    *to = value;
}

}  // namespace ladderfast::cuda

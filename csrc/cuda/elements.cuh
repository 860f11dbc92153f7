// Element types and the way between memory and registers: 16-bit types are widened to float as they are loaded and
// rounded once as they are stored.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "ptx.cuh"

namespace ladderfast::cuda {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// The type that elements of T are computed in.
template <class T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// dtype codes of the contract headers.
enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// N neighbouring elements as they lie in memory: 32-bit words, 16-bit elements by pairs with the first in the lower
// half.
template <class T, int N>
struct Pack {
    static_assert(N * sizeof(T) % 4 == 0, "whole words");
    uint32_t words[N * sizeof(T) / 4];
};

template <int N>
struct Pack<double, N> {
    double at[N];
};

// The type of one access of so many bytes. Accesses go through __ldg and store_global: plain ones the
// compiler may take apart.
template <int bytes>
struct AccessOf;
template <>
struct AccessOf<4> {
    using type = uint32_t;
};
template <>
struct AccessOf<8> {
    using type = uint2;
};
template <>
struct AccessOf<16> {
    using type = uint4;
};
template <class T, int N>
using Access = typename AccessOf<sizeof(Pack<T, N>)>::type;

__device__ __forceinline__ float widen(bfloat16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value) { return float16_to_float(value.bits); }

template <int N>
__device__ __forceinline__ void widen(const Pack<float, N>& pack, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = __uint_as_float(pack.words[i]);
}

template <int N>
__device__ __forceinline__ void widen(const Pack<double, N>& pack, double (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = pack.at[i];
}

template <int N>
__device__ __forceinline__ void widen(const Pack<bfloat16, N>& pack, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        out[2 * i] = __uint_as_float(pack.words[i] << 16);
        out[2 * i + 1] = __uint_as_float(pack.words[i] & 0xffff0000u);
    }
}

template <int N>
__device__ __forceinline__ void widen(const Pack<float16, N>& pack, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        out[2 * i] = float16_to_float(static_cast<uint16_t>(pack.words[i]));
        out[2 * i + 1] = float16_to_float(static_cast<uint16_t>(pack.words[i] >> 16));
    }
}

__device__ __forceinline__ uint32_t narrow(float low, float high, bfloat16) { return pack_bfloat16(low, high); }
__device__ __forceinline__ uint32_t narrow(float low, float high, float16) { return pack_float16(low, high); }

// The first `count` of N elements; the others are zero. `whole` promises count == N and alignment to the pack, and
// makes it one access; what the kernel also writes must be loaded as `written`.
template <bool whole, int N, bool written = false, class T>
__device__ __forceinline__ Pack<T, N> load(const T* __restrict__ from, int count) {
    Pack<T, N> pack = {};
    if constexpr (whole) {
        const auto* const at = reinterpret_cast<const Access<T, N>*>(from);
        const Access<T, N> all = written ? *at : __ldg(at);
        memcpy(&pack, &all, sizeof(pack));
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i >= count) break;
            if constexpr (sizeof(T) == 8)
                pack.at[i] = from[i];
            else if constexpr (sizeof(T) == 2)
                pack.words[i / 2] |= static_cast<uint32_t>(from[i].bits) << (i % 2 * 16);
            else
                pack.words[i] = __float_as_uint(from[i]);
        }
    }
    return pack;
}

template <bool whole, int N, class T>
__device__ __forceinline__ void store(T* __restrict__ to, const Compute<T> (&values)[N], int count) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (sizeof(T) == 8)
            pack.at[i] = values[i];
        else if constexpr (sizeof(T) == 4)
            pack.words[i] = __float_as_uint(values[i]);
        else if (i % 2 == 0)
            pack.words[i / 2] = narrow(values[i], values[i + 1], T{});
    }
    if constexpr (whole) {
        Access<T, N> all;
        memcpy(&all, &pack, sizeof(pack));
        store_global(reinterpret_cast<Access<T, N>*>(to), all);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i >= count) break;
            if constexpr (sizeof(T) == 2)
                to[i].bits = static_cast<uint16_t>(pack.words[i / 2] >> (i % 2 * 16));
            else
                to[i] = values[i];
        }
    }
}

// Element `index` of an array that holds T, or float where `is_float`.
template <class T>
__device__ __forceinline__ Compute<T> load_either(const void* from, bool is_float, int64_t index) {
    if (sizeof(T) == sizeof(float) || is_float) return static_cast<const float*>(from)[index];
    if constexpr (sizeof(T) == 2)
        return widen(static_cast<const T*>(from)[index]);
    else
        return static_cast<const T*>(from)[index];
}

template <class T>
__device__ __forceinline__ void store_either(void* to, bool is_float, int64_t index, Compute<T> value) {
    if (is_float)
        static_cast<float*>(to)[index] = static_cast<float>(value);
    else if constexpr (sizeof(T) == 2)
        static_cast<T*>(to)[index].bits = static_cast<uint16_t>(narrow(value, 0.0f, T{}));
    else
        static_cast<T*>(to)[index] = value;
}

// True if every pointer is a multiple of `bytes`.
template <class... Pointers>
bool aligned_to(uintptr_t bytes, Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

}  // namespace ladderfast::cuda

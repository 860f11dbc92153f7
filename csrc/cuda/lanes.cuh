// A thread's N neighbouring elements as one value, with what formulas over scalars and vectors alike are written with.
#pragma once

#include "elements.cuh"
#include "math.cuh"

namespace ladderfast::cuda {

template <class C, int N>
struct Lanes {
    C at[N];

#define LF_LANES_OPERATOR(op)                                                       \
    friend __device__ __forceinline__ Lanes operator op(Lanes a, const Lanes& b) {  \
        _Pragma("unroll") for (int i = 0; i < N; ++i) a.at[i] = a.at[i] op b.at[i]; \
        return a;                                                                   \
    }
    LF_LANES_OPERATOR(+)
    LF_LANES_OPERATOR(-)
    LF_LANES_OPERATOR(*)
    LF_LANES_OPERATOR(/)
#undef LF_LANES_OPERATOR
};

template <class V>
struct LanesTraits;
template <class C_, int N_>
struct LanesTraits<Lanes<C_, N_>> {
    using C = C_;
    static constexpr int N = N_;
};

template <class V>
__device__ __forceinline__ V constant(double x) {
    V v;
#pragma unroll
    for (int i = 0; i < LanesTraits<V>::N; ++i) v.at[i] = static_cast<typename LanesTraits<V>::C>(x);
    return v;
}

// The larger and the smaller one; b if either is NaN.
template <class C, int N>
__device__ __forceinline__ Lanes<C, N> larger(Lanes<C, N> a, const Lanes<C, N>& b) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return a;
}
template <class C, int N>
__device__ __forceinline__ Lanes<C, N> smaller(Lanes<C, N> a, const Lanes<C, N>& b) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
    return a;
}
template <class C, int N>
__device__ __forceinline__ Lanes<C, N> if_less(Lanes<C, N> a, const Lanes<C, N>& b, const Lanes<C, N>& then,
                                               const Lanes<C, N>& otherwise) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.at[i] = a.at[i] < b.at[i] ? then.at[i] : otherwise.at[i];
    return a;
}

__device__ __forceinline__ float exp2_of(float y) { return exp2_approx(y); }
__device__ __forceinline__ double exp2_of(double y) { return exp2(y); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// floor(log2 x) of x > 0; of subnormal numbers, that of the least normal one.
__device__ __forceinline__ float exponent_of(float x) {
    const int exponent = static_cast<int>(__float_as_uint(x) >> 23) - 127;
    return static_cast<float>(exponent < -126 ? -126 : exponent);
}
__device__ __forceinline__ double exponent_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const int exponent = static_cast<int>(bits >> 52) - 1023;
    return exponent < -1022 ? -1022 : exponent;
}

template <class C>
__device__ __forceinline__ C logistic(C x) {
    return precise::sigmoid(x).value;
}

#define LF_LANES_FUNCTION(f)                                                \
    template <class C, int N>                                               \
    __device__ __forceinline__ Lanes<C, N> f(Lanes<C, N> x) {               \
        _Pragma("unroll") for (int i = 0; i < N; ++i) x.at[i] = f(x.at[i]); \
        return x;                                                           \
    }
LF_LANES_FUNCTION(exp2_of)
LF_LANES_FUNCTION(log_of)
LF_LANES_FUNCTION(exponent_of)
LF_LANES_FUNCTION(logistic)
#undef LF_LANES_FUNCTION

}  // namespace ladderfast::cuda

// Elementary functions, in two grades. `precise` keeps an op within twice the error of plain arithmetic in the same
// type. `coarse` saves three instructions of eight and is for 16-bit storage, whose rounding is thousands of times its
// error.
#pragma once

#include "ptx.cuh"

namespace ladderfast::cuda {

template <class V>
__device__ __forceinline__ V zero_like(V) {
    return 0;
}

template <class V>
struct Sigmoid {
    V value, slope;
};

namespace coarse {

// 1 / (1 + exp(-x)) and its derivative; the value is right to about two units in the last place. That the slope is zero
// where the sigmoid saturates relies on an exact reciprocal of 1.
__device__ __forceinline__ Sigmoid<float> sigmoid(float x) {
    const float s = reciprocal_approx(1.0f + exp2_approx(x * -1.442695041f));
    return {s, s - s * s};
}

// tanh and its derivative. There is a faster instruction, but it is no better than float16.
__device__ __forceinline__ Sigmoid<float> tangent(float x) {
    const float t = tanhf(x);
    return {t, 1.0f - t * t};
}

}  // namespace coarse

namespace precise {

// A Newton step takes the error of the reciprocal away, which the slope would magnify. It needs a finite sum: below
// x = -87 the value stays at 2^-126.
__device__ __forceinline__ Sigmoid<float> sigmoid(float x) {
    const float sum = 1.0f + exp2_approx(min_or_nan(x * -1.442695041f, 126.0f));
    const float r = reciprocal_approx(sum);
    const float s = fmaf(fmaf(-sum, r, 1.0f), r, r);
    return {s, s - s * s};
}

__device__ __forceinline__ Sigmoid<double> sigmoid(double x) {
    const double s = 1.0 / (1.0 + exp(-x));
    return {s, s - s * s};
}

__device__ __forceinline__ Sigmoid<float> tangent(float x) { return coarse::tangent(x); }

__device__ __forceinline__ Sigmoid<double> tangent(double x) {
    const double t = tanh(x);
    return {t, 1.0 - t * t};
}

}  // namespace precise

}  // namespace ladderfast::cuda

// Gaussian noise by counter, drawn in registers: four neighbouring elements at a time, which share a counter. The
// formulas are in ../math/noise.h, the numbering is that of ladderfast/reference/noise.py.
//
// An aligned slice of four takes about 140 instructions on sm_90: 45 for Philox, 2 * 45 for Box-Muller, two of them
// square roots in the special function unit. A slice that begins within a counter's four takes twice that.
#pragma once

#include <stdint.h>

#include "../math/host_device.h"
#include "ptx.cuh"

namespace ladderfast::cuda {

__device__ __forceinline__ void multiply_wide(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
    const uint64_t product = static_cast<uint64_t>(a) * m;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
}

// ((word >> 9) + 1/2) / 2^23: the bits behind the point of a number in [1, 2), and then the exact difference.
__device__ __forceinline__ float uniform(uint32_t word) {
    return __uint_as_float(word >> 9 | 0x3f800000u) - 0x1.fffffep-1f;
}

// Natural logarithm of a normal x, error about one unit in the last place. x = 2^k (1 + f) with 1 + f in
// [sqrt(1/2), sqrt(2)); log(1 + f) = f + f^2 p(f), p a minimax polynomial of relative error 3e-8.
__device__ __forceinline__ float log_(float x) {
    const int bits = static_cast<int>(__float_as_uint(x));
    const int k = (bits - 0x3f3504f3) >> 23;
    const float f = __uint_as_float(static_cast<uint32_t>(bits - k * (1 << 23))) - 1.0f;
    float p = 0.08734750747680664f;
    p = fmaf(p, f, -0.14307482540607452f);
    p = fmaf(p, f, 0.14917989075183868f);
    p = fmaf(p, f, -0.165705144405365f);
    p = fmaf(p, f, 0.19962070882320404f);
    p = fmaf(p, f, -0.25001755356788635f);
    p = fmaf(p, f, 0.33333951234817505f);
    p = fmaf(p, f, -0.49999991059303284f);
    // An integer added to the bits of 1.5 * 2^23 is added to the number.
    const float scale = __uint_as_float(static_cast<uint32_t>(0x4b400000 + k)) - 0x1.8p23f;
    return fmaf(scale, 0.6931471824645996f, fmaf(f * f, p, f));
}

__device__ __forceinline__ float sqrt_(float x) { return sqrt_approx(x); }

// Sine and cosine of 2 pi v for 0 < v < 1. 4 v = quarter + f with |f| <= 1/2, both exact; minimax polynomials in f^2 of
// relative error 3e-9.
__device__ __forceinline__ void sincos_turn(float v, float& sine, float& cosine) {
    const float rounded = fmaf(v, 4.0f, 0x1.8p23f);
    const uint32_t quarter = __float_as_uint(rounded);
    const float f = fmaf(v, 4.0f, 0x1.8p23f - rounded), s = f * f;
    float a = -0.00460165785625577f;
    a = fmaf(a, s, 0.07968003302812576f);
    a = fmaf(a, s, -0.6459634900093079f);
    a = fmaf(a, s, 1.5707963705062866f) * f;
    float b = 0.0009037664858624339f;
    b = fmaf(b, s, -0.02086016535758972f);
    b = fmaf(b, s, 0.25366923213005066f);
    b = fmaf(b, s, -1.2337005138397217f);
    b = fmaf(b, s, 1.0f);
    // Bit 1 of the quarter negates the sine, that of the next quarter the cosine.
    const bool swap = quarter & 1;
    sine = __uint_as_float(__float_as_uint(swap ? b : a) ^ (quarter << 30 & 0x80000000u));
    cosine = __uint_as_float(__float_as_uint(swap ? a : b) ^ ((quarter + 1) << 30 & 0x80000000u));
}

#include "../math/noise.h"

// The noise of one seed in one call: what its counters have in common.
struct NoiseSource {
    uint32_t key[2], call[2];

    NoiseSource() = default;

    // state: seed and offset.
    __device__ NoiseSource(const int64_t* state, int64_t stream) {
        const uint64_t seed = static_cast<uint64_t>(state[0]);
        const uint64_t offset = static_cast<uint64_t>(state[1]) + static_cast<uint64_t>(stream);
        key[0] = static_cast<uint32_t>(seed);
        key[1] = static_cast<uint32_t>(seed >> 32);
        call[0] = static_cast<uint32_t>(offset);
        call[1] = static_cast<uint32_t>(offset >> 32);
    }

    __device__ __forceinline__ void words(int64_t quad, uint32_t (&out)[4]) const {
        out[0] = static_cast<uint32_t>(quad);
        out[1] = static_cast<uint32_t>(static_cast<uint64_t>(quad) >> 32);
        out[2] = call[0];
        out[3] = call[1];
        philox4x32(out, key[0], key[1]);
    }

    __device__ __forceinline__ void normals_of_quad(int64_t quad, float (&out)[4]) const {
        uint32_t w[4];
        words(quad, w);
        box_muller(w[0], w[1], out[0], out[1]);
        box_muller(w[2], w[3], out[2], out[3]);
    }

    // Standard normal values of elements first .. first + 3; `aligned` promises that first is a multiple of 4.
    template <bool aligned>
    __device__ __forceinline__ void normals(int64_t first, float (&out)[4]) const {
        const int phase = static_cast<int>(first & 3);
        if (aligned) {
            normals_of_quad(first / 4, out);
            return;
        }
        // A loop, so that the code of a counter is there once.
        float high[4] = {};
#pragma unroll 1
        for (int64_t quad = first / 4; quad <= (first + 3) / 4; ++quad) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[i] = high[i];
            normals_of_quad(quad, high);
        }
        // The eight numbers out, high are moved down by as many as there are before the first.
        if (phase == 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[i] = high[i];
        }
        if (phase & 2) out[0] = out[2], out[1] = out[3], out[2] = high[0], out[3] = high[1], high[0] = high[2];
        if (phase & 1) out[0] = out[1], out[1] = out[2], out[2] = out[3], out[3] = high[0];
    }
};

}  // namespace ladderfast::cuda

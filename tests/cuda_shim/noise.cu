// Noise by itself, for tests/ops/test_ladder_encoder_cuda.py: words and normal values of `count` quads, or normal
// values of slices of four that begin `phase` elements into them.
#include <stdint.h>

#include "launch.cuh"
#include "noise.cuh"

namespace {

using namespace ladderfast::cuda;

__global__ void draw(const int64_t* state, int64_t stream, int64_t first, int phase, int64_t count, uint32_t* words,
                     float* normals) {
    const int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (n >= count) return;
    const NoiseSource source(state, stream);
    uint32_t w[4];
    source.words(first + n, w);
    float values[4];
    if (phase == 0)
        source.normals<true>(4 * (first + n), values);
    else
        source.normals<false>(4 * (first + n) + phase % 4, values);
    for (int i = 0; i < 4; ++i) {
        words[4 * n + i] = w[i];
        normals[4 * n + i] = values[i];
    }
}

}  // namespace

extern "C" int draw_noise(const int64_t* state, int64_t stream, int64_t first, int phase, int64_t count,
                          uint32_t* words, float* normals) {
    return launch(draw, (count + 63) / 64, 64, nullptr, state, stream, first, phase, count, words, normals);
}

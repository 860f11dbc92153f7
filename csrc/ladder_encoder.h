// Contract of the op `ladder_encoder` between ops.cpp and its kernels. No dependency on torch.
//
// x, z, h and the gradients with respect to them share one packed layout (seeds, rows, channels, inner), inner fastest.
// Dense and channels-last tensors have inner = 1 and rows = every position. The rows of a seed lie in `parts` parts,
// one after the other, each with statistics of its own; the first `noisy` rows, which are whole parts, get noise. mean
// and var and their gradients are (seeds, parts, channels), packed; beta, gamma and their gradients (seeds, channels),
// packed, or null where there are none. Pointers need no alignment beyond their element's. Outputs never alias inputs.
//
// The noise of an element: its number e counts from the beginning of its seed in the packed layout; it has the word
// e % 4 of the counter (e / 4, offset + stream), as written in ../ladderfast/reference/noise.py; state is
// (seeds, 2) int64, seed and offset, on the device.
#pragma once

#include <stdint.h>

#include "bfloat16.h"

struct LadderEncoderShape {
    int64_t seeds, rows, channels, inner;
    int64_t parts, part_rows[3], noisy;
};

struct LadderEncoderOptions {
    double noise_std, negative_slope, eps;
    int64_t stream;
    int activation;  // EncoderActivation of math/ladder_encoder.h
};

// Every pass is cut into work items whose number and extent depend on the shape alone, so that results do not depend on
// how items are spread over threads. S is float, double or BFloat16; the functions below exist for all three.
//
//   forward:   run items [0, items) of statistics, [0, merge_items) of merge, [0, items) of apply, each in any order
//   backward:  run items [0, items) of backward_sums, [0, reduce_items) of reduce, [0, items) of backward_apply
namespace ladderfast::cpu {

int64_t ladder_encoder_items(const LadderEncoderShape& shape);
int64_t ladder_encoder_merge_items(const LadderEncoderShape& shape);
int64_t ladder_encoder_reduce_items(const LadderEncoderShape& shape);
int64_t ladder_encoder_workspace(const LadderEncoderShape& shape);           // elements of Wide<S>, forward
int64_t ladder_encoder_backward_workspace(const LadderEncoderShape& shape);  // elements of Wide<S>, backward

template <class S>
struct LadderEncoderForward {
    using T = Wide<S>;
    const S* x;            // (seeds, rows, channels, inner)
    const T* beta;         // (seeds, channels) or null
    const T* gamma;        // (seeds, channels) or null
    const int64_t* state;  // (seeds, 2) or null: no noise
    S* z;                  // as x, written once; null: not wanted
    S* h;                  // as x, written once; null: not wanted
    T* mean;               // (seeds, parts, channels), written once; 0 for a part of no rows
    T* var;                // as mean
    T* workspace;          // ladder_encoder_workspace(shape), need not be initialised
};

template <class S>
struct LadderEncoderBackward {
    using T = Wide<S>;
    const S* grad_z;     // as x or null: zero
    const S* grad_h;     // as x or null: zero
    const T* grad_mean;  // as mean or null: zero
    const T* grad_var;   // as mean or null: zero
    const S* x;          // (seeds, rows, channels, inner)
    const T* mean;       // (seeds, parts, channels)
    const T* var;        // as mean
    const T* beta;       // (seeds, channels) or null
    const T* gamma;      // (seeds, channels) or null
    const int64_t* state;
    S* grad_x;      // as x, written once or, where it is `reaching`, twice
    T* reaching;    // as x: between sums and apply what reaches the normalised x; grad_x itself where S is T
    T* grad_beta;   // (seeds, channels), written once; or null: not wanted
    T* grad_gamma;  // (seeds, channels), written once; or null: not wanted
    T* workspace;   // ladder_encoder_backward_workspace(shape), need not be initialised
};

template <class S>
void ladder_encoder_statistics(const LadderEncoderForward<S>& pass, const LadderEncoderShape& shape, int64_t begin,
                               int64_t end);
template <class S>
void ladder_encoder_merge(const LadderEncoderForward<S>& pass, const LadderEncoderShape& shape, int64_t begin,
                          int64_t end);
template <class S>
void ladder_encoder_apply(const LadderEncoderForward<S>& pass, const LadderEncoderOptions& options,
                          const LadderEncoderShape& shape, int64_t begin, int64_t end);
template <class S>
void ladder_encoder_backward_sums(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                                  const LadderEncoderShape& shape, int64_t begin, int64_t end);
template <class S>
void ladder_encoder_reduce(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                           const LadderEncoderShape& shape, int64_t begin, int64_t end);
template <class S>
void ladder_encoder_backward_apply(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                                   const LadderEncoderShape& shape, int64_t begin, int64_t end);

}  // namespace ladderfast::cpu

// CUDA. dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16. mean, var and their gradients are float32, float64
// where dtype is; beta, gamma and their gradients have a code of their own (that of x, or float32). Each returns a
// cudaError_t.
extern "C" {
// Bytes of scratch; depend on the shape only.
int64_t ladderfast_ladder_encoder_workspace_cuda(const LadderEncoderShape* shape);
int64_t ladderfast_ladder_encoder_backward_workspace_cuda(const LadderEncoderShape* shape);

int ladderfast_ladder_encoder_forward_cuda(const void* x, const void* beta, const void* gamma, const int64_t* state,
                                           void* z, void* h, void* mean, void* var, void* workspace, int dtype,
                                           int params_dtype, const LadderEncoderOptions* options,
                                           const LadderEncoderShape* shape, void* stream);

int ladderfast_ladder_encoder_backward_cuda(const void* grad_z, const void* grad_h, const void* grad_mean,
                                            const void* grad_var, const void* x, const void* mean, const void* var,
                                            const void* beta, const void* gamma, const int64_t* state, void* grad_x,
                                            void* grad_beta, void* grad_gamma, void* workspace, int dtype,
                                            int params_dtype, const LadderEncoderOptions* options,
                                            const LadderEncoderShape* shape, void* stream);
}

// Contract of the op `ladder_encoder` between ops.cpp and its kernels. No dependency on torch.
//
// x, z, h and the gradients with respect to them share one packed layout (seeds, rows, channels, inner), inner fastest.
// Dense and channels-last tensors have inner = 1 and rows = every position. The rows of a seed lie in `parts` parts,
// one after the other, each with statistics of its own; those of the first `noisy` rows get noise. mean and var and
// their gradients are (seeds, parts, channels), packed; beta, gamma and their gradients (seeds, channels), packed, or
// null where there are none. Pointers need no alignment beyond their element's. Outputs never alias inputs.
//
// The noise of an element: its number e counts from the beginning of its seed in the packed layout; it has the word
// e % 4 of the counter (e / 4, offset + stream), as written in ../ladderfast/reference/noise.py; state is
// (seeds, 2) int64, seed and offset, on the device.
#pragma once

#include <stdint.h>

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
// how items are spread over threads. T is float or double; the functions below exist for both.
//
//   forward:   run items [0, statistics_items), then [0, apply_items), each in any order
//   backward:  run items [0, statistics_items) of backward_sums, then [0, apply_items) of backward_apply; then
//              [0, reduce_items) if beta or gamma have gradients
namespace ladderfast::cpu {

int64_t ladder_encoder_statistics_items(const LadderEncoderShape& shape);
int64_t ladder_encoder_apply_items(const LadderEncoderShape& shape);
int64_t ladder_encoder_reduce_items(const LadderEncoderShape& shape);
int64_t ladder_encoder_workspace(const LadderEncoderShape& shape);           // elements of T, forward
int64_t ladder_encoder_backward_workspace(const LadderEncoderShape& shape);  // elements of T, backward

template <class T>
void ladder_encoder_statistics(const T* x, T* workspace, const LadderEncoderShape& shape, int64_t begin, int64_t end);

template <class T>
void ladder_encoder_apply(const T* x,            // (seeds, rows, channels, inner)
                          const T* workspace,    // filled by every item of ladder_encoder_statistics
                          const T* beta,         // (seeds, channels) or null
                          const T* gamma,        // (seeds, channels) or null
                          const int64_t* state,  // (seeds, 2) or null: no noise
                          T* z,                  // as x, written once; null: not wanted
                          T* h,                  // as x, written once; null: not wanted
                          T* mean, T* var,       // (seeds, parts, channels), written once; 0 for a part of no rows
                          const LadderEncoderOptions& options, const LadderEncoderShape& shape, int64_t begin,
                          int64_t end);

template <class T>
void ladder_encoder_backward_sums(const T* grad_z,  // as x or null: zero
                                  const T* grad_h,  // as x or null: zero
                                  const T* x, const T* mean, const T* var, const T* beta, const T* gamma,
                                  const int64_t* state,
                                  T* grad_x,     // as x, holds what reaches the normalised x
                                  T* workspace,  // ladder_encoder_backward_workspace(shape), need not be initialised
                                  const LadderEncoderOptions& options, const LadderEncoderShape& shape, int64_t begin,
                                  int64_t end);

template <class T>
void ladder_encoder_backward_apply(const T* x, const T* mean, const T* var,
                                   const T* grad_mean,  // as mean or null: zero
                                   const T* grad_var,   // as var or null: zero
                                   const T* workspace,  // filled by every item of ladder_encoder_backward_sums
                                   T* grad_x,           // in and out
                                   const LadderEncoderOptions& options, const LadderEncoderShape& shape, int64_t begin,
                                   int64_t end);

template <class T>
void ladder_encoder_reduce(const T* workspace, T* grad_beta, T* grad_gamma,  // (seeds, channels), written once; or null
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

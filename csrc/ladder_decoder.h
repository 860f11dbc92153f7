// Contract of the op `ladder_decoder` between ops.cpp and its kernels. No dependency on torch.
//
// u, z, clean_z, z_hat and the gradients with respect to them share one packed layout (seeds, rows, channels, inner),
// inner fastest. Dense and channels-last tensors have inner = 1 and rows = every position. params and grad_params are
// (seeds, 10, channels), packed; mean, var, u_mean, u_var and their gradients (seeds, channels), packed; cost and
// grad_cost (seeds). Pointers need no alignment beyond their element's. Outputs never alias inputs.
//
// Without a cost clean_z is null. With a cost, mean and var are null together at layer 0, where z_hat is compared as it
// is.
#pragma once

#include <stdint.h>

#include "bfloat16.h"

struct LadderDecoderShape {
    int64_t seeds, rows, channels, inner;
};

struct LadderDecoderOptions {
    double eps;
    int squash_v;
};

// Every pass is cut into work items whose number and extent depend on the shape alone, so that results do not depend on
// how items are spread over threads. S is float, double or BFloat16; the functions below exist for all three, with
// T = Wide<S>.
//
//   forward:   run items [0, apply_items) of statistics, [0, reduce_items) of moments, [0, apply_items) of apply, then,
//              for a cost, [0, seeds) of cost
//   backward:  run items [0, apply_items) of backward_sums, [0, reduce_items) of reduce, then [0, apply_items) of
//              backward_apply
namespace ladderfast::cpu {

int64_t ladder_decoder_apply_items(const LadderDecoderShape& shape);
int64_t ladder_decoder_reduce_items(const LadderDecoderShape& shape);
int64_t ladder_decoder_workspace(const LadderDecoderShape& shape);           // elements of Wide<S>, forward
int64_t ladder_decoder_backward_workspace(const LadderDecoderShape& shape);  // elements of Wide<S>, backward

template <class S, class T = Wide<S>>
void ladder_decoder_statistics(const S* u,    // (seeds, rows, channels, inner)
                               T* workspace,  // need not be initialised
                               const LadderDecoderShape& shape, int64_t begin, int64_t end);

template <class S, class T = Wide<S>>
void ladder_decoder_moments(const S* u,
                            const T* workspace,   // filled by every item of the statistics
                            T* u_mean, T* u_var,  // (seeds, channels), written once; 0 where there are no rows
                            const LadderDecoderShape& shape, int64_t begin, int64_t end);

template <class S, class T = Wide<S>>
void ladder_decoder_apply(const S* u, const S* z, const T* params,
                          const S* clean_z,  // as u, or null: no cost
                          const T* mean,     // (seeds, channels), or null: layer 0
                          const T* var,      // (seeds, channels), or null: layer 0
                          const T* u_mean, const T* u_var,
                          S* z_hat,      // as u, written once
                          T* workspace,  // the cost's sums, over what the statistics left
                          const LadderDecoderOptions& options, const LadderDecoderShape& shape, int64_t begin,
                          int64_t end);

template <class S, class T = Wide<S>>
void ladder_decoder_cost(const T* workspace,
                         T* cost,  // (seeds), written once
                         const LadderDecoderShape& shape, int64_t begin, int64_t end);

template <class S, class T = Wide<S>>
void ladder_decoder_backward_sums(const S* grad_z_hat,  // as u, or null: zero
                                  const T* grad_cost,   // (seeds), or null: zero
                                  const S* u, const S* z, const T* params, const S* clean_z, const T* mean,
                                  const T* var, const T* u_mean, const T* u_var,
                                  T* reaching,      // as u: what reaches the normalised u
                                  S* grad_z,        // as u, written once; null: not wanted
                                  S* grad_clean_z,  // as u, written once; null: not wanted, or no grad_cost
                                  T* workspace,     // need not be initialised
                                  bool statistics,  // whether mean and var have gradients
                                  const LadderDecoderOptions& options, const LadderDecoderShape& shape, int64_t begin,
                                  int64_t end);

template <class S, class T = Wide<S>>
void ladder_decoder_reduce(T* workspace, const T* params, const T* var, T* grad_params,
                           T* grad_mean,  // (seeds, channels), written once; or null
                           T* grad_var,   // (seeds, channels), written once; or null
                           const LadderDecoderOptions& options, const LadderDecoderShape& shape, int64_t begin,
                           int64_t end);

template <class S, class T = Wide<S>>
void ladder_decoder_backward_apply(const S* u, const T* u_mean, const T* u_var, const T* workspace,
                                   const T* reaching,  // of backward_sums; may be grad_u where S is T
                                   S* grad_u,          // as u, written once
                                   const LadderDecoderOptions& options, const LadderDecoderShape& shape, int64_t begin,
                                   int64_t end);

}  // namespace ladderfast::cpu

// CUDA. dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16. mean, var, u_mean, u_var, cost and their gradients
// are float32, float64 where dtype is; params and grad_params have a code of their own (that of u, or float32). Null
// as above; grad_u, too, may be null where it is not wanted. Each returns a cudaError_t.
extern "C" {
// Bytes of scratch; depend on the shape only.
int64_t ladderfast_ladder_decoder_workspace_cuda(const LadderDecoderShape* shape);
int64_t ladderfast_ladder_decoder_backward_workspace_cuda(const LadderDecoderShape* shape);

int ladderfast_ladder_decoder_forward_cuda(const void* u, const void* z, const void* params, const void* clean_z,
                                           const void* mean, const void* var, void* z_hat, void* u_mean, void* u_var,
                                           void* cost, void* workspace, int dtype, int params_dtype,
                                           const LadderDecoderOptions* options, const LadderDecoderShape* shape,
                                           void* stream);

int ladderfast_ladder_decoder_backward_cuda(const void* grad_z_hat, const void* grad_cost, const void* u, const void* z,
                                            const void* params, const void* clean_z, const void* mean, const void* var,
                                            const void* u_mean, const void* u_var, void* grad_u, void* grad_z,
                                            void* grad_clean_z, void* grad_params, void* grad_mean, void* grad_var,
                                            void* workspace, int dtype, int params_dtype,
                                            const LadderDecoderOptions* options, const LadderDecoderShape* shape,
                                            void* stream);
}

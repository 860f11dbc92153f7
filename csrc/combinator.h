// Contract of the op `combinator` between ops.cpp and its kernels. No dependency on torch.
//
// z, u, z_hat and the gradients with respect to them share one packed layout (seeds, rows, channels, inner), inner
// fastest. Dense and channels-last tensors have inner = 1 and rows = every position. params and grad_params are
// (seeds, 10, channels), packed. Pointers need no alignment beyond their element's. Outputs never alias inputs.
#pragma once

#include <stdint.h>

struct CombinatorShape {
    int64_t seeds, rows, channels, inner;
};

// Both CPU passes are cut into work items whose number and extent depend on the shape alone, so that results do not
// depend on how items are spread over threads. T is float or double; the functions below exist for both.
//
//   forward:   run items [0, forward_items) in any order
//   backward:  run items [0, backward_items), then sums [0, reduce_items), each in any order
namespace ladderfast::cpu {

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* instruction_set();

int64_t combinator_forward_items(const CombinatorShape& shape);
int64_t combinator_backward_items(const CombinatorShape& shape);
int64_t combinator_reduce_items(const CombinatorShape& shape);
int64_t combinator_workspace(const CombinatorShape& shape);  // elements of T that backward needs as scratch

template <class T>
void combinator_forward(const T* z,       // (seeds, rows, channels, inner)
                        const T* u,       // as z
                        const T* params,  // (seeds, 10, channels)
                        T* z_hat,         // as z, written once
                        bool squash_v, const CombinatorShape& shape, int64_t begin, int64_t end);

template <class T>
void combinator_backward(const T* grad,    // as z
                         const T* z,       // (seeds, rows, channels, inner)
                         const T* u,       // as z
                         const T* params,  // (seeds, 10, channels)
                         T* grad_z,        // as z, written once
                         T* grad_u,        // as z, written once
                         T* grad_params,   // (seeds, 10, channels), written here if there are no reduce_items
                         T* workspace,     // combinator_workspace(shape), need not be initialised; null if that is 0
                         bool squash_v, const CombinatorShape& shape, int64_t begin, int64_t end);

template <class T>
void combinator_reduce(const T* workspace,  // filled by every item of combinator_backward
                       const T* params,     // (seeds, 10, channels)
                       T* grad_params,      // (seeds, 10, channels), written once
                       const CombinatorShape& shape, int64_t begin, int64_t end);

}  // namespace ladderfast::cpu

// CUDA. dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16; params has a code of its own (that of z, or float32).
// Each returns a cudaError_t.
extern "C" {
int ladderfast_combinator_forward_cuda(const void* z, const void* u, const void* params, void* z_hat, int dtype,
                                       int params_dtype, int squash_v, const CombinatorShape* shape, void* stream);

// Bytes of scratch for backward; depends on the shape only.
int64_t ladderfast_combinator_workspace_cuda(const CombinatorShape* shape);

int ladderfast_combinator_backward_cuda(const void* grad, const void* z, const void* u, const void* params,
                                        void* grad_z, void* grad_u, void* grad_params, void* workspace, int dtype,
                                        int params_dtype, int squash_v, const CombinatorShape* shape, void* stream);
}

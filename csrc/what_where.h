// Contract of the op `what_where` between ops.cpp and its kernels: soft_pool2d, soft_unpool2d, where_max_pool2d,
// where_max_unpool2d and their backward passes. No dependency on torch.
//
// All tensors of one call share one order of axes: contiguous tensors have inner = 1 and every channel in `outer`,
// channels-last ones have the channels in `inner`. With windows_down = height / kernel_h and
// windows_across = width / kernel_w, both rounded down,
//
//   z      (outer, height, width, inner)
//   what   (outer, windows_down, windows_across, inner)
//   where  (outer, 2, windows_down, windows_across, inner)     soft: x, then y
//          (outer, windows_down, windows_across, inner)        hard: uint8_t i * kernel_w + j of row i and column j of
//                                                              the window, or int64_t row * width + column
//
// packed, and gradients as what they are gradients of. Pointers need no alignment beyond their element's. Outputs never
// alias inputs and are written once, the rows and columns of z or grad_z that fill no window with 0. Kernel sizes are
// from 1 to 16. In soft unpooling z has no such rows and columns. A hard where that is in none of its window's elements
// is allowed: nothing is put anywhere, and its gradient is 0.
#pragma once

#include <stdint.h>

struct WindowShape {
    int64_t outer, height, width, inner, kernel_h, kernel_w;
};

// CPU passes are cut into work items whose number and extent depend on the shape alone: run items [0, windows_items) in
// any order. T is float or double, W uint8_t or int64_t; the functions below exist for all of them.
namespace ladderfast::cpu {

int64_t windows_items(const WindowShape& shape);

template <class T>
void soft_pool_forward(const T* z, T* what, T* where, double beta, const WindowShape& shape, int64_t begin,
                       int64_t end);

template <class T>
void soft_pool_backward(const T* grad_what, const T* grad_where, const T* z, T* grad_z, double beta,
                        const WindowShape& shape, int64_t begin, int64_t end);

template <class T>
void soft_unpool_forward(const T* what, const T* where, T* z, const WindowShape& shape, int64_t begin, int64_t end);

template <class T>
void soft_unpool_backward(const T* grad_z, const T* what, const T* where, T* grad_what, T* grad_where,
                          const WindowShape& shape, int64_t begin, int64_t end);

template <class T, class W>
void max_pool_forward(const T* z, T* what, W* where, const WindowShape& shape, int64_t begin, int64_t end);

// Also max_pool's backward pass, from grad_what to grad_z.
template <class T, class W>
void max_unpool_forward(const T* what, const W* where, T* z, const WindowShape& shape, int64_t begin, int64_t end);

template <class T, class W>
void max_unpool_backward(const T* grad_z, const W* where, T* grad_what, const WindowShape& shape, int64_t begin,
                         int64_t end);

}  // namespace ladderfast::cpu

// CUDA. dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16. A hard where has int64_t if `positions`, else
// uint8_t. Each returns a cudaError_t.
extern "C" {
int ladderfast_soft_pool_forward_cuda(const void* z, void* what, void* where, double beta, int dtype,
                                      const WindowShape* shape, void* stream);
int ladderfast_soft_pool_backward_cuda(const void* grad_what, const void* grad_where, const void* z, void* grad_z,
                                       double beta, int dtype, const WindowShape* shape, void* stream);
int ladderfast_soft_unpool_forward_cuda(const void* what, const void* where, void* z, int dtype,
                                        const WindowShape* shape, void* stream);
int ladderfast_soft_unpool_backward_cuda(const void* grad_z, const void* what, const void* where, void* grad_what,
                                         void* grad_where, int dtype, const WindowShape* shape, void* stream);
int ladderfast_max_pool_forward_cuda(const void* z, void* what, void* where, int positions, int dtype,
                                     const WindowShape* shape, void* stream);
int ladderfast_max_unpool_forward_cuda(const void* what, const void* where, void* z, int positions, int dtype,
                                       const WindowShape* shape, void* stream);
int ladderfast_max_unpool_backward_cuda(const void* grad_z, const void* where, void* grad_what, int positions,
                                        int dtype, const WindowShape* shape, void* stream);
}

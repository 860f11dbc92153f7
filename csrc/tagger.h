// Contract of the op `tagger` between ops.cpp and its kernels. No dependency on torch.
//
// x is (rows, pixels); z, m, dz, likelihood and the gradients of these are (rows, groups, pixels). Inputs are read
// where they lie, with strides of rows and groups; neighbouring pixels are neighbours in memory. Outputs are packed,
// written once, and alias no input. The scalar (variance or flip probability) has one entry for each seed: row n uses
// entry n / (rows / seeds). Pointers need no alignment beyond their element's.
#pragma once

#include <stdint.h>

struct TaggerShape {
    int64_t rows, groups, pixels, seeds;
};

// Element (n, k, d) is at data[n * row + k * group + d].
struct TaggerInput {
    const void* data;
    int64_t row, group;
};

struct TaggerInputs {
    TaggerInput x;       // (rows, pixels), group is not used
    TaggerInput z, m;    // (rows, groups, pixels)
    const void* scalar;  // (seeds), null for the Bernoulli mixture
};

// Both CPU passes are cut into work items [0, tagger_items) whose number and extent depend on the shape alone. T is
// float or double; the functions below exist for both. `partials` has an entry for each item; tagger_sum makes the
// gradient of the variance of them. Gaussian or Bernoulli is the first argument.
namespace ladderfast::cpu {

int64_t tagger_items(const TaggerShape& shape);

template <class T>
void tagger_inputs(bool gaussian, const TaggerInputs& in,
                   T* dz,          // (rows, groups, pixels)
                   T* likelihood,  // (rows, groups, pixels)
                   const TaggerShape& shape, int64_t begin, int64_t end);

template <class T>
void tagger_inputs_backward(bool gaussian,
                            const TaggerInput& grad_dz,          // (rows, groups, pixels)
                            const TaggerInput& grad_likelihood,  // (rows, groups, pixels)
                            const TaggerInputs& in,
                            T* grad_x,         // (rows, pixels)
                            T* grad_z,         // (rows, groups, pixels)
                            T* grad_m,         // (rows, groups, pixels)
                            double* partials,  // (tagger_items(shape)), null for Bernoulli
                            const TaggerShape& shape, int64_t begin, int64_t end);

template <class T>
void tagger_nll(bool gaussian, const TaggerInputs& in,
                T* nll,  // (rows, pixels)
                const TaggerShape& shape, int64_t begin, int64_t end);

template <class T>
void tagger_nll_backward(bool gaussian,
                         const TaggerInput& grad,  // (rows, pixels)
                         const TaggerInputs& in,
                         T* grad_x,         // (rows, pixels)
                         T* grad_z,         // (rows, groups, pixels)
                         T* grad_m,         // (rows, groups, pixels)
                         double* partials,  // (tagger_items(shape)), null for Bernoulli
                         const TaggerShape& shape, int64_t begin, int64_t end);

template <class T>
void tagger_sum(const double* partials, const T* variance,
                T* grad_variance,  // (seeds)
                const TaggerShape& shape);

}  // namespace ladderfast::cpu

// CUDA. dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16; the scalar has a code of its own (that of z, or
// float32). Each returns a cudaError_t. gaussian is 1, or 0 for Bernoulli; outputs and their shapes are as above.
extern "C" {
int ladderfast_tagger_inputs_cuda(int gaussian, const TaggerInputs* in, void* dz, void* likelihood, int dtype,
                                  int scalar_dtype, const TaggerShape* shape, void* stream);

int ladderfast_tagger_nll_cuda(int gaussian, const TaggerInputs* in, void* nll, int dtype, int scalar_dtype,
                               const TaggerShape* shape, void* stream);

// Bytes of scratch for a Gaussian backward; depends on the shape only.
int64_t ladderfast_tagger_workspace_cuda(const TaggerShape* shape);

// grad_scalar (seeds) and workspace are null for Bernoulli.
int ladderfast_tagger_inputs_backward_cuda(int gaussian, const TaggerInput* grad_dz, const TaggerInput* grad_likelihood,
                                           const TaggerInputs* in, void* grad_x, void* grad_z, void* grad_m,
                                           void* grad_scalar, void* workspace, int dtype, int scalar_dtype,
                                           const TaggerShape* shape, void* stream);

int ladderfast_tagger_nll_backward_cuda(int gaussian, const TaggerInput* grad, const TaggerInputs* in, void* grad_x,
                                        void* grad_z, void* grad_m, void* grad_scalar, void* workspace, int dtype,
                                        int scalar_dtype, const TaggerShape* shape, void* stream);
}

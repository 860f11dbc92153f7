// Contract of the op `tagger_step` between ops.cpp and its kernels: what surrounds the network in one of Tagger's
// iterations. No dependency on torch.
//
// Conventions are those of tagger.h. In TaggerInputs of this op m has the masks' logits. Groups are 64 at most.
#pragma once

#include "tagger.h"

// What comes out of the network, before its normalisation over the rows and groups of a seed.
struct TaggerOutputs {
    TaggerInput x;         // (rows, pixels), the clean input
    TaggerInput z, m;      // (rows, groups, pixels); rows are `groups` strides of a group apart
    const void *c1, *b1;   // (seeds, pixels)
    const void* c2;        // (seeds)
    const void* variance;  // (seeds), null for Bernoulli
};

template <class T>
struct TaggerOutputsGradients {
    TaggerInput z, logits, nll;  // of the results
    const T* stats;              // as forward wrote them
    T* x;                        // (rows, pixels)
    T *z_pre, *m_pre;            // (rows, groups, pixels)
    T *c1, *b1;                  // (seeds, pixels)
    double* c2;                  // (tagger_outputs_items): an item's part of the gradient
    double* variance;            // the same of 2 v times the gradient; null for Bernoulli
};

// T is float or double. Items as in tagger.h: the inputs have [0, tagger_items), the outputs [0, tagger_outputs_items),
// of which those of a seed are beside each other.
namespace ladderfast::cpu {

static const int64_t kTaggerGroups = 64;

template <class T>
void tagger_step_inputs(bool gaussian, const TaggerInputs& in,
                        T* out,  // (rows, groups, 4, pixels): z, m, dz, likelihood
                        const TaggerShape& shape, int64_t begin, int64_t end);

template <class T>
void tagger_step_inputs_backward(bool gaussian,
                                 const TaggerInput& grad,  // (rows, groups, 4 pixels)
                                 const TaggerInputs& in,
                                 T* grad_x,         // (rows, pixels)
                                 T* grad_z,         // (rows, groups, pixels)
                                 T* grad_logits,    // (rows, groups, pixels)
                                 double* partials,  // (tagger_items(shape)), null for Bernoulli
                                 const TaggerShape& shape, int64_t begin, int64_t end);

int64_t tagger_outputs_items(const TaggerShape& shape);

// Elements of scratch that a thread needs for its items of the outputs, backward, at a multiple of 64 bytes; null if it
// needs none.
template <class T>
int64_t tagger_outputs_scratch(const TaggerOutputs& in, const TaggerShape& shape);

template <class T>
void tagger_step_outputs(bool gaussian, const TaggerOutputs& in,
                         T* z,       // (rows, groups, pixels)
                         T* logits,  // (rows, groups, pixels)
                         T* nll,     // (rows, pixels)
                         T* stats,   // (seeds, 4, pixels): mean and 1 / sqrt(variance + eps) of z, then of m
                         double eps, const TaggerShape& shape, int64_t begin, int64_t end);

template <class T>
void tagger_step_outputs_backward(bool gaussian, const TaggerOutputs& in, const TaggerOutputsGradients<T>& grad,
                                  T* scratch, const TaggerShape& shape, int64_t begin, int64_t end);

}  // namespace ladderfast::cpu

// CUDA, with the conventions of tagger.h. The variance has a dtype code of its own (that of z, or float32); stats are
// float64 for float64, else float32. For Bernoulli grad_scalar and grad_variance are null.
extern "C" {
int ladderfast_tagger_step_inputs_cuda(int gaussian, const TaggerInputs* in, void* out, int dtype, int scalar_dtype,
                                       const TaggerShape* shape, void* stream);

// workspace: ladderfast_tagger_workspace_cuda bytes, null for Bernoulli.
int ladderfast_tagger_step_inputs_backward_cuda(int gaussian, const TaggerInput* grad, const TaggerInputs* in,
                                                void* grad_x, void* grad_z, void* grad_logits, void* grad_scalar,
                                                void* workspace, int dtype, int scalar_dtype, const TaggerShape* shape,
                                                void* stream);

// Bytes of scratch for either direction, aligned to 16 bytes; depends on the shape only.
int64_t ladderfast_tagger_step_outputs_workspace_cuda(const TaggerShape* shape);

int ladderfast_tagger_step_outputs_cuda(int gaussian, const TaggerOutputs* in, void* z, void* logits, void* nll,
                                        void* stats, void* workspace, double eps, int dtype, int variance_dtype,
                                        const TaggerShape* shape, void* stream);

int ladderfast_tagger_step_outputs_backward_cuda(int gaussian, const TaggerOutputs* in, const TaggerInput* grad_z,
                                                 const TaggerInput* grad_logits, const TaggerInput* grad_nll,
                                                 const void* stats, void* grad_x, void* grad_z_pre, void* grad_m_pre,
                                                 void* grad_c1, void* grad_b1, void* grad_c2, void* grad_variance,
                                                 void* workspace, int dtype, int variance_dtype,
                                                 const TaggerShape* shape, void* stream);
}

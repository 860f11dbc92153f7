// Contract of the op `ln_convlstm` between ops.cpp and its kernels. No dependency on torch.
//
// Gates and their gradients are packed as (seeds, samples, 4, channels, positions), cells as (seeds, samples, channels,
// positions); with `channels_last` they are (seeds, samples, positions, 4, channels) and (seeds, samples, positions,
// channels). Pointers need no alignment beyond their element's. Outputs never alias inputs.
#pragma once

#include <stdint.h>

struct LnConvLstmShape {
    int64_t seeds, samples, channels, positions;
    int64_t inputs;  // that are normalised, 1 or 2; 0: one input, taken as it is
    int64_t channels_last;
    int64_t batch;  // the inputs are normalised by channel over samples and positions, not by sample
    int64_t cell;   // the cell is normalised on its way to h
};

template <class T>
struct LnConvLstmInputs {
    const T* x[2];                     // gates of each input; the second is null where there is none
    const T* rec;                      // gates added after the normalisation
    const T* c;                        // cells
    const T* weight[2];                // (seeds, 4 channels) for each input that is normalised
    const T* bias;                     // (seeds, 4 channels)
    const T *cell_weight, *cell_bias;  // (seeds, channels), null where the cell is not normalised
};

template <class T>
struct LnConvLstmOutputs {
    T* h;           // cells
    T* c_new;       // cells
    T* stats;       // (seeds, samples, inputs, 2): mean and 1 / sqrt(variance + eps); by channel (seeds, inputs, 3, 4
                    // channels): mean, 1 / sqrt(variance + eps), variance; mean and variance of no elements are 0
    T* cell_stats;  // (seeds, samples, 2): the same of the cell, null where it is not normalised
};

template <class T>
struct LnConvLstmGradients {
    const T* h;      // cells
    const T* c_new;  // cells
    const T* stats;  // as forward wrote them
    const T* cell_stats;
    const T* after;              // cells: c_new as forward wrote it; null where the cell is not normalised
    T* x[2];                     // gates for each input that is normalised; for an input taken as it is see rec
    T* rec;                      // gates; also the gradient of an input that is not normalised
    T* c;                        // cells
    T* weight[2];                // (seeds, 4 channels) for each input that is normalised
    T* bias;                     // (seeds, 4 channels)
    T *cell_weight, *cell_bias;  // (seeds, channels), null where the cell is not normalised
};

// The CPU passes are cut into work items whose number and extent depend on the shape alone, so that results do not
// depend on how items are spread over threads. T is float or double. Items of a pass run in any order, passes in turn:
//
//   forward:   statistics [0, statistics_items), forward [0, items), cell_statistics and cell_forward [0, cell_items)
//   backward:  cell_backward [0, cell_items), backward [0, items), reduce [0, reduce_items), finish [0, finish_items)
namespace ladderfast::cpu {

int64_t ln_convlstm_items(const LnConvLstmShape& shape);
int64_t ln_convlstm_cell_items(const LnConvLstmShape& shape);        // none where the cell is not normalised
int64_t ln_convlstm_statistics_items(const LnConvLstmShape& shape);  // none where an item has whole samples
int64_t ln_convlstm_finish_items(const LnConvLstmShape& shape);      // none there as well
int64_t ln_convlstm_reduce_items(const LnConvLstmShape& shape);
int64_t ln_convlstm_split_workspace(const LnConvLstmShape& shape);   // doubles that forward and backward need
int64_t ln_convlstm_reduce_workspace(const LnConvLstmShape& shape);  // elements of T that backward needs

template <class T>
void ln_convlstm_statistics(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, double* split, double eps,
                            const LnConvLstmShape& shape, int64_t begin, int64_t end);

template <class T>
void ln_convlstm_forward(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split,
                         double eps, const LnConvLstmShape& shape, int64_t begin, int64_t end);

template <class T>
void ln_convlstm_cell_statistics(const LnConvLstmOutputs<T>& out, double* split, const LnConvLstmShape& shape,
                                 int64_t begin, int64_t end);

template <class T>
void ln_convlstm_cell_forward(const LnConvLstmInputs<T>& in, const LnConvLstmOutputs<T>& out, const double* split,
                              double eps, const LnConvLstmShape& shape, int64_t begin, int64_t end);

template <class T>
void ln_convlstm_cell_backward(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,
                               T* workspace, const LnConvLstmShape& shape, int64_t begin, int64_t end);

template <class T>
void ln_convlstm_backward(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, double* split,
                          T* workspace, const LnConvLstmShape& shape, int64_t begin, int64_t end);

template <class T>
void ln_convlstm_reduce(const T* workspace, const LnConvLstmGradients<T>& grad, const LnConvLstmShape& shape,
                        int64_t begin, int64_t end);

template <class T>
void ln_convlstm_finish(const LnConvLstmInputs<T>& in, const LnConvLstmGradients<T>& grad, const double* split,
                        const LnConvLstmShape& shape, int64_t begin, int64_t end);

}  // namespace ladderfast::cpu

// CUDA. dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16; weight and bias, and their gradients, have a code of
// their own (that of x, or float32); stats are float64 where x is, else float32. `workspace` is
// ladderfast_ln_convlstm_workspace_cuda bytes of scratch, aligned to 16. Each returns a cudaError_t.
extern "C" {
int64_t ladderfast_ln_convlstm_workspace_cuda(const LnConvLstmShape* shape);

int ladderfast_ln_convlstm_forward_cuda(const LnConvLstmInputs<void>* in, const LnConvLstmOutputs<void>* out,
                                        void* workspace, double eps, int dtype, int params_dtype,
                                        const LnConvLstmShape* shape, void* stream);

int ladderfast_ln_convlstm_backward_cuda(const LnConvLstmInputs<void>* in, const LnConvLstmGradients<void>* grad,
                                         void* workspace, int dtype, int params_dtype, const LnConvLstmShape* shape,
                                         void* stream);
}

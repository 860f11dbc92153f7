// One step of the layer-normalised ConvLSTM on NVIDIA GPUs. Contract in ../ln_convlstm.h, formulas in
// ../math/ln_convlstm.h.
//
//   forward    moments -> merge_moments, by channel channel_moments -> merge_channel_moments
//              -> forward
//              normalised cell: -> moments -> merge_moments of c' -> cell_forward
//   backward   normalised cell: cell_backward -> merge_projections -> finish -> sum_partials of c'
//              -> backward -> merge_projections -> finish -> sum_partials
//              by channel without merge_projections, and another finish at the end
//
// `backward` recomputes the gates, writes the gradient of rec and leaves, for each sample, the two sums that the
// gradient of a normalised input needs. `finish` makes that gradient and the sums over samples and positions for
// weight and bias, a thread staying with its channel. Where statistics are by channel the gradient of an input needs
// these sums, and `finish` runs twice: for the sums, and for the gradient.
//
// A normalised cell splits a step by gates, so that none is read twice: `forward` makes i, f, g and c', `cell_forward`
// makes o and h; `cell_backward` goes back from h to o and to n = w c_hat + b, and `backward` from c' to the others.
// The gradient of n lies in between, not rounded.
//
// How the work is cut depends on the shape and the element type alone: sums have the same bits everywhere.
//
// Floor, for each cell with one input: numbers that a pass reads and writes, of the element type but for grad_n, and
// instructions of its loop over aligned slices on sm_90 in float32 (columns / runs; the parameters of a run's slice are
// loaded in the loop). What the moments read, forward reads again: from L2 where a few samples fit it. An H100 executes
// about nine instructions in the time of a byte: every pass should be bound by memory. Nothing of this has been
// measured on a GPU yet.
//
//                                   reads  writes    instructions
//   moments                           4                 124
//   channel_moments                   4                  38 /  82
//   forward                           9      2           91 / 104
//   backward                         11      5          126 / 133
//   finish                            8      4          310 / 107
//     by channel: sums                8                  82 /  80
//     by channel: gradient            8      4           98 /  87
//   with a normalised cell
//     forward                         7      1           61 /  73
//     moments of c'                   1                  31
//     cell_forward                    3      1           45 /  51
//     cell_backward                   4      2           63 /  64
//     finish, sums of grad_n          2                  65 /  21
//     backward                       10      4           91 / 100
#include "../ln_convlstm.h"

#include "../math/host_device.h"
#include "elements.cuh"
#include "launch.cuh"
#include "math.cuh"
#include "moments.cuh"
#include "walks.cuh"

#include <type_traits>

namespace ladderfast::cuda::coarse {
#include "../math/ln_convlstm.h"
}
namespace ladderfast::cuda::precise {
#include "../math/ln_convlstm.h"
}

namespace ladderfast::cuda {
namespace {

constexpr int kMoments = 16;  // gates of a thread in `moments`
constexpr int kSlices = 4;    // slices of a thread in `forward` and `backward`, at most, where a sample is cut
constexpr int kRows = 16;     // rows of a thread in `finish` by columns
constexpr int kDown = 8;      // threads below each other there

// Blocks that a multiprocessor must have room for. The compiler by itself would go for more and spill.
template <class T, bool whole = true>
constexpr int resident = sizeof(T) == 8 || !whole ? 1 : 2;

// Neighbouring cells of a run that a thread takes together; of columns kColumns.
template <class T>
constexpr int kCells = sizeof(T) == 8 ? 2 : 4;
// Neighbouring gates, or cells, in `finish`; G is the type of their gradient.
template <class G>
constexpr int kFinishRun = 16 / sizeof(G);
template <class T>
constexpr int kFinishColumns = sizeof(T) == 2 ? 2 : 1;

// Channels last and dense: a row is 4 gates of `width` = C cells. Otherwise a sample is one row of C * P cells, and a
// slice stays within the run of P positions of a channel.
struct StepPlan {
    bool columns;
    bool batch;        // statistics by channel
    int64_t samples;   // of all seeds
    int64_t per_seed;  // samples of a seed
    int64_t cells;     // of a sample
    int channels, rows, width, run;
    int slices;         // columns: of a row; runs: of a run
    int chunk, chunks;  // columns: rows of a block; runs: slices of a block
    int across;         // columns: threads side by side
};

// How `finish` is cut, for rows of `width` neighbouring channels or for runs of them: 4C of gates, or C of cells.
struct FinishPlan {
    bool columns;
    int64_t per_seed;  // samples of a seed
    int rows;          // columns: of a sample
    int run, per_run;  // runs: positions, and slices that cover them
    int width;
    int tiles;       // of channels: kFinishColumns for each of 32 threads, or one
    int64_t chunks;  // blocks that share a tile
};

// Sums of `count` values over the block, in a fixed order; every thread receives them.
template <int count, class V>
__device__ __forceinline__ void block_sum(V (&values)[count]) {
    __shared__ V shared[count][kThreads / 32];
#pragma unroll
    for (int j = 0; j < count; ++j) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) values[j] += __shfl_xor_sync(0xffffffffu, values[j], apart);
        if (threadIdx.x % 32 == 0) shared[j][threadIdx.x / 32] = values[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < count; ++j) {
        V sum = 0;
#pragma unroll
        for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared[j][warp];
        values[j] = sum;
    }
    __syncthreads();
}

// partial (samples, inputs, chunks, 2): mean and sum of squared deviations of a block's gates, which stay in registers
// between the two.
template <class T, int N, bool whole>
__global__ void __launch_bounds__(kThreads)
    moments(const T* __restrict__ x0, const T* __restrict__ x1, Compute<T>* __restrict__ partial, int64_t length,
            int chunks, int inputs) {
    using C = Compute<T>;
    const int chunk = blockIdx.x % chunks, input = blockIdx.x / chunks % inputs;
    const int64_t sample = blockIdx.x / chunks / inputs;
    const int64_t first = static_cast<int64_t>(chunk) * (kThreads * kMoments);
    const int64_t rest = length - first;
    const int count = rest < kThreads * kMoments ? static_cast<int>(rest) : kThreads * kMoments;
    const T* x = (input == 0 ? x0 : x1) + sample * length + first;

    C values[kMoments / N][N];
    C sum[1] = {0};
#pragma unroll
    for (int j = 0; j < kMoments / N; ++j) {
        const int at = (j * kThreads + static_cast<int>(threadIdx.x)) * N;
        const int left = count - at < N ? count - at : N;
        Pack<T, N> pack = {};
        if (left == N)
            pack = load<whole, N>(x + at, N);
        else if (left > 0)
            pack = load<false, N>(x + at, left);
        widen(pack, values[j]);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[0] += values[j][i];
    }
    block_sum(sum);
    const C rough = sum[0] / count;
    C deviations[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kMoments / N; ++j) {
        const int at = (j * kThreads + static_cast<int>(threadIdx.x)) * N;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const C d = at + i < count ? values[j][i] - rough : 0;
            deviations[0] += d;
            deviations[1] += d * d;
        }
    }
    block_sum(deviations);
    if (threadIdx.x == 0) {
        partial[2 * static_cast<int64_t>(blockIdx.x)] = rough + deviations[0] / count;
        partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = deviations[1] - deviations[0] * deviations[0] / count;
    }
}

// stats (samples, inputs, 2) from partial, one block for each sample and input.
template <class C>
__global__ void __launch_bounds__(kThreads)
    merge_moments(const C* __restrict__ partial, C* __restrict__ stats, int64_t length, int chunks, double eps) {
    partial += 2 * static_cast<int64_t>(blockIdx.x) * chunks;
    constexpr int64_t kFull = kThreads * kMoments;
    double sum[1] = {0};
#pragma unroll 1
    for (int j = threadIdx.x; j < chunks; j += kThreads)
        sum[0] += partial[2 * j] * static_cast<double>(j + 1 < chunks ? kFull : length - j * kFull);
    block_sum(sum);
    const double mean = sum[0] / static_cast<double>(length);
    double squares[1] = {0};
#pragma unroll 1
    for (int j = threadIdx.x; j < chunks; j += kThreads) {
        const double d = partial[2 * j] - mean;
        squares[0] += partial[2 * j + 1] + d * d * static_cast<double>(j + 1 < chunks ? kFull : length - j * kFull);
    }
    block_sum(squares);
    if (threadIdx.x == 0) {
        stats[2 * blockIdx.x] = static_cast<C>(mean);
        stats[2 * blockIdx.x + 1] = static_cast<C>(1.0 / sqrt(squares[0] / static_cast<double>(length) + eps));
    }
}

// partials (seeds, chunks, 3, 4C) of one input, by channel.
template <class T, int N, int U, template <int> class Walk, bool whole>
__global__ void __launch_bounds__(kThreads)
    channel_moments(const T* __restrict__ x, Compute<T>* __restrict__ partials, Plan plan) {
    chunk_moments<T, N, U, Walk, whole>(x, partials, plan);
}

// stats (seeds, inputs, 3, 4C), of which this is one input, from partials; a block for each tile of channels and seed.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    merge_channel_moments(const T* __restrict__ x, const Compute<T>* __restrict__ partials,
                          Compute<T>* __restrict__ stats, int inputs, double eps, Plan plan) {
    using C = Compute<T>;
    __shared__ MergedMoments<C> merged;
    const int tile = blockIdx.x % static_cast<unsigned>(plan.tiles);
    const int64_t seed = blockIdx.x / static_cast<unsigned>(plan.tiles);
    const Channels channels = Channels::of<N>(plan, tile);
    merge_chunks(x + seed * plan.rows * plan.channels * plan.inner, partials + seed * plan.chunks * 3 * plan.channels,
                 channels, plan, merged);
    if (threadIdx.x >= channels.count) return;
    const C var = merged.var[threadIdx.x];
    stats += seed * inputs * 3 * plan.channels + channels.first + threadIdx.x;
    stats[0] = merged.mean[threadIdx.x];
    stats[plan.channels] = static_cast<C>(1.0 / sqrt(static_cast<double>(var) + eps));
    stats[2 * plan.channels] = var;
}

// Mean and variance of no elements are 0.
template <class C>
__global__ void __launch_bounds__(kThreads) no_statistics(C* __restrict__ stats, int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < count) stats[i] = 0;
}

// No array is empty in C++.
template <int n>
constexpr int at_least_one = n > 0 ? n : 1;

// Of a sample: mean and 1 / std of each input, or of its cell.
template <int K, class C>
struct SampleStats {
    C mean[at_least_one<K>], rstd[at_least_one<K>];

    // Statistics by channel are the CellParams': here are those that change nothing.
    __device__ SampleStats(const C* stats, int64_t sample, bool by_channel = false) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            mean[k] = by_channel ? C(0) : stats[(sample * K + k) * 2];
            rstd[k] = by_channel ? C(1) : stats[(sample * K + k) * 2 + 1];
        }
    }
};

// The gates that a pass makes, of i, f, g, o.
template <int first_, int count_>
struct Gates {
    static constexpr int first = first_, count = count_;
};
using AllGates = Gates<0, 4>;
using StateGates = Gates<0, 3>;  // c' comes from them
using OutputGate = Gates<3, 1>;

// Parameters of N cells, N = 1 where the cells share a channel: for each gate bias, and weight and mean of each input.
// By channel the weight has 1 / std in it. With `cell` those of the normalised cell.
template <int K, class G, bool cell, int N, class T>
struct CellParams {
    using C = Compute<T>;
    C bias[G::count][N], weight[at_least_one<K>][G::count][N], mean[at_least_one<K>][G::count][N];
    C cell_weight[N], cell_bias[N];

    __device__ __forceinline__ CellParams(const LnConvLstmInputs<void>& in, const C* channel_stats,
                                          const SampleStats<K, C>& stats, bool float_params, const StepPlan& plan,
                                          int64_t seed, int channel, int count) {
        const int64_t channels = plan.channels;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            // Any channel for a cell that does not exist.
            const int its = i < count ? channel + i : channel;
#pragma unroll
            for (int j = 0; j < G::count; ++j) {
                const int64_t at = (seed * 4 + G::first + j) * channels + its;
                bias[j][i] = load_either<T>(in.bias, float_params, at);
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    weight[k][j][i] = load_either<T>(in.weight[k], float_params, at);
                    mean[k][j][i] = stats.mean[k];
                    if (plan.batch) {
                        const C* of = channel_stats + ((seed * K + k) * 12 + G::first + j) * channels + its;
                        mean[k][j][i] = of[0];
                        weight[k][j][i] *= of[4 * channels];
                    }
                }
            }
            if (cell) {
                cell_weight[i] = load_either<T>(in.cell_weight, float_params, seed * channels + its);
                cell_bias[i] = load_either<T>(in.cell_bias, float_params, seed * channels + its);
            }
        }
    }
};

// The gates of N cells; own is N where each cell has parameters of its own, else 1.
template <int K, class G, bool whole, bool cell, int own, int N, class T>
__device__ __forceinline__ void load_gates(const LnConvLstmInputs<void>& in, int64_t at, int64_t stride, int count,
                                           const SampleStats<K, Compute<T>>& stats,
                                           const CellParams<K, G, cell, own, T>& p,
                                           Compute<T> (&x_hat)[at_least_one<K>][G::count][N],
                                           Compute<T> (&a)[G::count][N]) {
    using C = Compute<T>;
#pragma unroll
    for (int j = 0; j < G::count; ++j) {
        const int64_t from = at + (G::first + j) * stride;
        C rec[N], x[N];
        widen(load<whole, N>(static_cast<const T*>(in.rec) + from, count), rec);
#pragma unroll
        for (int i = 0; i < N; ++i) a[j][i] = rec[i] + p.bias[j][own == 1 ? 0 : i];
#pragma unroll
        for (int k = 0; k < at_least_one<K>; ++k) {
            widen(load<whole, N>(static_cast<const T*>(in.x[k]) + from, count), x);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (K == 0) {
                    a[j][i] += x[i];
                } else {
                    x_hat[k][j][i] = (x[i] - p.mean[k][j][own == 1 ? 0 : i]) * stats.rstd[k];
                    a[j][i] += x_hat[k][j][i] * p.weight[k][j][own == 1 ? 0 : i];
                }
            }
        }
    }
}

// The formulas in the grade that suits the element type.
template <class T>
struct Formulas {
    using C = Compute<T>;

#define LF_GRADED(formula, ...)              \
    if constexpr (sizeof(T) == 2)            \
        return coarse::formula(__VA_ARGS__); \
    else                                     \
        return precise::formula(__VA_ARGS__)

    static __device__ __forceinline__ C state(const C (&a)[4], C c) { LF_GRADED(lstm_state, a, c); }
    static __device__ __forceinline__ void forward(const C (&a)[4], C c, C& c_new, C& h) {
        LF_GRADED(lstm_forward, a, c, c_new, h);
    }
    static __device__ __forceinline__ void backward(C grad_h, C grad_c_new, const C (&a)[4], C c, C (&grad_a)[4],
                                                    C& grad_c) {
        LF_GRADED(lstm_backward, grad_h, grad_c_new, a, c, grad_a, grad_c);
    }
    static __device__ __forceinline__ C cell_output(C a_o, C c_hat, C weight, C bias) {
        if constexpr (sizeof(T) == 2)
            return coarse::normalised_cell_output(coarse::sigmoid(a_o).value, c_hat, weight, bias);
        else
            return precise::normalised_cell_output(precise::sigmoid(a_o).value, c_hat, weight, bias);
    }
    static __device__ __forceinline__ void cell_output_backward(C grad_h, C a_o, C c_hat, C weight, C bias, C& grad_a_o,
                                                                C& grad_n) {
        LF_GRADED(normalised_cell_output_backward, grad_h, a_o, c_hat, weight, bias, grad_a_o, grad_n);
    }
    static __device__ __forceinline__ void cell_backward(C total, const C (&a)[4], C c, C (&grad_a)[4], C& grad_c) {
        LF_GRADED(normalised_cell_backward, total, a, c, grad_a, grad_c);
    }
#undef LF_GRADED
};

// Adds w grad_a and w grad_a x_hat of N cells to the sums of each input. A cell that is not there has no gradient, and
// adds nothing.
template <int K, class G, bool cell, int own, int N, class T>
__device__ __forceinline__ void add_projections(const CellParams<K, G, cell, own, T>& p,
                                                const Compute<T> (&grad_a)[G::count][N],
                                                const Compute<T> (&x_hat)[at_least_one<K>][G::count][N],
                                                Compute<T> (&projections)[at_least_one<2 * K>]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int j = 0; j < G::count; ++j) {
                const Compute<T> weighted = p.weight[k][j][own == 1 ? 0 : i] * grad_a[j][i];
                projections[2 * k] += weighted;
                projections[2 * k + 1] += weighted * x_hat[k][j][i];
            }
        }
    }
}

// Calls f(offset of the gates, of the cells, number of cells, parameters) for each slice of a thread.
template <int K, class G, bool cell, bool columns, int N, class T, class F>
__device__ __forceinline__ void for_slices(const LnConvLstmInputs<void>& in, const Compute<T>* channel_stats,
                                           const SampleStats<K, Compute<T>>& stats, bool float_params,
                                           const StepPlan& plan, const F& f) {
    const int chunk = blockIdx.x % plan.chunks;
    const int64_t sample = blockIdx.x / plan.chunks, seed = sample / plan.per_seed, base = sample * plan.cells;
    if constexpr (columns) {
        const int x = threadIdx.x % plan.across, y = threadIdx.x / plan.across, down = kThreads / plan.across;
        const int first = chunk * plan.chunk;
        const int end = first + plan.chunk < plan.rows ? first + plan.chunk : plan.rows;
#pragma unroll 1
        for (int slice = x; slice < plan.slices; slice += plan.across) {
            const int column = slice * N, count = plan.width - column < N ? plan.width - column : N;
            const CellParams<K, G, cell, N, T> p(in, channel_stats, stats, float_params, plan, seed, column, count);
#pragma unroll 1
            for (int row = first + y; row < end; row += down) {
                const int64_t at = base + static_cast<int64_t>(row) * plan.width;
                f(4 * at + column, at + column, count, p);
            }
        }
    } else {
        const int all = plan.channels * plan.slices, first = chunk * plan.chunk;
        const int end = first + plan.chunk < all ? first + plan.chunk : all;
#pragma unroll 1
        for (int slice = first + static_cast<int>(threadIdx.x); slice < end; slice += kThreads) {
            const int channel = slice / plan.slices, position = (slice - channel * plan.slices) * N;
            const int count = plan.run - position < N ? plan.run - position : N;
            const CellParams<K, G, cell, 1, T> p(in, channel_stats, stats, float_params, plan, seed, channel, 1);
            const int64_t at = static_cast<int64_t>(channel) * plan.run + position;
            f(4 * base + at, base + at, count, p);
        }
    }
}

// c' and h; c' alone where the cell is normalised.
template <class T, int K, bool cell, bool columns, bool whole>
__global__ void __launch_bounds__(kThreads)
    forward(LnConvLstmInputs<void> in, LnConvLstmOutputs<void> out, bool float_params, StepPlan plan) {
    using C = Compute<T>;
    using G = std::conditional_t<cell, StateGates, AllGates>;
    constexpr int N = columns ? kColumns : kCells<T>;
    const auto* const of = static_cast<const C*>(out.stats);
    const SampleStats<K, C> stats(of, blockIdx.x / plan.chunks, plan.batch);
    for_slices<K, G, false, columns, N, T>(
        in, of, stats, float_params, plan, [&](int64_t gates, int64_t cells, int count, const auto& p) {
            C x_hat[at_least_one<K>][G::count][N], a[G::count][N], c[N];
            [[maybe_unused]] C h[N];
            load_gates<K, G, whole, false, columns ? N : 1, N, T>(in, gates, plan.width, count, stats, p, x_hat, a);
            widen(load<whole, N>(static_cast<const T*>(in.c) + cells, count), c);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const C one[4] = {a[0][i], a[1][i], a[2][i], cell ? C(0) : a[G::count - 1][i]};
                C c_new;
                if constexpr (cell)
                    c_new = Formulas<T>::state(one, c[i]);
                else
                    Formulas<T>::forward(one, c[i], c_new, h[i]);
                c[i] = c_new;
            }
            store<whole, N>(static_cast<T*>(out.c_new) + cells, c, count);
            if constexpr (!cell) store<whole, N>(static_cast<T*>(out.h) + cells, h, count);
        });
}

// h from c' and its statistics.
template <class T, int K, bool columns, bool whole>
__global__ void __launch_bounds__(kThreads)
    cell_forward(LnConvLstmInputs<void> in, LnConvLstmOutputs<void> out, bool float_params, StepPlan plan) {
    using C = Compute<T>;
    constexpr int N = columns ? kColumns : kCells<T>, own = columns ? N : 1;
    const int64_t sample = blockIdx.x / plan.chunks;
    const auto* const of = static_cast<const C*>(out.stats);
    const SampleStats<K, C> stats(of, sample, plan.batch);
    const SampleStats<1, C> of_cell(static_cast<const C*>(out.cell_stats), sample);
    for_slices<K, OutputGate, true, columns, N, T>(
        in, of, stats, float_params, plan, [&](int64_t gates, int64_t cells, int count, const auto& p) {
            C x_hat[at_least_one<K>][1][N], a[1][N], c[N];
            load_gates<K, OutputGate, whole, true, own, N, T>(in, gates, plan.width, count, stats, p, x_hat, a);
            widen(load<whole, N>(static_cast<const T*>(out.c_new) + cells, count), c);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const C c_hat = (c[i] - of_cell.mean[0]) * of_cell.rstd[0];
                c[i] = Formulas<T>::cell_output(a[0][i], c_hat, p.cell_weight[own == 1 ? 0 : i],
                                                p.cell_bias[own == 1 ? 0 : i]);
            }
            store<whole, N>(static_cast<T*>(out.h) + cells, c, count);
        });
}

// The gradient of the output gate, and that of n in grad_n, laid out as the cells. cell_partial (samples, chunks, 2):
// sums of w grad_n and of w grad_n c_hat; partial (samples, chunks, 2 K): the output gate's part of those of
// `backward`.
template <class T, int K, bool columns, bool whole>
__global__ void __launch_bounds__(kThreads, resident<T, whole>)
    cell_backward(LnConvLstmInputs<void> in, LnConvLstmGradients<void> grad, Compute<T>* __restrict__ grad_n,
                  Compute<T>* __restrict__ cell_partial, Compute<T>* __restrict__ partial, bool float_params,
                  StepPlan plan) {
    using C = Compute<T>;
    constexpr int N = columns ? kColumns : kCells<T>, own = columns ? N : 1;
    const int64_t sample = blockIdx.x / plan.chunks;
    const auto* const of = static_cast<const C*>(grad.stats);
    const SampleStats<K, C> stats(of, sample, plan.batch);
    const SampleStats<1, C> of_cell(static_cast<const C*>(grad.cell_stats), sample);
    C sums[2] = {}, projections[at_least_one<2 * K>] = {};
    for_slices<K, OutputGate, true, columns, N, T>(
        in, of, stats, float_params, plan, [&](int64_t gates, int64_t cells, int count, const auto& p) {
            C x_hat[at_least_one<K>][1][N], a[1][N], c[N], grad_h[N];
            load_gates<K, OutputGate, whole, true, own, N, T>(in, gates, plan.width, count, stats, p, x_hat, a);
            widen(load<whole, N>(static_cast<const T*>(grad.after) + cells, count), c);
            widen(load<whole, N>(static_cast<const T*>(grad.h) + cells, count), grad_h);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const C c_hat = (c[i] - of_cell.mean[0]) * of_cell.rstd[0], w = p.cell_weight[own == 1 ? 0 : i];
                Formulas<T>::cell_output_backward(grad_h[i], a[0][i], c_hat, w, p.cell_bias[own == 1 ? 0 : i], a[0][i],
                                                  c[i]);
                sums[0] += w * c[i];
                sums[1] += w * c[i] * c_hat;
            }
            add_projections<K, OutputGate, true, own, N, T>(p, a, x_hat, projections);
            store<whole, N>(grad_n + cells, c, count);
            store<whole, N>(static_cast<T*>(grad.rec) + gates + 3 * plan.width, a[0], count);
        });
    block_sum(sums);
    if (threadIdx.x == 0) {
        cell_partial[2 * static_cast<int64_t>(blockIdx.x)] = sums[0];
        cell_partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = sums[1];
    }
    if constexpr (K > 0) {
        if (plan.batch) return;
        block_sum(projections);
        if (threadIdx.x != 0) return;
#pragma unroll
        for (int j = 0; j < 2 * K; ++j) partial[static_cast<int64_t>(blockIdx.x) * (2 * K) + j] = projections[j];
    }
}

// The gradients of the gates, with a normalised cell of all but the output gate, and of c. partial (samples, chunks,
// 2 K): sums of w grad_a and of w grad_a x_hat, to which the output gate's are added where they lie there already.
// cell_means (samples, 2), of w grad_n and of w grad_n c_hat.
template <class T, int K, bool cell, bool columns, bool whole>
__global__ void __launch_bounds__(kThreads, resident<T, whole>)
    backward(LnConvLstmInputs<void> in, LnConvLstmGradients<void> grad, const Compute<T>* __restrict__ grad_n,
             const Compute<T>* __restrict__ cell_means, Compute<T>* __restrict__ partial, bool float_params,
             StepPlan plan) {
    using C = Compute<T>;
    using G = std::conditional_t<cell, StateGates, AllGates>;
    constexpr int N = columns ? kColumns : kCells<T>, own = columns ? N : 1;
    const int64_t sample = blockIdx.x / plan.chunks;
    const auto* const of = static_cast<const C*>(grad.stats);
    const SampleStats<K, C> stats(of, sample, plan.batch);
    const SampleStats<cell, C> of_cell(static_cast<const C*>(grad.cell_stats), sample);
    C projections[at_least_one<2 * K>] = {};
    for_slices<K, G, cell, columns, N, T>(
        in, of, stats, float_params, plan, [&](int64_t gates, int64_t cells, int count, const auto& p) {
            C x_hat[at_least_one<K>][G::count][N], a[G::count][N], c[N], grad_c[N];
            [[maybe_unused]] C grad_h[N];
            load_gates<K, G, whole, cell, own, N, T>(in, gates, plan.width, count, stats, p, x_hat, a);
            widen(load<whole, N>(static_cast<const T*>(in.c) + cells, count), c);
            widen(load<whole, N>(static_cast<const T*>(grad.c_new) + cells, count), grad_c);
            if constexpr (cell) {
                C after[N], of_n[N];
                widen(load<whole, N>(static_cast<const T*>(grad.after) + cells, count), after);
                widen(load<whole, N>(grad_n + cells, count), of_n);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const C through = precise::normalised_backward(
                        of_n[i], (after[i] - of_cell.mean[0]) * of_cell.rstd[0], p.cell_weight[own == 1 ? 0 : i],
                        of_cell.rstd[0], cell_means[2 * sample], cell_means[2 * sample + 1]);
                    // Means give a gradient to a cell that is not there, too.
                    grad_c[i] = whole || i < count ? grad_c[i] + through : 0;
                }
            } else {
                widen(load<whole, N>(static_cast<const T*>(grad.h) + cells, count), grad_h);
            }
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const C one[4] = {a[0][i], a[1][i], a[2][i], cell ? C(0) : a[G::count - 1][i]};
                C grad_a[4], grad_before;
                if constexpr (cell)
                    Formulas<T>::cell_backward(grad_c[i], one, c[i], grad_a, grad_before);
                else
                    Formulas<T>::backward(grad_h[i], grad_c[i], one, c[i], grad_a, grad_before);
                grad_c[i] = grad_before;
#pragma unroll
                for (int j = 0; j < G::count; ++j) a[j][i] = grad_a[j];
            }
            add_projections<K, G, cell, own, N, T>(p, a, x_hat, projections);
            store<whole, N>(static_cast<T*>(grad.c) + cells, grad_c, count);
#pragma unroll
            for (int j = 0; j < G::count; ++j)
                store<whole, N>(static_cast<T*>(grad.rec) + gates + j * plan.width, a[j], count);
        });
    if constexpr (K > 0) {
        if (plan.batch) return;
        block_sum(projections);
        if (threadIdx.x != 0) return;
        partial += static_cast<int64_t>(blockIdx.x) * (2 * K);
#pragma unroll
        for (int j = 0; j < 2 * K; ++j) partial[j] = cell ? partial[j] + projections[j] : projections[j];
    }
}

// means (samples, K, 2) from partial, one block for each sample.
template <class C, int K>
__global__ void __launch_bounds__(kThreads)
    merge_projections(const C* __restrict__ partial, C* __restrict__ means, int64_t length, int chunks) {
    partial += static_cast<int64_t>(blockIdx.x) * chunks * (2 * K);
    double sums[2 * K] = {};
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
#pragma unroll
        for (int j = 0; j < 2 * K; ++j) sums[j] += partial[static_cast<int64_t>(chunk) * (2 * K) + j];
    }
    block_sum(sums);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int j = 0; j < 2 * K; ++j)
            means[static_cast<int64_t>(blockIdx.x) * (2 * K) + j] =
                static_cast<C>(sums[j] / static_cast<double>(length));
    }
}

// What `finish` is about: gates with their inputs, or cells.
template <class C>
struct Finish {
    const void *x[2], *weight[2];
    const void* grad_a;
    void* grad_x[2];
    const C* stats;
    const C* means;  // by sample (samples, inputs, 2), as merge_projections leaves them; by channel (seeds, 1 + inputs,
                     // 4C), sums over the batch as sum_partials leaves them
    C share;         // by channel: 1 / the number of its elements
};

// What it makes: by sample all at once or, of cells, the sums; by channel the sums first.
enum Pass { kAll, kSums, kChannelSums, kChannelGradient };
template <Pass pass>
constexpr bool by_channel = pass == kChannelSums || pass == kChannelGradient;
template <Pass pass>
constexpr bool makes_sums = pass != kChannelGradient;
template <Pass pass>
constexpr bool makes_gradient = pass == kAll || pass == kChannelGradient;

// The normalisation of a row's sample, or of a thread's channels, and what the gradient takes off.
template <int K, int own, class C>
struct Normalisation {
    C mean[at_least_one<K>][own], rstd[at_least_one<K>][own];
    C grad_mean[at_least_one<K>][own], projection[at_least_one<K>][own];

    template <Pass pass>
    __device__ __forceinline__ void of_sample(const Finish<C>& what, int64_t sample) {
        const SampleStats<K, C> stats(what.stats, sample);
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int i = 0; i < own; ++i) {
                mean[k][i] = stats.mean[k];
                rstd[k][i] = stats.rstd[k];
                if (!makes_gradient<pass>) continue;
                grad_mean[k][i] = what.means[(sample * K + k) * 2];
                projection[k][i] = what.means[(sample * K + k) * 2 + 1];
            }
        }
    }

    template <Pass pass>
    __device__ __forceinline__ void of_channels(const Finish<C>& what, const C (&weight)[at_least_one<K>][own],
                                                int64_t seed, int width, int channel, int count) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const C* stats = what.stats + (seed * K + k) * 3 * width + channel;
            const C* sums = what.means + seed * (1 + K) * width + channel;
#pragma unroll
            for (int i = 0; i < own; ++i) {
                if (i >= count) break;
                mean[k][i] = stats[i];
                rstd[k][i] = stats[width + i];
                if (!makes_gradient<pass>) continue;
                grad_mean[k][i] = weight[k][i] * sums[i] * what.share;
                projection[k][i] = weight[k][i] * sums[(1 + k) * width + i] * what.share;
            }
        }
    }
};

// grad_x of N neighbouring gates of one channel or of neighbouring ones, and their part of the sums for the parameters.
// G is the type of their gradient.
template <int K, Pass pass, bool whole, int own, int N, class T, class G>
__device__ __forceinline__ void finish_gates(const Finish<Compute<T>>& what, int64_t at, int count,
                                             const Normalisation<K, own, Compute<T>>& norm,
                                             const Compute<T> (&weight)[at_least_one<K>][own],
                                             Compute<T> (&sums)[1 + K][own]) {
    using C = Compute<T>;
    C grad_a[N];
    widen(load<whole, N>(static_cast<const G*>(what.grad_a) + at, count), grad_a);
    if (makes_sums<pass>) {
#pragma unroll
        for (int i = 0; i < N; ++i) sums[0][own == 1 ? 0 : i] += grad_a[i];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
        C x[N];
        widen(load<whole, N>(static_cast<const T*>(what.x[k]) + at, count), x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int mine = own == 1 ? 0 : i;
            const C x_hat = (x[i] - norm.mean[k][mine]) * norm.rstd[k][mine];
            if (makes_sums<pass>) sums[1 + k][mine] += grad_a[i] * x_hat;
            if (makes_gradient<pass>)
                x[i] = precise::normalised_backward(grad_a[i], x_hat, weight[k][mine], norm.rstd[k][mine],
                                                    norm.grad_mean[k][mine], norm.projection[k][mine]);
        }
        if (makes_gradient<pass>) store<whole, N>(static_cast<T*>(what.grad_x[k]) + at, x, count);
    }
}

// sums (seeds, chunks, 1 + K, width). Columns: a block takes 32 slices of a row and kDown * kRows rows of a seed.
template <class T, class G, int K, Pass pass, bool whole>
__global__ void __launch_bounds__(kThreads)
    finish_columns(Finish<Compute<T>> what, Compute<T>* __restrict__ partial, bool float_params, FinishPlan plan) {
    using C = Compute<T>;
    constexpr int N = kFinishColumns<T>;
    const int tile = blockIdx.x % plan.tiles, x = threadIdx.x % 32, y = threadIdx.x / 32;
    const int64_t above = blockIdx.x / plan.tiles, chunk = above % plan.chunks, seed = above / plan.chunks;
    const int64_t rows = plan.per_seed * plan.rows;
    const int width = plan.width, column = (tile * 32 + x) * N;
    const int count = width - column < N ? width - column : N;
    C sums[1 + K][N] = {}, weight[at_least_one<K>][N] = {};
    if (count > 0) {
        if (makes_gradient<pass>) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int i = 0; i < N; ++i)
                    if (i < count)
                        weight[k][i] = load_either<T>(what.weight[k], float_params, seed * width + column + i);
            }
        }
        Normalisation<K, N, C> norm = {};
        if (by_channel<pass>) norm.template of_channels<pass>(what, weight, seed, width, column, count);
        const int64_t first = chunk * (kDown * kRows), last = first + kDown * kRows;
        const int64_t end = last < rows ? last : rows;
#pragma unroll 2
        for (int64_t row = first + y; row < end; row += kDown) {
            if (!by_channel<pass>) norm.template of_sample<pass>(what, seed * plan.per_seed + row / plan.rows);
            finish_gates<K, pass, whole, N, N, T, G>(what, (seed * rows + row) * width + column, count, norm, weight,
                                                     sums);
        }
    }
    if constexpr (makes_sums<pass>) {
        __shared__ C shared[(1 + K) * N][kDown][32 + 1];
#pragma unroll
        for (int j = 0; j < (1 + K) * N; ++j) shared[j][y][x] = sums[j / N][j % N];
        __syncthreads();
        if (y >= (1 + K) * N) return;
        // Row j of the block's threads adds up the sums j.
#pragma unroll 1
        for (int j = y; j < (1 + K) * N; j += kDown) {
            C sum = 0;
#pragma unroll
            for (int i = 0; i < kDown; ++i) sum += shared[j][i][x];
            const int at = (tile * 32 + x) * N + j % N;
            if (at < width) partial[((seed * plan.chunks + chunk) * (1 + K) + j / N) * width + at] = sum;
        }
    }
}

// Runs: a block takes one of the channels and kThreads * kSlices slices of its samples.
template <class T, class G, int K, Pass pass, bool whole>
__global__ void __launch_bounds__(kThreads, resident<T>)
    finish_runs(Finish<Compute<T>> what, Compute<T>* __restrict__ partial, bool float_params, FinishPlan plan) {
    using C = Compute<T>;
    constexpr int N = kFinishRun<G>;
    const int width = plan.width, channel = blockIdx.x % width, per_run = plan.per_run;
    const int64_t above = blockIdx.x / width, chunk = above % plan.chunks, seed = above / plan.chunks;
    const int64_t all = plan.per_seed * per_run, first = chunk * (kThreads * kSlices);
    const int64_t end = first + kThreads * kSlices < all ? first + kThreads * kSlices : all;
    C sums[1 + K][1] = {}, weight[at_least_one<K>][1] = {};
    if (makes_gradient<pass>) {
#pragma unroll
        for (int k = 0; k < K; ++k) weight[k][0] = load_either<T>(what.weight[k], float_params, seed * width + channel);
    }
    Normalisation<K, 1, C> norm = {};
    if (by_channel<pass>) norm.template of_channels<pass>(what, weight, seed, width, channel, 1);
#pragma unroll 1
    for (int64_t slice = first + threadIdx.x; slice < end; slice += kThreads) {
        const int64_t row = slice / per_run;
        const int position = static_cast<int>(slice - row * per_run) * N;
        const int count = plan.run - position < N ? plan.run - position : N;
        const int64_t sample = seed * plan.per_seed + row;
        if (!by_channel<pass>) norm.template of_sample<pass>(what, sample);
        finish_gates<K, pass, whole, 1, N, T, G>(what, (sample * width + channel) * plan.run + position, count, norm,
                                                 weight, sums);
    }
    if constexpr (makes_sums<pass>) {
        C totals[1 + K];
#pragma unroll
        for (int j = 0; j <= K; ++j) totals[j] = sums[j][0];
        block_sum(totals);
        if (threadIdx.x == 0) {
#pragma unroll
            for (int j = 0; j <= K; ++j)
                partial[((seed * plan.chunks + chunk) * (1 + K) + j) * width + channel] = totals[j];
        }
    }
}

// Gradients of bias and of each weight from partial: a block takes 32 of the channels of one of them, eight threads
// each. totals (seeds, sums, width), or null, receives them unrounded.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const Compute<T>* __restrict__ partial, void* bias, void* weight0, void* weight1,
                 Compute<T>* __restrict__ totals, bool float_params, int64_t chunks, int width, int sums) {
    __shared__ double shared[kDown][32 + 1];
    const int groups = (width + 31) / 32, x = threadIdx.x % 32, y = threadIdx.x / 32;
    const int channel = blockIdx.x % groups * 32 + x, row = blockIdx.x / groups % sums;
    const int64_t seed = blockIdx.x / groups / sums;
    double sum = 0.0;
    if (channel < width) {
#pragma unroll 1
        for (int64_t chunk = y; chunk < chunks; chunk += kDown)
            sum += partial[((seed * chunks + chunk) * sums + row) * width + channel];
    }
    shared[y][x] = sum;
    __syncthreads();
    if (y != 0 || channel >= width) return;
#pragma unroll
    for (int i = 1; i < kDown; ++i) sum += shared[i][x];
    void* to = row == 0 ? bias : row == 1 ? weight0 : weight1;
    const auto rounded = static_cast<Compute<T>>(sum);
    store_either<T>(to, float_params, seed * width + channel, rounded);
    if (totals != nullptr) totals[(seed * sums + row) * width + channel] = rounded;
}

template <class T>
StepPlan plan_for(const LnConvLstmShape& s) {
    StepPlan plan = {};
    plan.columns = s.channels_last || s.positions == 1;
    plan.batch = s.batch;
    plan.samples = s.seeds * s.samples;
    plan.per_seed = s.samples;
    plan.cells = s.channels * s.positions;
    plan.channels = static_cast<int>(s.channels);
    plan.rows = plan.columns ? static_cast<int>(s.positions) : 1;
    plan.run = plan.columns ? 1 : static_cast<int>(s.positions);
    plan.width = static_cast<int>(plan.columns ? s.channels : plan.cells);
    if (plan.columns) {
        plan.slices = static_cast<int>(ceil_div(s.channels, kColumns));
        plan.across = 32;
        while (plan.across < kThreads && plan.across < plan.slices && kThreads / plan.across > plan.rows)
            plan.across *= 2;
        const int down = kThreads / plan.across;
        // About as many slices for a thread as in runs, and at least a row for each.
        const int64_t passes = ceil_div(plan.slices, plan.across);
        plan.chunk = down * static_cast<int>(passes < kSlices ? kSlices / passes : 1);
        plan.chunks = static_cast<int>(ceil_div(plan.rows, plan.chunk));
    } else {
        plan.slices = static_cast<int>(ceil_div(s.positions, kCells<T>));
        plan.chunk = kThreads * kSlices;
        plan.chunks = static_cast<int>(ceil_div(s.channels * plan.slices, plan.chunk));
    }
    return plan;
}

// For the gates, or for the cells; their gradient has the type G.
template <class T, class G>
FinishPlan finish_plan(const LnConvLstmShape& s, bool cells) {
    FinishPlan plan = {};
    const int64_t width = cells ? s.channels : 4 * s.channels;
    plan.columns = s.channels_last || s.positions == 1;
    plan.per_seed = s.samples;
    plan.width = static_cast<int>(width);
    if (plan.columns) {
        plan.rows = static_cast<int>(s.positions);
        plan.tiles = static_cast<int>(ceil_div(width, 32 * kFinishColumns<T>));
        plan.chunks = ceil_div(s.samples * s.positions, kDown * kRows);
    } else {
        plan.run = static_cast<int>(s.positions);
        plan.per_run = static_cast<int>(ceil_div(s.positions, kFinishRun<G>));
        plan.tiles = plan.width;
        plan.chunks = ceil_div(s.samples * plan.per_run, kThreads * kSlices);
    }
    return plan;
}

// The gates of an input as walks.cuh and moments.cuh have them.
struct ChannelShape {
    int64_t seeds, rows, channels, inner;

    explicit ChannelShape(const LnConvLstmShape& s)
        : seeds(s.seeds), rows(s.samples), channels(4 * s.channels), inner(s.positions) {
        if (!s.channels_last) return;
        rows *= inner;
        inner = 1;
    }
};

bool empty(const LnConvLstmShape& s) { return s.seeds * s.samples * s.channels * s.positions == 0; }

// A sample's gates are counted in 32 bits.
bool fits(const LnConvLstmShape& s) {
    constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);
    return s.channels <= kMost / 8 && s.positions <= kMost / 8 / (s.channels > 0 ? s.channels : 1) && s.inputs >= 0 &&
           s.inputs <= 2 && (!s.batch || (s.inputs > 0 && cuda::fits(ChannelShape(s))));
}

int64_t moment_chunks(int64_t length) { return ceil_div(length, kThreads * kMoments); }

// The parts of the workspace, in numbers of Compute<T>. Forward's moments lie at its beginning.
template <class T>
struct Workspace {
    int64_t grad_n = 0, partial = 0, means = 0, cell_partial = 0, cell_means = 0, totals = 0, sums = 0;
    int64_t moments = 0;

    explicit Workspace(const LnConvLstmShape& s) {
        if (empty(s)) return;
        const StepPlan plan = plan_for<T>(s);
        const int64_t gates = 4 * s.channels;
        sums = s.seeds * finish_plan<T, T>(s, false).chunks * (1 + s.inputs) * gates;
        if (s.batch) {
            moments = s.seeds * plan_chunks<T>(ChannelShape(s)).chunks * 3 * gates;
            totals = s.seeds * (1 + s.inputs) * gates;
        } else {
            moments = plan.samples * s.inputs * moment_chunks(4 * plan.cells) * 2;
            partial = plan.samples * s.inputs * plan.chunks * 2;
            means = plan.samples * s.inputs * 2;
        }
        if (!s.cell) return;
        grad_n = plan.samples * plan.cells;
        cell_partial = plan.samples * plan.chunks * 2;
        cell_means = plan.samples * 2;
        const int64_t cell_moments = plan.samples * moment_chunks(plan.cells) * 2;
        if (cell_moments > moments) moments = cell_moments;
        const int64_t cell_sums = s.seeds * finish_plan<T, Compute<T>>(s, true).chunks * 2 * s.channels;
        if (cell_sums > sums) sums = cell_sums;
    }
    int64_t bytes() const {
        const int64_t backward = grad_n + partial + means + cell_partial + cell_means + totals + sums;
        return (backward > moments ? backward : moments) * static_cast<int64_t>(sizeof(Compute<T>));
    }
};

// Calls f with null pointers to the element type of `dtype` and with the number of normalised inputs as a constant.
template <class F>
cudaError_t dispatch(int dtype, int params_dtype, const LnConvLstmShape& shape, const F& f) {
    if (dtype == kFloat64 && params_dtype != dtype) return cudaErrorInvalidValue;
    if (!fits(shape)) return cudaErrorInvalidValue;
    return cuda::dispatch(dtype, params_dtype, [&](auto* type) {
        if (shape.inputs == 0) return f(type, std::integral_constant<int, 0>{});
        if (shape.inputs == 1) return f(type, std::integral_constant<int, 1>{});
        return f(type, std::integral_constant<int, 2>{});
    });
}

// A step's slices are complete, and every pointer aligned to them; grad_n is where they are complete.
template <class T, class... Pointers>
bool whole_slices(const StepPlan& plan, Pointers... pointers) {
    const int n = plan.columns ? kColumns : kCells<T>;
    return sizeof(T) < 8 && (plan.columns ? plan.width : plan.run) % n == 0 && aligned_to(n * sizeof(T), pointers...);
}

// Statistics (samples, K, 2) of what lies in rows of `length` elements, one for each sample.
template <class T>
cudaError_t sample_statistics(const T* x0, const T* x1, Compute<T>* partial, Compute<T>* stats, int64_t samples,
                              int64_t length, int inputs, double eps, void* stream) {
    constexpr int N = 16 / sizeof(T);
    const int chunks = static_cast<int>(moment_chunks(length));
    const bool whole = length % N == 0 && aligned_to(16, x0, x1);
    const cudaError_t error = launch(whole ? moments<T, N, true> : moments<T, N, false>, samples * inputs * chunks,
                                     kThreads, stream, x0, x1, partial, length, chunks, inputs);
    if (error != cudaSuccess) return error;
    return launch(merge_moments<Compute<T>>, samples * inputs, kThreads, stream, partial, stats, length, chunks, eps);
}

// Statistics by channel of one input, in its part of (seeds, inputs, 3, 4C).
template <class T>
cudaError_t channel_statistics(const T* x, Compute<T>* partials, Compute<T>* stats, const LnConvLstmShape& shape,
                               double eps, void* stream) {
    constexpr int R = kRun<T>;
    const ChannelShape gates(shape);
    const Plan plan = plan_chunks<T>(gates);
    const int n = plan.columns ? kColumns : R;
    const bool whole = (plan.columns ? plan.width : plan.inner) % n == 0 && aligned_to(n * sizeof(T), x);
    auto first =
        plan.columns ? channel_moments<T, kColumns, 8, ColumnWalk, false> : channel_moments<T, R, 2, RunWalk, false>;
    if constexpr (sizeof(T) < 8) {
        if (whole)
            first = plan.columns ? channel_moments<T, kColumns, 8, ColumnWalk, true>
                                 : channel_moments<T, R, 2, RunWalk, true>;
    }
    const cudaError_t error =
        launch(first, plan.tiles * plan.chunks * gates.seeds, plan.threads, stream, x, partials, plan);
    if (error != cudaSuccess) return error;
    return launch(plan.columns ? merge_channel_moments<T, kColumns> : merge_channel_moments<T, R>,
                  plan.tiles * gates.seeds, kThreads, stream, x, partials, stats, static_cast<int>(shape.inputs), eps,
                  plan);
}

template <class T, int K>
cudaError_t run_forward(const LnConvLstmInputs<void>& in, const LnConvLstmOutputs<void>& out, void* workspace,
                        double eps, bool float_params, const LnConvLstmShape& shape, void* stream) {
    using C = Compute<T>;
    const StepPlan plan = plan_for<T>(shape);
    auto *const stats = static_cast<C*>(out.stats), *const partial = static_cast<C*>(workspace);
    cudaError_t error = cudaSuccess;
    if constexpr (K > 0) {
        const T* const x[2] = {static_cast<const T*>(in.x[0]), static_cast<const T*>(in.x[1])};
        if (shape.batch) {
            for (int k = 0; k < K && error == cudaSuccess; ++k)
                error = channel_statistics(x[k], partial, stats + k * 12 * shape.channels, shape, eps, stream);
        } else {
            error = sample_statistics(x[0], x[1], partial, stats, plan.samples, 4 * plan.cells, K, eps, stream);
        }
    }
    if (error != cudaSuccess) return error;
    const bool whole = whole_slices<T>(plan, in.x[0], in.x[1], in.rec, in.c, out.h, out.c_new);
    const int64_t blocks = plan.samples * plan.chunks;
    const auto launch_forward = [&](auto cell) {
        constexpr bool kCell = decltype(cell)::value;
        auto kernel = plan.columns ? forward<T, K, kCell, true, false> : forward<T, K, kCell, false, false>;
        if constexpr (sizeof(T) < 8) {
            if (whole) kernel = plan.columns ? forward<T, K, kCell, true, true> : forward<T, K, kCell, false, true>;
        }
        return launch(kernel, blocks, kThreads, stream, in, out, float_params, plan);
    };
    if (!shape.cell) return launch_forward(std::false_type{});
    error = launch_forward(std::true_type{});
    if (error != cudaSuccess) return error;
    error = sample_statistics<T>(static_cast<const T*>(out.c_new), nullptr, partial, static_cast<C*>(out.cell_stats),
                                 plan.samples, plan.cells, 1, eps, stream);
    if (error != cudaSuccess) return error;
    auto kernel = plan.columns ? cell_forward<T, K, true, false> : cell_forward<T, K, false, false>;
    if constexpr (sizeof(T) < 8) {
        if (whole) kernel = plan.columns ? cell_forward<T, K, true, true> : cell_forward<T, K, false, true>;
    }
    return launch(kernel, blocks, kThreads, stream, in, out, float_params, plan);
}

template <class T, class G, int K, Pass pass>
cudaError_t run_finish(const Finish<Compute<T>>& what, Compute<T>* sums, bool float_params, const FinishPlan& plan,
                       int64_t seeds, void* stream) {
    const int n = plan.columns ? kFinishColumns<T> : kFinishRun<G>;
    const bool whole = (plan.columns ? plan.width : plan.run) % n == 0 && aligned_to(n * sizeof(G), what.grad_a) &&
                       aligned_to(n * sizeof(T), what.x[0], what.x[1], what.grad_x[0], what.grad_x[1]);
    auto kernel = plan.columns ? finish_columns<T, G, K, pass, false> : finish_runs<T, G, K, pass, false>;
    if constexpr (sizeof(T) < 8) {
        if (whole) kernel = plan.columns ? finish_columns<T, G, K, pass, true> : finish_runs<T, G, K, pass, true>;
    }
    return launch(kernel, plan.tiles * plan.chunks * seeds, kThreads, stream, what, sums, float_params, plan);
}

template <class T, int K>
cudaError_t run_backward(const LnConvLstmInputs<void>& in, const LnConvLstmGradients<void>& grad, void* workspace,
                         bool float_params, const LnConvLstmShape& shape, void* stream) {
    using C = Compute<T>;
    const bool none = empty(shape);
    const StepPlan plan = none ? StepPlan{} : plan_for<T>(shape);
    const Workspace<T> parts(shape);
    // Grad_n first: it is aligned as the workspace is.
    auto* const grad_n = static_cast<C*>(workspace);
    auto *const partial = grad_n + parts.grad_n, *const means = partial + parts.partial;
    auto *const cell_partial = means + parts.means, *const cell_means = cell_partial + parts.cell_partial;
    auto *const totals = cell_means + parts.cell_means, *const sums = totals + parts.totals;
    const bool whole =
        whole_slices<T>(plan, in.x[0], in.x[1], in.rec, in.c, grad.h, grad.c_new, grad.after, grad.rec, grad.c);
    const int64_t blocks = plan.samples * plan.chunks;
    const auto sum = [&](void* bias, void* weight0, void* weight1, C* unrounded, int64_t chunks, int64_t width,
                         int count) {
        return launch(sum_partials<T>, ceil_div(width, 32) * count * shape.seeds, kThreads, stream, sums, bias, weight0,
                      weight1, unrounded, float_params, none ? 0 : chunks, static_cast<int>(width), count);
    };
    const auto launch_backward = [&](auto cell) {
        constexpr bool kCell = decltype(cell)::value;
        auto kernel = plan.columns ? backward<T, K, kCell, true, false> : backward<T, K, kCell, false, false>;
        if constexpr (sizeof(T) < 8) {
            if (whole) kernel = plan.columns ? backward<T, K, kCell, true, true> : backward<T, K, kCell, false, true>;
        }
        return launch(kernel, blocks, kThreads, stream, in, grad, grad_n, cell_means, partial, float_params, plan);
    };
    cudaError_t error = cudaSuccess;
    if (shape.cell) {
        const FinishPlan finish = finish_plan<T, C>(shape, true);
        if (!none) {
            auto kernel = plan.columns ? cell_backward<T, K, true, false> : cell_backward<T, K, false, false>;
            if constexpr (sizeof(T) < 8) {
                if (whole) kernel = plan.columns ? cell_backward<T, K, true, true> : cell_backward<T, K, false, true>;
            }
            error =
                launch(kernel, blocks, kThreads, stream, in, grad, grad_n, cell_partial, partial, float_params, plan);
            if (error != cudaSuccess) return error;
            error = launch(merge_projections<C, 1>, plan.samples, kThreads, stream, cell_partial, cell_means,
                           plan.cells, plan.chunks);
            if (error != cudaSuccess) return error;
            const Finish<C> what = {{grad.after}, {in.cell_weight}, grad_n, {}, static_cast<const C*>(grad.cell_stats)};
            error = run_finish<T, C, 1, kSums>(what, sums, float_params, finish, shape.seeds, stream);
            if (error != cudaSuccess) return error;
        }
        error = sum(grad.cell_bias, grad.cell_weight, nullptr, nullptr, finish.chunks, shape.channels, 2);
        if (error != cudaSuccess) return error;
    }
    if (!none) error = shape.cell ? launch_backward(std::true_type{}) : launch_backward(std::false_type{});
    if (error != cudaSuccess) return error;
    const FinishPlan finish = finish_plan<T, T>(shape, false);
    Finish<C> what = {{in.x[0], in.x[1]},
                      {in.weight[0], in.weight[1]},
                      grad.rec,
                      {grad.x[0], grad.x[1]},
                      static_cast<const C*>(grad.stats),
                      means,
                      C(1) / static_cast<C>(shape.samples * shape.positions)};
    const auto sum_gates = [&](C* unrounded) {
        return sum(grad.bias, grad.weight[0], grad.weight[1], unrounded, finish.chunks, finish.width, 1 + K);
    };
    if (none) return sum_gates(nullptr);
    if constexpr (K > 0) {
        if (shape.batch) {
            error = run_finish<T, T, K, kChannelSums>(what, sums, float_params, finish, shape.seeds, stream);
            if (error != cudaSuccess) return error;
            error = sum_gates(totals);
            if (error != cudaSuccess) return error;
            what.means = totals;
            return run_finish<T, T, K, kChannelGradient>(what, sums, float_params, finish, shape.seeds, stream);
        }
        error = launch(merge_projections<C, K>, plan.samples, kThreads, stream, partial, means, 4 * plan.cells,
                       plan.chunks);
        if (error != cudaSuccess) return error;
    }
    error = run_finish<T, T, K, kAll>(what, sums, float_params, finish, shape.seeds, stream);
    return error != cudaSuccess ? error : sum_gates(nullptr);
}

}  // namespace
}  // namespace ladderfast::cuda

extern "C" {

int64_t ladderfast_ln_convlstm_workspace_cuda(const LnConvLstmShape* shape) {
    using namespace ladderfast::cuda;
    if (empty(*shape) || !fits(*shape)) return 0;
    int64_t bytes = 0;
    for (const int64_t its :
         {Workspace<double>(*shape).bytes(), Workspace<float>(*shape).bytes(), Workspace<bfloat16>(*shape).bytes()})
        if (its > bytes) bytes = its;
    return bytes;
}

int ladderfast_ln_convlstm_forward_cuda(const LnConvLstmInputs<void>* in, const LnConvLstmOutputs<void>* out,
                                        void* workspace, double eps, int dtype, int params_dtype,
                                        const LnConvLstmShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, *shape, [&](auto* type, auto inputs) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (empty(*shape)) {
            const int64_t count = shape->batch ? shape->seeds * shape->inputs * 12 * shape->channels : 0;
            return launch(no_statistics<Compute<T>>, ceil_div(count, kThreads), kThreads, stream,
                          static_cast<Compute<T>*>(out->stats), count);
        }
        return run_forward<T, decltype(inputs)::value>(*in, *out, workspace, eps, params_dtype == kFloat32, *shape,
                                                       stream);
    });
}

int ladderfast_ln_convlstm_backward_cuda(const LnConvLstmInputs<void>* in, const LnConvLstmGradients<void>* grad,
                                         void* workspace, int dtype, int params_dtype, const LnConvLstmShape* shape,
                                         void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, *shape, [&](auto* type, auto inputs) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (shape->seeds == 0 || shape->channels == 0) return cudaSuccess;
        return run_backward<T, decltype(inputs)::value>(*in, *grad, workspace, params_dtype == kFloat32, *shape,
                                                        stream);
    });
}
}

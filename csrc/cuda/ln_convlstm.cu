// One step of the layer-normalised ConvLSTM on NVIDIA GPUs. Contract in ../ln_convlstm.h, formulas in
// ../math/ln_convlstm.h.
//
//   forward    moments -> merge_moments -> forward
//   backward   backward -> merge_projections -> finish -> sum_partials
//
// `backward` recomputes the gates, writes the gradient of rec and leaves, for each sample, the two sums that the
// gradient of a normalised input needs. `finish` makes that gradient and the sums over samples and positions for
// weight and bias, a thread staying with its channel. How the work is cut depends on the shape and the element type
// alone: sums have the same bits everywhere.
//
// Floor with one input, in numbers for each cell: forward reads 9 and writes 2, and moments reads 4 more, which L2
// keeps where a few samples fit it; backward reads 11 and writes 5, finish reads 8 and writes 4. Nothing of this has
// been measured on a GPU yet.
#include "../ln_convlstm.h"

#include "../math/host_device.h"
#include "elements.cuh"
#include "launch.cuh"
#include "math.cuh"

#include <type_traits>

namespace ladderfast::cuda::coarse {
#include "../math/ln_convlstm.h"
}
namespace ladderfast::cuda::precise {
#include "../math/ln_convlstm.h"
}

namespace ladderfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMoments = 16;  // gates of a thread in `moments`
constexpr int kSlices = 4;    // slices of a thread in `forward` and `backward`, at most, where a sample is cut
constexpr int kRows = 16;     // rows of a thread in `finish` by columns
constexpr int kDown = 8;      // threads below each other there

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that a multiprocessor must have room for. The compiler by itself would go for more and spill.
template <class T>
constexpr int resident = sizeof(T) == 8 ? 1 : 2;

// Neighbouring cells that a thread takes together.
template <class T>
constexpr int kRun = sizeof(T) == 8 ? 2 : 4;
constexpr int kColumns = 2;
// Neighbouring gates in `finish`.
template <class T>
constexpr int kFinishRun = 16 / sizeof(T);
template <class T>
constexpr int kFinishColumns = sizeof(T) == 2 ? 2 : 1;

// Channels last and dense: a row is 4 gates of `width` = C cells. Otherwise a sample is one row of C * P cells, and a
// slice stays within the run of P positions of a channel.
struct Plan {
    bool columns;
    int64_t samples;   // of all seeds
    int64_t per_seed;  // samples of a seed
    int64_t cells;     // of a sample
    int channels, rows, width, run;
    int slices;             // columns: of a row; runs: of a run
    int chunk, chunks;      // columns: rows of a block; runs: slices of a block
    int moments;            // chunks of a sample in `moments`
    int across;             // columns: threads side by side
    int finish_tiles;       // columns: tiles of 4C gates
    int64_t finish_chunks;  // blocks that share a tile or channel
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

template <int K, class C>
struct SampleStats {
    C mean[K > 0 ? K : 1], rstd[K > 0 ? K : 1];

    __device__ SampleStats(const C* stats, int64_t sample) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            mean[k] = stats[(sample * K + k) * 2];
            rstd[k] = stats[(sample * K + k) * 2 + 1];
        }
    }
};

// Parameters of N cells: bias, then each weight, four gates each; `one` set where the cells share a channel.
template <int K, int N, class T>
struct CellParams {
    Compute<T> bias[4][N], weight[K > 0 ? K : 1][4][N];

    __device__ __forceinline__ CellParams(const LnConvLstmInputs<void>& in, bool float_params, int64_t seed,
                                          int channels, int channel, int count) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                // Any channel for a cell that does not exist.
                const int64_t at = (seed * 4 + gate) * channels + (i < count ? channel + i : 0);
                bias[gate][i] = load_either<T>(in.bias, float_params, at);
#pragma unroll
                for (int k = 0; k < K; ++k) weight[k][gate][i] = load_either<T>(in.weight[k], float_params, at);
            }
        }
    }
};

// The gates of N cells; own is N where each cell has parameters of its own, else 1.
template <int K, bool whole, int own, int N, class T>
__device__ __forceinline__ void load_gates(const LnConvLstmInputs<void>& in, int64_t at, int64_t stride, int count,
                                           const SampleStats<K, Compute<T>>& stats, const CellParams<K, own, T>& p,
                                           Compute<T> (&x_hat)[K > 0 ? K : 1][4][N], Compute<T> (&a)[4][N]) {
    using C = Compute<T>;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
        C rec[N], x[N];
        widen(load<whole, N>(static_cast<const T*>(in.rec) + at + gate * stride, count), rec);
#pragma unroll
        for (int i = 0; i < N; ++i) a[gate][i] = rec[i] + p.bias[gate][own == 1 ? 0 : i];
#pragma unroll
        for (int k = 0; k < (K > 0 ? K : 1); ++k) {
            widen(load<whole, N>(static_cast<const T*>(in.x[k]) + at + gate * stride, count), x);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (K == 0) {
                    a[gate][i] += x[i];
                } else {
                    x_hat[k][gate][i] = (x[i] - stats.mean[k]) * stats.rstd[k];
                    a[gate][i] += x_hat[k][gate][i] * p.weight[k][gate][own == 1 ? 0 : i];
                }
            }
        }
    }
}

template <int K, bool whole, int own, int N, class T>
__device__ __forceinline__ void forward_cells(const LnConvLstmInputs<void>& in, const LnConvLstmOutputs<void>& out,
                                              int64_t gates, int64_t stride, int64_t cells, int count,
                                              const SampleStats<K, Compute<T>>& stats, const CellParams<K, own, T>& p) {
    using C = Compute<T>;
    C x_hat[K > 0 ? K : 1][4][N], a[4][N], c[N], h[N];
    load_gates<K, whole, own, N, T>(in, gates, stride, count, stats, p, x_hat, a);
    widen(load<whole, N>(static_cast<const T*>(in.c) + cells, count), c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const C one[4] = {a[0][i], a[1][i], a[2][i], a[3][i]};
        C c_new;
        if constexpr (sizeof(T) == 2)
            coarse::lstm_forward(one, c[i], c_new, h[i]);
        else
            precise::lstm_forward(one, c[i], c_new, h[i]);
        c[i] = c_new;
    }
    store<whole, N>(static_cast<T*>(out.c_new) + cells, c, count);
    store<whole, N>(static_cast<T*>(out.h) + cells, h, count);
}

// projections: of w grad_a and of w grad_a x_hat, for each input.
template <int K, bool whole, int own, int N, class T>
__device__ __forceinline__ void backward_cells(const LnConvLstmInputs<void>& in, const LnConvLstmGradients<void>& grad,
                                               int64_t gates, int64_t stride, int64_t cells, int count,
                                               const SampleStats<K, Compute<T>>& stats, const CellParams<K, own, T>& p,
                                               Compute<T> (&projections)[K > 0 ? 2 * K : 1]) {
    using C = Compute<T>;
    C x_hat[K > 0 ? K : 1][4][N], a[4][N], c[N], grad_h[N], grad_c[N];
    load_gates<K, whole, own, N, T>(in, gates, stride, count, stats, p, x_hat, a);
    widen(load<whole, N>(static_cast<const T*>(in.c) + cells, count), c);
    widen(load<whole, N>(static_cast<const T*>(grad.h) + cells, count), grad_h);
    widen(load<whole, N>(static_cast<const T*>(grad.c_new) + cells, count), grad_c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const C one[4] = {a[0][i], a[1][i], a[2][i], a[3][i]};
        C grad_a[4], grad_before;
        if constexpr (sizeof(T) == 2)
            coarse::lstm_backward(grad_h[i], grad_c[i], one, c[i], grad_a, grad_before);
        else
            precise::lstm_backward(grad_h[i], grad_c[i], one, c[i], grad_a, grad_before);
        grad_c[i] = grad_before;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
            a[gate][i] = grad_a[gate];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                // A cell that is not there has no gradient, and adds nothing.
                const C weighted = p.weight[k][gate][own == 1 ? 0 : i] * grad_a[gate];
                projections[2 * k] += weighted;
                projections[2 * k + 1] += weighted * x_hat[k][gate][i];
            }
        }
    }
    store<whole, N>(static_cast<T*>(grad.c) + cells, grad_c, count);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
        store<whole, N>(static_cast<T*>(grad.rec) + gates + gate * stride, a[gate], count);
}

// Calls f(offset of the gates, of the cells, number of cells, seed, parameters) for each slice of a thread.
template <int K, bool columns, int N, class T, class F>
__device__ __forceinline__ void for_slices(const LnConvLstmInputs<void>& in, bool float_params, const Plan& plan,
                                           const F& f) {
    const int chunk = blockIdx.x % plan.chunks;
    const int64_t sample = blockIdx.x / plan.chunks, seed = sample / plan.per_seed, base = sample * plan.cells;
    if constexpr (columns) {
        const int x = threadIdx.x % plan.across, y = threadIdx.x / plan.across, down = kThreads / plan.across;
        const int first = chunk * plan.chunk;
        const int end = first + plan.chunk < plan.rows ? first + plan.chunk : plan.rows;
#pragma unroll 1
        for (int slice = x; slice < plan.slices; slice += plan.across) {
            const int column = slice * N, count = plan.width - column < N ? plan.width - column : N;
            const CellParams<K, N, T> p(in, float_params, seed, plan.channels, column, count);
#pragma unroll 1
            for (int row = first + y; row < end; row += down) {
                const int64_t at = base + static_cast<int64_t>(row) * plan.width;
                f(4 * at + column, at + column, count, sample, p);
            }
        }
    } else {
        const int all = plan.channels * plan.slices, first = chunk * plan.chunk;
        const int end = first + plan.chunk < all ? first + plan.chunk : all;
#pragma unroll 1
        for (int slice = first + static_cast<int>(threadIdx.x); slice < end; slice += kThreads) {
            const int channel = slice / plan.slices, position = (slice - channel * plan.slices) * N;
            const int count = plan.run - position < N ? plan.run - position : N;
            const CellParams<K, 1, T> p(in, float_params, seed, plan.channels, channel, 1);
            const int64_t at = static_cast<int64_t>(channel) * plan.run + position;
            f(4 * base + at, base + at, count, sample, p);
        }
    }
}

template <class T, int K, bool columns, bool whole>
__global__ void __launch_bounds__(kThreads)
    forward(LnConvLstmInputs<void> in, LnConvLstmOutputs<void> out, bool float_params, Plan plan) {
    constexpr int N = columns ? kColumns : kRun<T>;
    const SampleStats<K, Compute<T>> stats(static_cast<const Compute<T>*>(out.stats), blockIdx.x / plan.chunks);
    for_slices<K, columns, N, T>(
        in, float_params, plan, [&](int64_t gates, int64_t cells, int count, int64_t, const auto& p) {
            forward_cells<K, whole, columns ? N : 1, N, T>(in, out, gates, plan.width, cells, count, stats, p);
        });
}

// partial (samples, chunks, 2 K).
template <class T, int K, bool columns, bool whole>
__global__ void __launch_bounds__(kThreads, resident<T>)
    backward(LnConvLstmInputs<void> in, LnConvLstmGradients<void> grad, Compute<T>* __restrict__ partial,
             bool float_params, Plan plan) {
    constexpr int N = columns ? kColumns : kRun<T>;
    const SampleStats<K, Compute<T>> stats(static_cast<const Compute<T>*>(grad.stats), blockIdx.x / plan.chunks);
    Compute<T> projections[K > 0 ? 2 * K : 1] = {};
    for_slices<K, columns, N, T>(in, float_params, plan,
                                 [&](int64_t gates, int64_t cells, int count, int64_t, const auto& p) {
                                     backward_cells<K, whole, columns ? N : 1, N, T>(in, grad, gates, plan.width, cells,
                                                                                     count, stats, p, projections);
                                 });
    if constexpr (K > 0) {
        block_sum(projections);
        if (threadIdx.x == 0) {
#pragma unroll
            for (int j = 0; j < 2 * K; ++j) partial[static_cast<int64_t>(blockIdx.x) * (2 * K) + j] = projections[j];
        }
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

// grad_x of N neighbouring gates of one channel or of neighbouring ones, and their part of the sums for the parameters.
template <int K, bool whole, int own, int N, class T>
__device__ __forceinline__ void finish_gates(const LnConvLstmInputs<void>& in, const LnConvLstmGradients<void>& grad,
                                             const Compute<T>* means, int64_t at, int64_t sample, int count,
                                             const Compute<T> (&weight)[K > 0 ? K : 1][own],
                                             Compute<T> (&sums)[1 + K][own]) {
    using C = Compute<T>;
    const SampleStats<K, C> stats(static_cast<const C*>(grad.stats), sample);
    C grad_a[N];
    widen(load<whole, N>(static_cast<const T*>(grad.rec) + at, count), grad_a);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[0][own == 1 ? 0 : i] += grad_a[i];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const C mean = means[(sample * K + k) * 2], projection = means[(sample * K + k) * 2 + 1];
        C x[N];
        widen(load<whole, N>(static_cast<const T*>(in.x[k]) + at, count), x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const C x_hat = (x[i] - stats.mean[k]) * stats.rstd[k];
            sums[1 + k][own == 1 ? 0 : i] += grad_a[i] * x_hat;
            x[i] = precise::normalised_backward(grad_a[i], x_hat, weight[k][own == 1 ? 0 : i], stats.rstd[k], mean,
                                                projection);
        }
        store<whole, N>(static_cast<T*>(grad.x[k]) + at, x, count);
    }
}

// sums (seeds, chunks, 1 + K, 4C). Columns: a block takes 32 slices of a row and kDown * kRows rows of a seed.
template <class T, int K, bool whole>
__global__ void __launch_bounds__(kThreads)
    finish_columns(LnConvLstmInputs<void> in, LnConvLstmGradients<void> grad, const Compute<T>* __restrict__ means,
                   Compute<T>* __restrict__ partial, bool float_params, Plan plan) {
    using C = Compute<T>;
    constexpr int N = kFinishColumns<T>;
    __shared__ C shared[(1 + K) * N][kDown][32 + 1];
    const int tile = blockIdx.x % plan.finish_tiles, x = threadIdx.x % 32, y = threadIdx.x / 32;
    const int64_t above = blockIdx.x / plan.finish_tiles, chunk = above % plan.finish_chunks;
    const int64_t seed = above / plan.finish_chunks, rows = plan.per_seed * plan.rows;
    const int width = 4 * plan.channels, column = (tile * 32 + x) * N;
    const int count = width - column < N ? width - column : N;
    C sums[1 + K][N] = {}, weight[K > 0 ? K : 1][N] = {};
    if (count > 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (i < count) weight[k][i] = load_either<T>(in.weight[k], float_params, seed * width + column + i);
        }
        const int64_t first = chunk * (kDown * kRows), last = first + kDown * kRows;
        const int64_t end = last < rows ? last : rows;
#pragma unroll 2
        for (int64_t row = first + y; row < end; row += kDown) {
            const int64_t sample = seed * plan.per_seed + row / plan.rows;
            finish_gates<K, whole, N, N, T>(in, grad, means, (seed * rows + row) * width + column, sample, count,
                                            weight, sums);
        }
    }
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
        if (at < width) partial[((seed * plan.finish_chunks + chunk) * (1 + K) + j / N) * width + at] = sum;
    }
}

// Runs: a block takes one of the 4C channels and kThreads * kSlices slices of its samples.
template <class T, int K, bool whole>
__global__ void __launch_bounds__(kThreads, resident<T>)
    finish_runs(LnConvLstmInputs<void> in, LnConvLstmGradients<void> grad, const Compute<T>* __restrict__ means,
                Compute<T>* __restrict__ partial, bool float_params, Plan plan) {
    using C = Compute<T>;
    constexpr int N = kFinishRun<T>;
    const int width = 4 * plan.channels, channel = blockIdx.x % width;
    const int64_t above = blockIdx.x / width, chunk = above % plan.finish_chunks, seed = above / plan.finish_chunks;
    const int per_run = static_cast<int>(ceil_div(plan.run, N));
    const int64_t all = plan.per_seed * per_run, first = chunk * (kThreads * kSlices);
    const int64_t end = first + kThreads * kSlices < all ? first + kThreads * kSlices : all;
    C sums[1 + K][1] = {}, weight[K > 0 ? K : 1][1] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) weight[k][0] = load_either<T>(in.weight[k], float_params, seed * width + channel);
#pragma unroll 1
    for (int64_t slice = first + threadIdx.x; slice < end; slice += kThreads) {
        const int64_t row = slice / per_run;
        const int position = static_cast<int>(slice - row * per_run) * N;
        const int count = plan.run - position < N ? plan.run - position : N;
        const int64_t sample = seed * plan.per_seed + row;
        finish_gates<K, whole, 1, N, T>(in, grad, means, (sample * width + channel) * plan.run + position, sample,
                                        count, weight, sums);
    }
    C totals[1 + K];
#pragma unroll
    for (int j = 0; j <= K; ++j) totals[j] = sums[j][0];
    block_sum(totals);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int j = 0; j <= K; ++j)
            partial[((seed * plan.finish_chunks + chunk) * (1 + K) + j) * width + channel] = totals[j];
    }
}

// Gradients of bias and of each weight from partial: a block takes 32 of the 4C channels of one of them, eight threads
// each.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const Compute<T>* __restrict__ partial, void* bias, void* weight0, void* weight1, bool float_params,
                 int64_t chunks, int width, int sums) {
    __shared__ double shared[kDown][32 + 1];
    const int groups = static_cast<int>(ceil_div(width, 32)), x = threadIdx.x % 32, y = threadIdx.x / 32;
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
    store_either<T>(to, float_params, seed * width + channel, static_cast<Compute<T>>(sum));
}

template <class T>
Plan plan_for(const LnConvLstmShape& s) {
    Plan plan = {};
    plan.columns = s.channels_last || s.positions == 1;
    plan.samples = s.seeds * s.samples;
    plan.per_seed = s.samples;
    plan.cells = s.channels * s.positions;
    plan.channels = static_cast<int>(s.channels);
    plan.rows = plan.columns ? static_cast<int>(s.positions) : 1;
    plan.run = plan.columns ? 1 : static_cast<int>(s.positions);
    plan.width = static_cast<int>(plan.columns ? s.channels : plan.cells);
    plan.moments = static_cast<int>(ceil_div(4 * plan.cells, kThreads * kMoments));
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
        plan.finish_tiles = static_cast<int>(ceil_div(4 * s.channels, 32 * kFinishColumns<T>));
        plan.finish_chunks = ceil_div(s.samples * s.positions, kDown * kRows);
    } else {
        plan.slices = static_cast<int>(ceil_div(s.positions, kRun<T>));
        plan.chunk = kThreads * kSlices;
        plan.chunks = static_cast<int>(ceil_div(s.channels * plan.slices, plan.chunk));
        plan.finish_chunks = ceil_div(s.samples * ceil_div(s.positions, kFinishRun<T>), kThreads * kSlices);
    }
    return plan;
}

bool empty(const LnConvLstmShape& s) { return s.seeds * s.samples * s.channels * s.positions == 0; }

// A sample's gates are counted in 32 bits. There are no kernels for statistics by channel or for a normalised cell.
bool fits(const LnConvLstmShape& s) {
    constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);
    return s.channels <= kMost / 8 && s.positions <= kMost / 8 / (s.channels > 0 ? s.channels : 1) && s.inputs >= 0 &&
           s.inputs <= 2 && !s.batch && !s.cell;
}

// The parts of the workspace, in numbers of Compute<T>.
struct Workspace {
    int64_t projections, means, sums;

    Workspace(const Plan& plan, const LnConvLstmShape& s) {
        const int64_t chunks = plan.chunks > plan.moments ? plan.chunks : plan.moments;
        projections = plan.samples * s.inputs * chunks * 2;
        means = plan.samples * s.inputs * 2;
        sums = s.seeds * plan.finish_chunks * (1 + s.inputs) * 4 * s.channels;
    }
    int64_t all() const { return projections + means + sums; }
};

// Calls f with null pointers to the element type of `dtype` and with the number of normalised inputs as a constant.
template <class F>
cudaError_t dispatch(int dtype, int params_dtype, const LnConvLstmShape& shape, const F& f) {
    if ((params_dtype != dtype && params_dtype != kFloat32) || (dtype == kFloat64 && params_dtype != dtype))
        return cudaErrorInvalidValue;
    if (!fits(shape)) return cudaErrorInvalidValue;
    const auto with_inputs = [&](auto* type) {
        if (shape.inputs == 0) return f(type, std::integral_constant<int, 0>{});
        if (shape.inputs == 1) return f(type, std::integral_constant<int, 1>{});
        return f(type, std::integral_constant<int, 2>{});
    };
    switch (dtype) {
        case kFloat32:
            return with_inputs(static_cast<float*>(nullptr));
        case kFloat64:
            return with_inputs(static_cast<double*>(nullptr));
        case kBFloat16:
            return with_inputs(static_cast<bfloat16*>(nullptr));
        case kFloat16:
            return with_inputs(static_cast<float16*>(nullptr));
        default:
            return cudaErrorInvalidValue;
    }
}

template <class T, int K>
cudaError_t run_forward(const LnConvLstmInputs<void>& in, const LnConvLstmOutputs<void>& out, void* workspace,
                        double eps, bool float_params, const LnConvLstmShape& shape, void* stream) {
    const Plan plan = plan_for<T>(shape);
    const int64_t length = 4 * plan.cells;
    auto* const stats = static_cast<Compute<T>*>(out.stats);
    if constexpr (K > 0) {
        constexpr int N = 16 / sizeof(T);
        const auto *x0 = static_cast<const T*>(in.x[0]), *x1 = static_cast<const T*>(in.x[1]);
        auto* const partial = static_cast<Compute<T>*>(workspace);
        const bool whole = length % N == 0 && aligned_to(16, x0, x1);
        cudaError_t error = launch(whole ? moments<T, N, true> : moments<T, N, false>, plan.samples * K * plan.moments,
                                   kThreads, stream, x0, x1, partial, length, plan.moments, K);
        if (error != cudaSuccess) return error;
        error = launch(merge_moments<Compute<T>>, plan.samples * K, kThreads, stream, partial, stats, length,
                       plan.moments, eps);
        if (error != cudaSuccess) return error;
    }
    const int n = plan.columns ? kColumns : kRun<T>;
    const bool whole = (plan.columns ? plan.width : plan.run) % n == 0 && sizeof(T) < 8 &&
                       aligned_to(n * sizeof(T), in.x[0], in.x[1], in.rec, in.c, out.h, out.c_new);
    auto kernel = plan.columns ? forward<T, K, true, false> : forward<T, K, false, false>;
    if constexpr (sizeof(T) < 8) {
        if (whole) kernel = plan.columns ? forward<T, K, true, true> : forward<T, K, false, true>;
    }
    return launch(kernel, plan.samples * plan.chunks, kThreads, stream, in, out, float_params, plan);
}

template <class T, int K>
cudaError_t run_backward(const LnConvLstmInputs<void>& in, const LnConvLstmGradients<void>& grad, void* workspace,
                         bool float_params, const LnConvLstmShape& shape, void* stream) {
    const bool none = empty(shape);
    const Plan plan = none ? Plan{} : plan_for<T>(shape);
    const Workspace parts(plan, shape);
    auto* const partial = static_cast<Compute<T>*>(workspace);
    auto *const means = partial + parts.projections, *const sums = means + parts.means;
    const int width = static_cast<int>(4 * shape.channels);
    if (!none) {
        int n = plan.columns ? kColumns : kRun<T>;
        const int64_t line = plan.columns ? plan.width : plan.run;
        bool whole = line % n == 0 &&
                     aligned_to(n * sizeof(T), in.x[0], in.x[1], in.rec, in.c, grad.h, grad.c_new, grad.rec, grad.c);
        auto kernel = plan.columns ? backward<T, K, true, false> : backward<T, K, false, false>;
        if constexpr (sizeof(T) < 8) {
            if (whole) kernel = plan.columns ? backward<T, K, true, true> : backward<T, K, false, true>;
        }
        cudaError_t error =
            launch(kernel, plan.samples * plan.chunks, kThreads, stream, in, grad, partial, float_params, plan);
        if (error != cudaSuccess) return error;
        if constexpr (K > 0) {
            error = launch(merge_projections<Compute<T>, K>, plan.samples, kThreads, stream, partial, means,
                           4 * plan.cells, plan.chunks);
            if (error != cudaSuccess) return error;
        }
        n = plan.columns ? kFinishColumns<T> : kFinishRun<T>;
        whole = (plan.columns ? width : plan.run) % n == 0 &&
                aligned_to(n * sizeof(T), in.x[0], in.x[1], grad.rec, grad.x[0], grad.x[1]);
        auto finish = plan.columns ? finish_columns<T, K, false> : finish_runs<T, K, false>;
        if constexpr (sizeof(T) < 8) {
            if (whole) finish = plan.columns ? finish_columns<T, K, true> : finish_runs<T, K, true>;
        }
        const int64_t tiles = plan.columns ? plan.finish_tiles : width;
        error = launch(finish, tiles * plan.finish_chunks * shape.seeds, kThreads, stream, in, grad, means, sums,
                       float_params, plan);
        if (error != cudaSuccess) return error;
    }
    return launch(sum_partials<T>, ceil_div(width, 32) * (1 + K) * shape.seeds, kThreads, stream, sums, grad.bias,
                  grad.weight[0], grad.weight[1], float_params, plan.finish_chunks, width, 1 + K);
}

}  // namespace
}  // namespace ladderfast::cuda

extern "C" {

int64_t ladderfast_ln_convlstm_workspace_cuda(const LnConvLstmShape* shape) {
    using namespace ladderfast::cuda;
    if (empty(*shape) || !fits(*shape)) return 0;
    // The types differ in their number of chunks, and float64 takes 8 bytes for a sum.
    int64_t bytes = Workspace(plan_for<double>(*shape), *shape).all() * 8;
    for (const Plan& plan : {plan_for<float>(*shape), plan_for<bfloat16>(*shape)}) {
        const int64_t its = Workspace(plan, *shape).all() * 4;
        if (its > bytes) bytes = its;
    }
    return bytes;
}

int ladderfast_ln_convlstm_forward_cuda(const LnConvLstmInputs<void>* in, const LnConvLstmOutputs<void>* out,
                                        void* workspace, double eps, int dtype, int params_dtype,
                                        const LnConvLstmShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, *shape, [&](auto* type, auto inputs) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (empty(*shape)) return cudaSuccess;
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

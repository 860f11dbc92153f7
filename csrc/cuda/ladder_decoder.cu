// A Ladder decoder layer on NVIDIA GPUs. Contract in ../ladder_decoder.h, formulas in ../math/{combinator,
// ladder_decoder}.h, walks in walks.cuh, statistics in moments.cuh.
//
//   held     Small layers, 512 rows of float32 or 256 of 16 bits at most: a block keeps all rows of a few columns in
//            registers, or all of a channel where inner > 1. Each pass is one launch, and reads and writes every
//            element once. A second launch adds up the blocks' shares of the cost.
//   chunks   Other shapes. forward: moments of chunks; merge them, combine and compare; sum the cost. backward: sums of
//            chunks, and what does not depend on them; finish the sums; gradient of u. In 16 bits the last pass
//            recomputes what reaches the normalised u, in 32 it finds it where the first one left it, in grad_u.
//
// What bounds it, in bytes per element (float32 / 16 bits), all tensors given and wanted:
//
//                     held        chunks      least
//   forward           16 / 8      20 / 10     16 / 8      u, z, clean_z; z_hat
//   backward          28 / 14     40 / 22     28 / 14     grad_z_hat, u, z, clean_z; grad_u, grad_z, grad_clean_z
//
// A pass takes 4 special functions for an element, 6 with squash_v, the recomputing one again. Instructions for an
// element, in the machine code of the loops over whole slices of columns on sm_90, which holds both ways of squash_v:
// statistics 9 / 10, forward 59 / 51, sums 91 / 75, gradient of u 11 / 64. A multiprocessor takes 16 special functions
// and 128 other instructions in a cycle, so that an H200 should be bound by memory, except backward in 16-bit chunks,
// where arithmetic comes near; and layers that its cache holds by latency and launches. Nothing of this has been
// measured on a GPU yet.
#include "../ladder_decoder.h"

#include "combinator.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "moments.cuh"
#include "sums.cuh"
#include "walks.cuh"

#include <type_traits>

namespace ladderfast::cuda {
#include "../math/ladder_decoder.h"

namespace {

// What both passes read.
template <class T>
struct Layer {
    const T *u, *z, *clean_z;
    const void* params;
    const Compute<T>*mean, *var;  // of the clean z, or null
    Compute<T> eps;
    bool float_params, squash;

    __device__ void advance_by(int64_t n) {
        u += n;
        z += n;
        if (clean_z != nullptr) clean_z += n;
    }
};

// What a thread keeps of a channel.
template <class T>
struct Channel {
    Params<T> p;
    DecoderColumn<Compute<T>> column;
};

// load and store where only the launch knows whether slices are whole.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> fetch(bool whole, const T* __restrict__ from, int count) {
    if (sizeof(T) < 8 && whole) return load<sizeof(T) < 8, N>(from, count);
    return load<false, N>(from, count);
}

template <class T, int N>
__device__ __forceinline__ void put(bool whole, T* __restrict__ to, const Compute<T> (&values)[N], int count) {
    if (sizeof(T) < 8 && whole)
        store<sizeof(T) < 8, N>(to, values, count);
    else
        store<false, N>(to, values, count);
}

template <class V>
__device__ __forceinline__ V inverse_root(V var, V eps) {
    return V(1) / sqrt(var + eps);
}

// The moments of u are set later.
template <bool cost, class T>
__device__ __forceinline__ Channel<T> load_channel(const Layer<T>& layer, int64_t seed, int64_t channels,
                                                   int64_t channel) {
    Channel<T> c = {load_combinator<T>(layer.params, layer.float_params, seed, channels, channel), {0, 1, 0, 1}};
    if (cost && layer.mean != nullptr) {
        c.column.mean = layer.mean[seed * channels + channel];
        c.column.rstd = inverse_root(layer.var[seed * channels + channel], layer.eps);
    }
    return c;
}

template <class T>
__device__ __forceinline__ void set_moments(Channel<T>& c, Compute<T> mean_u, Compute<T> var_u, Compute<T> eps) {
    c.column.mean_u = mean_u;
    c.column.rstd_u = inverse_root(var_u, eps);
}

// z_hat of a slice; adds the squares of its errors.
template <bool cost, int N, int kOwn, class T>
__device__ __forceinline__ void forward_slice(const Pack<T, N>& u, const Pack<T, N>& z, const Pack<T, N>& clean,
                                              int count, const Channel<T> (&own)[kOwn], bool squash,
                                              Compute<T> (&z_hat)[N], Compute<T>& squares) {
    using V = Compute<T>;
    V u_[N], z_[N], clean_[N];
    widen(u, u_);
    widen(z, z_);
    widen(clean, clean_);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const Channel<T>& c = own[i % kOwn];
        z_hat[i] = combinator_forward(z_[i], decoder_normal(u_[i], c.column), c.p, squash);
        if (cost) {
            const V error = decoder_error(z_hat[i], clean_[i], c.column);
            if (i < count) squares += error * error;
        }
    }
}

// The block's share of the cost.
template <int threads, class V>
__device__ __forceinline__ void store_share(V squares, V* __restrict__ shares) {
    __shared__ BlockSums<1, 1, threads, V> sums;
    V values[1] = {squares};
    block_sums(values, sums);
    if (threadIdx.x == 0) shares[blockIdx.x] = sums.totals[0][0];
}

template <class T, int N, int U, template <int> class Walk, int across, bool cost>
__global__ void __launch_bounds__(kHeldThreads<T>, 1)
    forward_held(Layer<T> layer, T* __restrict__ z_hat, Compute<T>* __restrict__ u_mean, Compute<T>* __restrict__ u_var,
                 Compute<T>* __restrict__ shares, Compute<T> inverse_n, bool whole, Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    __shared__ BlockSums<kOwn, across, kHeldThreads<T>, V> sums;
    const Block block(plan);
    Walk<N> walk(plan, block);
    V first[kOwn], mean[kOwn], var[kOwn];
    first_values(layer.u + block.seed * plan.rows * plan.channels * plan.inner, plan, walk, first);
    layer.advance_by(walk.base);

    Pack<T, N> us[U] = {}, zs[U] = {}, cleans[U] = {};
    decltype(walk.offset) at[U];
    int count[U], channel[kOwn];
    const int owned = walk.count;
    Channel<T> own[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        channel[i] = walk.channel(plan, i);
        own[i] = load_channel<cost>(layer, block.seed, plan.channels, channel[i]);
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
        at[j] = walk.offset;
        count[j] = j < walk.left ? walk.count : 0;
        if (count[j] > 0) {
            us[j] = fetch<N>(whole, advance(layer.u, at[j]), count[j]);
            zs[j] = fetch<N>(whole, advance(layer.z, at[j]), count[j]);
            if (cost) cleans[j] = fetch<N>(whole, advance(layer.clean_z, at[j]), count[j]);
        }
        walk.next();
    }
    held_moments<T, N, U, Walk, across, kHeldThreads<T>>(us, count, first, inverse_n, mean, var, sums);

#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        set_moments(own[i], mean[i], var[i], layer.eps);
        if (threadIdx.x < across && (kOwn == 1 || i < owned)) {
            u_mean[block.seed * plan.channels + channel[i]] = mean[i];
            u_var[block.seed * plan.channels + channel[i]] = var[i];
        }
    }
    V squares = 0;
#pragma unroll
    for (int j = 0; j < U; ++j) {
        if (count[j] <= 0) continue;
        V out[N];
        forward_slice<cost>(us[j], zs[j], cleans[j], count[j], own, layer.squash, out, squares);
        put(whole, advance(z_hat + walk.base, at[j]), out, count[j]);
    }
    if (cost) store_share<kHeldThreads<T>>(squares, shares);
}

template <class T, int N, int U, template <int> class Walk, bool whole>
__global__ void __launch_bounds__(kThreads)
    statistics(const T* __restrict__ u, Compute<T>* __restrict__ partials, Plan plan) {
    chunk_moments<T, N, U, Walk, whole>(u, partials, plan);
}

template <int U, bool whole, bool cost, class T, int N, template <int> class Walk>
__device__ __forceinline__ void forward_step(const Layer<T>& layer, T* __restrict__ z_hat,
                                             const Channel<T> (&own)[Walk<N>::kOwn], Compute<T>& squares,
                                             Walk<N>& walk) {
    Pack<T, N> us[U], zs[U], cleans[U] = {};
    decltype(walk.offset) at[U];
    int count[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
        at[j] = walk.offset;
        count[j] = walk.count;
        us[j] = load<whole, N>(advance(layer.u, at[j]), count[j]);
        zs[j] = load<whole, N>(advance(layer.z, at[j]), count[j]);
        if (cost) cleans[j] = load<whole, N>(advance(layer.clean_z, at[j]), count[j]);
        walk.next();
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
        Compute<T> out[N];
        forward_slice<cost>(us[j], zs[j], cleans[j], whole ? N : count[j], own, layer.squash, out, squares);
        store<whole, N>(advance(z_hat, at[j]), out, count[j]);
    }
    walk.left -= U;
}

template <class T, int N, int U, template <int> class Walk, bool whole, bool cost>
__global__ void __launch_bounds__(kThreads)
    forward(Layer<T> layer, const Compute<T>* __restrict__ partials, T* __restrict__ z_hat,
            Compute<T>* __restrict__ u_mean, Compute<T>* __restrict__ u_var, Compute<T>* __restrict__ shares,
            Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    __shared__ MergedMoments<V> merged;
    const Block block(plan);
    const Channels channels = Channels::of<N>(plan, block.tile);
    merge_chunks(layer.u + block.seed * plan.rows * plan.channels * plan.inner,
                 partials + block.seed * plan.chunks * 3 * plan.channels, channels, plan, merged);
    if (block.chunk == 0 && threadIdx.x < channels.count) {
        const int64_t at = block.seed * plan.channels + channels.first + threadIdx.x;
        u_mean[at] = merged.mean[threadIdx.x];
        u_var[at] = merged.var[threadIdx.x];
    }
    Walk<N> walk(plan, block);
    V squares = 0;
    if (walk.left > 0) {
        Channel<T> own[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            // Where the element does not exist, neither need its channel, 0, be the block's.
            const int channel = walk.channel(plan, i), c = channel < channels.first ? 0 : channel - channels.first;
            own[i] = load_channel<cost>(layer, block.seed, plan.channels, channel);
            set_moments(own[i], merged.mean[c], merged.var[c], layer.eps);
        }
        layer.advance_by(walk.base);
        z_hat += walk.base;
        if constexpr (whole) {
#pragma unroll 1
            while (walk.left >= U) forward_step<U, true, cost>(layer, z_hat, own, squares, walk);
        }
#pragma unroll 1
        while (walk.left > 0) forward_step<1, whole, cost>(layer, z_hat, own, squares, walk);
    }
    if (cost) store_share<kThreads>(squares, shares);
}

// shares (seeds, blocks) -> cost (seeds).
template <class V>
__global__ void __launch_bounds__(kThreads)
    sum_cost(const V* __restrict__ shares, V* __restrict__ cost, int64_t blocks, double elements) {
    __shared__ BlockSums<1, 1, kThreads, double> sums;
    double sum[1] = {0};
    for (int64_t n = threadIdx.x; n < blocks; n += kThreads) sum[0] += shares[blockIdx.x * blocks + n];
    block_sums(sum, sums);
    if (threadIdx.x == 0) cost[blockIdx.x] = elements > 0 ? static_cast<V>(sums.totals[0][0] / elements) : V(0);
}

// The statistics of no elements.
template <class V>
__global__ void __launch_bounds__(kThreads) no_statistics(V* __restrict__ u_mean, V* __restrict__ u_var, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < n) u_mean[i] = u_var[i] = 0;
}

// ---- backward

constexpr int kSums = kCombinatorParams + 2;

// What a channel's elements are summed to: towards the gradients of a1 .. a10, of mean and of var.
template <class V>
struct DecoderSums {
    V params[kCombinatorParams], mean, var;

    __device__ __forceinline__ V at(int k) const {
        return k < kCombinatorParams ? params[k] : k == kCombinatorParams ? mean : var;
    }
};

template <class T>
struct BackwardTensors {
    const T* grad;                    // of z_hat, or null: zero
    T *grad_u, *grad_z, *grad_clean;  // or null: not wanted
    const Compute<T>* grad_cost;
    const Compute<T>*u_mean, *u_var;
    Compute<T> per_element;  // 2 / elements

    __device__ void advance_by(int64_t n) {
        if (grad != nullptr) grad += n;
        if (grad_u != nullptr) grad_u += n;
        if (grad_z != nullptr) grad_z += n;
        if (grad_clean != nullptr) grad_clean += n;
    }
};

template <class T, int N>
struct BackwardSlice {
    Pack<T, N> u, z, grad, clean;

    template <bool cost, class Index>
    __device__ __forceinline__ void get(bool whole, const Layer<T>& layer, const BackwardTensors<T>& tensors, Index at,
                                        int count) {
        u = fetch<N>(whole, advance(layer.u, at), count);
        z = fetch<N>(whole, advance(layer.z, at), count);
        if (cost) clean = fetch<N>(whole, advance(layer.clean_z, at), count);
        if (tensors.grad != nullptr) grad = fetch<N>(whole, advance(tensors.grad, at), count);
    }
};

// Sets the gradients of z, clean_z and the normalised u.
template <bool cost, int N, int kOwn, class T>
__device__ __forceinline__ void backward_slice(const BackwardSlice<T, N>& in, int count, const Channel<T> (&own)[kOwn],
                                               Compute<T> scale, bool squash, Compute<T> (&grad_normal)[N],
                                               Compute<T> (&grad_z)[N], Compute<T> (&grad_clean)[N],
                                               DecoderSums<Compute<T>> (&sums)[kOwn]) {
    using V = Compute<T>;
    V u[N], z[N], grad[N], clean[N];
    widen(in.u, u);
    widen(in.z, z);
    widen(in.grad, grad);
    widen(in.clean, clean);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i >= count) continue;
        const Channel<T>& c = own[i % kOwn];
        DecoderSums<V>& sum = sums[i % kOwn];
        const V normal = decoder_normal(u[i], c.column);
        V all = grad[i];
        if (cost)
            all += decoder_cost_backward(combinator_forward(z[i], normal, c.p, squash), clean[i], scale, c.column,
                                         grad_clean[i], sum.mean, sum.var);
        combinator_backward(all, z[i], normal, c.p, squash, grad_z[i], grad_normal[i], sum.params);
    }
}

template <bool cost, class T>
__device__ __forceinline__ Compute<T> cost_scale(const BackwardTensors<T>& tensors, int64_t seed) {
    return cost ? tensors.grad_cost[seed] * tensors.per_element : Compute<T>(0);
}

// A column's sums -> its gradients.
template <class T>
__device__ __forceinline__ void finish_channel(DecoderSums<Compute<T>> sums, const Channel<T>& c, int64_t seed,
                                               int64_t channels, int64_t channel, bool float_params,
                                               void* __restrict__ grad_params, Compute<T>* __restrict__ grad_mean,
                                               Compute<T>* __restrict__ grad_var) {
    Compute<T> for_mean, for_var;
    combinator_finish(sums.params, c.p);
    decoder_finish_cost(sums.mean, sums.var, c.column.rstd, for_mean, for_var);
#pragma unroll
    for (int k = 0; k < kCombinatorParams; ++k)
        store_either<T>(grad_params, float_params, (seed * kCombinatorParams + k) * channels + channel, sums.params[k]);
    if (grad_mean != nullptr) grad_mean[seed * channels + channel] = for_mean;
    if (grad_var != nullptr) grad_var[seed * channels + channel] = for_var;
}

template <class T, int N, int U, template <int> class Walk, int across, bool cost>
__global__ void __launch_bounds__(kHeldThreads<T>, 1)
    backward_held(Layer<T> layer, BackwardTensors<T> tensors, void* __restrict__ grad_params,
                  Compute<T>* __restrict__ grad_mean, Compute<T>* __restrict__ grad_var, Compute<T> inverse_n,
                  bool whole, Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    __shared__ BlockSums<kSums * kOwn, across, kHeldThreads<T>, V> shared;
    const Block block(plan);
    Walk<N> walk(plan, block);
    Channel<T> own[kOwn];
    const int owned = walk.count;
    int channel[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        channel[i] = walk.channel(plan, i);
        const int64_t at = block.seed * plan.channels + channel[i];
        own[i] = load_channel<cost>(layer, block.seed, plan.channels, channel[i]);
        set_moments(own[i], tensors.u_mean[at], tensors.u_var[at], layer.eps);
    }
    const V scale = cost_scale<cost>(tensors, block.seed);
    layer.advance_by(walk.base);
    tensors.advance_by(walk.base);

    BackwardSlice<T, N> slices[U] = {};
    decltype(walk.offset) at[U];
    int count[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
        at[j] = walk.offset;
        count[j] = j < walk.left ? walk.count : 0;
        if (count[j] > 0) slices[j].template get<cost>(whole, layer, tensors, at[j], count[j]);
        walk.next();
    }
    V grad_normal[U][N] = {};
    DecoderSums<V> sums[kOwn] = {};
#pragma unroll
    for (int j = 0; j < U; ++j) {
        if (count[j] <= 0) continue;
        V grad_z[N] = {}, grad_clean[N] = {};
        backward_slice<cost>(slices[j], count[j], own, scale, layer.squash, grad_normal[j], grad_z, grad_clean, sums);
        if (tensors.grad_z != nullptr) put(whole, advance(tensors.grad_z, at[j]), grad_z, count[j]);
        if (cost && tensors.grad_clean != nullptr) put(whole, advance(tensors.grad_clean, at[j]), grad_clean, count[j]);
    }
    V values[kSums * kOwn];
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) values[k * kOwn + i] = sums[i].at(k);
    }
    block_sums(values, shared);

    V at_mean[kOwn], slope[kOwn];
    const int x = threadIdx.x % across;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        DecoderSums<V> all;
#pragma unroll
        for (int k = 0; k < kCombinatorParams; ++k) all.params[k] = shared.totals[k * kOwn + i][x];
        all.mean = shared.totals[kCombinatorParams * kOwn + i][x];
        all.var = shared.totals[(kCombinatorParams + 1) * kOwn + i][x];
        decoder_finish_normal(all.params, own[i].p.a, inverse_n, at_mean[i], slope[i]);
        if (threadIdx.x < across && (kOwn == 1 || i < owned))
            finish_channel(all, own[i], block.seed, plan.channels, channel[i], layer.float_params, grad_params,
                           grad_mean, grad_var);
    }
    if (tensors.grad_u == nullptr) return;
#pragma unroll
    for (int j = 0; j < U; ++j) {
        if (count[j] <= 0) continue;
        V out[N];
        widen(slices[j].u, out);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            out[i] =
                decoder_grad_u(grad_normal[j][i], out[i], at_mean[i % kOwn], slope[i % kOwn], own[i % kOwn].column);
        }
        put(whole, advance(tensors.grad_u, at[j]), out, count[j]);
    }
}

// The two passes over the chunks: sums, and gradient of u by recomputing what reaches the normalised u.
enum class Pass { kSums, kGradU };

template <int U, bool whole, bool cost, Pass pass, class T, int N, template <int> class Walk>
__device__ __forceinline__ void backward_step(const Layer<T>& layer, const BackwardTensors<T>& tensors,
                                              const Channel<T> (&own)[Walk<N>::kOwn], Compute<T> scale,
                                              const Compute<T> (&at_mean)[Walk<N>::kOwn],
                                              const Compute<T> (&slope)[Walk<N>::kOwn],
                                              DecoderSums<Compute<T>> (&sums)[Walk<N>::kOwn], Walk<N>& walk) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    BackwardSlice<T, N> slices[U] = {};
    decltype(walk.offset) at[U];
    int count[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
        at[j] = walk.offset;
        count[j] = walk.count;
        slices[j].template get<cost>(whole, layer, tensors, at[j], count[j]);
        walk.next();
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
        V grad_normal[N] = {}, grad_z[N] = {}, grad_clean[N] = {};
        backward_slice<cost>(slices[j], whole ? N : count[j], own, scale, layer.squash, grad_normal, grad_z, grad_clean,
                             sums);
        if constexpr (pass == Pass::kSums) {
            if (tensors.grad_z != nullptr) store<whole, N>(advance(tensors.grad_z, at[j]), grad_z, count[j]);
            if (cost && tensors.grad_clean != nullptr)
                store<whole, N>(advance(tensors.grad_clean, at[j]), grad_clean, count[j]);
            if (sizeof(T) > 2 && tensors.grad_u != nullptr)
                store<whole, N>(advance(tensors.grad_u, at[j]), grad_normal, count[j]);
        } else {
            V out[N];
            widen(slices[j].u, out);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                out[i] =
                    decoder_grad_u(grad_normal[i], out[i], at_mean[i % kOwn], slope[i % kOwn], own[i % kOwn].column);
            }
            store<whole, N>(advance(tensors.grad_u, at[j]), out, count[j]);
        }
    }
    walk.left -= U;
}

// The block's sums: partials (seeds, chunks, 12, channels).
template <class T, int N, template <int> class Walk>
__device__ __forceinline__ void store_sums(const DecoderSums<Compute<T>> (&sums)[Walk<N>::kOwn],
                                           Compute<T>* __restrict__ partials, const Block& block, const Plan& plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    const Channels channels = Channels::of<N>(plan, block.tile);
    partials += (block.seed * plan.chunks + block.chunk) * kSums * plan.channels + channels.first;
    if constexpr (kOwn > 1) {
        // Four sums at a time. The padding puts neighbouring rows half the banks apart.
        constexpr int kRound = 4;
        __shared__ V shared[kRound * kOwn][kThreads + 16];
        const int inner = static_cast<int>(plan.inner);
#pragma unroll
        for (int round = 0; round < kSums; round += kRound) {
#pragma unroll
            for (int k = 0; k < kRound; ++k) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) shared[k * kOwn + i][threadIdx.x] = sums[i].at(round + k);
            }
            __syncthreads();
#pragma unroll 1
            for (int n = threadIdx.x; n < kRound * channels.count; n += blockDim.x) {
                const int k = n / channels.count, c = n % channels.count;
                V sum = 0;
#pragma unroll 1
                for (int column = c * inner; column < (c + 1) * inner; ++column)
                    sum += strided_sum(&shared[k * kOwn + column % kOwn][column / kOwn], plan.across, plan.down);
                partials[(round + k) * plan.channels + c] = sum;
            }
            __syncthreads();
        }
    } else {
        __shared__ BlockSums<kSums, 1, kThreads, V> shared;
        V values[kSums];
#pragma unroll
        for (int k = 0; k < kSums; ++k) values[k] = sums[0].at(k);
        block_sums(values, shared);
        if (threadIdx.x < kSums) partials[threadIdx.x * plan.channels] = shared.totals[threadIdx.x][0];
    }
}

// kSums: partials (seeds, chunks, 12, channels) are written. kGradU: means (seeds, 2, channels) are read.
template <class T, int N, int U, template <int> class Walk, bool whole, bool cost, Pass pass>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    backward(Layer<T> layer, BackwardTensors<T> tensors, Compute<T>* __restrict__ partials,
             const Compute<T>* __restrict__ means, Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<N>::kOwn;
    const Block block(plan);
    Walk<N> walk(plan, block);
    DecoderSums<V> sums[kOwn] = {};
    if (walk.left > 0) {
        Channel<T> own[kOwn];
        V at_mean[kOwn] = {}, slope[kOwn] = {};
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int channel = walk.channel(plan, i);
            const int64_t at = block.seed * plan.channels + channel;
            own[i] = load_channel<cost>(layer, block.seed, plan.channels, channel);
            set_moments(own[i], tensors.u_mean[at], tensors.u_var[at], layer.eps);
            if (pass == Pass::kGradU) {
                at_mean[i] = means[block.seed * 2 * plan.channels + channel];
                slope[i] = means[(block.seed * 2 + 1) * plan.channels + channel];
            }
        }
        const V scale = cost_scale<cost>(tensors, block.seed);
        layer.advance_by(walk.base);
        tensors.advance_by(walk.base);
        if constexpr (whole) {
#pragma unroll 1
            while (walk.left >= U)
                backward_step<U, true, cost, pass>(layer, tensors, own, scale, at_mean, slope, sums, walk);
        }
#pragma unroll 1
        while (walk.left > 0)
            backward_step<1, whole, cost, pass>(layer, tensors, own, scale, at_mean, slope, sums, walk);
    }
    if constexpr (pass == Pass::kSums) store_sums<T, N, Walk>(sums, partials, block, plan);
}

// The last pass where grad_u holds what reaches the normalised u.
template <int U, bool whole, class T, int N, template <int> class Walk>
__device__ __forceinline__ void grad_u_step(const T* __restrict__ u, T* grad_u,
                                            const DecoderColumn<T> (&columns)[Walk<N>::kOwn],
                                            const T (&at_mean)[Walk<N>::kOwn], const T (&slope)[Walk<N>::kOwn],
                                            Walk<N>& walk) {
    constexpr int kOwn = Walk<N>::kOwn;
    Pack<T, N> us[U], grads[U];
    decltype(walk.offset) at[U];
    int count[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
        at[j] = walk.offset;
        count[j] = walk.count;
        us[j] = load<whole, N>(advance(u, at[j]), count[j]);
        grads[j] = load<whole, N, true>(advance(grad_u, at[j]), count[j]);
        walk.next();
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
        T u_[N], out[N];
        widen(us[j], u_);
        widen(grads[j], out);
#pragma unroll
        for (int i = 0; i < N; ++i)
            out[i] = decoder_grad_u(out[i], u_[i], at_mean[i % kOwn], slope[i % kOwn], columns[i % kOwn]);
        store<whole, N>(advance(grad_u, at[j]), out, count[j]);
    }
    walk.left -= U;
}

template <class T, int N, int U, template <int> class Walk, bool whole>
__global__ void __launch_bounds__(kThreads)
    finish_grad_u(const T* __restrict__ u, const T* __restrict__ u_mean, const T* __restrict__ u_var,
                  const T* __restrict__ means, T* grad_u, T eps, Plan plan) {
    constexpr int kOwn = Walk<N>::kOwn;
    const Block block(plan);
    Walk<N> walk(plan, block);
    if (walk.left == 0) return;
    DecoderColumn<T> columns[kOwn];
    T at_mean[kOwn], slope[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int channel = walk.channel(plan, i);
        const int64_t at = block.seed * plan.channels + channel;
        columns[i] = {u_mean[at], inverse_root(u_var[at], eps), 0, 1};
        at_mean[i] = means[block.seed * 2 * plan.channels + channel];
        slope[i] = means[(block.seed * 2 + 1) * plan.channels + channel];
    }
    u += walk.base;
    grad_u += walk.base;
    if constexpr (whole) {
#pragma unroll 1
        while (walk.left >= U) grad_u_step<U, true>(u, grad_u, columns, at_mean, slope, walk);
    }
#pragma unroll 1
    while (walk.left > 0) grad_u_step<1, whole>(u, grad_u, columns, at_mean, slope, walk);
}

constexpr int kFinishAcross = 32, kFinishDown = kThreads / kFinishAcross;

// partials (seeds, chunks, 12, channels) -> gradients of the parameters, mean and var, and what the last pass needs:
// means (seeds, 2, channels). A block takes 32 channels of a seed; 8 threads share a channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_sums(const Compute<T>* __restrict__ partials, Layer<T> layer, BackwardTensors<T> tensors,
                void* __restrict__ grad_params, Compute<T>* __restrict__ grad_mean, Compute<T>* __restrict__ grad_var,
                Compute<T>* __restrict__ means, Compute<T> inverse_n, int64_t chunks, int64_t channels, int groups) {
    using V = Compute<T>;
    __shared__ double shared[kSums][kFinishDown][kFinishAcross];
    const int x = threadIdx.x % kFinishAcross, y = threadIdx.x / kFinishAcross;
    const int64_t seed = blockIdx.x / groups, channel = int64_t{blockIdx.x % groups} * kFinishAcross + x;
    double sums[kSums] = {};
    if (channel < channels) {
        const V* from = partials + (seed * chunks + y) * kSums * channels + channel;
#pragma unroll 2
        for (int64_t chunk = y; chunk < chunks; chunk += kFinishDown, from += kFinishDown * kSums * channels) {
#pragma unroll
            for (int k = 0; k < kSums; ++k) sums[k] += from[k * channels];
        }
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) shared[k][y][x] = sums[k];
    __syncthreads();
    if (y != 0 || channel >= channels) return;
    V finished[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k)
        finished[k] = static_cast<V>(strided_sum(&shared[k][0][x], kFinishAcross, kFinishDown));
    DecoderSums<V> all;
#pragma unroll
    for (int k = 0; k < kCombinatorParams; ++k) all.params[k] = finished[k];
    all.mean = finished[kCombinatorParams];
    all.var = finished[kCombinatorParams + 1];
    const Channel<T> c = load_channel<true>(layer, seed, channels, channel);
    V at_mean, slope;
    decoder_finish_normal(all.params, c.p.a, inverse_n, at_mean, slope);
    means[(seed * 2) * channels + channel] = at_mean;
    means[(seed * 2 + 1) * channels + channel] = slope;
    finish_channel(all, c, seed, channels, channel, layer.float_params, grad_params, grad_mean, grad_var);
}

// ---- launches

template <class T>
Layer<T> layer_of(const void* u, const void* z, const void* clean_z, const void* params, const void* mean,
                  const void* var, int params_dtype, const LadderDecoderOptions& options) {
    using V = Compute<T>;
    return {static_cast<const T*>(u),       static_cast<const T*>(z),
            static_cast<const T*>(clean_z), params,
            static_cast<const V*>(mean),    static_cast<const V*>(var),
            static_cast<V>(options.eps),    params_dtype == kFloat32,
            options.squash_v != 0};
}

int64_t elements_of(const LadderDecoderShape& shape) { return shape.rows * shape.channels * shape.inner; }

// Slices are whole, and every pointer aligned to them.
template <class T, class... Pointers>
bool whole_slices(const Plan& plan, Pointers... pointers) {
    const int n = plan.columns ? kColumns : kRun<T>;
    return sizeof(T) < 8 && (plan.columns ? plan.width : plan.inner) % n == 0 && aligned_to(n * sizeof(T), pointers...);
}

template <class T, bool cost>
cudaError_t run_forward(const Layer<T>& layer, T* z_hat, Compute<T>* u_mean, Compute<T>* u_var, Compute<T>* cost_sums,
                        Compute<T>* workspace, const LadderDecoderShape& shape, void* stream) {
    using V = Compute<T>;
    constexpr int R = kRun<T>;
    cudaError_t error;
    int64_t blocks;
    V* shares = workspace;
    if (const Plan plan = plan_held<T>(shape); plan.threads > 0) {
        constexpr int C = kHeldAcross<T>, H = kHeldSlices<T>;
        blocks = plan.tiles;
        const auto kernel = plan.columns ? forward_held<T, kColumns, kHeldRows, ColumnWalk, C, cost>
                                         : forward_held<T, R, H, RunWalk, 1, cost>;
        const bool whole = whole_slices<T>(plan, layer.u, layer.z, layer.clean_z, z_hat);
        const V inverse_n = V(1) / static_cast<V>(shape.rows * shape.inner);
        error = launch(kernel, blocks * shape.seeds, plan.threads, stream, layer, z_hat, u_mean, u_var, shares,
                       inverse_n, whole, plan);
    } else {
        const Plan cut = plan_chunks<T>(shape);
        blocks = cut.tiles * cut.chunks;
        V* const partials = workspace;
        shares = partials + shape.seeds * cut.chunks * 3 * shape.channels;
        const bool whole_u = whole_slices<T>(cut, layer.u);
        auto first = cut.columns ? statistics<T, kColumns, 8, ColumnWalk, false> : statistics<T, R, 2, RunWalk, false>;
        auto second =
            cut.columns ? forward<T, kColumns, 1, ColumnWalk, false, cost> : forward<T, R, 1, RunWalk, false, cost>;
        if constexpr (sizeof(T) < 8) {
            if (whole_u)
                first = cut.columns ? statistics<T, kColumns, 8, ColumnWalk, true> : statistics<T, R, 2, RunWalk, true>;
            if (whole_u && whole_slices<T>(cut, layer.z, layer.clean_z, z_hat))
                second = cut.columns ? forward<T, kColumns, 4, ColumnWalk, true, cost>
                                     : forward<T, R, 2, RunWalk, true, cost>;
        }
        error = launch(first, blocks * shape.seeds, cut.threads, stream, layer.u, partials, cut);
        if (error != cudaSuccess) return error;
        error = launch(second, blocks * shape.seeds, cut.threads, stream, layer, partials, z_hat, u_mean, u_var, shares,
                       cut);
    }
    if (error != cudaSuccess || !cost) return error;
    return launch(sum_cost<V>, shape.seeds, kThreads, stream, shares, cost_sums, blocks,
                  static_cast<double>(elements_of(shape)));
}

template <class T, bool cost>
cudaError_t run_backward(const Layer<T>& layer, const BackwardTensors<T>& tensors, void* grad_params,
                         Compute<T>* grad_mean, Compute<T>* grad_var, Compute<T>* workspace,
                         const LadderDecoderShape& shape, void* stream) {
    using V = Compute<T>;
    constexpr int R = kRun<T>;
    const V inverse_n = V(1) / static_cast<V>(shape.rows * shape.inner);
    const auto all_whole = [&](const Plan& plan) {
        return whole_slices<T>(plan, layer.u, layer.z, layer.clean_z, tensors.grad, tensors.grad_u, tensors.grad_z,
                               tensors.grad_clean);
    };
    if (const Plan plan = plan_held<T>(shape); plan.threads > 0) {
        constexpr int C = kHeldAcross<T>, H = kHeldSlices<T>;
        const auto kernel = plan.columns ? backward_held<T, kColumns, kHeldRows, ColumnWalk, C, cost>
                                         : backward_held<T, R, H, RunWalk, 1, cost>;
        return launch(kernel, plan.tiles * shape.seeds, plan.threads, stream, layer, tensors, grad_params, grad_mean,
                      grad_var, inverse_n, all_whole(plan), plan);
    }
    const Plan plan = plan_chunks<T>(shape);
    const int64_t blocks = plan.tiles * plan.chunks * shape.seeds, groups = ceil_div(shape.channels, kFinishAcross);
    V *const partials = workspace, *const means = partials + shape.seeds * plan.chunks * kSums * shape.channels;
    const bool whole = all_whole(plan);
    constexpr Pass kFirst = Pass::kSums, kLast = Pass::kGradU;

    auto first = plan.columns ? backward<T, kColumns, 1, ColumnWalk, false, cost, kFirst>
                              : backward<T, R, 1, RunWalk, false, cost, kFirst>;
    if constexpr (sizeof(T) < 8)
        if (whole)
            first = plan.columns ? backward<T, kColumns, 2, ColumnWalk, true, cost, kFirst>
                                 : backward<T, R, 1, RunWalk, true, cost, kFirst>;
    cudaError_t error = launch(first, blocks, plan.threads, stream, layer, tensors, partials, means, plan);
    if (error != cudaSuccess) return error;
    error = launch(finish_sums<T>, groups * shape.seeds, kThreads, stream, partials, layer, tensors, grad_params,
                   grad_mean, grad_var, means, inverse_n, plan.chunks, shape.channels, static_cast<int>(groups));
    if (error != cudaSuccess || tensors.grad_u == nullptr) return error;
    if constexpr (sizeof(T) == 2) {
        auto last = plan.columns ? backward<T, kColumns, 1, ColumnWalk, false, cost, kLast>
                                 : backward<T, R, 1, RunWalk, false, cost, kLast>;
        if (whole)
            last = plan.columns ? backward<T, kColumns, 4, ColumnWalk, true, cost, kLast>
                                : backward<T, R, 1, RunWalk, true, cost, kLast>;
        return launch(last, blocks, plan.threads, stream, layer, tensors, partials, means, plan);
    } else {
        auto last =
            plan.columns ? finish_grad_u<T, kColumns, 1, ColumnWalk, false> : finish_grad_u<T, R, 1, RunWalk, false>;
        if constexpr (sizeof(T) < 8)
            if (whole_slices<T>(plan, layer.u, tensors.grad_u))
                last = plan.columns ? finish_grad_u<T, kColumns, 4, ColumnWalk, true>
                                    : finish_grad_u<T, R, 2, RunWalk, true>;
        return launch(last, blocks, plan.threads, stream, layer.u, tensors.u_mean, tensors.u_var, means, tensors.grad_u,
                      layer.eps, plan);
    }
}

// Elements of scratch for T: `each` values of a chunk for each channel, and one for each block or channel.
template <class T>
int64_t scratch(const LadderDecoderShape& shape, bool backward) {
    if (const Plan plan = plan_held<T>(shape); plan.threads > 0) return backward ? 0 : shape.seeds * plan.tiles;
    const Plan plan = plan_chunks<T>(shape);
    return shape.seeds *
           (backward ? (plan.chunks * kSums + 2) * shape.channels : plan.chunks * (3 * shape.channels + plan.tiles));
}

int64_t scratch_bytes(const LadderDecoderShape& shape, bool backward) {
    if (!fits(shape)) return 0;
    if (empty(shape)) return backward ? shape.seeds * shape.channels * 2 * static_cast<int64_t>(sizeof(double)) : 0;
    // The types differ in how they are cut, and float64 takes 8 bytes for a value.
    const int64_t wide = scratch<double>(shape, backward) * static_cast<int64_t>(sizeof(double));
    const int64_t single = scratch<float>(shape, backward), half = scratch<bfloat16>(shape, backward);
    const int64_t narrow = (single > half ? single : half) * static_cast<int64_t>(sizeof(float));
    return wide > narrow ? wide : narrow;
}

}  // namespace
}  // namespace ladderfast::cuda

extern "C" {

int64_t ladderfast_ladder_decoder_workspace_cuda(const LadderDecoderShape* shape) {
    return ladderfast::cuda::scratch_bytes(*shape, false);
}

int64_t ladderfast_ladder_decoder_backward_workspace_cuda(const LadderDecoderShape* shape) {
    return ladderfast::cuda::scratch_bytes(*shape, true);
}

int ladderfast_ladder_decoder_forward_cuda(const void* u, const void* z, const void* params, const void* clean_z,
                                           const void* mean, const void* var, void* z_hat, void* u_mean, void* u_var,
                                           void* cost, void* workspace, int dtype, int params_dtype,
                                           const LadderDecoderOptions* options, const LadderDecoderShape* shape,
                                           void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = Compute<T>;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        auto *const means = static_cast<V*>(u_mean), *const vars = static_cast<V*>(u_var);
        const bool wanted = cost != nullptr;
        if (empty(*shape)) {
            const int64_t n = shape->seeds * shape->channels;
            const cudaError_t error = launch(no_statistics<V>, ceil_div(n, kThreads), kThreads, stream, means, vars, n);
            if (error != cudaSuccess || !wanted) return error;
            return launch(sum_cost<V>, shape->seeds, kThreads, stream, nullptr, static_cast<V*>(cost), 0, 0.0);
        }
        const auto layer = layer_of<T>(u, z, clean_z, params, mean, var, params_dtype, *options);
        const auto run = wanted ? run_forward<T, true> : run_forward<T, false>;
        return run(layer, static_cast<T*>(z_hat), means, vars, static_cast<V*>(cost), static_cast<V*>(workspace),
                   *shape, stream);
    });
}

int ladderfast_ladder_decoder_backward_cuda(const void* grad_z_hat, const void* grad_cost, const void* u, const void* z,
                                            const void* params, const void* clean_z, const void* mean, const void* var,
                                            const void* u_mean, const void* u_var, void* grad_u, void* grad_z,
                                            void* grad_clean_z, void* grad_params, void* grad_mean, void* grad_var,
                                            void* workspace, int dtype, int params_dtype,
                                            const LadderDecoderOptions* options, const LadderDecoderShape* shape,
                                            void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = Compute<T>;
        if (!fits(*shape)) return cudaErrorInvalidValue;
        const auto layer = layer_of<T>(u, z, clean_z, params, mean, var, params_dtype, *options);
        const BackwardTensors<T> tensors = {
            static_cast<const T*>(grad_z_hat), static_cast<T*>(grad_u),
            static_cast<T*>(grad_z),           static_cast<T*>(grad_clean_z),
            static_cast<const V*>(grad_cost),  static_cast<const V*>(u_mean),
            static_cast<const V*>(u_var),      V(2) / static_cast<V>(elements_of(*shape))};
        auto *const for_mean = static_cast<V*>(grad_mean), *const for_var = static_cast<V*>(grad_var);
        auto* const scratch = static_cast<V*>(workspace);
        if (shape->seeds == 0 || shape->channels == 0) return cudaSuccess;
        if (empty(*shape)) {
            const int64_t groups = ceil_div(shape->channels, kFinishAcross);
            return launch(finish_sums<T>, groups * shape->seeds, kThreads, stream, scratch, layer, tensors, grad_params,
                          for_mean, for_var, scratch, V(0), 0, shape->channels, static_cast<int>(groups));
        }
        const bool wanted = clean_z != nullptr && grad_cost != nullptr;
        const auto run = wanted ? run_backward<T, true> : run_backward<T, false>;
        return run(layer, tensors, grad_params, for_mean, for_var, scratch, *shape, stream);
    });
}
}

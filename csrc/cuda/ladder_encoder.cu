// A Ladder encoder layer after its linear map on NVIDIA GPUs. Contract in ../ladder_encoder.h, formulas in
// ../math/ladder_encoder.h and ../math/noise.h.
//
// Everything is done by slices of four neighbouring elements, those of one counter of the noise where they are aligned.
// A thread stays with its channels and walks over slices, in one of two ways:
//
//   columns  inner <= 16, dense and channels-last tensors among them. A row is channels * inner columns; a thread owns
//            four of them and goes down the rows of a part.
//   runs     inner > 16. The threads of a block share one channel's slices in a part.
//
// Statistics belong to a part of the rows and a channel. Where a block can hold all rows of a part in its registers (a
// few hundred rows, or a run's few thousand elements) forward is one launch, and backward, whose blocks take all parts
// of their channels, is one as well. Otherwise each is three: sums of chunks, their totals, application.
//
// How the work is cut depends on the shape and the element type alone, never on the device or on an address: the sums
// have the same bits everywhere. Slices that are unaligned or incomplete are accessed by element.
//
// What bounds it, per element (float32 / 16 bits): bytes, counting what the L2 cache may hold as moved, and
// instructions of the loop over aligned slices on sm_90, those for noise and all activations counted. Nothing of this
// has been measured on a GPU yet.
//
//                     bytes                             instructions
//   forward_held      12 / 6    x; z, h                 as forward_apply, and 500 for each thread
//   statistics         4 / 2    x                        8 / 9
//   forward_apply     12 / 6    x; z, h                 62 / 63
//   backward_held     16 / 8    x, 2 gradients; 1       as backward_sums, and 600 for each thread
//   backward_sums     12 / 6    x, 2 gradients          72 / 81
//   backward_apply    16 / 8    x, 2 gradients; 1       66 / 73
//
// Noise is 36 of them, and about 90 where rows are no multiple of four. An H100 executes about nine instructions in the
// time of a byte: float32 should be bound by memory, except for noise in odd rows, and 16-bit layers with noise by
// arithmetic.
//
// Both passes of backward over a large tensor draw the noise again, where a ReLU or the gradient of gamma asks for it:
// what reaches the normalised x would have to be rounded to be kept, and keeping it moves as many bytes.
#include "../ladder_encoder.h"

#include "../math/host_device.h"
#include "elements.cuh"
#include "launch.cuh"
#include "noise.cuh"

#include <type_traits>

namespace ladderfast::cuda {

template <class V>
__device__ __forceinline__ V where_not_positive(V test, V a, V b) {
    return test <= 0 ? a : b;
}
template <class V>
__device__ __forceinline__ V zero_like(V) {
    return 0;
}
#include "../math/ladder_encoder.h"

namespace {

constexpr int kSlice = 4;
constexpr int kHeld = 4;  // slices that a thread holds in registers, where a block holds a part
constexpr int kMaxParts = 3;
constexpr int kChunkThreads = 256;
constexpr int64_t kLongestColumnRun = 16;
constexpr int64_t kReach = int64_t{1} << 31;  // a thread's offsets in columns are 32 bits wide
// Threads of a block that holds parts. Backward holds twice as many values, and float64 takes twice the registers.
template <class T, bool backward>
constexpr int kHoldThreads = (backward ? 384 : 512) / (sizeof(T) == 8 ? 2 : 1);
// Blocks of chunks that a multiprocessor must have room for: without a number the compiler goes for more, and spills.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;
// Its threads side by side are at most eight, so that four sums of four columns each fit in little shared memory.
constexpr int kHoldAcross = 8;
// Channels of a block that adds up chunks, and threads that share one.
constexpr int kMergeAcross = 8, kMergeDown = 32;

// How a thread walks. kDense is kColumns for inner = 1, one step shorter on the way to a block that does little.
enum Kind { kRuns, kColumns, kDense };

// How a pass is cut into blocks. Blocks are counted tile first, then chunk, then seed, so that neighbours in time are
// neighbours in memory.
struct Plan {
    int64_t rows, channels, inner;
    int64_t width;  // columns of a row
    int64_t sums;   // partial sums in a row: columns, or channels where the walk is over runs
    int64_t tiles;  // columns: tiles of a row; runs: channels
    int64_t first_row[kMaxParts + 1], first_chunk[kMaxParts + 1];  // of each part; then the end
    int parts, noisy;                                              // the first `noisy` parts have noise
    int groups, lanes;  // a block has `groups` times `lanes` threads: parts, or 1, times those that share a chunk
    int across, down;   // the lanes form `down` rows of `across` slices; runs: 1 across
    int across_bits;    // across = 2^across_bits
    int steps;          // slices of a lane in a chunk, at most
    int slices, jump_rows, jump_slices;  // runs: slices of a run; the way to a lane's next slice
    bool columns, held;
};

// An element of a short array in kernel parameters, without a copy of them in local memory.
__device__ __forceinline__ int64_t pick(const int64_t (&values)[kMaxParts + 1], int i) {
    return i == 0 ? values[0] : i == 1 ? values[1] : i == 2 ? values[2] : values[3];
}

struct Where {
    int64_t seed, slot;                  // slot: of this chunk in (seeds, chunks)
    int64_t first_row, rows;             // of the part
    int part, chunk, tile, group, lane;  // chunk: of those of the part

    __device__ explicit Where(const Plan& plan) {
        const unsigned tiles = static_cast<unsigned>(plan.tiles), above = blockIdx.x / tiles;
        tile = static_cast<int>(blockIdx.x % tiles);
        lane = static_cast<int>(threadIdx.x);
        seed = slot = above;
        part = group = chunk = 0;
        if (plan.groups > 1) {
            while (lane >= plan.lanes) {
                lane -= plan.lanes;
                ++group;
            }
            part = group;
        } else {
            const unsigned chunks = static_cast<unsigned>(plan.first_chunk[kMaxParts]);
            seed = above / chunks;
            chunk = static_cast<int>(above % chunks);
#pragma unroll
            for (int p = 1; p < kMaxParts; ++p)
                if (chunk >= plan.first_chunk[p]) part = p;
            chunk -= static_cast<int>(pick(plan.first_chunk, part));
        }
        first_row = pick(plan.first_row, part);
        rows = pick(plan.first_row, part + 1) - first_row;
    }

    // Index of a channel's statistics.
    __device__ int64_t statistic(const Plan& plan, int64_t channel) const {
        return (seed * plan.parts + part) * plan.channels + channel;
    }
};

// A walk says where a thread's slices are: `number` counts an element from the beginning of the seed, `offset` is added
// to it; `left` slices remain, and `count` elements of the present one exist.
template <Kind kind, bool whole>
struct Walk {
    static constexpr int kOwn = kSlice;  // columns or channels that a thread has sums of
    int64_t number;
    uint32_t offset, stride;
    int left, count, column;

    __device__ Walk(const Plan& plan, const Where& at) {
        const int x = at.lane & (plan.across - 1), y = at.lane >> plan.across_bits;
        const int64_t begin = static_cast<int64_t>(at.chunk) * (plan.down * plan.steps), rest = at.rows - begin;
        const int rows = rest < plan.down * plan.steps ? static_cast<int>(rest) : plan.down * plan.steps;
        const int width = static_cast<int>(plan.width), slice = (at.tile << plan.across_bits) + x;
        const int tile = (at.tile << plan.across_bits) * kSlice;
        const bool exists = slice < plan.slices;
        // A slice beyond the last one looks at the last one's channels.
        column = (exists ? slice : plan.slices - 1) * kSlice;
        count = !exists ? 0 : whole || width - column > kSlice ? kSlice : width - column;
        number = (at.first_row + begin) * width + tile;
        offset = static_cast<uint32_t>(y) * width + x * kSlice;
        stride = static_cast<uint32_t>(plan.down) * width;
        left = 0;
        if (!exists) return;
        if constexpr (kind == kDense) {
#pragma unroll
            for (int k = 0; k < kHeld; ++k) left += y + k * plan.down < rows;
        } else if (y < rows) {
            left = (rows - y + plan.down - 1) / plan.down;
        }
    }

    __device__ void next() { offset += stride; }

    // Channel of the thread's column i, another one where that does not exist.
    __device__ int channel(const Plan& plan, int i) const {
        const int its = column + (whole || i < count ? i : 0);
        if constexpr (kind == kDense) return its;
        return plan.inner == 1 ? its : its / static_cast<int>(plan.inner);
    }
    // Whether it is this thread that writes its columns' totals.
    __device__ bool writes(const Plan& plan, const Where& at, int i) const {
        return at.lane < plan.across && i < count;
    }
    __device__ int64_t sum_index(const Plan&, int i) const { return column + i; }
};

template <bool whole>
struct Walk<kRuns, whole> {
    static constexpr int kOwn = 1;
    int64_t number, offset, stride, wrap;
    int left, count, slice, slices, jump, inner, tile;

    __device__ Walk(const Plan& plan, const Where& at) {
        const int64_t row = plan.width;
        const uint32_t first = static_cast<uint32_t>(at.chunk) * (plan.lanes * plan.steps) + at.lane;
        const uint32_t all = static_cast<uint32_t>(at.rows) * plan.slices;
        const uint32_t more = first < all ? (all - first + plan.lanes - 1) / plan.lanes : 0;
        const uint32_t r = first / plan.slices;
        tile = at.tile;
        slices = plan.slices;
        inner = static_cast<int>(plan.inner);
        slice = static_cast<int>(first - r * slices);
        jump = plan.jump_slices;
        number = at.first_row * row + tile * plan.inner;
        offset = r * row + static_cast<int64_t>(slice) * kSlice;
        stride = plan.jump_rows * row + static_cast<int64_t>(jump) * kSlice;
        wrap = row - static_cast<int64_t>(slices) * kSlice;
        left = more < static_cast<uint32_t>(plan.steps) ? static_cast<int>(more) : plan.steps;
        count = whole || inner - slice * kSlice > kSlice ? kSlice : inner - slice * kSlice;
    }

    __device__ void next() {
        offset += stride;
        slice += jump;
        if (slice >= slices) {
            slice -= slices;
            offset += wrap;
        }
        count = whole || inner - slice * kSlice > kSlice ? kSlice : inner - slice * kSlice;
    }

    __device__ int channel(const Plan&, int) const { return tile; }
    __device__ bool writes(const Plan&, const Where& at, int) const { return at.lane == 0; }
    __device__ int64_t sum_index(const Plan&, int) const { return tile; }
};

// Elements of a chunk that count for one of its partial sums.
__device__ int64_t chunk_elements(const Plan& plan, int64_t rows, int64_t chunk) {
    const int64_t size = static_cast<int64_t>(plan.columns ? plan.down : plan.lanes) * plan.steps, begin = chunk * size;
    if (plan.columns) return rows - begin < size ? rows - begin : size;
    const int64_t all = rows * plan.slices, end = all - begin < size ? all : begin + size;
    const auto before = [&](int64_t slice) {
        const uint32_t run = static_cast<uint32_t>(slice) / plan.slices;
        const int64_t in_run = (slice - static_cast<int64_t>(run) * plan.slices) * kSlice;
        return run * plan.inner + (in_run < plan.inner ? in_run : plan.inner);
    };
    return before(end) - before(begin);
}

// What a layer is, apart from its sizes.
template <class V>
struct Layer {
    const void *beta, *gamma;  // (seeds, channels) or null
    const int64_t* state;      // (seeds, 2); null: no noise, or nobody asks what it was
    int64_t stream;
    V noise_std, negative_slope, eps;
    int activation;
    bool float_params;
};

template <class T>
__device__ __forceinline__ EncoderColumn<Compute<T>> load_column(const Layer<Compute<T>>& layer, int64_t channel,
                                                                 Compute<T> mean, Compute<T> rstd) {
    using V = Compute<T>;
    return {mean, rstd, layer.beta ? load_either<T>(layer.beta, layer.float_params, channel) : V(0),
            layer.gamma ? load_either<T>(layer.gamma, layer.float_params, channel) : V(1)};
}

__device__ __forceinline__ float reciprocal_deviation(float var, float eps) { return rsqrtf(var + eps); }
__device__ __forceinline__ double reciprocal_deviation(double var, double eps) { return 1.0 / sqrt(var + eps); }

template <class V>
struct Noise {
    NoiseSource source;
    V std;
    bool on;

    __device__ Noise(const Plan& plan, const Where& at, const Layer<V>& layer) : source(), std(layer.noise_std) {
        on = layer.state != nullptr && at.part < plan.noisy;
        if (on) source = NoiseSource(layer.state + 2 * at.seed, layer.stream);
    }

    template <bool aligned>
    __device__ __forceinline__ void scaled(int64_t first, V (&out)[kSlice]) const {
        float normal[kSlice] = {};
        if (on) source.normals<aligned>(first, normal);
#pragma unroll
        for (int i = 0; i < kSlice; ++i) out[i] = normal[i] * std;
    }
};

// Sums over the lanes of a group that share columns, in an order of their own; all of them receive the totals.
// partial: S kOwn across values for each warp; totals: as many for each group, sum by sum.
template <int S, int kOwn, class V>
__device__ __forceinline__ void share_sums(V (&values)[S][kOwn], V* partial, V* totals, const Plan& plan,
                                           const Where& at) {
    static_assert((S == 1 || S == 4) && (kOwn == 1 || kOwn == 4), "sizes are powers of two");
    const int across = plan.across, bits = plan.across_bits + S / 2 + kOwn / 2, size = 1 << bits;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int apart = 16; apart >= across; apart /= 2) {
#pragma unroll
        for (int s = 0; s < S; ++s) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) values[s][i] += __shfl_xor_sync(0xffffffffu, values[s][i], apart);
        }
    }
    if (lane < across) {
#pragma unroll
        for (int s = 0; s < S; ++s) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) partial[(warp << bits) + (s * kOwn + i) * across + lane] = values[s][i];
        }
    }
    __syncthreads();
    const int warps = plan.lanes / 32;
#pragma unroll 1
    for (int n = threadIdx.x; n < plan.groups << bits; n += blockDim.x) {
        const V* from = partial + ((n >> bits) * warps << bits) + (n & (size - 1));
        V strand[2] = {};
        int w = 0;
#pragma unroll 1
        for (; w + 2 <= warps; w += 2) {
            strand[0] += from[w << bits];
            strand[1] += from[(w + 1) << bits];
        }
        if (w < warps) strand[0] += from[w << bits];
        totals[n] = strand[0] + strand[1];
    }
    __syncthreads();
    const V* mine = totals + (at.group << bits) + (at.lane & (across - 1));
#pragma unroll
    for (int s = 0; s < S; ++s) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) values[s][i] = mine[(s * kOwn + i) * across];
    }
}

// Place of a part's first element. Sums for a mean are relative to their channel's, channel * inner further.
__device__ __forceinline__ int64_t first_element(const Plan& plan, int64_t seed, int64_t first_row) {
    return (seed * plan.rows + first_row) * plan.width;
}

template <class T, class V, int kOwn, class Walk>
__device__ __forceinline__ void load_shift(const T* x, const Plan& plan, const Where& at, const Walk& walk,
                                           V (&shift)[kOwn]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) shift[i] = 0;
    if (walk.left == 0) return;
    x += first_element(plan, at.seed, at.first_row);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int channel = walk.channel(plan, i);
        shift[i] = load_either<T>(x, false, plan.inner == 1 ? channel : channel * plan.inner);
    }
}

// z and h of a slice; either may be null. `number` is that of the slice's first element in its seed.
template <bool whole, class T, int kOwn>
__device__ __forceinline__ void forward_slice(const Pack<T, kSlice>& pack, int count, int64_t number,
                                              const EncoderColumn<Compute<T>> (&p)[kOwn],
                                              const Layer<Compute<T>>& layer, const Noise<Compute<T>>& noise, T* z,
                                              T* h) {
    using V = Compute<T>;
    constexpr bool one = kOwn == 1;
    V x[kSlice], out[kSlice];
    widen(pack, x);
    noise.template scaled<whole>(number, out);
#pragma unroll
    for (int i = 0; i < kSlice; ++i) out[i] = encoder_z(x[i], out[i], p[one ? 0 : i]);
    if (z) store<whole, kSlice>(z, out, count);
    if (!h) return;
    if (layer.activation == kRelu) {
#pragma unroll
        for (int i = 0; i < kSlice; ++i) out[i] = encoder_h<kRelu>(out[i], layer.negative_slope, p[one ? 0 : i]);
    } else if (layer.activation == kLeakyRelu) {
#pragma unroll
        for (int i = 0; i < kSlice; ++i) out[i] = encoder_h<kLeakyRelu>(out[i], layer.negative_slope, p[one ? 0 : i]);
    } else {
#pragma unroll
        for (int i = 0; i < kSlice; ++i) out[i] = encoder_h<kIdentity>(out[i], layer.negative_slope, p[one ? 0 : i]);
    }
    store<whole, kSlice>(h, out, count);
}

// All of forward for a part and a tile of columns or a channel, whose elements the block holds.
template <class T, Kind kind, bool whole>
__global__ void __launch_bounds__(kHoldThreads<T, false>)
    forward_held(const T* __restrict__ x, T* __restrict__ z, T* __restrict__ h, Compute<T>* __restrict__ mean,
                 Compute<T>* __restrict__ var, const Layer<Compute<T>> layer, const Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<kind, whole>::kOwn;
    __shared__ V partial[kHoldThreads<T, false> / 32 * kOwn * kHoldAcross], totals[kOwn * kHoldAcross];
    const Where at(plan);
    const Walk<kind, whole> walk(plan, at);
    const int64_t base = at.seed * plan.rows * plan.width + walk.number, elements = at.rows * plan.inner;
    const V inverse = V(1) / static_cast<V>(elements > 0 ? elements : 1);

    Pack<T, kSlice> xs[kHeld];
    auto step = walk;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        if (k >= walk.left) break;
        xs[k] = load<whole, kSlice>(advance(x + base, step.offset), step.count);
        step.next();
    }
    V shift[kOwn], sums[1][kOwn] = {};
    load_shift(x, plan, at, walk, shift);
    EncoderColumn<V> p[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
        p[i] = load_column<T>(layer, at.seed * plan.channels + walk.channel(plan, i), V(0), V(0));
    const Noise<V> noise(plan, at, layer);

    step = walk;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        if (k >= walk.left) break;
        V v[kSlice];
        widen(xs[k], v);
#pragma unroll
        for (int i = 0; i < kSlice; ++i)
            if (whole || i < step.count) sums[0][kOwn == 1 ? 0 : i] += v[i] - shift[kOwn == 1 ? 0 : i];
        step.next();
    }
    share_sums(sums, partial, totals, plan, at);
    V middle[kOwn];  // the mean, relative to the first element
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        middle[i] = sums[0][i] * inverse;
        sums[0][i] = 0;
    }
    step = walk;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        if (k >= walk.left) break;
        V v[kSlice];
        widen(xs[k], v);
#pragma unroll
        for (int i = 0; i < kSlice; ++i) {
            const V d = (v[i] - shift[kOwn == 1 ? 0 : i]) - middle[kOwn == 1 ? 0 : i];
            if (whole || i < step.count) sums[0][kOwn == 1 ? 0 : i] += d * d;
        }
        step.next();
    }
    share_sums(sums, partial, totals, plan, at);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const V variance = sums[0][i] * inverse;
        p[i].mean = shift[i] + middle[i];
        p[i].rstd = reciprocal_deviation(variance, layer.eps);
        if (!walk.writes(plan, at, i)) continue;
        const int64_t index = at.statistic(plan, walk.channel(plan, i));
        mean[index] = p[i].mean;
        var[index] = variance;
    }
    step = walk;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        if (k >= walk.left) break;
        forward_slice<whole>(xs[k], step.count, walk.number + step.offset, p, layer, noise,
                             z ? advance(z + base, step.offset) : nullptr,
                             h ? advance(h + base, step.offset) : nullptr);
        step.next();
    }
}

// U slices into a thread's running mean (relative to the shift) and sum of squares about it, by Chan's formula; n
// elements are in it before.
template <int U, Kind kind, bool whole, class T, int kOwn>
__device__ __forceinline__ void statistics_step(const T* __restrict__ x, Walk<kind, whole>& walk,
                                                const Compute<T> (&shift)[kOwn], int& n, Compute<T> (&mean)[kOwn],
                                                Compute<T> (&squares)[kOwn]) {
    using V = Compute<T>;
    Pack<T, kSlice> xs[U];
    int count[U], added = kOwn == 1 ? 0 : U;
#pragma unroll
    for (int j = 0; j < U; ++j) {
        count[j] = walk.count;
        if (kOwn == 1) added += walk.count;
        xs[j] = load<whole, kSlice>(advance(x, walk.offset), walk.count);
        walk.next();
    }
    V d[U][kSlice], its_mean[kOwn] = {}, its_squares[kOwn] = {};
#pragma unroll
    for (int j = 0; j < U; ++j) {
        widen(xs[j], d[j]);
#pragma unroll
        for (int i = 0; i < kSlice; ++i) {
            d[j][i] -= shift[kOwn == 1 ? 0 : i];
            if (kOwn > 1 || whole || i < count[j]) its_mean[kOwn == 1 ? 0 : i] += d[j][i];
        }
    }
    const V inverse = V(1) / static_cast<V>(added), weight = static_cast<V>(added) / static_cast<V>(n + added);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) its_mean[i] *= inverse;
#pragma unroll
    for (int j = 0; j < U; ++j) {
#pragma unroll
        for (int i = 0; i < kSlice; ++i) {
            const V e = d[j][i] - its_mean[kOwn == 1 ? 0 : i];
            if (kOwn > 1 || whole || i < count[j]) its_squares[kOwn == 1 ? 0 : i] += e * e;
        }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const V delta = its_mean[i] - mean[i];
        mean[i] += delta * weight;
        squares[i] += its_squares[i] + delta * delta * (weight * static_cast<V>(n));
    }
    n += added;
    walk.left -= U;
}

// Mean (relative to the part's first element) and sum of squares about it for each chunk: partials (seeds, chunks, 2,
// sums).
template <class T, Kind kind, bool whole>
__global__ void __launch_bounds__(kChunkThreads, kResident<T>)
    statistics(const T* __restrict__ x, Compute<T>* __restrict__ partials, const Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<kind, whole>::kOwn;
    constexpr int kSize = kChunkThreads * kOwn / (kOwn > 1 ? 1 : 32);
    __shared__ V partial[kSize], totals[kOwn > 1 ? 32 * kOwn : 1];
    const Where at(plan);
    Walk<kind, whole> walk(plan, at);
    V shift[kOwn], mean[kOwn] = {}, squares[kOwn] = {}, sums[1][kOwn];
    load_shift(x, plan, at, walk, shift);
    x += at.seed * plan.rows * plan.width + walk.number;
    int n = 0;
    // The same tiles for either access, since they are part of the bits.
    while (walk.left >= 4) statistics_step<4, kind, whole>(x, walk, shift, n, mean, squares);
#pragma unroll 1
    while (walk.left > 0) statistics_step<1, kind, whole>(x, walk, shift, n, mean, squares);

    // The threads' means weighted by their numbers of elements, then the squares about that mean.
    const V inverse = V(1) / static_cast<V>(chunk_elements(plan, at.rows, at.chunk)), its = static_cast<V>(n);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sums[0][i] = its * mean[i];
    share_sums(sums, partial, totals, plan, at);
    V middle[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        middle[i] = sums[0][i] * inverse;
        const V delta = mean[i] - middle[i];
        sums[0][i] = squares[i] + its * delta * delta;
    }
    share_sums(sums, partial, totals, plan, at);
    partials += at.slot * 2 * plan.sums;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        if (!walk.writes(plan, at, i)) continue;
        partials[walk.sum_index(plan, i)] = middle[i];
        partials[plan.sums + walk.sum_index(plan, i)] = sums[0][i];
    }
}

// A block that adds up chunks: kMergeAcross channels, whose chunks kMergeDown threads share.
struct Merge {
    int64_t above, channel;
    int y, columns;  // columns: of a channel, in each chunk

    __device__ explicit Merge(const Plan& plan) {
        const unsigned groups = static_cast<unsigned>((plan.channels + kMergeAcross - 1) / kMergeAcross);
        above = blockIdx.x / groups;
        channel = static_cast<int64_t>(blockIdx.x % groups) * kMergeAcross + threadIdx.x % kMergeAcross;
        y = static_cast<int>(threadIdx.x) / kMergeAcross;
        columns = plan.columns ? static_cast<int>(plan.inner) : 1;
    }

    // Runs f(chunk, first value) over the thread's chunks of a part, each with `rows` rows of partial sums, and over
    // the channel's columns in them.
    template <class V, class F>
    __device__ __forceinline__ void each(const Plan& plan, int64_t seed, int part, const V* partials, int rows,
                                         const F& f) const {
        if (channel >= plan.channels) return;
        const int64_t begin = pick(plan.first_chunk, part), chunks = pick(plan.first_chunk, part + 1) - begin;
        const V* from = partials + ((seed * plan.first_chunk[kMaxParts] + begin + y) * rows) * plan.sums;
        from += channel * columns;
#pragma unroll 1
        for (int64_t chunk = y; chunk < chunks; chunk += kMergeDown) {
#pragma unroll 1
            for (int column = 0; column < columns; ++column) f(chunk, from + column);
            from += kMergeDown * rows * plan.sums;
        }
    }

    // The sum over the threads of a channel; all of them receive it.
    __device__ double sum(double value, double* shared) const {
        shared[threadIdx.x] = value;
        __syncthreads();
#pragma unroll 1
        for (int half = kMergeDown / 2; half > 0; half /= 2) {
            if (y < half) shared[threadIdx.x] += shared[threadIdx.x + half * kMergeAcross];
            __syncthreads();
        }
        value = shared[threadIdx.x % kMergeAcross];
        __syncthreads();
        return value;
    }
};

// partials -> mean, var. A part of no rows has mean and variance 0.
template <class T>
__global__ void __launch_bounds__(kMergeAcross* kMergeDown)
    merge_statistics(const T* __restrict__ x, const Compute<T>* __restrict__ partials, Compute<T>* __restrict__ mean,
                     Compute<T>* __restrict__ var, const Plan plan) {
    __shared__ double shared[kMergeAcross * kMergeDown];
    const Merge merge(plan);
    const int64_t seed = merge.above / plan.parts;
    const int part = static_cast<int>(merge.above % plan.parts);
    const int64_t rows = pick(plan.first_row, part + 1) - pick(plan.first_row, part), elements = rows * plan.inner;
    const double inverse = 1.0 / static_cast<double>(elements > 0 ? elements : 1);
    double sum = 0.0;
    merge.each(plan, seed, part, partials, 2, [&](int64_t chunk, const Compute<T>* from) {
        sum += static_cast<double>(chunk_elements(plan, rows, chunk)) * *from;
    });
    const double middle = merge.sum(sum, shared) * inverse;
    sum = 0.0;
    merge.each(plan, seed, part, partials, 2, [&](int64_t chunk, const Compute<T>* from) {
        const double delta = *from - middle;
        sum += from[plan.sums] + static_cast<double>(chunk_elements(plan, rows, chunk)) * delta * delta;
    });
    sum = merge.sum(sum, shared);
    if (merge.y != 0 || merge.channel >= plan.channels) return;
    double first = 0.0;
    if (elements > 0)
        first = load_either<T>(x, false,
                               first_element(plan, seed, pick(plan.first_row, part)) + merge.channel * plan.inner);
    const int64_t index = merge.above * plan.channels + merge.channel;
    mean[index] = static_cast<Compute<T>>(first + middle);
    var[index] = static_cast<Compute<T>>(sum * inverse);
}

template <class T, Kind kind, bool whole>
__global__ void __launch_bounds__(kChunkThreads, kResident<T>)
    forward_apply(const T* __restrict__ x, const Compute<T>* __restrict__ mean, const Compute<T>* __restrict__ var,
                  T* __restrict__ z, T* __restrict__ h, const Layer<Compute<T>> layer, const Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<kind, whole>::kOwn;
    const Where at(plan);
    Walk<kind, whole> walk(plan, at);
    if (walk.left == 0) return;
    const int64_t base = at.seed * plan.rows * plan.width + walk.number;
    Pack<T, kSlice> next = load<whole, kSlice>(advance(x + base, walk.offset), walk.count);
    EncoderColumn<V> p[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int channel = walk.channel(plan, i);
        const int64_t index = at.statistic(plan, channel);
        p[i] = load_column<T>(layer, at.seed * plan.channels + channel, mean[index],
                              reciprocal_deviation(var[index], layer.eps));
    }
    const Noise<V> noise(plan, at, layer);
#pragma unroll 1
    for (;;) {
        const auto offset = walk.offset;
        const int count = walk.count;
        const Pack<T, kSlice> pack = next;
        if (--walk.left > 0) {
            walk.next();
            next = load<whole, kSlice>(advance(x + base, walk.offset), walk.count);
        }
        forward_slice<whole>(pack, count, walk.number + offset, p, layer, noise,
                             z ? advance(z + base, offset) : nullptr, h ? advance(h + base, offset) : nullptr);
        if (walk.left == 0) return;
    }
}

// A slice of what backward reads.
template <class T>
struct Gradients {
    Pack<T, kSlice> z, h;
};

template <bool whole, class T, class Offset>
__device__ __forceinline__ Gradients<T> load_gradients(const T* grad_z, const T* grad_h, int64_t base, Offset offset,
                                                       int count) {
    Gradients<T> grads = {};
    if (grad_z) grads.z = load<whole, kSlice>(advance(grad_z + base, offset), count);
    if (grad_h) grads.h = load<whole, kSlice>(advance(grad_h + base, offset), count);
    return grads;
}

// What reaches the normalised x of a slice, and its terms of the four sums.
template <int activation, class V, int kOwn>
__device__ __forceinline__ void backward_elements(const V (&grad_z)[kSlice], const V (&grad_h)[kSlice],
                                                  const V (&z)[kSlice], V negative_slope,
                                                  const EncoderColumn<V> (&p)[kOwn], V (&g)[kSlice],
                                                  V (&for_beta)[kSlice], V (&for_gamma)[kSlice]) {
#pragma unroll
    for (int i = 0; i < kSlice; ++i)
        g[i] = encoder_backward<activation>(grad_z[i], grad_h[i], z[i], negative_slope, p[kOwn == 1 ? 0 : i],
                                            for_beta[i], for_gamma[i]);
}

// x - mean goes to `centred`. Without `want_sums` the sums are left alone.
template <bool whole, bool want_sums, class T, int kOwn>
__device__ __forceinline__ void backward_slice(const Pack<T, kSlice>& pack, const Gradients<T>& grads, int count,
                                               int64_t number, const EncoderColumn<Compute<T>> (&p)[kOwn],
                                               const Layer<Compute<T>>& layer, const Noise<Compute<T>>& noise,
                                               Compute<T> (&centred)[kSlice], Compute<T> (&g)[kSlice],
                                               Compute<T> (&sums)[4][kOwn]) {
    using V = Compute<T>;
    V grad_z[kSlice], grad_h[kSlice], z[kSlice], for_beta[kSlice], for_gamma[kSlice];
    widen(pack, centred);
    widen(grads.z, grad_z);
    widen(grads.h, grad_h);
    noise.template scaled<whole>(number, z);
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
        const EncoderColumn<V>& column = p[kOwn == 1 ? 0 : i];
        z[i] = encoder_z(centred[i], z[i], column);
        centred[i] -= column.mean;
    }
    if (layer.activation == kRelu)
        backward_elements<kRelu>(grad_z, grad_h, z, layer.negative_slope, p, g, for_beta, for_gamma);
    else if (layer.activation == kLeakyRelu)
        backward_elements<kLeakyRelu>(grad_z, grad_h, z, layer.negative_slope, p, g, for_beta, for_gamma);
    else
        backward_elements<kIdentity>(grad_z, grad_h, z, layer.negative_slope, p, g, for_beta, for_gamma);
    if constexpr (want_sums) {
#pragma unroll
        for (int i = 0; i < kSlice; ++i) {
            if (!whole && i >= count) break;
            constexpr bool one = kOwn == 1;
            sums[0][one ? 0 : i] += g[i];
            sums[1][one ? 0 : i] += g[i] * (centred[i] * p[one ? 0 : i].rstd);
            sums[2][one ? 0 : i] += for_beta[i];
            sums[3][one ? 0 : i] += for_gamma[i];
        }
    }
}

template <class V>
struct Finish {
    V at_mean, slope;
};

template <bool whole, class T, int kOwn>
__device__ __forceinline__ void store_grad_x(T* to, int count, const Compute<T> (&centred)[kSlice],
                                             const Compute<T> (&g)[kSlice], const EncoderColumn<Compute<T>> (&p)[kOwn],
                                             const Finish<Compute<T>> (&finish)[kOwn]) {
    Compute<T> out[kSlice];
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
        const int own = kOwn == 1 ? 0 : i;
        out[i] = p[own].rstd * g[i] + (finish[own].at_mean + finish[own].slope * centred[i]);
    }
    store<whole, kSlice>(to, out, count);
}

template <class T>
struct BackwardTensors {
    const T *grad_z, *grad_h;               // null: zero
    const Compute<T>*grad_mean, *grad_var;  // null: zero
    const T* x;
    const Compute<T>*mean, *var;
    T* grad_x;
    void *grad_beta, *grad_gamma;  // null: not wanted
};

// All of backward for a tile of columns or a channel: the block holds what belongs to them in every part.
template <class T, Kind kind, bool whole>
__global__ void __launch_bounds__(kHoldThreads<T, true>)
    backward_held(const BackwardTensors<T> t, const Layer<Compute<T>> layer, const Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<kind, whole>::kOwn, kSize = 4 * kOwn * (kOwn > 1 ? kHoldAcross : 1);
    __shared__ V partial[kHoldThreads<T, true> / 32 * kSize], totals[kMaxParts * kSize];
    const Where at(plan);
    const Walk<kind, whole> walk(plan, at);
    const int64_t base = at.seed * plan.rows * plan.width + walk.number, elements = at.rows * plan.inner;
    const V inverse = V(1) / static_cast<V>(elements > 0 ? elements : 1);
    EncoderColumn<V> p[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int channel = walk.channel(plan, i);
        const int64_t index = at.statistic(plan, channel);
        p[i] = load_column<T>(layer, at.seed * plan.channels + channel, t.mean[index],
                              reciprocal_deviation(t.var[index], layer.eps));
    }
    const Noise<V> noise(plan, at, layer);
    V sums[4][kOwn] = {}, centred[kHeld][kSlice], g[kHeld][kSlice];
    auto step = walk;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        if (k >= walk.left) break;
        const Pack<T, kSlice> pack = load<whole, kSlice>(advance(t.x + base, step.offset), step.count);
        const Gradients<T> grads = load_gradients<whole>(t.grad_z, t.grad_h, base, step.offset, step.count);
        backward_slice<whole, true>(pack, grads, step.count, walk.number + step.offset, p, layer, noise, centred[k],
                                    g[k], sums);
        step.next();
    }
    share_sums(sums, partial, totals, plan, at);
    Finish<V> finish[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int64_t index = at.statistic(plan, walk.channel(plan, i));
        encoder_finish(sums[0][i], sums[1][i], t.grad_mean ? t.grad_mean[index] : V(0),
                       t.grad_var ? t.grad_var[index] : V(0), p[i].rstd, inverse, finish[i].at_mean, finish[i].slope);
    }
    step = walk;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        if (k >= walk.left) break;
        store_grad_x<whole>(advance(t.grad_x + base, step.offset), step.count, centred[k], g[k], p, finish);
        step.next();
    }
    if (at.part != 0) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        if (!walk.writes(plan, at, i)) continue;
        V beta = sums[2][i], gamma = sums[3][i];
#pragma unroll
        for (int part = 1; part < kMaxParts; ++part) {
            if (part >= plan.groups) break;
            beta += totals[(part * 4 * kOwn + 2 * kOwn + i) * plan.across + at.lane];
            gamma += totals[(part * 4 * kOwn + 3 * kOwn + i) * plan.across + at.lane];
        }
        const int64_t index = at.seed * plan.channels + walk.channel(plan, i);
        if (t.grad_beta) store_either<T>(t.grad_beta, layer.float_params, index, beta);
        if (t.grad_gamma) store_either<T>(t.grad_gamma, layer.float_params, index, gamma);
    }
}

// Runs f(pack, gradients, offset, count) over a thread's slices; each is loaded while the one before it is computed.
template <Kind kind, bool whole, class T, class F>
__device__ __forceinline__ void each_slice(const BackwardTensors<T>& t, int64_t base, Walk<kind, whole>& walk,
                                           const F& f) {
    Pack<T, kSlice> next = load<whole, kSlice>(advance(t.x + base, walk.offset), walk.count);
    Gradients<T> next_grads = load_gradients<whole>(t.grad_z, t.grad_h, base, walk.offset, walk.count);
#pragma unroll 1
    for (;;) {
        const auto offset = walk.offset;
        const int count = walk.count;
        const Pack<T, kSlice> pack = next;
        const Gradients<T> grads = next_grads;
        if (--walk.left > 0) {
            walk.next();
            next = load<whole, kSlice>(advance(t.x + base, walk.offset), walk.count);
            next_grads = load_gradients<whole>(t.grad_z, t.grad_h, base, walk.offset, walk.count);
        }
        f(pack, grads, offset, count);
        if (walk.left == 0) return;
    }
}

// A chunk's sums of g, of g (x - mean) rstd, and for beta and gamma: partials (seeds, chunks, 4, sums).
template <class T, Kind kind, bool whole>
__global__ void __launch_bounds__(kChunkThreads, kResident<T>)
    backward_sums(const BackwardTensors<T> t, Compute<T>* __restrict__ partials, const Layer<Compute<T>> layer,
                  const Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<kind, whole>::kOwn;
    __shared__ V partial[4 * kOwn * kChunkThreads / (kOwn > 1 ? 1 : 32)], totals[4 * kOwn * (kOwn > 1 ? 32 : 1)];
    const Where at(plan);
    Walk<kind, whole> walk(plan, at);
    V sums[4][kOwn] = {};
    if (walk.left > 0) {
        EncoderColumn<V> p[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int channel = walk.channel(plan, i);
            const int64_t index = at.statistic(plan, channel);
            p[i] = load_column<T>(layer, at.seed * plan.channels + channel, t.mean[index],
                                  reciprocal_deviation(t.var[index], layer.eps));
        }
        const Noise<V> noise(plan, at, layer);
        each_slice<kind, whole>(t, at.seed * plan.rows * plan.width + walk.number, walk,
                                [&](const Pack<T, kSlice>& pack, const Gradients<T>& grads, auto offset, int count) {
                                    V centred[kSlice], g[kSlice];
                                    backward_slice<whole, true>(pack, grads, count, walk.number + offset, p, layer,
                                                                noise, centred, g, sums);
                                });
    }
    share_sums(sums, partial, totals, plan, at);
    partials += at.slot * 4 * plan.sums;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        if (!walk.writes(plan, at, i)) continue;
#pragma unroll
        for (int s = 0; s < 4; ++s) partials[s * plan.sums + walk.sum_index(plan, i)] = sums[s][i];
    }
}

// partials -> finish (seeds, parts, channels) and the gradients of beta and gamma.
template <class T>
__global__ void __launch_bounds__(kMergeAcross* kMergeDown)
    merge_backward(const Compute<T>* __restrict__ partials, const BackwardTensors<T> t,
                   Finish<Compute<T>>* __restrict__ finish, const Layer<Compute<T>> layer, const Plan plan) {
    using V = Compute<T>;
    __shared__ double shared[kMergeAcross * kMergeDown];
    const Merge merge(plan);
    const int64_t seed = merge.above;
    const bool writes = merge.y == 0 && merge.channel < plan.channels;
    double beta = 0.0, gamma = 0.0;
#pragma unroll 1
    for (int part = 0; part < plan.parts; ++part) {
        double sums[4] = {};
        merge.each(plan, seed, part, partials, 4, [&](int64_t, const V* from) {
#pragma unroll
            for (int s = 0; s < 4; ++s) sums[s] += from[s * plan.sums];
        });
#pragma unroll
        for (int s = 0; s < 4; ++s) sums[s] = merge.sum(sums[s], shared);
        beta += sums[2];
        gamma += sums[3];
        const int64_t elements = (pick(plan.first_row, part + 1) - pick(plan.first_row, part)) * plan.inner;
        if (!writes || elements == 0) continue;
        const int64_t index = (seed * plan.parts + part) * plan.channels + merge.channel;
        encoder_finish(static_cast<V>(sums[0]), static_cast<V>(sums[1]), t.grad_mean ? t.grad_mean[index] : V(0),
                       t.grad_var ? t.grad_var[index] : V(0), reciprocal_deviation(t.var[index], layer.eps),
                       V(1) / static_cast<V>(elements), finish[index].at_mean, finish[index].slope);
    }
    if (!writes) return;
    const int64_t index = seed * plan.channels + merge.channel;
    if (t.grad_beta) store_either<T>(t.grad_beta, layer.float_params, index, static_cast<V>(beta));
    if (t.grad_gamma) store_either<T>(t.grad_gamma, layer.float_params, index, static_cast<V>(gamma));
}

template <class T, Kind kind, bool whole>
__global__ void __launch_bounds__(kChunkThreads, kResident<T>)
    backward_apply(const BackwardTensors<T> t, const Finish<Compute<T>>* __restrict__ finish,
                   const Layer<Compute<T>> layer, const Plan plan) {
    using V = Compute<T>;
    constexpr int kOwn = Walk<kind, whole>::kOwn;
    const Where at(plan);
    Walk<kind, whole> walk(plan, at);
    if (walk.left == 0) return;
    const int64_t base = at.seed * plan.rows * plan.width + walk.number;
    EncoderColumn<V> p[kOwn];
    Finish<V> ends[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int channel = walk.channel(plan, i);
        const int64_t index = at.statistic(plan, channel);
        p[i] = load_column<T>(layer, at.seed * plan.channels + channel, t.mean[index],
                              reciprocal_deviation(t.var[index], layer.eps));
        ends[i] = finish[index];
    }
    const Noise<V> noise(plan, at, layer);
    each_slice<kind, whole>(
        t, base, walk, [&](const Pack<T, kSlice>& pack, const Gradients<T>& grads, auto offset, int count) {
            V centred[kSlice], g[kSlice], unused[4][kOwn];
            backward_slice<whole, false>(pack, grads, count, walk.number + offset, p, layer, noise, centred, g, unused);
            store_grad_x<whole>(advance(t.grad_x + base, offset), count, centred, g, p, ends);
        });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool empty(const LadderEncoderShape& shape) {
    return shape.seeds == 0 || shape.rows == 0 || shape.channels == 0 || shape.inner == 0;
}

int64_t longest_part(const LadderEncoderShape& shape) {
    int64_t rows = 0;
    for (int p = 0; p < shape.parts; ++p) rows = shape.part_rows[p] > rows ? shape.part_rows[p] : rows;
    return rows;
}

// The parts fill the rows, noise begins and ends with parts, and what walks count in 32 bits fits them: a row of 2^31
// columns and a channel of 2^33 elements do not.
bool fits(const LadderEncoderShape& shape, bool noisy) {
    constexpr int64_t kMost = kReach - (1 << 16);
    if (shape.parts < 1 || shape.parts > kMaxParts) return false;
    int64_t rows = 0;
    bool at_part = shape.noisy == 0;
    for (int p = 0; p < shape.parts; ++p) {
        if (shape.part_rows[p] < 0) return false;
        rows += shape.part_rows[p];
        at_part = at_part || shape.noisy == rows;
    }
    if (rows != shape.rows || (noisy && !at_part)) return false;
    if (shape.inner <= kLongestColumnRun) return shape.channels <= kMost / (shape.inner > 0 ? shape.inner : 1);
    return shape.inner <= kMost && longest_part(shape) <= 2 * kMost / ceil_div(shape.inner, kSlice);
}

// All but what says how parts are cut.
Plan plan_shape(const LadderEncoderShape& shape) {
    Plan plan = {};
    plan.rows = shape.rows;
    plan.channels = shape.channels;
    plan.inner = shape.inner;
    plan.width = shape.channels * shape.inner;
    plan.columns = shape.inner <= kLongestColumnRun;
    plan.sums = plan.columns ? plan.width : plan.channels;
    plan.parts = static_cast<int>(shape.parts);
    for (int p = 0; p < kMaxParts; ++p) {
        if (p < shape.parts && plan.first_row[p] < shape.noisy) plan.noisy = p + 1;
        plan.first_row[p + 1] = plan.first_row[p] + (p < shape.parts ? shape.part_rows[p] : 0);
    }
    plan.slices = static_cast<int>(ceil_div(plan.columns ? plan.width : plan.inner, kSlice));
    plan.groups = plan.across = 1;
    return plan;
}

void set_lanes(Plan& plan, int lanes) {
    plan.lanes = lanes;
    while ((1 << plan.across_bits) < plan.across) ++plan.across_bits;
    plan.down = lanes / plan.across;
    plan.jump_rows = lanes / plan.slices;
    plan.jump_slices = lanes % plan.slices;
}

// Slices for a thread, 4 to 64: at first few, for enough blocks to fill the chip, then more, because what a block does
// once (parameters, partial sums) is spread over them.
int steps_for(int64_t slices) {
    int steps = 4;
    while (steps < 64 && slices > int64_t{steps} * kChunkThreads * (steps < 8 ? 512 : 2048)) steps *= 2;
    return steps;
}

Plan plan_chunks(const LadderEncoderShape& shape) {
    Plan plan = plan_shape(shape);
    const int64_t rows = longest_part(shape);
    int64_t slices = plan.slices;  // that lie side by side, where the walk goes down
    if (plan.columns) {
        // 32 slices side by side, or fewer, but not under eight, where the last tile would be wasted on too little.
        plan.across = 32;
        while (plan.across > 8 && (ceil_div(slices, plan.across) * plan.across - slices) * 8 > slices) plan.across /= 2;
        while (plan.across > 1 && plan.across / 2 >= slices) plan.across /= 2;
        plan.tiles = ceil_div(slices, plan.across);
    } else {
        plan.tiles = shape.channels;
    }
    const int64_t down = plan.columns ? rows : rows * slices;  // slices that the lanes of a column share
    int lanes = kChunkThreads;
    while (lanes > 32 && (lanes / 2 / plan.across >= down ||
                          (plan.columns && static_cast<int64_t>(lanes / plan.across) * plan.width > kReach)))
        lanes /= 2;
    set_lanes(plan, lanes);
    plan.steps = steps_for(shape.seeds * shape.rows * (plan.columns ? slices : shape.channels * slices));
    while (plan.columns && plan.steps > 1 && static_cast<int64_t>(plan.steps) * plan.down * plan.width > kReach)
        plan.steps /= 2;
    for (int p = 0; p < kMaxParts; ++p) {
        const int64_t part = plan.first_row[p + 1] - plan.first_row[p];
        plan.first_chunk[p + 1] =
            plan.first_chunk[p] + ceil_div(plan.columns ? part : part * slices, int64_t{plan.down} * plan.steps);
    }
    return plan;
}

// A plan of blocks that hold whole parts in registers, one in forward and all in backward; `held` says whether there
// is one.
template <class T>
Plan plan_held(const LadderEncoderShape& shape, bool backward) {
    Plan plan = plan_shape(shape);
    if (plan.columns && shape.inner > 1) return plan;
    const int groups = backward ? static_cast<int>(shape.parts) : 1;
    const int64_t rows = longest_part(shape),
                  most = (backward ? kHoldThreads<T, true> : kHoldThreads<T, false>) / groups / 32 * 32;
    const int64_t all = shape.seeds * shape.rows * plan.slices * (plan.columns ? 1 : shape.channels);
    // Few slices to a thread while there are few of them at all.
    int held = 1;
    while (held < kHeld && all > held * int64_t{65536}) held *= 2;
    int64_t down = plan.columns ? rows : rows * plan.slices;
    plan.tiles = shape.channels;
    if (plan.columns) {
        if (rows * plan.width > kReach) return plan;
        // Eight slices side by side; fewer, down to a sector of 32 bytes, where that makes too few blocks or is too
        // much for one.
        const int least = sizeof(T) == 2 ? 4 : sizeof(T) == 4 ? 2 : 1;
        const int64_t others = shape.seeds * (backward ? 1 : shape.parts);
        plan.across = kHoldAcross;
        while (plan.across > 1 && plan.across / 2 >= plan.slices) plan.across /= 2;
        while (plan.across > least &&
               (ceil_div(plan.slices, plan.across) * others < 256 || plan.across * ceil_div(down, kHeld) > most))
            plan.across /= 2;
        plan.tiles = ceil_div(plan.slices, plan.across);
    }
    while (held < kHeld && plan.across * ceil_div(down, held) > most) held *= 2;
    if (plan.across * ceil_div(down, held) > most) return plan;
    down = down > 0 ? down : 1;
    plan.groups = groups;
    plan.steps = held;
    set_lanes(plan, static_cast<int>(ceil_div(plan.across * ceil_div(down, held), 32) * 32));
    for (int p = 0; p <= kMaxParts; ++p) plan.first_chunk[p] = p < shape.parts ? p : shape.parts;
    plan.held = true;
    return plan;
}

// A plan that only the totals of nothing need.
Plan plan_nothing(const LadderEncoderShape& shape) {
    Plan plan = {};
    plan.parts = static_cast<int>(shape.parts);
    plan.channels = shape.channels;
    plan.columns = true;
    return plan;
}

int64_t merge_groups(const LadderEncoderShape& shape) { return ceil_div(shape.channels, kMergeAcross); }

// Values of partial sums in the workspace.
int64_t partial_values(const LadderEncoderShape& shape, const Plan& plan, int rows) {
    return shape.seeds * plan.first_chunk[kMaxParts] * rows * plan.sums;
}

template <class V>
Layer<V> layer_of(const void* beta, const void* gamma, const int64_t* state, const LadderEncoderOptions& options,
                  bool float_params) {
    Layer<V> layer = {};
    layer.beta = beta;
    layer.gamma = gamma;
    layer.state = options.noise_std > 0 ? state : nullptr;
    layer.stream = options.stream;
    layer.noise_std = static_cast<V>(options.noise_std);
    layer.negative_slope = static_cast<V>(options.negative_slope);
    layer.eps = static_cast<V>(options.eps);
    layer.activation = options.activation;
    layer.float_params = float_params;
    return layer;
}

// Slices are whole: aligned to the noise's fours, and to what is read and written at once.
template <class T, class... Pointers>
bool whole_slices(const Plan& plan, Pointers... pointers) {
    return sizeof(T) < 8 && (plan.columns ? plan.width : plan.inner) % kSlice == 0 &&
           aligned_to(kSlice * sizeof(T), pointers...);
}

template <Kind kind, bool whole_>
struct Variant {
    static constexpr Kind walk = kind;
    static constexpr bool whole = whole_;
};

// Calls f with the kernels' variant; `kind` where the walk is not over runs.
template <class T, Kind kind, class F>
cudaError_t with_variant(const Plan& plan, bool whole, const F& f) {
    if constexpr (sizeof(T) < 8)
        if (whole) return plan.columns ? f(Variant<kind, true>{}) : f(Variant<kRuns, true>{});
    return plan.columns ? f(Variant<kind, false>{}) : f(Variant<kRuns, false>{});
}

template <class T>
cudaError_t run_forward(const T* x, T* z, T* h, Compute<T>* mean, Compute<T>* var, Compute<T>* partials,
                        const Layer<Compute<T>>& layer, const LadderEncoderShape& shape, void* stream) {
    const int64_t merge_blocks = shape.seeds * shape.parts * merge_groups(shape);
    constexpr int kMergeThreads = kMergeAcross * kMergeDown;
    if (empty(shape))
        return launch(merge_statistics<T>, merge_blocks, kMergeThreads, stream, x, partials, mean, var,
                      plan_nothing(shape));
    const Plan held = plan_held<T>(shape, false), plan = held.held ? held : plan_chunks(shape);
    const int64_t blocks = plan.tiles * plan.first_chunk[kMaxParts] * shape.seeds;
    const bool whole = whole_slices<T>(plan, x, z, h);
    if (plan.held)
        return with_variant<T, kDense>(plan, whole, [&](auto v) {
            return launch(forward_held<T, v.walk, v.whole>, blocks, plan.lanes, stream, x, z, h, mean, var, layer,
                          plan);
        });
    return with_variant<T, kColumns>(plan, whole, [&](auto v) {
        cudaError_t error = launch(statistics<T, v.walk, v.whole>, blocks, plan.lanes, stream, x, partials, plan);
        if (error != cudaSuccess) return error;
        error = launch(merge_statistics<T>, merge_blocks, kMergeThreads, stream, x, partials, mean, var, plan);
        if (error != cudaSuccess || (z == nullptr && h == nullptr)) return error;
        return launch(forward_apply<T, v.walk, v.whole>, blocks, plan.lanes, stream, x, mean, var, z, h, layer, plan);
    });
}

template <class T>
cudaError_t run_backward(const BackwardTensors<T>& t, Compute<T>* partials, const Layer<Compute<T>>& layer,
                         const LadderEncoderShape& shape, void* stream) {
    using V = Compute<T>;
    const int64_t merge_blocks = shape.seeds * merge_groups(shape);
    constexpr int kMergeThreads = kMergeAcross * kMergeDown;
    if (empty(shape)) {
        if (t.grad_beta == nullptr && t.grad_gamma == nullptr) return cudaSuccess;
        return launch(merge_backward<T>, merge_blocks, kMergeThreads, stream, partials, t,
                      static_cast<Finish<V>*>(nullptr), layer, plan_nothing(shape));
    }
    const Plan held = plan_held<T>(shape, true), plan = held.held ? held : plan_chunks(shape);
    const bool whole = whole_slices<T>(plan, t.grad_z, t.grad_h, t.x, t.grad_x);
    if (plan.held)
        return with_variant<T, kDense>(plan, whole, [&](auto v) {
            return launch(backward_held<T, v.walk, v.whole>, plan.tiles * shape.seeds, plan.lanes * plan.groups, stream,
                          t, layer, plan);
        });
    const int64_t blocks = plan.tiles * plan.first_chunk[kMaxParts] * shape.seeds;
    auto* const finish = reinterpret_cast<Finish<V>*>(partials + partial_values(shape, plan, 4));
    return with_variant<T, kColumns>(plan, whole, [&](auto v) {
        cudaError_t error =
            launch(backward_sums<T, v.walk, v.whole>, blocks, plan.lanes, stream, t, partials, layer, plan);
        if (error != cudaSuccess) return error;
        error = launch(merge_backward<T>, merge_blocks, kMergeThreads, stream, partials, t, finish, layer, plan);
        if (error != cudaSuccess) return error;
        return launch(backward_apply<T, v.walk, v.whole>, blocks, plan.lanes, stream, t, finish, layer, plan);
    });
}

// Bytes of `rows` partial sums for each, and of `more` values for each statistic, in the type that needs most.
int64_t workspace(const LadderEncoderShape& shape, bool backward) {
    if (empty(shape) || !fits(shape, false)) return 0;
    const bool wide = !plan_held<double>(shape, backward).held;
    const bool narrow = !plan_held<float>(shape, backward).held || !plan_held<bfloat16>(shape, backward).held;
    if (!wide && !narrow) return 0;
    const int64_t partials = partial_values(shape, plan_chunks(shape), backward ? 4 : 2);
    const int64_t finish = backward ? 2 * shape.seeds * shape.parts * shape.channels : 0;
    return (partials + finish) * static_cast<int64_t>(wide ? sizeof(double) : sizeof(float));
}

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
cudaError_t dispatch(int dtype, int params_dtype, const F& f) {
    if (params_dtype != dtype && (params_dtype != kFloat32 || dtype == kFloat64)) return cudaErrorInvalidValue;
    switch (dtype) {
        case kFloat32:
            return f(static_cast<float*>(nullptr));
        case kFloat64:
            return f(static_cast<double*>(nullptr));
        case kBFloat16:
            return f(static_cast<bfloat16*>(nullptr));
        case kFloat16:
            return f(static_cast<float16*>(nullptr));
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace ladderfast::cuda

extern "C" {

int64_t ladderfast_ladder_encoder_workspace_cuda(const LadderEncoderShape* shape) {
    return ladderfast::cuda::workspace(*shape, false);
}

int64_t ladderfast_ladder_encoder_backward_workspace_cuda(const LadderEncoderShape* shape) {
    return ladderfast::cuda::workspace(*shape, true);
}

int ladderfast_ladder_encoder_forward_cuda(const void* x, const void* beta, const void* gamma, const int64_t* state,
                                           void* z, void* h, void* mean, void* var, void* workspace, int dtype,
                                           int params_dtype, const LadderEncoderOptions* options,
                                           const LadderEncoderShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = Compute<T>;
        if (!fits(*shape, state != nullptr)) return cudaErrorInvalidValue;
        const Layer<V> layer = layer_of<V>(beta, gamma, state, *options, params_dtype == kFloat32);
        return run_forward<T>(static_cast<const T*>(x), static_cast<T*>(z), static_cast<T*>(h), static_cast<V*>(mean),
                              static_cast<V*>(var), static_cast<V*>(workspace), layer, *shape, stream);
    });
}

int ladderfast_ladder_encoder_backward_cuda(const void* grad_z, const void* grad_h, const void* grad_mean,
                                            const void* grad_var, const void* x, const void* mean, const void* var,
                                            const void* beta, const void* gamma, const int64_t* state, void* grad_x,
                                            void* grad_beta, void* grad_gamma, void* workspace, int dtype,
                                            int params_dtype, const LadderEncoderOptions* options,
                                            const LadderEncoderShape* shape, void* stream) {
    using namespace ladderfast::cuda;
    return dispatch(dtype, params_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = Compute<T>;
        if (!fits(*shape, state != nullptr)) return cudaErrorInvalidValue;
        // Only an activation's slope and the gradient of gamma depend on the noise.
        const bool needs_noise = grad_h != nullptr && (options->activation != kIdentity || grad_gamma != nullptr);
        const Layer<V> layer =
            layer_of<V>(beta, gamma, needs_noise ? state : nullptr, *options, params_dtype == kFloat32);
        const BackwardTensors<T> t{static_cast<const T*>(grad_z),
                                   static_cast<const T*>(grad_h),
                                   static_cast<const V*>(grad_mean),
                                   static_cast<const V*>(grad_var),
                                   static_cast<const T*>(x),
                                   static_cast<const V*>(mean),
                                   static_cast<const V*>(var),
                                   static_cast<T*>(grad_x),
                                   grad_beta,
                                   grad_gamma};
        return run_backward<T>(t, static_cast<V*>(workspace), layer, *shape, stream);
    });
}
}

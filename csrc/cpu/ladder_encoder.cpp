// CPU kernels of the op `ladder_encoder`; contract in ../ladder_encoder.h.
//
// Floor in float32: forward reads x twice and writes z and h (16 bytes an element, the second reading from a cache for
// batches of usual size), backward reads the two gradients, x twice and grad_x and writes grad_x twice (28 bytes).
// Where there is noise, drawing it costs more than that (noise.h); it is drawn into a buffer of the first-level cache,
// for a few rows at a time, so that rows of few columns waste none.
#undef LF_THIS_FILE
#define LF_THIS_FILE "ladder_encoder.cpp"

#ifndef LADDERFAST_CPU_LADDER_ENCODER_PLAN
#define LADDERFAST_CPU_LADDER_ENCODER_PLAN

#include "../ladder_encoder.h"
#include "isa.h"
#include "plan.h"

namespace ladderfast::cpu {

static inline PartsPlan encoder_plan(const LadderEncoderShape& s) {
    return PartsPlan(s.seeds, s.rows, s.channels, s.inner, s.parts, s.part_rows);
}

static const int64_t kTile = 8;          // rows whose sums stay in registers, and whose noise is drawn together
static const int64_t kRunTile = 1024;    // the same for elements of runs
static const int64_t kSums = 4;          // of g, g (x - mean) rstd, and what goes to beta and gamma
static const int64_t kAheadBytes = 512;  // to prefetch ahead in the rows of a tile
static const int64_t kRunAhead = 2048;   // and in runs

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "noise.h"
#include "moments.h"
#include "../math/ladder_encoder.h"

LF_HD float root(float x) { return __builtin_sqrtf(x); }
LF_HD double root(double x) { return __builtin_sqrt(x); }

// What an item needs of each column: rows of kMaxBlock in this order.
enum TableRow { kMean, kRstd, kBeta, kGamma, kTableRows };

// values[channel], or `without` where there are none, for columns [first, first + count); padded to whole vectors.
template <class T>
static inline void fill_row(T* row, const T* values, T without, const PartsPlan& plan, const PartsItem& item) {
    const int64_t padded = (item.count + Vec<T>::width - 1) / Vec<T>::width * Vec<T>::width;
    for (int64_t i = item.count; i < padded; ++i) row[i] = 0;
    if (values == nullptr) {
        for (int64_t i = 0; i < item.count; ++i) row[i] = without;
    } else if (plan.inner == 1 && plan.width == plan.natural) {
        memcpy(row, values + item.first, item.count * sizeof(T));
    } else {
        int64_t column = item.first % plan.natural, channel = column / plan.inner, k = column % plan.inner;
        for (int64_t i = 0; i < item.count; ++i) {
            row[i] = values[channel];
            if (++k < plan.inner) continue;
            k = 0;
            if (++channel == plan.channels) channel = 0;
        }
    }
}

template <class T>
static inline void fill_rstd(T* row, int64_t count, T eps) {
    const int64_t padded = (count + Vec<T>::width - 1) / Vec<T>::width * Vec<T>::width;
    for (int64_t i = 0; i < padded; ++i) row[i] = (T)1 / root(row[i] + eps);
}

template <class T>
static inline void fill_table(T* table, const T* mean, const T* var, const T* beta, const T* gamma, double eps,
                              const PartsPlan& plan, const PartsItem& item) {
    const int64_t statistics = (item.seed * plan.parts + item.part) * plan.channels;
    fill_row(table + kMean * kMaxBlock, mean + statistics, (T)0, plan, item);
    fill_row(table + kRstd * kMaxBlock, var + statistics, (T)0, plan, item);
    fill_rstd(table + kRstd * kMaxBlock, item.count, (T)eps);
    fill_row(table + kBeta * kMaxBlock, beta ? beta + item.seed * plan.channels : nullptr, (T)0, plan, item);
    fill_row(table + kGamma * kMaxBlock, gamma ? gamma + item.seed * plan.channels : nullptr, (T)1, plan, item);
}

template <class T>
LF_HD EncoderColumn<Vec<T>> load_column(const T* table, int64_t c) {
    using V = Vec<T>;
    return {V::load(table + kMean * kMaxBlock + c), V::load(table + kRstd * kMaxBlock + c),
            V::load(table + kBeta * kMaxBlock + c), V::load(table + kGamma * kMaxBlock + c)};
}

template <class T>
static inline EncoderColumn<Vec<T>> channel_column(const T* mean, const T* var, const T* beta, const T* gamma,
                                                   double eps, const PartsPlan& plan, const PartsItem& item) {
    using V = Vec<T>;
    const int64_t statistics = (item.seed * plan.parts + item.part) * plan.channels + item.channel;
    const int64_t parameters = item.seed * plan.channels + item.channel;
    return {V::broadcast(mean[statistics]), V::broadcast((T)1 / root(var[statistics] + (T)eps)),
            V::broadcast(beta ? beta[parameters] : (T)0), V::broadcast(gamma ? gamma[parameters] : (T)1)};
}

static inline NoiseSource noise_source(const int64_t* state, int64_t seed, int64_t stream) {
    const uint64_t key = (uint64_t)state[2 * seed];
    return {(uint32_t)key, (uint32_t)(key >> 32), (uint64_t)state[2 * seed + 1] + (uint64_t)stream};
}

// The noise of an item's columns in rows [row, row_end), at most kTile of them; where row + i begins goes to rows[i].
struct NoiseTile {
    alignas(64) float buffer[kTile * (kMaxBlock + kNoiseRoom)];
    const float* rows[kTile];

    LF_HD void draw(const NoiseSource& source, const PartsPlan& plan, const PartsItem& item, int64_t row,
                    int64_t row_end) {
        if (plan.blocks == 1) {
            const int64_t count = min_of((row_end - row) * plan.width, item.size - row * plan.width);
            const float* first = draw_normals(source, item.at(plan, row), count, buffer);
            for (int64_t i = 0; i < row_end - row; ++i) rows[i] = first + i * plan.width;
        } else {
            for (int64_t i = 0; i < row_end - row; ++i)
                rows[i] = draw_normals(source, item.at(plan, row + i), item.columns_of(plan, row + i),
                                       buffer + i * (kMaxBlock + kNoiseRoom));
        }
    }
};

template <int activation, bool noisy, class S>
LF_HD void apply_columns(const LadderEncoderForward<S>& pass, const LadderEncoderOptions& options,
                         const PartsPlan& plan, const PartsItem& item) {
    using T = Wide<S>;
    using V = Vec<T>;
    alignas(64) T table[kTableRows * kMaxBlock];
    NoiseTile noise;
    NoiseSource source = {};
    if (noisy) source = noise_source(pass.state, item.seed, options.stream);
    fill_table(table, pass.mean, pass.var, pass.beta, pass.gamma, options.eps, plan, item);
    const V slope = V::broadcast((T)options.negative_slope), std = V::broadcast((T)options.noise_std);
    const S* x = pass.x + item.offset;
    S *const z_out = pass.z ? pass.z + item.offset : nullptr, *const h_out = pass.h ? pass.h + item.offset : nullptr;
    for (int64_t tile = item.row; tile < item.row_end; tile += kTile) {
        const int64_t tile_end = min_of(tile + kTile, item.row_end);
        if (noisy) noise.draw(source, plan, item, tile, tile_end);
        for (int64_t r = tile; r < tile_end; ++r) {
            const int64_t at = item.at(plan, r), count = item.columns_of(plan, r);
            const float* normals = noisy ? noise.rows[r - tile] : nullptr;
            for (int64_t c = 0; c < count; c += V::width) {
                const int64_t n = count - c;
                const auto p = load_column(table, c);
                const V added = noisy ? load_normals(normals + c, T()) * std : V::broadcast(0);
                if (n >= V::width) {
                    // The next row: a block is too short a stretch for the hardware to run ahead by itself.
                    __builtin_prefetch(x + at + c + plan.width);
                    const V z = encoder_z(V::load(x + at + c), added, p);
                    if (z_out) z.store(z_out + at + c);
                    if (h_out) encoder_h<activation>(z, slope, p).store(h_out + at + c);
                } else {
                    const V z = encoder_z(V::load(x + at + c, n), added, p);
                    if (z_out) z.store(z_out + at + c, n);
                    if (h_out) encoder_h<activation>(z, slope, p).store(h_out + at + c, n);
                }
            }
        }
    }
}

template <int activation, bool noisy, class S>
LF_HD void apply_run(const LadderEncoderForward<S>& pass, const LadderEncoderOptions& options, const PartsPlan& plan,
                     const PartsItem& item) {
    using T = Wide<S>;
    using V = Vec<T>;
    alignas(64) float buffer[kRunTile + kNoiseRoom];
    NoiseSource source = {};
    if (noisy) source = noise_source(pass.state, item.seed, options.stream);
    const auto p = channel_column(pass.mean, pass.var, pass.beta, pass.gamma, options.eps, plan, item);
    const V slope = V::broadcast((T)options.negative_slope), std = V::broadcast((T)options.noise_std);
    for (int64_t r = item.row; r < item.row_end; ++r) {
        for (int64_t tile = 0; tile < item.count; tile += kRunTile) {
            const int64_t at = item.at(plan, r) + tile, count = min_of(kRunTile, item.count - tile);
            const float* normals = noisy ? draw_normals(source, at, count, buffer) : nullptr;
            const S* x = pass.x + item.offset + at;
            S *const z_out = pass.z ? pass.z + item.offset + at : nullptr, *const h_out =
                                                                               pass.h ? pass.h + item.offset + at
                                                                                      : nullptr;
            for (int64_t c = 0; c < count; c += V::width) {
                const int64_t n = count - c;
                const V added = noisy ? load_normals(normals + c, T()) * std : V::broadcast(0);
                if (n >= V::width) {
                    __builtin_prefetch(x + c + kRunAhead / sizeof(S));
                    const V z = encoder_z(V::load(x + c), added, p);
                    if (z_out) z.store(z_out + c);
                    if (h_out) encoder_h<activation>(z, slope, p).store(h_out + c);
                } else {
                    const V z = encoder_z(V::load(x + c, n), added, p);
                    if (z_out) z.store(z_out + c, n);
                    if (h_out) encoder_h<activation>(z, slope, p).store(h_out + c, n);
                }
            }
        }
    }
}

// One vector of the backward pass: returns what reaches the normalised x, adds to the column's sums.
template <int activation, class T>
LF_HD Vec<T> backward_vector(Vec<T> grad_z, Vec<T> grad_h, Vec<T> x, Vec<T> added, Vec<T> slope,
                             const EncoderColumn<Vec<T>>& p, Vec<T> (&sums)[kSums]) {
    Vec<T> for_beta, for_gamma;
    const Vec<T> z = encoder_z(x, added, p);
    const Vec<T> g = encoder_backward<activation>(grad_z, grad_h, z, slope, p, for_beta, for_gamma);
    sums[0] = sums[0] + g;
    sums[1] = sums[1] + g * ((x - p.mean) * p.rstd);
    sums[2] = sums[2] + for_beta;
    sums[3] = sums[3] + for_gamma;
    return g;
}

template <int activation, bool noisy, class S>
LF_HD void backward_columns(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                            const PartsPlan& plan, const PartsItem& item) {
    using T = Wide<S>;
    using V = Vec<T>;
    alignas(64) T table[kTableRows * kMaxBlock];
    alignas(64) T sums_table[kSums * kMaxBlock] = {};
    NoiseTile noise;
    NoiseSource source = {};
    if (noisy) source = noise_source(pass.state, item.seed, options.stream);
    fill_table(table, pass.mean, pass.var, pass.beta, pass.gamma, options.eps, plan, item);
    const V slope = V::broadcast((T)options.negative_slope), std = V::broadcast((T)options.noise_std);
    const V zero = V::broadcast(0);
    const S *x = pass.x + item.offset, *gz = pass.grad_z ? pass.grad_z + item.offset : nullptr,
            *gh = pass.grad_h ? pass.grad_h + item.offset : nullptr;
    T* out = pass.reaching + item.offset;
    for (int64_t tile = item.row; tile < item.row_end; tile += kTile) {
        const int64_t tile_end = min_of(tile + kTile, item.row_end);
        if (noisy) noise.draw(source, plan, item, tile, tile_end);
        for (int64_t c = 0; c < item.count; c += V::width) {
            const auto p = load_column(table, c);
            V sums[kSums] = {zero, zero, zero, zero};
            for (int64_t r = tile; r < tile_end; ++r) {
                const int64_t at = item.at(plan, r) + c, n = item.columns_of(plan, r) - c;
                if (n <= 0) continue;
                const V added = noisy ? load_normals(noise.rows[r - tile] + c, T()) * std : zero;
                if (n >= V::width) {
                    // A tile is more streams than the hardware follows by itself.
                    __builtin_prefetch(x + at + kAheadBytes / sizeof(S));
                    if (gz) __builtin_prefetch(gz + at + kAheadBytes / sizeof(S));
                    if (gh) __builtin_prefetch(gh + at + kAheadBytes / sizeof(S));
                    backward_vector<activation>(gz ? V::load(gz + at) : zero, gh ? V::load(gh + at) : zero,
                                                V::load(x + at), added, slope, p, sums)
                        .store(out + at);
                } else {
                    backward_vector<activation>(gz ? V::load(gz + at, n) : zero, gh ? V::load(gh + at, n) : zero,
                                                V::load(x + at, n), added, slope, p, sums)
                        .store(out + at, n);
                }
            }
            for (int64_t j = 0; j < kSums; ++j) {
                T* total = sums_table + j * kMaxBlock + c;
                (V::load(total) + sums[j]).store(total);
            }
        }
    }
    T* to = pass.workspace + item.slot * kSums * plan.width + item.first;
    for (int64_t j = 0; j < kSums; ++j) memcpy(to + j * plan.width, sums_table + j * kMaxBlock, item.count * sizeof(T));
}

template <int activation, bool noisy, class S>
LF_HD void backward_run(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                        const PartsPlan& plan, const PartsItem& item) {
    using T = Wide<S>;
    using V = Vec<T>;
    alignas(64) float buffer[kRunTile + kNoiseRoom];
    NoiseSource source = {};
    if (noisy) source = noise_source(pass.state, item.seed, options.stream);
    const auto p = channel_column(pass.mean, pass.var, pass.beta, pass.gamma, options.eps, plan, item);
    const V slope = V::broadcast((T)options.negative_slope), std = V::broadcast((T)options.noise_std);
    const V zero = V::broadcast(0);
    double total[kSums] = {};
    V sums[kSums] = {zero, zero, zero, zero};
    int64_t summed = 0;  // elements in `sums`
    for (int64_t r = item.row; r < item.row_end; ++r) {
        for (int64_t tile = 0; tile < item.count; tile += kRunTile) {
            const int64_t at = item.at(plan, r) + tile, count = min_of(kRunTile, item.count - tile);
            const float* normals = noisy ? draw_normals(source, at, count, buffer) : nullptr;
            const S *x = pass.x + item.offset + at, *gz = pass.grad_z ? pass.grad_z + item.offset + at : nullptr,
                    *gh = pass.grad_h ? pass.grad_h + item.offset + at : nullptr;
            T* out = pass.reaching + item.offset + at;
            for (int64_t c = 0; c < count; c += V::width) {
                const int64_t n = count - c;
                const V added = noisy ? load_normals(normals + c, T()) * std : zero;
                if (n >= V::width) {
                    __builtin_prefetch(x + c + kRunAhead / sizeof(S));
                    if (gz) __builtin_prefetch(gz + c + kRunAhead / sizeof(S));
                    if (gh) __builtin_prefetch(gh + c + kRunAhead / sizeof(S));
                    backward_vector<activation>(gz ? V::load(gz + c) : zero, gh ? V::load(gh + c) : zero,
                                                V::load(x + c), added, slope, p, sums)
                        .store(out + c);
                } else {
                    backward_vector<activation>(gz ? V::load(gz + c, n) : zero, gh ? V::load(gh + c, n) : zero,
                                                V::load(x + c, n), added, slope, p, sums)
                        .store(out + c, n);
                }
            }
            summed += count;
            if (summed >= kRunTile || r + 1 == item.row_end) {
                for (int64_t j = 0; j < kSums; ++j) {
                    total[j] += sums[j].sum();
                    sums[j] = zero;
                }
                summed = 0;
            }
        }
    }
    T* to = pass.workspace + item.slot * kSums * plan.channels + item.channel;
    for (int64_t j = 0; j < kSums; ++j) to[j * plan.channels] = (T)total[j];
}

// After the partial sums the workspace has what encoder_finish gives: at_mean and slope, (seeds, parts, channels) each.
static inline int64_t finished(const PartsPlan& plan) {
    return plan.seeds * plan.parts * plan.slots() * kSums * plan.slot_width();
}

template <class S>
static inline void reduce(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                          const PartsPlan& plan, int64_t begin, int64_t end) {
    using T = Wide<S>;
    const int64_t inner = plan.columns ? plan.inner : 1;  // neighbouring columns of one channel
    const int64_t natural = plan.channels * inner, width = plan.slot_width();
    T* at_mean_out = pass.workspace + finished(plan);
    T* slope_out = at_mean_out + plan.seeds * plan.parts * plan.channels;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = i % plan.channel_blocks() * kChannelBlock, seed = i / plan.channel_blocks();
        const int64_t count = min_of(kChannelBlock, plan.channels - channel);
        alignas(64) double parameters[2][kChannelBlock] = {};
        for (int64_t part = 0; part < plan.parts; ++part) {
            alignas(64) double sums[kSums][kChannelBlock] = {};
            for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
                if (plan.row_begin(part, chunk) == plan.row_begin(part, chunk + 1)) continue;
                const int64_t segments = plan.columns ? 1 : plan.blocks;
                for (int64_t segment = 0; segment < segments; ++segment) {
                    const T* slot = pass.workspace + plan.slot(seed, part, chunk * segments + segment) * kSums * width;
                    for (int64_t j = 0; j < kSums; ++j)
                        for (int64_t at = channel * inner; at < width; at += natural) {
                            const T* row = slot + j * width + at;
                            if (inner == 1) {
                                for (int64_t c = 0; c < count; ++c) sums[j][c] += row[c];
                            } else {
                                for (int64_t c = 0; c < count; ++c)
                                    for (int64_t k = 0; k < inner; ++k) sums[j][c] += row[c * inner + k];
                            }
                        }
                }
            }
            const double elements = plan.channels > 0 ? (double)(plan.part_size[part] / plan.channels) : 0;
            const int64_t to = (seed * plan.parts + part) * plan.channels + channel;
            for (int64_t c = 0; c < count; ++c) {
                double at_mean, slope;
                encoder_finish(sums[0][c], sums[1][c], pass.grad_mean ? (double)pass.grad_mean[to + c] : 0.0,
                               pass.grad_var ? (double)pass.grad_var[to + c] : 0.0,
                               1.0 / root((double)pass.var[to + c] + options.eps), 1.0 / elements, at_mean, slope);
                at_mean_out[to + c] = (T)at_mean;
                slope_out[to + c] = (T)slope;
                parameters[0][c] += sums[2][c];
                parameters[1][c] += sums[3][c];
            }
        }
        for (int64_t c = 0; c < count; ++c) {
            if (pass.grad_beta) pass.grad_beta[seed * plan.channels + channel + c] = (T)parameters[0][c];
            if (pass.grad_gamma) pass.grad_gamma[seed * plan.channels + channel + c] = (T)parameters[1][c];
        }
    }
}

template <class S>
static inline void finish_columns(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                                  const PartsPlan& plan, const PartsItem& item) {
    using T = Wide<S>;
    using V = Vec<T>;
    alignas(64) T mean[kMaxBlock], rstd[kMaxBlock], at_mean[kMaxBlock], slope[kMaxBlock];
    const int64_t statistics = (item.seed * plan.parts + item.part) * plan.channels;
    const T* done = pass.workspace + finished(plan) + statistics;
    fill_row(mean, pass.mean + statistics, (T)0, plan, item);
    fill_row(rstd, pass.var + statistics, (T)0, plan, item);
    fill_rstd(rstd, item.count, (T)options.eps);
    fill_row(at_mean, done, (T)0, plan, item);
    fill_row(slope, done + plan.seeds * plan.parts * plan.channels, (T)0, plan, item);
    for (int64_t r = item.row; r < item.row_end; ++r) {
        const S* x = pass.x + item.offset + item.at(plan, r);
        const T* reaching = pass.reaching + item.offset + item.at(plan, r);
        S* out = pass.grad_x + item.offset + item.at(plan, r);
        const int64_t count = item.columns_of(plan, r);
        for (int64_t c = 0; c < count; c += V::width) {
            const V m = V::load(mean + c), a = V::load(at_mean + c), k = V::load(slope + c), s = V::load(rstd + c);
            const int64_t n = count - c;
            if (n >= V::width) {
                __builtin_prefetch(x + c + plan.width);
                __builtin_prefetch(reaching + c + plan.width, 1);
                (V::load(reaching + c) * s + ((V::load(x + c) - m) * k + a)).store(out + c);
            } else {
                (V::load(reaching + c, n) * s + ((V::load(x + c, n) - m) * k + a)).store(out + c, n);
            }
        }
    }
}

template <class S>
static inline void finish_run(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                              const PartsPlan& plan, const PartsItem& item) {
    using T = Wide<S>;
    using V = Vec<T>;
    const int64_t statistics = (item.seed * plan.parts + item.part) * plan.channels + item.channel;
    const T* done = pass.workspace + finished(plan) + statistics;
    const V m = V::broadcast(pass.mean[statistics]), a = V::broadcast(*done);
    const V s = V::broadcast((T)1 / root(pass.var[statistics] + (T)options.eps));
    const V k = V::broadcast(done[plan.seeds * plan.parts * plan.channels]);
    for (int64_t r = item.row; r < item.row_end; ++r) {
        const S* x = pass.x + item.offset + item.at(plan, r);
        const T* reaching = pass.reaching + item.offset + item.at(plan, r);
        S* out = pass.grad_x + item.offset + item.at(plan, r);
        for (int64_t c = 0; c < item.count; c += V::width) {
            const int64_t n = item.count - c;
            if (n >= V::width) {
                __builtin_prefetch(x + c + kRunAhead / sizeof(S));
                __builtin_prefetch(reaching + c + kRunAhead / sizeof(T), 1);
                (V::load(reaching + c) * s + ((V::load(x + c) - m) * k + a)).store(out + c);
            } else {
                (V::load(reaching + c, n) * s + ((V::load(x + c, n) - m) * k + a)).store(out + c, n);
            }
        }
    }
}

template <int activation, bool noisy, class S>
static inline void apply_item(const LadderEncoderForward<S>& pass, const LadderEncoderOptions& options,
                              const PartsPlan& plan, const PartsItem& item) {
    if (plan.columns)
        apply_columns<activation, noisy>(pass, options, plan, item);
    else
        apply_run<activation, noisy>(pass, options, plan, item);
}

template <int activation, bool noisy, class S>
static inline void backward_item(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                                 const PartsPlan& plan, const PartsItem& item) {
    if (plan.columns)
        backward_columns<activation, noisy>(pass, options, plan, item);
    else
        backward_run<activation, noisy>(pass, options, plan, item);
}

template <class S>
static inline void apply(const LadderEncoderForward<S>& pass, const LadderEncoderOptions& options,
                         const LadderEncoderShape& shape, int64_t begin, int64_t end) {
    const PartsPlan plan = encoder_plan(shape);
    const int64_t noisy_end = pass.state != nullptr && options.noise_std != 0 ? shape.noisy * plan.natural : 0;
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        if (item.row == item.row_end) continue;
        const bool noisy = item.begin < noisy_end;
        if (options.activation == kRelu)
            noisy ? apply_item<kRelu, true>(pass, options, plan, item)
                  : apply_item<kRelu, false>(pass, options, plan, item);
        else if (options.activation == kLeakyRelu)
            noisy ? apply_item<kLeakyRelu, true>(pass, options, plan, item)
                  : apply_item<kLeakyRelu, false>(pass, options, plan, item);
        else
            noisy ? apply_item<kIdentity, true>(pass, options, plan, item)
                  : apply_item<kIdentity, false>(pass, options, plan, item);
    }
}

template <class S>
static inline void backward_sums(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,
                                 const LadderEncoderShape& shape, int64_t begin, int64_t end) {
    const PartsPlan plan = encoder_plan(shape);
    // The noise matters to the activation's slope and to the gradient of gamma, and to nothing else.
    const bool needed = pass.grad_h && (options.activation != kIdentity || pass.grad_gamma);
    const int64_t noisy_end =
        needed && pass.state != nullptr && options.noise_std != 0 ? shape.noisy * plan.natural : 0;
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        if (item.row == item.row_end) continue;
        const bool noisy = item.begin < noisy_end;
        if (options.activation == kRelu && pass.grad_h)
            noisy ? backward_item<kRelu, true>(pass, options, plan, item)
                  : backward_item<kRelu, false>(pass, options, plan, item);
        else if (options.activation == kLeakyRelu && pass.grad_h)
            noisy ? backward_item<kLeakyRelu, true>(pass, options, plan, item)
                  : backward_item<kLeakyRelu, false>(pass, options, plan, item);
        else
            noisy ? backward_item<kIdentity, true>(pass, options, plan, item)
                  : backward_item<kIdentity, false>(pass, options, plan, item);
    }
}

#define LF_ENCODER_INSTANCES(S, suffix)                                                                             \
    static void statistics_##suffix(const LadderEncoderForward<S>& pass, const LadderEncoderShape& shape,           \
                                    int64_t begin, int64_t end) {                                                   \
        partial_moments(pass.x, pass.workspace, encoder_plan(shape), begin, end);                                   \
    }                                                                                                               \
    static void merge_##suffix(const LadderEncoderForward<S>& pass, const LadderEncoderShape& shape, int64_t begin, \
                               int64_t end) {                                                                       \
        merge_moments(pass.x, pass.workspace, pass.mean, pass.var, encoder_plan(shape), begin, end);                \
    }                                                                                                               \
    static void apply_##suffix(const LadderEncoderForward<S>& pass, const LadderEncoderOptions& options,            \
                               const LadderEncoderShape& shape, int64_t begin, int64_t end) {                       \
        apply(pass, options, shape, begin, end);                                                                    \
    }                                                                                                               \
    static void backward_sums_##suffix(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,   \
                                       const LadderEncoderShape& shape, int64_t begin, int64_t end) {               \
        backward_sums(pass, options, shape, begin, end);                                                            \
    }                                                                                                               \
    static void reduce_##suffix(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,          \
                                const LadderEncoderShape& shape, int64_t begin, int64_t end) {                      \
        reduce(pass, options, encoder_plan(shape), begin, end);                                                     \
    }                                                                                                               \
    static void backward_apply_##suffix(const LadderEncoderBackward<S>& pass, const LadderEncoderOptions& options,  \
                                        const LadderEncoderShape& shape, int64_t begin, int64_t end) {              \
        const PartsPlan plan = encoder_plan(shape);                                                                 \
        for (int64_t i = begin; i < end; ++i) {                                                                     \
            const PartsItem item(plan, i);                                                                          \
            plan.columns ? finish_columns(pass, options, plan, item) : finish_run(pass, options, plan, item);       \
        }                                                                                                           \
    }

LF_ENCODER_INSTANCES(float, f32)
LF_ENCODER_INSTANCES(double, f64)
LF_ENCODER_INSTANCES(BFloat16, bf16)
#undef LF_ENCODER_INSTANCES

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t ladder_encoder_items(const LadderEncoderShape& s) { return encoder_plan(s).items(); }

int64_t ladder_encoder_merge_items(const LadderEncoderShape& s) {
    return s.seeds * s.parts * encoder_plan(s).channel_blocks();
}

int64_t ladder_encoder_reduce_items(const LadderEncoderShape& s) { return s.seeds * encoder_plan(s).channel_blocks(); }

int64_t ladder_encoder_workspace(const LadderEncoderShape& s) { return baseline::moments_workspace(encoder_plan(s)); }

int64_t ladder_encoder_backward_workspace(const LadderEncoderShape& s) {
    return baseline::finished(encoder_plan(s)) + 2 * s.seeds * s.parts * s.channels;
}

#define LF_ENCODER_FORWARD(name, S, suffix)                                                                            \
    template <>                                                                                                        \
    void ladder_encoder_##name<S>(const LadderEncoderForward<S>& pass, const LadderEncoderShape& shape, int64_t begin, \
                                  int64_t end) {                                                                       \
        static const auto kernel = LF_SELECT(name##_##suffix);                                                         \
        kernel(pass, shape, begin, end);                                                                               \
    }
#define LF_ENCODER_WITH_OPTIONS(name, Pass, S, suffix)                                           \
    template <>                                                                                  \
    void ladder_encoder_##name<S>(const Pass<S>& pass, const LadderEncoderOptions& options,      \
                                  const LadderEncoderShape& shape, int64_t begin, int64_t end) { \
        static const auto kernel = LF_SELECT(name##_##suffix);                                   \
        kernel(pass, options, shape, begin, end);                                                \
    }
#define LF_ENCODER_DISPATCH(S, suffix)                                       \
    LF_ENCODER_FORWARD(statistics, S, suffix)                                \
    LF_ENCODER_FORWARD(merge, S, suffix)                                     \
    LF_ENCODER_WITH_OPTIONS(apply, LadderEncoderForward, S, suffix)          \
    LF_ENCODER_WITH_OPTIONS(backward_sums, LadderEncoderBackward, S, suffix) \
    LF_ENCODER_WITH_OPTIONS(reduce, LadderEncoderBackward, S, suffix)        \
    LF_ENCODER_WITH_OPTIONS(backward_apply, LadderEncoderBackward, S, suffix)

LF_ENCODER_DISPATCH(float, f32)
LF_ENCODER_DISPATCH(double, f64)
LF_ENCODER_DISPATCH(BFloat16, bf16)
#undef LF_ENCODER_DISPATCH
#undef LF_ENCODER_WITH_OPTIONS
#undef LF_ENCODER_FORWARD

}  // namespace ladderfast::cpu
#endif

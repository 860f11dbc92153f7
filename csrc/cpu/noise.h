// Normal values by counter, many at once. Textual header, included per instruction set after vec.h; what they are is
// written in ../../ladderfast/reference/noise.py, the formulas are in ../math/noise.h.
//
// Drawing costs several times what the rest of the kernels that draw does: with AVX-512 130 vector operations for 32
// values, in two chains of dependent operations that are half as long. Two such sets at once keep the processor busy
// (measured: 0.77 ns a value instead of 1.01).

static const int kCounters = LF_VECTOR_BYTES / 8;  // of one vector of words

// n vectors of words of 32 bits in lanes of 64, the upper halves of which mean nothing: one multiplication gives both
// halves of a product in its place.
template <int n>
struct Words {
    typedef uint64_t Raw __attribute__((vector_size(LF_VECTOR_BYTES)));
    Raw raw[n];

    static LF_HD Words broadcast(uint64_t word) {
        Words w;
        for (int i = 0; i < n; ++i) w.raw[i] = word - Raw{};
        return w;
    }
    friend LF_HD Words operator^(Words a, Words b) {
        for (int i = 0; i < n; ++i) a.raw[i] ^= b.raw[i];
        return a;
    }
    friend LF_HD Words operator^(Words a, uint32_t b) {
        for (int i = 0; i < n; ++i) a.raw[i] ^= (uint64_t)b;
        return a;
    }
};

template <int n>
LF_HD void multiply_wide(Words<n> a, uint32_t m, Words<n>& high, Words<n>& low) {
    using Raw [[maybe_unused]] = typename Words<n>::Raw;
    for (int i = 0; i < n; ++i) {
#if LF_VECTOR_BYTES == 64
        low.raw[i] = (Raw)_mm512_maskz_mul_epu32((__mmask8)-1, (__m512i)a.raw[i], _mm512_set1_epi64(m));
#elif LF_VECTOR_BYTES == 32
        low.raw[i] = (Raw)_mm256_mul_epu32((__m256i)a.raw[i], _mm256_set1_epi64x(m));
#elif LF_MULTI_ISA
        low.raw[i] = (Raw)_mm_mul_epu32((__m128i)a.raw[i], _mm_set1_epi64x(m));
#else
        low.raw[i] = (a.raw[i] & 0xffffffffu) * (uint64_t)m;
#endif
        high.raw[i] = low.raw[i] >> 32;
    }
}

// Words of 32 bits, one a lane.
struct PackedWords {
    typedef uint32_t Raw __attribute__((vector_size(LF_VECTOR_BYTES)));
    Raw raw;
};

// Lanes even[0], odd[0], even[1], odd[1], ...
LF_HD PackedWords pack(Words<1>::Raw even, Words<1>::Raw odd) {
    return {(PackedWords::Raw)((even & 0xffffffffu) | (odd << 32))};
}

// 1 + k / 2^23 by its bits, less 1 - 2^-24.
LF_HD Vec<float> uniform(PackedWords word) {
    return {(Vec<float>::Raw)((word.raw >> 9) | 0x3f800000u) - 0x1.fffffep-1f};
}

// ln x for normal x > 0: e ln 2 + ln m with sqrt(1/2) <= m < sqrt(2), and ln(1 + f) = f - f^2 / 2 + f^3 q(f).
LF_HD Vec<float> log_(Vec<float> x) {
    using V = VecTraits<float>::Raw;
    using I = VecTraits<float>::RawInt;
    const I shifted = (I)x.raw - 0x3f3504f3;
    const V e = __builtin_convertvector(shifted >> 23, V);
    const V f = (V)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const V f2 = f * f;
    const V q01 = f * -0.250013367f + 0.333339107f, q23 = f * -0.16577593f + 0.199630643f;
    const V q45 = f * -0.142674286f + 0.149147714f;
    const V q = ((f2 * 0.0870035497f + q45) * f2 + q23) * f2 + q01;
    return {e * 0.693147182f + (f + f2 * (q * f - 0.5f))};
}

LF_HD Vec<float> sqrt_(Vec<float> x) {
#if LF_VECTOR_BYTES == 64
    return {(Vec<float>::Raw)_mm512_maskz_sqrt_ps((__mmask16)-1, (__m512)x.raw)};
#elif LF_VECTOR_BYTES == 32
    return {(Vec<float>::Raw)_mm256_sqrt_ps((__m256)x.raw)};
#elif LF_MULTI_ISA
    return {(Vec<float>::Raw)_mm_sqrt_ps((__m128)x.raw)};
#else
    for (int i = 0; i < Vec<float>::width; ++i) x.raw[i] = __builtin_sqrtf(x.raw[i]);
    return x;
#endif
}

// v = n / 4 + r with |r| <= 1/8, which is exact; polynomials in r^2; quarter turns exchange sine and cosine and change
// signs.
LF_HD void sincos_turn(Vec<float> v, Vec<float>& sin, Vec<float>& cos) {
    using V = VecTraits<float>::Raw;
    using I = VecTraits<float>::RawInt;
    const V round = V{} + 12582912.0f;  // 1.5 * 2^23 leaves the integer n in the low bits
    const V shifted = v.raw * 4.0f + round;
    const V r = v.raw - (shifted - round) * 0.25f;
    const V r2 = r * r;
    const V s = r * (((r2 * -75.4020678f + 81.5925535f) * r2 + -41.3416626f) * r2 + 6.28318529f);
    const V c = ((((r2 * 59.2459782f + -85.4437422f) * r2 + 64.9393265f) * r2 + -19.7392087f) * r2 + 1.0f);
    const I n = (I)shifted;
    const I odd = (n & 1) != 0;
    sin.raw = (V)((I)(odd ? c : s) ^ ((n & 2) << 30));
    cos.raw = (V)((I)(odd ? s : c) ^ (((n + 1) & 2) << 30));
}

// a[0], b[0], a[1], b[1], ... in two vectors.
LF_HD void interleave(Vec<float> a, Vec<float> b, Vec<float>& low, Vec<float>& high) {
#if LF_VECTOR_BYTES == 64
    const VecTraits<float>::RawInt first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    low.raw = __builtin_shuffle(a.raw, b.raw, first);
    high.raw = __builtin_shuffle(a.raw, b.raw, first + 8);
#elif LF_VECTOR_BYTES == 32
    const VecTraits<float>::RawInt first = {0, 8, 1, 9, 2, 10, 3, 11};
    low.raw = __builtin_shuffle(a.raw, b.raw, first);
    high.raw = __builtin_shuffle(a.raw, b.raw, first + 4);
#elif defined(__clang__)
    low.raw = __builtin_shufflevector(a.raw, b.raw, 0, 4, 1, 5);
    high.raw = __builtin_shufflevector(a.raw, b.raw, 2, 6, 3, 7);
#else
    const VecTraits<float>::RawInt first = {0, 4, 1, 5};
    low.raw = __builtin_shuffle(a.raw, b.raw, first);
    high.raw = __builtin_shuffle(a.raw, b.raw, first + 2);
#endif
}

#include "../math/noise.h"

// Which noise: of one seed and stream.
struct NoiseSource {
    uint32_t key0, key1;
    uint64_t stream;  // offset + stream
};

static const int64_t kNoiseStep = 4 * kCounters;  // normals of one vector of counters
static const int64_t kNoiseRoom = kNoiseStep + 3 + Vec<float>::width;

// The normals of n vectors of counters, which begin at `first`.
template <int n>
LF_HD void draw_step(const NoiseSource& source, Words<1>::Raw first, float* out) {
    Words<n> c[4];
    for (int i = 0; i < n; ++i) {
        c[0].raw[i] = first + (uint64_t)(i * kCounters);
        c[1].raw[i] = c[0].raw[i] >> 32;
    }
    c[2] = Words<n>::broadcast(source.stream);
    c[3] = Words<n>::broadcast(source.stream >> 32);
    philox4x32(c, source.key0, source.key1);
    for (int i = 0; i < n; ++i) {
        Vec<float> cos, sin, low, high;
        box_muller(pack(c[0].raw[i], c[2].raw[i]), pack(c[1].raw[i], c[3].raw[i]), cos, sin);
        interleave(cos, sin, low, high);
        low.store(out + i * kNoiseStep);
        high.store(out + i * kNoiseStep + Vec<float>::width);
    }
}

// Writes the normals of elements [begin, begin + count) of a seed and returns where they lie in `buffer`, which has
// room for kNoiseRoom more than `count`. They may be read by whole vectors: what follows them is finite.
static inline const float* draw_normals(const NoiseSource& source, int64_t begin, int64_t count, float* buffer) {
    Words<1>::Raw counters;
    for (int k = 0; k < kCounters; ++k) counters[k] = (uint64_t)begin / 4 + (uint64_t)k;
    const int64_t skipped = begin % 4, all = skipped + count;
    int64_t i = 0;
    for (; i + kNoiseStep < all; i += 2 * kNoiseStep) draw_step<2>(source, counters + (uint64_t)i / 4, buffer + i);
    for (; i < all; i += kNoiseStep) draw_step<1>(source, counters + (uint64_t)i / 4, buffer + i);
    Vec<float>::broadcast(0).store(buffer + i);
    return buffer + skipped;
}

// Normals as values of T.
LF_HD Vec<float> load_normals(const float* p, float) { return Vec<float>::load(p); }

LF_HD Vec<double> load_normals(const float* p, double) {
    typedef float Half __attribute__((vector_size(LF_VECTOR_BYTES / 2)));
    typedef float Unaligned __attribute__((vector_size(LF_VECTOR_BYTES / 2), aligned(4), may_alias));
    return {__builtin_convertvector((Half) * reinterpret_cast<const Unaligned*>(p), Vec<double>::Raw)};
}

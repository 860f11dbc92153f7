// Vec<T>: one hardware vector of float or double, with what the formulas need. Textual header, included per instruction
// set inside its namespace (isa.h); LF_VECTOR_BYTES is the width. Vec<float> is loaded from and stored to BFloat16 as
// well, whose header is included outside.

template <class T>
struct VecTraits;

template <>
struct VecTraits<float> {
    using Int = int32_t;
    typedef float Raw __attribute__((vector_size(LF_VECTOR_BYTES)));
    typedef int32_t RawInt __attribute__((vector_size(LF_VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(LF_VECTOR_BYTES), aligned(4), may_alias));
};

template <>
struct VecTraits<double> {
    using Int = int64_t;
    typedef double Raw __attribute__((vector_size(LF_VECTOR_BYTES)));
    typedef int64_t RawInt __attribute__((vector_size(LF_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(LF_VECTOR_BYTES), aligned(8), may_alias));
};

#if LF_VECTOR_BYTES == 64
LF_HD VecTraits<float>::Raw load_first(const float* p, int64_t n) {
    return (VecTraits<float>::Raw)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
LF_HD VecTraits<double>::Raw load_first(const double* p, int64_t n) {
    return (VecTraits<double>::Raw)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
LF_HD void store_first(float* p, int64_t n, VecTraits<float>::Raw raw) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)raw);
}
LF_HD void store_first(double* p, int64_t n, VecTraits<double>::Raw raw) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)raw);
}
LF_HD float sum_of(VecTraits<float>::Raw raw) { return _mm512_reduce_add_ps((__m512)raw); }
LF_HD double sum_of(VecTraits<double>::Raw raw) { return _mm512_reduce_add_pd((__m512d)raw); }
LF_HD void store_past_caches(float* p, VecTraits<float>::Raw raw) { _mm512_stream_ps(p, (__m512)raw); }
LF_HD void store_past_caches(double* p, VecTraits<double>::Raw raw) { _mm512_stream_pd(p, (__m512d)raw); }
#elif LF_VECTOR_BYTES == 32
LF_HD void store_past_caches(float* p, VecTraits<float>::Raw raw) { _mm256_stream_ps(p, (__m256)raw); }
LF_HD void store_past_caches(double* p, VecTraits<double>::Raw raw) { _mm256_stream_pd(p, (__m256d)raw); }
LF_HD __m256i first_lanes(const float*, int64_t n) {
    return (__m256i)(VecTraits<float>::RawInt{0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)n);
}
LF_HD __m256i first_lanes(const double*, int64_t n) { return (__m256i)(VecTraits<double>::RawInt{0, 1, 2, 3} < n); }
LF_HD VecTraits<float>::Raw load_first(const float* p, int64_t n) {
    return (VecTraits<float>::Raw)_mm256_maskload_ps(p, first_lanes(p, n));
}
LF_HD VecTraits<double>::Raw load_first(const double* p, int64_t n) {
    return (VecTraits<double>::Raw)_mm256_maskload_pd(p, first_lanes(p, n));
}
LF_HD void store_first(float* p, int64_t n, VecTraits<float>::Raw raw) {
    _mm256_maskstore_ps(p, first_lanes(p, n), (__m256)raw);
}
LF_HD void store_first(double* p, int64_t n, VecTraits<double>::Raw raw) {
    _mm256_maskstore_pd(p, first_lanes(p, n), (__m256d)raw);
}
#endif

// float from and to bfloat16, whose bits are float's upper half.
typedef uint32_t BFloat16Wide __attribute__((vector_size(LF_VECTOR_BYTES)));
typedef uint16_t BFloat16Bits __attribute__((vector_size(LF_VECTOR_BYTES / 2), aligned(2), may_alias));
LF_HD VecTraits<float>::Raw widen(BFloat16Bits bits) {
    return (VecTraits<float>::Raw)(__builtin_convertvector(bits, BFloat16Wide) << 16);
}
LF_HD BFloat16Bits narrow(VecTraits<float>::Raw raw) {
    const BFloat16Wide bits = (BFloat16Wide)raw;
    const BFloat16Wide rounded = (bits + (0x7fff + (bits >> 16 & 1))) >> 16;
    const BFloat16Wide nan = BFloat16Wide{} + 0x7fc0;
    return __builtin_convertvector(raw == raw ? rounded : nan, BFloat16Bits);
}
#if LF_VECTOR_BYTES == 64
LF_HD BFloat16Bits load_first(const BFloat16* p, int64_t n) {
    return (BFloat16Bits)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
}
LF_HD void store_first(BFloat16* p, int64_t n, BFloat16Bits bits) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)bits);
}
#else
LF_HD BFloat16Bits load_first(const BFloat16* p, int64_t n) {
    BFloat16Bits bits = {};
    memcpy(&bits, p, n * sizeof(BFloat16));
    return bits;
}
LF_HD void store_first(BFloat16* p, int64_t n, BFloat16Bits bits) { memcpy(p, &bits, n * sizeof(BFloat16)); }
#endif

template <class T>
struct Vec {
    using Raw = typename VecTraits<T>::Raw;
    using Unaligned = typename VecTraits<T>::Unaligned;
    static constexpr int width = LF_VECTOR_BYTES / sizeof(T);
    Raw raw;

    static LF_HD Vec load(const T* p) { return {(Raw) * reinterpret_cast<const Unaligned*>(p)}; }
    static LF_HD Vec broadcast(T x) { return {x - Raw{}}; }
    LF_HD void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = raw; }
    // To memory and not into the caches, which saves reading the line first. p at a multiple of the vector's size;
    // order_streams() before another thread may read.
#if LF_VECTOR_BYTES >= 32
    LF_HD void stream(T* p) const { store_past_caches(p, raw); }
#else
    LF_HD void stream(T* p) const { store(p); }
#endif

    // The first n < width elements; the others are read as 0 and not written.
#if LF_VECTOR_BYTES >= 32
    static LF_HD Vec load(const T* p, int64_t n) { return {load_first(p, n)}; }
    LF_HD void store(T* p, int64_t n) const { store_first(p, n, raw); }
#else
    static LF_HD Vec load(const T* p, int64_t n) {
        alignas(LF_VECTOR_BYTES) T buffer[width] = {};
        for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
        return load(buffer);
    }
    LF_HD void store(T* p, int64_t n) const {
        alignas(LF_VECTOR_BYTES) T buffer[width];
        store(buffer);
        for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
    }
#endif

    // Of float alone.
    static LF_HD Vec load(const BFloat16* p) { return {widen(*reinterpret_cast<const BFloat16Bits*>(p))}; }
    static LF_HD Vec load(const BFloat16* p, int64_t n) { return {widen(load_first(p, n))}; }
    LF_HD void store(BFloat16* p) const { *reinterpret_cast<BFloat16Bits*>(p) = narrow(raw); }
    LF_HD void store(BFloat16* p, int64_t n) const { store_first(p, n, narrow(raw)); }

    friend LF_HD Vec operator+(Vec a, Vec b) { return {a.raw + b.raw}; }
    friend LF_HD Vec operator-(Vec a, Vec b) { return {a.raw - b.raw}; }
    friend LF_HD Vec operator*(Vec a, Vec b) { return {a.raw * b.raw}; }
    friend LF_HD Vec operator/(Vec a, Vec b) { return {a.raw / b.raw}; }

    LF_HD T sum() const {
#if LF_VECTOR_BYTES == 64
        return sum_of(raw);
#else
        T total = raw[0];
        for (int i = 1; i < width; ++i) total += raw[i];
        return total;
#endif
    }
};

LF_HD void order_streams() {
#if LF_MULTI_ISA
    _mm_sfence();
#endif
}

template <class T>
LF_HD Vec<T> operator*(Vec<T> a, float b) {
    return {a.raw * (T)b};
}

template <class T>
LF_HD Vec<T> zero_like(Vec<T>) {
    return Vec<T>::broadcast(0);
}

LF_HD double zero_like(double) { return 0; }

// a where test <= 0, b elsewhere, also where test is NaN.
template <class T>
LF_HD Vec<T> where_not_positive(Vec<T> test, Vec<T> a, Vec<T> b) {
    return {test.raw <= (T)0 ? a.raw : b.raw};
}

// 2^y as 2^n 2^r with |r| <= 1/2, or e^y with |r| <= ln(2) / 2, for y clamped to where the result and its inverse are
// normal numbers; NaN stays NaN. `first` is added to 2^r - 1 before it is scaled.
//
// Float takes y in powers of two: the rounding of y = x / ln 2 costs |x| 2^-24 in relative precision, which sigmoid and
// tanh do not see: s' |x| is at most 0.23.
template <class T>
struct Exponential;

template <>
struct Exponential<float> {
    using V = VecTraits<float>::Raw;
    V r;
#if LF_VECTOR_BYTES == 64
    V n;
    LF_HD V scaled(V p) const { return (V)_mm512_scalef_ps((__m512)p, (__m512)n); }
#else
    VecTraits<float>::RawInt scale;  // 2^n
    LF_HD V scaled(V p) const { return p * (V)scale; }
#endif

    LF_HD explicit Exponential(V y) {
        const V hi = V{} + 125.0f;
#if LF_VECTOR_BYTES == 64
        y = (V)_mm512_min_ps((__m512)hi, (__m512)y);  // the second operand where one is NaN
        n = (V)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        r = y - n;
#else
        // 1.5 * 2^23 leaves the integer n in the low bits of `shifted`.
        const V lo = V{} - 125.0f, round = V{} + 12582912.0f;
        y = y > hi ? hi : y;
        y = y < lo ? lo : y;
        const V shifted = y + round;
        r = y - (shifted - round);
        scale = ((VecTraits<float>::RawInt)shifted << 23) + 0x3f800000;
#endif
    }

    // Estrin's order: the chain of operations, not their number, is what limits the kernels.
    LF_HD V fraction(float first) const {
        const V r2 = r * r;
        const V p01 = r * 0.693147182f + first, p23 = r * 0.0555035695f + 0.240226507f;
        const V p45 = r * 0.00133909786f + 0.00961808208f;
        const V p46 = r2 * 0.000154532623f + p45;
        return (p46 * r2 + p23) * r2 + p01;
    }

    static LF_HD Exponential of(V x, float factor) { return Exponential(x * (1.44269504f * factor)); }
};

// 1.5 * 2^52 does what 1.5 * 2^23 does above.
template <>
struct Exponential<double> {
    using V = VecTraits<double>::Raw;
    V r;
    VecTraits<double>::RawInt scale;
    LF_HD V scaled(V p) const { return p * (V)scale; }

    LF_HD explicit Exponential(V y) {
        const V lo = V{} - 708.0, hi = V{} + 708.0, round = V{} + 6755399441055744.0;
        y = y < lo ? lo : y;
        y = y > hi ? hi : y;
        const V shifted = y * 1.4426950408889634 + round;
        const V n = shifted - round;
        r = y - n * 0x1.62e42feep-1;
        r = r - n * 0x1.a39ef35793c76p-33;
        scale = ((VecTraits<double>::RawInt)shifted << 52) + 0x3ff0000000000000;
    }

    LF_HD V fraction(double first) const {
        V p = V{} + 1.0 / 6227020800.0;
        p = p * r + 1.0 / 479001600.0;
        p = p * r + 1.0 / 39916800.0;
        p = p * r + 1.0 / 3628800.0;
        p = p * r + 1.0 / 362880.0;
        p = p * r + 1.0 / 40320.0;
        p = p * r + 1.0 / 5040.0;
        p = p * r + 1.0 / 720.0;
        p = p * r + 1.0 / 120.0;
        p = p * r + 1.0 / 24.0;
        p = p * r + 1.0 / 6.0;
        p = p * r + 0.5;
        return ((p * r) * r + r) + first;
    }

    static LF_HD Exponential of(V x, double factor) { return Exponential(x * factor); }
};

template <class T>
LF_HD Vec<T> exp_minus(Vec<T> x) {
    const auto e = Exponential<T>::of(x.raw, -1);
    return {e.scaled(e.fraction(1))};
}

// 1 / x for x from 1 to 2^126. A Newton step takes the approximation's error of 2^-14 away, and is faster than
// dividing.
template <class T>
LF_HD Vec<T> inverse(Vec<T> x) {
#if LF_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        using V = typename VecTraits<T>::Raw;
        const V r = (V)_mm512_rcp14_ps((__m512)x.raw);
        const V error = 1 - x.raw * r;
        return {error * r + r};
    }
#endif
    return {1 / x.raw};
}

template <class V>
struct Sigmoid {
    V value, slope;
};

// s(x) and s'(x). The slope is e / (1 + e)^2 rather than s (1 - s), which would cancel for large x.
template <class T>
LF_HD Sigmoid<Vec<T>> sigmoid(Vec<T> x) {
    const Vec<T> e = exp_minus(x);
    const Vec<T> one = Vec<T>::broadcast(1);
    const Vec<T> s = inverse(one + e);
    return {s, e * s * s};
}

#if LF_VECTOR_BYTES == 64
// 2^(k/32)
alignas(64) static constexpr float exp2_table[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

// 2^y = scale 2^r with |r| <= 1/64, which spares the few units that multiply: a table in two registers gives 2^(k/32)
// of the fraction, and neither reducing nor scaling takes those units. Any y will do: scale is 0 from about -150 on and
// infinite from 128, r is 0 where y is infinite, and a NaN is kept in r.
LF_HD void exp2_parts(__m512 y, VecTraits<float>::Raw& r, VecTraits<float>::Raw& scale) {
    using V = VecTraits<float>::Raw;
    r = (V)_mm512_reduce_ps(y, 5 << 4);    // y less its nearest multiple of 1/32
    const __m512 shifted = y + 393216.0f;  // 1.5 * 2^18: sums have steps of 1/32
    const __m512 fraction =
        _mm512_permutex2var_ps(_mm512_load_ps(exp2_table), (__m512i)shifted, _mm512_load_ps(exp2_table + 16));
    scale = (V)_mm512_scalef_ps(fraction, y - (__m512)r);  // times 2^floor
}

// 2^r - 1 for |r| <= 1/64, within 2^r times half a rounding.
LF_HD VecTraits<float>::Raw exp2_fraction(VecTraits<float>::Raw r) { return (r * 0.240226507f + 0.693157344f) * r; }

// float with AVX-512, for the argument in powers of two. The slope's absolute error is that of s.
LF_HD Vec<float> sigmoid_argument(Vec<float> x) { return {x.raw * -1.44269504f}; }

LF_HD Sigmoid<Vec<float>> sigmoid_of(Vec<float> argument) {
    using V = VecTraits<float>::Raw;
    V r, scale;
    exp2_parts((__m512)argument.raw, r, scale);
    const V p = exp2_fraction(r) + 1.0f;
    const V s = 1.0f / (p * scale + 1.0f);
    return {{s}, {s - s * s}};
}

LF_HD Sigmoid<Vec<float>> sigmoid(Vec<float> x) { return sigmoid_of(sigmoid_argument(x)); }
#endif

// tanh(x) and its derivative, from e = exp(2x) and e - 1, which keeps its precision where x is small: the value is
// (e - 1) / (e + 1), the slope 4 e / (e + 1)^2.
template <class T>
LF_HD Sigmoid<Vec<T>> tangent(Vec<T> x) {
    using V = typename VecTraits<T>::Raw;
    const V lowest = V{} - (sizeof(T) == 4 ? 62 : 354);
    const auto exponential = Exponential<T>::of(x.raw < lowest ? lowest : x.raw, 2);
    const V scale = exponential.scaled(V{} + 1), p = exponential.fraction(0);
    const V e = p * scale + scale, e_minus_1 = p * scale + (scale - 1);
    const V q = inverse(Vec<T>{e_minus_1 + 2}).raw;
    return {{e_minus_1 * q}, {(4 * e * q) * q}};
}

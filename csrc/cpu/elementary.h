// Elementary functions of vectors beside the sigmoid, for formulas that are written over scalars and vectors alike.
// Textual header, included after vec.h.

// Two vectors side by side, for formulas whose chain of operations is longer than one vector can hide.
template <class T>
struct Pair {
    static constexpr int width = 2 * Vec<T>::width;
    Vec<T> a, b;

    static LF_HD Pair load(const T* p) { return {Vec<T>::load(p), Vec<T>::load(p + Vec<T>::width)}; }
    static LF_HD Pair broadcast(T x) { return {Vec<T>::broadcast(x), Vec<T>::broadcast(x)}; }
    LF_HD void store(T* p) const {
        a.store(p);
        b.store(p + Vec<T>::width);
    }

    friend LF_HD Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
    friend LF_HD Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
    friend LF_HD Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
    friend LF_HD Pair operator/(Pair x, Pair y) { return {x.a / y.a, x.b / y.b}; }
};

template <class V>
struct ScalarOf;
template <class T>
struct ScalarOf<Vec<T>> {
    using type = T;
};
template <class T>
struct ScalarOf<Pair<T>> {
    using type = T;
};

template <class V>
LF_HD V constant(double x) {
    return V::broadcast(static_cast<typename ScalarOf<V>::type>(x));
}

// The larger and the smaller one; b if either is NaN.
template <class T>
LF_HD Vec<T> larger(Vec<T> a, Vec<T> b) {
    return {a.raw > b.raw ? a.raw : b.raw};
}
template <class T>
LF_HD Vec<T> smaller(Vec<T> a, Vec<T> b) {
    return {a.raw < b.raw ? a.raw : b.raw};
}

#if LF_VECTOR_BYTES == 64
LF_HD Vec<float> larger(Vec<float> a, Vec<float> b) {
    return {(Vec<float>::Raw)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a.raw, (__m512)b.raw)};
}
LF_HD Vec<float> smaller(Vec<float> a, Vec<float> b) {
    return {(Vec<float>::Raw)_mm512_maskz_min_ps((__mmask16)-1, (__m512)a.raw, (__m512)b.raw)};
}
#endif

// Where a < b, `then`; elsewhere, and where one of them is NaN, `otherwise`.
template <class T>
LF_HD Vec<T> if_less(Vec<T> a, Vec<T> b, Vec<T> then, Vec<T> otherwise) {
    return {a.raw < b.raw ? then.raw : otherwise.raw};
}

// Questions to the first n lanes. A set bit of `lanes` is a lane.
LF_HD uint32_t lanes(VecTraits<float>::RawInt mask) {
#if LF_VECTOR_BYTES == 64
    return _mm512_movepi32_mask((__m512i)mask);
#elif LF_VECTOR_BYTES == 32
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < Vec<float>::width; ++i) bits |= (uint32_t)(mask[i] != 0) << i;
    return bits;
#endif
}
LF_HD uint32_t lanes(VecTraits<double>::RawInt mask) {
#if LF_VECTOR_BYTES == 64
    return _mm512_movepi64_mask((__m512i)mask);
#elif LF_VECTOR_BYTES == 32
    return (uint32_t)_mm256_movemask_pd((__m256d)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < Vec<double>::width; ++i) bits |= (uint32_t)(mask[i] != 0) << i;
    return bits;
#endif
}

// Whether one of them is less than `bound`.
template <class T>
LF_HD bool any_less(Vec<T> x, T bound, int64_t n) {
    const uint32_t first = (uint32_t)(((uint64_t)1 << n) - 1);
    return (lanes(x.raw < bound) & first) != 0;
}
// Whether all of them are 0 or 1.
template <class T>
LF_HD bool all_binary(Vec<T> x, int64_t n) {
    const uint32_t first = (uint32_t)(((uint64_t)1 << n) - 1);
    return (~lanes((x.raw == (T)0) | (x.raw == (T)1)) & first) == 0;
}

// exp(r) for |r| <= ln(2) / 2.
LF_HD VecTraits<double>::Raw exp_fraction(VecTraits<double>::Raw r) {
    using V = VecTraits<double>::Raw;
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
    return (p * r) * r + r + 1.0;
}

// 2^y for y <= 126.5, with 0 from about 2^-150 on, or 2^-127 without AVX-512, where the clamped exponent makes the
// scale exactly 0; NaN stays NaN.
LF_HD Vec<float> exp2_of(Vec<float> y) {
    using V = VecTraits<float>::Raw;
#if LF_VECTOR_BYTES == 64
    V r, scale;
    exp2_parts((__m512)y.raw, r, scale);
    return {(((r * 0.0555041087f + 0.240226507f) * r + 0.693147182f) * r) * scale + scale};
#else
    using I = VecTraits<float>::RawInt;
    const V lo = V{} - 127.0f, round = V{} + 12582912.0f;
    const V clamped = y.raw < lo ? lo : y.raw;
    const V shifted = clamped + round;
    const I scale = ((I)shifted << 23) + 0x3f800000;
    const V r = clamped - (shifted - round);
    const V r2 = r * r;
    const V p01 = r * 0.693147182f + 1.0f, p23 = r * 0.0555035695f + 0.240226507f;
    const V p45 = r * 0.00133909786f + 0.00961808208f;
    const V p46 = r2 * 0.000154532623f + p45;
    return {((p46 * r2 + p23) * r2 + p01) * (V)scale};
#endif
}

// 2^y for y <= 1022.5, with 0 from about 2^-1023 on.
LF_HD Vec<double> exp2_of(Vec<double> y) {
    using V = VecTraits<double>::Raw;
    using I = VecTraits<double>::RawInt;
    const V lo = V{} - 1023.0, round = V{} + 6755399441055744.0;
    const V clamped = y.raw < lo ? lo : y.raw;
    const V shifted = clamped + round;
    const I scale = ((I)shifted << 52) + 0x3ff0000000000000;
    return {exp_fraction((clamped - (shifted - round)) * 0.6931471805599453) * (V)scale};
}

// Bits of the format: of the mantissa, of 1, of sqrt(1/2), and of the number whose last place is 1.
template <class T>
struct Format;
template <>
struct Format<float> {
    static constexpr int32_t mantissa = 23, one = 0x3f800000, root_half = 0x3f3504f3, integer = 0x4b000000;
    static constexpr float bias = 8388608.0f + 127.0f;  // of an exponent field written into `integer`
    static constexpr int terms = 5;                     // of log's series
};
template <>
struct Format<double> {
    static constexpr int64_t mantissa = 52, one = 0x3ff0000000000000, root_half = 0x3fe6a09e667f3bcd,
                             integer = 0x4330000000000000;
    static constexpr double bias = 4503599627370496.0 + 1023.0;
    static constexpr int terms = 11;
};

// floor(log2 x) of x > 0; of subnormal numbers, that of the least normal one.
template <class T>
LF_HD Vec<T> exponent_of(Vec<T> x) {
    using V = typename VecTraits<T>::Raw;
    using I = typename VecTraits<T>::RawInt;
    const Vec<T> exponent = {(V)(((I)x.raw >> Format<T>::mantissa) | Format<T>::integer) - Format<T>::bias};
    return larger(constant<Vec<T>>(sizeof(T) == 4 ? -126 : -1022), exponent);
}

// log x of positive normal numbers; NaN stays NaN.
//
// x = 2^n (1 + z), and log(1 + z) = 2 atanh(w) with w = z / (2 + z): written as z - w (z - R), where z is exact and
// R = 2 w^2 (1/3 + w^2 / 5 + ...), only the smaller part is rounded. 1 + z is in [3/4, 3/2) where n and it have
// instructions, else in [sqrt(1/2), sqrt(2)).
#if LF_VECTOR_BYTES == 64
LF_HD void log_parts(Vec<float> x, Vec<float>::Raw& n, Vec<float>::Raw& z) {
    n = (Vec<float>::Raw)_mm512_getexp_ps((__m512)(x.raw * (4.0f / 3.0f)));
    z = (Vec<float>::Raw)_mm512_getmant_ps((__m512)x.raw, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src) - 1.0f;
}
LF_HD void log_parts(Vec<double> x, Vec<double>::Raw& n, Vec<double>::Raw& z) {
    n = (Vec<double>::Raw)_mm512_getexp_pd((__m512d)(x.raw * (4.0 / 3.0)));
    z = (Vec<double>::Raw)_mm512_getmant_pd((__m512d)x.raw, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src) - 1.0;
}
#else
template <class T>
LF_HD void log_parts(Vec<T> x, typename Vec<T>::Raw& n, typename Vec<T>::Raw& z) {
    using V = typename Vec<T>::Raw;
    using I = typename VecTraits<T>::RawInt;
    using F = Format<T>;
    const I bits = (I)x.raw + (F::one - F::root_half);
    n = (V)((bits >> F::mantissa) | F::integer) - F::bias;
    n = n + (x.raw - x.raw);  // NaN where x is
    z = (V)((bits & ((typename VecTraits<T>::Int(1) << F::mantissa) - 1)) + F::root_half) - T(1);
}
#endif
template <class T>
LF_HD Vec<T> log_of(Vec<T> x) {
    typename Vec<T>::Raw n, z;
    log_parts(x, n, z);
    const auto w = z / (z + T(2)), w2 = w * w;
    auto r = w2 * (T(2) / (2 * Format<T>::terms + 1)) + T(2) / (2 * Format<T>::terms - 1);
    for (int k = Format<T>::terms - 2; k > 0; --k) r = r * w2 + T(2) / (2 * k + 1);
    return {n * T(0.6931471805599453) + (z - w * (z - r * w2))};
}

#if LF_VECTOR_BYTES == 64
// Of 2^(k/32) the bits, less those that k adds to the exponent when an integer that ends with it is shifted there.
struct Exp2Bits {
    alignas(64) int32_t of[32];

    constexpr Exp2Bits() : of() {
        for (int k = 0; k < 32; ++k) of[k] = __builtin_bit_cast(int32_t, exp2_table[k]) - k * (1 << 18);
    }
};
static constexpr Exp2Bits exp2_bits;

#define LF_IN_STEP(begin, end) _Pragma("GCC unroll 16") for (int i = begin; i < (end); ++i)

// As exp2_parts of n, in step, for |y| <= 125. What looks after larger ones there keeps the units that add busy:
// vreduceps and vscalefps take both of them.
template <int n>
LF_HD void exp2_parts_of_calm(const VecTraits<float>::Raw* y, VecTraits<float>::Raw* r, VecTraits<float>::Raw* scale) {
    using V = VecTraits<float>::Raw;
    const V magic = V{} + 393216.0f;
    const __m512i* table = reinterpret_cast<const __m512i*>(exp2_bits.of);
    const __m512i low = _mm512_load_si512(table), high = _mm512_load_si512(table + 1);
    V shifted[n];
    LF_IN_STEP(0, n) shifted[i] = y[i] + magic;
    LF_IN_STEP(0, n) r[i] = y[i] - (shifted[i] - magic);
    LF_IN_STEP(0, n) {
        const __m512i bits = (__m512i)shifted[i];
        scale[i] = (V)_mm512_add_epi32(_mm512_permutex2var_epi32(low, bits, high), _mm512_slli_epi32(bits, 18));
    }
}
#endif

// 2^y for |y| <= 125.
template <class T>
LF_HD Vec<T> exp2_of_calm(Vec<T> y) {
#if LF_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        VecTraits<float>::Raw r, scale;
        exp2_parts_of_calm<1>(&y.raw, &r, &scale);
        return {exp2_fraction(r) * scale + scale};
    }
#endif
    return exp2_of(y);
}

// 1 / (1 + 2^y), of any y or of |y| <= 125: with `inverse`, for there is one slow unit that divides.
template <class T>
LF_HD Vec<T> logistic_of(Vec<T> y) {
    return inverse(constant<Vec<T>>(1) + exp2_of(smaller(constant<Vec<T>>(sizeof(T) == 4 ? 125 : 1000), y)));
}
template <class T>
LF_HD Vec<T> logistic_of_calm(Vec<T> y) {
#if LF_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        VecTraits<float>::Raw r, scale;
        exp2_parts_of_calm<1>(&y.raw, &r, &scale);  // not by exp2_of_calm, which would cost an addition more
        return inverse(Vec<T>{(exp2_fraction(r) + 1.0f) * scale + 1.0f});
    }
#endif
    return logistic_of(y);
}

// n arguments of logistic_of_calm and m of exp2_of_calm, in step: a chain of operations is long, and of such as follow
// one another the processor has few in hand.
template <int n, int m, class T>
LF_HD void in_step_of_calm(Vec<T>* logistic, Vec<T>* power) {
#if LF_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        constexpr int all = n + m;
        VecTraits<float>::Raw y[all], r[all], scale[all];
        LF_IN_STEP(0, n) y[i] = logistic[i].raw;
        LF_IN_STEP(n, all) y[i] = power[i - n].raw;
        exp2_parts_of_calm<all>(y, r, scale);
        LF_IN_STEP(0, all) y[i] = r[i] * 0.240226507f + 0.693157344f;
        LF_IN_STEP(0, n) y[i] = y[i] * r[i] + 1.0f;
        LF_IN_STEP(n, all) y[i] = y[i] * r[i];
        LF_IN_STEP(0, n) y[i] = y[i] * scale[i] + 1.0f;
        LF_IN_STEP(n, all) power[i - n].raw = y[i] * scale[i] + scale[i];
        LF_IN_STEP(0, n) r[i] = (VecTraits<float>::Raw)_mm512_rcp14_ps((__m512)y[i]);
        LF_IN_STEP(0, n) y[i] = 1.0f - y[i] * r[i];
        LF_IN_STEP(0, n) logistic[i].raw = y[i] * r[i] + r[i];
        return;
    }
#endif
    for (int i = 0; i < n; ++i) logistic[i] = logistic_of_calm(logistic[i]);
    for (int i = 0; i < m; ++i) power[i] = exp2_of_calm(power[i]);
}

template <class T>
LF_HD Pair<T> larger(Pair<T> x, Pair<T> y) {
    return {larger(x.a, y.a), larger(x.b, y.b)};
}
template <class T>
LF_HD Pair<T> smaller(Pair<T> x, Pair<T> y) {
    return {smaller(x.a, y.a), smaller(x.b, y.b)};
}
template <class T>
LF_HD Pair<T> if_less(Pair<T> x, Pair<T> y, Pair<T> then, Pair<T> otherwise) {
    return {if_less(x.a, y.a, then.a, otherwise.a), if_less(x.b, y.b, then.b, otherwise.b)};
}
template <class T>
LF_HD bool any_less(Pair<T> x, T bound, int64_t) {
    return any_less(smaller(x.a, x.b), bound, Vec<T>::width);
}
template <class T>
LF_HD bool all_binary(Pair<T> x, int64_t) {
    return all_binary(x.a, Vec<T>::width) && all_binary(x.b, Vec<T>::width);
}
template <class T>
LF_HD Pair<T> exp2_of(Pair<T> y) {
    return {exp2_of(y.a), exp2_of(y.b)};
}
template <class T>
LF_HD Pair<T> exponent_of(Pair<T> x) {
    return {exponent_of(x.a), exponent_of(x.b)};
}
template <class T>
LF_HD Pair<T> log_of(Pair<T> x) {
    return {log_of(x.a), log_of(x.b)};
}

// What windows need of Vec<T> beyond vec.h, which must have been included before: the order of numbers, powers of two,
// and the way between runs of memory and one lane a window. Textual header, included per instruction set as vec.h is.

// The intrinsics are those with a mask, of all lanes: GCC 12 warns of the other ones' undefined operand.

// A maximum, whichever operand where one is NaN.
template <class T>
LF_HD Vec<T> max_of(Vec<T> a, Vec<T> b) {
#if LF_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return {(typename Vec<T>::Raw)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a.raw, (__m512)b.raw)};
#endif
    return {a.raw > b.raw ? a.raw : b.raw};
}

// One byte for each lane.
template <class T>
struct BytesOf;
template <>
struct BytesOf<float> {
    typedef uint8_t type __attribute__((vector_size(LF_VECTOR_BYTES / 4)));
};
template <>
struct BytesOf<double> {
    typedef uint8_t type __attribute__((vector_size(LF_VECTOR_BYTES / 8)));
};
template <class T>
using Bytes = typename BytesOf<T>::type;

// The lanes in which a > b or a is NaN, and a choice by lanes.
template <class T>
LF_HD typename VecTraits<T>::RawInt above_or_nan(Vec<T> a, Vec<T> b) {
    return (a.raw > b.raw) | (a.raw != a.raw);
}
template <class T>
LF_HD Vec<T> chosen(typename VecTraits<T>::RawInt test, Vec<T> a, Vec<T> b) {
    return {test ? a.raw : b.raw};
}
template <class I>
LF_HD I chosen(I test, I a, I b) {
    return test ? a : b;
}

// To [-1, 1]; NaN stays NaN.
template <class T>
LF_HD Vec<T> clamp_unit(Vec<T> x) {
    const auto one = Vec<T>::broadcast(1).raw, minus_one = Vec<T>::broadcast(-1).raw;
#if LF_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        const __m512 below = _mm512_maskz_min_ps((__mmask16)-1, (__m512)one, (__m512)x.raw);
        return {(typename Vec<T>::Raw)_mm512_maskz_max_ps((__mmask16)-1, (__m512)minus_one, below)};
    }
#endif
    const auto below = x.raw > one ? one : x.raw;
    return {below < minus_one ? minus_one : below};
}

template <class T>
LF_HD Vec<T> reciprocal(Vec<T> x) {
    return Vec<T>::broadcast(1) / x;
}

// 2^x for x <= 0, and 0 where that would not be a normal number; NaN stays NaN. The rounding of x is the largest error.
#if LF_VECTOR_BYTES == 64
// As 2^(k / 16) 2^r with |r| <= 1/32, whose cubic is right to 1e-8. Adding 1.5 * 2^19 leaves k in the low bits: the
// table has the bits of 2^(i / 16), i the lowest four of them, less what the shift of k adds for i. Multiplications and
// their kin are what the processor has too few units for: there are half as many as in exp_minus.
LF_HD Vec<float> exp2_below_0(Vec<float> x) {
    using V = VecTraits<float>::Raw;
    using I = VecTraits<float>::RawInt;
    const I table = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                     0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    const V lo = V{} - 126.0f, round = V{} + 786432.0f;
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x.raw, (__m512)lo, _CMP_NLT_UQ);
    const V shifted = x.raw + round;
    const V r = x.raw - (shifted - round);
    const V p = ((r * 0.0555041087f + 0.240226507f) * r + 0.693147181f) * r + 1.0f;
    const I root = (I)_mm512_maskz_permutexvar_epi32((__mmask16)-1, (__m512i)shifted, (__m512i)table);
    const V scale = (V)(root + ((I)shifted << 19));
    return {(V)_mm512_maskz_mul_ps(normal, (__m512)p, (__m512)scale)};
}
#else
// As exp_minus in vec.h.
LF_HD Vec<float> exp2_below_0(Vec<float> x) {
    using V = VecTraits<float>::Raw;
    using I = VecTraits<float>::RawInt;
    const V lo = V{} - 126.0f, round = V{} + 12582912.0f;
    const V y = x.raw < lo ? lo : x.raw;
    const V shifted = y + round;
    const V r = y - (shifted - round);
    const V r2 = r * r;
    const V p01 = r * 0.693147182f + 1.0f, p23 = r * 0.0555035695f + 0.240226507f;
    const V p45 = r * 0.00133909786f + 0.00961808208f;
    const V p46 = r2 * 0.000154532623f + p45;
    const V p = (p46 * r2 + p23) * r2 + p01;
    const I scale = ((I)shifted << 23) + 0x3f800000;
    return {(V)((I)(p * (V)scale) & ~(x.raw < lo))};
}
#endif

LF_HD Vec<double> exp2_below_0(Vec<double> x) {
    using V = VecTraits<double>::Raw;
    using I = VecTraits<double>::RawInt;
    const V lo = V{} - 1022.0, round = V{} + 6755399441055744.0;
    const V y = x.raw < lo ? lo : x.raw;
    const V shifted = y + round;
    const V n = shifted - round;
    const V r = (y - n) * 0.69314718055994531;
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
    p = (p * r) * r + r;
    const I scale = ((I)shifted << 52) + 0x3ff0000000000000;
    return {(V)((I)((p + 1.0) * (V)scale) & ~(x.raw < lo))};
}

#if defined(__clang__)
#define LF_SHUFFLE(a, b, ...) \
    Vec<T> { __builtin_shufflevector(a.raw, b.raw, __VA_ARGS__) }
#else
#define LF_SHUFFLE(a, b, ...) \
    Vec<T> { __builtin_shuffle(a.raw, b.raw, (typename VecTraits<T>::RawInt){__VA_ARGS__}) }
#endif

// Every second of the elements of a and b in a row.
template <class T>
LF_HD void unzip(Vec<T> a, Vec<T> b, Vec<T>& even, Vec<T>& odd) {
    constexpr int width = Vec<T>::width;
    if constexpr (width == 2) {
        even = LF_SHUFFLE(a, b, 0, 2);
        odd = LF_SHUFFLE(a, b, 1, 3);
    } else if constexpr (width == 4) {
        even = LF_SHUFFLE(a, b, 0, 2, 4, 6);
        odd = LF_SHUFFLE(a, b, 1, 3, 5, 7);
    } else if constexpr (width == 8) {
        even = LF_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
        odd = LF_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
    } else {
        even = LF_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        odd = LF_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
}

// And back.
template <class T>
LF_HD void zip(Vec<T> even, Vec<T> odd, Vec<T>& a, Vec<T>& b) {
    constexpr int width = Vec<T>::width;
    if constexpr (width == 2) {
        a = LF_SHUFFLE(even, odd, 0, 2);
        b = LF_SHUFFLE(even, odd, 1, 3);
    } else if constexpr (width == 4) {
        a = LF_SHUFFLE(even, odd, 0, 4, 1, 5);
        b = LF_SHUFFLE(even, odd, 2, 6, 3, 7);
    } else if constexpr (width == 8) {
        a = LF_SHUFFLE(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
        b = LF_SHUFFLE(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
        a = LF_SHUFFLE(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        b = LF_SHUFFLE(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}
#undef LF_SHUFFLE

// K vectors, a power of two, that cover K * width elements in a row: afterwards vector j has the elements j, j + K,
// j + 2 K ... in its lanes.
template <int K, class T>
LF_HD void split(Vec<T>* v) {
    if constexpr (K > 1) {
        Vec<T> even[K / 2], odd[K / 2];
#pragma GCC unroll 8
        for (int i = 0; i < K / 2; ++i) unzip(v[2 * i], v[2 * i + 1], even[i], odd[i]);
        split<K / 2>(even);
        split<K / 2>(odd);
#pragma GCC unroll 8
        for (int i = 0; i < K / 2; ++i) {
            v[2 * i] = even[i];
            v[2 * i + 1] = odd[i];
        }
    }
}

// And back.
template <int K, class T>
LF_HD void merge(Vec<T>* v) {
    if constexpr (K > 1) {
        Vec<T> even[K / 2], odd[K / 2];
#pragma GCC unroll 8
        for (int i = 0; i < K / 2; ++i) {
            even[i] = v[2 * i];
            odd[i] = v[2 * i + 1];
        }
        merge<K / 2>(even);
        merge<K / 2>(odd);
#pragma GCC unroll 8
        for (int i = 0; i < K / 2; ++i) zip(even[i], odd[i], v[2 * i], v[2 * i + 1]);
    }
}

// Over all lanes, in all lanes: the largest.
template <class T>
LF_HD Vec<T> max_over_lanes(Vec<T> v) {
    for (int lanes = Vec<T>::width; lanes > 1; lanes /= 2) {
        Vec<T> even, odd;
        unzip(v, v, even, odd);
        v = max_of(even, odd);
    }
    return v;
}

template <class T>
LF_HD Vec<T> add_pairs(Vec<T> a, Vec<T> b) {
    Vec<T> even, odd;
    unzip(a, b, even, odd);
    return even + odd;
}

// And the sums of four vectors.
template <class T>
LF_HD void sum_over_lanes(Vec<T>& a, Vec<T>& b, Vec<T>& c, Vec<T>& d) {
    Vec<T> ab = add_pairs(a, b), cd = add_pairs(c, d);
    int first_of_c = 0;
    if constexpr (Vec<T>::width > 2) {
        ab = add_pairs(ab, cd);
        for (int lanes = Vec<T>::width; lanes > 4; lanes /= 2) ab = add_pairs(ab, ab);
        cd = ab;
        first_of_c = 2;
    }
    a = Vec<T>::broadcast(ab.raw[0]);
    b = Vec<T>::broadcast(ab.raw[1]);
    c = Vec<T>::broadcast(cd.raw[first_of_c]);
    d = Vec<T>::broadcast(cd.raw[first_of_c + 1]);
}

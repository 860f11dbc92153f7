// Vec<T>: one hardware vector of float or double, with what the sigmoid needs. Textual header, included per instruction
// set inside its namespace (isa.h); LF_VECTOR_BYTES is the width.

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

template <class T>
struct Vec {
    using Raw = typename VecTraits<T>::Raw;
    using Unaligned = typename VecTraits<T>::Unaligned;
    static constexpr int width = LF_VECTOR_BYTES / sizeof(T);
    Raw raw;

    static LF_HD Vec load(const T* p) { return {(Raw) * reinterpret_cast<const Unaligned*>(p)}; }
    static LF_HD Vec broadcast(T x) { return {x - Raw{}}; }
    LF_HD void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = raw; }

    // The first n < width elements; the others are read as 0 and not written.
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

    friend LF_HD Vec operator+(Vec a, Vec b) { return {a.raw + b.raw}; }
    friend LF_HD Vec operator-(Vec a, Vec b) { return {a.raw - b.raw}; }
    friend LF_HD Vec operator*(Vec a, Vec b) { return {a.raw * b.raw}; }
    friend LF_HD Vec operator/(Vec a, Vec b) { return {a.raw / b.raw}; }

    LF_HD T sum() const {
        T total = raw[0];
        for (int i = 1; i < width; ++i) total += raw[i];
        return total;
    }
};

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

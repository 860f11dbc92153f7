// What the passes over Tagger's pixels share. Textual header, included per instruction set inside its namespace, after
// vec.h, elementary.h and ../math/tagger.h; tagger_plan.h is included outside.

static const int64_t kKept = 64;  // groups whose intermediate results are kept

// Groups whose number the compiler knows, else `fixed` is 0: their intermediate results then stay in registers.
static const int kFew = 4;
template <int fixed>
static constexpr int64_t kept = fixed ? fixed : kKept;
#define LF_EACH_GROUP(k, groups) _Pragma("GCC unroll 4") for (int64_t k = 0; k < (fixed ? fixed : groups); ++k)

// n pixels; `whole` says that n is the width of V.
template <bool whole, class V, class T>
static LF_HD V read(const T* from, int64_t n) {
    if constexpr (whole)
        return V::load(from);
    else
        return V::load(from, n);
}

template <class T>
struct TaggerView {
    const T* data;
    int64_t row, group;

    explicit LF_HD TaggerView(const TaggerInput& t) : data(static_cast<const T*>(t.data)), row(t.row), group(t.group) {}

    // Of n pixels from (row r, group k, pixel d) on.
    template <class V, bool whole>
    LF_HD V load(int64_t r, int64_t k, int64_t d, int64_t n) const {
        return read<whole, V>(data + r * row + k * group + d, n);
    }
};

template <bool whole, class V, class T>
static LF_HD void write(V value, T* to, int64_t n) {
    if constexpr (whole)
        value.store(to);
    else
        value.store(to, n);
}

template <class T>
static LF_HD GaussianScalar<T> gaussian_scalar(const void* variance, int64_t seed) {
    const double v = static_cast<const T*>(variance)[seed];
    const double two_pi_v = 6.283185307179586 * v;
    return {T(-0.7213475204444817 / v), T(1 / sqrt(two_pi_v)),          T(1 / v),
            T(0.5 * log(two_pi_v)),     T(sizeof(T) == 4 ? 126 : 1022), T(sizeof(T) == 4 ? 0x1p126 : 0x1p1022)};
}

template <class V, class T>
static LF_HD GaussianScalar<V> broadcast(const GaussianScalar<T>& s) {
    return {V::broadcast(s.scale),  V::broadcast(s.norm), V::broadcast(s.precision),
            V::broadcast(s.offset), V::broadcast(s.most), V::broadcast(s.limit)};
}

template <class T>
static LF_HD BernoulliScalar<T> bernoulli_scalar(const void* flip_prob, int64_t seed) {
    const T b = static_cast<const T*>(flip_prob)[seed];
    return {b, 1 - 2 * b};
}

template <class V, class T>
static LF_HD BernoulliScalar<V> broadcast(const BernoulliScalar<T>& s) {
    return {V::broadcast(s.flip), V::broadcast(s.keep)};
}

// Each pass is a struct: start(seed), pixels<V, whole>(row, pixel, count), and for sums end_row() and end_item(item).
// One without `pairs` takes vectors one by one. `dense` says that all tensors are packed: the compiler then knows that
// an element lies at the same place of each, and counts once for all of them.
template <class T, bool dense = false>
struct TaggerPass {
    static constexpr bool pairs = true;
    TaggerView<T> x, z, m;
    const void* scalar;
    int64_t groups, width;

    LF_HD TaggerPass(const TaggerInputs& in, const TaggerShape& s)
        : x(in.x), z(in.z), m(in.m), scalar(in.scalar), groups(s.groups), width(s.pixels) {}
    LF_HD int64_t packed(int64_t r, int64_t k, int64_t d) const { return (r * groups + k) * width + d; }
    // Of n pixels from (row r, group k, pixel d) on, and of a tensor without groups.
    template <class V, bool whole>
    LF_HD V load(const TaggerView<T>& from, int64_t r, int64_t k, int64_t d, int64_t n) const {
        return dense ? read<whole, V>(from.data + packed(r, k, d), n) : from.template load<V, whole>(r, k, d, n);
    }
    template <class V, bool whole>
    LF_HD V load(const TaggerView<T>& from, int64_t r, int64_t d, int64_t n) const {
        return read<whole, V>(from.data + r * (dense ? width : from.row) + d, n);
    }
    LF_HD void start(int64_t) {}
    LF_HD void end_row() {}
    LF_HD void end_item(int64_t) {}
};

// Sum over an item: over a row's whole vectors in T, over the rest in double.
template <class T>
struct ItemSum {
    double* partials;
    double total;
    Vec<T> row;

    explicit LF_HD ItemSum(double* partials) : partials(partials), total(0), row(Vec<T>::broadcast(0)) {}
    template <bool whole>
    LF_HD void add(Vec<T> terms, int64_t n) {
        if (whole) {
            row = row + terms;
        } else {
            for (int64_t i = 0; i < n; ++i) total += terms.raw[i];
        }
    }
    template <bool whole>
    LF_HD void add(Pair<T> terms, int64_t) {
        row = row + (terms.a + terms.b);
    }
    LF_HD void end_row() {
        total += row.sum();
        row = Vec<T>::broadcast(0);
    }
    LF_HD void end_item(int64_t item) {
        partials[item] = total;
        total = 0;
    }
};

// pixels<V, whole> of a pass whose powers are relative to their largest (math/tagger.h): seldom wanted.
template <class V, bool whole, class Pass>
static __attribute__((noinline, cold)) Pass scaled_pixels(Pass pass, int64_t r, int64_t d, int64_t n) {
    pass.template pixels<V, whole, true>(r, d, n);
    return pass;
}

// d, of which the compiler knows nothing: else it would count up a pointer into each group of each tensor, of which
// there are more than registers.
LF_HD int64_t opaque(int64_t d) {
#if defined(__GNUC__)
    __asm__("" : "+r"(d));
#endif
    return d;
}

template <class T, class Pass>
static LF_HD void over_items(Pass pass, const TaggerShape& s, int64_t begin, int64_t end) {
    const TaggerPlan plan(s);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % plan.blocks * TaggerPlan::kBlock;
        const int64_t chunk = item / plan.blocks % plan.chunks, seed = item / plan.blocks / plan.chunks;
        const int64_t last = s.pixels - first < TaggerPlan::kBlock ? s.pixels : first + TaggerPlan::kBlock;
        const int64_t row = chunk * plan.rows_per_item;
        const int64_t row_end = plan.rows - row < plan.rows_per_item ? plan.rows : row + plan.rows_per_item;
        pass.start(seed);
        for (int64_t r = seed * plan.rows + row; r < seed * plan.rows + row_end; ++r) {
            int64_t d = first;
            if constexpr (Pass::pairs) {
                for (; d + Pair<T>::width <= last; d += Pair<T>::width)
                    pass.template pixels<Pair<T>, true>(r, opaque(d), Pair<T>::width);
            }
            for (; d + Vec<T>::width <= last; d += Vec<T>::width)
                pass.template pixels<Vec<T>, true>(r, opaque(d), Vec<T>::width);
            if (d < last) pass.template pixels<Vec<T>, false>(r, d, last - d);
            pass.end_row();
        }
        pass.end_item(item);
    }
}

static LF_HD bool packed(const TaggerInput& t, const TaggerShape& s) {
    return t.group == s.pixels && t.row == s.groups * s.pixels;
}
static LF_HD bool packed_rows(const TaggerInput& t, const TaggerShape& s) { return t.row == s.pixels; }
static LF_HD bool packed(const TaggerInputs& in, const TaggerShape& s) {
    return packed_rows(in.x, s) && packed(in.z, s) && packed(in.m, s);
}

// over_items of a pass, with the number of groups known where it is kFew; and of one that gains by that, where tensors
// are then dense this as well.
#define LF_BY_GROUPS(T, Pass, ...)                                    \
    {                                                                 \
        if (s.groups == kFew)                                         \
            over_items<T>(Pass<T, kFew>(__VA_ARGS__), s, begin, end); \
        else                                                          \
            over_items<T>(Pass<T, 0>(__VA_ARGS__), s, begin, end);    \
    }
#define LF_BY_PLACE(T, Pass, dense, ...)                                     \
    {                                                                        \
        if (s.groups == kFew && (dense))                                     \
            over_items<T>(Pass<T, kFew, true>(__VA_ARGS__), s, begin, end);  \
        else if (s.groups == kFew)                                           \
            over_items<T>(Pass<T, kFew, false>(__VA_ARGS__), s, begin, end); \
        else                                                                 \
            over_items<T>(Pass<T, 0, false>(__VA_ARGS__), s, begin, end);    \
    }

// CPU kernels of the op `what_where`; contract in ../what_where.h.
//
// A block is one vector of neighbouring outputs. In most ways a lane is a window (and a channel, where channels are
// innermost), whose elements, `taps`, come from memory in one of three ways:
//
//   K > 1   inner = 1 and kernel_w = K = 2, 4, 8 or 16: rows are loaded as whole vectors and split among the lanes
//   K = 1   the lanes' elements are neighbours in memory, as in channels-last tensors
//   K = 0   each lane by itself: other kernels, and blocks that end within a channel's or a tensor's last vector
//
// Where a row of a window is a whole vector or several, soft pooling takes one window after the other instead, and a
// lane is a column.
//
// Floor in float32, per element of z: pooling k x k moves 4 + 12 / k^2 bytes forward and 8 + 12 / k^2 backward, and
// takes an exponential each way. Unpooling writes what it moves forward; backward it reads four elements of a window.
// Hard, with where in bytes: 4 + 5 / k^2 bytes each, and backward of unpooling one element of a window.
#undef LF_THIS_FILE
#define LF_THIS_FILE "what_where.cpp"

#ifndef LADDERFAST_CPU_WHAT_WHERE_PLAN
#define LADDERFAST_CPU_WHAT_WHERE_PLAN

#include "../what_where.h"
#include "isa.h"

namespace ladderfast::cpu {

static const int kMostTaps = 16 * 16;
static const int kMostLanes = 64 / sizeof(float);

// How a shape is cut; compiled once, before any instruction set is chosen. A band is a row of windows.
struct WindowPlan {
    int64_t down, across;  // windows in a channel
    int64_t band, plane;   // outputs in a row of windows, and in all of `outer`'s element
    int64_t bands, bands_per_item, items;

    explicit WindowPlan(const WindowShape& s) {
        down = s.height / s.kernel_h;
        across = s.width / s.kernel_w;
        band = across * s.inner;
        plane = down * band;
        bands = plane > 0 ? s.outer * down : 0;
        // About 4096 elements, and a vector of outputs at least.
        const int64_t outputs = 4096 / (s.kernel_h * s.kernel_w);
        bands_per_item = band > 0 ? ((outputs < kMostLanes ? kMostLanes : outputs) + band - 1) / band : 1;
        items = (bands + bands_per_item - 1) / bands_per_item;
    }
};

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "lanes.h"
#include "../math/what_where.h"

// An output and where its window begins.
struct Cursor {
    int64_t outer, down, across, channel;

    Cursor(const WindowPlan& plan, const WindowShape& s, int64_t output) {
        outer = output / plan.plane;
        down = output % plan.plane / plan.band;
        across = output % plan.band / s.inner;
        channel = output % s.inner;
    }

    int64_t origin(const WindowShape& s) const {
        return ((outer * s.height + down * s.kernel_h) * s.width + across * s.kernel_w) * s.inner + channel;
    }

    void advance(const WindowPlan& plan, const WindowShape& s, int64_t count) {
        if (s.inner == 1) {
            across += count;
        } else {
            channel += count;
            while (channel >= s.inner) {
                channel -= s.inner;
                ++across;
            }
        }
        while (across >= plan.across) {
            across -= plan.across;
            if (++down == plan.down) {
                down = 0;
                ++outer;
            }
        }
    }
};

// Walks over the vectors that make the first rows of windows, where bands are whole vectors (inner = 1).
template <class T>
struct VectorWalk {
    int64_t in_band, band_end, band, down, next_band, next_plane, last;

    VectorWalk(const WindowPlan& plan, const WindowShape& s, int64_t output) {
        const Cursor cursor(plan, s, output);
        in_band = cursor.across * s.kernel_w;
        band_end = plan.across * s.kernel_w;
        band = cursor.origin(s) - in_band;
        down = cursor.down;
        last = plan.down - 1;
        next_band = s.kernel_h * s.width;
        next_plane = (s.height - last * s.kernel_h) * s.width;
    }

    LF_HD int64_t next() {
        const int64_t origin = band + in_band;
        in_band += Vec<T>::width;
        if (in_band == band_end) {
            in_band = 0;
            band += down == last ? next_plane : next_band;
            down = down == last ? 0 : down + 1;
        }
        return origin;
    }
};

// One vector of outputs, of which the first `count` exist.
template <class T>
struct Block {
    static constexpr int width = Vec<T>::width;
    WindowShape s;
    int64_t output, count;
    int64_t plane, outer, in_plane;
    // K = 0: of each lane's window; K = 1: of the first; K > 1: of each of the K vectors that make a row.
    int64_t origin[kMostLanes];

    LF_HD Block(const WindowShape& shape, const WindowPlan& plan, int64_t first, int64_t lanes)
        : s(shape), output(first), count(lanes), plane(plan.plane) {
        outer = first / plane;
        in_plane = first - outer * plane;
    }

    LF_HD void advance(int64_t to) {
        in_plane += to - output;
        output = to;
        while (in_plane >= plane) {
            in_plane -= plane;
            ++outer;
        }
    }

    // Element 0 of the lanes' x in `where`; those of y lie a plane behind. Only if one_plane().
    int64_t where() const { return 2 * outer * plane + in_plane; }
    bool one_plane() const { return in_plane + width <= plane; }

    // The index of x in `where`, lane by lane.
    LF_HD void where_of_lanes(int64_t* index) const {
        int64_t o = outer, k = in_plane;
        for (int64_t lane = 0; lane < count; ++lane) {
            index[lane] = 2 * o * plane + k;
            if (++k == plane) {
                k = 0;
                ++o;
            }
        }
    }
};

template <class T>
static LF_HD Vec<T> load_output(const T* from, const Block<T>& b) {
    return b.count == b.width ? Vec<T>::load(from + b.output) : Vec<T>::load(from + b.output, b.count);
}

template <class T>
static LF_HD void store_output(Vec<T> value, T* to, const Block<T>& b) {
    if (b.count == b.width)
        value.store(to + b.output);
    else
        value.store(to + b.output, b.count);
}

template <class T>
static LF_HD void load_where(const T* where, const Block<T>& b, Vec<T>& x, Vec<T>& y) {
    if (b.one_plane() && b.count == b.width) {
        x = Vec<T>::load(where + b.where());
        y = Vec<T>::load(where + b.where() + b.plane);
    } else {
        alignas(64) T xs[b.width] = {}, ys[b.width] = {};
        int64_t index[b.width];
        b.where_of_lanes(index);
        for (int64_t lane = 0; lane < b.count; ++lane) {
            xs[lane] = where[index[lane]];
            ys[lane] = where[index[lane] + b.plane];
        }
        x = Vec<T>::load(xs);
        y = Vec<T>::load(ys);
    }
}

template <class T>
static LF_HD void store_where(Vec<T> x, Vec<T> y, T* where, const Block<T>& b) {
    if (b.one_plane() && b.count == b.width) {
        x.store(where + b.where());
        y.store(where + b.where() + b.plane);
    } else {
        alignas(64) T xs[b.width], ys[b.width];
        int64_t index[b.width];
        b.where_of_lanes(index);
        x.store(xs);
        y.store(ys);
        for (int64_t lane = 0; lane < b.count; ++lane) {
            where[index[lane]] = xs[lane];
            where[index[lane] + b.plane] = ys[lane];
        }
    }
}

// Row `row` of the block's windows, one vector a column.
template <int K, class T>
static LF_HD void load_row(const T* z, const Block<T>& b, int64_t row, int64_t columns, Vec<T>* taps) {
    using V = Vec<T>;
    const T* from = z + row * b.s.width * b.s.inner;
    if constexpr (K > 1) {
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) taps[j] = V::load(from + b.origin[j]);
        split<K>(taps);
    } else if constexpr (K == 1) {
        for (int64_t j = 0; j < columns; ++j) taps[j] = V::load(from + b.origin[0] + j * b.s.inner);
    } else {
        for (int64_t j = 0; j < columns; ++j) {
            alignas(64) T lanes[V::width];
            for (int lane = 0; lane < V::width; ++lane) lanes[lane] = from[b.origin[lane] + j * b.s.inner];
            taps[j] = V::load(lanes);
        }
    }
}

template <int K, class T>
static LF_HD void store_row(Vec<T>* taps, T* z, const Block<T>& b, int64_t row, int64_t columns) {
    T* to = z + row * b.s.width * b.s.inner;
    if constexpr (K > 1) {
        merge<K>(taps);
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) taps[j].store(to + b.origin[j]);
    } else if constexpr (K == 1) {
        for (int64_t j = 0; j < columns; ++j) taps[j].store(to + b.origin[0] + j * b.s.inner);
    } else {
        for (int64_t j = 0; j < columns; ++j) {
            alignas(64) T lanes[Vec<T>::width];
            taps[j].store(lanes);
            for (int64_t lane = 0; lane < b.count; ++lane) to[b.origin[lane] + j * b.s.inner] = lanes[lane];
        }
    }
}

// The coordinates of a window's rows or columns.
template <class T>
struct Axis {
    Vec<T> at[16];

    explicit Axis(int64_t size) {
        for (int64_t k = 0; k < size; ++k)
            at[k] = Vec<T>::broadcast((T)(2 * k - (size - 1)) / (T)(size > 1 ? size - 1 : 1));
    }
};

// The largest element of each window, and the window in `taps`.
template <int K, int kSize, class T>
static LF_HD Vec<T> load_windows(const T* z, const Block<T>& b, Vec<T>* taps) {
    const int64_t rows = kSize ? kSize : b.s.kernel_h, columns = kSize ? kSize : K > 1 ? K : b.s.kernel_w;
    Vec<T> most;
    for (int64_t i = 0; i < rows; ++i) {
        load_row<K>(z, b, i, columns, taps + i * columns);
        if (i == 0) most = taps[0];
        for (int64_t j = 0; j < columns; ++j) most = max_of(most, taps[i * columns + j]);
    }
    return most;
}

// A window whose rows are R vectors.
template <class T, int R>
struct Columns {
    using V = Vec<T>;
    const T* first;
    const WindowShape& s;
    const Axis<T>& y;
    V x[R];

    LF_HD Columns(const T* from, const WindowShape& shape, const Axis<T>& rows) : first(from), s(shape), y(rows) {
        constexpr int columns = R * V::width;
        for (int r = 0; r < R; ++r)
            for (int lane = 0; lane < V::width; ++lane)
                x[r].raw[lane] = (T)(2 * (r * V::width + lane) - (columns - 1)) / (T)(columns - 1);
    }

    LF_HD V at(int64_t i, int r) const { return V::load(first + i * s.width + r * V::width); }
};

// Windows that are pooled side by side: what one has to wait for, the other fills.
static const int kAbreast = 2;

// Every lane has the result. e[w] keeps the exponentials of window w, if they are wanted.
template <bool keep, class T, int R>
static LF_HD void pool_columns(const Columns<T, R> (&window)[kAbreast], Vec<T> scale, Vec<T> (*e)[16 * R],
                               SoftPooled<Vec<T>> (&pooled)[kAbreast]) {
    using V = Vec<T>;
    const WindowShape& s = window[0].s;
    V most[kAbreast];
    for (int w = 0; w < kAbreast; ++w) most[w] = window[w].at(0, 0);
    for (int64_t i = 0; i < s.kernel_h; ++i)
        for (int r = 0; r < R; ++r)
            for (int w = 0; w < kAbreast; ++w) most[w] = max_of(most[w], window[w].at(i, r));
    for (int w = 0; w < kAbreast; ++w) most[w] = max_over_lanes(most[w]);
    // x and y change places: what is added up first are columns.
    const V zero = V::broadcast(0);
    const SoftSums<V> none = {zero, zero, zero, zero};
    SoftSums<V> sums[kAbreast], column[kAbreast][R];
    for (int w = 0; w < kAbreast; ++w) {
        sums[w] = none;
        for (int r = 0; r < R; ++r) column[w][r] = none;
    }
    for (int64_t i = 0; i < s.kernel_h; ++i)
        for (int r = 0; r < R; ++r)
            for (int w = 0; w < kAbreast; ++w) {
                const V z = window[w].at(i, r), power = exp2_below_0((z - most[w]) * scale);
                if (keep) e[w][i * R + r] = power;
                soft_pool_add(z, power, window[w].y.at[i], column[w][r]);
            }
    for (int w = 0; w < kAbreast; ++w) {
        for (int r = 0; r < R; ++r) soft_pool_add_row(column[w][r], window[w].x[r], sums[w]);
        sum_over_lanes(sums[w].total, sums[w].z, sums[w].y, sums[w].x);
        pooled[w] = soft_pool_finish(SoftSums<V>{sums[w].total, sums[w].z, sums[w].y, sums[w].x});
    }
}

// Each pass is a struct with its pointers and a function for one block. kSize is 2 where the window is 2 x 2, so that
// it stays in registers, and else 0.
template <class T>
struct PoolForward {
    static constexpr bool kColumns = true;
    const T* z;
    T *what, *where;
    T sharpness;  // beta log2(e)
    Axis<T> x, y;

    template <int K, int kSize>
    LF_HD void run(const Block<T>& b) const {
        using V = Vec<T>;
        const int64_t rows = kSize ? kSize : b.s.kernel_h, columns = kSize ? kSize : K > 1 ? K : b.s.kernel_w;
        V taps[kSize ? kSize * kSize : kMostTaps];
        const V most = load_windows<K, kSize>(z, b, taps), scale = V::broadcast(sharpness), zero = V::broadcast(0);
        SoftSums<V> sums = {zero, zero, zero, zero};
        for (int64_t i = 0; i < rows; ++i) {
            SoftSums<V> row = {zero, zero, zero, zero};
            for (int64_t j = 0; j < columns; ++j) {
                const V z_ = taps[i * columns + j];
                soft_pool_add(z_, exp2_below_0((z_ - most) * scale), x.at[j], row);
            }
            soft_pool_add_row(row, y.at[i], sums);
        }
        const SoftPooled<V> pooled = soft_pool_finish(sums);
        store_output(pooled.what, what, b);
        store_where(pooled.x, pooled.y, where, b);
    }

    template <int R>
    LF_HD void run_columns(const Block<T>& b) const {
        using V = Vec<T>;
        alignas(64) T whats[V::width], xs[V::width], ys[V::width];
        for (int lane = 0; lane < V::width; lane += kAbreast) {
            const Columns<T, R> windows[kAbreast] = {{z + b.origin[lane * R], b.s, y},
                                                     {z + b.origin[(lane + 1) * R], b.s, y}};
            SoftPooled<V> pooled[kAbreast];
            pool_columns<false, T, R>(windows, V::broadcast(sharpness), nullptr, pooled);
            for (int w = 0; w < kAbreast; ++w) {
                whats[lane + w] = pooled[w].what.raw[0];
                xs[lane + w] = pooled[w].x.raw[0];
                ys[lane + w] = pooled[w].y.raw[0];
            }
        }
        store_output(V::load(whats), what, b);
        store_where(V::load(xs), V::load(ys), where, b);
    }
};

template <class T>
struct PoolBackward {
    static constexpr bool kColumns = true;
    const T *grad_what, *grad_where, *z;
    T* grad_z;
    T sharpness, beta;
    Axis<T> x, y;

    template <int K, int kSize>
    LF_HD void run(const Block<T>& b) const {
        using V = Vec<T>;
        const int64_t rows = kSize ? kSize : b.s.kernel_h, columns = kSize ? kSize : K > 1 ? K : b.s.kernel_w;
        V taps[kSize ? kSize * kSize : kMostTaps], e[kSize ? kSize * kSize : kMostTaps];
        const V most = load_windows<K, kSize>(z, b, taps), scale = V::broadcast(sharpness), zero = V::broadcast(0);
        SoftSums<V> sums = {zero, zero, zero, zero};
        for (int64_t i = 0; i < rows; ++i) {
            SoftSums<V> row = {zero, zero, zero, zero};
            for (int64_t j = 0; j < columns; ++j) {
                const int64_t tap = i * columns + j;
                e[tap] = exp2_below_0((taps[tap] - most) * scale);
                soft_pool_add(taps[tap], e[tap], x.at[j], row);
            }
            soft_pool_add_row(row, y.at[i], sums);
        }
        V of_x, of_y;
        load_where(grad_where, b, of_x, of_y);
        const SoftGradient<V> g =
            soft_pool_gradients(soft_pool_finish(sums), load_output(grad_what, b), of_x, of_y, V::broadcast(beta));
        V of_column[kSize ? kSize : 16];
        for (int64_t j = 0; j < columns; ++j) of_column[j] = soft_pool_column(g, x.at[j]);
        for (int64_t i = 0; i < rows; ++i) {
            const V of_row = soft_pool_row(g, y.at[i]);
            V* grad = taps + i * columns;
            for (int64_t j = 0; j < columns; ++j)
                grad[j] = soft_pool_gradient(g, grad[j], e[i * columns + j], of_column[j], of_row);
            store_row<K>(grad, grad_z, b, i, columns);
        }
    }

    template <int R>
    LF_HD void run_columns(const Block<T>& b) const {
        using V = Vec<T>;
        V of_x, of_y;
        load_where(grad_where, b, of_x, of_y);
        alignas(64) T xs[V::width], ys[V::width];
        of_x.store(xs);
        of_y.store(ys);
        for (int lane = 0; lane < V::width; lane += kAbreast) {
            V e[kAbreast][16 * R];
            const Columns<T, R> windows[kAbreast] = {{z + b.origin[lane * R], b.s, y},
                                                     {z + b.origin[(lane + 1) * R], b.s, y}};
            SoftPooled<V> pooled[kAbreast];
            pool_columns<true, T, R>(windows, V::broadcast(sharpness), e, pooled);
            for (int w = 0; w < kAbreast; ++w) {
                const Columns<T, R>& window = windows[w];
                const SoftGradient<V> g =
                    soft_pool_gradients(pooled[w], V::broadcast(grad_what[b.output + lane + w]),
                                        V::broadcast(xs[lane + w]), V::broadcast(ys[lane + w]), V::broadcast(beta));
                V of_column[R];
                for (int r = 0; r < R; ++r) of_column[r] = soft_pool_column(g, window.x[r]);
                T* to = grad_z + b.origin[(lane + w) * R];
                for (int64_t i = 0; i < b.s.kernel_h; ++i) {
                    const V of_row = soft_pool_row(g, y.at[i]);
                    for (int r = 0; r < R; ++r)
                        soft_pool_gradient(g, window.at(i, r), e[w][i * R + r], of_column[r], of_row)
                            .store(to + i * b.s.width + r * V::width);
                }
            }
        }
    }
};

// Where the lanes place their what along one axis: the first of two neighbours and the share of the second.
template <class T>
struct Place {
    using Int = typename VecTraits<T>::RawInt;
    Int first;
    Vec<T> share;

    // 32 eps: see `_placement` in the reference.
    LF_HD Place(Vec<T> p, int64_t size) {
        const Vec<T> half = Vec<T>::broadcast((T)(size - 1) / 2);
        const T tolerance = sizeof(T) == 4 ? (T)0x1p-18 : (T)0x1p-47;
        const Vec<T> at = unpool_place(p, half);
        const Int last = Int{} + (typename VecTraits<T>::Int)(size > 2 ? size - 2 : 0);
        first = __builtin_convertvector(at.raw + tolerance, Int);  // NaN becomes some integer
        first = first < 0 ? Int{} : first;
        first = first > last ? last : first;
        share = {at.raw - __builtin_convertvector(first, typename Vec<T>::Raw)};
    }
};

// (size - 1) / 2 where p lies within [-1, 1], and else 0.
template <class T>
static LF_HD Vec<T> slope_of(Vec<T> p, int64_t size) {
    const auto half = Vec<T>::broadcast((T)(size - 1) / 2).raw, zero = Vec<T>::broadcast(0).raw;
    const auto low = p.raw >= -1 ? half : zero;
    return {p.raw <= 1 ? low : zero};
}

template <class T>
struct UnpoolForward {
    static constexpr bool kColumns = false;
    const T *what, *where;
    T* z;

    template <int K, int kSize>
    LF_HD void run(const Block<T>& b) const {
        using V = Vec<T>;
        V x, y;
        const V m = load_output(what, b);
        load_where(where, b, x, y);
        const Place<T> across(x, b.s.kernel_w), down(y, b.s.kernel_h);
        const Corners<V> corners = unpool_forward(m, across.share, down.share);
        if constexpr (kSize == 2) {
            V top[2] = {corners.top_left, corners.top_right}, bottom[2] = {corners.bottom_left, corners.bottom_right};
            store_row<K>(top, z, b, 0, 2);
            store_row<K>(bottom, z, b, 1, 2);
        } else {
            // In a window of one row or column the first neighbour, written last, is the one.
            const int64_t right = b.s.kernel_w > 1 ? b.s.inner : 0;
            const int64_t below = b.s.kernel_h > 1 ? b.s.width * b.s.inner : 0;
            alignas(64) T values[4][V::width];
            corners.top_left.store(values[0]);
            corners.top_right.store(values[1]);
            corners.bottom_left.store(values[2]);
            corners.bottom_right.store(values[3]);
            for (int64_t lane = 0; lane < b.count; ++lane) {
                T* to = z + b.origin[lane] + (down.first[lane] * b.s.width + across.first[lane]) * b.s.inner;
                to[right + below] = values[3][lane];
                to[below] = values[2][lane];
                to[right] = values[1][lane];
                to[0] = values[0][lane];
            }
        }
    }
};

template <class T>
struct UnpoolBackward {
    static constexpr bool kColumns = false;
    const T *grad_z, *what, *where;
    T *grad_what, *grad_where;

    template <int K, int kSize>
    LF_HD void run(const Block<T>& b) const {
        using V = Vec<T>;
        V x, y;
        const V m = load_output(what, b);
        load_where(where, b, x, y);
        const Place<T> across(x, b.s.kernel_w), down(y, b.s.kernel_h);
        Corners<V> grad;
        if constexpr (kSize == 2) {
            V top[2], bottom[2];
            load_row<K>(grad_z, b, 0, 2, top);
            load_row<K>(grad_z, b, 1, 2, bottom);
            grad = {top[0], top[1], bottom[0], bottom[1]};
        } else {
            const int64_t right = b.s.kernel_w > 1 ? b.s.inner : 0;
            const int64_t below = b.s.kernel_h > 1 ? b.s.width * b.s.inner : 0;
            alignas(64) T values[4][V::width];
            for (int lane = 0; lane < V::width; ++lane) {
                const T* from =
                    grad_z + b.origin[lane] + (down.first[lane] * b.s.width + across.first[lane]) * b.s.inner;
                values[0][lane] = from[0];
                values[1][lane] = from[right];
                values[2][lane] = from[below];
                values[3][lane] = from[right + below];
            }
            grad = {V::load(values[0]), V::load(values[1]), V::load(values[2]), V::load(values[3])};
        }
        V of_what, of_x, of_y;
        unpool_backward(grad, m, across.share, down.share, slope_of(x, b.s.kernel_w), slope_of(y, b.s.kernel_h),
                        of_what, of_x, of_y);
        store_output(of_what, grad_what, b);
        store_where(of_x, of_y, grad_where, b);
    }
};

// Where hard pooling found its maxima: the elements' numbers in their windows, lane by lane.
template <class T>
using Taps = typename VecTraits<T>::RawInt;

template <class T>
static LF_HD void store_taps(Taps<T> taps, uint8_t* where, const Block<T>& b) {
    const Bytes<T> bytes = __builtin_convertvector(taps, Bytes<T>);
    if (b.count == b.width)
        memcpy(where + b.output, &bytes, sizeof(bytes));
    else
        for (int64_t lane = 0; lane < b.count; ++lane) where[b.output + lane] = bytes[lane];
}

template <class T>
static LF_HD Taps<T> load_taps(const uint8_t* where, const Block<T>& b) {
    Bytes<T> bytes = {};
    if (b.count == b.width)
        memcpy(&bytes, where + b.output, sizeof(bytes));
    else
        for (int64_t lane = 0; lane < b.count; ++lane) bytes[lane] = where[b.output + lane];
    return __builtin_convertvector(bytes, Taps<T>);
}

template <class T>
struct MaxPoolForward {
    static constexpr bool kColumns = false;
    const T* z;
    T* what;
    uint8_t* where;

    template <int K, int kSize>
    LF_HD void run(const Block<T>& b) const {
        using V = Vec<T>;
        const int64_t rows = kSize ? kSize : b.s.kernel_h, columns = kSize ? kSize : K > 1 ? K : b.s.kernel_w;
        V row[kSize ? kSize : 16], most = V::broadcast((T)-__builtin_inf());
        Taps<T> most_tap = {};
        for (int64_t i = 0; i < rows; ++i) {
            load_row<K>(z, b, i, columns, row);
            for (int64_t j = 0; j < columns; ++j)
                max_pool_add(row[j], Taps<T>{} + (typename VecTraits<T>::Int)(i * columns + j), most, most_tap);
        }
        store_output(most, what, b);
        store_taps(most_tap, where, b);
    }
};

// Hard unpooling by vectors, for windows of 2 x 2.
template <class T>
struct MaxUnpoolForward {
    static constexpr bool kColumns = false;
    const T* what;
    const uint8_t* where;
    T* z;

    template <int K, int kSize>
    LF_HD void run(const Block<T>& b) const {
        using V = Vec<T>;
        const V m = load_output(what, b);
        const Taps<T> taps = load_taps(where, b);
        for (int i = 0; i < 2; ++i) {
            V row[2];
            for (int j = 0; j < 2; ++j) row[j] = chosen(taps == 2 * i + j, m, V::broadcast(0));
            store_row<K>(row, z, b, i, 2);
        }
    }
};

template <class T>
struct MaxUnpoolBackward {
    static constexpr bool kColumns = false;
    const T* grad_z;
    const uint8_t* where;
    T* grad_what;

    template <int K, int kSize>
    LF_HD void run(const Block<T>& b) const {
        using V = Vec<T>;
        const Taps<T> taps = load_taps(where, b);
        V grad = V::broadcast(0);
        for (int i = 0; i < 2; ++i) {
            V row[2];
            load_row<K>(grad_z, b, i, 2, row);
            for (int j = 0; j < 2; ++j) grad = chosen(taps == 2 * i + j, row[j], grad);
        }
        store_output(grad, grad_what, b);
    }
};

// How far the element that `where` names lies behind its window's first one, in elements of one channel; -1 if it is
// none of the window's. `start` is the position of the first one.
template <class W>
struct Offsets;

template <>
struct Offsets<uint8_t> {
    int64_t offset[256];

    explicit Offsets(const WindowShape& s) {
        for (int64_t tap = 0; tap < 256; ++tap)
            offset[tap] = tap < s.kernel_h * s.kernel_w ? tap / s.kernel_w * s.width + tap % s.kernel_w : -1;
    }
    LF_HD int64_t of(uint8_t tap, int64_t) const { return offset[tap]; }
};

template <>
struct Offsets<int64_t> {
    int64_t kernel_h, kernel_w, width;

    explicit Offsets(const WindowShape& s) : kernel_h(s.kernel_h), kernel_w(s.kernel_w), width(s.width) {}
    LF_HD bool in_row(int64_t column) const { return (uint64_t)column < (uint64_t)kernel_w; }
    LF_HD int64_t of(int64_t position, int64_t start) const {
        const int64_t offset = position - start;
        // In the first rows and the last ones, no division, and no branch that nobody could foresee.
        int64_t below = offset, above = offset - (kernel_h - 1) * width;
        bool inside = in_row(below) | in_row(above);
        for (int64_t rows = kernel_h - 2; rows > 0; rows -= 2) {
            below -= width;
            above += width;
            inside |= in_row(below) | in_row(above);
        }
        return inside ? offset : -1;
    }
};

// Whether a row of a window is whole vectors, and pooling makes columns lanes.
template <int K, class T>
constexpr bool by_columns() {
    return K >= 8 && K >= Vec<T>::width;
}

// The outputs [first, end), at least a vector of them, in blocks. The last one overlaps the one before it, whose values
// it writes again. The pass comes by value, so that stores cannot change it in the compiler's eyes.
template <int K, int kSize, class T, class Pass>
static __attribute__((noinline)) void run_split(const Pass pass, const WindowShape s, const WindowPlan plan,
                                                int64_t first, int64_t end) {
    constexpr int width = Vec<T>::width;
    Block<T> b(s, plan, first, width);
    VectorWalk<T> walk(plan, s, first);
    for (int64_t at = first;;) {
        for (int j = 0; j < K; ++j) b.origin[j] = walk.next();
        if constexpr (Pass::kColumns && by_columns<K, T>())
            pass.template run_columns<K / width>(b);
        else
            pass.template run<K, kSize>(b);
        at += width;
        if (at >= end) break;
        if (at + width > end) {
            at = end - width;
            b = Block<T>(s, plan, at, width);
            walk = VectorWalk<T>(plan, s, at);
        } else {
            b.advance(at);
        }
    }
}

// The same in the other two ways, K = 1 only if `adjacent`.
template <bool adjacent, int kSize, class T, class Pass>
static __attribute__((noinline)) void run_lanes(const Pass pass, const WindowShape s, const WindowPlan plan,
                                                int64_t first, int64_t end) {
    constexpr int width = Vec<T>::width;
    Cursor cursor(plan, s, first);
    for (int64_t at = first; at < end;) {
        const int64_t count = end - at < width ? end - at : width;
        Block<T> b(s, plan, at, count);
        if (adjacent && count == width && cursor.channel + width <= s.inner) {
            b.origin[0] = cursor.origin(s);
            if constexpr (adjacent) pass.template run<1, kSize>(b);
            cursor.advance(plan, s, width);
        } else {
            for (int64_t lane = 0; lane < width; ++lane) {
                b.origin[lane] = lane < count ? cursor.origin(s) : b.origin[0];
                cursor.advance(plan, s, 1);
            }
            pass.template run<0, kSize>(b);
        }
        at += width;
        if (at < end && at + width > end && end - first >= width) {
            at = end - width;
            cursor = Cursor(plan, s, at);
        }
    }
}

// Where bands are whole vectors; those of one window's row may be several.
template <class T>
static bool splits(const WindowShape& s, const WindowPlan& plan) {
    const int64_t k = s.kernel_w;
    return s.inner == 1 && (k == 2 || k == 4 || k == 8 || k == 16) && plan.band * k % Vec<T>::width == 0;
}

template <class T, class Pass>
static void run_pool(const Pass& pass, const WindowShape& s, const WindowPlan& plan, int64_t first, int64_t end) {
    const bool square = s.kernel_h == 2 && s.kernel_w == 2;
    if (!splits<T>(s, plan) || end - first < Vec<T>::width)
        square ? run_lanes<true, 2, T>(pass, s, plan, first, end) : run_lanes<true, 0, T>(pass, s, plan, first, end);
    else if (s.kernel_w == 2)
        square ? run_split<2, 2, T>(pass, s, plan, first, end) : run_split<2, 0, T>(pass, s, plan, first, end);
    else if (s.kernel_w == 4)
        run_split<4, 0, T>(pass, s, plan, first, end);
    else if (s.kernel_w == 8)
        run_split<8, 0, T>(pass, s, plan, first, end);
    else
        run_split<16, 0, T>(pass, s, plan, first, end);
}

// Windows of 2 x 2.
template <class T, class Pass>
static void run_square(const Pass& pass, const WindowShape& s, const WindowPlan& plan, int64_t first, int64_t end) {
    if (splits<T>(s, plan) && end - first >= Vec<T>::width)
        run_split<2, 2, T>(pass, s, plan, first, end);
    else
        run_lanes<true, 2, T>(pass, s, plan, first, end);
}

template <class T, class Pass>
static void run_unpool(const Pass& pass, const WindowShape& s, const WindowPlan& plan, int64_t first, int64_t end) {
    if (s.kernel_h == 2 && s.kernel_w == 2)
        run_square<T>(pass, s, plan, first, end);
    else
        run_lanes<false, 0, T>(pass, s, plan, first, end);
}

struct Bands {
    int64_t first, end;  // and of their outputs
    int64_t output, output_end;

    Bands(const WindowPlan& plan, int64_t item) {
        first = item * plan.bands_per_item;
        end = first + plan.bands_per_item < plan.bands ? first + plan.bands_per_item : plan.bands;
        output = first * plan.band;
        output_end = end * plan.band;
    }
};

// Zeros for the columns and rows of z that fill no window.
template <class T>
static void zero_rest(T* z, const WindowShape& s, const WindowPlan& plan, const Bands& bands) {
    const int64_t used = plan.across * s.kernel_w * s.inner, row = s.width * s.inner;
    for (int64_t band = bands.first; band < bands.end; ++band) {
        T* top = z + (band / plan.down * s.height + band % plan.down * s.kernel_h) * row;
        if (used < row)
            for (int64_t i = 0; i < s.kernel_h; ++i) memset(top + i * row + used, 0, (row - used) * sizeof(T));
        if (band % plan.down == plan.down - 1)
            memset(top + s.kernel_h * row, 0, (s.height - plan.down * s.kernel_h) * row * sizeof(T));
    }
}

// Zeros for all rows of the bands, and those below the last one.
template <class T>
static void zero_bands(T* z, const WindowShape& s, const WindowPlan& plan, const Bands& bands) {
    const int64_t row = s.width * s.inner, rest = s.height - plan.down * s.kernel_h;
    for (int64_t band = bands.first; band < bands.end; ++band) {
        const int64_t down = band % plan.down;
        T* top = z + (band / plan.down * s.height + down * s.kernel_h) * row;
        memset(top, 0, (s.kernel_h + (down == plan.down - 1 ? rest : 0)) * row * sizeof(T));
    }
}

static const double kLog2E = 1.4426950408889634;

template <class T>
static void pool_forward(const T* z, T* what, T* where, double beta, const WindowShape& s, int64_t begin, int64_t end) {
    const WindowPlan plan(s);
    const PoolForward<T> pass = {z, what, where, (T)(beta * kLog2E), Axis<T>(s.kernel_w), Axis<T>(s.kernel_h)};
    for (int64_t item = begin; item < end; ++item) {
        const Bands bands(plan, item);
        run_pool<T>(pass, s, plan, bands.output, bands.output_end);
    }
}

template <class T>
static void pool_backward(const T* grad_what, const T* grad_where, const T* z, T* grad_z, double beta,
                          const WindowShape& s, int64_t begin, int64_t end) {
    const WindowPlan plan(s);
    const PoolBackward<T> pass = {grad_what,           grad_where,         z, grad_z, (T)(beta * kLog2E), (T)beta,
                                  Axis<T>(s.kernel_w), Axis<T>(s.kernel_h)};
    for (int64_t item = begin; item < end; ++item) {
        const Bands bands(plan, item);
        run_pool<T>(pass, s, plan, bands.output, bands.output_end);
        zero_rest(grad_z, s, plan, bands);
    }
}

template <class T>
static void unpool_forward(const T* what, const T* where, T* z, const WindowShape& s, int64_t begin, int64_t end) {
    const WindowPlan plan(s);
    const UnpoolForward<T> pass = {what, where, z};
    for (int64_t item = begin; item < end; ++item) {
        const Bands bands(plan, item);
        const int64_t band = s.kernel_h * s.width * s.inner;
        if (s.kernel_h != 2 || s.kernel_w != 2)
            memset(z + bands.first * band, 0, (bands.end - bands.first) * band * sizeof(T));
        run_unpool<T>(pass, s, plan, bands.output, bands.output_end);
    }
}

template <class T>
static void unpool_backward(const T* grad_z, const T* what, const T* where, T* grad_what, T* grad_where,
                            const WindowShape& s, int64_t begin, int64_t end) {
    const WindowPlan plan(s);
    const UnpoolBackward<T> pass = {grad_z, what, where, grad_what, grad_where};
    for (int64_t item = begin; item < end; ++item) {
        const Bands bands(plan, item);
        run_unpool<T>(pass, s, plan, bands.output, bands.output_end);
    }
}

// Numbers of elements in windows, which lie in the last bytes of the bands' part of `where`, become positions. Those to
// come are not written over: n outputs leave 7 n bytes before them.
static void expand_taps(int64_t* where, const WindowShape& s, const WindowPlan& plan, const Bands& bands,
                        const Offsets<uint8_t>& offsets) {
    const uint8_t* taps = (const uint8_t*)(where + bands.output_end) - (bands.output_end - bands.output);
    int64_t* to = where + bands.output;
    for (int64_t band = bands.first; band < bands.end; ++band) {
        int64_t start = band % plan.down * s.kernel_h * s.width;
        for (int64_t across = 0; across < plan.across; ++across, start += s.kernel_w)
            for (int64_t channel = 0; channel < s.inner; ++channel) *to++ = start + offsets.of(*taps++, start);
    }
}

template <class T, class W>
static void max_pool_forward(const T* z, T* what, W* where, const WindowShape& s, int64_t begin, int64_t end) {
    const WindowPlan plan(s);
    const Offsets<uint8_t> offsets(s);
    for (int64_t item = begin; item < end; ++item) {
        const Bands bands(plan, item);
        if constexpr (sizeof(W) == 1) {
            run_pool<T>(MaxPoolForward<T>{z, what, where}, s, plan, bands.output, bands.output_end);
        } else {
            uint8_t* taps = (uint8_t*)(where + bands.output_end) - bands.output_end;
            run_pool<T>(MaxPoolForward<T>{z, what, taps}, s, plan, bands.output, bands.output_end);
            expand_taps(where, s, plan, bands, offsets);
        }
    }
}

// What at where in z, or what lies there back into `what`: one output after the other.
template <bool put, class What, class Z, class W>
static void move_each(What* what, const W* where, Z* z, const WindowShape& s, const WindowPlan& plan,
                      const Bands& bands, const Offsets<W>& offsets) {
    int64_t output = bands.output;
    for (int64_t band = bands.first; band < bands.end; ++band) {
        const int64_t outer = band / plan.down, row = band % plan.down * s.kernel_h;
        Z* at = z + (outer * s.height + row) * s.width * s.inner;
        int64_t start = row * s.width;
        for (int64_t across = 0; across < plan.across; ++across, start += s.kernel_w, at += s.kernel_w * s.inner)
            for (int64_t channel = 0; channel < s.inner; ++channel, ++output) {
                const int64_t offset = offsets.of(where[output], start);
                if constexpr (!put)
                    what[output] = offset >= 0 ? at[offset * s.inner + channel] : 0;
                else if (offset >= 0)
                    at[offset * s.inner + channel] = what[output];
            }
    }
}

template <class W>
static bool by_vectors(const WindowShape& s) {
    return sizeof(W) == 1 && s.kernel_h == 2 && s.kernel_w == 2;
}

template <class T, class W>
static void max_unpool_forward(const T* what, const W* where, T* z, const WindowShape& s, int64_t begin, int64_t end) {
    const WindowPlan plan(s);
    const Offsets<W> offsets(s);
    for (int64_t item = begin; item < end; ++item) {
        const Bands bands(plan, item);
        if (by_vectors<W>(s)) {
            const MaxUnpoolForward<T> pass = {what, (const uint8_t*)where, z};
            zero_rest(z, s, plan, bands);
            run_square<T>(pass, s, plan, bands.output, bands.output_end);
        } else {
            zero_bands(z, s, plan, bands);
            move_each<true>(what, where, z, s, plan, bands, offsets);
        }
    }
}

template <class T, class W>
static void max_unpool_backward(const T* grad_z, const W* where, T* grad_what, const WindowShape& s, int64_t begin,
                                int64_t end) {
    const WindowPlan plan(s);
    const Offsets<W> offsets(s);
    for (int64_t item = begin; item < end; ++item) {
        const Bands bands(plan, item);
        if (by_vectors<W>(s)) {
            const MaxUnpoolBackward<T> pass = {grad_z, (const uint8_t*)where, grad_what};
            run_square<T>(pass, s, plan, bands.output, bands.output_end);
        } else {
            move_each<false>(grad_what, where, grad_z, s, plan, bands, offsets);
        }
    }
}

#define LF_WINDOW_INSTANCES(T, suffix)                                                                                 \
    static void pool_forward_##suffix(const T* z, T* what, T* where, double beta, const WindowShape& s, int64_t begin, \
                                      int64_t end) {                                                                   \
        pool_forward(z, what, where, beta, s, begin, end);                                                             \
    }                                                                                                                  \
    static void pool_backward_##suffix(const T* grad_what, const T* grad_where, const T* z, T* grad_z, double beta,    \
                                       const WindowShape& s, int64_t begin, int64_t end) {                             \
        pool_backward(grad_what, grad_where, z, grad_z, beta, s, begin, end);                                          \
    }                                                                                                                  \
    static void unpool_forward_##suffix(const T* what, const T* where, T* z, const WindowShape& s, int64_t begin,      \
                                        int64_t end) {                                                                 \
        unpool_forward(what, where, z, s, begin, end);                                                                 \
    }                                                                                                                  \
    static void unpool_backward_##suffix(const T* grad_z, const T* what, const T* where, T* grad_what, T* grad_where,  \
                                         const WindowShape& s, int64_t begin, int64_t end) {                           \
        unpool_backward(grad_z, what, where, grad_what, grad_where, s, begin, end);                                    \
    }

LF_WINDOW_INSTANCES(float, f32)
LF_WINDOW_INSTANCES(double, f64)
#undef LF_WINDOW_INSTANCES

#define LF_MAX_INSTANCES(T, W, suffix)                                                                                \
    static void max_pool_forward_##suffix(const T* z, T* what, W* where, const WindowShape& s, int64_t begin,         \
                                          int64_t end) {                                                              \
        max_pool_forward(z, what, where, s, begin, end);                                                              \
    }                                                                                                                 \
    static void max_unpool_forward_##suffix(const T* what, const W* where, T* z, const WindowShape& s, int64_t begin, \
                                            int64_t end) {                                                            \
        max_unpool_forward(what, where, z, s, begin, end);                                                            \
    }                                                                                                                 \
    static void max_unpool_backward_##suffix(const T* grad_z, const W* where, T* grad_what, const WindowShape& s,     \
                                             int64_t begin, int64_t end) {                                            \
        max_unpool_backward(grad_z, where, grad_what, s, begin, end);                                                 \
    }

LF_MAX_INSTANCES(float, uint8_t, f32_places)
LF_MAX_INSTANCES(double, uint8_t, f64_places)
LF_MAX_INSTANCES(float, int64_t, f32_positions)
LF_MAX_INSTANCES(double, int64_t, f64_positions)
#undef LF_MAX_INSTANCES

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t windows_items(const WindowShape& s) { return WindowPlan(s).items; }

#define LF_WINDOW_DISPATCH(T, suffix)                                                                          \
    template <>                                                                                                \
    void soft_pool_forward<T>(const T* z, T* what, T* where, double beta, const WindowShape& s, int64_t begin, \
                              int64_t end) {                                                                   \
        static const auto kernel = LF_SELECT(pool_forward_##suffix);                                           \
        kernel(z, what, where, beta, s, begin, end);                                                           \
    }                                                                                                          \
    template <>                                                                                                \
    void soft_pool_backward<T>(const T* grad_what, const T* grad_where, const T* z, T* grad_z, double beta,    \
                               const WindowShape& s, int64_t begin, int64_t end) {                             \
        static const auto kernel = LF_SELECT(pool_backward_##suffix);                                          \
        kernel(grad_what, grad_where, z, grad_z, beta, s, begin, end);                                         \
    }                                                                                                          \
    template <>                                                                                                \
    void soft_unpool_forward<T>(const T* what, const T* where, T* z, const WindowShape& s, int64_t begin,      \
                                int64_t end) {                                                                 \
        static const auto kernel = LF_SELECT(unpool_forward_##suffix);                                         \
        kernel(what, where, z, s, begin, end);                                                                 \
    }                                                                                                          \
    template <>                                                                                                \
    void soft_unpool_backward<T>(const T* grad_z, const T* what, const T* where, T* grad_what, T* grad_where,  \
                                 const WindowShape& s, int64_t begin, int64_t end) {                           \
        static const auto kernel = LF_SELECT(unpool_backward_##suffix);                                        \
        kernel(grad_z, what, where, grad_what, grad_where, s, begin, end);                                     \
    }

LF_WINDOW_DISPATCH(float, f32)
LF_WINDOW_DISPATCH(double, f64)
#undef LF_WINDOW_DISPATCH

#define LF_MAX_DISPATCH(T, W, suffix)                                                                                  \
    template <>                                                                                                        \
    void max_pool_forward<T, W>(const T* z, T* what, W* where, const WindowShape& s, int64_t begin, int64_t end) {     \
        static const auto kernel = LF_SELECT(max_pool_forward_##suffix);                                               \
        kernel(z, what, where, s, begin, end);                                                                         \
    }                                                                                                                  \
    template <>                                                                                                        \
    void max_unpool_forward<T, W>(const T* what, const W* where, T* z, const WindowShape& s, int64_t begin,            \
                                  int64_t end) {                                                                       \
        static const auto kernel = LF_SELECT(max_unpool_forward_##suffix);                                             \
        kernel(what, where, z, s, begin, end);                                                                         \
    }                                                                                                                  \
    template <>                                                                                                        \
    void max_unpool_backward<T, W>(const T* grad_z, const W* where, T* grad_what, const WindowShape& s, int64_t begin, \
                                   int64_t end) {                                                                      \
        static const auto kernel = LF_SELECT(max_unpool_backward_##suffix);                                            \
        kernel(grad_z, where, grad_what, s, begin, end);                                                               \
    }

LF_MAX_DISPATCH(float, uint8_t, f32_places)
LF_MAX_DISPATCH(double, uint8_t, f64_places)
LF_MAX_DISPATCH(float, int64_t, f32_positions)
LF_MAX_DISPATCH(double, int64_t, f64_positions)
#undef LF_MAX_DISPATCH

}  // namespace ladderfast::cpu
#endif

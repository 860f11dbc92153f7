// Means and biased variances by part and channel. Textual header, included per instruction set after vec.h; plan.h is
// included outside.
//
// Each item leaves, for every column (or for its channel), the mean relative to the item's first value and the sum of
// squares about that mean: a large mean costs no digits, and a constant column has variance 0 exactly. Partial results
// are merged in double, in the order of the slots (Chan, Golub and LeVeque, 1983).
//
// S is what x has in memory: T, or BFloat16 for float.

static const int64_t kMomentTile = 1024;  // elements of runs that are read twice while the first-level cache has them

// The columns of n vectors; with `partial` n is 1 and only so many lanes are read and written.
template <int n, bool partial, class S, class T>
LF_HD void column_moments(const S* x, int64_t stride, int64_t rows, T* mean, T* squares, int64_t lanes) {
    using V = Vec<T>;
    const V inverse = V::broadcast((T)1 / (T)rows);
    V first[n], sum[n], about[n], square[n];
    for (int j = 0; j < n; ++j) {
        first[j] = partial ? V::load(x, lanes) : V::load(x + j * V::width);
        sum[j] = about[j] = square[j] = V::broadcast(0);
    }
    for (int64_t r = 1; r < rows; ++r) {
        const S* row = x + r * stride;
        for (int j = 0; j < n; ++j) {
            __builtin_prefetch(row + (n + j) * V::width);
            sum[j] = sum[j] + ((partial ? V::load(row, lanes) : V::load(row + j * V::width)) - first[j]);
        }
    }
    for (int j = 0; j < n; ++j) sum[j] = sum[j] * inverse;
    for (int64_t r = 0; r < rows; ++r) {
        const S* row = x + r * stride;
        for (int j = 0; j < n; ++j) {
            const V d = ((partial ? V::load(row, lanes) : V::load(row + j * V::width)) - first[j]) - sum[j];
            about[j] = about[j] + d;
            square[j] = square[j] + d * d;
        }
    }
    // What the rounding of the mean has left.
    for (int j = 0; j < n; ++j) {
        const V rest = about[j] * inverse;
        const V m = sum[j] + rest, s = square[j] - about[j] * rest;
        if (partial) {
            m.store(mean, lanes);
            s.store(squares, lanes);
        } else {
            m.store(mean + j * V::width);
            s.store(squares + j * V::width);
        }
    }
}

// The same of `count` columns.
template <class S, class T>
LF_HD void partial_column_moments(const S* x, int64_t stride, int64_t rows, int64_t count, T* mean, T* squares) {
    using V = Vec<T>;
    int64_t c = 0;
    for (; c + 4 * V::width <= count; c += 4 * V::width)
        column_moments<4, false>(x + c, stride, rows, mean + c, squares + c, 0);
    const int64_t vectors = (count - c) / V::width;
    if (vectors == 3) column_moments<3, false>(x + c, stride, rows, mean + c, squares + c, 0);
    if (vectors == 2) column_moments<2, false>(x + c, stride, rows, mean + c, squares + c, 0);
    if (vectors == 1) column_moments<1, false>(x + c, stride, rows, mean + c, squares + c, 0);
    c += vectors * V::width;
    if (c < count) column_moments<1, true>(x + c, stride, rows, mean + c, squares + c, count - c);
}

// Mean and sum of squared deviations of a growing number of elements.
struct Moments {
    double n, mean, m2;

    LF_HD void merge(double count, double other_mean, double other_m2) {
        if (count == 0) return;
        const double total = n + count, delta = other_mean - mean;
        m2 += other_m2 + delta * delta * (n * count / total);
        mean += delta * (count / total);
        n = total;
    }
};

// Adds `rows` rows of `count` columns, at most `most`.
template <int most, class T>
static inline void add_column_moments(Moments* all, const T* x, int64_t stride, int64_t rows, int64_t count) {
    T mean[most], squares[most];
    for (int64_t row = 0; row < rows; row += kMaxRows) {
        const T* from = x + row * stride;
        const int64_t n = min_of(kMaxRows, rows - row);
        partial_column_moments(from, stride, n, count, mean, squares);
        for (int64_t c = 0; c < count; ++c) all[c].merge((double)n, (double)from[c] + (double)mean[c], squares[c]);
    }
}

// `rows` runs of `count` elements, relative to `first`: their mean and sum of squares.
template <class S, class T>
LF_HD void run_moments(const S* x, int64_t stride, int64_t rows, int64_t count, T first, double& mean,
                       double& squares) {
    using V = Vec<T>;
    const V shift = V::broadcast(first);
    V sum = V::broadcast(0);
    T sum_rest = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const S* row = x + r * stride;
        int64_t c = 0;
        for (; c + V::width <= count; c += V::width) {
            __builtin_prefetch(row + c + kMomentTile);
            sum = sum + (V::load(row + c) - shift);
        }
        for (; c < count; ++c) sum_rest += row[c] - first;
    }
    const T n = (T)(rows * count), m = (sum.sum() + sum_rest) / n;
    const V center = V::broadcast(m);
    V about = V::broadcast(0), square = about;
    T about_rest = 0, square_rest = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const S* row = x + r * stride;
        int64_t c = 0;
        for (; c + V::width <= count; c += V::width) {
            const V d = (V::load(row + c) - shift) - center;
            about = about + d;
            square = square + d * d;
        }
        for (; c < count; ++c) {
            const T d = (row[c] - first) - m;
            about_rest += d;
            square_rest += d * d;
        }
    }
    const double rest = (double)about.sum() + about_rest;
    mean = m + rest / n;
    squares = (double)square.sum() + square_rest - rest * rest / n;
}

// Elements of T of scratch for the partial results of all items.
static inline int64_t moments_workspace(const PartsPlan& plan) {
    return plan.seeds * plan.parts * plan.slots() * 2 * plan.slot_width();
}

// Items [begin, end) of plan.items().
template <class S, class T>
static inline void partial_moments(const S* x, T* workspace, const PartsPlan& plan, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const PartsItem item(plan, i);
        T* out = workspace + item.slot * 2 * plan.slot_width();
        if (plan.columns) {
            const S* from = x + item.offset + item.at(plan, item.row);
            // A short last row is left to the merge.
            const int64_t rows = min_of(item.row_end, plan.full_rows(item.part)) - item.row;
            if (rows <= 0) continue;
            T* mean = out + item.first;
            partial_column_moments(from, plan.width, rows, item.count, mean, mean + plan.width);
        } else {
            if (item.row == item.row_end) continue;
            const S* from = x + item.offset + item.at(plan, item.row);
            const T first = from[0];
            const int64_t rows = item.row_end - item.row;
            const int64_t tile_rows = item.count >= kMomentTile ? 1 : kMomentTile / item.count;
            double n = 0, mean = 0, squares = 0;
            for (int64_t r = 0; r < rows; r += tile_rows)
                for (int64_t c = 0; c < item.count; c += kMomentTile) {
                    const int64_t height = min_of(tile_rows, rows - r), count = min_of(kMomentTile, item.count - c);
                    double tile_mean, tile_squares;
                    run_moments(from + r * plan.width + c, plan.width, height, count, first, tile_mean, tile_squares);
                    const double added = (double)(height * count), share = added / (n + added);
                    const double delta = tile_mean - mean;
                    squares += tile_squares + delta * delta * n * share;
                    mean += delta * share;
                    n += added;
                }
            out[item.channel] = (T)mean;
            out[plan.channels + item.channel] = (T)squares;
        }
    }
}

// Adds to n values a channel, of which mean and sum of squares are known, `added` more: partial results `step` apart,
// the values that their means are relative to `apart`. Null: single values.
template <bool neighbours, class S, class T>
static inline void merge_partials(const T* partial_mean, const T* partial_squares, int64_t step, const S* shift,
                                  int64_t apart, int64_t count, double added, double& n, double* mean,
                                  double* squares) {
    const double share = added / (n + added), weight = n * share;
    if (neighbours) step = apart = 1;
    n += added;
    if (partial_mean == nullptr) {
        for (int64_t c = 0; c < count; ++c) {
            const double delta = (double)shift[c * apart] - mean[c];
            squares[c] += delta * delta * weight;
            mean[c] += delta * share;
        }
        return;
    }
    for (int64_t c = 0; c < count; ++c) {
        const double delta = ((double)shift[c * apart] + (double)partial_mean[c * step]) - mean[c];
        squares[c] += delta * delta * weight + (double)partial_squares[c * step];
        mean[c] += delta * share;
    }
}

// Items [begin, end) of seeds * parts * plan.channel_blocks(): mean and var (seeds, parts, channels), 0 and 0 of
// nothing.
template <class S, class T>
static inline void merge_moments(const S* x, const T* workspace, T* mean_out, T* var_out, const PartsPlan& plan,
                                 int64_t begin, int64_t end) {
    const int64_t inner = plan.columns ? plan.inner : 1;  // neighbouring columns of one channel
    const int64_t natural = plan.channels * inner;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = i % plan.channel_blocks() * kChannelBlock;
        const int64_t part = i / plan.channel_blocks() % plan.parts;
        const int64_t seed = i / plan.channel_blocks() / plan.parts;
        const int64_t count = min_of(kChannelBlock, plan.channels - channel);
        alignas(64) double mean[kChannelBlock] = {}, squares[kChannelBlock] = {};
        double n = 0;
        const S* from = x + seed * plan.per_seed + plan.part_begin[part];
        const auto merge = plan.columns && inner == 1 ? &merge_partials<true, S, T> : &merge_partials<false, S, T>;
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
            const int64_t row = plan.row_begin(part, chunk), row_end = plan.row_begin(part, chunk + 1);
            if (plan.columns) {
                const int64_t rows = min_of(row_end, plan.full_rows(part)) - row;
                if (rows <= 0) continue;
                const T* partial = workspace + plan.slot(seed, part, chunk) * 2 * plan.width;
                for (int64_t copy = channel * inner; copy < plan.width; copy += natural)
                    for (int64_t k = copy; k < copy + inner; ++k)
                        merge(partial + k, partial + plan.width + k, inner, from + row * plan.width + k, inner, count,
                              (double)rows, n, mean, squares);
            } else {
                if (row == row_end) continue;
                for (int64_t segment = 0; segment < plan.blocks; ++segment) {
                    const int64_t first = segment * plan.block;
                    const T* partial = workspace + plan.slot(seed, part, chunk * plan.blocks + segment) * 2 * natural;
                    merge(partial + channel, partial + natural + channel, 1,
                          from + row * plan.width + channel * plan.inner + first, plan.inner, count,
                          (double)((row_end - row) * min_of(plan.block, plan.inner - first)), n, mean, squares);
                }
            }
        }
        if (plan.columns)  // the short last row
            for (int64_t at = plan.full_rows(part) * plan.width + channel * inner; at < plan.part_size[part];
                 at += natural)
                for (int64_t k = at; k < at + inner; ++k)
                    merge(nullptr, nullptr, 1, from + k, inner, count, 1, n, mean, squares);
        const int64_t to = (seed * plan.parts + part) * plan.channels + channel;
        for (int64_t c = 0; c < count; ++c) {
            mean_out[to + c] = (T)mean[c];
            var_out[to + c] = n > 0 ? (T)(squares[c] / n) : (T)0;
        }
    }
}

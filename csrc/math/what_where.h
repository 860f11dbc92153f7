// Pooling that keeps the where, and its unpooling, one window at a time. Soft (Zhao et al. 2015, equations 3 and 4) and
// bilinear, or hard. With d = z - max,
// e = exp(beta d) and s = e / sum e over the window,
//
//   m = sum z s                        dm/dz = s (1 + beta (z - m))
//   (px, py) = sum (x, y) s            dp/dz = s beta ((x, y) - p)
//
// Textual header without an include guard: it is included inside the namespace that uses it, on the CPU once per
// instruction set. V is a scalar or a vector type, I its integers; these must have been declared before: reciprocal(V),
// clamp_unit(V) to [-1, 1], above_or_nan(a, b), which is true where a > b or a is NaN, and chosen(test, a, b), which is
// a where the test is true and else b. LF_HD comes from host_device.h.

// Sums of e, z e, x e and y e over a window; `row` has the first three over one row of it. That a row is added up by
// itself keeps the rounding of long sums small.
template <class V>
struct SoftSums {
    V total, z, x, y;
};

template <class V>
LF_HD void soft_pool_add(V z, V e, V x, SoftSums<V>& row) {
    row.total = row.total + e;
    row.z = row.z + z * e;
    row.x = row.x + x * e;
}

template <class V>
LF_HD void soft_pool_add_row(const SoftSums<V>& row, V y, SoftSums<V>& sums) {
    sums.total = sums.total + row.total;
    sums.z = sums.z + row.z;
    sums.x = sums.x + row.x;
    sums.y = sums.y + y * row.total;
}

template <class V>
struct SoftPooled {
    V inverse, what, x, y;  // 1 / sum e, m, px and py
};

template <class V>
LF_HD SoftPooled<V> soft_pool_finish(const SoftSums<V>& sums) {
    const V inverse = reciprocal(sums.total);
    return {inverse, sums.z * inverse, clamp_unit(sums.x * inverse), clamp_unit(sums.y * inverse)};
}

// What the gradient needs of a window: m and p, and over sum e the gradient of m and those of m, px and py times beta.
template <class V>
struct SoftGradient {
    V what, x, y;
    V of_what, sharp_what, sharp_x, sharp_y;
};

template <class V>
LF_HD SoftGradient<V> soft_pool_gradients(const SoftPooled<V>& pooled, V of_what, V of_x, V of_y, V beta) {
    const V what = of_what * pooled.inverse, sharp = beta * pooled.inverse;
    return {pooled.what, pooled.x, pooled.y, what, what * beta, of_x * sharp, of_y * sharp};
}

// The terms of dp/dz that belong to a column and to a row.
template <class V>
LF_HD V soft_pool_column(const SoftGradient<V>& g, V x) {
    return g.sharp_x * (x - g.x);
}
template <class V>
LF_HD V soft_pool_row(const SoftGradient<V>& g, V y) {
    return g.sharp_y * (y - g.y);
}

// Gradient with respect to one element. Differences come before products, so that nothing is left where s is 0 or 1.
template <class V>
LF_HD V soft_pool_gradient(const SoftGradient<V>& g, V z, V e, V column, V row) {
    return e * (g.sharp_what * (z - g.what) + g.of_what + (column + row));
}

// Unpooling: the place p lies between two neighbouring columns (rows), of which the second one gets `share`. `half` is
// half the distance between a window's first and last column, in columns.
template <class V>
LF_HD V unpool_place(V p, V half) {
    return clamp_unit(p) * half + half;
}

template <class V>
struct Corners {
    V top_left, top_right, bottom_left, bottom_right;
};

template <class V>
LF_HD Corners<V> unpool_forward(V what, V share_x, V share_y) {
    const V bottom = what * share_y, top = what - bottom;
    const V top_right = top * share_x, bottom_right = bottom * share_x;
    return {top - top_right, top_right, bottom - bottom_right, bottom_right};
}

// Gradients of what, x and y; half_x and half_y are 0 where p lies beyond [-1, 1].
template <class V>
LF_HD void unpool_backward(const Corners<V>& grad, V what, V share_x, V share_y, V half_x, V half_y, V& grad_what,
                           V& grad_x, V& grad_y) {
    const V top_slope = grad.top_right - grad.top_left, bottom_slope = grad.bottom_right - grad.bottom_left;
    const V top = grad.top_left + share_x * top_slope, bottom = grad.bottom_left + share_x * bottom_slope;
    grad_what = top + share_y * (bottom - top);
    grad_x = what * half_x * (top_slope + share_y * (bottom_slope - top_slope));
    grad_y = what * half_y * (bottom - top);
}

// Hard pooling: `most` of a window, -inf before the first element, and its `tap`, the element's number. Elements come
// in their order; of equal ones the first counts, of several NaN the last, as in torch.
template <class V, class I>
LF_HD void max_pool_add(V z, I tap, V& most, I& most_tap) {
    const auto takes = above_or_nan(z, most);
    most = chosen(takes, z, most);
    most_tap = chosen(takes, tap, most_tap);
}

// The same of two parts of a window, whatever the order.
template <class V, class I>
LF_HD void max_pool_merge(V z, I tap, V& most, I& most_tap) {
    const bool takes = z != z ? most == most || tap > most_tap : z > most || (z == most && tap < most_tap);
    most = takes ? z : most;
    most_tap = takes ? tap : most_tap;
}

// Tagger's per-group quantities (Greff et al. 2016), one pixel at a time. Groups k, masks m_k with sum 1, x the input:
//
//   Gaussian    density_k = Normal(x; z_k, v)                    dz_k = (x - z_k) m_k density_k
//               nll = -log sum_k m_k density_k
//   Bernoulli   density_k = x xi_k + (1 - x)(1 - xi_k), xi_k = z_k (1 - 2 b) + b
//               dz_k = m_k / (sum_h xi_h m_h - 1 + x)
//               nll = -x log p - (1 - x) log(1 - p), p = sum_k m_k z_k
//   both        likelihood_k = density_k / sum_h density_h
//
// Masks may be given by their logits: m = softmax over k.
//
// A kernel goes over the groups of a pixel a few times: to gather, then to write. What a pixel gathers is a struct
// here. Exponents are to the base 2: y_k = -(x - z_k)^2 / (2 v ln 2).
//
// Powers are relative to a `top` near the largest one, which holds where all of them underflow. A struct that is not
// `scaled` spares looking for it and takes top = 0: right where its total is LF_TAGGER_ENOUGH at least, beside which
// little is lost by underflow, in float 2^-94 of it. Who goes on with a scaled one for the sake of some lanes calls
// `unless_enough` after comparing: the others then get what they would have got.
//
// Textual header without an include guard: it is included inside the namespace that uses it, on the CPU once per
// instruction set. V is a scalar or a vector type. Declared before: LF_HD (host_device.h) and, for V,
//   constant<V>(double)
//   exp2_of(V): zero where it underflows
//   log_of(V): of positive normal numbers
//   exponent_of(V): floor(log2) of positive numbers, for subnormal ones that of the least normal
//   larger(a, b), smaller(a, b): b if either is NaN
//   if_less(a, b, then, otherwise): a < b ? then : otherwise

// Numbers of reference/tagger.py.
#define LF_TAGGER_CLIP 1e-4
#define LF_TAGGER_POLE 0.5e-4
#define LF_TAGGER_FLOOR 1e-30

#define LF_TAGGER_ENOUGH 0x1p-32
#define LF_TAGGER_LOWEST (-3.4e38)  // no finite exponent of float is less
#define LF_TAGGER_LOG2E 1.4426950408889634

template <class V>
struct GaussianScalar {
    V scale;      // -1 / (2 v ln 2)
    V norm;       // (2 pi v)^(-1/2)
    V precision;  // 1 / v
    V offset;     // log(2 pi v) / 2
    V most;       // largest exponent that is taken: a quarter of the largest number
    V limit;      // 2^most
};

template <class V>
LF_HD V gaussian_exponent(V e, const GaussianScalar<V>& s) {
    return (e * s.scale) * e;
}

// y_k - y_j of two groups: far exponents differ by less than they are rounded by, not so the e of which they are made.
template <class V>
LF_HD V gaussian_difference(V e, V other, const GaussianScalar<V>& s) {
    return ((e - other) * s.scale) * (e + other);
}

template <class V>
LF_HD V magnitude(V e) {
    return larger(e, constant<V>(0) - e);
}

template <class V>
LF_HD V top_unless_enough(V unscaled_total, V top) {
    return if_less(unscaled_total, constant<V>(LF_TAGGER_ENOUGH), top, constant<V>(0));
}

// 1. where scaled, the e of the nearest group, whose exponent is top. 2. of w_k = 2^(y_k - top): total, and in backward
// dot = sum_k w_k grad_likelihood_k.
template <class V, bool scaled = true>
struct GaussianPixel {
    V nearest, total, dot;
    V enough;  // where scaled, of the unscaled total: whether top is 0
    V share, peak, sum_x;

    LF_HD GaussianPixel()
        : nearest(constant<V>(-(LF_TAGGER_LOWEST))), total(constant<V>(0)), dot(total), enough(total) {}
    // Not by exponents: rounded, they may tie where one is nearer, and its difference from the other would be positive.
    LF_HD void compare(V e) { nearest = if_less(magnitude(e), magnitude(nearest), e, nearest); }
    LF_HD void unless_enough(V unscaled_total) { enough = unscaled_total; }
    // The exponent of the nearest group is 0: where it is all there is, its likelihood is 1 and the gradient through it
    // 0.
    LF_HD V weight(V e, const GaussianScalar<V>& s) const {
        const V y = gaussian_exponent(e, s);
        if constexpr (scaled)
            return exp2_of(if_less(enough, constant<V>(LF_TAGGER_ENOUGH), gaussian_difference(e, nearest, s), y));
        else
            return exp2_of(y);
    }
    LF_HD V weigh(V e, const GaussianScalar<V>& s) {
        const V w = weight(e, s);
        total = total + w;
        return w;
    }
    LF_HD V weigh(V e, const GaussianScalar<V>& s, V grad_likelihood) {
        const V w = weigh(e, s);
        dot = dot + w * grad_likelihood;
        return w;
    }
    LF_HD void finish(const GaussianScalar<V>& s) {
        share = constant<V>(1) / total;
        peak = s.norm;
        if constexpr (scaled) peak = exp2_of(top_unless_enough(enough, gaussian_exponent(nearest, s))) * s.norm;
        dot = dot * share;
        sum_x = constant<V>(0);
    }
    LF_HD void forward(V e, V m, V w, V& dz, V& likelihood) const {
        dz = (e * m) * (w * peak);
        likelihood = w * share;
    }
    // Adds to sum_v the group's part of 2 v grad_variance. It is e times grad_z: a scale of e is one of sqrt(v). As the
    // likelihoods' parts a_k add up to 0, their squares of e may be less any number; less the nearest one, little is
    // lost where all are far.
    LF_HD void backward(V grad_dz, V grad_likelihood, V e, V m, V w, const GaussianScalar<V>& s, V& grad_z, V& grad_m,
                        V& sum_v) {
        const V over_v = e * s.precision;
        const V density = grad_dz * (w * peak);
        const V a = (w * share) * (grad_likelihood - dot);
        grad_m = density * e;
        const V turn = constant<V>(1) - over_v * e;
        grad_z = a * over_v - (density * m) * turn;
        sum_x = sum_x - grad_z;
        if constexpr (scaled) {
            const V far = ((a * (e - nearest)) * (e + nearest)) * s.precision - (grad_m * m) * turn;
            sum_v = sum_v + if_less(enough, constant<V>(LF_TAGGER_ENOUGH), far, e * grad_z);
        } else {
            sum_v = sum_v + e * grad_z;
        }
    }
};

// 1. where scaled, the group whose log2 m_k + y_k is largest, within a factor of two of its power: its e, `nearest`,
// and its log2 m, rounded down, `power`. 2. of w_k = 2^(y_k - top), where top is the sum of that group's, total = sum_k
// m_k w_k. A group of mask 0 may lie above top by any amount, and the gradient of its mask grows alike: it is held
// within `limit`.
template <class V, bool scaled = true>
struct GaussianMixture {
    V nearest, power, total;
    V enough;  // where scaled, of the unscaled total: whether top is 0
    V share, sum_x;

    LF_HD GaussianMixture()
        : nearest(constant<V>(0)), power(constant<V>(LF_TAGGER_LOWEST)), total(nearest), enough(nearest) {}
    LF_HD void compare(V e, V m, const GaussianScalar<V>& s) {
        const V zero = constant<V>(0), own = exponent_of(m);
        const V ahead = if_less(zero, m, gaussian_difference(e, nearest, s) + (own - power), zero);
        nearest = if_less(zero, ahead, e, nearest);
        power = if_less(zero, ahead, own, power);
    }
    LF_HD void unless_enough(V unscaled_total) { enough = unscaled_total; }
    LF_HD V weight(V e, const GaussianScalar<V>& s) const {
        const V y = gaussian_exponent(e, s);
        if constexpr (scaled) {
            const V relative = gaussian_difference(e, nearest, s) - power;
            return exp2_of(smaller(s.most, if_less(enough, constant<V>(LF_TAGGER_ENOUGH), relative, y)));
        } else {
            return exp2_of(y);
        }
    }
    LF_HD V weigh(V e, V m, const GaussianScalar<V>& s) {
        const V w = weight(e, s);
        total = total + m * w;
        return w;
    }
    LF_HD V nll(const GaussianScalar<V>& s) const {
        V top = constant<V>(0);
        if constexpr (scaled) top = top_unless_enough(enough, gaussian_exponent(nearest, s) + power);
        return (s.offset - constant<V>(0.693147180559945309) * top) - log_of(total);
    }
    LF_HD void finish(V grad) {
        share = grad / total;
        sum_x = constant<V>(0);
    }
    // Adds to sum_v, which starts as the pixel's grad, the group's part of 2 v grad_variance.
    LF_HD void backward(V e, V m, V w, const GaussianScalar<V>& s, V& grad_z, V& grad_m, V& sum_v) {
        const V steep = constant<V>(0) - share * w;
        grad_m = larger(constant<V>(0) - s.limit, smaller(s.limit, steep));
        grad_z = (constant<V>(0) - share * (m * w)) * (e * s.precision);
        sum_x = sum_x - grad_z;
        sum_v = sum_v + e * grad_z;
    }
};

template <class V>
struct BernoulliScalar {
    V flip, keep;  // b, 1 - 2 b
};

// With xi_k = keep z_k + flip: the mixture sum_k xi_k m_k, and total = sum_k density_k; in backward also
// dot = sum_k density_k grad_likelihood_k and sum_m = sum_k grad_dz_k m_k.
template <class V>
struct BernoulliPixel {
    V rest;           // 1 - x
    V offset, slope;  // density_k = offset + slope z_k
    V mixture, total, dot, sum_m;
    V pole, share;     // 1 / denominator of dz, 1 / total
    V tilt;            // slope / total
    V grad_t, grad_s;  // gradients of the denominator and of the mixture

    LF_HD BernoulliPixel(V x, const BernoulliScalar<V>& s)
        : rest(constant<V>(1) - x), mixture(constant<V>(0)), total(mixture), dot(mixture), sum_m(mixture) {
        const V sign = x * constant<V>(2) - constant<V>(1);
        offset = rest + sign * s.flip;
        slope = sign * s.keep;
    }
    LF_HD static V xi(V z, const BernoulliScalar<V>& s) { return z * s.keep + s.flip; }
    // Of a group; LF_TAGGER_FLOOR at least.
    LF_HD V density(V z) const { return larger(constant<V>(LF_TAGGER_FLOOR), z * slope + offset); }

    LF_HD V gather(V z, V m, const BernoulliScalar<V>& s) {
        const V d = density(z);
        mixture = mixture + xi(z, s) * m;
        total = total + d;
        return d;
    }
    LF_HD V gather(V z, V m, V grad_dz, V grad_likelihood, const BernoulliScalar<V>& s) {
        const V d = gather(z, m, s);
        dot = dot + d * grad_likelihood;
        sum_m = sum_m + grad_dz * m;
        return d;
    }
    LF_HD V denominator() const {
        const V low = constant<V>(LF_TAGGER_CLIP), high = constant<V>(1 - LF_TAGGER_CLIP);
        return smaller(high, larger(low, mixture)) - rest;
    }
    // The same, never nearer to 0 than the pole allows.
    LF_HD static V off_pole(V t) {
        const V near = constant<V>(LF_TAGGER_POLE), zero = constant<V>(0);
        return if_less(t, zero, smaller(zero - near, t), larger(near, t));
    }
    LF_HD void finish() {
        pole = constant<V>(1) / off_pole(denominator());
        share = constant<V>(1) / total;
    }
    LF_HD void forward(V m, V density, V& dz, V& likelihood) const {
        dz = m * pole;
        likelihood = density * share;
    }
    LF_HD void finish_backward() {
        finish();
        dot = dot * share;
        tilt = slope * share;
        const V t = denominator();
        const V near = constant<V>(LF_TAGGER_POLE), zero = constant<V>(0);
        const V pull = zero - (sum_m * pole) * pole;
        grad_t = if_less(magnitude(t), near, zero, pull);
        const V low = constant<V>(LF_TAGGER_CLIP), high = constant<V>(1 - LF_TAGGER_CLIP);
        grad_s = if_less(mixture, low, zero, if_less(high, mixture, zero, grad_t));
    }
    // The gradient of `by` times density_k.
    LF_HD V through_density(V density, V grad_likelihood, V by) const {
        return if_less(constant<V>(LF_TAGGER_FLOOR), density, (grad_likelihood - dot) * by, constant<V>(0));
    }
    LF_HD void backward(V grad_dz, V grad_likelihood, V z, V m, V density, const BernoulliScalar<V>& s, V& grad_z,
                        V& grad_m) const {
        grad_m = grad_dz * pole + grad_s * xi(z, s);
        grad_z = m * (grad_s * s.keep) + through_density(density, grad_likelihood, tilt);
    }
    // A group's part of grad_x, to which grad_t is added once.
    LF_HD V grad_x(V grad_likelihood, V z, V density, const BernoulliScalar<V>& s) const {
        const V by_x = xi(z, s) * constant<V>(2) - constant<V>(1);
        return through_density(density, grad_likelihood, share) * by_x;
    }
};

// p = sum_k m_k z_k.
template <class V>
struct BernoulliMixture {
    V p;

    LF_HD BernoulliMixture() : p(constant<V>(0)) {}
    LF_HD void gather(V z, V m) { p = p + m * z; }
    LF_HD V clipped() const { return smaller(constant<V>(1 - LF_TAGGER_CLIP), larger(constant<V>(LF_TAGGER_CLIP), p)); }
    LF_HD V nll(V x) const {
        const V one = constant<V>(1), c = clipped();
        return (constant<V>(0) - x * log_of(c)) - (one - x) * log_of(one - c);
    }
    // The same of x that are 0 or 1.
    LF_HD V binary_nll(V x) const {
        const V c = clipped();
        return constant<V>(0) - log_of(if_less(constant<V>(0), x, c, constant<V>(1) - c));
    }
    // The gradient of p: that of z_k is m_k times it, that of m_k is z_k times it.
    LF_HD V backward(V grad, V x) const {
        const V zero = constant<V>(0), c = clipped();
        const V slope = grad * ((c - x) / (c * (constant<V>(1) - c)));
        const V low = constant<V>(LF_TAGGER_CLIP), high = constant<V>(1 - LF_TAGGER_CLIP);
        return if_less(p, low, zero, if_less(high, p, zero, slope));
    }
    LF_HD V grad_x(V grad) const {
        const V c = clipped();
        return grad * log_of((constant<V>(1) - c) / c);
    }
};

// A difference of logits to the base 2, as exp2_of takes it.
template <class V>
LF_HD V logit_exponent(V logit) {
    return logit * constant<V>(LF_TAGGER_LOG2E);
}

// Masks from logits: 1. top. 2. of a_k = exp(l_k - top), total. m_k = a_k / total. The difference is made before
// anything rounds the logits, whose size would else be that of the error. Where not `natural`, l are exponents to the
// base 2.
template <class V, bool natural = true>
struct MaskPixel {
    V top, total, share;
    V dot;  // in backward sum_k m_k grad_m_k

    LF_HD MaskPixel() : top(constant<V>(LF_TAGGER_LOWEST)), total(constant<V>(0)), dot(total) {}
    LF_HD void compare(V l) { top = larger(l, top); }
    LF_HD V exponent(V l) const {
        if constexpr (natural)
            return logit_exponent(l - top);
        else
            return l - top;
    }
    LF_HD V weight(V l) const { return exp2_of(exponent(l)); }
    LF_HD V weigh(V l) {
        const V a = weight(l);
        total = total + a;
        return a;
    }
    LF_HD void finish() { share = constant<V>(1) / total; }
    LF_HD V mask(V a) const { return a * share; }
    LF_HD void gather(V m, V grad_m) { dot = dot + m * grad_m; }
    LF_HD V backward(V m, V grad_m) const { return m * (grad_m - dot); }
};

// The Gaussian mixture's cost from logits: nll = log(2 pi v) / 2 + log sum_k exp(l_k) - log sum_k exp(l_k) density_k,
// whose sums are those of two MaskPixel, `masks` of l and `joint` of masks.exponent(l) + y: y is not rounded by the
// size of logits. In backward m and share are the two softmaxes. totals: masks.total / joint.total.
template <class V>
LF_HD V gaussian_logits_nll(V joint_top, V totals, const GaussianScalar<V>& s) {
    return s.offset - constant<V>(0.693147180559945309) * joint_top + log_of(totals);
}
// Adds to sum_v, which starts as the pixel's grad, the group's part of 2 v grad_variance.
template <class V>
LF_HD void gaussian_logits_backward(V grad, V e, V m, V share, const GaussianScalar<V>& s, V& grad_z, V& grad_logit,
                                    V& sum_v) {
    grad_z = constant<V>(0) - ((grad * share) * (e * s.precision));
    grad_logit = grad * (m - share);
    sum_v = sum_v + e * grad_z;
}

#undef LF_TAGGER_CLIP
#undef LF_TAGGER_POLE
#undef LF_TAGGER_FLOOR
#undef LF_TAGGER_LOWEST

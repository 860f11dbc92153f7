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
// Textual header without an include guard: it is included inside the namespace that uses it, on the CPU once per
// instruction set. V is a scalar or a vector type. Declared before: LF_HD (host_device.h) and, for V,
//   constant<V>(double)
//   exp2_of(V): zero where it underflows
//   log_of(V): of positive normal numbers
//   exponent_of(V): floor(log2) of positive numbers, for subnormal ones that of the least normal
//   logistic(V): 1 / (1 + exp(-x))
//   larger(a, b), smaller(a, b): b if either is NaN
//   if_less(a, b, then, otherwise): a < b ? then : otherwise

// Numbers of reference/tagger.py.
#define LF_TAGGER_CLIP 1e-4
#define LF_TAGGER_POLE 0.5e-4
#define LF_TAGGER_FLOOR 1e-30

template <class V>
struct GaussianScalar {
    V scale;      // -1 / (2 v ln 2)
    V norm;       // (2 pi v)^(-1/2)
    V precision;  // 1 / v
    V offset;     // log(2 pi v) / 2
    V most;       // largest exponent that is taken: a quarter of the largest number
};

template <class V>
LF_HD V gaussian_exponent(V e, const GaussianScalar<V>& s) {
    return (e * s.scale) * e;
}

// 1. top = max_k y_k. 2. of w_k = 2^(y_k - top): total, and in backward dot = sum_k w_k grad_likelihood_k.
template <class V>
struct GaussianPixel {
    V top, total, dot;
    V share, peak, sum_x;

    LF_HD GaussianPixel() : top(constant<V>(-1e37)), total(constant<V>(0)), dot(total) {}
    LF_HD void compare(V y) { top = larger(y, top); }
    LF_HD V weigh(V y) {
        const V w = exp2_of(y - top);
        total = total + w;
        return w;
    }
    LF_HD V weigh(V y, V grad_likelihood) {
        const V w = weigh(y);
        dot = dot + w * grad_likelihood;
        return w;
    }
    LF_HD void finish(const GaussianScalar<V>& s) {
        share = constant<V>(1) / total;
        peak = exp2_of(top) * s.norm;
        dot = dot * share;
        sum_x = constant<V>(0);
    }
    LF_HD void forward(V e, V m, V w, V& dz, V& likelihood) const {
        dz = (e * m) * (w * peak);
        likelihood = w * share;
    }
    // Adds to sum_v the group's part of 2 v grad_variance. It is e times grad_z: a scale of e is one of sqrt(v).
    LF_HD void backward(V grad_dz, V grad_likelihood, V e, V m, V w, const GaussianScalar<V>& s, V& grad_z, V& grad_m,
                        V& sum_v) {
        const V scaled = e * s.precision;
        const V density = grad_dz * (w * peak);
        const V a = (w * share) * (grad_likelihood - dot);
        grad_m = density * e;
        grad_z = a * scaled - (density * m) * (constant<V>(1) - scaled * e);
        sum_x = sum_x - grad_z;
        sum_v = sum_v + e * grad_z;
    }
};

// 1. top: close above or below the largest of log2 m_k + y_k, within a factor of two of its power. 2. of
// w_k = 2^(y_k - top), total = sum_k m_k w_k.
// A group of mask 0 may lie above top by any amount, and the gradient of its mask grows alike: it is held at `most`.
template <class V>
struct GaussianMixture {
    V top, total;
    V share, sum_x;

    LF_HD GaussianMixture() : top(constant<V>(-1e37)), total(constant<V>(0)) {}
    LF_HD void compare(V y, V m) {
        top = larger(if_less(constant<V>(0), m, y + exponent_of(m), constant<V>(-1e37)), top);
    }
    LF_HD V weigh(V y, V m, const GaussianScalar<V>& s) {
        const V w = exp2_of(smaller(s.most, y - top));
        total = total + m * w;
        return w;
    }
    LF_HD V nll(const GaussianScalar<V>& s) const {
        return (s.offset - constant<V>(0.693147180559945309) * top) - log_of(total);
    }
    LF_HD void finish(V grad) {
        share = grad / total;
        sum_x = constant<V>(0);
    }
    // Adds to sum_v, which starts as the pixel's grad, the group's part of 2 v grad_variance.
    LF_HD void backward(V e, V m, V w, const GaussianScalar<V>& s, V& grad_z, V& grad_m, V& sum_v) {
        grad_m = constant<V>(0) - share * w;
        grad_z = (grad_m * m) * (e * s.precision);
        sum_x = sum_x - grad_z;
        sum_v = sum_v + e * grad_z;
    }
};

template <class V>
struct BernoulliScalar {
    V flip, keep;  // b, 1 - 2 b
};

// Mixture s = sum_k xi_k m_k and total = sum_k density_k; in backward also dot = sum_k density_k grad_likelihood_k and
// sum_m = sum_k grad_dz_k m_k.
template <class V>
struct BernoulliPixel {
    V x, sign;
    V mixture, total, dot, sum_m;
    V pole, share, grad_s, sum_x;  // 1 / denominator of dz, 1 / total, gradient of the mixture, grad_x

    LF_HD explicit BernoulliPixel(V x)
        : x(x), sign(x + x - constant<V>(1)), mixture(constant<V>(0)), total(mixture), dot(mixture), sum_m(mixture) {}
    LF_HD static V xi(V z, const BernoulliScalar<V>& s) { return z * s.keep + s.flip; }
    LF_HD V density(V xi) const { return (constant<V>(1) - x) + xi * sign; }
    LF_HD static V floored(V density) { return larger(constant<V>(LF_TAGGER_FLOOR), density); }

    LF_HD void gather(V xi, V m) {
        mixture = mixture + xi * m;
        total = total + floored(density(xi));
    }
    LF_HD void gather(V xi, V m, V grad_dz, V grad_likelihood) {
        const V d = floored(density(xi));
        mixture = mixture + xi * m;
        total = total + d;
        dot = dot + d * grad_likelihood;
        sum_m = sum_m + grad_dz * m;
    }
    LF_HD V denominator() const {
        const V low = constant<V>(LF_TAGGER_CLIP), high = constant<V>(1 - LF_TAGGER_CLIP);
        return (x - constant<V>(1)) + smaller(high, larger(low, mixture));
    }
    // The same, never nearer to 0 than the pole allows.
    LF_HD static V off_pole(V t) {
        const V near = constant<V>(LF_TAGGER_POLE), zero = constant<V>(0);
        const V far = if_less(t, zero, zero - near, near);
        return if_less(t, near, if_less(zero - near, t, far, t), t);
    }
    LF_HD void finish() {
        pole = constant<V>(1) / off_pole(denominator());
        share = constant<V>(1) / total;
    }
    LF_HD void forward(V xi, V m, V& dz, V& likelihood) const {
        dz = m * pole;
        likelihood = floored(density(xi)) * share;
    }
    LF_HD void finish_backward() {
        finish();
        dot = dot * share;
        const V t = denominator(), near = constant<V>(LF_TAGGER_POLE), zero = constant<V>(0);
        const V slope = zero - (sum_m * pole) * pole;
        const V grad_t = if_less(t, near, if_less(zero - near, t, zero, slope), slope);
        const V low = constant<V>(LF_TAGGER_CLIP), high = constant<V>(1 - LF_TAGGER_CLIP);
        grad_s = if_less(mixture, low, zero, if_less(high, mixture, zero, grad_t));
        sum_x = grad_t;
    }
    LF_HD void backward(V grad_dz, V grad_likelihood, V xi, V m, const BernoulliScalar<V>& s, V& grad_z, V& grad_m) {
        const V d = density(xi);
        const V grad_d = if_less(constant<V>(LF_TAGGER_FLOOR), d, (grad_likelihood - dot) * share, constant<V>(0));
        grad_m = grad_dz * pole + grad_s * xi;
        grad_z = (grad_s * m + grad_d * sign) * s.keep;
        sum_x = sum_x + grad_d * (xi + xi - constant<V>(1));
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
    // Returns the gradient of p: that of z_k is m_k times it, that of m_k is z_k times it.
    LF_HD V backward(V grad, V x, V& grad_x) const {
        const V one = constant<V>(1), zero = constant<V>(0), c = clipped();
        const V inverse = one / c;
        grad_x = grad * log_of((one - c) * inverse);
        const V slope = grad * ((one - x) / (one - c) - x * inverse);
        const V low = constant<V>(LF_TAGGER_CLIP), high = constant<V>(1 - LF_TAGGER_CLIP);
        return if_less(p, low, zero, if_less(high, p, zero, slope));
    }
};

// Logits to the base 2, as exp2_of takes them.
template <class V>
LF_HD V logit_exponent(V logit) {
    return logit * constant<V>(1.4426950408889634);
}

// Masks from logits: 1. top. 2. of a_k = 2^(l_k - top), total. m_k = a_k / total.
template <class V>
struct MaskPixel {
    V top, total, share;
    V dot;  // in backward sum_k m_k grad_m_k

    LF_HD MaskPixel() : top(constant<V>(-1e37)), total(constant<V>(0)), dot(total) {}
    LF_HD void compare(V l) { top = larger(l, top); }
    LF_HD V weigh(V l) {
        const V a = exp2_of(l - top);
        total = total + a;
        return a;
    }
    LF_HD void finish() { share = constant<V>(1) / total; }
    LF_HD V mask(V a) const { return a * share; }
    LF_HD void gather(V m, V grad_m) { dot = dot + m * grad_m; }
    LF_HD V backward(V m, V grad_m) const { return m * (grad_m - dot); }
};

// The Gaussian mixture's cost from logits: nll = log(2 pi v) / 2 + log sum_k exp(l_k) - log sum_k exp(l_k) density_k,
// whose sums are those of two MaskPixel, of l and of l + y. Here m and share are the two softmaxes.
// tops: masks.top - joint.top; totals: masks.total / joint.total.
template <class V>
LF_HD V gaussian_logits_nll(V tops, V totals, const GaussianScalar<V>& s) {
    return s.offset + constant<V>(0.693147180559945309) * tops + log_of(totals);
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

// The Gaussian combinator of the Ladder network (Rasmus et al. 2015, section 3), one element at a time:
//
//   mu(u) = a1 s(a2 u + a3) + a4 u + a5
//   v(u)  = a6 s(a7 u + a8) + a9 u + a10        passed through s once more if `squash`
//   g     = (z - mu) v + mu
//
// Textual header without an include guard: it is included inside the namespace that uses it, on the CPU once per
// instruction set. V is a scalar or a vector type; sigmoid(V) -> {value, slope} must have been declared before, and
// LF_HD comes from host_device.h.

//
// Where a sigmoid is faster of its argument times a constant, overloads of the next two functions say so: the constant
// is then multiplied into the parameters, once for many elements.

// x as sigmoid_of takes it; linear.
template <class V>
LF_HD V sigmoid_argument(V x) {
    return x;
}

template <class V>
LF_HD auto sigmoid_of(V argument) {
    return sigmoid(argument);
}

template <class V>
struct Combinator {
    V a[10];         // a1 .. a10 of one channel
    V arguments[4];  // sigmoid_argument of a2, a3, a7, a8

    LF_HD auto sigmoid_mu(V u) const { return sigmoid_of(arguments[0] * u + arguments[1]); }
    LF_HD auto sigmoid_v(V u) const { return sigmoid_of(arguments[2] * u + arguments[3]); }
};

// Of which parameter arguments[k] is.
LF_HD int combinator_argument(int k) { return k < 2 ? 1 + k : 4 + k; }

template <class V>
LF_HD V combinator_forward(V z, V u, const Combinator<V>& p, bool squash) {
    const V mu = p.a[0] * p.sigmoid_mu(u).value + (p.a[3] * u + p.a[4]);
    V v = p.a[5] * p.sigmoid_v(u).value + (p.a[8] * u + p.a[9]);
    if (squash) v = sigmoid(v).value;
    return (z - mu) * v + mu;
}

template <bool squash, class V>
LF_HD V combinator_forward(V z, V u, const Combinator<V>& p) {
    return combinator_forward(z, u, p, squash);
}

// What both passes need of u: s(a2 u + a3) and s(a7 u + a8).
template <class V>
struct CombinatorSigmoids {
    decltype(sigmoid_of(V())) mu, v;

    LF_HD CombinatorSigmoids(V u, const Combinator<V>& p) : mu(p.sigmoid_mu(u)), v(p.sigmoid_v(u)) {}
};

// Sets grad_z and grad_u; adds to `sums` what the element contributes to the gradients of a1 .. a10, less the factors
// a1 and a6 that are the same for the whole channel: combinator_finish applies those to the finished sums.
template <class V>
LF_HD void combinator_backward(V grad, V z, V u, const CombinatorSigmoids<V>& s, const Combinator<V>& p, bool squash,
                               V& grad_z, V& grad_u, V (&sums)[10]) {
    const V mu = p.a[0] * s.mu.value + (p.a[3] * u + p.a[4]);
    V v = p.a[5] * s.v.value + (p.a[8] * u + p.a[9]);
    V grad_v = grad * (z - mu);
    if (squash) {
        const auto squashed = sigmoid(v);
        v = squashed.value;
        grad_v = grad_v * squashed.slope;
    }
    grad_z = grad * v;
    const V grad_mu = grad - grad_z;
    const V slope_mu = grad_mu * s.mu.slope;
    const V slope_v = grad_v * s.v.slope;
    grad_u = (p.a[0] * p.a[1]) * slope_mu + p.a[3] * grad_mu + ((p.a[5] * p.a[6]) * slope_v + p.a[8] * grad_v);
    sums[0] = sums[0] + grad_mu * s.mu.value;
    sums[1] = sums[1] + slope_mu * u;
    sums[2] = sums[2] + slope_mu;
    sums[3] = sums[3] + grad_mu * u;
    sums[4] = sums[4] + grad_mu;
    sums[5] = sums[5] + grad_v * s.v.value;
    sums[6] = sums[6] + slope_v * u;
    sums[7] = sums[7] + slope_v;
    sums[8] = sums[8] + grad_v * u;
    sums[9] = sums[9] + grad_v;
}

template <class V>
LF_HD void combinator_backward(V grad, V z, V u, const Combinator<V>& p, bool squash, V& grad_z, V& grad_u,
                               V (&sums)[10]) {
    combinator_backward(grad, z, u, CombinatorSigmoids<V>(u, p), p, squash, grad_z, grad_u, sums);
}

template <bool squash, class V>
LF_HD void combinator_backward(V grad, V z, V u, const Combinator<V>& p, V& grad_z, V& grad_u, V (&sums)[10]) {
    combinator_backward(grad, z, u, p, squash, grad_z, grad_u, sums);
}

// Sums over a channel's elements -> gradients of a1 .. a10.
template <class V>
LF_HD void combinator_finish(V (&sums)[10], const Combinator<V>& p) {
    sums[1] = sums[1] * p.a[0];
    sums[2] = sums[2] * p.a[0];
    sums[6] = sums[6] * p.a[5];
    sums[7] = sums[7] * p.a[5];
}

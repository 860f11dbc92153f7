// One step of the LSTM with normalised inputs (Ba et al. 2016, with the input alone normalised), one cell at a time. a
// = the four gates before their activation, in the order i, f, g, o:
//
//   a  = w (x - mean) rstd + b + rec             mean, rstd over all 4C channels and all positions of a sample
//   c' = s(f) c + s(i) tanh(g)
//   h  = s(o) tanh(c')
//
// Textual header without an include guard, included as combinator.h is. V is a scalar or a vector type; sigmoid(V) and
// tangent(V) -> {value, slope}, the logistic function and tanh, must have been declared before.

template <class V>
LF_HD void lstm_forward(const V (&a)[4], V c, V& c_new, V& h) {
    c_new = sigmoid(a[1]).value * c + sigmoid(a[0]).value * tangent(a[2]).value;
    h = sigmoid(a[3]).value * tangent(c_new).value;
}

template <class V>
LF_HD void lstm_backward(V grad_h, V grad_c_new, const V (&a)[4], V c, V (&grad_a)[4], V& grad_c) {
    const auto i = sigmoid(a[0]), f = sigmoid(a[1]), g = tangent(a[2]), o = sigmoid(a[3]);
    const auto t = tangent(f.value * c + i.value * g.value);
    grad_a[3] = grad_h * t.value * o.slope;
    const V total = grad_c_new + grad_h * o.value * t.slope;
    grad_a[0] = total * g.value * i.slope;
    grad_a[1] = total * c * f.slope;
    grad_a[2] = total * i.value * g.slope;
    grad_c = total * f.value;
}

// The gradient of x, with the means over the sample of w grad_a and of w grad_a x_hat.
template <class V>
LF_HD V normalised_backward(V grad_a, V x_hat, V weight, V rstd, V mean, V projection) {
    return rstd * (weight * grad_a - mean - x_hat * projection);
}

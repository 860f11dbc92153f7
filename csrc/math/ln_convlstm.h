// One step of the LSTM with normalised inputs (Ba et al. 2016, with the input alone normalised), one cell at a time. a
// = the four gates before their activation, in the order i, f, g, o:
//
//   a  = w (x - mean) rstd + b + rec             mean, rstd over all 4C channels and all positions of a sample, or of
//                                                a channel over all samples and positions
//   c' = s(f) c + s(i) tanh(g)
//   h  = s(o) tanh(c')                           normalised cell: tanh(n), n = w_c (c' - mean) rstd + b_c of the sample
//
// Textual header without an include guard, included as combinator.h is. V is a scalar or a vector type; sigmoid(V) and
// tangent(V) -> {value, slope}, the logistic function and tanh, must have been declared before.

template <class V>
LF_HD V lstm_state(const V (&a)[4], V c) {
    return sigmoid(a[1]).value * c + sigmoid(a[0]).value * tangent(a[2]).value;
}

template <class V>
LF_HD void lstm_forward(const V (&a)[4], V c, V& c_new, V& h) {
    c_new = lstm_state(a, c);
    h = sigmoid(a[3]).value * tangent(c_new).value;
}

// The same with a normalised cell, in two steps: h holds s(o) in between.
template <class V>
LF_HD void normalised_cell_forward(const V (&a)[4], V c, V& c_new, V& h) {
    c_new = lstm_state(a, c);
    h = sigmoid(a[3]).value;
}
template <class V>
LF_HD V normalised_cell_output(V o, V c_hat, V weight, V bias) {
    return o * tangent(weight * c_hat + bias).value;
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

// With a normalised cell, in two steps again: of n and the output gate, then of the others from the whole gradient of
// c'.
template <class V>
LF_HD void normalised_cell_output_backward(V grad_h, V a_o, V c_hat, V weight, V bias, V& grad_a_o, V& grad_n) {
    const auto o = sigmoid(a_o), t = tangent(weight * c_hat + bias);
    grad_a_o = grad_h * t.value * o.slope;
    grad_n = grad_h * o.value * t.slope;
}
template <class V>
LF_HD void normalised_cell_backward(V total, const V (&a)[4], V c, V (&grad_a)[4], V& grad_c) {
    const auto i = sigmoid(a[0]), f = sigmoid(a[1]), g = tangent(a[2]);
    grad_a[0] = total * g.value * i.slope;
    grad_a[1] = total * c * f.slope;
    grad_a[2] = total * i.value * g.slope;
    grad_c = total * f.value;
}

// The gradient of x, with the means over what is normalised together of w grad_a and of w grad_a x_hat.
template <class V>
LF_HD V normalised_backward(V grad_a, V x_hat, V weight, V rstd, V mean, V projection) {
    return rstd * (weight * grad_a - mean - x_hat * projection);
}

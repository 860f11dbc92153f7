// A Ladder encoder layer after its linear map (Rasmus et al. 2015, Algorithm 1), one element at a time:
//
//   z = (x - mean) rstd + std noise        rstd = 1 / sqrt(var + eps)
//   h = act(gamma (z + beta))
//
// Textual header without an include guard, like combinator.h. V is a scalar or a vector type; where_not_positive(V
// test, V a, V b), a where test <= 0 and b elsewhere (also where test is NaN), and zero_like(V) must have been declared
// before.

enum EncoderActivation { kIdentity = 0, kRelu = 1, kLeakyRelu = 2 };

template <class V>
struct EncoderColumn {
    V mean, rstd, beta, gamma;  // of one part and channel; beta 0 and gamma 1 where there are none
};

template <class V>
LF_HD V encoder_z(V x, V scaled_noise, const EncoderColumn<V>& p) {
    return (x - p.mean) * p.rstd + scaled_noise;
}

template <int activation, class V>
LF_HD V encoder_h(V z, V negative_slope, const EncoderColumn<V>& p) {
    const V a = (z + p.beta) * p.gamma;
    if (activation == kRelu) return where_not_positive(a, zero_like(a), a);
    if (activation == kLeakyRelu) return where_not_positive(a, a * negative_slope, a);
    return a;
}

// What reaches the normalised x, and what the element adds to the gradients of beta and gamma.
template <int activation, class V>
LF_HD V encoder_backward(V grad_z, V grad_h, V z, V negative_slope, const EncoderColumn<V>& p, V& for_beta,
                         V& for_gamma) {
    V t = grad_h;
    if (activation != kIdentity) {
        const V a = (z + p.beta) * p.gamma;
        t = where_not_positive(a, activation == kRelu ? zero_like(t) : t * negative_slope, t);
    }
    for_beta = t * p.gamma;
    for_gamma = t * (z + p.beta);
    return grad_z + for_beta;
}

// With g the result above and n elements in the column, grad_x = rstd g + at_mean + slope (x - mean), the last two from
// sum g, sum g (x - mean) rstd, and the gradients of mean and var.
template <class V>
LF_HD void encoder_finish(V sum, V sum_x, V grad_mean, V grad_var, V rstd, V inverse_n, V& at_mean, V& slope) {
    at_mean = (grad_mean - rstd * sum) * inverse_n;
    slope = (grad_var * 2.0f - rstd * rstd * sum_x) * inverse_n;
}

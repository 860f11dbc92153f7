// A Ladder decoder layer after its linear map (Rasmus et al. 2015, Algorithm 1), one element at a time:
//
//   v     = (u - mean_u) rstd_u                  u normalised with the batch's own statistics
//   z_hat = g(z, v)                              combinator.h, which is included before this
//   d     = (z_hat - mean) rstd - clean_z        rstd = 1 / sqrt(var + eps); layer 0: mean 0, rstd 1
//   cost  = sum of d^2 / elements
//
// Textual header without an include guard, like combinator.h. V is a scalar or a vector type.

template <class V>
struct DecoderColumn {
    V mean_u, rstd_u;  // of the layer's u
    V mean, rstd;      // of the clean z; 0 and 1 at layer 0
};

template <class V>
LF_HD V decoder_normal(V u, const DecoderColumn<V>& p) {
    return (u - p.mean_u) * p.rstd_u;
}

template <class V>
LF_HD V decoder_error(V z_hat, V clean_z, const DecoderColumn<V>& p) {
    return (z_hat - p.mean) * p.rstd - clean_z;
}

// The cost's share in the backward pass. `scale` is 2 grad_cost / elements. Returns what is added to grad_z_hat, sets
// grad_clean_z, and adds to the column's sums what becomes, through decoder_finish_cost, the gradients of mean and var.
template <class V>
LF_HD V decoder_cost_backward(V z_hat, V clean_z, V scale, const DecoderColumn<V>& p, V& grad_clean_z, V& sum,
                              V& sum_z) {
    const V normal = (z_hat - p.mean) * p.rstd;
    const V grad = (normal - clean_z) * scale;
    grad_clean_z = zero_like(grad) - grad;
    sum = sum + grad;
    sum_z = sum_z + grad * normal;
    return grad * p.rstd;
}

template <class V>
LF_HD void decoder_finish_cost(V sum, V sum_z, V rstd, V& grad_mean, V& grad_var) {
    grad_mean = zero_like(sum) - sum * rstd;
    grad_var = sum_z * rstd * rstd * -0.5f;
}

"""One step of the layer-normalised ConvLSTM in plain PyTorch: executable specification, fallback and yardstick."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Inputs = Tensor | Sequence[Tensor]


def several(value: Inputs) -> tuple[Tensor, ...]:
    """One tensor, or one for each input."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def per_channel(vector: Tensor, ndim: int) -> Tensor:
    """(4C,) or (S, 4C), shaped to broadcast over gates with `ndim` axes."""
    ones = [1] * (ndim - vector.dim() - 1)
    return vector.reshape(*vector.shape[:-1], 1, vector.shape[-1], *ones)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]


def _normalised(x: Tensor, channel: int, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std and 1 / std, over the channels and positions of each sample."""
    axes = tuple(range(channel, x.dim()))
    if x.numel() == 0:
        return x, x.new_zeros(x.shape[:channel] + (1,) * len(axes))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    return (x - mean) * rstd, rstd


def ln_convlstm_step(
    gates_in: Inputs,
    gates_rec: Tensor,
    c: Tensor,
    weight: Inputs | None,
    bias: Inputs | None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(h, c) after one step; shapes and meaning as `ladderfast.ops.ln_convlstm_step`.

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    dtype = c.dtype
    xs, weights, biases = (() if t is None else several(t) for t in (gates_in, weight, bias))
    channel = next((t.dim() for t in (*weights, *biases)), 1)
    a, c, *xs = _wide(gates_rec, c, *xs)  # type: ignore[assignment]
    if weights:
        for x, w in zip(xs, _wide(*weights), strict=True):
            a = a + _normalised(x, channel, eps)[0] * per_channel(w, x.dim())
    else:
        a = sum(xs, a)
    for b in _wide(*biases):
        a = a + per_channel(b, a.dim())
    i, f, g, o = a.chunk(4, channel)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h.to(dtype), c.to(dtype)


def ln_convlstm_step_backward(
    grad_h: Tensor,
    grad_c_new: Tensor,
    gates_in: Sequence[Tensor],
    gates_rec: Tensor,
    c: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Gradients with respect to each of gates_in, gates_rec, c, each of weight (none: not normalised) and bias, in
    operations that are differentiable in their turn."""
    dtype, param_dtype = c.dtype, bias.dtype
    channel = bias.dim()
    grad_h, grad_c_new, a, c, bias = _wide(grad_h, grad_c_new, gates_rec, c, bias)
    xs = _wide(*gates_in)
    weights = [per_channel(w, a.dim()) for w in _wide(*weight)]
    normalised = [_normalised(x, channel, eps) for x in xs] if weights else []
    a = a + per_channel(bias, a.dim())
    if weights:
        for (x_hat, _), w in zip(normalised, weights, strict=True):
            a = a + x_hat * w
    else:
        a = sum(xs, a)

    i, f, g, o = a.chunk(4, channel)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    t = torch.tanh(f * c + i * g)
    grad_c = grad_c_new + grad_h * o * (1 - t * t)
    grad_a = torch.cat(
        [
            grad_c * g * i * (1 - i),
            grad_c * c * f * (1 - f),
            grad_c * i * (1 - g * g),
            grad_h * t * o * (1 - o),
        ],
        channel,
    )

    # Everything but the channel axis (and the seeds in front of it) is summed.
    summed = [axis for axis in range(channel - 1, a.dim()) if axis != channel]
    sample = tuple(range(channel, a.dim()))
    grads_x, grads_w = [], []
    for (x_hat, rstd), w in zip(normalised, weights, strict=True):
        grad_hat = grad_a * w
        grads_w.append((grad_a * x_hat).sum(summed).to(param_dtype))
        if a.numel() > 0:
            mean = grad_hat.mean(sample, keepdim=True)
            projection = (grad_hat * x_hat).mean(sample, keepdim=True)
            grad_hat = rstd * (grad_hat - mean - x_hat * projection)
        grads_x.append(grad_hat.to(dtype))
    if not weights:
        grads_x = [grad_a.to(dtype) for _ in xs]
    grad_bias = grad_a.sum(summed).to(param_dtype)
    return (*grads_x, grad_a.to(dtype), (grad_c * f).to(dtype), *grads_w, grad_bias)

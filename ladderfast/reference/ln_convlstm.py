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


def over(x: Tensor, channel: int, norm: str) -> tuple[int, ...]:
    """The axes that are normalised together: of a sample, or all but the channels (and the seeds in front)."""
    if norm == "batch":
        return tuple(axis for axis in range(channel - 1, x.dim()) if axis != channel)
    return tuple(range(channel, x.dim()))


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std and 1 / std, over these axes."""
    if x.numel() == 0:
        return x, x.new_zeros([1 if k in axes else size for k, size in enumerate(x.shape)])
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    return (x - mean) * rstd, rstd


def _normalised_backward(grad: Tensor, x_hat: Tensor, rstd: Tensor, axes: tuple[int, ...]) -> Tensor:
    if grad.numel() == 0:
        return grad
    mean, projection = (t.mean(axes, keepdim=True) for t in (grad, grad * x_hat))
    return rstd * (grad - mean - x_hat * projection)


def batch_statistics(gates_in: Inputs, channel: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (inputs, 4C), or (S, inputs, 4C), of each input by channel; float32 for 16-bit inputs."""
    found = []
    for x in _wide(*several(gates_in)):
        axes = over(x, channel, "batch")
        empty = x.new_zeros([size for k, size in enumerate(x.shape) if k not in axes])
        found.append(
            (empty, empty) if x.numel() == 0 else torch.var_mean(x.detach(), axes, correction=0)[::-1]
        )
    mean, var = (torch.stack(each, channel - 1) for each in zip(*found, strict=True))
    return mean, var


def ln_convlstm_step(
    gates_in: Inputs,
    gates_rec: Tensor,
    c: Tensor,
    weight: Inputs | None,
    bias: Inputs | None,
    *,
    eps: float = 1e-5,
    norm: str = "layer",
    cell_weight: Tensor | None = None,
    cell_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(h, c) after one step, with norm "batch" also the statistics; shapes and meaning as
    `ladderfast.ops.ln_convlstm_step`.

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    dtype = c.dtype
    xs, weights, biases = (() if t is None else several(t) for t in (gates_in, weight, bias))
    cells = [t for t in (cell_weight, cell_bias) if t is not None]
    channel = next((t.dim() for t in (*weights, *biases, *cells)), 1)
    a, c, *xs = _wide(gates_rec, c, *xs)  # type: ignore[assignment]
    if weights:
        for x, w in zip(xs, _wide(*weights), strict=True):
            a = a + _normalised(x, over(x, channel, norm), eps)[0] * per_channel(w, x.dim())
    else:
        a = sum(xs, a)
    for b in _wide(*biases):
        a = a + per_channel(b, a.dim())
    i, f, g, o = a.chunk(4, channel)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    n = c
    if cells:
        gain, *shift = (per_channel(v, c.dim()) for v in _wide(*cells))
        n = _normalised(c, over(c, channel, "layer"), eps)[0] * gain
        n = n + shift[0] if shift else n
    h = torch.sigmoid(o) * torch.tanh(n)
    result = h.to(dtype), c.to(dtype)
    return (*result, *batch_statistics(xs, channel)) if norm == "batch" else result


def ln_convlstm_step_backward(
    grad_h: Tensor,
    grad_c_new: Tensor,
    gates_in: Sequence[Tensor],
    gates_rec: Tensor,
    c: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor,
    cell: Sequence[Tensor] = (),
    *,
    eps: float = 1e-5,
    norm: str = "layer",
) -> tuple[Tensor, ...]:
    """Gradients with respect to each of gates_in, gates_rec, c, each of weight (none: not normalised), bias and each of
    `cell` = (cell_weight, cell_bias) or nothing, in operations that are differentiable in their turn."""
    dtype, param_dtype = c.dtype, bias.dtype
    channel = bias.dim()
    together = over(gates_rec, channel, norm)
    grad_h, grad_c_new, a, c, bias = _wide(grad_h, grad_c_new, gates_rec, c, bias)
    xs = _wide(*gates_in)
    weights = [per_channel(w, a.dim()) for w in _wide(*weight)]
    normalised = [_normalised(x, together, eps) for x in xs] if weights else []
    a = a + per_channel(bias, a.dim())
    if weights:
        for (x_hat, _), w in zip(normalised, weights, strict=True):
            a = a + x_hat * w
    else:
        a = sum(xs, a)

    i, f, g, o = a.chunk(4, channel)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    # Everything but the channel axis (and the seeds in front of it) is summed for the parameters.
    summed = over(a, channel, "batch")
    after = f * c + i * g
    grads_cell = []
    if cell:
        w, b = (per_channel(v, c.dim()) for v in _wide(*cell))
        sample = over(after, channel, "layer")
        c_hat, rstd = _normalised(after, sample, eps)
        t = torch.tanh(c_hat * w + b)
        grad_n = grad_h * o * (1 - t * t)
        grads_cell = [
            (grad_n * c_hat).sum(summed).to(cell[0].dtype),
            grad_n.sum(summed).to(cell[1].dtype),
        ]
        grad_c = grad_c_new + _normalised_backward(grad_n * w, c_hat, rstd, sample)
    else:
        t = torch.tanh(after)
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

    grads_x, grads_w = [], []
    for (x_hat, rstd), w in zip(normalised, weights, strict=True):
        grad_hat = grad_a * w
        grads_w.append((grad_a * x_hat).sum(summed).to(param_dtype))
        grads_x.append(_normalised_backward(grad_hat, x_hat, rstd, together).to(dtype))
    if not weights:
        grads_x = [grad_a.to(dtype) for _ in xs]
    grad_bias = grad_a.sum(summed).to(param_dtype)
    return (*grads_x, grad_a.to(dtype), (grad_c * f).to(dtype), *grads_w, grad_bias, *grads_cell)

"""A Ladder encoder layer after its linear map, in plain PyTorch: executable specification, fallback and yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

from ladderfast.reference.noise import noise_like

ACTIVATIONS = ("identity", "relu", "leaky_relu")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, *) over everything but channels; of nothing, 0 and 0.

    The mean is taken relative to the first sample, and the variance about the mean: a channel that is constant has
    variance 0 exactly, and a large mean costs no digits of the variance.
    """
    if x.numel() == 0:
        return x.sum([0, *range(2, x.dim())]), x.sum([0, *range(2, x.dim())])
    rows = x.movedim(1, -1).flatten(0, -2)
    first = rows[0].detach()
    shifted = rows - first
    mean = shifted.mean(0)
    return first + mean, (shifted - mean).square().mean(0)


def over_channels(v: Tensor, x: Tensor) -> Tensor:
    """v (C,), shaped to broadcast over x (N, C, *)."""
    return v.reshape(-1, *[1] * (x.dim() - 2))


def normalise(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps), by channel."""
    return (x - over_channels(mean, x)) / over_channels((var + eps).sqrt(), x)


def activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "relu":
        return torch.relu(x)
    if activation == "leaky_relu":
        return torch.where(x > 0, x, x * negative_slope)
    return x


def ladder_encoder(
    z_pre: Tensor,
    num_labelled: int,
    *,
    num_clean: int = 0,
    beta: Tensor | None = None,
    gamma: Tensor | None = None,
    noise_std: float = 0.0,
    noise_state: Tensor | None = None,
    noise_stream: int = 0,
    activation: str = "identity",
    negative_slope: float = 0.1,
    eps: float = 1e-10,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, h, mean and var; shapes and meaning as `ladderfast.ops.ladder_encoder`.

    16-bit inputs are computed in float32; z and h are rounded once, at the end, and the statistics not at all.
    """
    dtype = z_pre.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    x = z_pre.float() if half else z_pre
    noisy = len(x) - num_clean
    sizes = [num_labelled, noisy - num_labelled, *[num_clean] * (num_clean > 0)]
    parts = x.split(sizes)
    statistics = [moments(part) for part in parts]
    z = torch.cat([normalise(p, *s, eps) for p, s in zip(parts, statistics, strict=True)])
    if noise_std > 0 and noise_state is not None:
        noise = noise_like(z_pre, noise_state, noise_stream).to(z.dtype)
        z = (
            torch.cat([z[:noisy] + noise_std * noise[:noisy], z[noisy:]])
            if num_clean
            else z + noise_std * noise
        )
    h = z
    if beta is not None:
        h = h + over_channels(beta.to(h.dtype), h)
    if gamma is not None:
        h = h * over_channels(gamma.to(h.dtype), h)
    h = activate(h, activation, negative_slope)
    mean, var = (torch.stack(values) for values in zip(*statistics, strict=True))
    return z.to(dtype), h.to(dtype), mean, var

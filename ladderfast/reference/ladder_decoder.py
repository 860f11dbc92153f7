"""A Ladder decoder layer after its linear map, in plain PyTorch: executable specification, fallback and yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

from ladderfast.reference.combinator import gaussian_combinator
from ladderfast.reference.ladder_encoder import moments, normalise


def denoising_cost(
    z_hat: Tensor, clean_z: Tensor, mean: Tensor | None, var: Tensor | None, eps: float = 1e-10
) -> Tensor:
    """Mean over samples and units of (clean_z - (z_hat - mean) / sqrt(var + eps))^2; without mean and var of
    (clean_z - z_hat)^2. 0-dim; 0 where there is nothing to average."""
    if mean is not None and var is not None:
        z_hat = normalise(z_hat, mean, var, eps)
    squares = (clean_z - z_hat).square()
    return squares.mean() if squares.numel() else squares.sum()


def ladder_decoder(
    u: Tensor,
    z: Tensor,
    params: Tensor,
    clean_z: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    squash_v: bool = False,
    eps: float = 1e-10,
) -> tuple[Tensor, Tensor | None]:
    """z_hat and the cost; shapes and meaning as `ladderfast.ops.ladder_decoder`.

    16-bit inputs are computed in float32; z_hat is rounded once, at the end, and the cost, taken from z_hat before that
    rounding, not at all.
    """
    dtype = u.dtype
    if dtype in (torch.bfloat16, torch.float16):
        u, z, params = u.float(), z.float(), params.float()
        clean_z = None if clean_z is None else clean_z.float()
    z_hat = gaussian_combinator(z, normalise(u, *moments(u), eps), params, squash_v=squash_v)
    cost = None if clean_z is None else denoising_cost(z_hat, clean_z, mean, var, eps)
    return z_hat.to(dtype), cost

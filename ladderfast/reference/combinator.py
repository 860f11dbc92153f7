"""The Gaussian combinator in plain PyTorch: executable specification, fallback and yardstick."""

from __future__ import annotations

import torch
from torch import Tensor


def per_channel(params: Tensor, ndim: int) -> tuple[Tensor, ...]:
    """The ten rows of `params` (10, C) or (S, 10, C), shaped to broadcast over z with `ndim` axes."""
    ones = [1] * (ndim - params.dim())
    return tuple(row.reshape(*row.shape[:-1], 1, row.shape[-1], *ones) for row in params.unbind(-2))


def gaussian_combinator(z: Tensor, u: Tensor, params: Tensor, *, squash_v: bool = False) -> Tensor:
    """g(z, u) = (z - mu(u)) v(u) + mu(u); shapes and meaning as `ladderfast.ops.gaussian_combinator`.

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    dtype = z.dtype
    if dtype in (torch.bfloat16, torch.float16):
        z, u, params = z.float(), u.float(), params.float()
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = per_channel(params, z.dim())
    mu = a1 * torch.sigmoid(a2 * u + a3) + a4 * u + a5
    v = a6 * torch.sigmoid(a7 * u + a8) + a9 * u + a10
    if squash_v:
        v = torch.sigmoid(v)
    return ((z - mu) * v + mu).to(dtype)


def gaussian_combinator_backward(
    grad_z_hat: Tensor, z: Tensor, u: Tensor, params: Tensor, *, squash_v: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to z, u and params, in operations that are differentiable in their turn."""
    dtypes = z.dtype, u.dtype, params.dtype
    if z.dtype in (torch.bfloat16, torch.float16):
        grad_z_hat, z, u, params = (t.float() for t in (grad_z_hat, z, u, params))
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = per_channel(params, z.dim())
    s_mu = torch.sigmoid(a2 * u + a3)
    s_v = torch.sigmoid(a7 * u + a8)
    mu = a1 * s_mu + a4 * u + a5
    v = a6 * s_v + a9 * u + a10
    grad_v = grad_z_hat * (z - mu)
    if squash_v:
        v = torch.sigmoid(v)
        grad_v = grad_v * v * (1 - v)
    grad_mu = grad_z_hat * (1 - v)
    grad_arg_mu = grad_mu * a1 * s_mu * (1 - s_mu)
    grad_arg_v = grad_v * a6 * s_v * (1 - s_v)
    grad_u = grad_arg_mu * a2 + grad_mu * a4 + grad_arg_v * a7 + grad_v * a9

    # Everything but the channel axis (and the seeds in front of it) is summed.
    channel = params.dim() - 1
    axes = [axis for axis in range(channel - 1, z.dim()) if axis != channel]
    rows = (
        grad_mu * s_mu,
        grad_arg_mu * u,
        grad_arg_mu,
        grad_mu * u,
        grad_mu,
        grad_v * s_v,
        grad_arg_v * u,
        grad_arg_v,
        grad_v * u,
        grad_v,
    )
    grad_params = torch.stack([row.sum(axes) for row in rows], dim=-2)
    return (grad_z_hat * v).to(dtypes[0]), grad_u.to(dtypes[1]), grad_params.to(dtypes[2])

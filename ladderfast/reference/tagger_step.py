"""What surrounds the network in one of Tagger's iterations, in plain PyTorch: executable specification, fallback and
yardstick, on the formulas of `tagger`.

The scalars have no axis and the vectors (D,), or both an axis of seeds in front: row n then uses entry n // (N / S).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ladderfast.reference import tagger


def _step_inputs(quantities: Any, x: Tensor, z: Tensor, mask_logits: Tensor, scalar: Tensor) -> Tensor:
    dtype = z.dtype
    x, z, mask_logits, scalar = tagger.widened(x, z, mask_logits, scalar)
    m = torch.softmax(mask_logits, 1)
    out = torch.cat((z, m, *quantities(x, z, m, scalar)), 2)
    return out.reshape(z.shape[0] * z.shape[1], 4 * z.shape[2]).to(dtype)


def gaussian_step_inputs(x: Tensor, z: Tensor, mask_logits: Tensor, variance: Tensor) -> Tensor:
    """(N K, 4 D); shapes and meaning as `ladderfast.ops.gaussian_step_inputs`."""
    return _step_inputs(tagger.gaussian_group_inputs, x, z, mask_logits, variance)


def bernoulli_step_inputs(x: Tensor, z: Tensor, mask_logits: Tensor, flip_prob: Tensor) -> Tensor:
    """(N K, 4 D); shapes and meaning as `ladderfast.ops.bernoulli_step_inputs`."""
    return _step_inputs(tagger.bernoulli_group_inputs, x, z, mask_logits, flip_prob)


def _normalised(t: Tensor, seeds: int, eps: float) -> Tensor:
    """(S, N / S, K, D), normalised over rows and groups of a seed."""
    t = t.reshape(seeds, t.shape[0] // max(seeds, 1), *t.shape[1:])
    if t.numel() == 0:
        return t
    var, mean = torch.var_mean(t, (1, 2), correction=0, keepdim=True)
    return (t - mean) * torch.rsqrt(var + eps)


def _step_outputs(
    z_pre: Tensor, mask_pre: Tensor, z_weight: Tensor, z_bias: Tensor, mask_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """c1 z_hat + b1 and the logits c2 m_hat."""
    seeds = mask_weight.numel()
    weight, bias = (t.reshape(seeds, 1, 1, z_pre.shape[2]) for t in (z_weight, z_bias))
    z = _normalised(z_pre, seeds, eps) * weight + bias
    logits = _normalised(mask_pre, seeds, eps) * mask_weight.reshape(seeds, 1, 1, 1)
    return z.reshape(z_pre.shape), logits.reshape(mask_pre.shape)


def gaussian_step_outputs(
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    variance: Tensor,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mask logits and cost; shapes and meaning as `ladderfast.ops.gaussian_step_outputs`."""
    dtype = z_pre.dtype
    x, z_pre, mask_pre, z_weight, z_bias, mask_weight, variance = tagger.widened(
        x, z_pre, mask_pre, z_weight, z_bias, mask_weight, variance
    )
    z, logits = _step_outputs(z_pre, mask_pre, z_weight, z_bias, mask_weight, eps)
    v = tagger.by_row(variance, z)
    joint = torch.log_softmax(logits, 1) - (x.unsqueeze(1) - z).square() / (2 * v)
    nll = (0.5 * torch.log(2 * math.pi * v)).reshape(-1, 1) - torch.logsumexp(joint, 1)
    return z.to(dtype), logits.to(dtype), nll.to(dtype)


def bernoulli_step_outputs(
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mask logits and cost; shapes and meaning as `ladderfast.ops.bernoulli_step_outputs`."""
    dtype = z_pre.dtype
    x, z_pre, mask_pre, z_weight, z_bias, mask_weight = tagger.widened(
        x, z_pre, mask_pre, z_weight, z_bias, mask_weight
    )
    z, logits = _step_outputs(z_pre, mask_pre, z_weight, z_bias, mask_weight, eps)
    z = torch.sigmoid(z)
    nll = tagger.bernoulli_mixture_nll(x, z, torch.softmax(logits, 1))
    return z.to(dtype), logits.to(dtype), nll.to(dtype)


def backward(function: Any, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients with respect to the inputs of one of these functions, in operations that are differentiable in their
    turn."""
    out, pullback = torch.func.vjp(function, *inputs)[:2]
    return pullback(grads[0] if isinstance(out, Tensor) else grads)

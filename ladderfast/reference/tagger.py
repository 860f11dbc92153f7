"""Tagger's per-group quantities in plain PyTorch: executable specification, fallback and yardstick.

The scalar (`variance`, `flip_prob`) has no axis, or one of seeds, (S,): row n then uses entry n // (N / S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLIP = 1e-4  # probabilities of a pixel are kept this far from 0 and 1, as in the published code
POLE = CLIP / 2  # least |denominator| of the binary dz; only an x between 0 and 1 comes that near
FLOOR = 1e-30  # least likelihood of a pixel that enters a ratio of likelihoods


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """16-bit tensors as float32, so that there is one rounding, at the end."""
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def by_row(scalar: Tensor, z: Tensor) -> Tensor:
    """The scalar, shaped to broadcast over z (N, K, D)."""
    if scalar.dim() == 0:
        return scalar
    return scalar.repeat_interleave(z.shape[0] // max(scalar.shape[0], 1)).reshape(-1, 1, 1)


def _sum_for(scalar: Tensor, terms: Tensor) -> Tensor:
    """Sums of terms (N, ...) over everything that shares an entry of the scalar."""
    if scalar.dim() == 0:
        return terms.sum()
    seeds = scalar.shape[0]
    return terms.flatten(1).sum(1).reshape(seeds, terms.shape[0] // max(seeds, 1)).sum(1)


def gaussian_group_inputs(x: Tensor, z: Tensor, m: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """dz and likelihood of the continuous case; shapes and meaning as `ladderfast.ops.gaussian_group_inputs`."""
    dtype = z.dtype
    x, z, m, variance = widened(x, z, m, variance)
    v = by_row(variance, z)
    e = x.unsqueeze(1) - z
    q = e.square() / (2 * v)
    density = torch.exp(-q) * torch.rsqrt(2 * math.pi * v)
    return (e * m * density).to(dtype), torch.softmax(-q, 1).to(dtype)


def gaussian_group_inputs_backward(
    grad_dz: Tensor, grad_likelihood: Tensor, x: Tensor, z: Tensor, m: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z, m and variance, in operations that are differentiable in their turn."""
    dtype, variance_dtype = z.dtype, variance.dtype
    g, h, x, z, m, variance = widened(grad_dz, grad_likelihood, x, z, m, variance)
    v = by_row(variance, z)
    e = x.unsqueeze(1) - z
    two_q = e.square() / v
    grad_m = g * e * torch.exp(-two_q / 2) * torch.rsqrt(2 * math.pi * v)
    likelihood = torch.softmax(-two_q / 2, 1)
    a = likelihood * (h - (likelihood * h).sum(1, keepdim=True))  # gradient of the log-likelihoods
    density = torch.exp(-two_q / 2) * torch.rsqrt(2 * math.pi * v)
    grad_e = g * m * density * (1 - two_q) - a * e / v
    grad_variance = _sum_for(variance, (a * two_q + grad_m * m * (two_q - 1)) / (2 * v))
    return grad_e.sum(1).to(dtype), -grad_e.to(dtype), grad_m.to(dtype), grad_variance.to(variance_dtype)


def _bernoulli(x: Tensor, z: Tensor, m: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """xi, its mixture, the denominator of dz, the likelihoods of the pixel."""
    x = x.unsqueeze(1)
    xi = z * (1 - 2 * b) + b
    s = (xi * m).sum(1, keepdim=True)
    t = (x - 1) + s.clamp(CLIP, 1 - CLIP)
    t = torch.where(t < 0, t.clamp(max=-POLE), t.clamp(min=POLE))
    return xi, s, t, ((1 - x) + xi * (2 * x - 1)).clamp(min=FLOOR)


def bernoulli_group_inputs(x: Tensor, z: Tensor, m: Tensor, flip_prob: Tensor) -> tuple[Tensor, Tensor]:
    """dz and likelihood of the binary case; shapes and meaning as `ladderfast.ops.bernoulli_group_inputs`."""
    dtype = z.dtype
    x, z, m, flip_prob = widened(x, z, m, flip_prob)
    _, _, t, pixel = _bernoulli(x, z, m, by_row(flip_prob, z))
    return (m / t).to(dtype), (pixel / pixel.sum(1, keepdim=True)).to(dtype)


def bernoulli_group_inputs_backward(
    grad_dz: Tensor, grad_likelihood: Tensor, x: Tensor, z: Tensor, m: Tensor, flip_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z and m, in operations that are differentiable in their turn."""
    dtype = z.dtype
    g, h, x, z, m, flip_prob = widened(grad_dz, grad_likelihood, x, z, m, flip_prob)
    b = by_row(flip_prob, z)
    xi, s, t, pixel = _bernoulli(x, z, m, b)
    sign = 2 * x.unsqueeze(1) - 1
    grad_t = -(g * m).sum(1, keepdim=True) / t.square() * (t.abs() > POLE)
    grad_s = grad_t * ((s >= CLIP) & (s <= 1 - CLIP))
    total = pixel.sum(1, keepdim=True)
    grad_pixel = (h - (pixel * h).sum(1, keepdim=True) / total) / total * (pixel > FLOOR)
    grad_x = grad_t.squeeze(1) + (grad_pixel * (2 * xi - 1)).sum(1)
    grad_z = (grad_s * m + grad_pixel * sign) * (1 - 2 * b)
    return grad_x.to(dtype), grad_z.to(dtype), (g / t + grad_s * xi).to(dtype)


def _responsibilities(x: Tensor, z: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """x - z, the log-densities less their constant, an offset, exp(log-density - offset), their sum over masks.

    The offset is the largest log of mask times density. A group of mask 0 may lie above it by any amount: there the
    exponential is held at a quarter of the largest number.
    """
    e = x.unsqueeze(1) - z
    y = -e.square() / (2 * v)
    finfo = torch.finfo(z.dtype)
    with torch.no_grad():
        log_m = torch.log(m.clamp(min=finfo.tiny))
        top = torch.where(m > 0, y + log_m, -math.inf).amax(1, keepdim=True)
    w = torch.exp((y - top).clamp(max=math.log(finfo.max) - math.log(4)))
    return e, y, top, w, (m * w).sum(1, keepdim=True)


def gaussian_mixture_nll(x: Tensor, z: Tensor, m: Tensor, variance: Tensor) -> Tensor:
    """-log sum_k m_k Normal(x; z_k, variance); shapes and meaning as `ladderfast.ops.gaussian_mixture_nll`."""
    dtype = z.dtype
    x, z, m, variance = widened(x, z, m, variance)
    v = by_row(variance, z)
    _, _, top, _, total = _responsibilities(x, z, m, v)
    return (0.5 * torch.log(2 * math.pi * v) - top - torch.log(total)).squeeze(1).to(dtype)


def gaussian_mixture_nll_backward(
    grad: Tensor, x: Tensor, z: Tensor, m: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z, m and variance, in operations that are differentiable in their turn.

    That of a mask of 0 is held within a quarter of the largest number.
    """
    dtype, variance_dtype = z.dtype, variance.dtype
    grad, x, z, m, variance = widened(grad, x, z, m, variance)
    v = by_row(variance, z)
    e, y, _, w, total = _responsibilities(x, z, m, v)
    g = grad.unsqueeze(1)
    limit = torch.finfo(z.dtype).max / 4
    grad_m = (-g * (w / total)).clamp(-limit, limit)
    share = m * w / total
    grad_e = g * share * e / v
    grad_variance = _sum_for(variance, g * (0.5 + (share * y).sum(1, keepdim=True)) / v)
    return grad_e.sum(1).to(dtype), -grad_e.to(dtype), grad_m.to(dtype), grad_variance.to(variance_dtype)


def bernoulli_mixture_nll(x: Tensor, z: Tensor, m: Tensor) -> Tensor:
    """Cross-entropy of x under sum_k m_k z_k; shapes and meaning as `ladderfast.ops.bernoulli_mixture_nll`."""
    dtype = z.dtype
    x, z, m = widened(x, z, m)
    p = (m * z).sum(1).clamp(CLIP, 1 - CLIP)
    return (-x * torch.log(p) - (1 - x) * torch.log1p(-p)).to(dtype)


def bernoulli_mixture_nll_backward(
    grad: Tensor, x: Tensor, z: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z and m, in operations that are differentiable in their turn."""
    dtype = z.dtype
    grad, x, z, m = widened(grad, x, z, m)
    s = (m * z).sum(1)
    p = s.clamp(CLIP, 1 - CLIP)
    grad_s = grad * ((1 - x) / (1 - p) - x / p) * ((s >= CLIP) & (s <= 1 - CLIP))
    grad_s = grad_s.unsqueeze(1)
    return (
        (grad * (torch.log1p(-p) - torch.log(p))).to(dtype),
        (grad_s * m).to(dtype),
        (grad_s * z).to(dtype),
    )

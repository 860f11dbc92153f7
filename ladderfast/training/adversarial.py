"""Adversarial noise on the input: the direction in which the supervised cost grows fastest.

Source: Maroñas, "Adversarial Learning with Ladder Networks", 2016, for the four kinds; the sign of the gradient is
that of Goodfellow et al. 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderfast.reference.tagger import widened

KINDS = ("sign", "raw", "unit_norm", "q_norm")


def input_gradient(logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
    """Gradient of the mean cross-entropy of logits(x) with respect to x (N, *).

    y: (N,) class labels; None takes the largest logit of each sample, the network's own (virtual) label. Nothing flows
    back through the result. Under torch.func.vmap it is the gradient of each network.
    """

    def cost(x: Tensor) -> Tensor:
        (out,) = widened(logits(x))
        return F.cross_entropy(out, out.detach().argmax(1) if y is None else y)

    with torch.no_grad():
        return torch.func.grad(cost)(x.detach()).detach()


def adversarial_noise(gradient: Tensor, kind: str, tau: float) -> Tensor:
    """The noise u (N, *) of one kind and strength, from a gradient g of the same shape.

        sign        tau sign(g)
        raw         tau g
        unit_norm   tau g / |g|                 by sample
        q_norm      tau sqrt(k) g / |g|         by sample of k values: the power that `sign` has

    A sample whose gradient is zero gets no noise. tau in the input's units.

    Raises ValueError for another kind, and for a tau that is negative or not finite.
    """
    check_kind("kind", kind)
    check_tau("tau", tau)
    if kind == "sign":
        return tau * gradient.sign()
    if kind == "raw":
        return tau * gradient
    flat = gradient.flatten(1)
    # By the largest value first, whose square neither overflows nor vanishes.
    tiny = torch.finfo(flat.dtype).tiny
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)
    norm = flat.norm(dim=1, keepdim=True)
    factor = tau * (flat.shape[1] ** 0.5 if kind == "q_norm" else 1.0)
    return (factor * flat / norm.clamp_min(tiny)).reshape(gradient.shape)


def check_tau(name: str, tau: float) -> None:
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {tau}")


def check_kind(name: str, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{name} must be one of {', '.join(KINDS)}, got {kind!r}")

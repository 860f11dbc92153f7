"""A Ladder decoder layer after its linear map: checks, registration, autograd and backend choice."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ladderfast.ops.checks import autocast_promote, check_dtype, shape_text
from ladderfast.reference import ladder_decoder as reference


class LadderDecoderOutput(NamedTuple):
    """What `ladder_decoder` returns."""

    z_hat: Tensor
    """(N, C, *) the reconstruction of the lateral values."""
    cost: Tensor | None
    """0-dim, the layer's mean squared error, unweighted; float32 or wider. None without clean_z."""


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
) -> LadderDecoderOutput:
    """What follows the linear map of a Ladder's decoder layer, in one op.

        u_n   = (u - mean(u)) / sqrt(var(u) + eps)         the batch's own statistics, by channel; biased variance
        z_hat = g(z, u_n)                                  `gaussian_combinator`
        cost  = mean of (clean_z - (z_hat - mean) / sqrt(var + eps))^2        over samples, units and positions

    Args:
        u: (N, C, *) the decoder's linear map of the layer above, before its normalisation.
        z: (N, C, *) lateral values, corrupted.
        params: (10, C) the combinator's a1 .. a10.
        clean_z: (N, C, *) what z_hat is compared with: the clean pass's normalised values, at layer 0 the input. None:
            no cost is wanted, and none is paid for.
        mean, var: (C,) of the clean pass, with which z_hat is normalised as clean_z was. Both None at layer 0, where
            z_hat is compared as it is.
        squash_v: pass the combinator's v through a sigmoid.
        eps: beneath both square roots.

    Returns:
        z_hat, of the dtype and memory format of u, and the cost. Differentiable any number of times in every tensor:
        nothing is detached. Backward keeps the inputs and the statistics of u.

    float32 and float64; bfloat16 and float16 are computed in float32, and params may then be float32; mean and var are
    float32 there. Under autocast u, z and clean_z are promoted to the widest of their dtypes.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Rasmus et al., "Semi-Supervised Learning with Ladder Networks", 2015, Algorithm 1.
    """
    for name, t in (("u", u), ("z", z), ("params", params)):
        check_dtype("ladder_decoder", name, t)
    if clean_z is None:
        u, z = autocast_promote(u, z)
    else:
        check_dtype("ladder_decoder", "clean_z", clean_z)
        u, z, clean_z = autocast_promote(u, z, clean_z)
    _check(u, z, params, clean_z, mean, var, eps)
    return LadderDecoderOutput(
        *reference.ladder_decoder(u, z, params, clean_z, mean, var, squash_v=squash_v, eps=eps)
    )


def _check(
    u: Tensor,
    z: Tensor,
    params: Tensor,
    clean_z: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> None:
    op = "ladder_decoder"
    if u.dim() < 2:
        raise ValueError(f"{op}: u must have shape (N, C, *); got {shape_text(u)}")
    half = u.dtype in (torch.bfloat16, torch.float16)
    channels = u.shape[1]
    if (mean is None) != (var is None) or (mean is not None and clean_z is None):
        raise ValueError(f"{op}: mean and var must be given together, and only with clean_z")
    wide = torch.float32 if half else u.dtype
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("z", z, tuple(u.shape), (u.dtype,)),
        ("clean_z", clean_z, tuple(u.shape), (u.dtype,)),
        ("params", params, (10, channels), (u.dtype, wide)),
        ("mean", mean, (channels,), (wide,)),
        ("var", var, (channels,), (wide,)),
    ]
    for name, t, shape, dtypes in wanted:
        if t is None:
            continue
        check_dtype(op, name, t)
        if tuple(t.shape) != shape:
            raise ValueError(
                f"{op}: {name} must have shape {shape} for u of shape {shape_text(u)}; got {shape_text(t)}"
            )
        if t.dtype not in dtypes:
            names = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
            raise TypeError(f"{op}: {name} must be {names} for u of {u.dtype}; got {t.dtype}")
        if t.device != u.device:
            raise ValueError(f"{op}: {name} must be on the device of u, {u.device}; got {t.device}")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"{op}: eps must be a number; got {eps!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps must be finite and not negative; got {eps}")

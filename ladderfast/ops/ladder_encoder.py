"""A Ladder encoder layer after its linear map: checks, registration, autograd and backend choice."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ladderfast.ops.checks import check_dtype, shape_text
from ladderfast.reference import ladder_encoder as reference
from ladderfast.reference.ladder_encoder import ACTIVATIONS


class LadderEncoderOutput(NamedTuple):
    """What `ladder_encoder` returns."""

    z: Tensor
    """(N, C, *) normalised values, with noise: the lateral values and, in a clean part, their targets."""
    h: Tensor
    """(N, C, *) act(gamma (z + beta))."""
    mean: Tensor
    """(P, C) of each part: labelled, unlabelled and, with `num_clean`, clean. float32 or wider."""
    var: Tensor
    """(P, C) biased variances."""


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
) -> LadderEncoderOutput:
    """What follows the linear map of a Ladder's encoder layer, in one op.

        z = (z_pre - mean) / sqrt(var + eps) + noise_std * noise        mean and biased var of each part and channel
        h = act(gamma (z + beta))

    Args:
        z_pre: (N, C, *) the linear map's output. Its rows are first the labelled samples, then the unlabelled ones,
            and last, if `num_clean` is given, those of a clean pass. These parts are normalised apart.
        num_labelled: rows of the first part.
        num_clean: rows of the last part, which gets no noise.
        beta: (C,) shift, or None.
        gamma: (C,) scale, or None.
        noise_std: standard deviation of the noise; 0 is the clean pass.
        noise_state: (2,) int64 on the device of z_pre: seed and offset, whose noise this is. Needed where noise_std
            is not 0.
        noise_stream: added to the offset: calls that share a state need different ones for different noise.
        activation: "identity", "relu" or "leaky_relu".
        negative_slope: of the leaky ReLU.
        eps: beneath the square root.

    Returns:
        z, h, mean and var. z and h have the dtype and memory format of z_pre, mean and var are (2, C), or (3, C) with a
        clean part. A part of no rows has mean and variance 0. Differentiable any number of times in z_pre, beta and
        gamma, also through mean and var. Backward keeps z_pre, beta, gamma, the state and the statistics, and draws
        the noise again.

    The noise comes from Philox4x32-10, counted by seed, offset and element, and is float32 on every backend. An
    element's number is its place in memory (contiguous or channels-last), else its place in contiguous order.
    float32 and float64; bfloat16 and float16 are computed in float32, and beta and gamma may then be float32.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Rasmus et al., "Semi-Supervised Learning with Ladder Networks", 2015, Algorithm 1.
    """
    _check(
        z_pre, num_labelled, num_clean, beta, gamma, noise_std, noise_state, activation, negative_slope, eps
    )
    return LadderEncoderOutput(
        *reference.ladder_encoder(
            z_pre,
            num_labelled,
            num_clean=num_clean,
            beta=beta,
            gamma=gamma,
            noise_std=noise_std,
            noise_state=noise_state,
            noise_stream=noise_stream,
            activation=activation,
            negative_slope=negative_slope,
            eps=eps,
        )
    )


def _check(
    z_pre: Tensor,
    num_labelled: int,
    num_clean: int,
    beta: Tensor | None,
    gamma: Tensor | None,
    noise_std: float,
    noise_state: Tensor | None,
    activation: str,
    negative_slope: float,
    eps: float,
) -> None:
    op = "ladder_encoder"
    check_dtype(op, "z_pre", z_pre)
    if z_pre.dim() < 2:
        raise ValueError(f"{op}: z_pre must have shape (N, C, *); got {shape_text(z_pre)}")
    for name, number in (("num_labelled", num_labelled), ("num_clean", num_clean)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{op}: {name} must be an integer; got {number!r}")
        if number < 0:
            raise ValueError(f"{op}: {name} must not be negative; got {number}")
    if num_labelled + num_clean > len(z_pre):
        raise ValueError(
            f"{op}: num_labelled + num_clean must be at most the {len(z_pre)} rows of z_pre; "
            f"got {num_labelled} + {num_clean}"
        )
    half = z_pre.dtype in (torch.bfloat16, torch.float16)
    for name, t in (("beta", beta), ("gamma", gamma)):
        if t is None:
            continue
        check_dtype(op, name, t)
        if t.shape != z_pre.shape[1:2]:
            raise ValueError(
                f"{op}: {name} must have shape ({z_pre.shape[1]},) for z_pre of shape {shape_text(z_pre)}; "
                f"got {shape_text(t)}"
            )
        if t.dtype != z_pre.dtype and not (half and t.dtype == torch.float32):
            wanted = f"{z_pre.dtype} or torch.float32" if half else f"{z_pre.dtype}"
            raise TypeError(f"{op}: {name} must be {wanted} for z_pre of {z_pre.dtype}; got {t.dtype}")
        if t.device != z_pre.device:
            raise ValueError(f"{op}: {name} must be on the device of z_pre, {z_pre.device}; got {t.device}")
    for name, value in (("noise_std", noise_std), ("negative_slope", negative_slope), ("eps", eps)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a number; got {value!r}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{op}: {name} must be finite and not negative; got {value}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if noise_state is None:
        if noise_std:
            raise ValueError(f"{op}: noise_state must be given for noise_std {noise_std}; got None")
        return
    if not isinstance(noise_state, Tensor) or noise_state.dtype != torch.int64:
        got = noise_state.dtype if isinstance(noise_state, Tensor) else type(noise_state).__name__
        raise TypeError(f"{op}: noise_state must be an int64 tensor of seed and offset; got {got}")
    if noise_state.shape != (2,):
        raise ValueError(
            f"{op}: noise_state must have shape (2,), seed and offset; got {shape_text(noise_state)}"
        )
    if noise_state.device != z_pre.device:
        raise ValueError(
            f"{op}: noise_state must be on the device of z_pre, {z_pre.device}; got {noise_state.device}"
        )

"""A Ladder decoder layer after its linear map: checks, registration, autograd and backend choice."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import autocast_promote, check_bool, check_dtype, check_not_negative, shape_text
from ladderfast.ops.function import apply, apply_in_backward, batch_first, known_signature, packed, readable
from ladderfast.reference import ladder_decoder as reference


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of the cost."""
    return torch.float64 if dtype == torch.float64 else torch.float32


if _extension.module is not None:

    @_extension.register_fake("ladder_decoder")
    def _ladder_decoder_fake(
        u: Tensor,
        z: Tensor,
        params: Tensor,
        clean_z: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        squash_v: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seeds = params.shape[:-2]
        wide = _wide(u.dtype)
        return (
            torch.empty_like(u),
            u.new_empty((0,) if clean_z is None else seeds, dtype=wide),
            u.new_empty((*seeds, params.shape[-1]), dtype=wide),
            u.new_empty((*seeds, params.shape[-1]), dtype=wide),
        )

    @_extension.register_fake("ladder_decoder_backward")
    def _ladder_decoder_backward_fake(
        grad_z_hat: Tensor | None,
        grad_cost: Tensor | None,
        u: Tensor,
        z: Tensor,
        params: Tensor,
        clean_z: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        u_mean: Tensor,
        u_var: Tensor,
        squash_v: bool,
        eps: float,
        want_z: bool,
        want_clean_z: bool,
        want_statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        cost = grad_cost is not None and clean_z is not None
        statistics = (0,) if mean is None or not (cost and want_statistics) else u_mean.shape
        return (
            torch.empty_like(u),
            torch.empty_like(u) if want_z else u.new_empty(0),
            torch.empty(params.shape, dtype=params.dtype, device=u.device),
            torch.empty_like(u) if cost and want_clean_z else u.new_empty(0),
            torch.empty(statistics, dtype=u_mean.dtype, device=u.device),
            torch.empty(statistics, dtype=u_mean.dtype, device=u.device),
        )


def _seeds_first(
    size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...], params: int
) -> tuple[bool, list[Tensor | None]]:
    """The batch axis of vmap in front, and merged with an axis of seeds if params (at that index) has one.

    Says whether it has.
    """
    present = [i for i, t in enumerate(tensors) if t is not None]
    moved: list[Tensor | None] = [None] * len(tensors)
    given: Any = (
        tuple(in_dims[i] for i in present),
        tuple(tensors[i] for i in present),
    )
    for i, t in zip(present, batch_first(size, *given), strict=True):
        moved[i] = t
    nested = moved[params].dim() == 4  # type: ignore[union-attr]
    if nested:
        moved = [None if t is None else t.flatten(0, 1) for t in moved]
    return nested, moved


def _unflatten(size: int, nested: bool, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch axis apart from the seeds again; an output that nobody wants gets one."""
    return tuple(
        t.expand(size, *t.shape) if t.shape == (0,) else t.unflatten(0, (size, -1)) if nested else t
        for t in tensors
    )


@known_signature
class _LadderDecoder(torch.autograd.Function):
    """z_hat, cost, and u's mean and variance for backward, which is why those have no gradients."""

    @staticmethod
    def forward(
        u: Tensor,
        z: Tensor,
        params: Tensor,
        clean_z: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        squash_v: bool,
        eps: float,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u = packed(u, params.dim() - 1)
        if name == "triton":
            from ladderfast.triton.ladder_decoder import ladder_decoder_triton

            return ladder_decoder_triton(u, z, params, clean_z, mean, var, squash_v, eps)
        return torch.ops.ladderfast.ladder_decoder(u, z, params, clean_z, mean, var, squash_v, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], *output[2:])
        ctx.options = inputs[6:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_z_hat: Tensor | None, grad_cost: Tensor | None, *_: Any) -> Any:
        if grad_z_hat is None and grad_cost is None:
            return (None,) * 9
        needed = ctx.needs_input_grad
        wanted = (needed[1], needed[3], needed[4] or needed[5])
        grads = apply_in_backward(
            _LadderDecoderBackward, grad_z_hat, grad_cost, *ctx.saved_tensors, *ctx.options, *wanted
        )
        costly = grad_cost is not None
        given = (True, needed[1], True, needed[3] and costly, needed[4] and costly, needed[5] and costly)
        return *(g if keep else None for g, keep in zip(grads, given, strict=True)), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        nested, tensors = _seeds_first(size, in_dims[:6], args[:6], 2)
        out = _LadderDecoder.apply(*tensors, *args[6:])
        return _unflatten(size, nested, out), (0,) * 4


@known_signature
class _LadderDecoderBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_z_hat: Tensor | None,
        grad_cost: Tensor | None,
        u: Tensor,
        z: Tensor,
        params: Tensor,
        clean_z: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        u_mean: Tensor,
        u_var: Tensor,
        squash_v: bool,
        eps: float,
        name: str,
        want_z: bool,
        want_clean_z: bool,
        want_statistics: bool,
    ) -> tuple[Tensor, ...]:
        u = packed(u, params.dim() - 1)
        tensors = (grad_z_hat, grad_cost, u, z, params, clean_z, mean, var, u_mean, u_var)
        options = (squash_v, eps, want_z, want_clean_z, want_statistics)
        if name == "triton":
            from ladderfast.triton.ladder_decoder import ladder_decoder_backward_triton

            return ladder_decoder_backward_triton(*tensors, *options)
        return torch.ops.ladderfast.ladder_decoder_backward(*tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.options = {"squash_v": inputs[10], "eps": inputs[11]}
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference's backward pass, which is differentiable any number of times.
        inputs = ctx.saved_tensors
        given = [i for i, t in enumerate(inputs) if t is not None]
        wanted = [i for i, g in enumerate(grads) if g is not None]
        if not wanted:
            return (None,) * 16

        def formula(*tensors: Tensor) -> tuple[Any, ...]:
            every: list[Any] = [None] * 8
            for i, t in zip(given, tensors, strict=True):
                every[i] = t
            found = reference.ladder_decoder_backward(*every, **ctx.options)
            return tuple(found[i] for i in wanted)

        if inputs[4].dim() == 3:  # params has an axis of seeds
            formula = torch.func.vmap(formula)
        pullback = torch.func.vjp(formula, *(inputs[i] for i in given))[1]
        second = iter(pullback(tuple(grads[i] for i in wanted)))
        return *(None if t is None else next(second) for t in inputs), *(None,) * 8

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        nested, tensors = _seeds_first(size, in_dims[:10], args[:10], 4)
        out = _LadderDecoderBackward.apply(*tensors, *args[10:])
        return _unflatten(size, nested, out), (0,) * 6


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
        ValueError: shapes or devices that do not fit; a negative var (CPU tensors).
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Rasmus et al., "Semi-Supervised Learning with Ladder Networks", 2015, Algorithm 1.
    """
    check_bool("ladder_decoder: squash_v", squash_v)
    u, z, clean_z = prepare(10, u, z, params, clean_z, mean, var, eps)
    name = backend.choose("ladder_decoder", u.device.type, u.dtype)
    if name == "reference":
        return LadderDecoderOutput(
            *reference.ladder_decoder(u, z, params, clean_z, mean, var, squash_v=squash_v, eps=eps)
        )
    if name == "cpu":
        params = params.to(_wide(u.dtype))
    z_hat, cost, _, _ = apply(_LadderDecoder, u, z, params, clean_z, mean, var, squash_v, float(eps), name)
    return LadderDecoderOutput(z_hat, None if clean_z is None else cost)


def check_dtypes(**tensors: Tensor | None) -> None:
    """TypeError unless each is a tensor of a floating dtype; clean_z may be None."""
    for name, t in tensors.items():
        if t is not None or name != "clean_z":
            check_dtype("ladder_decoder", name, t)


def prepare(
    rows: int,
    u: Tensor,
    z: Tensor,
    params: Tensor,
    clean_z: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u, z and clean_z, under autocast promoted, of checked arguments; params has that many rows."""
    if not _fit(rows, u, z, params, clean_z, mean, var, eps):
        check_dtypes(u=u, z=z, params=params, clean_z=clean_z)
        if clean_z is None:
            u, z = autocast_promote(u, z)
        else:
            u, z, clean_z = autocast_promote(u, z, clean_z)
        _check(rows, u, z, params, clean_z, mean, var, eps)
    if var is not None and len(var) and readable(var):
        least = float(var.detach().amin())
        if least < 0:
            raise ValueError(f"ladder_decoder: var must not be negative; got {least}")
    return u, z, clean_z


def _fit(rows: int, u: Any, z: Any, params: Any, clean_z: Any, mean: Any, var: Any, eps: Any) -> bool:
    """Whether nothing is to be checked or promoted: every dtype as it shall be, one device and fitting shapes.
    What does not fit here `_check` may still accept."""
    try:
        shape, dtype, device, dense = u.shape, u.dtype, u.device, torch.strided
        wide = _wide(dtype)
        alike = (z,) if clean_z is None else (z, clean_z)
        statistics = () if (mean is None and var is None) or clean_z is None else (mean, var)
        channels = shape[1:2]
        return (
            dtype in (torch.float32, torch.float64, torch.bfloat16)
            and len(shape) >= 2
            and params.shape == (rows, *channels)
            and all(t.shape == shape for t in alike)
            and all(t.shape == channels for t in statistics)
            and u.layout is dense
            and all(t.dtype == dtype and t.device == device and t.layout is dense for t in alike)
            and all(
                t.dtype == wide and t.device == device and t.layout is dense for t in (params, *statistics)
            )
            and (clean_z is not None or (mean is None and var is None))
            and type(eps) is float
            and 0 <= eps < math.inf
        )
    except (AttributeError, TypeError, RuntimeError):  # the last of a nested tensor, which has no shape
        return False


def _check(
    rows: int,
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
        ("params", params, (rows, channels), (u.dtype, wide)),
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
    check_not_negative(f"{op}: eps", eps)

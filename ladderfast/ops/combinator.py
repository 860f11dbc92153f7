"""The Gaussian combinator: checks, registration, autograd and backend choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import WIDE, autocast_promote, check_bool, check_dtype, shape_text, shaped
from ladderfast.ops.function import (
    Argument,
    apply,
    apply_in_backward,
    batch_first,
    direct,
    known_signature,
    node,
    packed,
)
from ladderfast.reference import combinator as reference

if _extension.module is not None:
    _forward = torch.ops.ladderfast.combinator.default
    _backward = torch.ops.ladderfast.combinator_backward.default

    @_extension.register_fake("combinator")
    def _combinator_fake(z: Tensor, u: Tensor, params: Tensor, squash_v: bool) -> Tensor:
        return torch.empty_like(z)

    @_extension.register_fake("combinator_backward")
    def _combinator_backward_fake(
        grad_z_hat: Tensor, z: Tensor, u: Tensor, params: Tensor, squash_v: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty_like(z),
            torch.empty_like(z),
            torch.empty(params.shape, dtype=params.dtype, device=z.device),
        )


def _seeds_first(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The batch axis of vmap in front, and merged with an axis of seeds if params, the last, has one."""
    moved = batch_first(size, in_dims, tensors)
    if moved[-1].dim() == 4:  # params (B, S, 10, C)
        moved = [t.flatten(0, 1) for t in moved]
    return moved


@known_signature
class _Combinator(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, u: Tensor, params: Tensor, squash_v: bool, name: str) -> Tensor:
        z = packed(z, params.dim() - 1)
        if name == "triton":
            from ladderfast.triton.combinator import combinator_triton

            return combinator_triton(z, u, params, int(squash_v))
        return _forward(z, u, params, squash_v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.squash_v, ctx.name = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad_z_hat: Tensor) -> tuple[Tensor | None, ...]:
        z, u, params = ctx.saved_tensors
        grads = apply_in_backward(_CombinatorBackward, grad_z_hat, z, u, params, ctx.squash_v, ctx.name)
        return *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, u: Tensor, params: Tensor, squash_v: bool, name: str) -> Any:
        nested = params.dim() - (in_dims[2] is not None) == 3
        out = _Combinator.apply(*_seeds_first(info.batch_size, in_dims[:3], (z, u, params)), squash_v, name)
        return (out.unflatten(0, (info.batch_size, -1)) if nested else out), 0


@known_signature
class _CombinatorBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_z_hat: Tensor, z: Tensor, u: Tensor, params: Tensor, squash_v: bool, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = packed(z, params.dim() - 1)
        if name == "triton":
            from ladderfast.triton.combinator import combinator_backward_triton

            return combinator_backward_triton(grad_z_hat, z, u, params, int(squash_v))
        return _backward(grad_z_hat, z, u, params, squash_v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.squash_v = inputs[4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference's backward pass, which is differentiable any number of times.
        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            return reference.gaussian_combinator_backward(*tensors, squash_v=ctx.squash_v)

        pullback = torch.func.vjp(formula, *ctx.saved_tensors)[1]
        return *pullback(grads), None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        grad_z_hat: Tensor,
        z: Tensor,
        u: Tensor,
        params: Tensor,
        squash_v: bool,
        name: str,
    ) -> Any:
        nested = params.dim() - (in_dims[3] is not None) == 3
        tensors = _seeds_first(info.batch_size, in_dims[:4], (grad_z_hat, z, u, params))
        out = _CombinatorBackward.apply(*tensors, squash_v, name)
        if nested:
            out = tuple(t.unflatten(0, (info.batch_size, -1)) for t in out)
        return out, (0, 0, 0)


_node = node(
    "combinator",
    [Argument("N C *", packed=True), Argument("N C *"), Argument("10 C")],
    "g0 s0 s1 s2 c0",
    lambda grads, kept, numbers, needed: _CombinatorBackward.apply(*grads, *kept, *numbers, "cpu"),
)


def _fits(z: Tensor, u: Tensor, params: Tensor) -> bool:
    """Whether all is as it must be, without an axis of seeds and of a wide dtype: the common case, found in a third of
    the time that the full checks take."""
    if not shaped(z, u, params):
        return False
    shape, dtype, device = z.shape, z.dtype, z.device
    return (
        u.shape == shape
        and len(shape) > 1
        and params.shape == (10, shape[1])
        and dtype in WIDE
        and u.dtype == dtype == params.dtype
        and u.device == device == params.device
        and z.layout is u.layout is params.layout is torch.strided
    )


def _check(z: Tensor, u: Tensor, params: Tensor) -> None:
    op = "gaussian_combinator"
    if params.dim() not in (2, 3) or params.shape[-2] != 10:
        raise ValueError(
            f"{op}: params must have shape (10, C), or (S, 10, C) with an axis of seeds; got {shape_text(params)}"
        )
    channel = params.dim() - 1
    if z.dim() <= channel:
        wanted = "(N, C, *)" if channel == 1 else "(S, N, C, *), as params has an axis of seeds"
        raise ValueError(f"{op}: z must have shape {wanted}; got {shape_text(z)}")
    if u.shape != z.shape:
        raise ValueError(f"{op}: u must have the shape of z, {shape_text(z)}; got {shape_text(u)}")
    if params.shape[-1] != z.shape[channel] or (channel == 2 and params.shape[0] != z.shape[0]):
        fitting = f"(10, {z.shape[1]})" if channel == 1 else f"({z.shape[0]}, 10, {z.shape[2]})"
        raise ValueError(
            f"{op}: params must have shape {fitting} for z of shape {shape_text(z)}; got {shape_text(params)}"
        )
    if u.dtype != z.dtype:
        raise TypeError(f"{op}: u must have the dtype of z, {z.dtype}; got {u.dtype}")
    half = z.dtype in (torch.bfloat16, torch.float16)
    if params.dtype != z.dtype and not (half and params.dtype == torch.float32):
        wanted_dtype = f"{z.dtype} or torch.float32" if half else f"{z.dtype}"
        raise TypeError(f"{op}: params must be {wanted_dtype} for z of {z.dtype}; got {params.dtype}")
    for name, t in (("u", u), ("params", params)):
        if t.device != z.device:
            raise ValueError(f"{op}: {name} must be on the device of z, {z.device}; got {t.device}")


def gaussian_combinator(z: Tensor, u: Tensor, params: Tensor, *, squash_v: bool = False) -> Tensor:
    """The Ladder network's combinator: denoise the lateral value z with the help of the signal u from above.

        mu(u) = a1 sigmoid(a2 u + a3) + a4 u + a5
        v(u)  = a6 sigmoid(a7 u + a8) + a9 u + a10        with `squash_v`: sigmoid of that
        g(z, u) = (z - mu(u)) v(u) + mu(u)

    Args:
        z: (N, C, *) lateral values, corrupted.
        u: (N, C, *) top-down signal, of the dtype of z.
        params: (10, C), rows a1 .. a10, one set for each channel. With an axis of seeds, (S, 10, C), z and u are
            (S, N, C, *) and each seed has its own parameters.
        squash_v: pass v through a sigmoid (Tagger's continuous case).

    Returns:
        z_hat of the shape, dtype and memory format of z. Differentiable any number of times in z, u and params; only
        these three are kept for backward.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once, and params may then be float32.
    Under autocast z and u are promoted to the wider of their dtypes.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Rasmus et al., "Semi-Supervised Learning with Ladder Networks", 2015, section 3 (parameters per unit);
    Greff et al., "Tagger", 2016, for `squash_v`.
    """
    if direct() and (found := _node(z, u, params, squash_v)) is not None:
        return found
    check_bool("gaussian_combinator: squash_v", squash_v)
    if not _fits(z, u, params):
        for name, t in (("z", z), ("u", u), ("params", params)):
            check_dtype("gaussian_combinator", name, t)
        z, u = autocast_promote(z, u)
        _check(z, u, params)
    name = backend.choose("gaussian_combinator", z.device.type, z.dtype)
    if name == "reference":
        return reference.gaussian_combinator(z, u, params, squash_v=squash_v)
    return apply(_Combinator, z, u, params, squash_v, name)

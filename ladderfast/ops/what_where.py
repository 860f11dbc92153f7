"""Pooling that keeps the where, and its unpooling: checks, registration, autograd and backend choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import autocast_promote, check_dtype, shape_text
from ladderfast.ops.function import apply, apply_in_backward, batch_first, known_signature
from ladderfast.reference import what_where as reference

LARGEST_WINDOW = 16
LARGEST_BETA = 1e6

if _extension.module is not None:

    def _channels_last(z: Tensor) -> bool:
        return not z.is_contiguous()

    def _empty(like: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        memory_format = last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)

    @torch.library.register_fake("ladderfast::soft_pool2d")
    def _pool_fake(z: Tensor, kernel_h: int, kernel_w: int, beta: float) -> tuple[Tensor, Tensor]:
        n, c, h, w = z.shape[0], z.shape[1], z.shape[2] // kernel_h, z.shape[3] // kernel_w
        last = _channels_last(z)
        return _empty(z, (n, c, h, w), last), _empty(z, (n, c, 2, h, w), last)

    @torch.library.register_fake("ladderfast::soft_pool2d_backward")
    def _pool_backward_fake(
        grad_what: Tensor, grad_where: Tensor, z: Tensor, kernel_h: int, kernel_w: int, beta: float
    ) -> Tensor:
        return torch.empty_like(z)

    @torch.library.register_fake("ladderfast::soft_unpool2d")
    def _unpool_fake(what: Tensor, where: Tensor, kernel_h: int, kernel_w: int) -> Tensor:
        n, c, h, w = what.shape
        return _empty(what, (n, c, h * kernel_h, w * kernel_w), _channels_last(what))

    @torch.library.register_fake("ladderfast::soft_unpool2d_backward")
    def _unpool_backward_fake(
        grad_z: Tensor, what: Tensor, where: Tensor, kernel_h: int, kernel_w: int
    ) -> tuple[Tensor, Tensor]:
        n, c, h, w = what.shape
        return torch.empty_like(what), _empty(what, (n, c, 2, h, w), _channels_last(what))


def _packed(z: Tensor) -> Tensor:
    """z as the kernels take it: contiguous or channels-last; a copy only where it is neither."""
    if z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last):
        return z
    return z.contiguous()


def _triton() -> Any:
    from ladderfast.triton import what_where

    return what_where


@known_signature
class _SoftPool(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, kernel_h: int, kernel_w: int, beta: float, name: str) -> tuple[Tensor, Tensor]:
        op = _triton().soft_pool2d_triton if name == "triton" else torch.ops.ladderfast.soft_pool2d
        return op(_packed(z), kernel_h, kernel_w, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad_what: Tensor, grad_where: Tensor) -> tuple[Tensor | None, ...]:
        grad_z = apply_in_backward(_SoftPoolBackward, grad_what, grad_where, *ctx.saved_tensors, *ctx.options)
        return grad_z, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, *options: Any) -> Any:
        z = z.movedim(in_dims[0], 0)
        out = _SoftPool.apply(z.flatten(0, 1), *options)
        return tuple(t.unflatten(0, z.shape[:2]) for t in out), (0, 0)


@known_signature
class _SoftPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_what: Tensor,
        grad_where: Tensor,
        z: Tensor,
        kernel_h: int,
        kernel_w: int,
        beta: float,
        name: str,
    ) -> Tensor:
        triton = name == "triton"
        op = _triton().soft_pool2d_backward_triton if triton else torch.ops.ladderfast.soft_pool2d_backward
        return op(grad_what, grad_where, _packed(z), kernel_h, kernel_w, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference's backward pass, which is differentiable any number of times.
        kernel_h, kernel_w, beta, _ = ctx.options

        def formula(grad_what: Tensor, grad_where: Tensor, z: Tensor) -> Tensor:
            return reference.soft_pool2d_backward(grad_what, grad_where, z, (kernel_h, kernel_w), beta)

        return *torch.func.vjp(formula, *ctx.saved_tensors)[1](grad), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad_what: Tensor, grad_where: Tensor, z: Tensor, *options: Any) -> Any:
        tensors = batch_first(info.batch_size, in_dims[:3], (grad_what, grad_where, z))
        out = _SoftPoolBackward.apply(*(t.flatten(0, 1) for t in tensors), *options)
        return out.unflatten(0, tensors[2].shape[:2]), 0


@known_signature
class _SoftUnpool(torch.autograd.Function):
    @staticmethod
    def forward(what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, name: str) -> Tensor:
        op = _triton().soft_unpool2d_triton if name == "triton" else torch.ops.ladderfast.soft_unpool2d
        return op(_packed(what), where, kernel_h, kernel_w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        grads = apply_in_backward(_SoftUnpoolBackward, grad_z, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, what: Tensor, where: Tensor, *options: Any) -> Any:
        tensors = batch_first(info.batch_size, in_dims[:2], (what, where))
        out = _SoftUnpool.apply(*(t.flatten(0, 1) for t in tensors), *options)
        return out.unflatten(0, tensors[0].shape[:2]), 0


@known_signature
class _SoftUnpoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_z: Tensor, what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, name: str
    ) -> tuple[Tensor, Tensor]:
        triton = name == "triton"
        op = (
            _triton().soft_unpool2d_backward_triton if triton else torch.ops.ladderfast.soft_unpool2d_backward
        )
        return op(grad_z, _packed(what), where, kernel_h, kernel_w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernel_size = ctx.options[:2]

        def formula(grad_z: Tensor, what: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
            return reference.soft_unpool2d_backward(grad_z, what, where, kernel_size)

        return *torch.func.vjp(formula, *ctx.saved_tensors)[1](grads), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad_z: Tensor, what: Tensor, where: Tensor, *options: Any) -> Any:
        tensors = batch_first(info.batch_size, in_dims[:3], (grad_z, what, where))
        out = _SoftUnpoolBackward.apply(*(t.flatten(0, 1) for t in tensors), *options)
        return tuple(t.unflatten(0, tensors[1].shape[:2]) for t in out), (0, 0)


def window(op: str, kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    """kernel_size as (rows, columns), checked."""
    pair = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    if len(pair) != 2 or not all(isinstance(k, int) and not isinstance(k, bool) for k in pair):
        raise TypeError(f"{op}: kernel_size must be an int or a pair of ints; got {kernel_size!r}")
    if not all(1 <= k <= LARGEST_WINDOW for k in pair):
        raise ValueError(f"{op}: kernel_size must be from 1 to {LARGEST_WINDOW}; got {kernel_size!r}")
    return pair[0], pair[1]


def sharpness(op: str, beta: float) -> float:
    """beta, checked."""
    if not isinstance(beta, (int, float)) or isinstance(beta, bool):
        raise TypeError(f"{op}: beta must be a number; got {type(beta).__name__}")
    if not 0 <= beta <= LARGEST_BETA:
        raise ValueError(
            f"{op}: beta must be from 0 to {LARGEST_BETA:.0e} (WhereMaxPool2d is the limit); got {beta}"
        )
    return float(beta)


def soft_pool2d(z: Tensor, kernel_size: int | tuple[int, int], beta: float) -> tuple[Tensor, Tensor]:
    """Soft pooling that keeps the where: how much there is in each window, and at which place.

        what  = sum z e^(beta z) / sum e^(beta z)
        where = sum (x, y) e^(beta z) / sum e^(beta z)

    Args:
        z: (N, C, H, W), contiguous or channels-last (other strides are copied).
        kernel_size: the window's rows and columns, one number or (rows, columns), each from 1 to 16; the stride is the
            same. Rows at the bottom and columns at the right that fill no window are left out, as in
            torch.nn.functional.max_pool2d, and have gradient 0.
        beta: how sharp, from 0 to 1e6 (100 in the paper's figures). 0 gives the mean and the window's centre; the
            larger it is, the nearer to the maximum and its place. Equal maxima share the place between them.

    Returns:
        what (N, C, h, w) with h = H // rows, w = W // columns, and where (N, C, 2, h, w): x, along the columns, then
        y, along the rows, each from -1 in a window's first column or row to 1 in its last, and 0 where there is only
        one. Both in the dtype and memory format of z (where in torch.channels_last_3d if z is channels-last).
        Differentiable any number of times in z, which alone is kept for backward.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. No value of beta z overflows.

    Raises:
        ValueError: a shape, kernel_size or beta out of range.
        TypeError: a dtype or type that does not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Zhao et al., "Stacked What-Where Auto-encoders", 2015, equations 3 and 4.
    """
    op = "soft_pool2d"
    check_dtype(op, "z", z)
    rows, columns = window(op, kernel_size)
    beta = sharpness(op, beta)
    if z.dim() != 4:
        raise ValueError(f"{op}: z must have shape (N, C, H, W); got {shape_text(z)}")
    if z.shape[2] < rows or z.shape[3] < columns:
        raise ValueError(f"{op}: z must hold a window of {(rows, columns)}; got {shape_text(z)}")
    name = backend.choose(op, z.device.type, z.dtype)
    if name == "reference":
        return reference.soft_pool2d(z, (rows, columns), beta)
    return apply(_SoftPool, z, rows, columns, beta, name)


def soft_unpool2d(what: Tensor, where: Tensor, kernel_size: int | tuple[int, int]) -> Tensor:
    """Puts what at where: the counterpart of `soft_pool2d`.

    Each window is 0 but for the (at most four) pixels around its place, which share what between them by bilinear
    interpolation, so that a window's sum is what.

    Args:
        what: (N, C, h, w), contiguous or channels-last (other strides are copied).
        where: (N, C, 2, h, w), x then y in [-1, 1]; what lies beyond is placed on the window's edge and has gradient 0.
        kernel_size: as in `soft_pool2d`.

    Returns:
        (N, C, h rows, w columns) in the dtype and memory format of what. Differentiable any number of times in what and
        where, which alone are kept for backward. The slope in where jumps where a pixel's row or column is met exactly;
        there it is the one to the right and to the bottom, at the last row and column the one to the left and to the
        top.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the two are
    promoted to the wider of their dtypes.

    Raises:
        ValueError: shapes, devices or a kernel_size that do not fit.
        TypeError: dtypes or types that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Zhao et al., "Stacked What-Where Auto-encoders", 2015, section 3.
    """
    op = "soft_unpool2d"
    for argument, t in (("what", what), ("where", where)):
        check_dtype(op, argument, t)
    rows, columns = window(op, kernel_size)
    what, where = autocast_promote(what, where)
    if what.dim() != 4:
        raise ValueError(f"{op}: what must have shape (N, C, h, w); got {shape_text(what)}")
    wanted = (*what.shape[:2], 2, *what.shape[2:])
    if where.shape != wanted:
        raise ValueError(f"{op}: where must have shape {tuple(wanted)}; got {shape_text(where)}")
    if where.dtype != what.dtype:
        raise TypeError(f"{op}: where must have the dtype of what, {what.dtype}; got {where.dtype}")
    if where.device != what.device:
        raise ValueError(f"{op}: where must be on the device of what, {what.device}; got {where.device}")
    name = backend.choose(op, what.device.type, what.dtype)
    if name == "reference":
        return reference.soft_unpool2d(what, where, (rows, columns))
    return apply(_SoftUnpool, what, where, rows, columns, name)

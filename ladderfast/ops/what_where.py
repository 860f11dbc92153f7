"""Pooling that keeps the where, and its unpooling: checks, registration, autograd and backend choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import autocast_promote, check_bool, check_dense, check_dtype, shape_text
from ladderfast.ops.function import apply, apply_in_backward, batch_first, known_signature, packed
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

    @_extension.register_fake("soft_pool2d")
    def _pool_fake(z: Tensor, kernel_h: int, kernel_w: int, beta: float) -> tuple[Tensor, Tensor]:
        n, c, h, w = z.shape[0], z.shape[1], z.shape[2] // kernel_h, z.shape[3] // kernel_w
        last = _channels_last(z)
        return _empty(z, (n, c, h, w), last), _empty(z, (n, c, 2, h, w), last)

    @_extension.register_fake("soft_pool2d_backward")
    def _pool_backward_fake(
        grad_what: Tensor, grad_where: Tensor, z: Tensor, kernel_h: int, kernel_w: int, beta: float
    ) -> Tensor:
        return torch.empty_like(z)

    @_extension.register_fake("soft_unpool2d")
    def _unpool_fake(what: Tensor, where: Tensor, kernel_h: int, kernel_w: int) -> Tensor:
        n, c, h, w = what.shape
        return _empty(what, (n, c, h * kernel_h, w * kernel_w), _channels_last(what))

    @_extension.register_fake("soft_unpool2d_backward")
    def _unpool_backward_fake(
        grad_z: Tensor, what: Tensor, where: Tensor, kernel_h: int, kernel_w: int
    ) -> tuple[Tensor, Tensor]:
        n, c, h, w = what.shape
        return torch.empty_like(what), _empty(what, (n, c, 2, h, w), _channels_last(what))

    @_extension.register_fake("where_max_pool2d")
    def _max_pool_fake(z: Tensor, kernel_h: int, kernel_w: int, positions: bool) -> tuple[Tensor, Tensor]:
        n, c, h, w = z.shape[0], z.shape[1], z.shape[2] // kernel_h, z.shape[3] // kernel_w
        what = _empty(z, (n, c, h, w), _channels_last(z))
        return what, torch.empty_like(what, dtype=torch.int64 if positions else torch.uint8)

    @_extension.register_fake("where_max_pool2d_backward")
    def _max_pool_backward_fake(
        grad_what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, height: int, width: int
    ) -> Tensor:
        return _empty(grad_what, (*where.shape[:2], height, width), _channels_last(where))

    @_extension.register_fake("where_max_unpool2d")
    def _max_unpool_fake(
        what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, height: int, width: int
    ) -> Tensor:
        return _empty(what, (*what.shape[:2], height, width), _channels_last(what))

    @_extension.register_fake("where_max_unpool2d_backward")
    def _max_unpool_backward_fake(grad_z: Tensor, where: Tensor, kernel_h: int, kernel_w: int) -> Tensor:
        return _empty(grad_z, tuple(where.shape), _channels_last(grad_z))


def _triton() -> Any:
    from ladderfast.triton import what_where

    return what_where


def _op(name: str, backend_name: str) -> Any:
    """The registered op of that name."""
    return (
        getattr(_triton(), f"{name}_triton")
        if backend_name == "triton"
        else getattr(torch.ops.ladderfast, name)
    )


@known_signature
class _SoftPool(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, kernel_h: int, kernel_w: int, beta: float, name: str) -> tuple[Tensor, Tensor]:
        return _op("soft_pool2d", name)(packed(z, 1), kernel_h, kernel_w, beta)

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
        op = _op("soft_pool2d_backward", name)
        return op(grad_what, grad_where, packed(z, 1), kernel_h, kernel_w, beta)

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
        return _op("soft_unpool2d", name)(packed(what, 1), where, kernel_h, kernel_w)

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
        return _op("soft_unpool2d_backward", name)(grad_z, packed(what, 1), where, kernel_h, kernel_w)

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


@known_signature
class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, kernel_h: int, kernel_w: int, positions: bool, name: str) -> tuple[Tensor, Tensor]:
        return _op("where_max_pool2d", name)(packed(z, 1), kernel_h, kernel_w, positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        z, kernel_h, kernel_w, _, name = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.options = kernel_h, kernel_w, z.shape[2], z.shape[3], name

    @staticmethod
    def backward(ctx: Any, grad_what: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        grad_z = None
        if grad_what is not None:
            grad_z = apply_in_backward(_MaxPoolBackward, grad_what, *ctx.saved_tensors, *ctx.options)
        return grad_z, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, *options: Any) -> Any:
        z = z.movedim(in_dims[0], 0)
        out = _MaxPool.apply(z.flatten(0, 1), *options)
        return tuple(t.unflatten(0, z.shape[:2]) for t in out), (0, 0)


class _Put(torch.autograd.Function):
    """What at where: unpooling, and pooling's backward pass, which differ in whose order of axes they take.

    The gradient of either is what lies at where.
    """

    op: str

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, where, kernel_h, kernel_w, _, _, name = inputs
        ctx.save_for_backward(where)
        ctx.options = kernel_h, kernel_w, name

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        grad_what = apply_in_backward(_MaxUnpoolBackward, grad_z, *ctx.saved_tensors, *ctx.options)
        return grad_what, None, None, None, None, None, None

    @classmethod
    def _over_seeds(cls, info: Any, in_dims: Any, what: Tensor, where: Tensor, *options: Any) -> Any:
        tensors = batch_first(info.batch_size, in_dims[:2], (what, where))
        out = cls.apply(*(t.flatten(0, 1) for t in tensors), *options)
        return out.unflatten(0, tensors[0].shape[:2]), 0


@known_signature
class _MaxPoolBackward(_Put):
    @staticmethod
    def forward(
        grad_what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, height: int, width: int, name: str
    ) -> Tensor:
        op = _op("where_max_pool2d_backward", name)
        return op(grad_what, packed(where, 1), kernel_h, kernel_w, height, width)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _MaxPoolBackward._over_seeds(info, in_dims, *args)


@known_signature
class _MaxUnpool(_Put):
    @staticmethod
    def forward(
        what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, height: int, width: int, name: str
    ) -> Tensor:
        return _op("where_max_unpool2d", name)(packed(what, 1), where, kernel_h, kernel_w, height, width)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _MaxUnpool._over_seeds(info, in_dims, *args)


@known_signature
class _MaxUnpoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad_z: Tensor, where: Tensor, kernel_h: int, kernel_w: int, name: str) -> Tensor:
        return _op("where_max_unpool2d_backward", name)(packed(grad_z, 1), where, kernel_h, kernel_w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_z, where, kernel_h, kernel_w, name = inputs
        ctx.save_for_backward(where)
        ctx.options = kernel_h, kernel_w, grad_z.shape[2], grad_z.shape[3], name

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return apply_in_backward(_MaxUnpool, grad, *ctx.saved_tensors, *ctx.options), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad_z: Tensor, where: Tensor, *options: Any) -> Any:
        tensors = batch_first(info.batch_size, in_dims[:2], (grad_z, where))
        out = _MaxUnpoolBackward.apply(*(t.flatten(0, 1) for t in tensors), *options)
        return out.unflatten(0, tensors[0].shape[:2]), 0


def window(op: str, kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    """kernel_size as (rows, columns), checked."""
    pair = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    if len(pair) != 2 or not all(isinstance(k, int) and not isinstance(k, bool) for k in pair):
        raise TypeError(f"{op}: kernel_size must be an int or a pair of ints; got {kernel_size!r}")
    if not all(1 <= k <= LARGEST_WINDOW for k in pair):
        raise ValueError(f"{op}: kernel_size must be from 1 to {LARGEST_WINDOW}; got {kernel_size!r}")
    return pair[0], pair[1]


def unpooled_size(
    op: str, windows: Tensor, kernel_size: tuple[int, int], output_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of what was pooled to windows (N, C, h, w), checked; without output_size, whole windows."""
    h, w = windows.shape[2:]
    rows, columns = kernel_size
    if output_size is None:
        return h * rows, w * columns
    pair = isinstance(output_size, (tuple, list)) and len(output_size) == 2
    if not pair or not all(isinstance(size, (int, torch.SymInt)) for size in output_size):
        raise TypeError(f"{op}: output_size must be a pair of ints; got {output_size!r}")
    height, width = output_size
    if (height // rows, width // columns) != (h, w):
        raise ValueError(
            f"{op}: output_size must be that of a tensor with {(h, w)} windows of {kernel_size}; "
            f"got {tuple(output_size)}"
        )
    return height, width


def sharpness(op: str, beta: float) -> float:
    """beta, checked."""
    if not isinstance(beta, (int, float)) or isinstance(beta, bool):
        raise TypeError(f"{op}: beta must be a number; got {type(beta).__name__}")
    if not 0 <= beta <= LARGEST_BETA:
        raise ValueError(
            f"{op}: beta must be from 0 to {LARGEST_BETA:.0e} (WhereMaxPool2d is the limit); got {beta}"
        )
    return float(beta)


def _check_pooled(op: str, z: Tensor, kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    """The window's rows and columns, if z has one."""
    check_dtype(op, "z", z)
    rows, columns = window(op, kernel_size)
    if z.dim() != 4:
        raise ValueError(f"{op}: z must have shape (N, C, H, W); got {shape_text(z)}")
    if z.shape[2] < rows or z.shape[3] < columns:
        raise ValueError(f"{op}: z must hold a window of {(rows, columns)}; got {shape_text(z)}")
    return rows, columns


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
    rows, columns = _check_pooled(op, z, kernel_size)
    beta = sharpness(op, beta)
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


def where_max_pool2d(
    z: Tensor, kernel_size: int | tuple[int, int], *, positions: bool = False
) -> tuple[Tensor, Tensor]:
    """Hard pooling that keeps the where: each window's maximum and its place.

    Args:
        z: (N, C, H, W), contiguous or channels-last (other strides are copied).
        kernel_size: as in `soft_pool2d`, and what fills no window is left out in the same way.
        positions: how where says the place.

    Returns:
        what (N, C, h, w) with h = H // rows, w = W // columns in the dtype of z, and where (N, C, h, w) without a
        gradient: the element's number in its window, row * columns + column, in torch.uint8; or with `positions` that
        in its channel, row * W + column, in torch.int64, which is what torch.nn.functional.max_pool2d returns. Both in
        the memory format of z. Of equal maxima the first one counts, row by row, and of several NaN the last one, as in
        torch. Differentiable any number of times in z; where alone is kept for backward.

    Every dtype is exact.

    Raises:
        ValueError: a shape or kernel_size out of range.
        TypeError: a dtype or type that does not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Zhao et al., "Stacked What-Where Auto-encoders", 2015, section 3.
    """
    op = "where_max_pool2d"
    rows, columns = _check_pooled(op, z, kernel_size)
    check_bool(f"{op}: positions", positions)
    name = backend.choose(op, z.device.type, z.dtype)
    if name == "reference":
        return reference.where_max_pool2d(z, (rows, columns), positions=positions)
    return apply(_MaxPool, z, rows, columns, positions, name)


def where_max_unpool2d(
    what: Tensor,
    where: Tensor,
    kernel_size: int | tuple[int, int],
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """Puts what at where in its window, and 0 everywhere else: the counterpart of `where_max_pool2d`.

    Args:
        what: (N, C, h, w), contiguous or channels-last (other strides are copied).
        where: (N, C, h, w): numbers of elements in windows (torch.uint8) or positions in channels (torch.int64), as
            `where_max_pool2d` returns them. A place outside its window is allowed: nothing is put anywhere.
        kernel_size: as in `where_max_pool2d`.
        output_size: (H, W) of what was pooled, by default (h rows, w columns). Positions need it where the windows do
            not fill W.

    Returns:
        (N, C, H, W) in the dtype and memory format of what. Differentiable any number of times in what; where alone is
        kept for backward.

    Every dtype is exact.

    Raises:
        ValueError: shapes, devices, an output_size or a kernel_size that do not fit.
        TypeError: dtypes or types that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Zhao et al., "Stacked What-Where Auto-encoders", 2015, section 3.
    """
    op = "where_max_unpool2d"
    check_dtype(op, "what", what)
    rows, columns = window(op, kernel_size)
    if not isinstance(where, Tensor):
        raise TypeError(f"{op}: where must be a tensor; got {type(where).__name__}")
    if where.dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"{op}: where must be torch.uint8 or torch.int64; got {where.dtype}")
    check_dense(f"{op}: where", where)
    if what.dim() != 4:
        raise ValueError(f"{op}: what must have shape (N, C, h, w); got {shape_text(what)}")
    if where.shape != what.shape:
        raise ValueError(
            f"{op}: where must have the shape of what, {shape_text(what)}; got {shape_text(where)}"
        )
    if where.device != what.device:
        raise ValueError(f"{op}: where must be on the device of what, {what.device}; got {where.device}")
    height, width = unpooled_size(op, what, (rows, columns), output_size)
    name = backend.choose(op, what.device.type, what.dtype)
    if name == "reference":
        return reference.where_max_unpool2d(what, where, (rows, columns), (height, width))
    return apply(_MaxUnpool, what, where, rows, columns, height, width, name)

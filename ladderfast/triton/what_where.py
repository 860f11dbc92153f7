"""Triton kernels of the op `what_where` and their launchers.

A program takes a tile of [outputs, taps]: neighbouring outputs (windows, and channels where channels are innermost) by
the elements of a window, rounded up to a power of two. Everything is widened to float32 at the load and rounded once,
at the store.

Floor, per element of z in float32: k x k pooling moves 4 + 12 / k^2 bytes forward and 8 + 12 / k^2 backward, unpooling
4 + 12 / k^2 forward and at most 4 + 24 / k^2 backward; hard, with where in bytes, 4 + 5 / k^2 each, and one element of
a window on the way back from unpooling. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

TILE = 2048  # outputs times taps of a program
BACKWARD_BLOCK = 256  # outputs of a program that reads four taps of each
LOG2_E = 1.4426950408889634


@triton.jit
def _outputs(
    outputs, down, across, inner, height, width, KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr
):
    """A program's outputs, which of them exist, their x and y in `where`, and where their windows begin in z."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = index % inner
    above = index // inner
    column = above % across
    above = above // across
    row = above % down
    outer = (above // down).to(tl.int64)
    plane = down * across * inner
    x = index + outer * plane
    origin = ((outer * height + row * KH) * width + column * KW) * inner + channel
    return index, index < outputs, x, x + plane, origin


@triton.jit
def _taps(KH: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr):
    """Rows and columns of a window's elements, and which of them exist."""
    tap = tl.arange(0, TAPS)
    return tap // KW, tap % KW, tap < KH * KW


@triton.jit
def _coordinate(k, SIZE: tl.constexpr):
    step: tl.constexpr = 1.0 / max(SIZE - 1, 1)
    return (2 * k - (SIZE - 1)).to(tl.float32) * step


@triton.jit
def _pooled(z, seen, x, y, scale):
    """Exponentials, 1 / their sum, m, px and py of each window in a tile."""
    most = tl.max(z, 1)
    e = tl.where(seen, tl.exp2((z - most[:, None]) * scale), 0.0)
    inverse = 1.0 / tl.sum(e, 1)
    what = tl.sum(tl.where(seen, z, 0.0) * e, 1) * inverse
    px = tl.minimum(tl.maximum(tl.sum(x[None, :] * e, 1) * inverse, -1.0), 1.0)
    py = tl.minimum(tl.maximum(tl.sum(y[None, :] * e, 1) * inverse, -1.0), 1.0)
    return e, inverse, what, px, py


@triton.jit
def _pool_kernel(
    z_ptr,
    what_ptr,
    where_ptr,
    scale,
    outputs,
    down,
    across,
    inner,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, exists, x_at, y_at, origin = _outputs(outputs, down, across, inner, height, width, KH, KW, BLOCK)
    i, j, real = _taps(KH, KW, TAPS)
    seen = exists[:, None] & real[None, :]
    at = origin[:, None] + ((i * width + j) * inner)[None, :]
    z = tl.load(z_ptr + at, mask=seen, other=float("-inf")).to(tl.float32)
    _, _, what, px, py = _pooled(z, seen, _coordinate(j, KW), _coordinate(i, KH), scale)
    tl.store(what_ptr + index, what, mask=exists)
    tl.store(where_ptr + x_at, px, mask=exists)
    tl.store(where_ptr + y_at, py, mask=exists)


@triton.jit
def _pool_backward_kernel(
    grad_what_ptr,
    grad_where_ptr,
    z_ptr,
    grad_z_ptr,
    scale,
    beta,
    outputs,
    down,
    across,
    inner,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, exists, x_at, y_at, origin = _outputs(outputs, down, across, inner, height, width, KH, KW, BLOCK)
    i, j, real = _taps(KH, KW, TAPS)
    seen = exists[:, None] & real[None, :]
    at = origin[:, None] + ((i * width + j) * inner)[None, :]
    z = tl.load(z_ptr + at, mask=seen, other=float("-inf")).to(tl.float32)
    x, y = _coordinate(j, KW), _coordinate(i, KH)
    e, inverse, what, px, py = _pooled(z, seen, x, y, scale)
    of_what = tl.load(grad_what_ptr + index, mask=exists, other=0.0).to(tl.float32) * inverse
    of_x = tl.load(grad_where_ptr + x_at, mask=exists, other=0.0).to(tl.float32) * (inverse * beta)
    of_y = tl.load(grad_where_ptr + y_at, mask=exists, other=0.0).to(tl.float32) * (inverse * beta)
    place = of_x[:, None] * (x[None, :] - px[:, None]) + of_y[:, None] * (y[None, :] - py[:, None])
    grad = e * ((of_what * beta)[:, None] * (z - what[:, None]) + of_what[:, None] + place)
    tl.store(grad_z_ptr + at, grad, mask=seen)


@triton.jit
def _place(p, SIZE: tl.constexpr):
    """The first of two neighbouring rows or columns and the share of the second; see `_placement` in the reference."""
    half: tl.constexpr = (SIZE - 1) / 2
    clamped = tl.where(p < -1.0, -1.0, tl.where(p > 1.0, 1.0, p))  # NaN stays NaN
    at = clamped * half + half
    first = tl.where(at == at, at + 3.814697265625e-06, 0.0).to(tl.int32)
    first = tl.minimum(first, max(SIZE - 2, 0))
    return first, at - first.to(tl.float32)


@triton.jit
def _unpool_kernel(
    what_ptr,
    where_ptr,
    z_ptr,
    outputs,
    down,
    across,
    inner,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, exists, x_at, y_at, origin = _outputs(outputs, down, across, inner, height, width, KH, KW, BLOCK)
    i, j, real = _taps(KH, KW, TAPS)
    what = tl.load(what_ptr + index, mask=exists, other=0.0).to(tl.float32)
    left, share_x = _place(tl.load(where_ptr + x_at, mask=exists, other=0.0).to(tl.float32), KW)
    top, share_y = _place(tl.load(where_ptr + y_at, mask=exists, other=0.0).to(tl.float32), KH)
    column, row = j[None, :] - left[:, None], i[None, :] - top[:, None]
    at_right, at_left = (what * share_x)[:, None], (what * (1.0 - share_x))[:, None]
    across_ = tl.where(column == 0, at_left, tl.where(column == 1, at_right, 0.0))
    down_ = tl.where(row == 0, 1.0 - share_y[:, None], tl.where(row == 1, share_y[:, None], 0.0))
    at = origin[:, None] + ((i * width + j) * inner)[None, :]
    tl.store(z_ptr + at, across_ * down_, mask=exists[:, None] & real[None, :])


@triton.jit
def _unpool_backward_kernel(
    grad_z_ptr,
    what_ptr,
    where_ptr,
    grad_what_ptr,
    grad_where_ptr,
    outputs,
    down,
    across,
    inner,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, exists, x_at, y_at, origin = _outputs(outputs, down, across, inner, height, width, KH, KW, BLOCK)
    what = tl.load(what_ptr + index, mask=exists, other=0.0).to(tl.float32)
    x = tl.load(where_ptr + x_at, mask=exists, other=0.0).to(tl.float32)
    y = tl.load(where_ptr + y_at, mask=exists, other=0.0).to(tl.float32)
    left, share_x = _place(x, KW)
    top, share_y = _place(y, KH)
    right = inner if KW > 1 else 0
    below = width * inner if KH > 1 else 0
    corner = grad_z_ptr + origin + (top * width + left) * inner
    top_left = tl.load(corner, mask=exists, other=0.0).to(tl.float32)
    top_right = tl.load(corner + right, mask=exists, other=0.0).to(tl.float32)
    bottom_left = tl.load(corner + below, mask=exists, other=0.0).to(tl.float32)
    bottom_right = tl.load(corner + below + right, mask=exists, other=0.0).to(tl.float32)
    top_slope, bottom_slope = top_right - top_left, bottom_right - bottom_left
    upper, lower = top_left + share_x * top_slope, bottom_left + share_x * bottom_slope
    half_x: tl.constexpr = (KW - 1) / 2
    half_y: tl.constexpr = (KH - 1) / 2
    of_x = what * half_x * (top_slope + share_y * (bottom_slope - top_slope))
    of_y = what * half_y * (lower - upper)
    tl.store(grad_what_ptr + index, upper + share_y * (lower - upper), mask=exists)
    tl.store(grad_where_ptr + x_at, tl.where((x >= -1.0) & (x <= 1.0), of_x, 0.0), mask=exists)
    tl.store(grad_where_ptr + y_at, tl.where((y >= -1.0) & (y <= 1.0), of_y, 0.0), mask=exists)


@triton.jit
def _window_position(index, down, across, inner, width, KH: tl.constexpr, KW: tl.constexpr):
    """The positions in their channels of the windows' first elements."""
    above = index // inner
    return (above // across % down * KH).to(tl.int64) * width + above % across * KW


@triton.jit
def _load_taps(
    where_ptr,
    index,
    exists,
    down,
    across,
    inner,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Which element of its window each where names, row by row; -1 where it is none of the window's."""
    where = tl.load(where_ptr + index, mask=exists, other=0)
    if POSITIONS:
        offset = where - _window_position(index, down, across, inner, width, KH, KW)
        row = tl.where(offset >= 0, offset // width, KH)
        column = offset - row * width
        return tl.where((row < KH) & (column < KW), row * KW + column, -1).to(tl.int32)
    else:
        tap = where.to(tl.int32)
        return tl.where(tap < KH * KW, tap, -1)


@triton.jit
def _max_pool_kernel(
    z_ptr,
    what_ptr,
    where_ptr,
    outputs,
    down,
    across,
    inner,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    index, exists, _, _, origin = _outputs(outputs, down, across, inner, height, width, KH, KW, BLOCK)
    i, j, real = _taps(KH, KW, TAPS)
    seen = exists[:, None] & real[None, :]
    at = origin[:, None] + ((i * width + j) * inner)[None, :]
    z = tl.load(z_ptr + at, mask=seen, other=float("-inf")).to(tl.float32)
    nan = z != z
    most = tl.max(tl.where(nan, float("-inf"), z), 1)
    # Of equal maxima the first one, of several NaN the last.
    tap = tl.arange(0, TAPS)[None, :]
    first = tl.min(tl.where(real[None, :] & (z == most[:, None]), tap, TAPS), 1)
    last_nan = tl.max(tl.where(nan, tap, -1), 1)
    tap = tl.where(last_nan >= 0, last_nan, first)
    tl.store(what_ptr + index, tl.where(last_nan >= 0, float("nan"), most), mask=exists)
    if POSITIONS:
        position = _window_position(index, down, across, inner, width, KH, KW)
        tl.store(where_ptr + index, position + tap // KW * width + tap % KW, mask=exists)
    else:
        tl.store(where_ptr + index, tap.to(tl.uint8), mask=exists)


@triton.jit
def _max_unpool_kernel(
    what_ptr,
    where_ptr,
    z_ptr,
    outputs,
    down,
    across,
    inner,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    index, exists, _, _, origin = _outputs(outputs, down, across, inner, height, width, KH, KW, BLOCK)
    i, j, real = _taps(KH, KW, TAPS)
    what = tl.load(what_ptr + index, mask=exists, other=0.0)
    tap = _load_taps(where_ptr, index, exists, down, across, inner, width, KH, KW, POSITIONS)
    at = origin[:, None] + ((i * width + j) * inner)[None, :]
    z = tl.where(tl.arange(0, TAPS)[None, :] == tap[:, None], what[:, None], 0.0)
    tl.store(z_ptr + at, z, mask=exists[:, None] & real[None, :])


@triton.jit
def _max_unpool_backward_kernel(
    grad_z_ptr,
    where_ptr,
    grad_what_ptr,
    outputs,
    down,
    across,
    inner,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    index, exists, _, _, origin = _outputs(outputs, down, across, inner, height, width, KH, KW, BLOCK)
    tap = _load_taps(where_ptr, index, exists, down, across, inner, width, KH, KW, POSITIONS)
    at = origin + (tap // KW * width + tap % KW) * inner
    grad = tl.load(grad_z_ptr + at, mask=exists & (tap >= 0), other=0.0)
    tl.store(grad_what_ptr + index, grad, mask=exists)


def _empty(like: Tensor, shape: tuple[int, ...], *, zero: bool = False) -> Tensor:
    """In the order of axes of `like`: contiguous, or the channels last."""
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    memory_format = torch.contiguous_format if like.is_contiguous() else last
    out = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    return out.zero_() if zero else out


def _as(t: Tensor, like: Tensor) -> Tensor:
    """t in the order of axes of `like`."""
    if like.is_contiguous():
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


def launch_sizes(like: Tensor, h: int, w: int, height: int, width: int) -> tuple[int, ...]:
    """Outputs, windows down and across, inner, height and width; `like` has N and C, and the order of axes."""
    n, c = like.shape[:2]
    return n * c * h * w, h, w, 1 if like.is_contiguous() else c, height, width


def constants(kernel_h: int, kernel_w: int) -> dict[str, int]:
    taps = triton.next_power_of_2(kernel_h * kernel_w)
    return {"KH": kernel_h, "KW": kernel_w, "TAPS": taps, "BLOCK": max(TILE // taps, 1)}


@triton_op("ladderfast::soft_pool2d_triton", mutates_args={})
def soft_pool2d_triton(z: Tensor, kernel_h: int, kernel_w: int, beta: float) -> tuple[Tensor, Tensor]:
    """z contiguous or channels-last; see ladderfast.ops.soft_pool2d."""
    n, c, height, width = z.shape
    h, w = height // kernel_h, width // kernel_w
    what, where = _empty(z, (n, c, h, w)), _empty(z, (n, c, 2, h, w))
    if what.numel() > 0:
        sizes, fixed = launch_sizes(z, h, w, height, width), constants(kernel_h, kernel_w)
        with torch.cuda.device_of(z):
            wrap_triton(_pool_kernel)[(triton.cdiv(sizes[0], fixed["BLOCK"]),)](
                z, what, where, beta * LOG2_E, *sizes, **fixed
            )
    return what, where


@triton_op("ladderfast::soft_pool2d_backward_triton", mutates_args={})
def soft_pool2d_backward_triton(
    grad_what: Tensor, grad_where: Tensor, z: Tensor, kernel_h: int, kernel_w: int, beta: float
) -> Tensor:
    """Gradient with respect to z."""
    height, width = z.shape[2:]
    h, w = height // kernel_h, width // kernel_w
    grad_z = _empty(z, tuple(z.shape), zero=h * kernel_h < height or w * kernel_w < width)
    if grad_what.numel() > 0:
        sizes, fixed = launch_sizes(z, h, w, height, width), constants(kernel_h, kernel_w)
        with torch.cuda.device_of(z):
            wrap_triton(_pool_backward_kernel)[(triton.cdiv(sizes[0], fixed["BLOCK"]),)](
                _as(grad_what, z), _as(grad_where, z), z, grad_z, beta * LOG2_E, beta, *sizes, **fixed
            )
    return grad_z


@triton_op("ladderfast::soft_unpool2d_triton", mutates_args={})
def soft_unpool2d_triton(what: Tensor, where: Tensor, kernel_h: int, kernel_w: int) -> Tensor:
    """what contiguous or channels-last; see ladderfast.ops.soft_unpool2d."""
    n, c, h, w = what.shape
    z = _empty(what, (n, c, h * kernel_h, w * kernel_w))
    if z.numel() > 0:
        sizes, fixed = launch_sizes(what, h, w, *z.shape[2:]), constants(kernel_h, kernel_w)
        with torch.cuda.device_of(what):
            wrap_triton(_unpool_kernel)[(triton.cdiv(sizes[0], fixed["BLOCK"]),)](
                what, _as(where, what), z, *sizes, **fixed
            )
    return z


@triton_op("ladderfast::soft_unpool2d_backward_triton", mutates_args={})
def soft_unpool2d_backward_triton(
    grad_z: Tensor, what: Tensor, where: Tensor, kernel_h: int, kernel_w: int
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to what and where."""
    n, c, h, w = what.shape
    grad_what, grad_where = _empty(what, (n, c, h, w)), _empty(what, (n, c, 2, h, w))
    if what.numel() > 0:
        sizes = launch_sizes(what, h, w, *grad_z.shape[2:])
        with torch.cuda.device_of(what):
            wrap_triton(_unpool_backward_kernel)[(triton.cdiv(sizes[0], BACKWARD_BLOCK),)](
                _as(grad_z, what),
                what,
                _as(where, what),
                grad_what,
                grad_where,
                *sizes,
                KH=kernel_h,
                KW=kernel_w,
                BLOCK=BACKWARD_BLOCK,
            )
    return grad_what, grad_where


@triton_op("ladderfast::where_max_pool2d_triton", mutates_args={})
def where_max_pool2d_triton(
    z: Tensor, kernel_h: int, kernel_w: int, positions: bool
) -> tuple[Tensor, Tensor]:
    """z contiguous or channels-last; see ladderfast.ops.where_max_pool2d."""
    n, c, height, width = z.shape
    h, w = height // kernel_h, width // kernel_w
    what = _empty(z, (n, c, h, w))
    where = torch.empty_like(what, dtype=torch.int64 if positions else torch.uint8)
    if what.numel() > 0:
        sizes, fixed = launch_sizes(z, h, w, height, width), constants(kernel_h, kernel_w)
        with torch.cuda.device_of(z):
            wrap_triton(_max_pool_kernel)[(triton.cdiv(sizes[0], fixed["BLOCK"]),)](
                z, what, where, *sizes, **fixed, POSITIONS=int(positions)
            )
    return what, where


def _put(what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, height: int, width: int) -> Tensor:
    """What at where, both in one order of axes."""
    n, c, h, w = what.shape
    z = _empty(what, (n, c, height, width), zero=h * kernel_h < height or w * kernel_w < width)
    if what.numel() > 0:
        sizes, fixed = launch_sizes(what, h, w, height, width), constants(kernel_h, kernel_w)
        with torch.cuda.device_of(what):
            wrap_triton(_max_unpool_kernel)[(triton.cdiv(sizes[0], fixed["BLOCK"]),)](
                what, where, z, *sizes, **fixed, POSITIONS=int(where.dtype == torch.int64)
            )
    return z


@triton_op("ladderfast::where_max_pool2d_backward_triton", mutates_args={})
def where_max_pool2d_backward_triton(
    grad_what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, height: int, width: int
) -> Tensor:
    """Gradient with respect to z, in the order of axes of where."""
    return _put(_as(grad_what, where), where, kernel_h, kernel_w, height, width)


@triton_op("ladderfast::where_max_unpool2d_triton", mutates_args={})
def where_max_unpool2d_triton(
    what: Tensor, where: Tensor, kernel_h: int, kernel_w: int, height: int, width: int
) -> Tensor:
    """what contiguous or channels-last; see ladderfast.ops.where_max_unpool2d."""
    return _put(what, _as(where, what), kernel_h, kernel_w, height, width)


@triton_op("ladderfast::where_max_unpool2d_backward_triton", mutates_args={})
def where_max_unpool2d_backward_triton(grad_z: Tensor, where: Tensor, kernel_h: int, kernel_w: int) -> Tensor:
    """Gradient with respect to what; grad_z contiguous or channels-last."""
    n, c, h, w = where.shape
    grad_what = _empty(grad_z, (n, c, h, w))
    if where.numel() > 0:
        sizes = launch_sizes(grad_z, h, w, *grad_z.shape[2:])
        with torch.cuda.device_of(grad_z):
            wrap_triton(_max_unpool_backward_kernel)[(triton.cdiv(sizes[0], BACKWARD_BLOCK),)](
                grad_z,
                _as(where, grad_z),
                grad_what,
                *sizes,
                KH=kernel_h,
                KW=kernel_w,
                BLOCK=BACKWARD_BLOCK,
                POSITIONS=int(where.dtype == torch.int64),
            )
    return grad_what

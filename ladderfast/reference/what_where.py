"""Pooling that keeps the where, and its unpooling, in plain PyTorch: specification, fallback and yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def coordinates(size: int, like: Tensor) -> Tensor:
    """Those of a window's `size` rows or columns: evenly spaced from -1 to 1, and 0 where there is one."""
    return (2 * torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1)) / max(size - 1, 1)


def _windows(z: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """z (N, C, H, W) as (N, C, h, rows, w, columns), less the rows and columns that fill no window."""
    rows, columns = kernel_size
    h, w = z.shape[2] // rows, z.shape[3] // columns
    return z[:, :, : h * rows, : w * columns].reshape(*z.shape[:2], h, rows, w, columns)


def _soft_weights(windows: Tensor, beta: float) -> Tensor:
    """exp(beta z) over its sum in the window; the shift by the largest z changes nothing and keeps it from overflow."""
    e = torch.exp(beta * (windows - windows.detach().amax((3, 5), keepdim=True)))
    return e / e.sum((3, 5), keepdim=True)


def soft_pool2d(z: Tensor, kernel_size: tuple[int, int], beta: float) -> tuple[Tensor, Tensor]:
    """Zhao et al. 2015, equations 3 and 4; shapes and meaning as `ladderfast.ops.soft_pool2d`.

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    dtype = z.dtype
    windows = _windows(z.float() if dtype in _HALF else z, kernel_size)
    weights = _soft_weights(windows, beta)
    y = coordinates(kernel_size[0], windows)[:, None, None]
    x = coordinates(kernel_size[1], windows)
    what = (windows * weights).sum((3, 5))
    where = torch.stack([(x * weights).sum((3, 5)), (y * weights).sum((3, 5))], 2)
    return what.to(dtype), where.to(dtype)


def soft_pool2d_backward(
    grad_what: Tensor, grad_where: Tensor, z: Tensor, kernel_size: tuple[int, int], beta: float
) -> Tensor:
    """Gradient with respect to z, in operations that are differentiable in their turn."""
    dtype = z.dtype
    if dtype in _HALF:
        grad_what, grad_where, z = grad_what.float(), grad_where.float(), z.float()
    windows = _windows(z, kernel_size)
    weights = _soft_weights(windows, beta)
    y = coordinates(kernel_size[0], windows)[:, None, None]
    x = coordinates(kernel_size[1], windows)

    def about_mean(values: Tensor) -> Tensor:
        return values - (values * weights).sum((3, 5), keepdim=True)

    def per_window(grad: Tensor) -> Tensor:
        return grad[:, :, :, None, :, None]

    grad_x, grad_y = grad_where.unbind(2)
    grad_soft = per_window(grad_what) * about_mean(windows)
    grad_soft = grad_soft + per_window(grad_x) * about_mean(x) + per_window(grad_y) * about_mean(y)
    grad = weights * (per_window(grad_what) + beta * grad_soft)
    n, c, h, rows, w, columns = grad.shape
    rest = (0, z.shape[3] - w * columns, 0, z.shape[2] - h * rows)
    return torch.nn.functional.pad(grad.reshape(n, c, h * rows, w * columns), rest).to(dtype)


def _placement(p: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For coordinates p (*), the weight of each of `size` rows or columns (*, size) and its derivative by p.

    Two neighbours share a coordinate between them in proportion to their nearness. On a row or column the derivative is
    that from the right, at the last one that from the left; beyond -1 and 1 it is 0. Sharp pooling puts p on rows and
    columns all the time, so that the rounding of `at` must not decide which side that is.
    """
    at = (p.clamp(-1, 1) + 1) * ((size - 1) / 2)
    left = (at.detach() + 32 * torch.finfo(p.dtype).eps).floor().clamp(max=max(size - 2, 0))
    share = (at - left).unsqueeze(-1)
    cells = torch.arange(size, dtype=p.dtype, device=p.device)
    on_left = (cells == left.unsqueeze(-1)).to(p.dtype)
    on_right = (cells == left.unsqueeze(-1) + 1).to(p.dtype)
    inside = ((p >= -1) & (p <= 1)).to(p.dtype).unsqueeze(-1)
    return on_left * (1 - share) + on_right * share, (on_right - on_left) * inside * ((size - 1) / 2)


def soft_unpool2d(what: Tensor, where: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Bilinear placement of what at where; shapes and meaning as `ladderfast.ops.soft_unpool2d`.

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    dtype = what.dtype
    if dtype in _HALF:
        what, where = what.float(), where.float()
    rows, columns = kernel_size
    x, y = where.unbind(2)
    # (N, C, h, w, columns) and (N, C, h, w, rows) meet as (N, C, h, rows, w, columns).
    across = _placement(x, columns)[0].unsqueeze(3)
    down = _placement(y, rows)[0].movedim(-1, 3).unsqueeze(-1)
    out = what[:, :, :, None, :, None] * down * across
    n, c, h, _, w, _ = out.shape
    return out.reshape(n, c, h * rows, w * columns).to(dtype)


def soft_unpool2d_backward(
    grad_z: Tensor, what: Tensor, where: Tensor, kernel_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to what and where, in operations that are differentiable in their turn."""
    dtype = what.dtype
    if dtype in _HALF:
        grad_z, what, where = grad_z.float(), what.float(), where.float()
    rows, columns = kernel_size
    x, y = where.unbind(2)
    across, across_slope = (t.unsqueeze(3) for t in _placement(x, columns))
    down, down_slope = (t.movedim(-1, 3).unsqueeze(-1) for t in _placement(y, rows))
    n, c, h, w = what.shape
    grad = grad_z.reshape(n, c, h, rows, w, columns)
    grad_what = (grad * down * across).sum((3, 5))
    grad_x = what * (grad * down * across_slope).sum((3, 5))
    grad_y = what * (grad * down_slope * across).sum((3, 5))
    return grad_what.to(dtype), torch.stack([grad_x, grad_y], 2).to(dtype)


def _window_starts(windows: Tensor, kernel_size: tuple[int, int], width: int) -> Tensor:
    """Positions in a channel, row * width + column, of the first elements of windows (N, C, h, w): (h, w)."""
    h, w = windows.shape[2:]
    down = torch.arange(h, device=windows.device) * (kernel_size[0] * width)
    return down[:, None] + torch.arange(w, device=windows.device) * kernel_size[1]


def _taps(where: Tensor, kernel_size: tuple[int, int], width: int) -> Tensor:
    """where (N, C, h, w) as the numbers of elements in their windows, row by row; -1 for what lies in none."""
    rows, columns = kernel_size
    if where.dtype == torch.uint8:
        tap = where.long()
        return torch.where(tap < rows * columns, tap, -1)
    offset = where - _window_starts(where, kernel_size, width)
    row, column = offset.div(width, rounding_mode="floor"), offset.remainder(width)
    inside = (row >= 0) & (row < rows) & (column < columns)
    return torch.where(inside, row * columns + column, -1)


def where_max_pool2d(
    z: Tensor, kernel_size: tuple[int, int], *, positions: bool = False
) -> tuple[Tensor, Tensor]:
    """The largest element of each window and its place; shapes and meaning as `ladderfast.ops.where_max_pool2d`."""
    rows, columns = kernel_size
    windows = _windows(z, kernel_size).transpose(3, 4).flatten(4)
    nan = windows.isnan()
    last_nan = rows * columns - 1 - nan.flip(-1).int().argmax(-1)
    tap = torch.where(nan.any(-1), last_nan, windows.argmax(-1))
    what = windows.gather(-1, tap.unsqueeze(-1)).squeeze(-1)
    if not positions:
        return what, tap.to(torch.uint8)
    width = z.shape[3]
    row, column = tap.div(columns, rounding_mode="floor"), tap.remainder(columns)
    return what, _window_starts(tap, kernel_size, width) + row * width + column


def where_max_unpool2d(
    what: Tensor, where: Tensor, kernel_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """What at where, and else 0; shapes and meaning as `ladderfast.ops.where_max_unpool2d`.

    It is where_max_pool2d's backward pass as well, with the gradient of what in the place of what.
    """
    rows, columns = kernel_size
    height, width = output_size
    n, c, h, w = what.shape
    at = _taps(where, kernel_size, width).unsqueeze(-1) == torch.arange(rows * columns, device=what.device)
    windows = torch.where(at, what.unsqueeze(-1), 0).unflatten(-1, kernel_size).transpose(3, 4)
    z = windows.reshape(n, c, h * rows, w * columns)
    return torch.nn.functional.pad(z, (0, width - w * columns, 0, height - h * rows))


def where_max_unpool2d_backward(grad_z: Tensor, where: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Gradient with respect to what: that of z at where, and 0 where nothing was put."""
    tap = _taps(where, kernel_size, grad_z.shape[3])
    windows = _windows(grad_z, kernel_size).transpose(3, 4).flatten(4)
    return torch.where(tap >= 0, windows.gather(-1, tap.clamp(min=0).unsqueeze(-1)).squeeze(-1), 0)

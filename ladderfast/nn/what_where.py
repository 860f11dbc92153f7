"""Drop-in modules for pooling that keeps the where, and its unpooling (Zhao et al. 2015)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ladderfast.ops import soft_pool2d, soft_unpool2d, where_max_pool2d, where_max_unpool2d
from ladderfast.ops.what_where import sharpness, unpooled_size, window


class _Windowed(nn.Module):
    """A module with a window, whose stride is the window."""

    def __init__(self, kernel_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.kernel_size = window(type(self).__name__, kernel_size)

    def extra_repr(self) -> str:
        rows, columns = self.kernel_size
        return f"{rows}" if rows == columns else f"{self.kernel_size}"


class SoftPool2d(_Windowed):
    """Soft pooling: how much there is in each window, and at which place.

    Args:
        kernel_size: the window's rows and columns, one number or a pair, each from 1 to 16; the stride is the same.
        beta: how sharp, from 0 (the mean, and the window's centre) to 1e6; 100 is the paper's.

    Shape:
        z (N, C, H, W) -> what (N, C, h, w) and where (N, C, 2, h, w), x then y in [-1, 1]. Rows and columns that fill
        no window are left out: h = H // rows, w = W // columns. See `ladderfast.ops.soft_pool2d`.
    """

    def __init__(self, kernel_size: int | tuple[int, int], beta: float = 100.0) -> None:
        super().__init__(kernel_size)
        self.beta = sharpness("SoftPool2d", beta)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return soft_pool2d(z, self.kernel_size, self.beta)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta:g}"


class SoftUnpool2d(_Windowed):
    """Puts what at where by bilinear interpolation: the counterpart of `SoftPool2d`.

    Args:
        kernel_size: as in `SoftPool2d`.

    Shape:
        what (N, C, h, w), where (N, C, 2, h, w) -> (N, C, h rows, w columns), or with `output_size` = (H, W) that many
        rows and columns: those that pooling left out are 0. See `ladderfast.ops.soft_unpool2d`.
    """

    def forward(self, what: Tensor, where: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        z = soft_unpool2d(what, where, self.kernel_size)
        height, width = unpooled_size("SoftUnpool2d", what, self.kernel_size, output_size)
        if (height, width) == tuple(z.shape[2:]):
            return z
        return functional.pad(z, (0, width - z.shape[3], 0, height - z.shape[2]))


class WhereMaxPool2d(_Windowed):
    """Hard pooling: each window's maximum and its place.

    Of equal maxima the first one counts, row by row, on every device.

    Args:
        kernel_size: the window's rows and columns, one number or a pair, each from 1 to 16; the stride is the same.
        positions: where as torch.nn.functional.max_pool2d has it; without, it takes an eighth of the memory.

    Shape:
        z (N, C, H, W) -> what (N, C, h, w) and where (N, C, h, w), integers: the maximum's position in the channel,
        row * W + column, in torch.int64; or without `positions` its number in the window, row * columns + column, in
        torch.uint8. Rows and columns that fill no window are left out: h = H // rows, w = W // columns. See
        `ladderfast.ops.where_max_pool2d`.
    """

    def __init__(self, kernel_size: int | tuple[int, int], *, positions: bool = True) -> None:
        super().__init__(kernel_size)
        self.positions = positions

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return where_max_pool2d(z, self.kernel_size, positions=self.positions)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, positions={self.positions}"


class WhereMaxUnpool2d(_Windowed):
    """Puts what at where, and 0 everywhere else: the counterpart of `WhereMaxPool2d`.

    Args:
        kernel_size: as in `WhereMaxPool2d`.

    Shape:
        what (N, C, h, w), where (N, C, h, w) in either form -> (N, C, h rows, w columns), or with `output_size` =
        (H, W) that many rows and columns; positions need it where the window does not divide what was pooled. See
        `ladderfast.ops.where_max_unpool2d`.
    """

    def forward(self, what: Tensor, where: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        return where_max_unpool2d(what, where, self.kernel_size, output_size)

"""Triton kernels of the op `combinator` and their launchers.

z, u, z_hat and their gradients share a packed layout (seeds, rows, channels, inner), inner fastest. A program works on
tiles of [rows, columns]: columns are neighbouring channels where inner = 1 (channels-last and dense), and else
positions of one channel's run. Everything is widened to float32 at the load and rounded once, at the store.

Floor: forward moves 3 elements, backward 5, for each element of z; the arithmetic (two exponentials and two divisions
each way) is below that in float32. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS_PER_TILE = 4
SUM_TILE = 16
SEGMENT = 32768  # elements of a run that a program takes, at the least


@triton.jit
def load_param(params, index: tl.constexpr, channels, c, mask):
    return tl.load(params + index * channels + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_params(params_ptr, seed, channels, c):
    """a1 .. a10 of the channels c of a seed."""
    params = params_ptr + seed.to(tl.int64) * 10 * channels
    seen = c < channels
    a1 = load_param(params, 0, channels, c, seen)
    a2 = load_param(params, 1, channels, c, seen)
    a3 = load_param(params, 2, channels, c, seen)
    a4 = load_param(params, 3, channels, c, seen)
    a5 = load_param(params, 4, channels, c, seen)
    a6 = load_param(params, 5, channels, c, seen)
    a7 = load_param(params, 6, channels, c, seen)
    a8 = load_param(params, 7, channels, c, seen)
    a9 = load_param(params, 8, channels, c, seen)
    a10 = load_param(params, 9, channels, c, seen)
    return a1, a2, a3, a4, a5, a6, a7, a8, a9, a10


@triton.jit
def combine(z, u, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH: tl.constexpr):
    mu = a1 * tl.sigmoid(a2 * u + a3) + a4 * u + a5
    v = a6 * tl.sigmoid(a7 * u + a8) + a9 * u + a10
    if SQUASH:
        v = tl.sigmoid(v)
    return (z - mu) * v + mu


@triton.jit
def combine_backward(grad, z, u, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH: tl.constexpr):
    """Gradients of z and u, and what the parameters' gradients are sums of."""
    s_mu = tl.sigmoid(a2 * u + a3)
    s_v = tl.sigmoid(a7 * u + a8)
    mu = a1 * s_mu + a4 * u + a5
    v = a6 * s_v + a9 * u + a10
    grad_v = grad * (z - mu)
    if SQUASH:
        v = tl.sigmoid(v)
        grad_v = grad_v * v * (1.0 - v)
    grad_z = grad * v
    grad_mu = grad * (1.0 - v)
    slope_mu = grad_mu * s_mu * (1.0 - s_mu)
    slope_v = grad_v * s_v * (1.0 - s_v)
    grad_u = a1 * a2 * slope_mu + a4 * grad_mu + a6 * a7 * slope_v + a9 * grad_v
    return grad_z, grad_u, s_mu, grad_mu, slope_mu, s_v, grad_v, slope_v


@triton.jit
def tile(
    program,
    chunk,
    blocks,
    rows,
    channels,
    inner,
    rows_per_chunk,
    segment,
    segments,
    PER_COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Where a program works: its seed, row range, channels, first element, number of columns and
    range of columns."""
    if PER_COLUMN:
        seed = program // blocks
        column = (program % blocks) * COLUMNS
        column_end = column + 1
        row = chunk * rows_per_chunk
        c = column + tl.arange(0, COLUMNS)
        first = seed.to(tl.int64) * rows * channels
        limit = channels
    else:
        seed = program // channels
        column = (chunk % segments) * segment
        column_end = tl.minimum(column + segment, inner)
        row = (chunk // segments) * rows_per_chunk
        c = program % channels
        first = seed.to(tl.int64) * rows * channels * inner + c.to(tl.int64) * inner
        limit = inner
    return seed, row, tl.minimum(row + rows_per_chunk, rows), c, first, limit, column, column_end


@triton.jit
def _forward_kernel(
    z_ptr,
    u_ptr,
    params_ptr,
    z_hat_ptr,
    blocks,
    rows,
    channels,
    inner,
    rows_per_chunk,
    segment,
    segments,
    SQUASH: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(1)
    seed, row, row_end, c, first, limit, column_begin, column_end = tile(
        tl.program_id(0),
        chunk,
        blocks,
        rows,
        channels,
        inner,
        rows_per_chunk,
        segment,
        segments,
        PER_COLUMN,
        COLUMNS,
    )
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = load_params(params_ptr, seed, channels, c)

    for column in range(column_begin, column_end, COLUMNS):
        k = column + tl.arange(0, COLUMNS)
        for r in range(row, row_end, ROWS):
            i = r + tl.arange(0, ROWS)
            mask = (i < row_end)[:, None] & (k < limit)[None, :]
            at = first + i.to(tl.int64)[:, None] * channels * inner + k[None, :]
            z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            out = combine(z, u, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH)
            tl.store(z_hat_ptr + at, out.to(z_hat_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_sum(
    partial_ptr,
    index: tl.constexpr,
    total,
    slot_row,
    sums: tl.constexpr,
    channels,
    c,
    PER_COLUMN: tl.constexpr,
):
    """Sum number `index` of `sums` of a program, into its slot."""
    at = partial_ptr + (slot_row * sums + index) * channels + c
    if PER_COLUMN:
        tl.store(at, tl.sum(total, axis=0), mask=c < channels)
    else:
        tl.store(at, tl.sum(tl.sum(total, axis=0), axis=0))


@triton.jit
def _backward_kernel(
    grad_ptr,
    z_ptr,
    u_ptr,
    params_ptr,
    grad_z_ptr,
    grad_u_ptr,
    partial_ptr,
    blocks,
    rows,
    channels,
    inner,
    rows_per_chunk,
    segment,
    segments,
    slots,
    SQUASH: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(1)
    seed, row, row_end, c, first, limit, column_begin, column_end = tile(
        tl.program_id(0),
        chunk,
        blocks,
        rows,
        channels,
        inner,
        rows_per_chunk,
        segment,
        segments,
        PER_COLUMN,
        COLUMNS,
    )
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = load_params(params_ptr, seed, channels, c)

    # Sums towards the gradients of a1 .. a10, less the factors a1 and a6, which the final sums apply.
    s1 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    s2, s3, s4, s5, s6, s7, s8, s9, s10 = s1, s1, s1, s1, s1, s1, s1, s1, s1

    for column in range(column_begin, column_end, COLUMNS):
        k = column + tl.arange(0, COLUMNS)
        for r in range(row, row_end, ROWS):
            i = r + tl.arange(0, ROWS)
            mask = (i < row_end)[:, None] & (k < limit)[None, :]
            at = first + i.to(tl.int64)[:, None] * channels * inner + k[None, :]
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            grad_z, grad_u, s_mu, grad_mu, slope_mu, s_v, grad_v, slope_v = combine_backward(
                grad, z, u, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH
            )
            tl.store(grad_z_ptr + at, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
            tl.store(grad_u_ptr + at, grad_u.to(grad_u_ptr.dtype.element_ty), mask=mask)
            s1 += grad_mu * s_mu
            s2 += slope_mu * u
            s3 += slope_mu
            s4 += grad_mu * u
            s5 += grad_mu
            s6 += grad_v * s_v
            s7 += slope_v * u
            s8 += slope_v
            s9 += grad_v * u
            s10 += grad_v

    slot_row = seed.to(tl.int64) * slots + chunk
    store_sum(partial_ptr, 0, s1, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 1, s2, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 2, s3, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 3, s4, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 4, s5, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 5, s6, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 6, s7, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 7, s8, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 8, s9, slot_row, 10, channels, c, PER_COLUMN)
    store_sum(partial_ptr, 9, s10, slot_row, 10, channels, c, PER_COLUMN)


@triton.jit
def _sum_kernel(
    partial_ptr,
    params_ptr,
    grad_params_ptr,
    channels,
    slots,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums the slots of one parameter row (program 0: seed * 10 + row) in their order."""
    seed = tl.program_id(0) // 10
    j = tl.program_id(0) % 10
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for slot in range(0, slots, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        at = ((seed.to(tl.int64) * slots + i.to(tl.int64)) * 10 + j)[:, None] * channels + c[None, :]
        total += tl.load(partial_ptr + at, mask=(i < slots)[:, None] & (c < channels)[None, :], other=0.0)
    out = tl.sum(total, axis=0)
    params = params_ptr + seed.to(tl.int64) * 10 * channels
    if (j == 1) | (j == 2):
        out *= load_param(params, 0, channels, c, c < channels)
    if (j == 6) | (j == 7):
        out *= load_param(params, 5, channels, c, c < channels)
    at = (seed.to(tl.int64) * 10 + j) * channels + c
    tl.store(grad_params_ptr + at, out.to(grad_params_ptr.dtype.element_ty), mask=c < channels)


def ceil(a: int, b: int) -> int:
    return (a + b - 1) // b


class Plan:
    """How a shape is cut into programs and partial sums; depends on the shape alone."""

    def __init__(self, z: Tensor, params: Tensor) -> None:
        channel = params.dim() - 1
        self.seeds = z.shape[0] if channel == 2 else 1
        self.rows, self.channels = z.shape[channel - 1], z.shape[channel]
        self.inner = 1
        for size in z.shape[channel + 1 :]:
            self.inner *= size
        if not z.is_contiguous():
            self.rows, self.inner = self.rows * self.inner, 1
        self.per_column = self.inner == 1
        width = self.channels if self.per_column else self.inner
        self.columns = min(128, max(16, triton.next_power_of_2(width)))
        self.tile_rows = min(16, 512 // self.columns) if self.per_column else ROWS_PER_TILE
        if self.per_column:
            self.segment = self.segments = 1
            self.rows_per_chunk = max(32, ceil(self.rows, 256))
        else:
            # At most 256 segments, of whole tiles: a tile that ran into the next segment would count twice.
            self.segment = ceil(max(SEGMENT, ceil(self.inner, 256)), self.columns) * self.columns
            self.segments = ceil(self.inner, self.segment)
            self.rows_per_chunk = max(1, 8192 // self.inner, ceil(self.rows, 256))
        self.slots = ceil(self.rows, self.rows_per_chunk) * self.segments
        self.blocks = ceil(self.channels, self.columns) if self.per_column else self.channels
        self.grid = (self.blocks * self.seeds, self.slots)  # the second axis is limited to 65535

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            self.blocks,
            self.rows,
            self.channels,
            self.inner,
            self.rows_per_chunk,
            self.segment,
            self.segments,
        )

    def constants(self, squash_v: int) -> dict[str, int]:
        return {
            "SQUASH": squash_v,
            "PER_COLUMN": int(self.per_column),
            "ROWS": self.tile_rows,
            "COLUMNS": self.columns,
        }


def like(t: Tensor, z: Tensor) -> Tensor:
    return t if t.stride() == z.stride() else torch.empty_like(z).copy_(t)


@triton_op("ladderfast::combinator_triton", mutates_args={})
def combinator_triton(z: Tensor, u: Tensor, params: Tensor, squash_v: int) -> Tensor:
    """z contiguous or channels-last; see ladderfast.ops.gaussian_combinator."""
    z_hat = torch.empty_like(z)
    if z.numel() > 0:
        plan = Plan(z, params)
        with torch.cuda.device_of(z):
            wrap_triton(_forward_kernel)[plan.grid](
                z, like(u, z), params.contiguous(), z_hat, *plan.sizes, **plan.constants(squash_v)
            )
    return z_hat


@triton_op("ladderfast::combinator_backward_triton", mutates_args={})
def combinator_backward_triton(
    grad_z_hat: Tensor, z: Tensor, u: Tensor, params: Tensor, squash_v: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to z, u and params."""
    params = params.contiguous()
    grad_z, grad_u = torch.empty_like(z), torch.empty_like(z)
    if z.numel() == 0:
        return grad_z, grad_u, torch.zeros_like(params)
    plan = Plan(z, params)
    grad_params = torch.empty_like(params)
    partial = torch.empty((plan.seeds, plan.slots, 10, plan.channels), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        wrap_triton(_backward_kernel)[plan.grid](
            like(grad_z_hat, z),
            z,
            like(u, z),
            params,
            grad_z,
            grad_u,
            partial,
            *plan.sizes,
            plan.slots,
            **plan.constants(squash_v),
        )
        wrap_triton(_sum_kernel)[(plan.seeds * 10, ceil(plan.channels, 128))](
            partial, params, grad_params, plan.channels, plan.slots, SLOTS=SUM_TILE, COLUMNS=128
        )
    return grad_z, grad_u, grad_params

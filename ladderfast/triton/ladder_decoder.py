"""Triton kernels of the op `ladder_decoder` and their launchers.

Layouts, walks and the combinator's formula are those of triton/combinator.py; the decoder's own formulas are those of
csrc/math/ladder_decoder.h. Everything is widened to float32 at the load and rounded once, at the store.

Dense layers of up to 256 rows are held: a program keeps all rows of 8 columns (16 in 16 bits), and each pass is one
kernel that reads and writes every element once. Larger shapes are cut into chunks: forward takes moments of the chunks,
merges them, combines and compares; backward sums, finishes the sums, and recomputes what reaches the normalised u for
the gradient of u. The programs' shares of the cost are added up by torch.

Floor, in elements moved for each element of u: forward 4 held and 5 in chunks, backward 7 held and 11 in chunks; the
arithmetic is below that in float32. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ladderfast.triton.combinator import (
    Plan,
    ceil,
    combine,
    combine_backward,
    like,
    load_param,
    load_params,
    store_sum,
    tile,
)

HELD_ROWS = 256
SUMMED_RUN_ROWS = 2  # of a tile of runs in the pass that sums: with more it spills
FINISH_TILE = {"SLOTS": 8, "COLUMNS": 32}


@triton.jit
def _inverse_root(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _load_clean(mean_ptr, var_ptr, at, mask, eps, NORMAL: tl.constexpr):
    """Mean and inverse root of the clean z's variance; 0 and 1 at layer 0."""
    if NORMAL:
        mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
        rstd = _inverse_root(tl.load(var_ptr + at, mask=mask, other=1.0), eps)
    else:
        mean = 0.0
        rstd = 1.0
    return mean, rstd


@triton.jit
def _grad_of_cost(z_hat, clean, mean, rstd, scale, mask):
    """What the cost adds to the gradients of z_hat and clean_z, and to the sums for mean and var."""
    normal = (z_hat - mean) * rstd
    grad = tl.where(mask, (normal - clean) * scale, 0.0)
    return grad * rstd, -grad, grad, tl.where(mask, grad * normal, 0.0)


@triton.jit
def _means_of_grad(s1, s2, s3, s4, s6, s7, s8, s9, a1, a2, a4, a6, a7, a9, count):
    """Means of what reaches the normalised u, and of that times the normalised u, from the parameters' sums."""
    at_mean = a1 * a2 * s2 + a4 * s4 + a6 * a7 * s7 + a9 * s9
    slope = a1 * a2 * s1 + a4 * s3 + a6 * a7 * s6 + a9 * s8
    return tl.div_rn(at_mean, count), tl.div_rn(slope, count)


@triton.jit
def _held_tile(blocks, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Seed, channels, place in what is stored by channel, element offsets, and which elements exist."""
    seed = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)
    mask = (i < rows)[:, None] & (c < channels)[None, :]
    first = seed.to(tl.int64) * rows * channels
    at = first + i.to(tl.int64)[:, None] * channels + c[None, :]
    return seed, c, seed.to(tl.int64) * channels + c, first, at, mask


@triton.jit
def _held_forward_kernel(
    u_ptr,
    z_ptr,
    params_ptr,
    clean_ptr,
    mean_ptr,
    var_ptr,
    z_hat_ptr,
    u_mean_ptr,
    u_var_ptr,
    share_ptr,
    blocks,
    rows,
    channels,
    count,
    eps,
    SQUASH: tl.constexpr,
    COST: tl.constexpr,
    NORMAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seed, c, of_channel, first, at, mask = _held_tile(blocks, rows, channels, ROWS, COLUMNS)
    seen = c < channels
    u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = load_params(params_ptr, seed, channels, c)

    # Relative to the first row: a constant column has variance 0 exactly.
    start = tl.load(u_ptr + first + c, mask=seen, other=0.0).to(tl.float32)
    apart = tl.where(mask, u - start[None, :], 0.0)
    shift = tl.div_rn(tl.sum(apart, axis=0), count)
    apart = tl.where(mask, apart - shift[None, :], 0.0)
    u_var = tl.div_rn(tl.sum(apart * apart, axis=0), count)
    u_mean = start + shift
    tl.store(u_mean_ptr + of_channel, u_mean, mask=seen)
    tl.store(u_var_ptr + of_channel, u_var, mask=seen)

    v = (u - u_mean[None, :]) * _inverse_root(u_var, eps)[None, :]
    z_hat = combine(z, v, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH)
    tl.store(z_hat_ptr + at, z_hat.to(z_hat_ptr.dtype.element_ty), mask=mask)
    if COST:
        clean = tl.load(clean_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = _load_clean(mean_ptr, var_ptr, of_channel, seen, eps, NORMAL)
        error = tl.where(mask, (z_hat - mean) * rstd - clean, 0.0)
        tl.store(share_ptr + tl.program_id(0), tl.sum(tl.sum(error * error, axis=0), axis=0))


@triton.jit
def _held_backward_kernel(
    grad_ptr,
    grad_cost_ptr,
    u_ptr,
    z_ptr,
    params_ptr,
    clean_ptr,
    mean_ptr,
    var_ptr,
    u_mean_ptr,
    u_var_ptr,
    grad_u_ptr,
    grad_z_ptr,
    grad_params_ptr,
    grad_clean_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    blocks,
    rows,
    channels,
    count,
    eps,
    per_element,
    SQUASH: tl.constexpr,
    GRAD: tl.constexpr,
    COST: tl.constexpr,
    NORMAL: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_CLEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seed, c, of_channel, _, at, mask = _held_tile(blocks, rows, channels, ROWS, COLUMNS)
    seen = c < channels
    u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = load_params(params_ptr, seed, channels, c)
    u_mean = tl.load(u_mean_ptr + of_channel, mask=seen, other=0.0)
    u_rstd = _inverse_root(tl.load(u_var_ptr + of_channel, mask=seen, other=1.0), eps)
    v = (u - u_mean[None, :]) * u_rstd[None, :]
    if GRAD:
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        grad = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if COST:
        clean = tl.load(clean_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = _load_clean(mean_ptr, var_ptr, of_channel, seen, eps, NORMAL)
        scale = tl.load(grad_cost_ptr + seed) * per_element
        z_hat = combine(z, v, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH)
        for_z_hat, for_clean, for_mean, for_var = _grad_of_cost(z_hat, clean, mean, rstd, scale, mask)
        grad += for_z_hat
        if WANT_CLEAN:
            tl.store(grad_clean_ptr + at, for_clean.to(grad_clean_ptr.dtype.element_ty), mask=mask)
        if NORMAL:
            tl.store(grad_mean_ptr + of_channel, -tl.sum(for_mean, axis=0) * rstd, mask=seen)
            tl.store(grad_var_ptr + of_channel, tl.sum(for_var, axis=0) * rstd * rstd * -0.5, mask=seen)

    grad_z, grad_v, s_mu, grad_mu, slope_mu, s_v, grad_w, slope_w = combine_backward(
        grad, z, v, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH
    )
    if WANT_Z:
        tl.store(grad_z_ptr + at, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
    # Rows and columns that do not exist have grad 0 and with it every term.
    s0 = tl.sum(grad_mu * s_mu, axis=0)
    s1 = tl.sum(slope_mu * v, axis=0)
    s2 = tl.sum(slope_mu, axis=0)
    s3 = tl.sum(grad_mu * v, axis=0)
    s4 = tl.sum(grad_mu, axis=0)
    s5 = tl.sum(grad_w * s_v, axis=0)
    s6 = tl.sum(slope_w * v, axis=0)
    s7 = tl.sum(slope_w, axis=0)
    s8 = tl.sum(grad_w * v, axis=0)
    s9 = tl.sum(grad_w, axis=0)
    at_mean, slope = _means_of_grad(s1, s2, s3, s4, s6, s7, s8, s9, a1, a2, a4, a6, a7, a9, count)
    grad_u = u_rstd[None, :] * (grad_v - at_mean[None, :] - slope[None, :] * v)
    tl.store(grad_u_ptr + at, grad_u.to(grad_u_ptr.dtype.element_ty), mask=mask)
    _store_params(grad_params_ptr, seed, channels, c, a1, a6, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9)


@triton.jit
def _store_params(grad_params_ptr, seed, channels, c, a1, a6, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9):
    seen = c < channels
    to = grad_params_ptr + seed.to(tl.int64) * 10 * channels + c
    dtype = grad_params_ptr.dtype.element_ty
    tl.store(to, s0.to(dtype), mask=seen)
    tl.store(to + channels, (s1 * a1).to(dtype), mask=seen)
    tl.store(to + 2 * channels, (s2 * a1).to(dtype), mask=seen)
    tl.store(to + 3 * channels, s3.to(dtype), mask=seen)
    tl.store(to + 4 * channels, s4.to(dtype), mask=seen)
    tl.store(to + 5 * channels, s5.to(dtype), mask=seen)
    tl.store(to + 6 * channels, (s6 * a6).to(dtype), mask=seen)
    tl.store(to + 7 * channels, (s7 * a6).to(dtype), mask=seen)
    tl.store(to + 8 * channels, s8.to(dtype), mask=seen)
    tl.store(to + 9 * channels, s9.to(dtype), mask=seen)


@triton.jit
def _join(count, mean, squares, AXIS: tl.constexpr):
    """Count, mean and squared deviations of all from those of parts, along an axis."""
    n = tl.sum(count, axis=AXIS)
    middle = tl.div_rn(tl.sum(count * mean, axis=AXIS), tl.maximum(n, 1.0))
    apart = mean - tl.expand_dims(middle, AXIS)
    return n, middle, tl.sum(squares + count * apart * apart, axis=AXIS)


@triton.jit
def _moments_kernel(
    u_ptr,
    partial_ptr,
    blocks,
    rows,
    channels,
    inner,
    rows_per_chunk,
    segment,
    segments,
    slots,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Count, mean and squared deviations of a chunk, relative to each channel's first value."""
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
    if PER_COLUMN:
        start = tl.load(u_ptr + first + c, mask=c < channels, other=0.0).to(tl.float32)
    else:
        start = tl.load(u_ptr + first).to(tl.float32)
    count = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    mean, squares = count, count
    for column in range(column_begin, column_end, COLUMNS):
        k = column + tl.arange(0, COLUMNS)
        for r in range(row, row_end, ROWS):
            i = r + tl.arange(0, ROWS)
            mask = (i < row_end)[:, None] & (k < limit)[None, :]
            at = first + i.to(tl.int64)[:, None] * channels * inner + k[None, :]
            x = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32) - start
            # Each place of the tile keeps its own moments (Welford, 1962).
            count += mask.to(tl.float32)
            apart = tl.where(mask, x - mean, 0.0)
            mean += apart / tl.maximum(count, 1.0)
            squares += apart * (x - mean)
    n, middle, total = _join(count, mean, squares, 0)
    if not PER_COLUMN:
        n, middle, total = _join(n, middle, total, 0)
    to = partial_ptr + (seed.to(tl.int64) * slots + chunk) * 3 * channels + c
    tl.store(to, n, mask=c < channels)
    tl.store(to + channels, middle, mask=c < channels)
    tl.store(to + 2 * channels, total, mask=c < channels)


@triton.jit
def _merge_kernel(
    u_ptr,
    partial_ptr,
    u_mean_ptr,
    u_var_ptr,
    rows,
    channels,
    inner,
    slots,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The slots' moments in their order -> u_mean, u_var."""
    seed = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = c < channels
    count = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    mean, squares = count, count
    for slot in range(0, slots, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        mask = (i < slots)[:, None] & seen[None, :]
        at = (seed.to(tl.int64) * slots + i.to(tl.int64))[:, None] * 3 * channels + c[None, :]
        n = tl.load(partial_ptr + at, mask=mask, other=0.0)
        apart = tl.load(partial_ptr + at + channels, mask=mask, other=0.0) - mean
        before = count
        count += n
        share = n / tl.maximum(count, 1.0)
        mean += apart * share
        squares += tl.load(partial_ptr + at + 2 * channels, mask=mask, other=0.0)
        squares += apart * apart * before * share
    n, middle, total = _join(count, mean, squares, 0)
    start = tl.load(u_ptr + seed.to(tl.int64) * rows * channels * inner + c.to(tl.int64) * inner, mask=seen)
    tl.store(u_mean_ptr + seed * channels + c, start.to(tl.float32) + middle, mask=seen)
    tl.store(u_var_ptr + seed * channels + c, tl.div_rn(total, tl.maximum(n, 1.0)), mask=seen)


@triton.jit
def _forward_kernel(
    u_ptr,
    z_ptr,
    params_ptr,
    clean_ptr,
    mean_ptr,
    var_ptr,
    u_mean_ptr,
    u_var_ptr,
    z_hat_ptr,
    share_ptr,
    eps,
    blocks,
    rows,
    channels,
    inner,
    rows_per_chunk,
    segment,
    segments,
    slots,
    SQUASH: tl.constexpr,
    COST: tl.constexpr,
    NORMAL: tl.constexpr,
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
    seen = c < channels
    of_channel = seed.to(tl.int64) * channels + c
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = load_params(params_ptr, seed, channels, c)
    u_mean = tl.load(u_mean_ptr + of_channel, mask=seen, other=0.0)
    u_rstd = _inverse_root(tl.load(u_var_ptr + of_channel, mask=seen, other=1.0), eps)
    mean, rstd = _load_clean(mean_ptr, var_ptr, of_channel, seen, eps, NORMAL)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for column in range(column_begin, column_end, COLUMNS):
        k = column + tl.arange(0, COLUMNS)
        for r in range(row, row_end, ROWS):
            i = r + tl.arange(0, ROWS)
            mask = (i < row_end)[:, None] & (k < limit)[None, :]
            at = first + i.to(tl.int64)[:, None] * channels * inner + k[None, :]
            z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
            v = (tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32) - u_mean) * u_rstd
            z_hat = combine(z, v, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH)
            tl.store(z_hat_ptr + at, z_hat.to(z_hat_ptr.dtype.element_ty), mask=mask)
            if COST:
                clean = tl.load(clean_ptr + at, mask=mask, other=0.0).to(tl.float32)
                error = tl.where(mask, (z_hat - mean) * rstd - clean, 0.0)
                total += error * error
    if COST:
        # The shares of a seed lie together: blocks first, as program 0 counts, then slots.
        program = tl.program_id(0).to(tl.int64) * slots + chunk
        tl.store(share_ptr + program, tl.sum(tl.sum(total, axis=0), axis=0))


@triton.jit
def _backward_kernel(
    grad_ptr,
    grad_cost_ptr,
    u_ptr,
    z_ptr,
    params_ptr,
    clean_ptr,
    mean_ptr,
    var_ptr,
    u_mean_ptr,
    u_var_ptr,
    grad_u_ptr,
    grad_z_ptr,
    grad_clean_ptr,
    partial_ptr,
    means_ptr,
    eps,
    per_element,
    blocks,
    rows,
    channels,
    inner,
    rows_per_chunk,
    segment,
    segments,
    slots,
    SUMS: tl.constexpr,
    SQUASH: tl.constexpr,
    GRAD: tl.constexpr,
    COST: tl.constexpr,
    NORMAL: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_CLEAN: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """SUMS: gradients of z and clean_z, and partial sums of everything that belongs to a channel. Else, with those
    finished, the gradient of u."""
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
    seen = c < channels
    of_channel = seed.to(tl.int64) * channels + c
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = load_params(params_ptr, seed, channels, c)
    u_mean = tl.load(u_mean_ptr + of_channel, mask=seen, other=0.0)
    u_rstd = _inverse_root(tl.load(u_var_ptr + of_channel, mask=seen, other=1.0), eps)
    if COST:
        mean, rstd = _load_clean(mean_ptr, var_ptr, of_channel, seen, eps, NORMAL)
        scale = tl.load(grad_cost_ptr + seed) * per_element
    if SUMS:
        s0 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11 = s0, s0, s0, s0, s0, s0, s0, s0, s0, s0, s0
    else:
        at_mean = tl.load(means_ptr + of_channel + seed.to(tl.int64) * channels, mask=seen, other=0.0)
        slope = tl.load(means_ptr + of_channel + (seed + 1).to(tl.int64) * channels, mask=seen, other=0.0)

    for column in range(column_begin, column_end, COLUMNS):
        k = column + tl.arange(0, COLUMNS)
        for r in range(row, row_end, ROWS):
            i = r + tl.arange(0, ROWS)
            mask = (i < row_end)[:, None] & (k < limit)[None, :]
            at = first + i.to(tl.int64)[:, None] * channels * inner + k[None, :]
            z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
            v = (tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32) - u_mean) * u_rstd
            if GRAD:
                grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            else:
                grad = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            if COST:
                clean = tl.load(clean_ptr + at, mask=mask, other=0.0).to(tl.float32)
                z_hat = combine(z, v, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH)
                for_z_hat, for_clean, for_mean, for_var = _grad_of_cost(z_hat, clean, mean, rstd, scale, mask)
                grad += for_z_hat
                if SUMS:
                    if WANT_CLEAN:
                        tl.store(
                            grad_clean_ptr + at, for_clean.to(grad_clean_ptr.dtype.element_ty), mask=mask
                        )
                    if NORMAL:
                        s10 += for_mean
                        s11 += for_var
            grad_z, grad_v, s_mu, grad_mu, slope_mu, s_v, grad_w, slope_w = combine_backward(
                grad, z, v, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, SQUASH
            )
            if SUMS:
                if WANT_Z:
                    tl.store(grad_z_ptr + at, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
                s0 += grad_mu * s_mu
                s1 += slope_mu * v
                s2 += slope_mu
                s3 += grad_mu * v
                s4 += grad_mu
                s5 += grad_w * s_v
                s6 += slope_w * v
                s7 += slope_w
                s8 += grad_w * v
                s9 += grad_w
            else:
                grad_u = u_rstd * (grad_v - at_mean - slope * v)
                tl.store(grad_u_ptr + at, grad_u.to(grad_u_ptr.dtype.element_ty), mask=mask)

    if SUMS:
        slot_row = seed.to(tl.int64) * slots + chunk
        store_sum(partial_ptr, 0, s0, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 1, s1, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 2, s2, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 3, s3, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 4, s4, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 5, s5, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 6, s6, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 7, s7, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 8, s8, slot_row, 12, channels, c, PER_COLUMN)
        store_sum(partial_ptr, 9, s9, slot_row, 12, channels, c, PER_COLUMN)
        if NORMAL:
            store_sum(partial_ptr, 10, s10, slot_row, 12, channels, c, PER_COLUMN)
            store_sum(partial_ptr, 11, s11, slot_row, 12, channels, c, PER_COLUMN)


@triton.jit
def _sum_slots(
    partial_ptr,
    index: tl.constexpr,
    seed,
    slots,
    channels,
    c,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum number `index` over the slots, in their order."""
    total = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for slot in range(0, slots, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        at = ((seed.to(tl.int64) * slots + i.to(tl.int64)) * 12 + index)[:, None] * channels + c[None, :]
        total += tl.load(partial_ptr + at, mask=(i < slots)[:, None] & (c < channels)[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _finish_kernel(
    partial_ptr,
    params_ptr,
    var_ptr,
    grad_params_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    means_ptr,
    eps,
    count,
    channels,
    slots,
    NORMAL: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Partial sums -> gradients of the parameters, mean and var, and the two means that the gradient of u needs."""
    seed = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = c < channels
    params = params_ptr + seed.to(tl.int64) * 10 * channels
    a1 = load_param(params, 0, channels, c, seen)
    a2 = load_param(params, 1, channels, c, seen)
    a4 = load_param(params, 3, channels, c, seen)
    a6 = load_param(params, 5, channels, c, seen)
    a7 = load_param(params, 6, channels, c, seen)
    a9 = load_param(params, 8, channels, c, seen)
    s0 = _sum_slots(partial_ptr, 0, seed, slots, channels, c, SLOTS, COLUMNS)
    s1 = _sum_slots(partial_ptr, 1, seed, slots, channels, c, SLOTS, COLUMNS)
    s2 = _sum_slots(partial_ptr, 2, seed, slots, channels, c, SLOTS, COLUMNS)
    s3 = _sum_slots(partial_ptr, 3, seed, slots, channels, c, SLOTS, COLUMNS)
    s4 = _sum_slots(partial_ptr, 4, seed, slots, channels, c, SLOTS, COLUMNS)
    s5 = _sum_slots(partial_ptr, 5, seed, slots, channels, c, SLOTS, COLUMNS)
    s6 = _sum_slots(partial_ptr, 6, seed, slots, channels, c, SLOTS, COLUMNS)
    s7 = _sum_slots(partial_ptr, 7, seed, slots, channels, c, SLOTS, COLUMNS)
    s8 = _sum_slots(partial_ptr, 8, seed, slots, channels, c, SLOTS, COLUMNS)
    s9 = _sum_slots(partial_ptr, 9, seed, slots, channels, c, SLOTS, COLUMNS)
    at_mean, slope = _means_of_grad(s1, s2, s3, s4, s6, s7, s8, s9, a1, a2, a4, a6, a7, a9, count)
    to = means_ptr + seed.to(tl.int64) * 2 * channels + c
    tl.store(to, at_mean, mask=seen)
    tl.store(to + channels, slope, mask=seen)
    _store_params(grad_params_ptr, seed, channels, c, a1, a6, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9)
    if NORMAL:
        of_channel = seed.to(tl.int64) * channels + c
        rstd = _inverse_root(tl.load(var_ptr + of_channel, mask=seen, other=1.0), eps)
        s10 = _sum_slots(partial_ptr, 10, seed, slots, channels, c, SLOTS, COLUMNS)
        s11 = _sum_slots(partial_ptr, 11, seed, slots, channels, c, SLOTS, COLUMNS)
        tl.store(grad_mean_ptr + of_channel, -s10 * rstd, mask=seen)
        tl.store(grad_var_ptr + of_channel, s11 * rstd * rstd * -0.5, mask=seen)


class _Held:
    """How a layer that programs hold is cut; `fits` says whether it is one."""

    def __init__(self, plan: Plan, u: Tensor) -> None:
        self.fits = plan.per_column and plan.rows <= HELD_ROWS
        self.rows = max(16, triton.next_power_of_2(plan.rows))
        self.columns = 16 if u.element_size() == 2 else 8
        self.blocks = ceil(plan.channels, self.columns)
        self.grid = (self.blocks * plan.seeds,)

    @property
    def constants(self) -> dict[str, int]:
        """Eight elements for each thread."""
        warps = max(1, self.rows * self.columns // 256)
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": warps}


def _statistics(t: Tensor | None, u: Tensor) -> Tensor:
    """As the kernels take it; any tensor where there is none."""
    return u if t is None else t.contiguous()


@triton_op("ladderfast::ladder_decoder_triton", mutates_args={})
def ladder_decoder_triton(
    u: Tensor,
    z: Tensor,
    params: Tensor,
    clean_z: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    squash_v: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_hat, cost (no elements without clean_z), u_mean, u_var. u contiguous or channels-last; see
    ladderfast.ops.ladder_decoder."""
    seeds = params.shape[:-2]
    z_hat = torch.empty_like(u)
    statistics = u.new_zeros((*seeds, params.shape[-1]), dtype=torch.float32)
    if u.numel() == 0:
        cost = u.new_zeros((0,) if clean_z is None else seeds, dtype=torch.float32)
        return z_hat, cost, statistics, statistics.clone()
    u_mean, u_var = torch.empty_like(statistics), torch.empty_like(statistics)
    plan = Plan(u, params)
    held = _Held(plan, u)
    programs = plan.blocks * plan.slots
    if held.fits:
        programs = held.blocks
    shares = torch.empty((plan.seeds, programs), dtype=torch.float32, device=u.device)
    layer = (
        u,
        like(z, u),
        params.contiguous(),
        u if clean_z is None else like(clean_z, u),
        _statistics(mean, u),
        _statistics(var, u),
    )
    flags = {"SQUASH": squash_v, "COST": int(clean_z is not None), "NORMAL": int(mean is not None)}
    with torch.cuda.device_of(u):
        if held.fits:
            wrap_triton(_held_forward_kernel)[held.grid](
                *layer,
                z_hat,
                u_mean,
                u_var,
                shares,
                held.blocks,
                plan.rows,
                plan.channels,
                float(plan.rows),
                eps,
                **flags,
                **held.constants,
            )
        else:
            partial = torch.empty(
                (plan.seeds, plan.slots, 3, plan.channels), dtype=torch.float32, device=u.device
            )
            constants = plan.constants(squash_v)
            del constants["SQUASH"]
            wrap_triton(_moments_kernel)[plan.grid](u, partial, *plan.sizes, plan.slots, **constants)
            wrap_triton(_merge_kernel)[(plan.seeds, ceil(plan.channels, FINISH_TILE["COLUMNS"]))](
                u, partial, u_mean, u_var, plan.rows, plan.channels, plan.inner, plan.slots, **FINISH_TILE
            )
            wrap_triton(_forward_kernel)[plan.grid](
                *layer, u_mean, u_var, z_hat, shares, eps, *plan.sizes, plan.slots, **flags, **constants
            )
    if clean_z is None:
        return z_hat, shares.new_empty(0), u_mean, u_var
    elements = u.numel() // plan.seeds
    return z_hat, (shares.sum(1) / elements).view(seeds), u_mean, u_var


@triton_op("ladderfast::ladder_decoder_backward_triton", mutates_args={})
def ladder_decoder_backward_triton(
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
    squash_v: int,
    eps: float,
    want_z: int,
    want_clean_z: int,
    want_statistics: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, z, params, clean_z, mean and var; without elements where not wanted, or where no gradient of
    the cost comes."""
    costly = grad_cost is not None and clean_z is not None
    normal = costly and mean is not None
    with_z, with_clean = bool(want_z), costly and bool(want_clean_z)
    with_statistics = normal and bool(want_statistics)
    params = params.contiguous()
    grad_u = torch.empty_like(u)
    grad_z = torch.empty_like(u) if with_z else u.new_empty(0)
    grad_clean = torch.empty_like(u) if with_clean else u.new_empty(0)
    grad_params = torch.empty_like(params)
    grad_mean = torch.empty_like(u_mean) if normal else u_mean.new_empty(0)
    grad_var = torch.empty_like(u_mean) if normal else u_mean.new_empty(0)
    if u.numel() == 0:
        for t in (grad_params, grad_mean, grad_var):
            t.zero_()
    else:
        plan = Plan(u, params)
        held = _Held(plan, u)
        layer = (
            u if grad_z_hat is None else like(grad_z_hat, u),
            u if grad_cost is None else grad_cost.contiguous(),
            u,
            like(z, u),
            params,
            u if clean_z is None else like(clean_z, u),
            _statistics(mean, u),
            _statistics(var, u),
            u_mean.contiguous(),
            u_var.contiguous(),
        )
        flags = {
            "SQUASH": squash_v,
            "GRAD": int(grad_z_hat is not None),
            "COST": int(costly),
            "NORMAL": int(normal),
            "WANT_Z": int(with_z),
            "WANT_CLEAN": int(with_clean),
        }
        per_element = 2 * plan.seeds / u.numel()
        with torch.cuda.device_of(u):
            if held.fits:
                wrap_triton(_held_backward_kernel)[held.grid](
                    *layer,
                    grad_u,
                    grad_z,
                    grad_params,
                    grad_clean,
                    grad_mean,
                    grad_var,
                    held.blocks,
                    plan.rows,
                    plan.channels,
                    float(plan.rows),
                    eps,
                    per_element,
                    **flags,
                    **held.constants,
                )
            else:
                partial = torch.empty(
                    (plan.seeds, plan.slots, 12, plan.channels), dtype=torch.float32, device=u.device
                )
                means = torch.empty((plan.seeds, 2, plan.channels), dtype=torch.float32, device=u.device)
                outputs = (grad_u, grad_z, grad_clean, partial, means, eps, per_element)
                constants = plan.constants(squash_v) | flags
                summing = constants if plan.per_column else constants | {"ROWS": SUMMED_RUN_ROWS}
                wrap_triton(_backward_kernel)[plan.grid](
                    *layer, *outputs, *plan.sizes, plan.slots, SUMS=1, **summing
                )
                wrap_triton(_finish_kernel)[(plan.seeds, ceil(plan.channels, FINISH_TILE["COLUMNS"]))](
                    partial,
                    params,
                    layer[7],
                    grad_params,
                    grad_mean,
                    grad_var,
                    means,
                    eps,
                    float(plan.rows * plan.inner),
                    plan.channels,
                    plan.slots,
                    NORMAL=int(normal),
                    **FINISH_TILE,
                )
                wrap_triton(_backward_kernel)[plan.grid](
                    *layer, *outputs, *plan.sizes, plan.slots, SUMS=0, **constants
                )
    if not with_statistics:
        grad_mean, grad_var = u_mean.new_empty(0), u_mean.new_empty(0)
    return grad_u, grad_z, grad_params, grad_clean, grad_mean, grad_var

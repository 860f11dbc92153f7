"""Triton kernels of the op `ladder_encoder` and their launchers.

z_pre, z, h and the gradients with respect to them share a packed layout (seeds, rows, channels, inner), inner fastest.
A program works on tiles of [ROWS, COLUMNS]: columns are neighbouring channels where inner = 1 (channels-last and
dense), and else positions of one channel's run. Rows lie in two or three parts with statistics of their own; the first
two get noise. Everything is widened to float32 at the load and rounded once, at the store.

Where a tile holds all rows of a part, and of a run, forward and backward are one launch each. Otherwise they are three:
sums of chunks, their totals, application.

Floor: forward moves 3 elements for each of z_pre in one launch and 4 in three, backward 4 and 7. The noise takes about
35 instructions for an element where rows are multiples of four and 85 elsewhere, which is below the memory's time in
float32. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ladderfast.triton.noise import normal_tile

HELD = 2048  # elements of a tile that holds a part
TILE = 512  # elements of a tile that passes over a chunk
LEAST_ROWS, LEAST_RUN = 32, 8192  # rows of a chunk of columns, elements of one of runs, at the least
MERGE = 64  # channels of a program that adds up chunks
SLOTS = 16  # chunks that it adds up at once


@triton.jit
def _total(t, PER_COLUMN: tl.constexpr):
    """Sums by channel: of each column, or of the whole tile."""
    if PER_COLUMN:
        return tl.sum(t, axis=0)
    else:
        return tl.sum(tl.sum(t, axis=0), axis=0)


@triton.jit
def _begin(part, second, third, rows):
    """First row of a part; of that after the last, the number of rows."""
    return tl.where(part == 0, 0, tl.where(part == 1, second, tl.where(part == 2, third, rows)))


@triton.jit
def _channels(block, channels, PER_COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """The channels of a block of columns, or the one channel."""
    if PER_COLUMN:
        return block * COLUMNS + tl.arange(0, COLUMNS)
    else:
        return block


@triton.jit
def _first_column(block, c, channels, inner, PER_COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program, its first column within a row and how many elements are left from there."""
    if PER_COLUMN:
        return block.to(tl.int64) * COLUMNS, channels - block * COLUMNS
    else:
        return c.to(tl.int64) * inner, inner


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_or(ptr, at, mask, GIVEN: tl.constexpr, otherwise: tl.constexpr):
    if GIVEN:
        return _load(ptr, at, mask)
    else:
        return otherwise


@triton.jit
def _store(ptr, at, value, mask):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shift(x_ptr, seed, begin, end, c, rows, channels, inner):
    """Each channel's first element in a part, to which sums for its mean are relative."""
    at = (seed.to(tl.int64) * rows + begin) * channels * inner + c * inner
    return _load(x_ptr, at, (c < channels) & (begin < end))


@triton.jit
def _noise(
    row,
    part,
    state_ptr,
    stream,
    std,
    seed,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scaled noise of a tile whose rows begin with the elements `row`, counted from the seed's first."""
    noise = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if NOISE:  # noqa: SIM102, known when the kernel is compiled, unlike the part
        if part < 2:
            noise = normal_tile(row, COLUMNS, ALIGNED, state_ptr + 2 * seed, stream) * std
    return noise


@triton.jit
def _activate(a, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return tl.where(a <= 0.0, 0.0, a)
    elif ACTIVATION == 2:
        return tl.where(a <= 0.0, a * slope, a)
    else:
        return a


@triton.jit
def _through_activation(grad, a, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return tl.where(a <= 0.0, 0.0, grad)
    elif ACTIVATION == 2:
        return tl.where(a <= 0.0, grad * slope, grad)
    else:
        return grad


@triton.jit
def _forward_tile(
    x,
    noise,
    at,
    mask,
    z_ptr,
    h_ptr,
    mean,
    rstd,
    beta,
    gamma,
    slope,
    ACTIVATION: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_H: tl.constexpr,
):
    z = (x - mean) * rstd + noise
    if WANT_Z:
        _store(z_ptr, at, z, mask)
    if WANT_H:
        _store(h_ptr, at, _activate((z + beta) * gamma, slope, ACTIVATION), mask)


@triton.jit
def _backward_tile(
    x,
    noise,
    at,
    mask,
    grad_z_ptr,
    grad_h_ptr,
    mean,
    rstd,
    beta,
    gamma,
    slope,
    ACTIVATION: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_H: tl.constexpr,
):
    """What reaches the normalised x, that times it, and the terms of the gradients of beta and gamma; masked 0."""
    normal = tl.where(mask, (x - mean) * rstd, 0.0)
    z = normal + noise
    t = _through_activation(
        _load_or(grad_h_ptr, at, mask, HAS_H, 0.0) + tl.zeros_like(x), (z + beta) * gamma, slope, ACTIVATION
    )
    for_beta = t * gamma
    g = _load_or(grad_z_ptr, at, mask, HAS_Z, 0.0) + for_beta
    return g, g * normal, for_beta, tl.where(mask, t * (z + beta), 0.0)


@triton.jit
def _forward_held_kernel(
    x_ptr,
    z_ptr,
    h_ptr,
    mean_ptr,
    var_ptr,
    beta_ptr,
    gamma_ptr,
    state_ptr,
    blocks,
    rows,
    channels,
    inner,
    second,
    third,
    parts,
    stream,
    std,
    slope,
    eps,
    HAS_BETA: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seed = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    part = tl.program_id(1)
    begin = _begin(part, second, third, rows)
    end = _begin(part + 1, second, third, rows)
    c = _channels(block, channels, PER_COLUMN, COLUMNS)
    column, left = _first_column(block, c, channels, inner, PER_COLUMN, COLUMNS)
    r = begin + tl.arange(0, ROWS)
    row = r.to(tl.int64) * channels * inner + column
    mask = (r < end)[:, None] & (tl.arange(0, COLUMNS) < left)[None, :]
    at = seed.to(tl.int64) * rows * channels * inner + row[:, None] + tl.arange(0, COLUMNS)[None, :]
    x = _load(x_ptr, at, mask)
    shift = _shift(x_ptr, seed, begin, end, c, rows, channels, inner)
    beta = _load_or(beta_ptr, seed * channels + c, c < channels, HAS_BETA, 0.0)
    gamma = _load_or(gamma_ptr, seed * channels + c, c < channels, HAS_GAMMA, 1.0)
    noise = _noise(row, part, state_ptr, stream, std, seed, NOISE, ALIGNED, ROWS, COLUMNS)

    inverse = 1.0 / tl.maximum((end - begin).to(tl.float32) * inner, 1.0)
    middle = _total(tl.where(mask, x - shift, 0.0), PER_COLUMN) * inverse
    d = tl.where(mask, (x - shift) - middle, 0.0)
    rest = _total(d, PER_COLUMN) * inverse  # what rounding left in the mean
    var = _total(d * d, PER_COLUMN) * inverse - rest * rest
    mean = shift + (middle + rest)
    index = (seed * parts + part) * channels + c
    tl.store(mean_ptr + index, mean, mask=c < channels)
    tl.store(var_ptr + index, var, mask=c < channels)
    rstd = tl.rsqrt(var + eps)
    _forward_tile(
        x, noise, at, mask, z_ptr, h_ptr, mean, rstd, beta, gamma, slope, ACTIVATION, WANT_Z, WANT_H
    )


@triton.jit
def _chunk(
    program,
    chunk,
    blocks,
    rows,
    channels,
    inner,
    second,
    third,
    first_chunk,
    second_chunk,
    rows_per_chunk,
    PER_COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a program that passes over a chunk: seed, part, rows, channels, first column, elements from there."""
    seed = program // blocks
    block = program % blocks
    part = (chunk >= first_chunk).to(tl.int32) + (chunk >= second_chunk).to(tl.int32)
    its = chunk - tl.where(part == 0, 0, tl.where(part == 1, first_chunk, second_chunk))
    row = _begin(part, second, third, rows) + its * rows_per_chunk
    row_end = tl.minimum(row + rows_per_chunk, _begin(part + 1, second, third, rows))
    c = _channels(block, channels, PER_COLUMN, COLUMNS)
    column, left = _first_column(block, c, channels, inner, PER_COLUMN, COLUMNS)
    return seed, part, row, row_end, c, column, left


@triton.jit
def _tile(
    seed, r, row_end, k, column, left, rows, channels, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of a tile: numbers of its rows' first elements in the seed, addresses, mask."""
    i = r + tl.arange(0, ROWS)
    row = i.to(tl.int64) * channels * inner + column + k
    mask = (i < row_end)[:, None] & (k + tl.arange(0, COLUMNS) < left)[None, :]
    at = seed.to(tl.int64) * rows * channels * inner + row[:, None] + tl.arange(0, COLUMNS)[None, :]
    return row, at, mask


@triton.jit
def _statistics_kernel(
    x_ptr,
    partial_ptr,
    blocks,
    rows,
    channels,
    inner,
    second,
    third,
    first_chunk,
    second_chunk,
    rows_per_chunk,
    chunks,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Count, mean (relative to the part's first element) and squares about it of each chunk and channel."""
    chunk = tl.program_id(1)
    seed, part, row, row_end, c, column, left = _chunk(
        tl.program_id(0),
        chunk,
        blocks,
        rows,
        channels,
        inner,
        second,
        third,
        first_chunk,
        second_chunk,
        rows_per_chunk,
        PER_COLUMN,
        COLUMNS,
    )
    begin = _begin(part, second, third, rows)
    end = _begin(part + 1, second, third, rows)
    shift = _shift(x_ptr, seed, begin, end, c, rows, channels, inner)
    # Welford's recurrence in each place of the tile, then the places together.
    n = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    mean, squares = n, n
    for k in range(0, COLUMNS if PER_COLUMN else left, COLUMNS):
        for r in range(row, row_end, ROWS):
            _, at, mask = _tile(seed, r, row_end, k, column, left, rows, channels, inner, ROWS, COLUMNS)
            d = _load(x_ptr, at, mask) - shift
            n += mask.to(tl.float32)
            delta = tl.where(mask, d - mean, 0.0)
            mean += delta / tl.maximum(n, 1.0)
            squares += tl.where(mask, delta * (d - mean), 0.0)
    count = _total(n, PER_COLUMN)
    middle = _total(n * mean, PER_COLUMN) / tl.maximum(count, 1.0)
    delta = mean - middle
    total = _total(squares + n * delta * delta, PER_COLUMN)
    to = partial_ptr + (seed.to(tl.int64) * chunks + chunk) * 3 * channels + c
    tl.store(to, count, mask=c < channels)
    tl.store(to + channels, middle, mask=c < channels)
    tl.store(to + 2 * channels, total, mask=c < channels)


@triton.jit
def _merge_statistics_kernel(
    x_ptr,
    partial_ptr,
    mean_ptr,
    var_ptr,
    rows,
    channels,
    inner,
    second,
    third,
    first_chunk,
    second_chunk,
    chunks,
    parts,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Chunks -> mean and var. A part of no rows has mean and variance 0."""
    seed = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = _begin(part, second, third, rows)
    end = _begin(part + 1, second, third, rows)
    slot_begin = _begin(part, first_chunk, second_chunk, chunks)
    slot_end = _begin(part + 1, first_chunk, second_chunk, chunks)
    from_ = partial_ptr + seed.to(tl.int64) * chunks * 3 * channels
    total = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for slot in range(slot_begin, slot_end, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        at = i.to(tl.int64)[:, None] * 3 * channels + c[None, :]
        mask = (i < slot_end)[:, None] & (c < channels)[None, :]
        total += _load(from_, at, mask) * _load(from_ + channels, at, mask)
    inverse = 1.0 / tl.maximum((end - begin).to(tl.float32) * inner, 1.0)
    middle = tl.sum(total, axis=0) * inverse
    total = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for slot in range(slot_begin, slot_end, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        at = i.to(tl.int64)[:, None] * 3 * channels + c[None, :]
        mask = (i < slot_end)[:, None] & (c < channels)[None, :]
        delta = _load(from_ + channels, at, mask) - middle
        total += _load(from_ + 2 * channels, at, mask) + _load(from_, at, mask) * delta * delta
    shift = _shift(x_ptr, seed, begin, end, c, rows, channels, inner)
    index = (seed * parts + part) * channels + c
    tl.store(mean_ptr + index, shift + middle, mask=c < channels)
    tl.store(var_ptr + index, tl.sum(total, axis=0) * inverse, mask=c < channels)


@triton.jit
def _forward_apply_kernel(
    x_ptr,
    z_ptr,
    h_ptr,
    mean_ptr,
    var_ptr,
    beta_ptr,
    gamma_ptr,
    state_ptr,
    blocks,
    rows,
    channels,
    inner,
    second,
    third,
    first_chunk,
    second_chunk,
    rows_per_chunk,
    parts,
    stream,
    std,
    slope,
    eps,
    HAS_BETA: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seed, part, row, row_end, c, column, left = _chunk(
        tl.program_id(0),
        tl.program_id(1),
        blocks,
        rows,
        channels,
        inner,
        second,
        third,
        first_chunk,
        second_chunk,
        rows_per_chunk,
        PER_COLUMN,
        COLUMNS,
    )
    seen = c < channels
    index = (seed * parts + part) * channels + c
    mean = tl.load(mean_ptr + index, mask=seen, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + index, mask=seen, other=1.0) + eps)
    beta = _load_or(beta_ptr, seed * channels + c, seen, HAS_BETA, 0.0)
    gamma = _load_or(gamma_ptr, seed * channels + c, seen, HAS_GAMMA, 1.0)
    for k in range(0, COLUMNS if PER_COLUMN else left, COLUMNS):
        for r in range(row, row_end, ROWS):
            first, at, mask = _tile(seed, r, row_end, k, column, left, rows, channels, inner, ROWS, COLUMNS)
            x = _load(x_ptr, at, mask)
            noise = _noise(first, part, state_ptr, stream, std, seed, NOISE, ALIGNED, ROWS, COLUMNS)
            _forward_tile(
                x, noise, at, mask, z_ptr, h_ptr, mean, rstd, beta, gamma, slope, ACTIVATION, WANT_Z, WANT_H
            )


@triton.jit
def _finish(
    total,
    total_normal,
    grad_mean_ptr,
    grad_var_ptr,
    index,
    seen,
    rstd,
    inverse,
    HAS_MEAN: tl.constexpr,
    HAS_VAR: tl.constexpr,
):
    """grad_x = rstd g + at_mean + slope (x - mean): the latter two."""
    at_mean = (_load_or(grad_mean_ptr, index, seen, HAS_MEAN, 0.0) - rstd * total) * inverse
    slope = (_load_or(grad_var_ptr, index, seen, HAS_VAR, 0.0) * 2.0 - rstd * rstd * total_normal) * inverse
    return at_mean, slope


@triton.jit
def _backward_held_kernel(
    grad_z_ptr,
    grad_h_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    beta_ptr,
    gamma_ptr,
    state_ptr,
    grad_x_ptr,
    grad_beta_ptr,
    grad_gamma_ptr,
    blocks,
    rows,
    channels,
    inner,
    second,
    third,
    parts,
    stream,
    std,
    slope,
    eps,
    HAS_Z: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_VAR: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seed = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    c = _channels(block, channels, PER_COLUMN, COLUMNS)
    column, left = _first_column(block, c, channels, inner, PER_COLUMN, COLUMNS)
    seen = c < channels
    beta = _load_or(beta_ptr, seed * channels + c, seen, HAS_BETA, 0.0)
    gamma = _load_or(gamma_ptr, seed * channels + c, seen, HAS_GAMMA, 1.0)
    sum_beta = _total(tl.zeros([ROWS, COLUMNS], dtype=tl.float32), PER_COLUMN)
    sum_gamma = sum_beta
    for part in range(parts):
        begin = _begin(part, second, third, rows)
        end = _begin(part + 1, second, third, rows)
        index = (seed * parts + part) * channels + c
        mean = tl.load(mean_ptr + index, mask=seen, other=0.0)
        rstd = tl.rsqrt(tl.load(var_ptr + index, mask=seen, other=1.0) + eps)
        first, at, mask = _tile(seed, begin, end, 0, column, left, rows, channels, inner, ROWS, COLUMNS)
        x = _load(x_ptr, at, mask)
        noise = _noise(first, part, state_ptr, stream, std, seed, NOISE, ALIGNED, ROWS, COLUMNS)
        g, g_normal, for_beta, for_gamma = _backward_tile(
            x,
            noise,
            at,
            mask,
            grad_z_ptr,
            grad_h_ptr,
            mean,
            rstd,
            beta,
            gamma,
            slope,
            ACTIVATION,
            HAS_Z,
            HAS_H,
        )
        inverse = 1.0 / tl.maximum((end - begin).to(tl.float32) * inner, 1.0)
        at_mean, per_x = _finish(
            _total(g, PER_COLUMN),
            _total(g_normal, PER_COLUMN),
            grad_mean_ptr,
            grad_var_ptr,
            index,
            seen,
            rstd,
            inverse,
            HAS_MEAN,
            HAS_VAR,
        )
        _store(grad_x_ptr, at, rstd * g + (at_mean + per_x * (x - mean)), mask)
        sum_beta += _total(for_beta, PER_COLUMN)
        sum_gamma += _total(for_gamma, PER_COLUMN)
    if HAS_BETA:
        _store(grad_beta_ptr, seed * channels + c, sum_beta, seen)
    if HAS_GAMMA:
        _store(grad_gamma_ptr, seed * channels + c, sum_gamma, seen)


@triton.jit
def _backward_sums_kernel(
    grad_z_ptr,
    grad_h_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    beta_ptr,
    gamma_ptr,
    state_ptr,
    partial_ptr,
    blocks,
    rows,
    channels,
    inner,
    second,
    third,
    first_chunk,
    second_chunk,
    rows_per_chunk,
    chunks,
    parts,
    stream,
    std,
    slope,
    eps,
    HAS_Z: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(1)
    seed, part, row, row_end, c, column, left = _chunk(
        tl.program_id(0),
        chunk,
        blocks,
        rows,
        channels,
        inner,
        second,
        third,
        first_chunk,
        second_chunk,
        rows_per_chunk,
        PER_COLUMN,
        COLUMNS,
    )
    seen = c < channels
    index = (seed * parts + part) * channels + c
    mean = tl.load(mean_ptr + index, mask=seen, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + index, mask=seen, other=1.0) + eps)
    beta = _load_or(beta_ptr, seed * channels + c, seen, HAS_BETA, 0.0)
    gamma = _load_or(gamma_ptr, seed * channels + c, seen, HAS_GAMMA, 1.0)
    s0 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    s1, s2, s3 = s0, s0, s0
    for k in range(0, COLUMNS if PER_COLUMN else left, COLUMNS):
        for r in range(row, row_end, ROWS):
            first, at, mask = _tile(seed, r, row_end, k, column, left, rows, channels, inner, ROWS, COLUMNS)
            x = _load(x_ptr, at, mask)
            noise = _noise(first, part, state_ptr, stream, std, seed, NOISE, ALIGNED, ROWS, COLUMNS)
            g, g_normal, for_beta, for_gamma = _backward_tile(
                x,
                noise,
                at,
                mask,
                grad_z_ptr,
                grad_h_ptr,
                mean,
                rstd,
                beta,
                gamma,
                slope,
                ACTIVATION,
                HAS_Z,
                HAS_H,
            )
            s0 += g
            s1 += g_normal
            s2 += for_beta
            s3 += for_gamma
    to = partial_ptr + (seed.to(tl.int64) * chunks + chunk) * 4 * channels + c
    tl.store(to, _total(s0, PER_COLUMN), mask=seen)
    tl.store(to + channels, _total(s1, PER_COLUMN), mask=seen)
    tl.store(to + 2 * channels, _total(s2, PER_COLUMN), mask=seen)
    tl.store(to + 3 * channels, _total(s3, PER_COLUMN), mask=seen)


@triton.jit
def _merge_backward_kernel(
    partial_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    var_ptr,
    finish_ptr,
    grad_beta_ptr,
    grad_gamma_ptr,
    rows,
    channels,
    inner,
    second,
    third,
    first_chunk,
    second_chunk,
    chunks,
    parts,
    eps,
    HAS_MEAN: tl.constexpr,
    HAS_VAR: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Chunks -> at_mean and slope (seeds, parts, 2, channels) and the gradients of beta and gamma."""
    seed = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = c < channels
    from_ = partial_ptr + seed.to(tl.int64) * chunks * 4 * channels
    sum_beta = tl.zeros([COLUMNS], dtype=tl.float32)
    sum_gamma = sum_beta
    for part in range(parts):
        slot_end = _begin(part + 1, first_chunk, second_chunk, chunks)
        s0 = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
        s1, s2, s3 = s0, s0, s0
        for slot in range(_begin(part, first_chunk, second_chunk, chunks), slot_end, SLOTS):
            i = slot + tl.arange(0, SLOTS)
            at = i.to(tl.int64)[:, None] * 4 * channels + c[None, :]
            mask = (i < slot_end)[:, None] & seen[None, :]
            s0 += _load(from_, at, mask)
            s1 += _load(from_ + channels, at, mask)
            s2 += _load(from_ + 2 * channels, at, mask)
            s3 += _load(from_ + 3 * channels, at, mask)
        sum_beta += tl.sum(s2, axis=0)
        sum_gamma += tl.sum(s3, axis=0)
        begin = _begin(part, second, third, rows)
        end = _begin(part + 1, second, third, rows)
        index = (seed * parts + part) * channels + c
        rstd = tl.rsqrt(tl.load(var_ptr + index, mask=seen, other=1.0) + eps)
        inverse = 1.0 / tl.maximum((end - begin).to(tl.float32) * inner, 1.0)
        at_mean, slope = _finish(
            tl.sum(s0, axis=0),
            tl.sum(s1, axis=0),
            grad_mean_ptr,
            grad_var_ptr,
            index,
            seen,
            rstd,
            inverse,
            HAS_MEAN,
            HAS_VAR,
        )
        to = finish_ptr + (seed * parts + part) * 2 * channels + c
        tl.store(to, at_mean, mask=seen)
        tl.store(to + channels, slope, mask=seen)
    if HAS_BETA:
        _store(grad_beta_ptr, seed * channels + c, sum_beta, seen)
    if HAS_GAMMA:
        _store(grad_gamma_ptr, seed * channels + c, sum_gamma, seen)


@triton.jit
def _backward_apply_kernel(
    grad_z_ptr,
    grad_h_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    beta_ptr,
    gamma_ptr,
    state_ptr,
    finish_ptr,
    grad_x_ptr,
    blocks,
    rows,
    channels,
    inner,
    second,
    third,
    first_chunk,
    second_chunk,
    rows_per_chunk,
    parts,
    stream,
    std,
    slope,
    eps,
    HAS_Z: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seed, part, row, row_end, c, column, left = _chunk(
        tl.program_id(0),
        tl.program_id(1),
        blocks,
        rows,
        channels,
        inner,
        second,
        third,
        first_chunk,
        second_chunk,
        rows_per_chunk,
        PER_COLUMN,
        COLUMNS,
    )
    seen = c < channels
    index = (seed * parts + part) * channels + c
    mean = tl.load(mean_ptr + index, mask=seen, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + index, mask=seen, other=1.0) + eps)
    beta = _load_or(beta_ptr, seed * channels + c, seen, HAS_BETA, 0.0)
    gamma = _load_or(gamma_ptr, seed * channels + c, seen, HAS_GAMMA, 1.0)
    finish = finish_ptr + (seed * parts + part) * 2 * channels + c
    at_mean = tl.load(finish, mask=seen, other=0.0)
    per_x = tl.load(finish + channels, mask=seen, other=0.0)
    for k in range(0, COLUMNS if PER_COLUMN else left, COLUMNS):
        for r in range(row, row_end, ROWS):
            first, at, mask = _tile(seed, r, row_end, k, column, left, rows, channels, inner, ROWS, COLUMNS)
            x = _load(x_ptr, at, mask)
            noise = _noise(first, part, state_ptr, stream, std, seed, NOISE, ALIGNED, ROWS, COLUMNS)
            g, _, _, _ = _backward_tile(
                x,
                noise,
                at,
                mask,
                grad_z_ptr,
                grad_h_ptr,
                mean,
                rstd,
                beta,
                gamma,
                slope,
                ACTIVATION,
                HAS_Z,
                HAS_H,
            )
            _store(grad_x_ptr, at, rstd * g + (at_mean + per_x * (x - mean)), mask)


def _ceil(a: int, b: int) -> int:
    return (a + b - 1) // b


class Plan:
    """How a shape is cut into programs and partial sums; depends on the shape alone."""

    def __init__(self, z_pre: Tensor, num_labelled: int, num_clean: int, seeds: int) -> None:
        axis = 2 if seeds else 1
        self.seeds = z_pre.shape[0] if seeds else 1
        rows, self.channels = z_pre.shape[axis - 1], z_pre.shape[axis]
        inner = 1
        for size in z_pre.shape[axis + 1 :]:
            inner *= size
        sizes = [num_labelled, rows - num_labelled - num_clean, *[num_clean] * (num_clean > 0)]
        if not z_pre.is_contiguous():  # channels-last
            sizes, rows, inner = [n * inner for n in sizes], rows * inner, 1
        self.rows, self.inner, self.parts = rows, inner, len(sizes)
        self.second, self.third = sizes[0], sizes[0] + sizes[1]
        self.per_column = inner == 1
        width = self.channels if self.per_column else inner
        self.aligned = width % 4 == 0
        self.held, self.tile_rows, self.columns = self._held_tile(max(sizes), width)
        self.rows_per_chunk, self.chunk_ends = 0, [0, 0, 0]
        if not self.held:
            self.columns = min(128, max(16, triton.next_power_of_2(width)))
            self.tile_rows = min(16, max(1, TILE // self.columns))
            least = LEAST_ROWS if self.per_column else max(1, LEAST_RUN // max(inner, 1))
            self.rows_per_chunk = max(least, _ceil(max(sizes), 256))
            ends, end = [], 0
            for n in [*sizes, 0][:3]:
                end += _ceil(n, self.rows_per_chunk)
                ends.append(end)
            self.chunk_ends = ends
        self.blocks = _ceil(self.channels, self.columns) if self.per_column else self.channels

    def _held_tile(self, rows: int, width: int) -> tuple[bool, int, int]:
        """Whether a tile can hold a part, and its rows and columns."""
        tall = max(1, triton.next_power_of_2(rows))
        if not self.per_column:
            wide = max(4, triton.next_power_of_2(width))
            return tall * wide <= HELD, tall, wide
        # Few columns where there are few programs; 16 are a stretch of 64 bytes.
        wide = 32 if self.seeds * _ceil(width, 32) >= 128 and tall * 32 <= HELD else 16
        return tall * wide <= HELD, tall, wide

    @property
    def chunks(self) -> int:
        return self.chunk_ends[2]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.channels, self.inner, self.second, self.third

    @property
    def tile(self) -> dict[str, int]:
        return {"PER_COLUMN": int(self.per_column), "ROWS": self.tile_rows, "COLUMNS": self.columns}

    @property
    def warps(self) -> int:
        return 8 if self.held and self.tile_rows * self.columns > 512 else 4


def _like(t: Tensor, z_pre: Tensor) -> Tensor:
    return t if t.stride() == z_pre.stride() else torch.empty_like(z_pre).copy_(t)


def _switches(beta: Tensor | None, gamma: Tensor | None, activation: int) -> dict[str, int]:
    return {"HAS_BETA": int(beta is not None), "HAS_GAMMA": int(gamma is not None), "ACTIVATION": activation}


@triton_op("ladderfast::ladder_encoder_triton", mutates_args={})
def ladder_encoder_triton(
    z_pre: Tensor,
    beta: Tensor | None,
    gamma: Tensor | None,
    noise_state: Tensor | None,
    num_labelled: int,
    num_clean: int,
    noise_std: float,
    noise_stream: int,
    activation: int,
    negative_slope: float,
    eps: float,
    want_z: int,
    want_h: int,
    seeds: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, h, mean and var; see ladderfast.ops.ladder_encoder.

    z_pre is contiguous or channels-last; with `seeds` every tensor has a leading axis of them. What is not wanted of z
    and h has no elements. activation is an index into ladderfast.reference.ladder_encoder.ACTIVATIONS.
    """
    z = torch.empty_like(z_pre) if want_z else z_pre.new_empty(0)
    h = torch.empty_like(z_pre) if want_h else z_pre.new_empty(0)
    plan = Plan(z_pre, num_labelled, num_clean, seeds)
    shape = (plan.seeds, plan.parts, plan.channels)[0 if seeds else 1 :]
    if z_pre.numel() == 0:
        return z, h, z_pre.new_zeros(shape, dtype=torch.float32), z_pre.new_zeros(shape, dtype=torch.float32)
    mean, var = (torch.empty(shape, dtype=torch.float32, device=z_pre.device) for _ in range(2))
    noise = noise_state is not None and noise_std > 0
    tensors = (
        z_pre,
        z,
        h,
        mean,
        var,
        z_pre if beta is None else beta.contiguous(),
        z_pre if gamma is None else gamma.contiguous(),
        noise_state.contiguous() if noise_state is not None and noise else z_pre,
    )
    numbers = (plan.parts, noise_stream, noise_std, negative_slope, eps)
    constants = _switches(beta, gamma, activation) | plan.tile
    constants |= {"WANT_Z": want_z, "WANT_H": want_h, "NOISE": int(noise), "ALIGNED": int(plan.aligned)}
    with torch.cuda.device_of(z_pre):
        if plan.held:
            wrap_triton(_forward_held_kernel)[(plan.seeds * plan.blocks, plan.parts)](
                *tensors, plan.blocks, *plan.shape, *numbers, **constants, num_warps=plan.warps
            )
            return z, h, mean, var
        partial = torch.empty(
            (plan.seeds, plan.chunks, 3, plan.channels), dtype=torch.float32, device=z_pre.device
        )
        grid = (plan.seeds * plan.blocks, plan.chunks)  # the second axis is limited to 65535
        ends = plan.chunk_ends[:2]
        wrap_triton(_statistics_kernel)[grid](
            z_pre, partial, plan.blocks, *plan.shape, *ends, plan.rows_per_chunk, plan.chunks, **plan.tile
        )
        wrap_triton(_merge_statistics_kernel)[(plan.seeds * plan.parts, _ceil(plan.channels, MERGE))](
            z_pre,
            partial,
            mean,
            var,
            *plan.shape,
            *ends,
            plan.chunks,
            plan.parts,
            SLOTS=SLOTS,
            COLUMNS=MERGE,
        )
        if want_z or want_h:
            wrap_triton(_forward_apply_kernel)[grid](
                *tensors, plan.blocks, *plan.shape, *ends, plan.rows_per_chunk, *numbers, **constants
            )
    return z, h, mean, var


@triton_op("ladderfast::ladder_encoder_backward_triton", mutates_args={})
def ladder_encoder_backward_triton(
    grad_z: Tensor | None,
    grad_h: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    z_pre: Tensor,
    mean: Tensor,
    var: Tensor,
    beta: Tensor | None,
    gamma: Tensor | None,
    noise_state: Tensor | None,
    num_labelled: int,
    num_clean: int,
    noise_std: float,
    noise_stream: int,
    activation: int,
    negative_slope: float,
    eps: float,
    seeds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z_pre, beta and gamma; those of what is None have no elements."""
    beta, gamma = (None if t is None else t.contiguous() for t in (beta, gamma))
    grad_x = torch.empty_like(z_pre)
    grad_beta, grad_gamma = (z_pre.new_empty(0) if t is None else torch.empty_like(t) for t in (beta, gamma))
    if z_pre.numel() == 0:
        return grad_x, torch.zeros_like(grad_beta), torch.zeros_like(grad_gamma)
    plan = Plan(z_pre, num_labelled, num_clean, seeds)
    # Only an activation's slope and the gradient of gamma depend on the noise.
    noise = noise_state is not None and noise_std > 0 and grad_h is not None
    noise = noise and (activation != 0 or gamma is not None)
    gradients = tuple(z_pre if t is None else _like(t, z_pre) for t in (grad_z, grad_h))
    of_statistics = tuple(mean if t is None else t.contiguous() for t in (grad_mean, grad_var))
    inputs = (
        z_pre,
        mean.contiguous(),
        var.contiguous(),
        z_pre if beta is None else beta,
        z_pre if gamma is None else gamma,
        noise_state.contiguous() if noise_state is not None and noise else z_pre,
    )
    numbers = (plan.parts, noise_stream, noise_std, negative_slope, eps)
    given = {"HAS_Z": int(grad_z is not None), "HAS_H": int(grad_h is not None)}
    of_statistics_given = {"HAS_MEAN": int(grad_mean is not None), "HAS_VAR": int(grad_var is not None)}
    switches = _switches(beta, gamma, activation)
    constants = given | switches | plan.tile | {"NOISE": int(noise), "ALIGNED": int(plan.aligned)}
    with torch.cuda.device_of(z_pre):
        if plan.held:
            wrap_triton(_backward_held_kernel)[(plan.seeds * plan.blocks,)](
                *gradients,
                *of_statistics,
                *inputs,
                grad_x,
                grad_beta,
                grad_gamma,
                plan.blocks,
                *plan.shape,
                *numbers,
                **of_statistics_given,
                **constants,
                num_warps=plan.warps,
            )
            return grad_x, grad_beta, grad_gamma
        partial = torch.empty(
            (plan.seeds, plan.chunks, 4, plan.channels), dtype=torch.float32, device=z_pre.device
        )
        finish = torch.empty(
            (plan.seeds, plan.parts, 2, plan.channels), dtype=torch.float32, device=z_pre.device
        )
        grid = (plan.seeds * plan.blocks, plan.chunks)
        ends = plan.chunk_ends[:2]
        wrap_triton(_backward_sums_kernel)[grid](
            *gradients,
            *inputs,
            partial,
            plan.blocks,
            *plan.shape,
            *ends,
            plan.rows_per_chunk,
            plan.chunks,
            *numbers,
            **constants,
        )
        wrap_triton(_merge_backward_kernel)[(plan.seeds, _ceil(plan.channels, MERGE))](
            partial,
            *of_statistics,
            inputs[2],
            finish,
            grad_beta,
            grad_gamma,
            *plan.shape,
            *ends,
            plan.chunks,
            plan.parts,
            eps,
            **of_statistics_given,
            HAS_BETA=switches["HAS_BETA"],
            HAS_GAMMA=switches["HAS_GAMMA"],
            SLOTS=SLOTS,
            COLUMNS=MERGE,
        )
        wrap_triton(_backward_apply_kernel)[grid](
            *gradients,
            *inputs,
            finish,
            grad_x,
            plan.blocks,
            *plan.shape,
            *ends,
            plan.rows_per_chunk,
            *numbers,
            **constants,
        )
    return grad_x, grad_beta, grad_gamma

"""Triton kernels of the op `ln_convlstm` and their launchers.

Gates are packed as (samples, 4, channels, positions), cells as (samples, channels, positions), or channels last as
(samples, positions, 4, channels) and (samples, positions, channels). Everything is widened to float32 at the load and
rounded once, at the store.

    forward    moments -> merge_moments -> forward
    backward   backward -> merge_projections -> finish -> sum

Statistics by channel: batch_moments -> merge_batch come first, and the last of backward are finish, which only sums ->
sum -> finish, which then knows the means. A normalised cell: moments -> merge_moments of c', then cell_forward, which
makes the output gate anew; before backward cell_backward -> merge_projections -> finish -> sum, for which c' is an
input like any other.

Floor, in numbers for each cell with one input: forward 11, and 4 read again for the statistics; backward 16, and 12 in
`finish`, which needs what `backward` sums over a sample. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

MOMENTS = 4096  # gates of a program in `moments`
CELLS = 512  # cells of a program in `forward` and `backward`
SLOTS = 16
CHUNKS = 64


@triton.jit
def _tanh(x):
    # Below 1/4 the quotient would lose what it subtracts; the series to x^9 is right to 1e-8 there.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * (62 / 2835)))))
    return tl.where(y < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def _moments_kernel(x_ptr, partial_ptr, length, chunks, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of a block of one sample's gates."""
    sample = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    mask = i < length
    x = tl.load(x_ptr + sample.to(tl.int64) * length + i, mask=mask, other=0.0).to(tl.float32)
    n = tl.minimum(length - first, BLOCK).to(tl.float32)
    rough = tl.sum(x, axis=0) / n
    d = tl.where(mask, x - rough, 0.0)
    rest = tl.sum(d, axis=0)
    at = partial_ptr + (sample.to(tl.int64) * chunks + tl.program_id(1)) * 2
    tl.store(at, rough + rest / n)
    tl.store(at + 1, tl.sum(d * d, axis=0) - rest * rest / n)


@triton.jit
def _merge_moments_kernel(
    partial_ptr, stats_ptr, length, chunks, input, inputs, eps, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    partial = partial_ptr + sample * chunks * 2
    shift = tl.load(partial)
    total = tl.zeros([CHUNKS], dtype=tl.float32)
    for j in range(0, chunks, CHUNKS):
        i = j + tl.arange(0, CHUNKS)
        n = tl.minimum(length - i * BLOCK, BLOCK).to(tl.float32)
        mean = tl.load(partial + 2 * i, mask=i < chunks, other=0.0)
        total += tl.where(i < chunks, n * (mean - shift), 0.0)
    mean_of_all = shift + tl.sum(total, axis=0) / length
    squares = tl.zeros([CHUNKS], dtype=tl.float32)
    for j in range(0, chunks, CHUNKS):
        i = j + tl.arange(0, CHUNKS)
        n = tl.minimum(length - i * BLOCK, BLOCK).to(tl.float32)
        d = tl.load(partial + 2 * i, mask=i < chunks, other=0.0) - mean_of_all
        m2 = tl.load(partial + 2 * i + 1, mask=i < chunks, other=0.0)
        squares += tl.where(i < chunks, m2 + n * d * d, 0.0)
    variance = tl.sum(squares, axis=0) / length
    at = stats_ptr + (sample * inputs + input) * 2
    tl.store(at, mean_of_all)
    tl.store(at + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _places(e, channels, positions, LAST: tl.constexpr):
    """Of cells e of a sample: their channels, their first gate's place, and how far apart gates lie."""
    if LAST:
        channel = e % channels
        return channel, e // channels * 4 * channels + channel, channels
    else:
        return e // positions, e, channels * positions


@triton.jit
def _vector(ptr, seed, gate: tl.constexpr, channels, channel, mask):
    return tl.load(ptr + (seed * 4 + gate) * channels + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _hat(ptr, stats_ptr, sample, seed, gate: tl.constexpr, channels, channel, input: tl.constexpr, at, mask,
         INPUTS: tl.constexpr, BATCH: tl.constexpr):  # fmt: skip
    if BATCH:
        of_gate = stats_ptr + ((seed * INPUTS + input) * 12 + gate) * channels + channel
        mean = tl.load(of_gate, mask=mask, other=0.0)
        rstd = tl.load(of_gate + 4 * channels, mask=mask, other=0.0)
    else:
        mean = tl.load(stats_ptr + (sample * INPUTS + input) * 2)
        rstd = tl.load(stats_ptr + (sample * INPUTS + input) * 2 + 1)
    return (tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd


@triton.jit
def _gate(
    x_ptr,
    y_ptr,
    rec_ptr,
    weight_ptr,
    weight_y_ptr,
    bias_ptr,
    stats_ptr,
    sample,
    seed,
    gate: tl.constexpr,
    channels,
    channel,
    at,
    mask,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
):
    a = tl.load(rec_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a += _vector(bias_ptr, seed, gate, channels, channel, mask)
    if INPUTS == 0:
        a += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        w = _vector(weight_ptr, seed, gate, channels, channel, mask)
        a += _hat(x_ptr, stats_ptr, sample, seed, gate, channels, channel, 0, at, mask, INPUTS, BATCH) * w
    if INPUTS == 2:
        w = _vector(weight_y_ptr, seed, gate, channels, channel, mask)
        a += _hat(y_ptr, stats_ptr, sample, seed, gate, channels, channel, 1, at, mask, INPUTS, BATCH) * w
    return a


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    rec_ptr,
    c_ptr,
    weight_ptr,
    weight_y_ptr,
    bias_ptr,
    stats_ptr,
    h_ptr,
    c_new_ptr,
    per_seed,
    channels,
    positions,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    CELL: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    seed = sample // per_seed
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cells = channels * positions
    mask = e < cells
    channel, first, stride = _places(e, channels, positions, LAST)
    at = sample * 4 * cells + first
    i = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 0,
              channels, channel, at, mask, INPUTS, BATCH)  # fmt: skip
    f = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 1,
              channels, channel, at + stride, mask, INPUTS, BATCH)  # fmt: skip
    g = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 2,
              channels, channel, at + 2 * stride, mask, INPUTS, BATCH)  # fmt: skip
    o = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 3,
              channels, channel, at + 3 * stride, mask, INPUTS, BATCH)  # fmt: skip
    place = sample * cells + e
    c = tl.load(c_ptr + place, mask=mask, other=0.0).to(tl.float32)
    c_new = tl.sigmoid(f) * c + tl.sigmoid(i) * _tanh(g)
    if CELL == 0:
        h = tl.sigmoid(o) * _tanh(c_new)
        tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(c_new_ptr + place, c_new.to(c_new_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _cell(
    x_ptr,
    y_ptr,
    rec_ptr,
    weight_ptr,
    weight_y_ptr,
    bias_ptr,
    stats_ptr,
    c_new_ptr,
    cell_weight_ptr,
    cell_bias_ptr,
    cell_stats_ptr,
    per_seed,
    channels,
    positions,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of cells: their places and mask, that of the output gate, the gate, c_hat, its weight and tanh(n)."""
    sample = tl.program_id(0).to(tl.int64)
    seed = sample // per_seed
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cells = channels * positions
    mask = e < cells
    channel, first, stride = _places(e, channels, positions, LAST)
    at = sample * 4 * cells + first + 3 * stride
    o = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 3,
              channels, channel, at, mask, INPUTS, BATCH)  # fmt: skip
    place = sample * cells + e
    c = tl.load(c_new_ptr + place, mask=mask, other=0.0).to(tl.float32)
    c_hat = (c - tl.load(cell_stats_ptr + sample * 2)) * tl.load(cell_stats_ptr + sample * 2 + 1)
    weight = tl.load(cell_weight_ptr + seed * channels + channel, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(cell_bias_ptr + seed * channels + channel, mask=mask, other=0.0).to(tl.float32)
    return place, mask, at, tl.sigmoid(o), c_hat, weight, _tanh(weight * c_hat + shift)


@triton.jit
def _cell_forward_kernel(
    x_ptr,
    y_ptr,
    rec_ptr,
    weight_ptr,
    weight_y_ptr,
    bias_ptr,
    stats_ptr,
    c_new_ptr,
    cell_weight_ptr,
    cell_bias_ptr,
    cell_stats_ptr,
    h_ptr,
    per_seed,
    channels,
    positions,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, mask, _, o, _, _, t = _cell(
        x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, c_new_ptr, cell_weight_ptr,
        cell_bias_ptr, cell_stats_ptr, per_seed, channels, positions, INPUTS, BATCH, LAST, BLOCK
    )  # fmt: skip
    tl.store(h_ptr + place, (o * t).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _cell_backward_kernel(
    x_ptr,
    y_ptr,
    rec_ptr,
    weight_ptr,
    weight_y_ptr,
    bias_ptr,
    stats_ptr,
    c_new_ptr,
    cell_weight_ptr,
    cell_bias_ptr,
    cell_stats_ptr,
    grad_h_ptr,
    grad_n_ptr,
    grad_rec_ptr,
    partial_ptr,
    per_seed,
    channels,
    positions,
    chunks,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Leaves the gradients of n and of the output gate, and a sample's sums of w grad_n and of w grad_n c_hat."""
    place, mask, at, o, c_hat, weight, t = _cell(
        x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, c_new_ptr, cell_weight_ptr,
        cell_bias_ptr, cell_stats_ptr, per_seed, channels, positions, INPUTS, BATCH, LAST, BLOCK
    )  # fmt: skip
    grad_h = tl.load(grad_h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad_n = grad_h * o * (1.0 - t * t)
    tl.store(grad_n_ptr + place, grad_n, mask=mask)
    grad_o = grad_h * t * o * (1.0 - o)
    tl.store(grad_rec_ptr + at, grad_o.to(grad_rec_ptr.dtype.element_ty), mask=mask)
    weighted = weight * grad_n
    to = partial_ptr + (tl.program_id(0).to(tl.int64) * chunks + tl.program_id(1)) * 2
    tl.store(to, tl.sum(weighted, axis=0))
    tl.store(to + 1, tl.sum(tl.where(mask, weighted * c_hat, 0.0), axis=0))


@triton.jit
def _put_gate(
    x_ptr,
    y_ptr,
    weight_ptr,
    weight_y_ptr,
    stats_ptr,
    grad_rec_ptr,
    grad_a,
    sample,
    seed,
    gate: tl.constexpr,
    channels,
    channel,
    at,
    mask,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Stores a gate's gradient; returns what it adds to the sums of w grad_a and of w grad_a x_hat, for each input."""
    tl.store(grad_rec_ptr + at, grad_a.to(grad_rec_ptr.dtype.element_ty), mask=mask)
    p0, p1, q0, q1 = 0.0, 0.0, 0.0, 0.0
    if INPUTS > 0 and BATCH == 0:
        weighted = grad_a * _vector(weight_ptr, seed, gate, channels, channel, mask)
        p0 = tl.sum(weighted, axis=0)
        x_hat = _hat(x_ptr, stats_ptr, sample, seed, gate, channels, channel, 0, at, mask, INPUTS, BATCH)
        p1 = tl.sum(tl.where(mask, weighted * x_hat, 0.0), axis=0)
    if INPUTS == 2 and BATCH == 0:
        weighted = grad_a * _vector(weight_y_ptr, seed, gate, channels, channel, mask)
        q0 = tl.sum(weighted, axis=0)
        y_hat = _hat(y_ptr, stats_ptr, sample, seed, gate, channels, channel, 1, at, mask, INPUTS, BATCH)
        q1 = tl.sum(tl.where(mask, weighted * y_hat, 0.0), axis=0)
    return p0, p1, q0, q1


@triton.jit
def _backward_kernel(
    grad_h_ptr,
    grad_c_new_ptr,
    x_ptr,
    y_ptr,
    rec_ptr,
    c_ptr,
    weight_ptr,
    weight_y_ptr,
    bias_ptr,
    stats_ptr,
    grad_rec_ptr,
    grad_c_ptr,
    grad_after_ptr,
    partial_ptr,
    per_seed,
    channels,
    positions,
    chunks,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    CELL: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    seed = sample // per_seed
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cells = channels * positions
    mask = e < cells
    channel, first, stride = _places(e, channels, positions, LAST)
    at = sample * 4 * cells + first
    i = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 0,
              channels, channel, at, mask, INPUTS, BATCH)  # fmt: skip
    f = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 1,
              channels, channel, at + stride, mask, INPUTS, BATCH)  # fmt: skip
    g = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 2,
              channels, channel, at + 2 * stride, mask, INPUTS, BATCH)  # fmt: skip
    o = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 3,
              channels, channel, at + 3 * stride, mask, INPUTS, BATCH)  # fmt: skip
    place = sample * cells + e
    c = tl.load(c_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad_h = tl.load(grad_h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad_c = tl.load(grad_c_new_ptr + place, mask=mask, other=0.0).to(tl.float32)
    i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), _tanh(g), tl.sigmoid(o)
    if CELL:
        grad_c += tl.load(grad_after_ptr + place, mask=mask, other=0.0)
        grad_o = tl.load(grad_rec_ptr + at + 3 * stride, mask=mask, other=0.0).to(tl.float32)
    else:
        t = _tanh(f * c + i * g)
        grad_c += grad_h * o * (1.0 - t * t)
        grad_o = grad_h * t * o * (1.0 - o)
    tl.store(grad_c_ptr + place, (grad_c * f).to(grad_c_ptr.dtype.element_ty), mask=mask)
    a0, a1, a2, a3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_c * g * i * (1.0 - i), sample, seed, 0, channels, channel, at, mask,
                               INPUTS, BATCH)  # fmt: skip
    b0, b1, b2, b3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_c * c * f * (1.0 - f), sample, seed, 1, channels, channel, at + stride, mask,
                               INPUTS, BATCH)  # fmt: skip
    c0, c1, c2, c3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_c * i * (1.0 - g * g), sample, seed, 2, channels, channel, at + 2 * stride, mask,
                               INPUTS, BATCH)  # fmt: skip
    d0, d1, d2, d3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_o, sample, seed, 3, channels, channel, at + 3 * stride, mask,
                               INPUTS, BATCH)  # fmt: skip
    to = partial_ptr + (sample * chunks + tl.program_id(1)) * 2 * INPUTS
    if INPUTS > 0 and BATCH == 0:
        tl.store(to, a0 + b0 + c0 + d0)
        tl.store(to + 1, a1 + b1 + c1 + d1)
    if INPUTS == 2 and BATCH == 0:
        tl.store(to + 2, a2 + b2 + c2 + d2)
        tl.store(to + 3, a3 + b3 + c3 + d3)


@triton.jit
def _merge_projections_kernel(
    partial_ptr, means_ptr, length, chunks, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    """means (samples, inputs, 2); program (sample, which of them)."""
    sample = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    total = tl.zeros([CHUNKS], dtype=tl.float32)
    for j in range(0, chunks, CHUNKS):
        i = j + tl.arange(0, CHUNKS)
        total += tl.load(partial_ptr + (sample * chunks + i) * WIDTH + which, mask=i < chunks, other=0.0)
    tl.store(means_ptr + sample * WIDTH + which, tl.sum(total, axis=0) / length)


@triton.jit
def _finish_input(
    x_ptr,
    grad_x_ptr,
    stats_ptr,
    means_ptr,
    grad_a,
    weight,
    row_sample,
    seed,
    gates,
    gate,
    share,
    input: tl.constexpr,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    at,
    seen,
    seen_gate,
    mask,
):
    """Stores grad_x of a tile, but where BATCH is 1; returns grad_a x_hat."""
    if BATCH:
        of_gate = stats_ptr + (seed * INPUTS + input) * 3 * gates + gate
        mean = tl.load(of_gate, mask=seen_gate, other=0.0)
        rstd = tl.load(of_gate + gates, mask=seen_gate, other=0.0)
    else:
        of_row = (row_sample * INPUTS + input) * 2
        mean = tl.load(stats_ptr + of_row, mask=seen, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + of_row + 1, mask=seen, other=0.0)[:, None]
    x_hat = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    if BATCH == 0:
        grad_mean = tl.load(means_ptr + of_row, mask=seen, other=0.0)[:, None]
        projection = tl.load(means_ptr + of_row + 1, mask=seen, other=0.0)[:, None]
    if BATCH == 2:
        # The sums over the batch, those of bias first, (1 + INPUTS, seeds, gates).
        of_bias = means_ptr + seed * gates + gate
        grad_mean = tl.load(of_bias, mask=seen_gate, other=0.0) * weight * share
        of_weight = of_bias + (1 + input) * tl.num_programs(2) * gates
        projection = tl.load(of_weight, mask=seen_gate, other=0.0) * weight * share
    if BATCH != 1:
        grad_x = rstd * (weight * grad_a - grad_mean - x_hat * projection)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    return tl.where(mask, grad_a * x_hat, 0.0)


@triton.jit
def _store_sum(sums_ptr, total, place, seen, LAST: tl.constexpr):
    if LAST:
        tl.store(sums_ptr + place, tl.sum(total, axis=0), mask=seen)
    else:
        tl.store(sums_ptr + place, tl.sum(tl.sum(total, axis=0), axis=0))


@triton.jit
def _finish_kernel(
    x_ptr,
    y_ptr,
    grad_rec_ptr,
    weight_ptr,
    weight_y_ptr,
    stats_ptr,
    means_ptr,
    grad_x_ptr,
    grad_y_ptr,
    sums_ptr,
    rows,
    positions,
    gates,
    rows_per_chunk,
    slots,
    share,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tiles of [rows, columns]: of positions of all samples and gates where channels come last, else of samples and
    positions of one of the `gates` = 4C. sums (seeds, slots, 1 + INPUTS, 4C), which BATCH 2 does not write; share is
    1 over a channel's elements. Program (block of gates, slot, seed)."""
    seed = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0)
    row = tl.program_id(1) * rows_per_chunk
    row_end = tl.minimum(row + rows_per_chunk, rows)
    if LAST:
        gate = block * COLUMNS + tl.arange(0, COLUMNS)
        seen = gate < gates
        columns = COLUMNS
    else:
        gate = block
        seen = block < gates
        columns = positions
    weight = 0.0
    weight_y = 0.0
    if INPUTS > 0:
        weight = tl.load(weight_ptr + seed * gates + gate, mask=seen, other=0.0).to(tl.float32)
    if INPUTS == 2:
        weight_y = tl.load(weight_y_ptr + seed * gates + gate, mask=seen, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    total_x = total
    total_y = total
    for column in range(0, columns, COLUMNS):
        for r in range(row, row_end, ROWS):
            i = r + tl.arange(0, ROWS)
            row_of_all = seed * rows + i
            if LAST:
                at = row_of_all[:, None] * gates + gate[None, :]
                mask = (i < row_end)[:, None] & seen[None, :]
                sample = row_of_all // positions
            else:
                k = column + tl.arange(0, COLUMNS)
                at = (row_of_all * gates + gate)[:, None] * positions + k[None, :]
                mask = (i < row_end)[:, None] & (k < positions)[None, :]
                sample = row_of_all
            grad_a = tl.load(grad_rec_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += grad_a
            if INPUTS > 0:
                total_x += _finish_input(x_ptr, grad_x_ptr, stats_ptr, means_ptr, grad_a, weight, sample, seed,
                                         gates, gate, share, 0, INPUTS, BATCH, at, i < row_end, seen,
                                         mask)  # fmt: skip
            if INPUTS == 2:
                total_y += _finish_input(y_ptr, grad_y_ptr, stats_ptr, means_ptr, grad_a, weight_y, sample,
                                         seed, gates, gate, share, 1, INPUTS, BATCH, at, i < row_end, seen,
                                         mask)  # fmt: skip
    place = (seed * slots + tl.program_id(1)) * (1 + INPUTS) * gates + gate
    if BATCH != 2:
        _store_sum(sums_ptr, total, place, seen, LAST)
    if INPUTS > 0 and BATCH != 2:
        _store_sum(sums_ptr, total_x, place + gates, seen, LAST)
    if INPUTS == 2 and BATCH != 2:
        _store_sum(sums_ptr, total_y, place + 2 * gates, seen, LAST)


@triton.jit
def _batch_moments_kernel(
    x_ptr,
    partial_ptr,
    rows,
    positions,
    gates,
    rows_per_chunk,
    slots,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tiles as in finish: of a gate's elements in a chunk of rows, the first, the mean of what they
    have beyond it, and the sum of squares about that. partial (seeds, slots, 3, 4C)."""
    seed = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * rows_per_chunk
    row_end = tl.minimum(row + rows_per_chunk, rows)
    if LAST:
        gate = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        seen = gate < gates
        columns = COLUMNS
        shift = tl.load(x_ptr + (seed * rows + row) * gates + gate, mask=seen, other=0.0).to(tl.float32)
    else:
        gate = tl.program_id(0)
        seen = gate < gates
        columns = positions
        shift = tl.load(x_ptr + ((seed * rows + row) * gates + gate) * positions).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    squares = total
    for column in range(0, columns, COLUMNS):
        for r in range(row, row_end, ROWS):
            i = r + tl.arange(0, ROWS)
            if LAST:
                at = (seed * rows + i)[:, None] * gates + gate[None, :]
                mask = (i < row_end)[:, None] & seen[None, :]
            else:
                k = column + tl.arange(0, COLUMNS)
                at = ((seed * rows + i) * gates + gate)[:, None] * positions + k[None, :]
                mask = (i < row_end)[:, None] & (k < positions)[None, :]
            d = tl.where(mask, tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - shift, 0.0)
            total += d
            squares += d * d
    place = (seed * slots + tl.program_id(1)) * 3 * gates + gate
    n = ((row_end - row) * (1 if LAST else positions)).to(tl.float32)
    if LAST:
        sum_d = tl.sum(total, axis=0)
        sum_d2 = tl.sum(squares, axis=0)
        tl.store(partial_ptr + place, shift, mask=seen)
        tl.store(partial_ptr + place + gates, sum_d / n, mask=seen)
        tl.store(partial_ptr + place + 2 * gates, sum_d2 - sum_d * sum_d / n, mask=seen)
    else:
        sum_d = tl.sum(tl.sum(total, axis=0), axis=0)
        sum_d2 = tl.sum(tl.sum(squares, axis=0), axis=0)
        tl.store(partial_ptr + place, shift)
        tl.store(partial_ptr + place + gates, sum_d / n)
        tl.store(partial_ptr + place + 2 * gates, sum_d2 - sum_d * sum_d / n)


@triton.jit
def _merge_batch_kernel(
    partial_ptr,
    stats_ptr,
    rows,
    per_row,
    gates,
    rows_per_chunk,
    slots,
    input,
    inputs,
    count,
    eps,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """stats (seeds, inputs, 3, 4C): mean, 1 / std and variance; program (seed, block of gates)."""
    seed = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    base = partial_ptr + seed * slots * 3 * gates + g
    first = tl.load(base, mask=g < gates, other=0.0)
    total = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for slot in range(0, slots, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        mask = (i < slots)[:, None] & (g < gates)[None, :]
        n = (tl.minimum(rows - i * rows_per_chunk, rows_per_chunk) * per_row).to(tl.float32)[:, None]
        at = base[None, :] + i[:, None] * 3 * gates
        shift = tl.load(at, mask=mask, other=0.0) - first[None, :]
        total += tl.where(mask, n * (shift + tl.load(at + gates, mask=mask, other=0.0)), 0.0)
    beyond = tl.sum(total, axis=0) / count
    squares = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for slot in range(0, slots, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        mask = (i < slots)[:, None] & (g < gates)[None, :]
        n = (tl.minimum(rows - i * rows_per_chunk, rows_per_chunk) * per_row).to(tl.float32)[:, None]
        at = base[None, :] + i[:, None] * 3 * gates
        shift = tl.load(at, mask=mask, other=0.0) - first[None, :]
        d = shift + tl.load(at + gates, mask=mask, other=0.0) - beyond[None, :]
        squares += tl.where(mask, tl.load(at + 2 * gates, mask=mask, other=0.0) + n * d * d, 0.0)
    variance = tl.sum(squares, axis=0) / count
    to = stats_ptr + (seed * inputs + input) * 3 * gates + g
    tl.store(to, first + beyond, mask=g < gates)
    tl.store(to + gates, 1.0 / tl.sqrt(variance + eps), mask=g < gates)
    tl.store(to + 2 * gates, variance, mask=g < gates)


@triton.jit
def _sum_kernel(sums_ptr, out_ptr, gates, slots, row, rows, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums row `row` of the slots of one seed (program 0) in their order."""
    seed = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    for slot in range(0, slots, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        at = ((seed * slots + i) * rows + row)[:, None] * gates + g[None, :]
        total += tl.load(sums_ptr + at, mask=(i < slots)[:, None] & (g < gates)[None, :], other=0.0)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + seed * gates + g, out.to(out_ptr.dtype.element_ty), mask=g < gates)


class Plan:
    """How a shape is cut into programs and partial sums; depends on the shape alone."""

    def __init__(self, x: Tensor, bias: Tensor) -> None:
        channel = bias.dim()
        self.seeds = x.shape[0] if channel == 2 else 1
        self.per_seed, self.channels = x.shape[channel - 1], x.shape[channel] // 4
        self.positions = 1
        for size in x.shape[channel + 1 :]:
            self.positions *= size
        self.last = int(not x.is_contiguous() or self.positions == 1)
        self.samples = self.seeds * self.per_seed
        self.gates, self.cells = 4 * self.channels, self.channels * self.positions
        self.moments = triton.cdiv(4 * self.cells, MOMENTS)
        self.chunks = triton.cdiv(self.cells, CELLS)
        # `finish`
        self.rows = self.per_seed * self.positions if self.last else self.per_seed
        least = 64 if self.last else max(1, 8192 // max(self.positions, 1))
        self.rows_per_chunk = max(least, triton.cdiv(self.rows, 256))
        self.slots = triton.cdiv(self.rows, self.rows_per_chunk)

    def tiles(self, gates: int) -> tuple[tuple[int, int, int], dict[str, int]]:
        """The grid of `finish` for so many gates, and the tile that a program takes at once."""
        width = gates if self.last else self.positions
        columns = min(128, max(16, triton.next_power_of_2(width)))
        blocks = triton.cdiv(gates, columns) if self.last else gates
        return (blocks, self.slots, self.seeds), {
            "LAST": self.last,
            "ROWS": min(16, 512 // columns),
            "COLUMNS": columns,
        }


def _laid_out(t: Tensor, x: Tensor, channel: int) -> Tensor:
    """t, gates or cells, packed in the order of x's axes; a copy only where it is not."""
    if x.is_contiguous():
        return t.contiguous()
    return t.movedim(channel, -1).contiguous().movedim(-1, channel)


def _cells_like(x: Tensor, channel: int) -> Tensor:
    return torch.empty_like(x.narrow(channel, 0, x.shape[channel] // 4))


class _Step:
    """The tensors of a step as the kernels take them, and the passes that forward and backward share."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        rec: Tensor,
        c: Tensor,
        weight: Tensor | None,
        weight_y: Tensor | None,
        bias: Tensor,
        cell_weight: Tensor | None,
        cell_bias: Tensor | None,
        batch: bool,
    ) -> None:
        self.plan, self.channel, self.x = Plan(x, bias), bias.dim(), x
        self.inputs = (weight is not None) + (y is not None)
        self.kind = {"INPUTS": self.inputs, "BATCH": int(batch and self.inputs > 0)}
        self.second = x if y is None else _laid_out(y, x, self.channel)
        self.rec, self.c = (_laid_out(t, x, self.channel) for t in (rec, c))
        self.bias = bias.contiguous()
        self.weights = [self.bias if w is None else w.contiguous() for w in (weight, weight_y)]
        self.cell = [self.bias if v is None else v.contiguous() for v in (cell_weight, cell_bias)]
        self.sizes = (self.plan.per_seed, self.plan.channels, self.plan.positions)
        self.last = {"LAST": self.plan.last, "BLOCK": CELLS}

    def scratch(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def gates(self, stats: Tensor) -> tuple[Tensor, ...]:
        """What a kernel that makes gates reads."""
        return self.x, self.second, self.rec, *self.weights, self.bias, stats

    def sample_moments(self, t: Tensor, stats: Tensor, cells: int, k: int, inputs: int, eps: float) -> None:
        plan = self.plan
        chunks = triton.cdiv(cells, MOMENTS)
        partial = self.scratch(plan.samples, chunks, 2)
        wrap_triton(_moments_kernel)[(plan.samples, chunks)](t, partial, cells, chunks, BLOCK=MOMENTS)
        wrap_triton(_merge_moments_kernel)[(plan.samples,)](
            partial, stats, cells, chunks, k, inputs, eps, BLOCK=MOMENTS, CHUNKS=CHUNKS
        )

    def batch_moments(self, t: Tensor, stats: Tensor, k: int, eps: float) -> None:
        plan = self.plan
        grid, tile = plan.tiles(plan.gates)
        partial = self.scratch(plan.seeds, plan.slots, 3, plan.gates)
        rest = (plan.gates, plan.rows_per_chunk, plan.slots)
        wrap_triton(_batch_moments_kernel)[grid](t, partial, plan.rows, plan.positions, *rest, **tile)
        per_row = 1 if plan.last else plan.positions
        wrap_triton(_merge_batch_kernel)[(plan.seeds, triton.cdiv(plan.gates, 128))](
            partial,
            stats,
            plan.rows,
            per_row,
            *rest,
            k,
            self.inputs,
            float(plan.per_seed * plan.positions),
            eps,
            SLOTS=SLOTS,
            COLUMNS=128,
        )

    def finish(
        self,
        gates: int,
        inputs: int,
        batch: int,
        tensors: tuple[Tensor, ...],
        sums: Tensor,
    ) -> None:
        """tensors: x, y, grad_a, their weights, statistics, means, grad_x and grad_y."""
        plan = self.plan
        grid, tile = plan.tiles(gates)
        wrap_triton(_finish_kernel)[grid](
            *tensors,
            sums,
            plan.rows,
            plan.positions,
            gates,
            plan.rows_per_chunk,
            plan.slots,
            1.0 / (plan.per_seed * plan.positions),
            INPUTS=inputs,
            BATCH=batch,
            **tile,
        )

    def sum_rows(self, sums: Tensor, outs: list[Tensor], gates: int) -> None:
        """outs: of bias first, then of each weight."""
        plan = self.plan
        for row, out in enumerate(outs):
            wrap_triton(_sum_kernel)[(plan.seeds, triton.cdiv(gates, 128))](
                sums, out, gates, plan.slots, row, len(outs), SLOTS=SLOTS, COLUMNS=128
            )

    def projections(self, partial: Tensor, means: Tensor, length: int, width: int) -> None:
        plan = self.plan
        wrap_triton(_merge_projections_kernel)[(plan.samples, width)](
            partial, means, length, plan.chunks, WIDTH=width, CHUNKS=CHUNKS
        )


@triton_op("ladderfast::ln_convlstm_triton", mutates_args={})
def ln_convlstm_triton(
    x: Tensor,
    y: Tensor | None,
    rec: Tensor,
    c: Tensor,
    weight: Tensor | None,
    weight_y: Tensor | None,
    bias: Tensor,
    cell_weight: Tensor | None,
    cell_bias: Tensor | None,
    batch: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x contiguous or channels-last; see ladderfast.ops.ln_convlstm_step. Returns h, c and the statistics."""
    step = _Step(x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias, batch)
    plan, inputs, cell = step.plan, step.inputs, cell_weight is not None
    h, c_new = _cells_like(x, bias.dim()), _cells_like(x, bias.dim())
    by_channel = step.kind["BATCH"] == 1
    stats = step.scratch(
        *((plan.seeds, inputs, 3, plan.gates) if by_channel else (plan.seeds, plan.per_seed, inputs, 2))
    )
    cell_stats = step.scratch(plan.seeds, plan.per_seed if cell else 0, 2)
    if x.numel() == 0:
        return h, c_new, stats.zero_(), cell_stats
    with torch.cuda.device_of(x):
        for k in range(inputs):
            if by_channel:
                step.batch_moments((x, step.second)[k], stats, k, eps)
            else:
                step.sample_moments((x, step.second)[k], stats, 4 * plan.cells, k, inputs, eps)
        grid = (plan.samples, plan.chunks)
        gates = step.gates(stats)
        wrap_triton(_forward_kernel)[grid](
            *gates[:3], step.c, *gates[3:], h, c_new, *step.sizes, **step.kind, CELL=int(cell), **step.last
        )
        if cell:
            step.sample_moments(c_new, cell_stats, plan.cells, 0, 1, eps)
            wrap_triton(_cell_forward_kernel)[grid](
                *gates, c_new, *step.cell, cell_stats, h, *step.sizes, **step.kind, **step.last
            )
    return h, c_new, stats, cell_stats


@triton_op("ladderfast::ln_convlstm_backward_triton", mutates_args={})
def ln_convlstm_backward_triton(
    grad_h: Tensor,
    grad_c_new: Tensor,
    x: Tensor,
    y: Tensor | None,
    rec: Tensor,
    c: Tensor,
    weight: Tensor | None,
    weight_y: Tensor | None,
    bias: Tensor,
    cell_weight: Tensor | None,
    cell_bias: Tensor | None,
    c_new: Tensor | None,
    stats: Tensor,
    cell_stats: Tensor,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, rec, c, weight, weight_y, bias, cell_weight and cell_bias; those of what is not there are
    empty, and so is that of an x that is not normalised, which is that of rec."""
    step = _Step(x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias, batch)
    plan, inputs, channel = step.plan, step.inputs, bias.dim()
    by_channel = step.kind["BATCH"] == 1
    grad_rec, grad_c = torch.empty_like(x), _cells_like(x, channel)
    grad_x = x.new_empty((0,)) if weight is None else torch.empty_like(x)
    grad_y = x.new_empty((0,)) if y is None else torch.empty_like(x)

    def gradient_of(v: Tensor | None) -> Tensor:
        if v is None:
            return bias.new_empty((0,))
        return v.new_zeros(v.shape) if x.numel() == 0 else v.new_empty(v.shape)

    vectors = [gradient_of(v) for v in (weight, weight_y, bias, cell_weight, cell_bias)]
    if x.numel() == 0:
        return grad_x, grad_y, grad_rec, grad_c, *vectors  # type: ignore[return-value]
    grad_weights, grad_bias, grad_cell = vectors[:2], vectors[2], vectors[3:]
    grad_h, grad_c_new = (_laid_out(t, x, channel) for t in (grad_h, grad_c_new))
    stats, cell_stats = stats.contiguous(), cell_stats.contiguous()
    gates, grid = step.gates(stats), (plan.samples, plan.chunks)
    partial = step.scratch(plan.samples, plan.chunks, 2 * max(inputs, 1))
    grad_after = grad_h
    with torch.cuda.device_of(x):
        if c_new is not None:
            after = _laid_out(c_new, x, channel)
            grad_n = torch.empty_like(grad_c, dtype=torch.float32)
            grad_after = torch.empty_like(grad_n)
            wrap_triton(_cell_backward_kernel)[grid](
                *gates,
                after,
                *step.cell,
                cell_stats,
                grad_h,
                grad_n,
                grad_rec,
                partial,
                *step.sizes,
                plan.chunks,
                **step.kind,
                **step.last,
            )
            cell_means = step.scratch(plan.samples, 2)
            step.projections(partial, cell_means, plan.cells, 2)
            of_cell = step.scratch(plan.seeds, plan.slots, 2, plan.channels)
            gain = step.cell[0]
            of_c = (after, after, grad_n, gain, gain, cell_stats, cell_means, grad_after, grad_after)
            step.finish(plan.channels, 1, 0, of_c, of_cell)
            step.sum_rows(of_cell, [grad_cell[1], grad_cell[0]], plan.channels)
        wrap_triton(_backward_kernel)[grid](
            grad_h,
            grad_c_new,
            *gates[:3],
            step.c,
            *gates[3:],
            grad_rec,
            grad_c,
            grad_after,
            partial,
            *step.sizes,
            plan.chunks,
            **step.kind,
            CELL=int(c_new is not None),
            **step.last,
        )
        sums = step.scratch(plan.seeds, plan.slots, 1 + inputs, plan.gates)
        # What is not there is not touched.
        grads = (grad_rec if weight is None else grad_x, grad_rec if y is None else grad_y)
        if by_channel:
            totals = step.scratch(1 + inputs, plan.seeds, plan.gates)
            normalised = (x, step.second, grad_rec, *step.weights, stats, totals, *grads)
            step.finish(plan.gates, inputs, 1, normalised, sums)
            step.sum_rows(sums, list(totals), plan.gates)
            step.finish(plan.gates, inputs, 2, normalised, sums)
            for out, total in zip((grad_bias, *grad_weights)[: 1 + inputs], totals, strict=True):
                out.copy_(total.view(out.shape))
        else:
            means = step.scratch(plan.samples, 2 * inputs)
            if inputs > 0:
                step.projections(partial, means, 4 * plan.cells, 2 * inputs)
            normalised = (x, step.second, grad_rec, *step.weights, stats, means, *grads)
            step.finish(plan.gates, inputs, 0, normalised, sums)
            step.sum_rows(sums, [grad_bias, *grad_weights][: 1 + inputs], plan.gates)
    return grad_x, grad_y, grad_rec, grad_c, *vectors  # type: ignore[return-value]

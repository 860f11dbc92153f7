"""Triton kernels of the op `ln_convlstm` and their launchers.

Gates are packed as (samples, 4, channels, positions), cells as (samples, channels, positions), or channels last as
(samples, positions, 4, channels) and (samples, positions, channels). Everything is widened to float32 at the load and
rounded once, at the store.

    forward    moments -> merge_moments -> forward
    backward   backward -> merge_projections -> finish -> sum

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
def _hat(ptr, stats_ptr, sample, input: tl.constexpr, INPUTS: tl.constexpr, at, mask):
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
):
    a = tl.load(rec_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a += _vector(bias_ptr, seed, gate, channels, channel, mask)
    if INPUTS == 0:
        a += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        w = _vector(weight_ptr, seed, gate, channels, channel, mask)
        a += _hat(x_ptr, stats_ptr, sample, 0, INPUTS, at, mask) * w
    if INPUTS == 2:
        w = _vector(weight_y_ptr, seed, gate, channels, channel, mask)
        a += _hat(y_ptr, stats_ptr, sample, 1, INPUTS, at, mask) * w
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
              channels, channel, at, mask, INPUTS)  # fmt: skip
    f = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 1,
              channels, channel, at + stride, mask, INPUTS)  # fmt: skip
    g = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 2,
              channels, channel, at + 2 * stride, mask, INPUTS)  # fmt: skip
    o = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 3,
              channels, channel, at + 3 * stride, mask, INPUTS)  # fmt: skip
    place = sample * cells + e
    c = tl.load(c_ptr + place, mask=mask, other=0.0).to(tl.float32)
    c_new = tl.sigmoid(f) * c + tl.sigmoid(i) * _tanh(g)
    h = tl.sigmoid(o) * _tanh(c_new)
    tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(c_new_ptr + place, c_new.to(c_new_ptr.dtype.element_ty), mask=mask)


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
):
    """Stores a gate's gradient; returns what it adds to the sums of w grad_a and of w grad_a x_hat, for each input."""
    tl.store(grad_rec_ptr + at, grad_a.to(grad_rec_ptr.dtype.element_ty), mask=mask)
    p0, p1, q0, q1 = 0.0, 0.0, 0.0, 0.0
    if INPUTS > 0:
        weighted = grad_a * _vector(weight_ptr, seed, gate, channels, channel, mask)
        p0 = tl.sum(weighted, axis=0)
        p1 = tl.sum(
            tl.where(mask, weighted * _hat(x_ptr, stats_ptr, sample, 0, INPUTS, at, mask), 0.0), axis=0
        )
    if INPUTS == 2:
        weighted = grad_a * _vector(weight_y_ptr, seed, gate, channels, channel, mask)
        q0 = tl.sum(weighted, axis=0)
        q1 = tl.sum(
            tl.where(mask, weighted * _hat(y_ptr, stats_ptr, sample, 1, INPUTS, at, mask), 0.0), axis=0
        )
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
    partial_ptr,
    per_seed,
    channels,
    positions,
    chunks,
    INPUTS: tl.constexpr,
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
              channels, channel, at, mask, INPUTS)  # fmt: skip
    f = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 1,
              channels, channel, at + stride, mask, INPUTS)  # fmt: skip
    g = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 2,
              channels, channel, at + 2 * stride, mask, INPUTS)  # fmt: skip
    o = _gate(x_ptr, y_ptr, rec_ptr, weight_ptr, weight_y_ptr, bias_ptr, stats_ptr, sample, seed, 3,
              channels, channel, at + 3 * stride, mask, INPUTS)  # fmt: skip
    place = sample * cells + e
    c = tl.load(c_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad_h = tl.load(grad_h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad_c = tl.load(grad_c_new_ptr + place, mask=mask, other=0.0).to(tl.float32)
    i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), _tanh(g), tl.sigmoid(o)
    t = _tanh(f * c + i * g)
    grad_c += grad_h * o * (1.0 - t * t)
    tl.store(grad_c_ptr + place, (grad_c * f).to(grad_c_ptr.dtype.element_ty), mask=mask)
    a0, a1, a2, a3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_c * g * i * (1.0 - i), sample, seed, 0, channels, channel, at, mask,
                               INPUTS)  # fmt: skip
    b0, b1, b2, b3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_c * c * f * (1.0 - f), sample, seed, 1, channels, channel, at + stride, mask,
                               INPUTS)  # fmt: skip
    c0, c1, c2, c3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_c * i * (1.0 - g * g), sample, seed, 2, channels, channel, at + 2 * stride, mask,
                               INPUTS)  # fmt: skip
    d0, d1, d2, d3 = _put_gate(x_ptr, y_ptr, weight_ptr, weight_y_ptr, stats_ptr, grad_rec_ptr,
                               grad_h * t * o * (1.0 - o), sample, seed, 3, channels, channel, at + 3 * stride, mask,
                               INPUTS)  # fmt: skip
    to = partial_ptr + (sample * chunks + tl.program_id(1)) * 2 * INPUTS
    if INPUTS > 0:
        tl.store(to, a0 + b0 + c0 + d0)
        tl.store(to + 1, a1 + b1 + c1 + d1)
    if INPUTS == 2:
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
    input: tl.constexpr,
    INPUTS: tl.constexpr,
    at,
    seen,
    mask,
):
    """Stores grad_x of a tile; returns grad_a x_hat."""
    of_row = (row_sample * INPUTS + input) * 2
    mean = tl.load(stats_ptr + of_row, mask=seen, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + of_row + 1, mask=seen, other=0.0)[:, None]
    grad_mean = tl.load(means_ptr + of_row, mask=seen, other=0.0)[:, None]
    projection = tl.load(means_ptr + of_row + 1, mask=seen, other=0.0)[:, None]
    x_hat = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
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
    blocks,
    rows,
    positions,
    gates,
    rows_per_chunk,
    slots,
    INPUTS: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tiles of [rows, columns]: of positions of all samples and gates where channels come last, else of samples and
    positions of one of the `gates` = 4C. sums (seeds, slots, 1 + INPUTS, 4C)."""
    seed = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
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
                total_x += _finish_input(x_ptr, grad_x_ptr, stats_ptr, means_ptr, grad_a, weight, sample, 0, INPUTS,
                                         at, i < row_end, mask)  # fmt: skip
            if INPUTS == 2:
                total_y += _finish_input(y_ptr, grad_y_ptr, stats_ptr, means_ptr, grad_a, weight_y, sample, 1, INPUTS,
                                         at, i < row_end, mask)  # fmt: skip
    place = (seed * slots + tl.program_id(1)) * (1 + INPUTS) * gates + gate
    _store_sum(sums_ptr, total, place, seen, LAST)
    if INPUTS > 0:
        _store_sum(sums_ptr, total_x, place + gates, seen, LAST)
    if INPUTS == 2:
        _store_sum(sums_ptr, total_y, place + 2 * gates, seen, LAST)


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
        width = self.gates if self.last else self.positions
        self.columns = min(128, max(16, triton.next_power_of_2(width)))
        self.tile_rows = min(16, 512 // self.columns)
        self.blocks = triton.cdiv(self.gates, self.columns) if self.last else self.gates
        least = 64 if self.last else max(1, 8192 // max(self.positions, 1))
        self.rows_per_chunk = max(least, triton.cdiv(self.rows, 256))
        self.slots = triton.cdiv(self.rows, self.rows_per_chunk)


def _laid_out(t: Tensor, x: Tensor, channel: int) -> Tensor:
    """t, gates or cells, packed in the order of x's axes; a copy only where it is not."""
    if x.is_contiguous():
        return t.contiguous()
    return t.movedim(channel, -1).contiguous().movedim(-1, channel)


def _cells_like(x: Tensor, channel: int) -> Tensor:
    return torch.empty_like(x.narrow(channel, 0, x.shape[channel] // 4))


@triton_op("ladderfast::ln_convlstm_triton", mutates_args={})
def ln_convlstm_triton(
    x: Tensor,
    y: Tensor | None,
    rec: Tensor,
    c: Tensor,
    weight: Tensor | None,
    weight_y: Tensor | None,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x contiguous or channels-last; see ladderfast.ops.ln_convlstm_step. Returns h, c and the statistics."""
    plan = Plan(x, bias)
    inputs = (weight is not None) + (y is not None)
    h, c_new = _cells_like(x, bias.dim()), _cells_like(x, bias.dim())
    stats = torch.empty((plan.seeds, plan.per_seed, inputs, 2), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return h, c_new, stats
    rec, c = (_laid_out(t, x, bias.dim()) for t in (rec, c))
    bias = bias.contiguous()
    w = bias if weight is None else weight.contiguous()
    w_y = bias if weight_y is None else weight_y.contiguous()
    second = x if y is None else _laid_out(y, x, bias.dim())
    with torch.cuda.device_of(x):
        partial = torch.empty((plan.samples, plan.moments, 2), dtype=torch.float32, device=x.device)
        for k in range(inputs):
            wrap_triton(_moments_kernel)[(plan.samples, plan.moments)](
                (x, second)[k], partial, 4 * plan.cells, plan.moments, BLOCK=MOMENTS
            )
            wrap_triton(_merge_moments_kernel)[(plan.samples,)](
                partial, stats, 4 * plan.cells, plan.moments, k, inputs, eps, BLOCK=MOMENTS, CHUNKS=CHUNKS
            )
        wrap_triton(_forward_kernel)[(plan.samples, plan.chunks)](
            x,
            second,
            rec,
            c,
            w,
            w_y,
            bias,
            stats,
            h,
            c_new,
            plan.per_seed,
            plan.channels,
            plan.positions,
            INPUTS=inputs,
            LAST=plan.last,
            BLOCK=CELLS,
        )
    return h, c_new, stats


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
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, rec, c, weight, weight_y and bias; those of what is not there are empty, and so is that of an
    x that is not normalised, which is that of rec."""
    plan = Plan(x, bias)
    channel = bias.dim()
    inputs = (weight is not None) + (y is not None)
    grad_rec, grad_c = torch.empty_like(x), _cells_like(x, channel)
    grad_x = x.new_empty((0,)) if weight is None else torch.empty_like(x)
    grad_y = x.new_empty((0,)) if y is None else torch.empty_like(x)
    bias = bias.contiguous()
    if x.numel() == 0:
        zeros = [x.new_zeros((0,)) if w is None else torch.zeros_like(bias) for w in (weight, weight_y)]
        return grad_x, grad_y, grad_rec, grad_c, zeros[0], zeros[1], torch.zeros_like(bias)
    grads = [bias.new_empty((0,)) if w is None else torch.empty_like(bias) for w in (weight, weight_y)]
    grad_bias = torch.empty_like(bias)
    grad_h, grad_c_new, rec, c = (_laid_out(t, x, channel) for t in (grad_h, grad_c_new, rec, c))
    w = bias if weight is None else weight.contiguous()
    w_y = bias if weight_y is None else weight_y.contiguous()
    second = x if y is None else _laid_out(y, x, channel)
    stats = stats.contiguous()

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    partial, means = scratch(plan.samples, plan.chunks, 2 * inputs), scratch(plan.samples, 2 * inputs)
    sums = scratch(plan.seeds, plan.slots, 1 + inputs, plan.gates)
    with torch.cuda.device_of(x):
        wrap_triton(_backward_kernel)[(plan.samples, plan.chunks)](
            grad_h,
            grad_c_new,
            x,
            second,
            rec,
            c,
            w,
            w_y,
            bias,
            stats,
            grad_rec,
            grad_c,
            partial,
            plan.per_seed,
            plan.channels,
            plan.positions,
            plan.chunks,
            INPUTS=inputs,
            LAST=plan.last,
            BLOCK=CELLS,
        )
        if inputs > 0:
            wrap_triton(_merge_projections_kernel)[(plan.samples, 2 * inputs)](
                partial, means, 4 * plan.cells, plan.chunks, WIDTH=2 * inputs, CHUNKS=CHUNKS
            )
        wrap_triton(_finish_kernel)[(plan.blocks * plan.seeds, plan.slots)](
            x,
            second,
            grad_rec,
            w,
            w_y,
            stats,
            means,
            grad_rec if weight is None else grad_x,
            grad_rec if y is None else grad_y,
            sums,
            plan.blocks,
            plan.rows,
            plan.positions,
            plan.gates,
            plan.rows_per_chunk,
            plan.slots,
            INPUTS=inputs,
            LAST=plan.last,
            ROWS=plan.tile_rows,
            COLUMNS=plan.columns,
        )
        for row, out in enumerate((grad_bias, *grads)[: 1 + inputs]):
            wrap_triton(_sum_kernel)[(plan.seeds, triton.cdiv(plan.gates, 128))](
                sums, out, plan.gates, plan.slots, row, 1 + inputs, SLOTS=SLOTS, COLUMNS=128
            )
    return grad_x, grad_y, grad_rec, grad_c, grads[0], grads[1], grad_bias

"""Gaussian noise by counter inside Triton kernels: the numbering of ladderfast.reference.noise."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _uniform(word):
    """((word >> 9) + 1/2) / 2^23: the bits behind the point of a number in [1, 2), and then the exact difference."""
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375


@triton.jit
def _box_muller(first, second):
    """The normal values of two neighbouring elements from their words, each right to a few units in the last place.

    log and the sine and cosine of a turn are minimax polynomials, those of csrc/cuda/noise.cuh: the library's sine
    keeps a branch for large arguments that costs local memory.
    """
    bits = _uniform(first).to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.08734750747680664 * f - 0.14307482540607452
    p = p * f + 0.14917989075183868
    p = p * f - 0.165705144405365
    p = p * f + 0.19962070882320404
    p = p * f - 0.25001755356788635
    p = p * f + 0.33333951234817505
    p = p * f - 0.49999991059303284
    radius = tl.sqrt(-2.0 * (k.to(tl.float32) * 0.6931471824645996 + (f * f * p + f)))

    turn = _uniform(second) * 4.0
    quarter = (turn + 0.5).to(tl.int32)
    x = turn - quarter.to(tl.float32)
    s = x * x
    a = -0.00460165785625577 * s + 0.07968003302812576
    a = a * s - 0.6459634900093079
    a = (a * s + 1.5707963705062866) * x
    b = 0.0009037664858624339 * s - 0.02086016535758972
    b = b * s + 0.25366923213005066
    b = b * s - 1.2337005138397217
    b = b * s + 1.0
    swap = (quarter & 1) == 1
    sine = tl.where(swap, b, a)
    cosine = tl.where(swap, a, b)
    sine = tl.where((quarter & 2) == 2, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    return radius * cosine, radius * sine


@triton.jit
def _words(quad, state, stream):
    """The four words of counter `quad` (int64) for a state (pointer to seed and offset)."""
    seed = tl.load(state).to(tl.uint64)
    call = (tl.load(state + 1) + stream).to(tl.uint64)
    low = quad.to(tl.uint32)
    zero = low * 0
    return tl.random.philox_impl(
        low,
        (quad >> 32).to(tl.uint32),
        zero + call.to(tl.uint32),
        zero + (call >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
        10,
    )


@triton.jit
def normal_tile(row, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, state, stream):
    """Standard normal values [ROWS, COLUMNS] for elements that are numbered row (int64, [ROWS]) + 0 .. COLUMNS - 1.

    ALIGNED promises that rows begin at multiples of four, and draws each counter once instead of four times.
    """
    if ALIGNED:
        quad = (row >> 2)[:, None] + tl.arange(0, COLUMNS // 4)[None, :]
        w0, w1, w2, w3 = _words(quad, state, stream)
        n0, n1 = _box_muller(w0, w1)
        n2, n3 = _box_muller(w2, w3)
        return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    else:
        number = row[:, None] + tl.arange(0, COLUMNS)[None, :]
        w0, w1, w2, w3 = _words(number >> 2, state, stream)
        upper = (number & 2) == 2
        even, odd = _box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
        return tl.where((number & 1) == 1, odd, even)

"""Triton kernels of Tagger's group inputs and mixture costs, and their launchers.

A program takes a block of neighbouring pixels of one row, and goes over their groups two or three times; what it reads
again comes from the caches. Everything is widened to float32 at the load and rounded once, at the store. Formulas as in
csrc/math/tagger.h, exponents to the base 2 among them.

Floor, in elements for each of z: forward reads z and m and writes two (a cost 1 / K), backward reads z, m and two
gradients (of a cost 1 / K) and writes two. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ladderfast.reference.tagger import CLIP, FLOOR, POLE

LN2 = tl.constexpr(0.6931471805599453)
TWO_PI = tl.constexpr(6.283185307179586)
LOWEST = tl.constexpr(-3.4e38)
MOST = tl.constexpr(126.0)
LIMIT = tl.constexpr(2.0**126)
LOW = tl.constexpr(CLIP)
HIGH = tl.constexpr(1 - CLIP)
NEAR = tl.constexpr(POLE)
LEAST = tl.constexpr(FLOOR)

SUM_BLOCK = 256


@triton.jit
def _place(rows_per_seed, blocks, pixels, BLOCK: tl.constexpr):
    """A program's row and seed, its pixels, and which of them exist."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, row // rows_per_seed, d, d < pixels


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, value, mask):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _at_least(x, low: tl.constexpr):
    return tl.where(x < low, low, x)


@triton.jit
def _at_most(x, high: tl.constexpr):
    return tl.where(x > high, high, x)


@triton.jit
def _exponent(x):
    """floor(log2 x) of x > 0, that of the least normal number for subnormal ones."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.maximum(exponent, -126).to(tl.float32)


@triton.jit
def _nearer(e, nearest):
    """The e of the nearest group, with one group more. Exponents, rounded, may tie where one is nearer."""
    return tl.where(tl.abs(e) < tl.abs(nearest), e, nearest)


@triton.jit
def _difference(e, other, scale):
    """One group's exponent less another's: far ones differ by less than they are rounded by."""
    return ((e - other) * scale) * (e + other)


@triton.jit
def _ahead(e, m, scale, nearest, power):
    """The e and the log2 m, rounded down, of the group whose mask times density is largest, with one group more."""
    own = _exponent(m)
    ahead = (m > 0) & (_difference(e, nearest, scale) + (own - power) > 0)
    return tl.where(ahead, e, nearest), tl.where(ahead, own, power)


@triton.jit
def _mixture_weight(e, scale, nearest, power):
    """2 to the power of a group's exponent less that of `_ahead`'s."""
    return tl.exp2(_at_most(_difference(e, nearest, scale) - power, MOST))


@triton.jit
def _gaussian_inputs_kernel(
    x_ptr,
    z_ptr,
    m_ptr,
    scalar_ptr,
    dz_ptr,
    likelihood_ptr,
    rows_per_seed,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(rows_per_seed, blocks, pixels, BLOCK)
    v = tl.load(scalar_ptr + seed).to(tl.float32)
    scale = -0.5 / (v * LN2)
    x = _load(x_ptr, row * pixels + d, mask)
    base = row * groups * pixels + d
    nearest = tl.full([BLOCK], -LOWEST, dtype=tl.float32)
    for k in range(groups):
        e = x - _load(z_ptr, base + k * pixels, mask)
        nearest = _nearer(e, nearest)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        e = x - _load(z_ptr, base + k * pixels, mask)
        total += tl.exp2(_difference(e, nearest, scale))
    share = 1.0 / total
    peak = tl.exp2((nearest * scale) * nearest) / tl.sqrt(v * TWO_PI)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        w = tl.exp2(_difference(e, nearest, scale))
        _store(dz_ptr, at, e * _load(m_ptr, at, mask) * (w * peak), mask)
        _store(likelihood_ptr, at, w * share, mask)


@triton.jit
def _gaussian_inputs_backward_kernel(
    grad_dz_ptr,
    grad_likelihood_ptr,
    x_ptr,
    z_ptr,
    m_ptr,
    scalar_ptr,
    grad_x_ptr,
    grad_z_ptr,
    grad_m_ptr,
    partial_ptr,
    rows_per_seed,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(rows_per_seed, blocks, pixels, BLOCK)
    v = tl.load(scalar_ptr + seed).to(tl.float32)
    scale, precision = -0.5 / (v * LN2), 1.0 / v
    x = _load(x_ptr, row * pixels + d, mask)
    base = row * groups * pixels + d
    nearest = tl.full([BLOCK], -LOWEST, dtype=tl.float32)
    for k in range(groups):
        e = x - _load(z_ptr, base + k * pixels, mask)
        nearest = _nearer(e, nearest)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        w = tl.exp2(_difference(e, nearest, scale))
        total += w
        dot += w * _load(grad_likelihood_ptr, at, mask)
    share = 1.0 / total
    dot *= share
    peak = tl.exp2((nearest * scale) * nearest) / tl.sqrt(v * TWO_PI)
    sum_x = tl.zeros([BLOCK], dtype=tl.float32)
    sum_v = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        w = tl.exp2(_difference(e, nearest, scale))
        scaled = e * precision
        density = _load(grad_dz_ptr, at, mask) * (w * peak)
        a = (w * share) * (_load(grad_likelihood_ptr, at, mask) - dot)
        m = _load(m_ptr, at, mask)
        turn = 1.0 - scaled * e
        grad_z = a * scaled - (density * m) * turn
        _store(grad_z_ptr, at, grad_z, mask)
        _store(grad_m_ptr, at, density * e, mask)
        sum_x -= grad_z
        sum_v += ((a * (e - nearest)) * (e + nearest)) * precision - (density * e) * m * turn
    _store(grad_x_ptr, row * pixels + d, sum_x, mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, sum_v, 0.0), axis=0))


@triton.jit
def _gaussian_nll_kernel(
    x_ptr,
    z_ptr,
    m_ptr,
    scalar_ptr,
    nll_ptr,
    rows_per_seed,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(rows_per_seed, blocks, pixels, BLOCK)
    v = tl.load(scalar_ptr + seed).to(tl.float32)
    scale = -0.5 / (v * LN2)
    x = _load(x_ptr, row * pixels + d, mask)
    base = row * groups * pixels + d
    nearest = tl.zeros([BLOCK], dtype=tl.float32)
    power = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        nearest, power = _ahead(e, _load(m_ptr, at, mask), scale, nearest, power)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        total += _load(m_ptr, at, mask) * _mixture_weight(e, scale, nearest, power)
    top = (nearest * scale) * nearest + power
    _store(nll_ptr, row * pixels + d, (0.5 * tl.log(v * TWO_PI) - top * LN2) - tl.log(total), mask)


@triton.jit
def _gaussian_nll_backward_kernel(
    grad_ptr,
    x_ptr,
    z_ptr,
    m_ptr,
    scalar_ptr,
    grad_x_ptr,
    grad_z_ptr,
    grad_m_ptr,
    partial_ptr,
    rows_per_seed,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(rows_per_seed, blocks, pixels, BLOCK)
    v = tl.load(scalar_ptr + seed).to(tl.float32)
    scale, precision = -0.5 / (v * LN2), 1.0 / v
    x = _load(x_ptr, row * pixels + d, mask)
    base = row * groups * pixels + d
    nearest = tl.zeros([BLOCK], dtype=tl.float32)
    power = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        nearest, power = _ahead(e, _load(m_ptr, at, mask), scale, nearest, power)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        total += _load(m_ptr, at, mask) * _mixture_weight(e, scale, nearest, power)
    sum_v = _load(grad_ptr, row * pixels + d, mask)
    share = sum_v / total
    sum_x = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        e = x - _load(z_ptr, at, mask)
        w = _mixture_weight(e, scale, nearest, power)
        grad_m = _at_least(_at_most(-share * w, LIMIT), -LIMIT)
        grad_z = -(share * (_load(m_ptr, at, mask) * w)) * (e * precision)
        _store(grad_z_ptr, at, grad_z, mask)
        _store(grad_m_ptr, at, grad_m, mask)
        sum_x -= grad_z
        sum_v += e * grad_z
    _store(grad_x_ptr, row * pixels + d, sum_x, mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, sum_v, 0.0), axis=0))


@triton.jit
def _sum_kernel(partial_ptr, variance_ptr, grad_variance_ptr, per_seed, BLOCK: tl.constexpr):
    """Partial sums of one seed, each of 2 v grad_variance, in their order."""
    seed = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, per_seed, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + seed * per_seed + i, mask=i < per_seed, other=0.0)
    v = tl.load(variance_ptr + seed).to(tl.float32)
    _store(grad_variance_ptr, seed, tl.sum(total, axis=0) / (2.0 * v), None)


@triton.jit
def _denominator(x, mixture):
    """That of dz, before it is kept off its pole."""
    return (x - 1.0) + _at_most(_at_least(mixture, LOW), HIGH)


@triton.jit
def _off_pole(t):
    return tl.where((t > -NEAR) & (t < NEAR), tl.where(t < 0, -NEAR, NEAR), t)


@triton.jit
def _bernoulli_inputs_kernel(
    x_ptr,
    z_ptr,
    m_ptr,
    scalar_ptr,
    dz_ptr,
    likelihood_ptr,
    rows_per_seed,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(rows_per_seed, blocks, pixels, BLOCK)
    flip = tl.load(scalar_ptr + seed).to(tl.float32)
    keep = 1.0 - 2.0 * flip
    x = _load(x_ptr, row * pixels + d, mask)
    sign = x + x - 1.0
    base = row * groups * pixels + d
    mixture = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        xi = _load(z_ptr, at, mask) * keep + flip
        mixture += xi * _load(m_ptr, at, mask)
        total += _at_least((1.0 - x) + xi * sign, LEAST)
    pole = 1.0 / _off_pole(_denominator(x, mixture))
    share = 1.0 / total
    for k in range(groups):
        at = base + k * pixels
        xi = _load(z_ptr, at, mask) * keep + flip
        _store(dz_ptr, at, _load(m_ptr, at, mask) * pole, mask)
        _store(likelihood_ptr, at, _at_least((1.0 - x) + xi * sign, LEAST) * share, mask)


@triton.jit
def _bernoulli_inputs_backward_kernel(
    grad_dz_ptr,
    grad_likelihood_ptr,
    x_ptr,
    z_ptr,
    m_ptr,
    scalar_ptr,
    grad_x_ptr,
    grad_z_ptr,
    grad_m_ptr,
    rows_per_seed,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(rows_per_seed, blocks, pixels, BLOCK)
    flip = tl.load(scalar_ptr + seed).to(tl.float32)
    keep = 1.0 - 2.0 * flip
    x = _load(x_ptr, row * pixels + d, mask)
    sign = x + x - 1.0
    base = row * groups * pixels + d
    mixture = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    sum_m = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        xi = _load(z_ptr, at, mask) * keep + flip
        m = _load(m_ptr, at, mask)
        density = _at_least((1.0 - x) + xi * sign, LEAST)
        mixture += xi * m
        total += density
        dot += density * _load(grad_likelihood_ptr, at, mask)
        sum_m += _load(grad_dz_ptr, at, mask) * m
    t = _denominator(x, mixture)
    pole = 1.0 / _off_pole(t)
    share = 1.0 / total
    dot *= share
    grad_t = tl.where((t > -NEAR) & (t < NEAR), 0.0, -(sum_m * pole) * pole)
    grad_s = tl.where((mixture < LOW) | (mixture > HIGH), 0.0, grad_t)
    sum_x = grad_t
    for k in range(groups):
        at = base + k * pixels
        xi = _load(z_ptr, at, mask) * keep + flip
        m = _load(m_ptr, at, mask)
        steep = (_load(grad_likelihood_ptr, at, mask) - dot) * share
        grad_d = tl.where((1.0 - x) + xi * sign > LEAST, steep, 0.0)
        _store(grad_z_ptr, at, (grad_s * m + grad_d * sign) * keep, mask)
        _store(grad_m_ptr, at, _load(grad_dz_ptr, at, mask) * pole + grad_s * xi, mask)
        sum_x += grad_d * (xi + xi - 1.0)
    _store(grad_x_ptr, row * pixels + d, sum_x, mask)


@triton.jit
def _bernoulli_nll_kernel(x_ptr, z_ptr, m_ptr, nll_ptr, blocks, groups, pixels, BLOCK: tl.constexpr):
    row, _, d, mask = _place(1, blocks, pixels, BLOCK)
    x = _load(x_ptr, row * pixels + d, mask)
    base = row * groups * pixels + d
    p = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        p += _load(m_ptr, at, mask) * _load(z_ptr, at, mask)
    c = _at_most(_at_least(p, LOW), HIGH)
    _store(nll_ptr, row * pixels + d, -x * tl.log(c) - (1.0 - x) * tl.log(1.0 - c), mask)


@triton.jit
def _bernoulli_nll_backward_kernel(
    grad_ptr,
    x_ptr,
    z_ptr,
    m_ptr,
    grad_x_ptr,
    grad_z_ptr,
    grad_m_ptr,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    row, _, d, mask = _place(1, blocks, pixels, BLOCK)
    x = _load(x_ptr, row * pixels + d, mask)
    grad = _load(grad_ptr, row * pixels + d, mask)
    base = row * groups * pixels + d
    p = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        p += _load(m_ptr, at, mask) * _load(z_ptr, at, mask)
    c = _at_most(_at_least(p, LOW), HIGH)
    _store(grad_x_ptr, row * pixels + d, grad * (tl.log(1.0 - c) - tl.log(c)), mask)
    slope = grad * ((1.0 - x) / (1.0 - c) - x / c)
    slope = tl.where((p < LOW) | (p > HIGH), 0.0, slope)
    for k in range(groups):
        at = base + k * pixels
        z = _load(z_ptr, at, mask)
        m = _load(m_ptr, at, mask)
        _store(grad_z_ptr, at, slope * m, mask)
        _store(grad_m_ptr, at, slope * z, mask)


class Plan:
    """How a shape is cut into programs; depends on the shape alone."""

    def __init__(self, z: Tensor, scalar: Tensor | None) -> None:
        self.rows, self.groups, self.pixels = z.shape
        self.block = min(512, max(16, triton.next_power_of_2(self.pixels)))
        self.blocks = triton.cdiv(self.pixels, self.block)
        self.seeds = 1 if scalar is None else scalar.numel()
        self.grid = (self.rows * self.blocks,)
        sizes = (self.blocks, self.groups, self.pixels)
        self.sizes = sizes if scalar is None else (self.rows // max(self.seeds, 1), *sizes)


def _empty(*shaped: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in shaped)


def _inputs(kernel, x: Tensor, z: Tensor, m: Tensor, scalar: Tensor) -> tuple[Tensor, Tensor]:
    dz, likelihood = _empty(z, z)
    if z.numel() > 0:
        plan = Plan(z, scalar)
        given = (t.contiguous() for t in (x, z, m, scalar))
        with torch.cuda.device_of(z):
            wrap_triton(kernel)[plan.grid](*given, dz, likelihood, *plan.sizes, BLOCK=plan.block)
    return dz, likelihood


def _nll(kernel, x: Tensor, z: Tensor, m: Tensor, scalar: Tensor | None) -> Tensor:
    (nll,) = _empty(x)
    if z.numel() > 0:
        plan = Plan(z, scalar)
        given = (t.contiguous() for t in (x, z, m, scalar) if t is not None)
        with torch.cuda.device_of(z):
            wrap_triton(kernel)[plan.grid](*given, nll, *plan.sizes, BLOCK=plan.block)
    return nll


def _gaussian_backward(kernel, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`given` ends in x, z, m and variance."""
    x, z, m, variance = given[-4:]
    grad_x, grad_z, grad_m, grad_variance = _empty(x, z, m, variance)
    if z.numel() == 0:
        return grad_x, grad_z, grad_m, torch.zeros_like(grad_variance)
    plan = Plan(z, variance)
    partial = torch.empty(plan.grid, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        wrap_triton(kernel)[plan.grid](
            *(t.contiguous() for t in given),
            grad_x,
            grad_z,
            grad_m,
            partial,
            *plan.sizes,
            BLOCK=plan.block,
        )
        wrap_triton(_sum_kernel)[(plan.seeds,)](
            partial,
            variance.contiguous(),
            grad_variance,
            partial.numel() // plan.seeds,
            BLOCK=SUM_BLOCK,
        )
    return grad_x, grad_z, grad_m, grad_variance


def _bernoulli_backward(kernel, scalar: Tensor | None, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`given` ends in x, z and m."""
    x, z, m = given[-3:]
    grad_x, grad_z, grad_m = _empty(x, z, m)
    if z.numel() > 0:
        plan = Plan(z, scalar)
        last = () if scalar is None else (scalar.contiguous(),)
        with torch.cuda.device_of(z):
            wrap_triton(kernel)[plan.grid](
                *(t.contiguous() for t in given),
                *last,
                grad_x,
                grad_z,
                grad_m,
                *plan.sizes,
                BLOCK=plan.block,
            )
    return grad_x, grad_z, grad_m


@triton_op("ladderfast::gaussian_group_inputs_triton", mutates_args={})
def gaussian_group_inputs_triton(x: Tensor, z: Tensor, m: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """See ladderfast.ops.gaussian_group_inputs; variance () or (S,), as in ladderfast.reference.tagger."""
    return _inputs(_gaussian_inputs_kernel, x, z, m, variance)


@triton_op("ladderfast::bernoulli_group_inputs_triton", mutates_args={})
def bernoulli_group_inputs_triton(
    x: Tensor, z: Tensor, m: Tensor, flip_prob: Tensor
) -> tuple[Tensor, Tensor]:
    """See ladderfast.ops.bernoulli_group_inputs."""
    return _inputs(_bernoulli_inputs_kernel, x, z, m, flip_prob)


@triton_op("ladderfast::gaussian_mixture_nll_triton", mutates_args={})
def gaussian_mixture_nll_triton(x: Tensor, z: Tensor, m: Tensor, variance: Tensor) -> Tensor:
    """See ladderfast.ops.gaussian_mixture_nll."""
    return _nll(_gaussian_nll_kernel, x, z, m, variance)


@triton_op("ladderfast::bernoulli_mixture_nll_triton", mutates_args={})
def bernoulli_mixture_nll_triton(x: Tensor, z: Tensor, m: Tensor) -> Tensor:
    """See ladderfast.ops.bernoulli_mixture_nll."""
    return _nll(_bernoulli_nll_kernel, x, z, m, None)


@triton_op("ladderfast::gaussian_group_inputs_backward_triton", mutates_args={})
def gaussian_group_inputs_backward_triton(
    grad_dz: Tensor, grad_likelihood: Tensor, x: Tensor, z: Tensor, m: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z, m and variance."""
    return _gaussian_backward(_gaussian_inputs_backward_kernel, grad_dz, grad_likelihood, x, z, m, variance)


@triton_op("ladderfast::bernoulli_group_inputs_backward_triton", mutates_args={})
def bernoulli_group_inputs_backward_triton(
    grad_dz: Tensor, grad_likelihood: Tensor, x: Tensor, z: Tensor, m: Tensor, flip_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z and m."""
    return _bernoulli_backward(
        _bernoulli_inputs_backward_kernel, flip_prob, grad_dz, grad_likelihood, x, z, m
    )


@triton_op("ladderfast::gaussian_mixture_nll_backward_triton", mutates_args={})
def gaussian_mixture_nll_backward_triton(
    grad: Tensor, x: Tensor, z: Tensor, m: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z, m and variance."""
    return _gaussian_backward(_gaussian_nll_backward_kernel, grad, x, z, m, variance)


@triton_op("ladderfast::bernoulli_mixture_nll_backward_triton", mutates_args={})
def bernoulli_mixture_nll_backward_triton(
    grad: Tensor, x: Tensor, z: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z and m."""
    return _bernoulli_backward(_bernoulli_nll_backward_kernel, None, grad, x, z, m)

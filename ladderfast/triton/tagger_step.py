"""Triton kernels of what surrounds Tagger's network in an iteration, and their launchers.

The inputs go over a row's pixels as the kernels of `tagger` do. The outputs first take moments over rows and groups, in
chunks of rows that a small kernel merges; backward takes sums in the same way and then makes the gradient a second time
rather than write, round and read it. Everything is widened to float32 at the load and rounded once, at the store.
Formulas as in csrc/math/tagger.h, exponents to the base 2 among them.

Floor, in elements for each of z: the inputs read two and write four forward, read six and write two backward; the
outputs read four and write two, and read eight and write two. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ladderfast.triton.tagger import (
    HIGH,
    LEAST,
    LN2,
    LOW,
    LOWEST,
    NEAR,
    SUM_BLOCK,
    TWO_PI,
    Plan,
    _at_least,
    _at_most,
    _bernoulli_backward,
    _denominator,
    _difference,
    _empty,
    _gaussian_backward,
    _load,
    _nearer,
    _off_pole,
    _place,
    _store,
    _sum_kernel,
)

LOG2E = tl.constexpr(1.4426950408889634)

CHUNKS = 64  # of a seed's rows, at most
COLUMNS = 128  # pixels of a program that sums


@triton.jit
def _larger(a, b):
    """The larger one; b if either is NaN."""
    return tl.where(a > b, a, b)


@triton.jit
def _exponent(logit, top):
    """Of a mask's weight, to the base 2: the difference is made before anything rounds the logits."""
    return (logit - top) * LOG2E


@triton.jit
def _softmax(m_ptr, base, groups, pixels, mask, BLOCK: tl.constexpr):
    """The largest logit, and the share of the masks' weights exp(logit - largest)."""
    top = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    for k in range(groups):
        top = _larger(_load(m_ptr, base + k * pixels, mask), top)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        total += tl.exp2(_exponent(_load(m_ptr, base + k * pixels, mask), top))
    return top, 1.0 / total


@triton.jit
def _mask_of(m_ptr, at, top, share, mask):
    return tl.exp2(_exponent(_load(m_ptr, at, mask), top)) * share


@triton.jit
def _inputs_kernel(
    x_ptr,
    z_ptr,
    m_ptr,
    scalar_ptr,
    out_ptr,
    rows_per_seed,
    blocks,
    groups,
    pixels,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(rows_per_seed, blocks, pixels, BLOCK)
    scalar = tl.load(scalar_ptr + seed).to(tl.float32)
    x = _load(x_ptr, row * pixels + d, mask)
    base = row * groups * pixels + d
    m_top, m_share = _softmax(m_ptr, base, groups, pixels, mask, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if GAUSSIAN:
        scale = -0.5 / (scalar * LN2)
        nearest = tl.full([BLOCK], -LOWEST, dtype=tl.float32)
        for k in range(groups):
            e = x - _load(z_ptr, base + k * pixels, mask)
            nearest = _nearer(e, nearest)
        for k in range(groups):
            e = x - _load(z_ptr, base + k * pixels, mask)
            total += tl.exp2(_difference(e, nearest, scale))
        factor = tl.exp2((nearest * scale) * nearest) / tl.sqrt(scalar * TWO_PI)
    else:
        keep = 1.0 - 2.0 * scalar
        sign = x + x - 1.0
        mixture = tl.zeros([BLOCK], dtype=tl.float32)
        for k in range(groups):
            at = base + k * pixels
            xi = _load(z_ptr, at, mask) * keep + scalar
            mixture += xi * _mask_of(m_ptr, at, m_top, m_share, mask)
            total += _at_least((1.0 - x) + xi * sign, LEAST)
        factor = 1.0 / _off_pole(_denominator(x, mixture))
    share = 1.0 / total
    for k in range(groups):
        at = base + k * pixels
        z = _load(z_ptr, at, mask)
        m = _mask_of(m_ptr, at, m_top, m_share, mask)
        if GAUSSIAN:
            w = tl.exp2(_difference(x - z, nearest, scale))
            dz = (x - z) * m * (w * factor)
        else:
            w = _at_least((1.0 - x) + (z * keep + scalar) * sign, LEAST)
            dz = m * factor
        to = (row * groups + k) * 4 * pixels + d
        _store(out_ptr, to, z, mask)
        _store(out_ptr, to + pixels, m, mask)
        _store(out_ptr, to + 2 * pixels, dz, mask)
        _store(out_ptr, to + 3 * pixels, w * share, mask)


@triton.jit
def _gaussian_inputs_backward_kernel(
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
    m_top, m_share = _softmax(m_ptr, base, groups, pixels, mask, BLOCK)
    nearest = tl.full([BLOCK], -LOWEST, dtype=tl.float32)
    for k in range(groups):
        e = x - _load(z_ptr, base + k * pixels, mask)
        nearest = _nearer(e, nearest)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        e = x - _load(z_ptr, base + k * pixels, mask)
        w = tl.exp2(_difference(e, nearest, scale))
        total += w
        dot += w * _load(grad_ptr, (row * groups + k) * 4 * pixels + 3 * pixels + d, mask)
    share = 1.0 / total
    dot *= share
    peak = tl.exp2((nearest * scale) * nearest) / tl.sqrt(v * TWO_PI)
    sum_x = tl.zeros([BLOCK], dtype=tl.float32)
    sum_v = tl.zeros([BLOCK], dtype=tl.float32)
    m_dot = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        grad = (row * groups + k) * 4 * pixels + d
        e = x - _load(z_ptr, at, mask)
        m = _mask_of(m_ptr, at, m_top, m_share, mask)
        w = tl.exp2(_difference(e, nearest, scale))
        scaled = e * precision
        density = _load(grad_ptr, grad + 2 * pixels, mask) * (w * peak)
        a = (w * share) * (_load(grad_ptr, grad + 3 * pixels, mask) - dot)
        turn = 1.0 - scaled * e
        grad_z = a * scaled - (density * m) * turn
        _store(grad_z_ptr, at, grad_z + _load(grad_ptr, grad, mask), mask)
        m_dot += m * (density * e + _load(grad_ptr, grad + pixels, mask))
        sum_x -= grad_z
        sum_v += ((a * (e - nearest)) * (e + nearest)) * precision - (density * e) * m * turn
    for k in range(groups):
        at = base + k * pixels
        grad = (row * groups + k) * 4 * pixels + d
        e = x - _load(z_ptr, at, mask)
        m = _mask_of(m_ptr, at, m_top, m_share, mask)
        density = _load(grad_ptr, grad + 2 * pixels, mask) * (tl.exp2(_difference(e, nearest, scale)) * peak)
        _store(grad_m_ptr, at, m * ((density * e + _load(grad_ptr, grad + pixels, mask)) - m_dot), mask)
    _store(grad_x_ptr, row * pixels + d, sum_x, mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, sum_v, 0.0), axis=0))


@triton.jit
def _bernoulli_inputs_backward_kernel(
    grad_ptr,
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
    m_top, m_share = _softmax(m_ptr, base, groups, pixels, mask, BLOCK)
    mixture = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    sum_m = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        grad = (row * groups + k) * 4 * pixels + d
        xi = _load(z_ptr, at, mask) * keep + flip
        m = _mask_of(m_ptr, at, m_top, m_share, mask)
        density = _at_least((1.0 - x) + xi * sign, LEAST)
        mixture += xi * m
        total += density
        dot += density * _load(grad_ptr, grad + 3 * pixels, mask)
        sum_m += _load(grad_ptr, grad + 2 * pixels, mask) * m
    t = _denominator(x, mixture)
    pole = 1.0 / _off_pole(t)
    share = 1.0 / total
    dot *= share
    grad_t = tl.where((t > -NEAR) & (t < NEAR), 0.0, -(sum_m * pole) * pole)
    grad_s = tl.where((mixture < LOW) | (mixture > HIGH), 0.0, grad_t)
    sum_x = grad_t
    m_dot = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        at = base + k * pixels
        grad = (row * groups + k) * 4 * pixels + d
        xi = _load(z_ptr, at, mask) * keep + flip
        m = _mask_of(m_ptr, at, m_top, m_share, mask)
        steep = (_load(grad_ptr, grad + 3 * pixels, mask) - dot) * share
        grad_d = tl.where((1.0 - x) + xi * sign > LEAST, steep, 0.0)
        _store(grad_z_ptr, at, (grad_s * m + grad_d * sign) * keep + _load(grad_ptr, grad, mask), mask)
        grad_m = _load(grad_ptr, grad + 2 * pixels, mask) * pole + grad_s * xi
        m_dot += m * (grad_m + _load(grad_ptr, grad + pixels, mask))
        sum_x += grad_d * (xi + xi - 1.0)
    for k in range(groups):
        at = base + k * pixels
        grad = (row * groups + k) * 4 * pixels + d
        xi = _load(z_ptr, at, mask) * keep + flip
        grad_m = _load(grad_ptr, grad + 2 * pixels, mask) * pole + grad_s * xi
        grad_m = (grad_m + _load(grad_ptr, grad + pixels, mask)) - m_dot
        _store(grad_m_ptr, at, _mask_of(m_ptr, at, m_top, m_share, mask) * grad_m, mask)
    _store(grad_x_ptr, row * pixels + d, sum_x, mask)


@triton.jit
def _rows_of(per_seed, chunk_rows, chunks, blocks, pixels, BLOCK: tl.constexpr):
    """A program's rows [first, last) and seed, its slot among the chunks, its pixels and which of them exist."""
    program = tl.program_id(0)
    slot = (program // blocks).to(tl.int64)
    seed = slot // chunks
    first = seed * per_seed + (slot % chunks) * chunk_rows
    last = tl.minimum(first + chunk_rows, (seed + 1) * per_seed)
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return first, last, seed, slot, d, d < pixels


@triton.jit
def _moments_kernel(
    z_ptr,
    m_ptr,
    partial_ptr,
    z_group,
    m_group,
    per_seed,
    chunk_rows,
    chunks,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    """Mean, relative to the seed's first row and group, and squares of z_pre and m_pre, for each chunk and pixel."""
    first, last, seed, slot, d, mask = _rows_of(per_seed, chunk_rows, chunks, blocks, pixels, BLOCK)
    z_first = _load(z_ptr, seed * per_seed * groups * z_group + d, mask)
    m_first = _load(m_ptr, seed * per_seed * groups * m_group + d, mask)
    z_mean = tl.zeros([BLOCK], dtype=tl.float32)
    z_squares = tl.zeros([BLOCK], dtype=tl.float32)
    m_mean = tl.zeros([BLOCK], dtype=tl.float32)
    m_squares = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(first * groups, last * groups):
        share = 1.0 / (i - first * groups + 1).to(tl.float32)
        z = _load(z_ptr, i * z_group + d, mask) - z_first
        apart = z - z_mean
        z_mean += apart * share
        z_squares += apart * (z - z_mean)
        m = _load(m_ptr, i * m_group + d, mask) - m_first
        apart = m - m_mean
        m_mean += apart * share
        m_squares += apart * (m - m_mean)
    at = slot * 4 * pixels + d
    _store(partial_ptr, at, z_mean, mask)
    _store(partial_ptr, at + pixels, z_squares, mask)
    _store(partial_ptr, at + 2 * pixels, m_mean, mask)
    _store(partial_ptr, at + 3 * pixels, m_squares, mask)


@triton.jit
def _merge_moments_kernel(
    z_ptr,
    m_ptr,
    partial_ptr,
    stats_ptr,
    eps,
    z_group,
    m_group,
    per_seed,
    chunk_rows,
    chunks,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    """stats (seeds, 4, pixels): mean and 1 / sqrt(variance + eps) of z_pre, then of m_pre."""
    program = tl.program_id(0)
    seed = (program // blocks).to(tl.int64)
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = d < pixels
    z_mean = tl.zeros([BLOCK], dtype=tl.float32)
    z_squares = tl.zeros([BLOCK], dtype=tl.float32)
    m_mean = tl.zeros([BLOCK], dtype=tl.float32)
    m_squares = tl.zeros([BLOCK], dtype=tl.float32)
    for chunk in range(chunks):
        before = (chunk * chunk_rows * groups).to(tl.float32)
        added = (tl.minimum(chunk_rows, per_seed - chunk * chunk_rows) * groups).to(tl.float32)
        share = added / (before + added)
        at = (seed * chunks + chunk) * 4 * pixels + d
        apart = _load(partial_ptr, at, mask) - z_mean
        z_mean += apart * share
        z_squares += _load(partial_ptr, at + pixels, mask) + apart * apart * (before * share)
        apart = _load(partial_ptr, at + 2 * pixels, mask) - m_mean
        m_mean += apart * share
        m_squares += _load(partial_ptr, at + 3 * pixels, mask) + apart * apart * (before * share)
    count = (per_seed * groups).to(tl.float32)
    at = seed * 4 * pixels + d
    z_mean += _load(z_ptr, seed * per_seed * groups * z_group + d, mask)
    m_mean += _load(m_ptr, seed * per_seed * groups * m_group + d, mask)
    _store(stats_ptr, at, z_mean, mask)
    _store(stats_ptr, at + pixels, 1.0 / tl.sqrt(z_squares / count + eps), mask)
    _store(stats_ptr, at + 2 * pixels, m_mean, mask)
    _store(stats_ptr, at + 3 * pixels, 1.0 / tl.sqrt(m_squares / count + eps), mask)


@triton.jit
def _columns(stats_ptr, c1_ptr, b1_ptr, c2_ptr, seed, d, pixels, mask):
    """z before any squashing is (z_pre - mean) scale + bias, and the logit is (m_pre - mean) scale."""
    at = seed * 4 * pixels + d
    z_scale = _load(stats_ptr, at + pixels, mask) * _load(c1_ptr, seed * pixels + d, mask)
    m_scale = _load(stats_ptr, at + 3 * pixels, mask) * tl.load(c2_ptr + seed).to(tl.float32)
    bias = _load(b1_ptr, seed * pixels + d, mask)
    return _load(stats_ptr, at, mask), z_scale, bias, _load(stats_ptr, at + 2 * pixels, mask), m_scale


@triton.jit
def _squashed(z, GAUSSIAN: tl.constexpr):
    """The logistic function for binary pixels; its exponent is cut off where the sum stays finite."""
    if GAUSSIAN:
        return z
    else:
        return 1.0 / (1.0 + tl.exp2(_at_most(z * -LOG2E, 126.0)))


@triton.jit
def _outputs_kernel(
    x_ptr,
    z_pre_ptr,
    m_pre_ptr,
    c1_ptr,
    b1_ptr,
    c2_ptr,
    variance_ptr,
    stats_ptr,
    z_ptr,
    logits_ptr,
    nll_ptr,
    z_group,
    m_group,
    per_seed,
    blocks,
    groups,
    pixels,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, seed, d, mask = _place(per_seed, blocks, pixels, BLOCK)
    z_mean, z_scale, bias, m_mean, m_scale = _columns(
        stats_ptr, c1_ptr, b1_ptr, c2_ptr, seed, d, pixels, mask
    )
    x = _load(x_ptr, row * pixels + d, mask)
    top = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    joint_top = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    if GAUSSIAN:
        v = tl.load(variance_ptr + seed).to(tl.float32)
        scale = -0.5 / (v * LN2)
    for k in range(groups):
        i = row * groups + k
        z = _squashed((_load(z_pre_ptr, i * z_group + d, mask) - z_mean) * z_scale + bias, GAUSSIAN)
        logit = (_load(m_pre_ptr, i * m_group + d, mask) - m_mean) * m_scale
        _store(z_ptr, i * pixels + d, z, mask)
        _store(logits_ptr, i * pixels + d, logit, mask)
        top = _larger(logit, top)
    if GAUSSIAN:
        for k in range(groups):
            i = row * groups + k
            e = x - ((_load(z_pre_ptr, i * z_group + d, mask) - z_mean) * z_scale + bias)
            exponent = _exponent((_load(m_pre_ptr, i * m_group + d, mask) - m_mean) * m_scale, top)
            joint_top = _larger(exponent + (e * scale) * e, joint_top)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    mixture = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(groups):
        i = row * groups + k
        z = _squashed((_load(z_pre_ptr, i * z_group + d, mask) - z_mean) * z_scale + bias, GAUSSIAN)
        exponent = _exponent((_load(m_pre_ptr, i * m_group + d, mask) - m_mean) * m_scale, top)
        w = tl.exp2(exponent)
        total += w
        if GAUSSIAN:
            mixture += tl.exp2(exponent + ((x - z) * scale) * (x - z) - joint_top)
        else:
            mixture += w * z
    if GAUSSIAN:
        nll = 0.5 * tl.log(v * TWO_PI) - joint_top * LN2 + tl.log(total / mixture)
    else:
        c = _at_most(_at_least(mixture / total, LOW), HIGH)
        nll = -x * tl.log(c) - (1.0 - x) * tl.log(1.0 - c)
    _store(nll_ptr, row * pixels + d, nll, mask)


@triton.jit
def _outputs_backward_kernel(
    grad_z_ptr,
    grad_logits_ptr,
    grad_nll_ptr,
    x_ptr,
    z_pre_ptr,
    m_pre_ptr,
    c1_ptr,
    b1_ptr,
    c2_ptr,
    variance_ptr,
    stats_ptr,
    means_ptr,
    partial_ptr,
    of_variance_ptr,
    to_x_ptr,
    to_z_ptr,
    to_m_ptr,
    z_group,
    m_group,
    per_seed,
    chunk_rows,
    chunks,
    blocks,
    groups,
    pixels,
    GAUSSIAN: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of z before any squashing and of the logits: their sums over rows and groups, alone and times z_pre or
    m_pre less its mean, into partial; or, with FINISH, those of z_pre and m_pre, by what `_merge_sums_kernel` made."""
    first, last, seed, slot, d, mask = _rows_of(per_seed, chunk_rows, chunks, blocks, pixels, BLOCK)
    z_mean, z_scale, bias, m_mean, m_scale = _columns(
        stats_ptr, c1_ptr, b1_ptr, c2_ptr, seed, d, pixels, mask
    )
    if GAUSSIAN:
        v = tl.load(variance_ptr + seed).to(tl.float32)
        scale, precision = -0.5 / (v * LN2), 1.0 / v
    if FINISH:
        at = seed * 4 * pixels + d
        z_off, z_pull = _load(means_ptr, at, mask), _load(means_ptr, at + pixels, mask)
        m_off, m_pull = _load(means_ptr, at + 2 * pixels, mask), _load(means_ptr, at + 3 * pixels, mask)
    sum_z = tl.zeros([BLOCK], dtype=tl.float32)
    sum_zz = tl.zeros([BLOCK], dtype=tl.float32)
    sum_m = tl.zeros([BLOCK], dtype=tl.float32)
    sum_mm = tl.zeros([BLOCK], dtype=tl.float32)
    sum_v = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(first, last):
        x = _load(x_ptr, row * pixels + d, mask)
        grad = _load(grad_nll_ptr, row * pixels + d, mask)
        top = tl.full([BLOCK], LOWEST, dtype=tl.float32)
        joint_top = tl.full([BLOCK], LOWEST, dtype=tl.float32)
        for k in range(groups):
            i = row * groups + k
            top = _larger((_load(m_pre_ptr, i * m_group + d, mask) - m_mean) * m_scale, top)
        if GAUSSIAN:
            for k in range(groups):
                i = row * groups + k
                exponent = _exponent((_load(m_pre_ptr, i * m_group + d, mask) - m_mean) * m_scale, top)
                e = x - ((_load(z_pre_ptr, i * z_group + d, mask) - z_mean) * z_scale + bias)
                joint_top = _larger(exponent + (e * scale) * e, joint_top)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        mixture = tl.zeros([BLOCK], dtype=tl.float32)
        for k in range(groups):
            i = row * groups + k
            exponent = _exponent((_load(m_pre_ptr, i * m_group + d, mask) - m_mean) * m_scale, top)
            z = _squashed((_load(z_pre_ptr, i * z_group + d, mask) - z_mean) * z_scale + bias, GAUSSIAN)
            w = tl.exp2(exponent)
            total += w
            if GAUSSIAN:
                mixture += tl.exp2(exponent + ((x - z) * scale) * (x - z) - joint_top)
            else:
                mixture += w * z
        share = 1.0 / total
        if GAUSSIAN:
            grad_x = tl.zeros([BLOCK], dtype=tl.float32)
            joint_share = 1.0 / mixture
            sum_v += grad
        else:
            p = mixture * share
            c = _at_most(_at_least(p, LOW), HIGH)
            grad_x = grad * (tl.log(1.0 - c) - tl.log(c))
            slope = grad * ((1.0 - x) / (1.0 - c) - x / c)
            slope = tl.where((p < LOW) | (p > HIGH), 0.0, slope)
        for k in range(groups):
            i = row * groups + k
            of_m = _load(m_pre_ptr, i * m_group + d, mask) - m_mean
            of_z = _load(z_pre_ptr, i * z_group + d, mask) - z_mean
            exponent = _exponent(of_m * m_scale, top)
            z = _squashed(of_z * z_scale + bias, GAUSSIAN)
            m = tl.exp2(exponent) * share
            out_z = _load(grad_z_ptr, i * pixels + d, mask)
            if GAUSSIAN:
                e = x - z
                part = tl.exp2(exponent + (e * scale) * e - joint_top) * joint_share
                from_nll = -((grad * part) * (e * precision))
                grad_x -= from_nll
                sum_v += e * from_nll
                out_z += from_nll
                out_m = grad * (m - part)
            else:
                out_z = (slope * m + out_z) * (z * (1.0 - z))
                out_m = slope * m * (z - p)
            out_m += _load(grad_logits_ptr, i * pixels + d, mask)
            if FINISH:
                _store(to_z_ptr, i * pixels + d, z_scale * ((out_z - z_off) - of_z * z_pull), mask)
                _store(to_m_ptr, i * pixels + d, m_scale * ((out_m - m_off) - of_m * m_pull), mask)
            else:
                sum_z += out_z
                sum_zz += out_z * of_z
                sum_m += out_m
                sum_mm += out_m * of_m
        if FINISH:
            _store(to_x_ptr, row * pixels + d, grad_x, mask)
    if not FINISH:
        at = slot * 4 * pixels + d
        _store(partial_ptr, at, sum_z, mask)
        _store(partial_ptr, at + pixels, sum_zz, mask)
        _store(partial_ptr, at + 2 * pixels, sum_m, mask)
        _store(partial_ptr, at + 3 * pixels, sum_mm, mask)
        if GAUSSIAN:
            tl.store(of_variance_ptr + tl.program_id(0), tl.sum(tl.where(mask, sum_v, 0.0), axis=0))


@triton.jit
def _merge_sums_kernel(
    partial_ptr,
    stats_ptr,
    b1_ptr,
    c1_ptr,
    of_c2_ptr,
    means_ptr,
    per_seed,
    chunks,
    blocks,
    groups,
    pixels,
    BLOCK: tl.constexpr,
):
    """The gradients of b1 and c1, a program's part of that of c2, and what is taken off the gradients of a column: a
    constant and a multiple of z_pre or m_pre less its mean."""
    program = tl.program_id(0)
    seed = (program // blocks).to(tl.int64)
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = d < pixels
    count = (per_seed * groups).to(tl.float32)
    sum_z = tl.zeros([BLOCK], dtype=tl.float32)
    sum_zz = tl.zeros([BLOCK], dtype=tl.float32)
    sum_m = tl.zeros([BLOCK], dtype=tl.float32)
    sum_mm = tl.zeros([BLOCK], dtype=tl.float32)
    for chunk in range(chunks):
        at = (seed * chunks + chunk) * 4 * pixels + d
        sum_z += _load(partial_ptr, at, mask)
        sum_zz += _load(partial_ptr, at + pixels, mask)
        sum_m += _load(partial_ptr, at + 2 * pixels, mask)
        sum_mm += _load(partial_ptr, at + 3 * pixels, mask)
    at = seed * 4 * pixels + d
    z_rstd, m_rstd = _load(stats_ptr, at + pixels, mask), _load(stats_ptr, at + 3 * pixels, mask)
    _store(b1_ptr, seed * pixels + d, sum_z, mask)
    _store(c1_ptr, seed * pixels + d, sum_zz * z_rstd, mask)
    tl.store(of_c2_ptr + program, tl.sum(tl.where(mask, sum_mm * m_rstd, 0.0), axis=0))
    _store(means_ptr, at, sum_z / count, mask)
    _store(means_ptr, at + pixels, sum_zz * z_rstd * z_rstd / count, mask)
    _store(means_ptr, at + 2 * pixels, sum_m / count, mask)
    _store(means_ptr, at + 3 * pixels, sum_mm * m_rstd * m_rstd / count, mask)


def _inputs(x: Tensor, z: Tensor, m: Tensor, scalar: Tensor, gaussian: int) -> Tensor:
    out = z.new_empty((z.shape[0] * z.shape[1], 4 * z.shape[2]))
    if z.numel() > 0:
        plan = Plan(z, scalar)
        given = (t.contiguous() for t in (x, z, m, scalar))
        with torch.cuda.device_of(z):
            wrap_triton(_inputs_kernel)[plan.grid](
                *given, out, *plan.sizes, GAUSSIAN=gaussian, BLOCK=plan.block
            )
    return out


class OutputsPlan:
    """How the outputs of a shape are cut; depends on the shape alone."""

    def __init__(self, z: Tensor, seeds: int) -> None:
        rows, self.groups, self.pixels = z.shape
        self.per_seed = rows // seeds
        self.rows, self.seeds = rows, seeds
        self.block = min(COLUMNS, max(16, triton.next_power_of_2(self.pixels)))
        self.blocks = triton.cdiv(self.pixels, self.block)
        self.chunk_rows = triton.cdiv(self.per_seed, CHUNKS)
        self.chunks = triton.cdiv(self.per_seed, self.chunk_rows)
        self.merges = (seeds * self.blocks,)
        self.sums = (seeds * self.chunks * self.blocks,)
        self.shape = (self.blocks, self.groups, self.pixels)

    def partial(self, z: Tensor) -> Tensor:
        return torch.empty((self.seeds, self.chunks, 4, self.pixels), dtype=torch.float32, device=z.device)


def _even(t: Tensor) -> tuple[Tensor, int]:
    """t with neighbouring pixels neighbours, and the one stride that leads from group to group and from row to row."""
    n, k, d = t.shape
    even = (d <= 1 or t.stride(2) == 1) and (n <= 1 or k == 1 or t.stride(0) == k * t.stride(1))
    t = t if even else t.contiguous()
    return t, t.stride(0 if k == 1 else 1)  # of a single group its own may be anything


def _outputs(
    x: Tensor,
    z_pre: Tensor,
    m_pre: Tensor,
    c1: Tensor,
    b1: Tensor,
    c2: Tensor,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seeds = c2.numel()
    z, logits, nll = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (z_pre, m_pre, x))
    stats = torch.empty((seeds, 4, z.shape[2]), dtype=torch.float32, device=z.device)
    if z.numel() > 0:
        plan = OutputsPlan(z, seeds)
        (z_pre, z_stride), (m_pre, m_stride) = _even(z_pre), _even(m_pre)
        strides = (z_stride, m_stride)
        partial = plan.partial(z)
        cut = (plan.per_seed, plan.chunk_rows, plan.chunks, *plan.shape)
        given = (c1.contiguous(), b1.contiguous(), c2.contiguous())
        with torch.cuda.device_of(z):
            wrap_triton(_moments_kernel)[plan.sums](z_pre, m_pre, partial, *strides, *cut, BLOCK=plan.block)
            wrap_triton(_merge_moments_kernel)[plan.merges](
                z_pre, m_pre, partial, stats, eps, *strides, *cut, BLOCK=plan.block
            )
            wrap_triton(_outputs_kernel)[(plan.rows * plan.blocks,)](
                x.contiguous(),
                z_pre,
                m_pre,
                *given,
                c2 if variance is None else variance.contiguous(),
                stats,
                z,
                logits,
                nll,
                *strides,
                plan.per_seed,
                *plan.shape,
                GAUSSIAN=int(variance is not None),
                BLOCK=plan.block,
            )
    return z, logits, nll, stats


def _outputs_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    z_pre: Tensor,
    m_pre: Tensor,
    c1: Tensor,
    b1: Tensor,
    c2: Tensor,
    variance: Tensor | None,
    stats: Tensor,
) -> tuple[Tensor, ...]:
    to_x, to_z, to_m, to_c1, to_b1, to_c2 = _empty(x, z_pre, m_pre, c1, b1, c2)
    to_variance = () if variance is None else _empty(variance)
    if z_pre.numel() == 0:
        zeros = (torch.zeros_like(t) for t in (to_c1, to_b1, to_c2, *to_variance))
        return to_x, to_z, to_m, *zeros
    plan = OutputsPlan(z_pre, c2.numel())
    (z_pre, z_stride), (m_pre, m_stride) = _even(z_pre), _even(m_pre)
    partial, means = plan.partial(to_z), torch.empty_like(stats)
    of_c2 = torch.empty(plan.merges, dtype=torch.float32, device=c2.device)
    of_variance = torch.empty(plan.sums, dtype=torch.float32, device=c2.device)
    given = (
        *(t.contiguous() for t in (*grads, x)),
        z_pre,
        m_pre,
        *(t.contiguous() for t in (c1, b1, c2, c2 if variance is None else variance, stats)),
        means,
        partial,
        of_variance,
        to_x,
        to_z,
        to_m,
        z_stride,
        m_stride,
        plan.per_seed,
    )
    options = {"GAUSSIAN": int(variance is not None), "BLOCK": plan.block}
    with torch.cuda.device_of(to_z):
        wrap_triton(_outputs_backward_kernel)[plan.sums](
            *given, plan.chunk_rows, plan.chunks, *plan.shape, FINISH=0, **options
        )
        wrap_triton(_merge_sums_kernel)[plan.merges](
            partial,
            stats.contiguous(),
            to_b1,
            to_c1,
            of_c2,
            means,
            plan.per_seed,
            plan.chunks,
            *plan.shape,
            BLOCK=plan.block,
        )
        wrap_triton(_outputs_backward_kernel)[(plan.rows * plan.blocks,)](
            *given, 1, plan.per_seed, *plan.shape, FINISH=1, **options
        )
        if variance is not None:
            wrap_triton(_sum_kernel)[(plan.seeds,)](
                of_variance,
                variance.contiguous(),
                to_variance[0],
                of_variance.numel() // plan.seeds,
                BLOCK=SUM_BLOCK,
            )
    to_c2.copy_(of_c2.reshape(plan.seeds, plan.blocks).sum(1).reshape(c2.shape))
    return to_x, to_z, to_m, to_c1, to_b1, to_c2, *to_variance


@triton_op("ladderfast::gaussian_step_inputs_triton", mutates_args={})
def gaussian_step_inputs_triton(x: Tensor, z: Tensor, mask_logits: Tensor, variance: Tensor) -> Tensor:
    """See ladderfast.ops.gaussian_step_inputs; variance () or (S,), as in ladderfast.reference.tagger_step."""
    return _inputs(x, z, mask_logits, variance, 1)


@triton_op("ladderfast::bernoulli_step_inputs_triton", mutates_args={})
def bernoulli_step_inputs_triton(x: Tensor, z: Tensor, mask_logits: Tensor, flip_prob: Tensor) -> Tensor:
    """See ladderfast.ops.bernoulli_step_inputs."""
    return _inputs(x, z, mask_logits, flip_prob, 0)


@triton_op("ladderfast::gaussian_step_inputs_backward_triton", mutates_args={})
def gaussian_step_inputs_backward_triton(
    grad: Tensor, x: Tensor, z: Tensor, mask_logits: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z, mask_logits and variance."""
    return _gaussian_backward(_gaussian_inputs_backward_kernel, grad, x, z, mask_logits, variance)


@triton_op("ladderfast::bernoulli_step_inputs_backward_triton", mutates_args={})
def bernoulli_step_inputs_backward_triton(
    grad: Tensor, x: Tensor, z: Tensor, mask_logits: Tensor, flip_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z and mask_logits."""
    return _bernoulli_backward(_bernoulli_inputs_backward_kernel, flip_prob, grad, x, z, mask_logits)


@triton_op("ladderfast::gaussian_step_outputs_triton", mutates_args={})
def gaussian_step_outputs_triton(
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ladderfast.ops.gaussian_step_outputs; the last result are the statistics, for backward."""
    return _outputs(x, z_pre, mask_pre, z_weight, z_bias, mask_weight, variance, eps)


@triton_op("ladderfast::bernoulli_step_outputs_triton", mutates_args={})
def bernoulli_step_outputs_triton(
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ladderfast.ops.bernoulli_step_outputs."""
    return _outputs(x, z_pre, mask_pre, z_weight, z_bias, mask_weight, None, eps)


@triton_op("ladderfast::gaussian_step_outputs_backward_triton", mutates_args={})
def gaussian_step_outputs_backward_triton(
    grad_z: Tensor,
    grad_logits: Tensor,
    grad_nll: Tensor,
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    variance: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z_pre, mask_pre, z_weight, z_bias, mask_weight and variance."""
    grads = (grad_z, grad_logits, grad_nll)
    # Seven with a variance, six without, which the checker cannot count.
    return _outputs_backward(  # type: ignore[return-value]
        grads, x, z_pre, mask_pre, z_weight, z_bias, mask_weight, variance, stats
    )


@triton_op("ladderfast::bernoulli_step_outputs_backward_triton", mutates_args={})
def bernoulli_step_outputs_backward_triton(
    grad_z: Tensor,
    grad_logits: Tensor,
    grad_nll: Tensor,
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, z_pre, mask_pre, z_weight, z_bias and mask_weight."""
    grads = (grad_z, grad_logits, grad_nll)
    # As above.
    return _outputs_backward(  # type: ignore[return-value]
        grads, x, z_pre, mask_pre, z_weight, z_bias, mask_weight, None, stats
    )

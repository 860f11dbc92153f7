"""The four ops of ladderfast.ops.tagger on every backend, against float64, long double and hand-computed values."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import ladderfast
from ladderfast import _extension, ops
from ladderfast.ops import backend
from ladderfast.reference import tagger as reference
from tests.tagger_cases import spare_the_interpreter

NAMES = ("gaussian_group_inputs", "bernoulli_group_inputs", "gaussian_mixture_nll", "bernoulli_mixture_nll")
SHAPES = [
    (1, 1, 1),  # one element
    (3, 1, 5),  # one group
    (5, 4, 16),  # whole vectors
    (2, 3, 17),  # one pixel more
    (40, 2, 3),  # fewer pixels than a vector, several rows to a work item
    (3, 5, 131),  # prime everywhere
    (2, 64, 19),  # as many groups as are kept between passes
    (2, 67, 9),  # and more
    (2, 2, 2051),  # more pixels than a work item takes
]
EMPTY = [(0, 3, 4), (3, 2, 0), (0, 1, 0)]


def make(
    name: str, shape: tuple[int, int, int], *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of an op and gradients of its outputs, drawn in float64 and rounded to `dtype`."""
    n, _, d = shape
    m = torch.softmax(torch.randn(shape, dtype=torch.float64), 1)
    if name.startswith("gaussian"):
        x, z = torch.randn(n, d, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        inputs = [x, z, m, torch.tensor(0.3, dtype=torch.float64)]
    else:
        x = torch.randint(2, (n, d), dtype=torch.float64)
        inputs = [x, torch.sigmoid(2 * torch.randn(shape, dtype=torch.float64)), m]
        if name == "bernoulli_group_inputs":
            inputs.append(torch.tensor(0.2, dtype=torch.float64))
    grads = [torch.randn(shape if "inputs" in name else (n, d), dtype=torch.float64)]
    if "inputs" in name:
        grads.append(torch.randn(shape, dtype=torch.float64))
    return [t.to(dtype=dtype, device=device) for t in inputs], [
        t.to(dtype=dtype, device=device) for t in grads
    ]


def differentiable(name: str) -> int:
    """How many inputs an op makes gradients for."""
    return 4 if name.startswith("gaussian") else 3


def run(function, name: str, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients with respect to x, z, m and the variance."""
    inputs = [t.detach().requires_grad_(k < differentiable(name)) for k, t in enumerate(inputs)]
    out = function(*inputs)
    out = (out,) if isinstance(out, Tensor) else out
    found = torch.autograd.grad(out, inputs[: differentiable(name)], grads)
    return [*(t.detach() for t in out), *found]


def plain(name: str):
    """The formula as a user would write it, in the dtype of its inputs."""

    def gaussian_group_inputs(x, z, m, v):
        e = x[:, None] - z
        log_density = -e.square() / (2 * v) - 0.5 * torch.log(2 * math.pi * v)
        return e * m * torch.exp(log_density), torch.softmax(log_density, 1)

    def bernoulli_group_inputs(x, z, m, b):
        x = x[:, None]
        xi = z * (1 - 2 * b) + b
        density = x * xi + (1 - x) * (1 - xi)
        s = (xi * m).sum(1, keepdim=True).clamp(1e-4, 1 - 1e-4)
        return m / (s - 1 + x), density / density.sum(1, keepdim=True)

    def gaussian_mixture_nll(x, z, m, v):
        log_density = -(x[:, None] - z).square() / (2 * v) - 0.5 * torch.log(2 * math.pi * v)
        return -torch.logsumexp(torch.log(m) + log_density, 1)

    def bernoulli_mixture_nll(x, z, m):
        p = (m * z).sum(1).clamp(1e-4, 1 - 1e-4)
        return -x * torch.log(p) - (1 - x) * torch.log(1 - p)

    return locals()[name]


def sizes_of_terms(name: str, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Sizes of the terms that are summed on the way to each result: every minus turned into a plus.

    A rounding within a function's argument counts as often as the function magnifies it: 1 + q times for an exponential
    of -q, (1 + p) / (1 - p) times for what is divided by 1 - p.
    """
    x, z, m, *scalar = inputs
    x, g = x[:, None], grads[0].abs()
    if name == "bernoulli_mixture_nll":
        p = (m * z).sum(1).clamp(1e-4, 1 - 1e-4)
        slope = (g * (x[:, 0] / p + (1 - x[:, 0]) / (1 - p) * (1 + p) / (1 - p)))[:, None]
        logs = -torch.log(p) - torch.log(1 - p) + x[:, 0] + (1 - x[:, 0]) * (1 + p) / (1 - p)
        return [logs, g * logs, slope * m, slope * z]
    if name == "bernoulli_group_inputs":
        xi = z * (1 - 2 * scalar[0]) + scalar[0]
        s = (xi * m).sum(1, keepdim=True).clamp(1e-4, 1 - 1e-4)
        t = (s - 1 + x).abs()
        magnified = (s + 1 - x) / t
        density = x * xi + (1 - x) * (1 - xi)
        total = density.sum(1, keepdim=True)
        h = grads[1].abs()
        slope = (g * m).sum(1, keepdim=True) / t.square() * magnified
        d = (h + (density * h).sum(1, keepdim=True) / total) / total
        parts = slope[:, 0] + (d * (2 * xi + 1)).sum(1), slope * m + d, g / t * magnified + slope * xi
        return [m / t * magnified, density / total, *parts]
    e, v = x.abs() + z.abs(), scalar[0]
    q = (x - z).square() / (2 * v)
    if name == "gaussian_group_inputs":
        density = torch.exp(-q) / (2 * math.pi * v).sqrt() * (1 + q)
        likelihood, h = torch.softmax(-q, 1) * (1 + q), grads[1].abs()
        a = likelihood * (h + (likelihood * h).sum(1, keepdim=True))
        terms = g * m * density * (1 + 2 * q) + a * e / v
        grad_v = ((a * 2 * q + g * e * m * density * (1 + 2 * q)) / (2 * v)).sum()
        return [e * m * density, likelihood, terms.sum(1), terms, g * e * density, grad_v]
    share = torch.softmax(torch.log(m) - q, 1) * (1 + q)
    nll = 0.5 * torch.log(2 * math.pi * v).abs() + (share * (q + torch.log(m).abs())).sum(1)
    g = g[:, None]
    terms = g * share * e / v
    grad_v = (g * (0.5 + (share * q).sum(1, keepdim=True)) / v).sum()
    return [nll, terms.sum(1), terms, g * share / m, grad_v]


def assert_as_good_as_torch(ours: list[Tensor], name: str, inputs: list[Tensor], grads: list[Tensor]) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    The plain formula may be right by luck where there are few elements, so one rounding of the largest term that is
    summed on the way is allowed as well (four in float64, whose yardstick is rounded itself).
    """
    wide = [t.double() for t in inputs], [t.double() for t in grads]
    exact = run(getattr(reference, name), name, *wide)
    simple = run(plain(name), name, inputs, grads)
    terms = sizes_of_terms(name, *wide)
    for k, (a, b, c, d) in enumerate(zip(ours, simple, exact, terms, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == b.dtype
        if c.numel() == 0:
            continue
        rounding = torch.finfo(a.dtype).eps * d.max() * (4 if a.dtype == torch.float64 else 1)
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"{name}, result {k}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def tensors(device: str, *values, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.tensor(v, dtype=dtype, device=device) for v in values]


def test_hand_computed_gaussian(target):
    """x = 1, z = (1, 0), v = 1/2: densities 1/sqrt(pi) times (1, 1/e)."""
    x, z, m, v = tensors(target.device, [[1.0]], [[[1.0], [0.0]]], [[[0.25], [0.75]]], 0.5)
    dz, likelihood = ops.gaussian_group_inputs(x, z, m, v)
    peak = 1 / math.sqrt(math.pi)
    assert dz.flatten().tolist() == pytest.approx([0, 0.75 * peak / math.e], abs=1e-6)
    assert likelihood.flatten().tolist() == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1)], abs=1e-6)
    nll = ops.gaussian_mixture_nll(x, z, m, v)
    assert nll.item() == pytest.approx(-math.log(peak * (0.25 + 0.75 / math.e)), abs=1e-6)


def test_hand_computed_bernoulli(target):
    """z = (1, 0.5), m = (0.25, 0.75), flips 0.2: xi = (0.8, 0.5), their mixture 0.575; p = 0.625."""
    x, z, m, b = tensors(
        target.device, [[1.0, 0.0]], [[[1.0, 1.0], [0.5, 0.5]]], [[[0.25] * 2, [0.75] * 2]], 0.2
    )
    dz, likelihood = ops.bernoulli_group_inputs(x, z, m, b)
    assert dz[0, :, 0].tolist() == pytest.approx([0.25 / 0.575, 0.75 / 0.575], abs=1e-6)
    assert dz[0, :, 1].tolist() == pytest.approx([-0.25 / 0.425, -0.75 / 0.425], abs=1e-6)
    assert likelihood[0, :, 0].tolist() == pytest.approx([0.8 / 1.3, 0.5 / 1.3], abs=1e-6)
    assert likelihood[0, :, 1].tolist() == pytest.approx([0.2 / 0.7, 0.5 / 0.7], abs=1e-6)
    nll = ops.bernoulli_mixture_nll(x, z, m)
    assert nll[0].tolist() == pytest.approx([-math.log(0.625), -math.log(0.375)], abs=1e-6)


def test_the_pole_of_the_binary_case(target):
    """x = s = 1/2: the denominator would be 0 and is 5e-5, in the dtype of the inputs whatever torch's default is."""
    for dtype in target.dtypes:
        x, z, m = tensors(target.device, [[0.5]], [[[0.5], [0.5]]], [[[0.5], [0.5]]], dtype=dtype)
        expected = torch.full_like(m, 0.5 / 5e-5)
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            try:
                dz, _ = ops.bernoulli_group_inputs(x, z, m, 0.2)
            finally:
                torch.set_default_dtype(torch.float32)
            torch.testing.assert_close(dz, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_backward(name, shape):
    """The explicit backward pass is what autograd makes of the forward pass and of the plain formula."""
    inputs, grads = make(name, shape)
    ours = getattr(reference, name + "_backward")(*grads, *inputs)
    for function in (getattr(reference, name), plain(name)):
        expected = run(function, name, inputs, grads)[len(grads) :]
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(target, name, shape):
    spare_the_interpreter(target, shape[0] * shape[1] > 30)
    for dtype in target.dtypes:
        inputs, grads = make(name, shape, dtype=dtype, device=target.device)
        assert_as_good_as_torch(run(getattr(ops, name), name, inputs, grads), name, inputs, grads)


@pytest.mark.parametrize("which", ["transposed", "sliced", "expanded", "parts"])
@pytest.mark.usefixtures("poisoned")
def test_strides(target, name, which):
    inputs, grads = make(name, (6, 4, 20), dtype=torch.float32, device=target.device)
    x, z, m, *scalar = inputs
    if which == "transposed":  # neighbouring pixels are not neighbours in memory
        x, z, m, *grads = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, z, m, *grads))
    elif which == "sliced":
        x, z, m, *grads = (t[::2, ..., 1::3] for t in (x, z, m, *grads))
    elif which == "expanded":
        x, z, m = x[:1].expand(6, -1), z[:, :1].expand(-1, 4, -1), m[:1].expand(6, -1, -1)
        grads = [g.new_ones(()).expand(g.shape) for g in grads]
    else:  # as gradients of a concatenation arrive: a part of each row
        joined = torch.cat([z, m, *(g for g in grads if g.dim() == 3)], -1)
        z, m, *rest = joined.split(20, -1)
        grads = rest or grads
    inputs = [x, z, m, *scalar]
    assert_as_good_as_torch(run(getattr(ops, name), name, inputs, grads), name, inputs, grads)


@pytest.mark.usefixtures("poisoned")
def test_any_row_stride_costs_no_copy(name):
    """A part of each row is read where it lies: the op sees the very memory."""
    if _extension.module is None:
        pytest.skip(str(_extension.reason))
    inputs, _ = make(name, (6, 4, 20), dtype=torch.float32)
    z = torch.cat([inputs[1]] * 2, -1)[..., 20:]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        getattr(ops, name)(inputs[0], z, *inputs[2:])
    assert not {"aten::copy_", "aten::clone"} & {e.key for e in profile.key_averages()}


def test_gradcheck_and_gradgradcheck(name):
    """Finite differences, first and second order, through the kernels in float64."""
    for shape in ((2, 3, 2), (2, 2, 9)):
        inputs, _ = make(name, shape)
        inputs = [t.requires_grad_(k < differentiable(name)) for k, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(getattr(ops, name), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(getattr(ops, name), inputs, fast_mode=True)


@pytest.mark.usefixtures("poisoned")
def test_without_the_gradient_of_x(target, name):
    """Which is data in training: the other gradients, also the second ones and those of many seeds, are the same."""
    inputs, grads = make(name, (3, 4, 21), dtype=torch.float32, device=target.device)
    interpreted = (target.backend, target.device) == ("triton", "cpu")  # slow
    function, others = getattr(ops, name), range(1, differentiable(name))

    def first_and_second(wanted: bool) -> list[Tensor]:
        given = [t.detach().requires_grad_(k in others or (k == 0 and wanted)) for k, t in enumerate(inputs)]
        out = function(*given)
        leaves = [given[k] for k in others]
        first = torch.autograd.grad(out, leaves, grads, create_graph=True)
        if interpreted:
            return list(first)
        return [*first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)]

    for a, b in zip(first_and_second(True), first_and_second(False), strict=True):
        torch.testing.assert_close(a, b)

    if interpreted:
        return

    def loss(function):
        def total(*inputs):
            out = function(*inputs)
            return sum(t.square().sum() for t in ((out,) if isinstance(out, Tensor) else out))

        return total

    stacked = [torch.stack([t, t * 0.9]) for t in inputs]
    found, expected = (
        torch.func.vmap(torch.func.grad(loss(f), tuple(others)))(*stacked)
        for f in (function, getattr(reference, name))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_backward_keeps_only_its_inputs(target, name):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: list[Tensor] = []
    inputs, _ = make(name, (3, 4, 5), dtype=torch.float32, device=target.device)
    inputs = [t.requires_grad_(k < differentiable(name)) for k, t in enumerate(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(ops, name)(*inputs)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


@pytest.mark.parametrize("shape", [(100, 4, 784), (3, 3, 5000), (5000, 2, 7)], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, name, shape):
    """From run to run and for one and two threads."""
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    data = make(name, shape, dtype=torch.float32, device=target.device)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(run(getattr(ops, name), name, *data))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


# Numbers in long double: float64 of an exponential of -1e5 would say nothing about what is above it.
def exact_gaussian(inputs: list[Tensor], grads: list[Tensor]) -> dict[str, np.ndarray]:
    x, z, m, v = (t.cpu().double().numpy().astype(np.longdouble) for t in inputs)
    g, h = (t.cpu().double().numpy().astype(np.longdouble) for t in grads)
    e = x[:, None] - z
    q = e * e / (2 * v)
    density = np.exp(-q) / np.sqrt(2 * np.longdouble(np.pi) * v)
    w = np.exp(q.min(1, keepdims=True) - q)
    likelihood = w / w.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        y = np.log(m) - q
    top = y.max(1, keepdims=True)
    share = np.exp(y - top)
    total = share.sum(1, keepdims=True)
    nll = (np.log(2 * np.longdouble(np.pi) * v) / 2 - top - np.log(total))[:, 0]
    a = likelihood * (h - (likelihood * h).sum(1, keepdims=True))
    return {
        "dz": e * m * density,
        "likelihood": likelihood,
        "inputs_grad_z": a * e / v - g * m * density * (1 - 2 * q),
        "inputs_grad_m": g * e * density,
        "nll": nll,
        "nll_grad_z": -g[:, :1] * share / total * e / v,
        "q": q,
        "top": -top,
        "inputs_grad_z_terms": likelihood
        * (abs(h) + (likelihood * abs(h)).sum(1, keepdims=True))
        * abs(e)
        / v
        + abs(g) * m * density * (1 + 2 * q),
        # What a number that has underflowed may be multiplied with.
        "reach": (1 + abs(e) / v) * (1 + 2 * q) * (1 + 1 / np.sqrt(v)),
    }


@pytest.mark.parametrize("variance", [1e-8, 1e-3, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("groups", [1, 3, 64])
def test_gaussian_stress(target, groups, variance):
    """Log-densities from 0 down to -1e5, masks that are exactly 0 and 1: finite, and right in every row.

    An exponent q has a relative error of a few eps, so that what is made of it has one of a few q eps.
    """
    spare_the_interpreter(target, groups == 64 or variance in (1e-3, 1e4))
    n, d = 12, 9
    for dtype in target.dtypes:
        if dtype in (torch.bfloat16, torch.float16):
            continue
        scale = (2 * variance * torch.logspace(-3, 5, n, dtype=torch.float64)).sqrt()
        x = torch.rand(n, d, dtype=torch.float64) * scale[:, None]
        z = -torch.rand(n, groups, d, dtype=torch.float64) * scale[:, None, None] * 0.1
        m = torch.zeros(n, groups, d, dtype=torch.float64)
        m[:, -1] = 1  # one group owns every pixel but for those that all share
        m[:, :, ::2] = 1 / groups
        grads = [torch.randn(n, groups, d, dtype=torch.float64) for _ in range(2)]
        scalar = torch.tensor(variance, dtype=torch.float64)
        inputs = [t.to(dtype=dtype, device=target.device) for t in (x, z, m, scalar)]
        grads = [t.to(dtype=dtype, device=target.device) for t in grads]
        exact = exact_gaussian(inputs, grads)
        eps = torch.finfo(dtype).eps
        amplified = 8 * eps * (1 + exact["q"].max(1, keepdims=True).astype(np.float64))

        both = run(ops.gaussian_group_inputs, "gaussian_group_inputs", inputs, grads)
        nll = run(ops.gaussian_mixture_nll, "gaussian_mixture_nll", inputs, [grads[0][:, 0]])
        assert all(t.isfinite().all() for t in (*both, *nll))
        found = {
            "dz": both[0],
            "likelihood": both[1],
            "inputs_grad_z": both[3],
            "inputs_grad_m": both[4],
            "nll_grad_z": nll[2],
        }
        for key, value in found.items():
            true = exact[key].astype(np.float64)
            # What underflows beside a sum of powers, which may be as low as 2^-32.
            lost = 2**32 * torch.finfo(dtype).tiny * exact["reach"].astype(np.float64)
            size = np.abs(exact.get(key + "_terms", true)).astype(np.float64)
            error = np.abs(value.cpu().double().numpy() - true)
            assert (error <= amplified * size + lost).all(), f"{key}, {dtype}"
        true = exact["nll"].astype(np.float64)
        allowed = 8 * eps * (np.abs(exact["top"][:, 0]) + 10).astype(np.float64)
        assert (np.abs(nll[0].cpu().double().numpy() - true) <= allowed).all()


def test_a_mask_of_zero_may_hide_the_best_group(target):
    """The group that fits has mask 0: the other one explains the pixel, and no gradient is infinite or NaN."""
    x, z, m, v = tensors(
        target.device, [[0.0, 0.0]], [[[0.0, 0.0], [4.0, 400.0]]], [[[0.0] * 2, [1.0] * 2]], 1.0
    )
    inputs, grads = [x, z, m, v], [torch.ones_like(x)]
    nll, grad_x, grad_z, grad_m, _ = run(ops.gaussian_mixture_nll, "gaussian_mixture_nll", inputs, grads)
    offset = 0.5 * math.log(2 * math.pi)
    assert nll[0].tolist() == pytest.approx([8 + offset, 80000 + offset], rel=1e-6)
    assert all(t.isfinite().all() for t in (grad_x, grad_z, grad_m))
    assert grad_z[0, 1].tolist() == pytest.approx([4.0, 400.0], rel=1e-6)
    assert grad_z[0, 0].tolist() == [0, 0]
    assert grad_m[0, 0, 0].item() == pytest.approx(-math.exp(8), rel=1e-5)
    assert grad_m[0, 0, 1].item() < -1e37


def test_a_mask_of_zero_under_a_large_gradient(target):
    """What comes from above multiplies a gradient that is near the largest number already: it is held there, and does
    not make the others NaN."""
    x, z, m, v = tensors(target.device, [[0.0]], [[[0.0], [400.0]]], [[[0.0], [1.0]]], 1.0)
    inputs, grads = [x, z, m, v], [torch.full_like(x, 8.0)]
    _, grad_x, grad_z, grad_m, grad_v = run(ops.gaussian_mixture_nll, "gaussian_mixture_nll", inputs, grads)
    assert grad_x.item() == pytest.approx(-3200, rel=1e-6)
    assert grad_z.flatten().tolist() == pytest.approx([0, 3200], rel=1e-6)
    assert grad_v.item() == pytest.approx(4 * (1 - 160000), rel=1e-6)
    assert grad_m[0, 1].item() == pytest.approx(-8, rel=1e-6)
    assert grad_m[0, 0].item() < -1e37
    if target.backend != "reference":  # autograd is linear in what comes from above, and holds nothing
        assert grad_m.isfinite().all()


def test_the_only_group_has_a_constant_likelihood(target):
    """And of several the one that fits, where the others are far off: the exponents' rounding leaves no gradient."""
    z = torch.rand(3, 1, 50, device=target.device)
    for groups in (z, torch.cat([z, z + 9, z - 9], 1)):
        m = torch.ones_like(groups)
        x, v = 2 + torch.rand(3, 50, device=target.device), torch.tensor(1e-8, device=target.device)
        grads = [torch.zeros_like(groups), torch.randn_like(groups)]
        found = run(ops.gaussian_group_inputs, "gaussian_group_inputs", [x, groups, m, v], grads)
        assert (found[1][:, 0] == 1).all()
        assert all((t == 0).all() for t in found[2:]), [t.abs().max().item() for t in found[2:]]


@pytest.mark.parametrize("variance", [1e-6, 1e-5, 1e-4])
def test_near_ties_far_off(target, variance):
    """Two groups nearly as far from x: their exponents differ by less than they are rounded by. The likelihoods and
    all gradients are at least as near as plain PyTorch's."""
    z = torch.rand(40, 3, 100, device=target.device)
    x, m = torch.rand(40, 100, device=target.device), torch.softmax(torch.randn_like(z), 1)
    inputs = [x, z, m, torch.tensor(variance, device=target.device)]
    grads = [torch.zeros_like(z), torch.randn_like(z)]
    op = "gaussian_group_inputs"
    exact = run(plain(op), op, *([t.double() for t in given] for given in (inputs, grads)))
    theirs, ours = run(plain(op), op, inputs, grads), run(ops.gaussian_group_inputs, op, inputs, grads)
    for name, a, b, truth in zip(
        ("dz", "likelihood", "x", "z", "m", "variance"), ours, theirs, exact, strict=True
    ):
        a, b = ((t - truth).abs().max().item() for t in (a, b))
        allowed = 2 * b + 1e-6 * truth.abs().max().item()
        assert a <= allowed, f"{name}: {a} is off, plain PyTorch by {b}"


@pytest.mark.parametrize("variance", [1e-8, 1e-7, 1e-6])
def test_the_nearer_of_two_neighbouring_numbers(target, variance):
    """Reconstructions that are next to each other and far from x: of one rounded exponent, though one of them is nearer
    by so much that it is all there is. The likelihood is 1 there, and nothing is infinite or NaN."""
    n = 400
    first = -torch.linspace(8, 400, n, dtype=torch.float32).reshape(n, 1, 1)
    z = torch.cat([torch.nextafter(first, torch.tensor(-1e9)), first], 1).expand(n, 2, 40).to(target.device)
    x, m = torch.zeros(n, 40, device=target.device), torch.full_like(z, 0.5)
    v = torch.tensor(variance, device=target.device)
    for given in (z, z.flip(1)):
        inputs, grads = [x, given.contiguous(), m, v], [torch.ones_like(z), torch.randn_like(z)]
        found = run(ops.gaussian_group_inputs, "gaussian_group_inputs", inputs, grads)
        assert all(t.isfinite().all() for t in found)
        e = (x.unsqueeze(1) - given).double()
        exact = torch.softmax(-e.square() / (2 * v.double()), 1)
        if target.backend != "reference":  # plain PyTorch rounds the exponents
            torch.testing.assert_close(found[1].double(), exact, rtol=0, atol=1e-5)


def test_a_mixture_of_far_groups(target):
    """Exponents of 1e9 and more, which are rounded by hundreds: the group that explains the pixel is told by the
    distances and masks, and its gradient is that of a single group."""
    z = [[[0.0] * 3, [1.0] * 3]]
    m = [[[0.5, 1.0, 1 - 1e-7], [0.5, 1e-7, 2.6e-41]]]
    x, z, m, v = tensors(target.device, [[7.0, -7.0, 7.0]], z, m, 3e-9)
    inputs, grads = [x, z, m, v], [torch.ones_like(x)]
    found = run(ops.gaussian_mixture_nll, "gaussian_mixture_nll", inputs, grads)
    expected = [36 / 6e-9, 49 / 6e-9, 36 / 6e-9]
    assert found[0][0].tolist() == pytest.approx(expected, rel=1e-6)
    if target.backend != "reference":  # whose autograd divides by a mask that has no reciprocal
        assert all(t.isfinite().all() for t in found)
    assert found[2][0, 0, :2].tolist() == pytest.approx([0.0, 7 / 3e-9], rel=1e-5)
    assert found[2][0, 1, :2].tolist() == pytest.approx([-6 / 3e-9, 0.0], rel=1e-5)
    if target.backend != "reference":
        assert found[2][0, :, 2].tolist() == pytest.approx([0.0, -6 / 3e-9], rel=1e-5)


def test_a_variance_near_the_least_number(target):
    """Exponents near the largest number, of which the larger one still decides."""
    x, z, m, v = tensors(target.device, [[0.0]], [[[1.0], [1.5]]], [[[0.5], [0.5]]], 1e-38)
    assert ops.gaussian_group_inputs(x, z, m, v)[1].flatten().tolist() == [1, 0]
    assert ops.gaussian_mixture_nll(x, z, m, v).item() == pytest.approx(5e37, rel=1e-5)


def test_a_tiny_mask_counts(target):
    """A subnormal mask, or one below the rest by more than an exponential spans, is not rounded away."""
    x, z, m, v = tensors(
        target.device, [[0.0] * 3], [[[0.0] * 3, [30.0] * 3]], [[[1e-38, 1e-42, 2e-31], [1.0] * 3]], 1.0
    )
    nll = ops.gaussian_mixture_nll(x, z, m, v)
    expected = [0.5 * math.log(2 * math.pi) - math.log(value) for value in m[0, 0].tolist()]
    assert nll[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("flip_prob", [0.0, 0.2, 0.5, 1.0])
def test_bernoulli_stress(target, flip_prob):
    """Every combination of x, masks and reconstructions that are exactly 0 and 1: finite, and the formula away from
    its poles."""
    edge = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).t()  # x, z1, z2, m1
    x, z, m = edge[:1], edge[1:3][None], torch.stack([edge[3], 1 - edge[3]])[None]
    for dtype in target.dtypes:
        inputs = [t.to(dtype=dtype, device=target.device) for t in (x, z, m)]
        grads = [torch.ones_like(inputs[1])] * 2
        both = run(
            ops.bernoulli_group_inputs,
            "bernoulli_group_inputs",
            [*inputs, inputs[0].new_tensor(flip_prob)],
            grads,
        )
        nll = run(ops.bernoulli_mixture_nll, "bernoulli_mixture_nll", inputs, [torch.ones_like(inputs[0])])
        assert all(t.isfinite().all() for t in (*both, *nll))
        xi = z * (1 - 2 * flip_prob) + flip_prob
        s = (xi * m).sum(1, keepdim=True).clamp(1e-4, 1 - 1e-4)
        dz = m / (s - 1 + x[:, None]).double()
        torch.testing.assert_close(
            both[0].cpu().double(), dz, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6
        )
        density = x[:, None] * xi + (1 - x[:, None]) * (1 - xi)
        known = (density.sum(1, keepdim=True) > 0).expand_as(density)
        likelihood = (density / density.sum(1, keepdim=True)).to(dtype)
        torch.testing.assert_close(both[1].cpu()[known], likelihood[known])
        assert (both[1].cpu()[~known] == 0.5).all()  # no group explains the pixel: all alike
        assert (both[1].sum(1) - 1).abs().max() < 1e-2
        assert nll[0].max() == pytest.approx(-math.log(1e-4), rel=1e-2)


def test_fractional_pixels_stay_off_the_pole(target):
    """x between 0 and 1 can put the denominator of dz at 0."""
    x, z, m = tensors(target.device, [[0.5, 0.25]], [[[0.5, 0.5]]], [[[1.0, 1.0]]])
    inputs, grads = [x, z, m, x.new_tensor(0.0)], [torch.ones_like(z)] * 2
    results = run(ops.bernoulli_group_inputs, "bernoulli_group_inputs", inputs, grads)
    assert all(t.isfinite().all() for t in results)
    assert results[0].flatten().tolist() == pytest.approx([2e4, -4], rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e4, -1e4])
def test_extremes_stay_where_they_are(target, name, bad):
    """One extreme element: the other pixels get what they got without it."""
    spare_the_interpreter(target, bad in (-math.inf, 1e4, -1e4))
    inputs, grads = make(name, (3, 3, 37), dtype=torch.float32, device=target.device)
    calm = run(getattr(ops, name), name, inputs, grads)
    for tensor in inputs[:3]:
        where = (1, 4) if tensor.dim() == 2 else (1, 2, 4)
        before = tensor[where].item()
        tensor[where] = bad
        struck = run(getattr(ops, name), name, inputs, grads)
        tensor[where] = before
        for a, b in zip(struck, calm, strict=True):
            if a.dim() == 0:  # the variance gathers every pixel
                continue
            elsewhere = torch.ones_like(a, dtype=torch.bool)
            elsewhere[1, ..., 4] = False
            assert torch.equal(a[elsewhere], b[elsewhere])
        if math.isnan(bad):
            assert struck[0][1, ..., 4].isnan().any()


def test_vmap(target, name):
    """torch.func over an axis of seeds: with scalars of their own, shared ones, and nested."""
    function, exact = getattr(ops, name), getattr(reference, name)
    vmap, grad = torch.func.vmap, torch.func.grad
    singles = [make(name, (2, 3, 5), dtype=torch.float32, device=target.device)[0] for _ in range(3)]
    stacked = [torch.stack(ts) for ts in zip(*singles, strict=True)]
    if len(stacked) == 4:
        stacked[3] = stacked[3] * torch.tensor([0.5, 1.0, 2.0], device=target.device)

    def loss(function):
        def total(*inputs):
            out = function(*inputs)
            return sum(t.square().sum() for t in ((out,) if isinstance(out, Tensor) else out))

        return total

    torch.testing.assert_close(vmap(function)(*stacked), vmap(exact)(*stacked))
    some = differentiable(name)
    last = len(stacked) - 1
    interpreted = (target.backend, target.device) == ("triton", "cpu")
    for shared in [(0, last)] if interpreted else [(), (0,), (1,), (last,), (0, last)]:
        dims = tuple(None if k in shared else 0 for k in range(len(stacked)))
        args = [t[0] if k in shared else t for k, t in enumerate(stacked)]
        ours, expected = (vmap(grad(loss(f), tuple(range(some))), dims)(*args) for f in (function, exact))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    twice = [torch.stack([t, t.flip(0)]) for t in stacked]
    torch.testing.assert_close(vmap(vmap(function))(*twice), vmap(vmap(exact))(*twice))
    if not interpreted:
        ours, expected = (vmap(vmap(grad(loss(f), tuple(range(some)))))(*twice) for f in (function, exact))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_second_order_transforms(name):
    inputs, _ = make(name, (2, 2, 2))

    def hessian(function):
        def loss(m):
            out = function(*inputs[:2], m, *inputs[3:])
            return sum(t.square().sum() for t in ((out,) if isinstance(out, Tensor) else out))

        return torch.func.jacrev(torch.func.jacrev(loss))(inputs[2])

    torch.testing.assert_close(hessian(getattr(ops, name)), hessian(getattr(reference, name)))


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_opcheck(name):
    inputs, grads = make(name, (4, 3, 5), dtype=torch.float32)
    kernels = torch.ops.ladderfast
    torch.library.opcheck(getattr(kernels, name).default, inputs)
    for want_x in (True, False):
        torch.library.opcheck(getattr(kernels, name + "_backward").default, (*grads, *inputs, want_x))
    if len(inputs) == 4:
        inputs[3] = inputs[3].expand(2).clone()
        torch.library.opcheck(getattr(kernels, name + "_backward").default, (*grads, *inputs, True))
        inputs[3] = inputs[3].new_ones(3)
        with pytest.raises(RuntimeError, match="divisor of N"):
            getattr(kernels, name)(*inputs)


def test_opcheck_triton(target, name):
    if target.backend != "triton":
        pytest.skip("the Triton ops")
    from ladderfast.triton import tagger

    inputs, grads = make(name, (2, 3, 5), dtype=torch.float32, device=target.device)
    checks = ["test_schema"]
    if target.device == "cuda":  # the interpreter cannot run on fake tensors
        checks.append("test_faketensor")
    torch.library.opcheck(getattr(tagger, name + "_triton"), inputs, test_utils=checks)
    torch.library.opcheck(getattr(tagger, name + "_backward_triton"), (*grads, *inputs), test_utils=checks)


def test_compile_fullgraph(target, name):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")

    def function(x, z, *rest):
        return getattr(ops, name)(x, z * 1.5, *rest)

    compiled = torch.compile(function, fullgraph=True)
    data = make(name, (2, 3, 5), dtype=torch.float32, device=target.device)
    for a, b in zip(run(compiled, name, *data), run(function, name, *data), strict=True):
        torch.testing.assert_close(a, b)
    if len(data[0]) == 4:
        out = torch.compile(lambda x, z, m: getattr(ops, name)(x, z, m, 0.25), fullgraph=True)(*data[0][:3])
        expected = getattr(ops, name)(*data[0][:3], 0.25)
        torch.testing.assert_close(out, expected)


def test_autocast(target, name):
    """Likelihoods and costs are float32, whatever the inputs are."""
    inputs, _ = make(name, (2, 3, 5), dtype=torch.float32, device=target.device)
    rounded = [t.bfloat16() if k < 3 else t for k, t in enumerate(inputs)]
    with torch.autocast(target.device, dtype=torch.bfloat16):
        mixed = getattr(ops, name)(*rounded)
    expected = getattr(ops, name)(*(t.float() for t in rounded))
    assert (mixed if isinstance(mixed, Tensor) else mixed[1]).dtype == torch.float32
    torch.testing.assert_close(mixed, expected)


def test_half_on_the_cpu_is_the_reference_rounded_once(name):
    inputs, grads = make(name, (2, 3, 5), dtype=torch.bfloat16)
    exact = run(getattr(reference, name), name, [t.float() for t in inputs], [t.float() for t in grads])
    for a, b in zip(run(getattr(ops, name), name, inputs, grads), exact, strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=0.01, atol=0.01)
    if len(inputs) == 4:
        out = getattr(ops, name)(*inputs[:3], inputs[3].float())
        assert (out if isinstance(out, Tensor) else out[0]).dtype == torch.bfloat16


def test_a_number_serves_as_scalar(target):
    x, z, m, v = make("gaussian_group_inputs", (2, 3, 5), dtype=torch.float32, device=target.device)[0]
    for function in (ops.gaussian_group_inputs, ops.gaussian_mixture_nll):
        torch.testing.assert_close(function(x, z, m, 0.3), function(x, z, m, v))
    x, z, m, b = make("bernoulli_group_inputs", (2, 3, 5), dtype=torch.float32, device=target.device)[0]
    torch.testing.assert_close(
        ops.bernoulli_group_inputs(x, z, m, 0.2), ops.bernoulli_group_inputs(x, z, m, b)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("forced", [None, "reference"])
def test_results_are_contiguous_whatever_the_inputs_are(name, forced, dtype):
    (x, z, m, *scalar), _ = make(name, (6, 4, 20), dtype=dtype)
    x, z, m = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, z, m))
    with ladderfast.use_backend(forced) if forced else contextlib.nullcontext():
        out = getattr(ops, name)(x, z, m, *scalar)
    assert all(t.is_contiguous() for t in ((out,) if isinstance(out, Tensor) else out))


def test_numbers_under_compile():
    """They are symbols there from the second one on, whose values nobody may ask for."""
    x, z, m, _ = make("gaussian_group_inputs", (2, 3, 5), dtype=torch.float32)[0]
    compiled = torch.compile(ops.gaussian_mixture_nll, fullgraph=True, backend="eager")
    for variance in (0.25, 0.5, 0.75):
        torch.testing.assert_close(compiled(x, z, m, variance), ops.gaussian_mixture_nll(x, z, m, variance))


X, Z = torch.zeros(2, 5), torch.ones(2, 3, 5)
BAD = [
    ((X.int(), Z, Z), TypeError, r"x must be float32.*got torch.int32"),
    ((X, Z.tolist(), Z), TypeError, r"z must be a tensor; got list"),
    ((X, Z, Z.double()), TypeError, r"m must have the dtype of z, torch.float32; got torch.float64"),
    ((X.double(), Z, Z), TypeError, r"x must have the dtype of z, torch.float32; got torch.float64"),
    ((X, Z, Z[:1]), ValueError, r"m must have the shape of z, \(2, 3, 5\); got \(1, 3, 5\)"),
    ((X, X, X), ValueError, r"z must have shape \(N, K, D\).*got \(2, 5\)"),
    ((X, Z[:, :0], Z[:, :0]), ValueError, r"z must .*at least one group; got \(2, 0, 5\)"),
    ((X[:1], Z, Z), ValueError, r"x must have shape \(2, 5\) for z of shape \(2, 3, 5\); got \(1, 5\)"),
    ((X, Z, Z.to("meta")), ValueError, r"m must be on the device of z, cpu; got meta"),
]
BAD_SCALARS = [
    (torch.ones(3), ValueError, r"must have no axes, shape \(\); got \(3,\)"),
    (
        torch.tensor(0.5).double(),
        TypeError,
        r"must be torch.float32 for z of torch.float32; got torch.float64",
    ),
    (torch.tensor(1), TypeError, r"must be float32, float64, bfloat16 or float16; got torch.int64"),
    ("0.5", TypeError, r"must be a number or a tensor; got str"),
    (
        torch.tensor(0.5).to_sparse(),
        TypeError,
        r"must be a dense tensor; got one with layout torch.sparse_coo",
    ),
    (torch.tensor(0.5, device="meta"), ValueError, r"must be on the device of z, cpu; got meta"),
]
BAD_VALUES = (
    [
        (("gaussian_group_inputs", "gaussian_mixture_nll"), value, "variance must be above 0 and finite; got")
        for value in (
            0,
            -1.0,
            math.inf,
            math.nan,
            torch.tensor(0.0),
            torch.tensor(-2.0),
            torch.nn.Parameter(-X[0, 0]),
        )
    ]
    + [
        (
            ("gaussian_group_inputs", "gaussian_mixture_nll"),
            1e-46,
            "variance must be above 0 and finite as torch.float32; got 1e-46",
        ),
    ]
    + [
        (("bernoulli_group_inputs",), value, r"flip_prob must lie in \[0, 1\]; got")
        for value in (-0.1, 1.5, 1 + 1e-9, -1e-46, math.nan, torch.tensor(2.0))
    ]
)


def backends():
    for which in ("reference", "cpu"):
        if backend.unavailable(which, "cpu", torch.float32) is None:
            with ladderfast.use_backend(which):
                yield which


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_errors_name_the_argument(name, arguments, error, message):
    scalar = () if name == "bernoulli_mixture_nll" else (0.5,)
    for _ in backends():
        with pytest.raises(error, match=f"{name}: {message}"):
            getattr(ops, name)(*arguments, *scalar)


@pytest.mark.parametrize(("scalar", "error", "message"), BAD_SCALARS, ids=[b[2] for b in BAD_SCALARS])
def test_scalar_errors(scalar, error, message):
    for function in (ops.gaussian_group_inputs, ops.gaussian_mixture_nll):
        for _ in backends():
            with pytest.raises(error, match=f"{function.__name__}: variance {message}"):
                function(X, Z, Z, scalar)
    for _ in backends():
        with pytest.raises(error, match=f"bernoulli_group_inputs: flip_prob {message}"):
            ops.bernoulli_group_inputs(X, Z, Z, scalar)


@pytest.mark.parametrize(("names", "value", "message"), BAD_VALUES, ids=lambda v: str(v).replace("\n", ""))
def test_wrong_values(names, value, message):
    for name in names:
        for _ in backends():
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                getattr(ops, name)(X, Z, Z, value)


def test_flip_prob_is_a_constant():
    with pytest.raises(ValueError, match="flip_prob is a constant; got a tensor that requires a gradient"):
        ops.bernoulli_group_inputs(X, Z, Z, torch.tensor(0.2, requires_grad=True))


def test_meta_tensors_have_shapes():
    x, z = X.to("meta"), Z.to("meta")
    assert ops.gaussian_group_inputs(x, z, z, 0.5)[1].shape == (2, 3, 5)
    assert ops.bernoulli_mixture_nll(x, z, z).shape == (2, 5)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    """One binary: each instruction set up to this machine's gives the reference's values, and holds at extremes."""
    code = (
        "import torch, ladderfast._C as c\n"
        "from tests.conftest import TARGETS\n"
        "from tests.ops.test_tagger import *\n"
        "torch.manual_seed(0)\n"
        "for name in NAMES:\n"
        "    for shape in SHAPES:\n"
        "        for dtype in (torch.float32, torch.float64):\n"
        "            inputs, grads = make(name, shape, dtype=dtype)\n"
        "            assert_as_good_as_torch(run(getattr(ops, name), name, inputs, grads), name, inputs, grads)\n"
        "for variance in (1e-8, 1.0, 1e8):\n"
        "    test_gaussian_stress(TARGETS[1], 3, variance)\n"
        "test_a_mask_of_zero_may_hide_the_best_group(TARGETS[1])\n"
        "test_a_tiny_mask_counts(TARGETS[1])\n"
        "for name in NAMES:\n"
        "    test_extremes_stay_where_they_are(TARGETS[1], name, math.nan)\n"
        "print(c.instruction_set())\n"
    )
    env = {**os.environ, "LADDERFAST_ISA": isa, "LADDERFAST_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    best = _extension.module.instruction_set()  # of this process: the machine's own
    order = ["baseline", "avx2", "avx512"]
    assert done.stdout.strip() == order[min(order.index(isa), order.index(best))]

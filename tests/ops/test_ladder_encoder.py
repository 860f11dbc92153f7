"""ladderfast.ops.ladder_encoder on every backend, against the float64 reference and hand-computed values."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, ladder_encoder
from ladderfast.reference import ladder_encoder as reference

MORE_ON_CPU = (torch.bfloat16,)
# shape, num_labelled, num_clean
CASES = [
    ((5, 3), 2, 1),  # fewer channels than a vector, a part of one row
    ((1, 1), 1, 0),  # one element
    ((300, 10), 100, 100),  # rows are taken together, and the last of a part is short
    ((37, 1), 11, 13),  # one channel, parts of prime numbers of rows
    ((9, 1023), 3, 3),  # two blocks of columns, stretches that begin anywhere in a counter
    ((140, 515), 71, 3),  # several chunks, more than one part has
    ((6, 3, 5), 2, 2),  # a short inner axis
    ((7, 2, 63), 3, 0),  # the longest inner axis that still goes by columns
    ((6, 3, 8, 8), 2, 2),  # the shortest that goes by runs
    ((9, 5, 7, 11), 3, 3),  # prime everywhere
    ((6, 3, 4, 4, 5), 2, 2),  # three spatial axes
]
LONG = [
    ((3, 2, 20011), 1, 1),
    ((200, 2, 67), 70, 0),
    ((1031, 130), 30, 400),
]  # segments of a run, many partial sums
EMPTY = [((0, 4), 0, 0), ((4, 0), 2, 1), ((6, 4, 0), 2, 1), ((0, 0), 0, 0)]
ACTIVATIONS = ("identity", "relu", "leaky_relu")
OUTPUTS = ("z", "h", "mean", "var", "grad_z_pre", "grad_beta", "grad_gamma")
NOISE = torch.tensor([1234567, 89])


class Data:
    """Inputs of a call and gradients of its four outputs, drawn in float64 and rounded to `dtype`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_labelled: int,
        num_clean: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        channels = shape[1]
        parts = 3 if num_clean else 2
        self.inputs: list[Tensor] = [torch.randn(s, dtype=torch.float64) for s in (shape, channels, channels)]
        self.grads: list[Tensor] = [
            torch.randn(s, dtype=torch.float64) for s in (shape, shape, (parts, channels), (parts, channels))
        ]
        self.inputs, self.grads = ([t.to(device, dtype) for t in ts] for ts in (self.inputs, self.grads))
        if dtype in (torch.bfloat16, torch.float16):
            self.grads[2:] = [t.float() for t in self.grads[2:]]
        self.num_labelled, self.num_clean, self.options = num_labelled, num_clean, options
        self.options.setdefault("noise_state", NOISE.to(device) if options.get("noise_std") else None)
        self.spare_the_kink()

    def spare_the_kink(self) -> None:
        """No gradient reaches h where rounding may decide on which side of the activation's kink it is."""
        _, h, _, _ = reference.ladder_encoder(
            self.inputs[0].double(),
            self.num_labelled,
            num_clean=self.num_clean,
            beta=self.inputs[1].double(),
            gamma=self.inputs[2].double(),
            **{**self.options, "activation": "identity"},
        )
        self.grads[1] = self.grads[1] * (
            h.abs() > (1e-4 if self.grads[2].dtype == self.grads[1].dtype else 0.05)
        )

    def call(self, function, *inputs: Tensor, **more: Any):
        z_pre, beta, gamma = inputs or self.inputs
        return function(
            z_pre,
            self.num_labelled,
            num_clean=self.num_clean,
            beta=beta,
            gamma=gamma,
            **{**self.options, **more},
        )

    def run(self, function) -> list[Tensor]:
        """z, h, mean, var and the gradients with respect to z_pre, beta and gamma."""
        inputs = [t.detach().clone().requires_grad_() for t in self.inputs]
        out = self.call(function, *inputs)
        return [*(t.detach() for t in out), *torch.autograd.grad(out, inputs, self.grads)]

    def wide(self) -> Data:
        other = object.__new__(Data)
        other.__dict__.update(self.__dict__)
        other.inputs, other.grads = ([t.double() for t in ts] for ts in (self.inputs, self.grads))
        return other

    def sizes(self) -> list[int]:
        n = len(self.inputs[0])
        sizes = [self.num_labelled, n - self.num_labelled - self.num_clean, self.num_clean]
        return sizes if self.num_clean else sizes[:2]


def plain_formula(
    z_pre,
    num_labelled,
    *,
    num_clean=0,
    beta,
    gamma,
    noise_std=0.0,
    noise_state=None,
    noise_stream=0,
    **options,
):
    """As a user would write it, in the dtype of the inputs, on the same noise."""
    axes = [0, *range(2, z_pre.dim())]
    shape = (-1, *[1] * (z_pre.dim() - 2))
    sizes = [num_labelled, len(z_pre) - num_labelled - num_clean, num_clean]
    wide = torch.float32 if z_pre.dtype in (torch.bfloat16, torch.float16) else z_pre.dtype
    parts, means, variances = [], [], []
    for part in z_pre.to(wide).split(sizes if num_clean else sizes[:2]):
        if part.numel():
            var, mean = torch.var_mean(part, axes, correction=0)
        else:
            var = mean = part.sum(axes)
        normal = (part - mean.reshape(shape)) * torch.rsqrt(var + options.get("eps", 1e-10)).reshape(shape)
        parts.append(normal.to(z_pre.dtype))
        means.append(mean)
        variances.append(var)
    z = torch.cat(parts)
    if noise_std:
        noise = reference.noise_like(z_pre, noise_state, noise_stream)
        noise[len(z_pre) - num_clean :] = 0
        z = z + (noise_std * noise).to(z.dtype)
    h = (z + beta.reshape(shape)) * gamma.reshape(shape)
    if options["activation"] == "relu":
        h = torch.relu(h)
    elif options["activation"] == "leaky_relu":
        h = torch.nn.functional.leaky_relu(h, options.get("negative_slope", 0.1))
    return z, h, torch.stack(means), torch.stack(variances)


def term_sizes(data: Data, exact: list[Tensor]) -> list[float]:
    """The largest sum of absolute values of what is added up for each output."""
    x, beta, gamma = (t.abs() for t in data.inputs)
    grad_z, grad_h, grad_mean, grad_var = (t.abs() for t in data.grads)
    z, _, mean, var = exact[:4]
    noise = data.options.get("noise_std", 0.0) * 6
    wide, over = [1] * (x.dim() - 2), (1, -1)
    beta, gamma = (t.reshape(*over, *wide) for t in (beta, gamma))
    g = grad_z + grad_h * gamma
    axes = [0, *range(2, x.dim())]
    rstd = (var + data.options.get("eps", 1e-10)).rsqrt()
    sizes = dict.fromkeys(OUTPUTS, 0.0)

    def at_least(name: str, terms: Tensor) -> None:
        sizes[name] = max(sizes[name], float(terms.max()) if terms.numel() else 0.0)

    start = 0
    for p, size in enumerate(data.sizes()):
        rows = slice(start, start + size)
        start += size
        if size == 0 or x.numel() == 0:
            continue
        n = x[rows].numel() / x.shape[1]
        m, s = (t[p].reshape(*over, *wide) for t in (mean, rstd))
        spread = x[rows] + m.abs()
        at_least("z", spread * s + noise)
        at_least("h", (spread * s + noise + beta) * gamma)
        at_least("mean", x[rows])
        at_least("var", spread.square().mean(axes))
        normal = (data.inputs[0][rows] - m).abs() * s
        reaching = g[rows] + g[rows].mean(axes, True) + normal * (g[rows] * normal).mean(axes, True)
        statistics = grad_mean[p] + 2 * grad_var[p] * spread.amax(axes)
        at_least("grad_z_pre", s * reaching + statistics.reshape(*over, *wide) / n)
    at_least("grad_beta", (grad_h * gamma).sum(axes))
    at_least("grad_gamma", (grad_h * (z.abs() + noise + beta)).sum(axes))
    return list(sizes.values())


def assert_as_good_as_torch(ours: list[Tensor], data: Data) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    The plain formula may be right by luck where there are few elements, so one rounding of the largest sum of terms is
    allowed as well (four in float64, whose yardstick is rounded itself). The noise is float32 everywhere and may differ
    by a few units in its last place. Triton's interpreter adds up one after the other, where a GPU adds up in a tree:
    there four roundings are allowed.
    """
    in_order = backend.triton_interpreted() and backend._forced == "triton"
    wide = data.wide()
    exact, plain = wide.run(reference.ladder_encoder), data.run(plain_formula)
    terms = term_sizes(wide, exact)
    for name, a, b, c, size in zip(OUTPUTS, ours, plain, exact, terms, strict=True):
        assert a.shape == c.shape, name
        assert a.dtype == b.dtype, name
        if c.numel() == 0:
            continue
        rounding = torch.finfo(a.dtype).eps * size * (4 if a.dtype == torch.float64 or in_order else 1)
        if a.dtype == torch.float64 and data.options.get("noise_std"):
            rounding += torch.finfo(torch.float32).eps * size
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_hand_computed(target):
    """1 and 3: mean 2, variance 1. 5 alone: variance 0. relu(2 (z + 1/2))."""
    z_pre = torch.tensor([[1.0], [3.0], [5.0]], device=target.device)
    beta, gamma = torch.tensor([0.5], device=target.device), torch.tensor([2.0], device=target.device)
    out = ladder_encoder(z_pre, 2, beta=beta, gamma=gamma, activation="relu")
    assert out.z.flatten().tolist() == pytest.approx([-1, 1, 0], abs=1e-6)
    assert out.h.flatten().tolist() == pytest.approx([0, 3, 1], abs=1e-6)
    assert out.mean.tolist() == [[2], [5]]
    assert out.var.tolist() == [[1], [0]]
    leaky = ladder_encoder(z_pre, 2, beta=beta, gamma=gamma, activation="leaky_relu", negative_slope=0.25)
    assert leaky.h.flatten().tolist() == pytest.approx([-0.25, 3, 1], abs=1e-6)


def test_gradient_by_hand(target):
    """Of h = relu(z) on 1 and 3 with eps 0, where z = -1 and 1 whatever the two values: 0, and 1/n through the mean,
    2 (x - mean) / n through the variance."""
    z_pre = torch.tensor([[1.0], [3.0]], device=target.device, requires_grad=True)
    out = ladder_encoder(z_pre, 2, activation="relu", eps=0.0)
    assert torch.autograd.grad(out.h.sum(), z_pre)[0].abs().max() < 1e-6
    out = ladder_encoder(z_pre, 2, activation="relu", eps=0.0)
    grad = torch.autograd.grad(out.mean[0].sum() + 3 * out.var[0].sum(), z_pre)[0]
    assert grad.flatten().tolist() == pytest.approx([0.5 - 3, 0.5 + 3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "num_labelled", "num_clean"), CASES + EMPTY, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(target, shape, num_labelled, num_clean, activation):
    for dtype in target.dtypes:
        data = Data(
            shape,
            num_labelled,
            num_clean,
            dtype=dtype,
            device=target.device,
            noise_std=0.3,
            noise_stream=5,
            activation=activation,
        )
        assert_as_good_as_torch(data.run(ladder_encoder), data)


@pytest.mark.parametrize(("shape", "num_labelled", "num_clean"), CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_without_noise(target, shape, num_labelled, num_clean):
    for dtype in target.dtypes:
        data = Data(shape, num_labelled, num_clean, dtype=dtype, device=target.device, activation="relu")
        assert_as_good_as_torch(data.run(ladder_encoder), data)


@pytest.mark.parametrize(("shape", "num_labelled", "num_clean"), LONG, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_long_sums(target, shape, num_labelled, num_clean):
    data = Data(
        shape,
        num_labelled,
        num_clean,
        dtype=torch.float32,
        device=target.device,
        noise_std=0.3,
        activation="relu",
    )
    assert_as_good_as_torch(data.run(ladder_encoder), data)


@pytest.mark.parametrize("num_labelled", [0, 1, 5, 6])
@pytest.mark.parametrize("num_clean", [0, 1, 6])
@pytest.mark.parametrize("shape", [(6, 20), (6, 3, 9, 9)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_parts_of_no_and_one_row(target, shape, num_labelled, num_clean):
    if num_labelled + num_clean > 6:
        pytest.skip("more rows than there are")
    data = Data(
        shape,
        num_labelled,
        num_clean,
        dtype=torch.float32,
        device=target.device,
        noise_std=0.3,
        activation="leaky_relu",
    )
    ours = data.run(ladder_encoder)
    assert_as_good_as_torch(ours, data)
    for size, mean, var in zip(data.sizes(), ours[2], ours[3], strict=True):
        if size == 0:
            assert not mean.any()
            assert not var.any()


@pytest.mark.parametrize("given", [(), ("beta",), ("gamma",)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("shape", [(12, 20), (6, 3, 9, 9)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_without_beta_or_gamma(target, shape, activation, given):
    """As with a beta of 0 or a gamma of 1; and h is z, the same tensor, where there is neither, nor an activation."""
    data = Data(shape, 2, 2, dtype=torch.float32, device=target.device, noise_std=0.3, activation=activation)
    data.inputs[1:] = [
        t if name in given else t.new_full(t.shape, fill)
        for name, t, fill in zip(("beta", "gamma"), data.inputs[1:], (0.0, 1.0), strict=True)
    ]
    data.spare_the_kink()
    names = [name in given for name in ("beta", "gamma")]

    def function(z_pre, num_labelled, *, beta, gamma, **options):
        beta, gamma = (t if n else None for t, n in zip((beta, gamma), names, strict=True))
        return ladder_encoder(z_pre, num_labelled, beta=beta, gamma=gamma, **options)

    inputs = [t.clone().requires_grad_() for t in data.inputs]
    out = data.call(function, *inputs)
    expected = data.run(ladder_encoder)
    wanted = [True, *names]
    grads = torch.autograd.grad(out, [t for t, w in zip(inputs, wanted, strict=True) if w], data.grads)
    full = [e for e, w in zip(expected[4:], wanted, strict=True) if w]
    for a, b in zip((*out, *grads), (*expected[:4], *full), strict=True):
        torch.testing.assert_close(a, b)
    assert (out.h is out.z) == (not given and activation == "identity")


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(12, 20), (6, 3, 9, 9)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_gradients_of_some_outputs(target, shape, which):
    """What does not reach the loss is skipped, and counts as zero."""
    for activation in ("identity", "relu"):
        data = Data(
            shape, 4, 1, dtype=torch.float32, device=target.device, noise_std=0.3, activation=activation
        )
        data.grads = [g if i in which else torch.zeros_like(g) for i, g in enumerate(data.grads)]
        inputs = [t.clone().requires_grad_() for t in data.inputs]
        out = data.call(ladder_encoder, *inputs)
        ours = torch.autograd.grad(
            [out[i] for i in which], inputs, [data.grads[i] for i in which], materialize_grads=True
        )
        assert_as_good_as_torch([*(t.detach() for t in out), *ours], data)


def test_without_z(target):
    data = Data((12, 20), 4, 4, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu")
    data.grads[0].zero_()
    inputs = [t.clone().requires_grad_() for t in data.inputs]
    out = data.call(ladder_encoder, *inputs, want_z=False)
    assert out.z is None
    expected = data.run(ladder_encoder)
    grads = torch.autograd.grad(out[1:], inputs, data.grads[1:])
    for a, b in zip((*out[1:], *grads), expected[1:], strict=True):
        torch.testing.assert_close(a, b)
    alone = ladder_encoder(inputs[0], 4, want_z=False)  # h is z, which is not to be seen
    assert alone.z is None
    torch.testing.assert_close(alone.h, ladder_encoder(inputs[0], 4).z)


@pytest.mark.parametrize("which", ["channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.usefixtures("poisoned")
def test_strides(target, which):
    data = Data(
        (6, 6, 9, 8), 2, 2, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu"
    )
    z_pre, beta, gamma = data.inputs
    if which == "channels_last":
        z_pre = z_pre.contiguous(memory_format=torch.channels_last)  # the gradients stay contiguous
    elif which == "transposed":
        z_pre = z_pre.transpose(0, 1)
        data.grads[:2] = [g.transpose(0, 1) for g in data.grads[:2]]
    elif which == "sliced":
        z_pre, beta, gamma = z_pre[:, ::2, 1:, ::3], beta[::2], gamma[::2]
        data.grads = [*[g[:, ::2, 1:, ::3] for g in data.grads[:2]], *[g[:, ::2] for g in data.grads[2:]]]
    else:
        beta = beta[:1].expand(6)
        data.grads[0] = z_pre.new_ones(()).expand(z_pre.shape)
        data.grads[2] = z_pre.new_ones(()).expand(3, 6)
    data.inputs = [z_pre, beta, gamma]
    data.spare_the_kink()
    inputs = [t.detach().requires_grad_() for t in data.inputs]
    out = data.call(ladder_encoder, *inputs)
    ours = [*(t.detach() for t in out), *torch.autograd.grad(out, inputs, data.grads)]
    assert_as_good_as_torch(ours, data)
    if which == "channels_last":
        assert out.h.is_contiguous(memory_format=torch.channels_last)


def test_large_mean(target):
    """Mean 1e4 and variance 1e-2 in float32: the variance keeps its digits."""
    for shape in ((200, 40), (20, 3, 9, 9)):
        x = (1e4 + 0.1 * torch.randn(shape, dtype=torch.float64)).float().to(target.device)
        out = ladder_encoder(x, shape[0] // 3)
        for part, mean, var in zip(x.double().tensor_split([shape[0] // 3]), out.mean, out.var, strict=True):
            axes = [0, *range(2, x.dim())]
            torch.testing.assert_close(mean.double(), part.mean(axes), rtol=2**-23, atol=0)
            torch.testing.assert_close(var.double(), part.var(axes, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
@pytest.mark.parametrize("shape", [(150, 20), (6, 3, 9, 9)], ids=str)
def test_constant_columns(target, shape, value):
    """Variance 0 exactly, the mean exactly, everything finite, gradients too."""
    data = Data(shape, 2, 0, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu")
    data.inputs[0][:, 1] = value
    out = data.run(ladder_encoder)
    assert out[2][:, 1].tolist() == [torch.tensor(value).item()] * 2
    assert out[3][:, 1].tolist() == [0, 0]
    assert all(t.isfinite().all() for t in out)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e19, -1e30])
@pytest.mark.parametrize("shape", [(200, 20), (9, 3, 9, 9)], ids=str)
def test_extremes_stay_where_they_are(target, shape, bad):
    """One extreme element: other channels and other parts get what they got without it."""
    data = Data(shape, 3, 3, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu")
    calm = data.run(ladder_encoder)
    data.inputs[0][(1, 2, *[1] * (len(shape) - 2))] = bad
    struck = data.run(ladder_encoder)
    for i in (0, 1, 4):
        a, b = struck[i], calm[i]
        assert torch.equal(a[3:], b[3:])
        assert torch.equal(a[:, :2], b[:, :2])
        assert torch.equal(a[:, 3:], b[:, 3:])
    for a, b in zip(struck[2:4], calm[2:4], strict=True):
        assert torch.equal(a[1:], b[1:])
        assert torch.equal(a[:, :2], b[:, :2])
    for a, b in zip(struck[5:], calm[5:], strict=True):
        assert torch.equal(a[:2], b[:2])
        assert torch.equal(a[3:], b[3:])
    if math.isnan(bad):
        assert struck[1][1, 2].isnan().any()  # the activation hides none


def test_gradcheck_and_gradgradcheck():
    """Finite differences, first and second order, through the kernels in float64."""
    for shape in ((7, 3), (5, 2, 9, 8)):
        for activation in ACTIVATIONS:
            data = Data(shape, 2, 2, noise_std=0.3, activation=activation, eps=1e-3)
            inputs = [t.requires_grad_() for t in data.inputs]

            def function(*inputs, data=data):
                return tuple(data.call(ladder_encoder, *inputs))

            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_third_derivative(target):
    if torch.float64 not in target.dtypes:
        pytest.skip("float64")
    data = Data((6, 3), 2, 2, device=target.device, noise_std=0.3, activation="leaky_relu", eps=1e-2)

    def third(function):
        x = data.inputs[0].clone().requires_grad_()
        out = data.call(function, x, *data.inputs[1:])
        total = out[0].pow(3).sum() + out[1].pow(3).sum() + (out[2] * out[3]).sum()
        first = torch.autograd.grad(total, x, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(second.pow(2).sum(), x)[0]

    torch.testing.assert_close(third(ladder_encoder), third(reference.ladder_encoder), rtol=1e-5, atol=1e-5)


def test_backward_keeps_only_inputs_and_statistics(target):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: list[Tensor] = []
    data = Data((8, 3), 3, 2, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu")
    inputs = [t.requires_grad_() for t in data.inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = data.call(ladder_encoder)
    expected = [*inputs, data.options["noise_state"], out.mean, out.var]
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in expected}


@pytest.mark.parametrize("shape", [(300, 1000), (4096, 64), (130, 3, 40, 40), (500, 10)], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, shape):
    """From run to run and for one and two threads."""
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    data = Data(shape, 100, 20, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu")
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(data.run(ladder_encoder))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def seeds_of(data: Data, count: int) -> tuple[list[Tensor], Tensor]:
    """Inputs and states of several seeds."""
    inputs = [torch.stack([t + 0.1 * i * torch.randn_like(t) for i in range(count)]) for t in data.inputs]
    states = torch.stack([torch.tensor([i, 10 * i]) for i in range(count)]).to(inputs[0].device)
    return inputs, states


@pytest.mark.parametrize("shape", [(7, 5), (7, 2, 4, 4)], ids=str)
def test_vmap(target, shape):
    """torch.func over an axis of seeds, with parameters and noise of their own, shared ones, and nested."""
    data = Data(shape, 3, 2, dtype=torch.float32, device=target.device, activation="relu")
    inputs, states = seeds_of(data, 3)

    def function(z_pre, beta, gamma, state):
        return tuple(data.call(ladder_encoder, z_pre, beta, gamma, noise_std=0.3, noise_state=state))

    def loss(*args):
        return sum(t.square().sum() for t in function(*args))

    gradient = torch.func.grad(loss, (0, 1, 2))
    for dims in ((0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None), (0, 0, None, None)):
        args = [t if d == 0 else t[0] for t, d in zip((*inputs, states), dims, strict=True)]
        for f in (function, gradient):
            together = torch.func.vmap(f, dims)(*args)
            for seed in range(3):
                alone = f(*[t if d is None else t[seed] for t, d in zip(args, dims, strict=True)])
                for a, b in zip(together, alone, strict=True):
                    torch.testing.assert_close(a[seed], b, rtol=1e-4, atol=1e-5)
    twice = [torch.stack([t, t]) for t in (*inputs, states)]
    for f in (function, gradient):
        once = torch.func.vmap(f)(*inputs, states)
        for a, b in zip(torch.func.vmap(torch.func.vmap(f))(*twice), once, strict=True):
            torch.testing.assert_close(a, torch.stack([b, b]))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_vmap_counts_the_noise_of_images_with_the_channels_last_as_without(target, gaps, nested):
    """Where the seeds share them or leave gaps in memory, so that they have to be copied."""
    shared = torch.randn(5, 3, 2, 4, device=target.device).to(memory_format=torch.channels_last)
    apart = torch.randn(6, 5, 2, 4, 3, device=target.device).movedim(-1, 2)[::2]
    states = torch.tensor([[i, 10 * i] for i in range(3)], device=target.device)

    def function(x, state):
        return ladder_encoder(x, 2, noise_std=0.3, noise_state=state, activation="relu").h

    def gradient(x, state):
        return torch.func.grad(lambda x: function(x, state).square().sum())(x)

    for f in (function, gradient):
        over_seeds = torch.func.vmap(f, (0 if gaps else None, 0))
        x = apart if gaps else shared
        together = (
            torch.func.vmap(over_seeds, (None, 0))(x, states[None])[0] if nested else over_seeds(x, states)
        )
        for seed, state in enumerate(states):
            alone = f(x[seed] if gaps else x, state)
            torch.testing.assert_close(together[seed], alone, rtol=1e-4, atol=1e-5)


def test_vmap_without_parameters_and_z(target):
    z_pre = torch.randn(3, 6, 4, device=target.device)
    together = torch.func.vmap(lambda x: tuple(ladder_encoder(x, 2))[2:])(z_pre)
    h = torch.func.vmap(lambda x: ladder_encoder(x, 2, want_z=False, activation="relu").h, 1)(
        z_pre.transpose(0, 1)
    )
    for seed in range(3):
        alone = ladder_encoder(z_pre[seed], 2, activation="relu")
        torch.testing.assert_close(h[seed], alone.h)
        for a, b in zip(together, alone[2:], strict=True):
            torch.testing.assert_close(a[seed], b)


def test_second_order_transforms():
    data = Data((6, 3), 2, 2, noise_std=0.3, activation="leaky_relu", eps=1e-2)

    def hessian(function):
        def loss(z_pre):
            out = data.call(function, z_pre, *data.inputs[1:])
            return out[1].square().sum() + (out[0].square() * out[1]).sum() + out[3].sum()

        return torch.func.jacrev(torch.func.jacrev(loss))(data.inputs[0])

    torch.testing.assert_close(
        hessian(ladder_encoder), hessian(reference.ladder_encoder), rtol=1e-5, atol=1e-5
    )


def test_second_order_over_seeds(target):
    data = Data((5, 3), 2, 1, dtype=torch.float32, device=target.device, activation="leaky_relu", eps=0.1)
    inputs, states = seeds_of(data, 2)

    def loss(z_pre, beta, gamma, state):
        out = data.call(ladder_encoder, z_pre, beta, gamma, noise_std=0.3, noise_state=state)
        return out.h.pow(3).sum() + out.var.square().sum()

    def second(*args):
        gradient = torch.func.grad(loss)
        return torch.func.grad(lambda *inner: gradient(*inner).square().sum(), (0, 1, 2))(*args)

    together = torch.func.vmap(second)(*inputs, states)
    for seed in range(2):
        for a, b in zip(together, second(*[t[seed] for t in (*inputs, states)]), strict=True):
            torch.testing.assert_close(a[seed], b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_opcheck():
    ops = torch.ops.ladderfast
    for seeds in (False, True):
        lead = (2,) if seeds else ()
        z_pre, beta = torch.randn(*lead, 6, 3), torch.randn(*lead, 3)
        state = torch.ones(*lead, 2, dtype=torch.int64)
        for b, g, want_z, want_h in (
            (beta, None, True, True),
            (None, beta, False, True),
            (beta, beta, True, False),
        ):
            options = (2, 1, 0.3, 0, 1, 0.1, 1e-10)
            arguments = (z_pre, b, g, state, *options, want_z, want_h, seeds)
            torch.library.opcheck(ops.ladder_encoder.default, arguments)
            _, _, mean, var = ops.ladder_encoder(*arguments)
            grads = (torch.randn_like(z_pre), None, mean, None)
            arguments = (*grads, z_pre, mean, var, b, g, state, *options, seeds)
            torch.library.opcheck(ops.ladder_encoder_backward.default, arguments)
    with pytest.raises(RuntimeError, match="contiguous or channels-last"):
        ops.ladder_encoder(torch.randn(6, 8)[:, ::2], None, None, None, *options, True, True, False)


def test_compile_fullgraph(target):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")
    data = Data((8, 3), 3, 2, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu")

    def function(z_pre, *args, **options):
        z, h, mean, var = ladder_encoder(z_pre * 2, *args, **options)
        return z + 1, h, mean, var

    for a, b in zip(data.run(torch.compile(function, fullgraph=True)), data.run(function), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("compiler", "activation", "result"),
    [("aot_eager", "relu", "h"), ("inductor", "relu", "h"), ("aot_eager", "identity", "mean")],
)
def test_compile_without_what_is_not_wanted(target, compiler, activation, result):
    """z or h is not computed then, and has no gradient."""
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")

    def function(z_pre):
        out = ladder_encoder(z_pre * 2, 3, activation=activation, want_z=False, eps=0.1)
        return getattr(out, result).pow(3).sum()

    z_pre = torch.randn(8, 3, device=target.device, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    ours, exact = (torch.autograd.grad(f(z_pre), z_pre) for f in (compiled, function))
    torch.testing.assert_close(ours, exact)


def test_autocast(target):
    """The op computes in z_pre's dtype, as it comes from the matrix product; statistics stay float32."""
    data = Data((8, 3), 3, 2, dtype=torch.float32, device=target.device, noise_std=0.3, activation="relu")
    half = data.inputs[0].bfloat16()
    with torch.autocast(target.device, dtype=torch.bfloat16):
        wide = data.call(ladder_encoder)
        assert {t.dtype for t in wide} == {torch.float32}
        if torch.bfloat16 in target.dtypes or target.backend == "reference":
            mixed = data.call(ladder_encoder, half, *data.inputs[1:])
            assert [t.dtype for t in mixed] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for a, b in zip(wide, data.call(ladder_encoder), strict=True):
        assert torch.equal(a, b)


def test_half_in_the_reference_is_rounded_once():
    data = Data((8, 3), 3, 2, dtype=torch.bfloat16, noise_std=0.3, activation="relu")
    with ladderfast.use_backend("reference"):
        ours = data.call(ladder_encoder)
    exact = data.call(reference.ladder_encoder, *[t.float() for t in data.inputs])
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert torch.equal(a, b.bfloat16())
    for a, b in zip(ours[2:], exact[2:], strict=True):
        assert torch.equal(a, b)
    assert (
        data.call(ladder_encoder, data.inputs[0], *[t.float() for t in data.inputs[1:]]).h.dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(("shape", "num_labelled", "num_clean"), CASES)
def test_bfloat16_on_the_cpu_is_float32_rounded_once(shape, num_labelled, num_clean):
    if backend.unavailable("cpu", "cpu", torch.bfloat16, "ladder_encoder"):
        pytest.skip("without the extension there is the reference")
    data = Data(shape, num_labelled, num_clean, dtype=torch.bfloat16, noise_std=0.3, activation="relu")
    data.inputs[1:] = [t.float() for t in data.inputs[1:]]
    ours = data.run(ladder_encoder)
    data.inputs, data.grads = ([t.float() for t in ts] for ts in (data.inputs, data.grads))
    for name, a, b in zip(OUTPUTS, ours, data.run(ladder_encoder), strict=True):
        if a.dtype == torch.float32:  # compilers may contract the scalar rest of a sum in another way
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
        else:  # and so tip the rounding of few elements
            assert (a == b.to(a.dtype)).float().mean() > 0.99, name


def test_bfloat16_on_the_cpu_over_seeds_and_threads(two_threads):
    if backend.unavailable("cpu", "cpu", torch.bfloat16, "ladder_encoder"):
        pytest.skip("without the extension there is the reference")
    x = torch.randn(3, 400, 70).bfloat16().requires_grad_()
    beta = torch.randn(3, 70, requires_grad=True)
    states = torch.arange(6).view(3, 2)

    def encode(x, beta, state):
        options = {"num_clean": 100, "noise_std": 0.3, "activation": "relu"}
        return ladder_encoder(x, 100, beta=beta, noise_state=state, **options)

    def run(call):
        out = call()
        return [*out, *torch.autograd.grad([out[0].sum(), out[1].square().sum()], [x, beta])]

    together = run(lambda: torch.func.vmap(encode)(x, beta, states))
    torch.set_num_threads(1)
    apart = run(
        lambda: [torch.stack(t) for t in zip(*map(encode, x, beta, states), strict=True)],
    )
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)
    assert [t.dtype for t in together] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [
        torch.bfloat16,
        torch.float32,
    ]


def call(z_pre=None, num_labelled=2, **options):
    z_pre = torch.randn(6, 3) if z_pre is None else z_pre
    return ladder_encoder(z_pre, num_labelled, **options)


BAD = [
    ({"z_pre": [1.0]}, TypeError, r"z_pre must be a tensor; got list"),
    ({"z_pre": torch.ones(6, 3, dtype=torch.int32)}, TypeError, r"z_pre must be float32.*got torch.int32"),
    ({"z_pre": torch.ones(6)}, ValueError, r"z_pre must have shape \(N, C, \*\); got \(6,\)"),
    ({"num_labelled": 2.0}, TypeError, r"num_labelled must be an integer; got 2.0"),
    ({"num_labelled": True}, TypeError, r"num_labelled must be an integer; got True"),
    ({"num_labelled": -1}, ValueError, r"num_labelled must not be negative; got -1"),
    ({"num_clean": -1}, ValueError, r"num_clean must not be negative; got -1"),
    ({"num_labelled": 7}, ValueError, r"num_labelled \+ num_clean must be at most the 6 rows.*got 7 \+ 0"),
    (
        {"num_labelled": 3, "num_clean": 4},
        ValueError,
        r"num_labelled \+ num_clean must be at most.*; got 3 \+ 4",
    ),
    ({"beta": [0.0] * 3}, TypeError, r"beta must be a tensor; got list"),
    (
        {"beta": torch.ones(4)},
        ValueError,
        r"beta must have shape \(3,\) for z_pre of shape \(6, 3\); got \(4,\)",
    ),
    ({"gamma": torch.ones(3, 1)}, ValueError, r"gamma must have shape \(3,\).*got \(3, 1\)"),
    ({"gamma": torch.ones(3).double()}, TypeError, r"gamma must be torch.float32 for.*got torch.float64"),
    (
        {"beta": torch.ones(3, device="meta")},
        ValueError,
        r"beta must be on the device of z_pre, cpu; got meta",
    ),
    ({"noise_std": -0.1}, ValueError, r"noise_std must be finite and not negative; got -0.1"),
    ({"noise_std": "0.1"}, TypeError, r"noise_std must be a number; got '0.1'"),
    ({"negative_slope": math.inf}, ValueError, r"negative_slope must be finite and not negative; got inf"),
    ({"eps": math.nan}, ValueError, r"eps must be finite and not negative; got nan"),
    ({"eps": 10**400}, ValueError, r"eps must be finite and not negative; got 10000"),
    ({"eps": True}, TypeError, r"eps must be a number; got True"),
    ({"activation": "tanh"}, ValueError, r"activation must be one of identity, relu, leaky_relu; got 'tanh'"),
    ({"noise_std": 0.3}, ValueError, r"noise_state must be given for noise_std 0.3; got None"),
    ({"noise_state": 3}, TypeError, r"noise_state must be an int64 tensor of seed and offset; got int"),
    ({"noise_state": torch.ones(2)}, TypeError, r"noise_state must be an int64 tensor.*got torch.float32"),
    (
        {"noise_state": NOISE[:1]},
        ValueError,
        r"noise_state must have shape \(2,\), seed and offset; got \(1,\)",
    ),
    (
        {"noise_state": NOISE.to("meta")},
        ValueError,
        r"noise_state must be on the device of z_pre, cpu; got meta",
    ),
    ({"noise_stream": 1.5}, TypeError, r"noise_stream must be an integer; got 1.5"),
    ({"noise_stream": 2**63}, ValueError, r"noise_stream must be less than 2\*\*63; got 9223372036854775808"),
    ({"want_z": "no"}, TypeError, r"want_z must be a bool; got str"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_errors_name_the_argument(options, error, message):
    for name in ("reference", "cpu"):
        if backend.unavailable(name, "cpu", torch.float32) is None:
            with ladderfast.use_backend(name), pytest.raises(error, match="ladder_encoder: " + message):
                call(**options)


def test_meta_tensors_have_shapes():
    out = ladder_encoder(torch.empty(6, 3, 4, 4, device="meta"), 2, num_clean=2)
    assert [tuple(t.shape) for t in out] == [(6, 3, 4, 4), (6, 3, 4, 4), (3, 3), (3, 3)]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    """One binary: each instruction set up to this machine's gives the reference's values."""
    code = (
        "import torch, ladderfast._C as c\n"
        "from tests.ops.test_ladder_encoder import *\n"
        "for case in CASES:\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        for activation in ACTIVATIONS:\n"
        "            data = Data(*case, dtype=dtype, noise_std=0.3, activation=activation)\n"
        "            assert_as_good_as_torch(data.run(ladder_encoder), data)\n"
        "print(c.instruction_set())\n"
    )
    env = {**os.environ, "LADDERFAST_ISA": isa, "LADDERFAST_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    best = _extension.module.instruction_set()  # of this process: the machine's own
    order = ["baseline", "avx2", "avx512"]
    assert done.stdout.strip() == order[min(order.index(isa), order.index(best))]


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_nothing_leaks():
    data = Data((64, 64), 20, 20, dtype=torch.float32, noise_std=0.3, activation="relu")
    data.run(ladder_encoder)
    gc.collect()
    before = sum(isinstance(o, Tensor) for o in gc.get_objects())
    for _ in range(20):
        data.run(ladder_encoder)
    gc.collect()
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= before

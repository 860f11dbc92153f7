"""ladderfast.ops.ln_convlstm_step on every backend, against the float64 reference and hand-computed values."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, ln_convlstm_step
from ladderfast.reference import ln_convlstm as reference

SHAPES = [
    (1, 1),  # one cell, four gates
    (5, 3),  # fewer channels than a vector
    (3, 515),  # more than two blocks of columns, no whole vectors
    (70, 2),  # more samples than an item takes
    (2, 3, 5),  # few positions
    (3, 2, 15),  # the most positions that go by columns
    (2, 3, 4, 4),  # the fewest that go by runs
    (3, 5, 7, 11),  # prime everywhere
    (2, 3, 2, 2, 5),  # three spatial axes
]
LARGE = [
    (1, 20, 29, 30),  # a sample that is cut into chunks of channels, or of positions where channels come last
    (9, 17, 33),  # whole samples, several items
]
EMPTY = [(0, 3), (3, 0), (2, 3, 0), (0, 2, 4)]


@dataclass
class Case:
    """The arguments of a step and gradients of its results; `inputs` is 0 where nothing is normalised."""

    xs: list[Tensor]
    rec: Tensor
    c: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    grad_h: Tensor
    grad_c: Tensor

    @classmethod
    def draw(
        cls,
        shape: tuple[int, ...],
        inputs: int = 1,
        *,
        seeds: int = 0,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        channels_last: bool = False,
    ) -> Case:
        lead = (seeds,) if seeds else ()
        channels = 4 * shape[1]

        def tensor(*size: int) -> Tensor:
            t = torch.randn(*lead, *size, dtype=torch.float64).to(dtype=dtype, device=device)
            if not channels_last or len(size) == 1:
                return t
            axis = len(lead) + 1
            return t.movedim(axis, -1).contiguous().movedim(-1, axis)

        gates = (shape[0], channels, *shape[2:])
        return cls(
            [2 * tensor(*gates) + k + 1 for k in range(max(inputs, 1))],
            tensor(*gates),
            tensor(*shape),
            [tensor(channels) for _ in range(inputs)],
            [tensor(channels) for _ in range(max(inputs, 1))],
            tensor(*shape),
            tensor(*shape),
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.xs, self.rec, self.c, *self.weights, *self.biases]

    def to(self, dtype: torch.dtype) -> Case:
        def cast(value):
            return [t.to(dtype) for t in value] if isinstance(value, list) else value.to(dtype)

        return Case(**{k: cast(v) for k, v in vars(self).items()})

    def call(self, function, *tensors: Tensor, **options):
        """The function on `tensors`, which are in the order of self.tensors."""
        given = iter(tensors)
        xs, (rec, c), weights, biases = (
            tuple(next(given) for _ in range(count))
            for count in (len(self.xs), 2, len(self.weights), len(self.biases))
        )
        return function(one_or_pair(xs), rec, c, one_or_pair(weights), one_or_pair(biases), **options)


def one_or_pair(tensors):
    return None if not tensors else tensors[0] if len(tensors) == 1 else tensors


def run(function, case: Case, **options) -> list[Tensor]:
    """h, c and the gradients with respect to case.tensors."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in case.tensors]
    outputs = case.call(function, *inputs, **options)
    return [
        *(t.detach() for t in outputs),
        *torch.autograd.grad(outputs, inputs, [case.grad_h, case.grad_c]),
    ]


def plain_step(gates_in, rec, c, weight, bias, *, eps=1e-5):
    """The formula as a user would write it, without an axis of seeds, in the dtype of its inputs."""
    several = reference.several
    a = rec
    for k, x in enumerate(several(gates_in)):
        if weight is not None:
            x = torch.nn.functional.group_norm(x, 1, several(weight)[k], eps=eps)
        a = a + x
    for b in several(bias):
        a = a + b.view(-1, *[1] * (c.dim() - 2))
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def magnitudes(case: Case, eps: float = 1e-5) -> list[Tensor]:
    """Sizes of the largest terms that are added up on the way to each of run's results, from absolute values.

    Slopes of sigmoid and tanh are taken as 1, so that an error in a gate counts in full.
    """
    case = case.to(torch.float64)
    x = case.xs[0]
    sample, across = tuple(range(1, x.dim())), (0, *range(2, x.dim()))
    gate = case.rec.abs()
    for b in case.biases:
        gate = gate + reference.per_channel(b, x.dim()).abs()
    hats, weights, rstds = [], [], []
    for x, w in zip(case.xs, case.weights, strict=False):
        var, mean = torch.var_mean(x, sample, correction=0, keepdim=True)
        rstds.append(torch.rsqrt(var + eps))
        hats.append((x.abs() + mean.abs()) * rstds[-1])
        weights.append(reference.per_channel(w, x.dim()).abs())
        gate = gate + hats[-1] * weights[-1]
    if not case.weights:
        gate = gate + sum(x.abs() for x in case.xs)
    one = 1 + gate.amax(sample, keepdim=True)
    c = case.c.abs() + 1
    total = case.grad_h.abs() + case.grad_c.abs()
    grad_a = (one * total * c).repeat(1, 4, *[1] * (x.dim() - 2))
    grads_x = [grad_a] * len(case.xs)
    if case.weights:
        grads_x = []
        for hat, w, rstd in zip(hats, weights, rstds, strict=True):
            grad = grad_a * w
            mean, projection = (t.mean(sample, keepdim=True) for t in (grad, grad * hat))
            grads_x.append(rstd * (grad + mean + hat * projection))
    return [
        one * c,
        one * c,
        *grads_x,
        grad_a,
        one * total,
        *((grad_a * hat).sum(across) for hat in hats),
        *(grad_a.sum(across) for _ in case.biases),
    ]


def assert_as_good_as_torch(ours: list[Tensor], case: Case) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    The plain formula may be right by luck where there are few elements, so one rounding of the largest term that is
    summed on the way is allowed as well (four in float64, whose yardstick is rounded itself).
    """
    exact = run(reference.ln_convlstm_step, case.to(torch.float64))
    plain = run(plain_step, case)
    for index, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == b.dtype
        if case.rec.numel() == 0:
            assert (a == 0).all()
            continue
        largest = magnitudes(case)[index].max()
        rounding = torch.finfo(a.dtype).eps * largest * (4 if a.dtype == torch.float64 else 1)
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_hand_computed(target):
    """Gates 1, 2, 3, 6: mean 3, variance 3.5."""
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]], device=target.device)
    weight = torch.tensor([2.0, 1.0, 5.0, 1.0], device=target.device)
    bias = torch.tensor([0.5, 0.0, 0.25, 0.0], device=target.device)
    rec = torch.tensor([[0.0, 1.0, 0.0, -1.0]], device=target.device)
    c = torch.tensor([[2.0]], device=target.device)
    h, c_new = ln_convlstm_step(x, rec, c, weight, bias, eps=0.5)
    i, f, g, o = 0.5 - 4 / 2, -1 / 2 + 1, 0.25, 3 / 2 - 1  # std is 2 with that eps
    expected = s(f) * 2 + s(i) * math.tanh(g)
    assert c_new.item() == pytest.approx(expected, abs=1e-6)
    assert h.item() == pytest.approx(s(o) * math.tanh(expected), abs=1e-6)

    h, c_new = ln_convlstm_step(x, rec, c, None, None)
    expected = s(3) * 2 + s(1) * math.tanh(3)
    assert c_new.item() == pytest.approx(expected, abs=1e-6)
    assert h.item() == pytest.approx(s(5) * math.tanh(expected), abs=1e-6)


@pytest.mark.parametrize("inputs", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(target, shape, inputs):
    for dtype in target.dtypes:
        case = Case.draw(shape, inputs, dtype=dtype, device=target.device)
        assert_as_good_as_torch(run(ln_convlstm_step, case), case)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_large_samples(target, shape, channels_last):
    case = Case.draw(shape, 2, dtype=torch.float32, device=target.device, channels_last=channels_last)
    assert_as_good_as_torch(run(ln_convlstm_step, case), case)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((16, 32, 32, 32), False),
        ((16, 32, 32, 32), True),
        ((1, 64, 96, 96), True),  # a sample that is split
        ((16, 32, 31, 31), False),  # runs that do not begin at a vector
        ((256, 2048), False),
        ((2048, 32, 8), False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_larger_than_the_caches(shape, channels_last):
    """The CPU's kernels write the gradient of the inputs past the caches, where vectors are whole and aligned."""
    if backend.unavailable("cpu", "cpu", torch.float32):
        pytest.skip("a way of the CPU's kernels")
    case = Case.draw(shape, 1, dtype=torch.float32, channels_last=channels_last)
    with ladderfast.use_backend("cpu"):
        ours = run(ln_convlstm_step, case)
    for a, b in zip(ours, run(reference.ln_convlstm_step, case.to(torch.float64)), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("shape", [(3, 20, 5, 4), (2, 3, 7), (2, 1, 6), (3, 2, 1, 1)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_channels_last(target, shape):
    case = Case.draw(shape, 2, dtype=torch.float32, device=target.device, channels_last=True)
    results = run(ln_convlstm_step, case)
    assert_as_good_as_torch(results, case)
    for t in results[:2]:
        assert t.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("which", ["mixed", "transposed", "sliced", "expanded"])
@pytest.mark.usefixtures("poisoned")
def test_strides(target, which):
    case = Case.draw((4, 6, 5, 8), 2, dtype=torch.float32, device=target.device)
    if which == "mixed":  # one input channels-last, the others not
        case.xs[1] = case.xs[1].contiguous(memory_format=torch.channels_last)
        case.c = case.c.contiguous(memory_format=torch.channels_last)
        case.grad_h = case.grad_h.contiguous(memory_format=torch.channels_last)
    elif which == "transposed":
        for name in ("rec", "c", "grad_h"):
            t = getattr(case, name)
            setattr(case, name, t.transpose(0, 3).contiguous().transpose(0, 3))
        case.xs = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in case.xs]
    elif which == "sliced":
        case.xs = [torch.stack((t, t), -1)[..., 0] for t in case.xs]
        case.c = torch.cat((case.c, case.c), 1)[:, 6:]
        case.weights = [torch.stack((t, t), -1)[..., 0] for t in case.weights]
    else:
        case.c, case.rec = case.c[:1].expand(4, -1, -1, -1), case.rec[..., :1].expand(-1, -1, -1, 8)
        case.grad_h = case.grad_h.new_ones(()).expand(case.c.shape)
        case.xs[0] = case.xs[0][:1].expand(4, -1, -1, -1)
    inputs = [t.detach().requires_grad_() for t in case.tensors]
    outputs = case.call(ln_convlstm_step, *inputs)
    grads = torch.autograd.grad(outputs, inputs, [case.grad_h, case.grad_c])
    assert_as_good_as_torch([*(t.detach() for t in outputs), *grads], case)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_axis_of_seeds(target, shape, channels_last):
    case = Case.draw(
        shape, 2, seeds=3, dtype=torch.float32, device=target.device, channels_last=channels_last
    )
    together = run(ln_convlstm_step, case)
    for seed in range(3):
        one = Case(
            **{k: [t[seed] for t in v] if isinstance(v, list) else v[seed] for k, v in vars(case).items()}
        )
        for all_seeds, alone in zip(together, run(ln_convlstm_step, one), strict=True):
            torch.testing.assert_close(all_seeds[seed], alone)


@pytest.mark.parametrize("shape", [(2, 300), (1, 4, 60, 80)], ids=str)
def test_a_large_mean_leaves_the_variance_alone(target, shape):
    """Gates around 10,000 with a spread of 1: the normalised values are right to the rounding of the inputs."""
    case = Case.draw(shape, 1, dtype=torch.float32, device=target.device)
    case.xs = [t + 1e4 for t in case.xs]
    assert_as_good_as_torch(run(ln_convlstm_step, case), case)
    case.rec, case.biases = case.rec * 0, [b * 0 for b in case.biases]
    case.c, case.weights = case.c * 0, [torch.ones_like(w) for w in case.weights]
    h = ln_convlstm_step(case.xs[0], case.rec, case.c, case.weights[0], None)[0]
    wide = (t.double() for t in (case.xs[0], case.rec, case.c, case.weights[0]))
    exact = reference.ln_convlstm_step(*wide, None)
    # float32 has steps of 1/1024 there: a sum of squares would have lost the variance altogether.
    assert (h.double() - exact[0]).abs().max() < 1e-3


def test_a_constant_sample_is_all_bias(target):
    """Variance 0: the normalised gates are 0 and gradients stay finite."""
    case = Case.draw((2, 5, 6), 1, dtype=torch.float32, device=target.device)
    case.xs = [torch.full_like(case.xs[0], 3.0)]
    ours = run(ln_convlstm_step, case)
    assert all(t.isfinite().all() for t in ours)
    plain = ln_convlstm_step(torch.zeros_like(case.xs[0]), case.rec, case.c, None, case.biases[0])
    for a, b in zip(ours[:2], plain, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_and_gradgradcheck():
    """Finite differences, first and second order, through the kernels in float64."""
    for shape, inputs in (((2, 2), 2), ((2, 2, 3), 1), ((1, 1, 17), 1), ((2, 2), 0)):
        case = Case.draw(shape, inputs)
        tensors = [t.requires_grad_() for t in case.tensors]

        def function(*tensors, case=case):
            return case.call(ln_convlstm_step, *tensors)

        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_third_derivative(target):
    if torch.float64 not in target.dtypes:
        pytest.skip("float64")
    case = Case.draw((3, 2, 4), 2, device=target.device)

    def third(function):
        tensors = [t.clone().requires_grad_() for t in case.tensors]
        value = sum(t.square().sum() for t in case.call(function, *tensors))
        for _ in range(2):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(value, tensors)

    torch.testing.assert_close(third(ln_convlstm_step), third(reference.ln_convlstm_step))


def test_backward_of_the_reference_is_its_gradient():
    """The formula that double backward differentiates, against autograd of the forward formula."""
    for inputs in (0, 1, 2):
        case = Case.draw((3, 2, 5), inputs)
        by_hand = reference.ln_convlstm_step_backward(
            case.grad_h, case.grad_c, case.xs, case.rec, case.c, case.weights, sum(case.biases)
        )
        expected = run(reference.ln_convlstm_step, case)[2:]
        torch.testing.assert_close(list(by_hand), expected[: len(by_hand)])


@pytest.mark.parametrize("inputs", [0, 1, 2])
def test_backward_keeps_inputs_and_two_numbers_a_sample(target, inputs):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: dict[int, Tensor] = {}
    case = Case.draw((8, 3, 4), inputs, dtype=torch.float32, device=target.device)
    case.xs, case.biases = case.xs, case.biases[:1] if inputs < 2 else case.biases
    tensors = [t.requires_grad_() for t in case.tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        case.call(ln_convlstm_step, *tensors)
    large = {t.data_ptr() for t in (*case.xs, case.rec, case.c)}
    assert large <= set(kept)
    rest = sum(t.numel() for pointer, t in kept.items() if pointer not in large)
    assert rest <= 2 * 8 * inputs + 12 * (inputs + 1)


@pytest.mark.parametrize("shape", [(64, 512), (16, 8, 24, 24), (1, 24, 30, 30)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, shape, channels_last):
    """From run to run and for one and two threads."""
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    case = Case.draw(shape, 1, dtype=torch.float32, device=target.device, channels_last=channels_last)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(run(ln_convlstm_step, case))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e4, -1e4])
@pytest.mark.parametrize("shape", [(5, 20), (3, 3, 6, 6)], ids=str)
def test_extremes_stay_where_they_are(target, shape, bad):
    """One extreme element: other samples get what they got without it; in rec or c, other cells do as well."""
    case = Case.draw(shape, 1, dtype=torch.float32, device=target.device)
    calm = run(ln_convlstm_step, case)
    where = (2, 1, *([1] * (len(shape) - 2)))
    for name in ("xs", "rec", "c"):
        struck = replace(
            case, **{name: [case.xs[0].clone()] if name == "xs" else getattr(case, name).clone()}
        )
        (struck.xs[0] if name == "xs" else getattr(struck, name))[where] = bad
        results = run(ln_convlstm_step, struck)
        for a, b in zip(results[:5], calm[:5], strict=True):
            assert torch.equal(a[:2], b[:2])
            assert torch.equal(a[3:], b[3:])
        if name != "xs":
            elsewhere = torch.ones(shape, dtype=torch.bool, device=target.device)
            elsewhere[where] = False
            for a, b in zip(results[:2], calm[:2], strict=True):
                assert torch.equal(a[elsewhere], b[elsewhere])
        if abs(bad) == 1e4:
            assert all(t.isfinite().all() for t in results)
        elif math.isnan(bad):
            assert results[0][where].isnan()


def test_saturation(target):
    """Gates up to 1e4 without normalisation: values are those of float64, gradients finite and right."""
    row = torch.tensor([-math.inf, -1e4, -100.0, -20.0, 20.0, 100.0, 1e4, math.inf], device=target.device)
    gates = torch.cartesian_prod(row, row).T.reshape(2, 64)
    a = torch.cat((gates, gates.flip(0)), 0).reshape(1, 4 * 64)
    c = torch.linspace(-3, 3, 64, device=target.device)[None]
    zero = torch.zeros_like(a)
    case = Case([a], zero, c, [], [zero[0]], torch.ones_like(c), torch.ones_like(c))
    exact = run(reference.ln_convlstm_step, case.to(torch.float64))
    for x, y in zip(run(ln_convlstm_step, case), exact, strict=True):
        torch.testing.assert_close(x, y.float())


def test_small_values_keep_their_precision(target):
    """tanh of 1e-6 is right to a few units in its last place, not only in absolute terms."""
    g = torch.tensor([[1e-6, -3e-5, 1e-3]], device=target.device)
    a = torch.cat((torch.full_like(g, 30.0), torch.zeros_like(g), g, torch.full_like(g, 30.0)), 1)
    h, c = ln_convlstm_step(a, torch.zeros_like(a), torch.zeros_like(g), None, None)
    torch.testing.assert_close(c, g.double().tanh().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(h, g.double().tanh().tanh().float(), rtol=1e-6, atol=0)


def test_vmap(target):
    """torch.func over an axis of seeds, with parameters of their own, shared ones, and nested."""
    vmap, grad = torch.func.vmap, torch.func.grad
    for inputs in (0, 1, 2):
        case = Case.draw((3, 2, 4), inputs, seeds=3, dtype=torch.float32, device=target.device)

        def call(function, case=case):
            return lambda *tensors: case.call(function, *tensors)

        def loss(function, case=case):
            return lambda *tensors: sum(t.square().sum() for t in case.call(function, *tensors))

        ours, exact = ln_convlstm_step, reference.ln_convlstm_step
        every = tuple(range(len(case.tensors)))
        shared = [None if t.dim() == 2 else 0 for t in case.tensors]  # weights and biases
        for dims in ([0] * len(every), shared, [None, *[0] * (len(every) - 1)]):
            args = [t if d == 0 else t[0] for t, d in zip(case.tensors, dims, strict=True)]
            torch.testing.assert_close(
                vmap(call(ours), tuple(dims))(*args), vmap(call(exact), tuple(dims))(*args)
            )
            torch.testing.assert_close(
                vmap(grad(loss(ours), every), tuple(dims))(*args),
                vmap(grad(loss(exact), every), tuple(dims))(*args),
                rtol=1e-4,
                atol=1e-5,
            )
        twice = [t.expand(2, *t.shape) for t in case.tensors]
        nested = vmap(vmap(grad(loss(ours), every)))(*twice)
        expected = vmap(grad(loss(exact), every))(*case.tensors)
        for a, b in zip(nested, expected, strict=True):
            torch.testing.assert_close(a, b.expand(2, *b.shape), rtol=1e-4, atol=1e-5)


def test_batched_gradients(target):
    """Many gradients of one result at once, which run the backward pass under vmap."""
    case = Case.draw((3, 2, 4), 1, dtype=torch.float32, device=target.device)
    inputs = [t.requires_grad_() for t in case.tensors]
    grads = torch.randn(5, *case.c.shape, device=target.device)
    h = case.call(ln_convlstm_step, *inputs)[0]
    together = torch.autograd.grad(h, inputs, grads, is_grads_batched=True, retain_graph=True)
    for k in range(5):
        for a, b in zip(together, torch.autograd.grad(h, inputs, grads[k], retain_graph=True), strict=True):
            torch.testing.assert_close(a[k], b)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_opcheck():
    for shape, inputs, seeds, channels_last in (
        ((6, 3), 1, 0, False),
        ((2, 3, 4, 4), 2, 0, True),
        ((4, 3), 0, 0, False),
        ((2, 3, 4), 2, 2, True),
    ):
        case = Case.draw(shape, inputs, seeds=seeds, dtype=torch.float32, channels_last=channels_last)
        x, y = (*case.xs, None)[:2]
        weight, weight_y = (*case.weights, None, None)[:2]
        args = (x, y, case.rec, case.c, weight, weight_y, case.biases[0], None, None)
        ops = torch.ops.ladderfast
        torch.library.opcheck(ops.ln_convlstm.default, (*args, False, 1e-5))
        stats = ops.ln_convlstm(*args, False, 1e-5)[2:]
        torch.library.opcheck(
            ops.ln_convlstm_backward.default, (case.grad_h, case.grad_c, *args, None, *stats, False)
        )
    strided = torch.stack((x, x), -1)[..., 0]
    with pytest.raises(RuntimeError, match="contiguous or channels-last"):
        ops.ln_convlstm(
            strided, y, case.rec, case.c, weight, weight_y, case.biases[0], None, None, False, 1e-5
        )


def test_opcheck_triton(target):
    if target.backend != "triton":
        pytest.skip("the Triton ops")
    from ladderfast.triton.ln_convlstm import ln_convlstm_backward_triton, ln_convlstm_triton

    case = Case.draw((3, 3), 1, dtype=torch.float32, device=target.device)
    checks = ["test_schema"]
    if target.device == "cuda":  # the interpreter cannot run on fake tensors
        checks.append("test_faketensor")
    args = (case.xs[0], None, case.rec, case.c, case.weights[0], None, case.biases[0])
    cell_weight, cell_bias = torch.rand(2, case.c.shape[1], device=target.device).unbind()
    for cell, batch in (((None, None), False), ((cell_weight, cell_bias), True)):
        torch.library.opcheck(ln_convlstm_triton, (*args, *cell, batch, 1e-5), test_utils=checks)
        _, c_new, *stats = ln_convlstm_triton(*args, *cell, batch, 1e-5)
        kept = (None if cell[0] is None else c_new, *stats, batch)
        torch.library.opcheck(
            ln_convlstm_backward_triton, (case.grad_h, case.grad_c, *args, *cell, *kept), test_utils=checks
        )


def test_compile_fullgraph(target):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")

    def function(x, rec, c, weight, bias):
        h, c = ln_convlstm_step(x, rec * 2, c, weight, bias)
        return h + 1, c

    compiled = torch.compile(function, fullgraph=True)
    for shape, channels_last in (((6, 3), False), ((2, 3, 4, 5), True)):
        case = Case.draw(shape, 1, dtype=torch.float32, device=target.device, channels_last=channels_last)
        for a, b in zip(run(compiled, case), run(function, case), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast(target):
    """Gates and cells are promoted; vectors stay in float32, and so do the statistics."""
    case = Case.draw((3, 4, 6), 1, dtype=torch.float32, device=target.device)
    x, rec = case.xs[0].bfloat16(), case.rec.bfloat16()
    with torch.autocast(target.device, dtype=torch.bfloat16):
        h, c = ln_convlstm_step(x, rec, case.c, case.weights[0], case.biases[0])
    assert h.dtype == c.dtype == torch.float32
    expected = ln_convlstm_step(x.float(), rec.float(), case.c, case.weights[0], case.biases[0])
    torch.testing.assert_close((h, c), expected)
    if torch.bfloat16 in target.dtypes:
        with torch.autocast(target.device, dtype=torch.bfloat16):
            # A spread of one step of bfloat16 around 256: lost, if the statistics were kept in 16 bits.
            x = 256 + (torch.arange(72, device=target.device) % 2).reshape(3, 24, 1).expand(3, 24, 6)
            h, _ = ln_convlstm_step(x.bfloat16(), rec, case.c.bfloat16(), case.weights[0], case.biases[0])
        assert h.dtype == torch.bfloat16
        assert h.isfinite().all()


def test_half_on_the_cpu_is_the_reference_rounded_once():
    case = Case.draw((3, 4, 6), 2, dtype=torch.bfloat16)
    exact = run(reference.ln_convlstm_step, case.to(torch.float32))
    for a, b in zip(run(ln_convlstm_step, case), exact, strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=0.01, atol=0.01)
    wide = [t.float() for t in (*case.weights, *case.biases)]
    assert ln_convlstm_step(case.xs, case.rec, case.c, wide[:2], wide[2:])[0].dtype == torch.bfloat16


BAD = [
    (lambda x, r, c, w, b: (x.int(), r, c, w, b), TypeError, r"gates_in must be float32.*got torch.int32"),
    (lambda x, r, c, w, b: (3, r, c, w, b), TypeError, r"gates_in must be a tensor or a pair.*got int"),
    (lambda x, r, c, w, b: ((x, 3), r, c, w, b), TypeError, r"gates_in\[1\] must be a tensor; got int"),
    (lambda x, r, c, w, b: (x, r.tolist(), c, w, b), TypeError, r"gates_rec must be a tensor; got list"),
    (
        lambda x, r, c, w, b: (x, r.double(), c, w, b),
        TypeError,
        r"gates_rec must have the dtype of gates_in, torch.float32; got torch.float64",
    ),
    (lambda x, r, c, w, b: (x, r, c.double(), w, b), TypeError, r"c must have the dtype.*got torch.float64"),
    (
        lambda x, r, c, w, b: (x, r, c, w.double(), b),
        TypeError,
        r"weight must be torch.float32.*got torch.float64",
    ),
    (lambda x, r, c, w, b: (x, r, c, w, b.double()), TypeError, r"bias must be torch.float32.*torch.float64"),
    (
        lambda x, r, c, w, b: (x, r[:2], c, w, b),
        ValueError,
        r"gates_rec must have the shape of gates_in, \(4, 12\); got \(2, 12\)",
    ),
    (lambda x, r, c, w, b: (x, r, r, w, b), ValueError, r"c must have shape \(4, 3\).*got \(4, 12\)"),
    (lambda x, r, c, w, b: (x[:, :7], r, c, w, b), ValueError, r"gates_in must have shape \(N, 4C, \*\)"),
    (lambda x, r, c, w, b: (x[0], r, c, w, b), ValueError, r"gates_in must have shape.*got \(12,\)"),
    (lambda x, r, c, w, b: (x, r, c, w[:3], b), ValueError, r"weight must have shape \(12,\).*got \(3,\)"),
    (lambda x, r, c, w, b: (x, r, c, w, b[None]), ValueError, r"bias must have shape \(12,\).*got \(1, 12\)"),
    (
        lambda x, r, c, w, b: (x[None], r[None], c[None], w.expand(2, 12), b.expand(2, 12)),
        ValueError,
        r"weight must have shape \(1, 12\).*got \(2, 12\)",
    ),
    (lambda x, r, c, w, b: (x, r, c, w.expand(1, 1, 12), b), ValueError, r"weight must have shape \(4C,\)"),
    (
        lambda x, r, c, w, b: ((x, x), r, c, w, b),
        ValueError,
        r"weight must have one tensor for each of the 2 gates_in; got 1",
    ),
    (
        lambda x, r, c, w, b: ((x, x[:2]), r, c, (w, w), (b, b)),
        ValueError,
        r"gates_in\[1\] must have the shape of gates_in, \(4, 12\); got \(2, 12\)",
    ),
    (
        lambda x, r, c, w, b: (x, r, c, w, b.to("meta")),
        ValueError,
        r"bias must be on the device of gates_in, cpu; got meta",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_errors_name_the_argument(change, error, message):
    case = Case.draw((4, 3), dtype=torch.float32)
    args = change(case.xs[0], case.rec, case.c, case.weights[0], case.biases[0])
    for name in ("reference", "cpu"):
        if backend.unavailable(name, "cpu", torch.float32) is None:
            with ladderfast.use_backend(name), pytest.raises(error, match="ln_convlstm_step: " + message):
                ln_convlstm_step(*args)


def test_an_eps_that_is_negative_or_not_finite_is_refused():
    case = Case.draw((4, 3), dtype=torch.float32)
    for eps in (-1e-5, math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match=f"eps must be finite and not negative; got {eps}"):
            ln_convlstm_step(case.xs[0], case.rec, case.c, case.weights[0], None, eps=eps)


def test_meta_tensors_have_shapes():
    x, c = torch.empty(4, 12, device="meta"), torch.empty(4, 3, device="meta")
    h, c = ln_convlstm_step(x, x, c, torch.empty(12, device="meta"), None)
    assert h.shape == c.shape == (4, 3)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    """One binary: each instruction set up to this machine's gives the reference's values."""
    code = (
        "import torch, ladderfast._C as c\n"
        "from tests.ops.test_ln_convlstm import *\n"
        "for shape in SHAPES + LARGE:\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        case = Case.draw(shape, 2, dtype=dtype)\n"
        "        assert_as_good_as_torch(run(ln_convlstm_step, case), case)\n"
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
    case = Case.draw((16, 16, 4), 1, dtype=torch.float32)
    run(ln_convlstm_step, case)
    gc.collect()
    before = sum(isinstance(o, Tensor) for o in gc.get_objects())
    for _ in range(20):
        run(ln_convlstm_step, case)
    gc.collect()
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= before

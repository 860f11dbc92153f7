"""The ops around the network of a Tagger iteration on every backend, against float64, the ops they are made of and
hand-computed values."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ladderfast
from ladderfast import _extension, ops
from ladderfast.ops import backend
from ladderfast.reference import tagger_step as reference
from tests.tagger_cases import spare_the_interpreter

NAMES = ("gaussian_step_inputs", "bernoulli_step_inputs", "gaussian_step_outputs", "bernoulli_step_outputs")
SHAPES = [
    (3, 1, 5),  # one group
    (5, 4, 48),  # whole vectors, a pair and a single one
    (40, 2, 3),  # fewer pixels than a vector, several tiles of rows
    (3, 5, 131),  # prime everywhere, three blocks of pixels
    (2, 64, 19),  # the most groups
    (37, 4, 200),  # several chunks of rows, each of several tiles
    (2, 64, 512),  # the most groups in whole blocks of pixels
    (37, 4, 2048),  # rows and groups a power of two apart
]
EMPTY = [(0, 3, 4), (3, 2, 0)]


def make(
    name: str,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    spread: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of an op and gradients of its results, drawn in float64 and rounded to `dtype`."""
    n, k, d = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64)

    gaussian = name.startswith("gaussian")
    x = draw(n, d) if gaussian else torch.randint(2, (n, d), dtype=torch.float64)
    if "inputs" in name:
        z = draw(*shape) if gaussian else torch.sigmoid(2 * draw(*shape))
        inputs = [x, z, spread * draw(*shape), torch.tensor(0.3 if gaussian else 0.2, dtype=torch.float64)]
        grads = [draw(n * k, 4 * d)]
    else:
        inputs = [
            x,
            2 * draw(*shape) + 1,
            spread * draw(*shape),
            1 + draw(d) / 4,
            draw(d),
            1.5 + draw(1)[0] / 4,
        ]
        if gaussian:
            inputs.append(torch.tensor(0.3, dtype=torch.float64))
        grads = [draw(*shape), draw(*shape), draw(n, d)]
    return [t.to(device, dtype) for t in inputs], [t.to(device, dtype) for t in grads]


def wanted(name: str, inputs: list[Tensor]) -> int:
    """How many inputs have a gradient: the flip probability is a constant."""
    return len(inputs) - (name == "bernoulli_step_inputs")


def run(function, name: str, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    count = wanted(name, inputs)
    inputs = [t.detach().requires_grad_(k < count) for k, t in enumerate(inputs)]
    out = function(*inputs)
    out = (out,) if isinstance(out, Tensor) else out
    return [*(t.detach() for t in out), *torch.autograd.grad(out, inputs[:count], grads)]


def ours(name: str):
    return getattr(ops, name)


def exact(name: str):
    return getattr(reference, name)


def plain(name: str):
    """The formula as a user would write it, in the dtype of its inputs."""

    def inputs(x, z, logits, scalar):
        m = torch.softmax(logits, 1)
        x = x[:, None]
        if name.startswith("gaussian"):
            e = x - z
            log_density = -e.square() / (2 * scalar) - 0.5 * torch.log(2 * math.pi * scalar)
            dz, likelihood = e * m * torch.exp(log_density), torch.softmax(log_density, 1)
        else:
            xi = z * (1 - 2 * scalar) + scalar
            density = x * xi + (1 - x) * (1 - xi)
            dz = m / ((xi * m).sum(1, keepdim=True).clamp(1e-4, 1 - 1e-4) - 1 + x)
            likelihood = density / density.sum(1, keepdim=True)
        return torch.cat((z, m, dz, likelihood), 2).reshape(-1, 4 * z.shape[2])

    def outputs(x, z, m, c1, b1, c2, *variance):
        rows = z.shape[0] * z.shape[1]

        def normalised(t):
            flat = t.reshape(rows, -1)
            return torch.nn.functional.batch_norm(flat, None, None, training=True).view(t.shape)

        z, logits = normalised(z) * c1 + b1, normalised(m) * c2
        if not variance:
            z = torch.sigmoid(z)
            p = (torch.softmax(logits, 1) * z).sum(1).clamp(1e-4, 1 - 1e-4)
            return z, logits, -x * torch.log(p) - (1 - x) * torch.log(1 - p)
        v = variance[0]
        log_density = -(x[:, None] - z).square() / (2 * v) - 0.5 * torch.log(2 * math.pi * v)
        return z, logits, -torch.logsumexp(torch.log_softmax(logits, 1) + log_density, 1)

    return inputs if "inputs" in name else outputs


def assert_as_good_as_torch(
    found: list[Tensor], name: str, inputs: list[Tensor], grads: list[Tensor]
) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    The plain formula may be right by luck where there are few elements: a few roundings of the largest element, and of
    what is summed on the way to it, are allowed as well (more in float64, whose yardstick is rounded itself).
    """
    truth = run(exact(name), name, [t.double() for t in inputs], [t.double() for t in grads])
    theirs = run(plain(name), name, inputs, grads)
    for index, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == b.dtype
        if c.numel() == 0:
            continue
        summed = inputs[1].numel() if c.dim() == 0 else inputs[1][..., 0].numel()
        size = c.abs().max() + summed**0.5 * max(g.abs().max().item() for g in grads)
        rounding = (16 if a.dtype == torch.float64 else 4) * torch.finfo(a.dtype).eps * size
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(target, name, shape):
    spare_the_interpreter(target, shape[0] * shape[1] > 20)
    for dtype in target.dtypes:
        inputs, grads = make(name, shape, dtype=dtype, device=target.device)
        assert_as_good_as_torch(run(ours(name), name, inputs, grads), name, inputs, grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("poisoned")
def test_nothing_gives_nothing(target, name):
    for shape in EMPTY:
        inputs, grads = make(name, shape, dtype=torch.float32, device=target.device)
        for t in run(ours(name), name, inputs, grads):
            assert (t == 0).all()


def test_layout_of_the_inputs(target):
    """Rows are samples, then groups; columns are z, m, dz and likelihood of all pixels, those of the op without
    logits."""
    for kind in ("gaussian", "bernoulli"):
        (x, z, logits, scalar), _ = make(
            f"{kind}_step_inputs", (3, 2, 21), dtype=torch.float32, device=target.device
        )
        out = ours(f"{kind}_step_inputs")(x, z, logits, scalar)
        assert out.is_contiguous()
        m = torch.softmax(logits, 1)
        dz, likelihood = getattr(ops, f"{kind}_group_inputs")(x, z, m, scalar)
        torch.testing.assert_close(out.view(3, 2, 4, 21).unbind(2), (z, m, dz, likelihood))


def test_outputs_by_hand(target):
    """One pixel, two rows of two groups: z_pre 1, 3, 5, 7 has mean 4 and variance 5."""
    device = target.device
    z_pre, m_pre = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    x = torch.tensor([[0.5], [-0.5]])
    args = [
        x,
        z_pre[..., None],
        m_pre[..., None],
        torch.tensor([2.0]),
        torch.tensor([0.5]),
        torch.tensor(3.0),
    ]
    args = [t.to(device) for t in args]
    z, logits, nll = ops.gaussian_step_outputs(*args, 0.25, eps=4.0)
    torch.testing.assert_close(z[..., 0].cpu(), 2 * (z_pre - 4) / 3 + 0.5)
    torch.testing.assert_close(logits[..., 0].cpu(), 3 * (m_pre - 2) / 5**0.5)
    expected = ops.gaussian_mixture_nll(args[0], z, logits.softmax(1), 0.25)
    torch.testing.assert_close(nll, expected)
    args[0] = (args[0] > 0).float()
    z, logits, nll = ops.bernoulli_step_outputs(*args, eps=4.0)
    torch.testing.assert_close(z[..., 0].cpu(), torch.sigmoid(2 * (z_pre - 4) / 3 + 0.5))
    torch.testing.assert_close(nll, ops.bernoulli_mixture_nll(args[0], z, logits.softmax(1)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("poisoned")
def test_strides(target, name):
    inputs, grads = make(name, (4, 3, 20), dtype=torch.float32, device=target.device)
    expected = run(ours(name), name, inputs, grads)
    inputs[1] = inputs[1].transpose(0, 1).contiguous().transpose(0, 1)
    inputs[2] = torch.stack((inputs[2], inputs[2]), -1)[..., 0]
    inputs[0] = torch.cat((inputs[0], inputs[0]), 1)[:, 20:]
    grads = [torch.cat((g, g), -1)[..., : g.shape[-1]] for g in grads]
    for a, b in zip(run(ours(name), name, inputs, grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    grads = [torch.ones((), device=target.device).expand_as(g) for g in grads]
    assert all(t.isfinite().all() for t in run(ours(name), name, inputs, grads))


@pytest.mark.parametrize(
    ("forced", "groups", "dtype"),
    [(None, 65, torch.float32), (None, 3, torch.bfloat16), ("reference", 3, torch.float32)],
)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_contiguous_whatever_the_inputs_are(name, forced, groups, dtype):
    """Also where the reference computes them."""
    (x, z, m, *parameters), _ = make(name, (2, groups, 5), dtype=dtype)
    x, z, m = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, z, m))
    with ladderfast.use_backend(forced) if forced else contextlib.nullcontext():
        out = ours(name)(x, z, m, *parameters)
    assert all(t.is_contiguous() for t in ((out,) if isinstance(out, Tensor) else out))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("poisoned")
def test_the_stride_of_a_single_group_says_nothing(target, name):
    inputs, grads = make(name, (5, 1, 20), dtype=torch.float32, device=target.device)
    expected = run(ours(name), name, inputs, grads)
    inputs[1:3] = [torch.empty(1, 5, 20, device=target.device).transpose(0, 1).copy_(t) for t in inputs[1:3]]
    assert inputs[1].stride(1) == 100
    for a, b in zip(run(ours(name), name, inputs, grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_extremes(target, name):
    """Logits up to 1e5, exponents far below underflow: finite, and right against float64."""
    for variance in (1e-6, 1e6):
        inputs, grads = make(name, (4, 3, 20), dtype=torch.float32, device=target.device, spread=1e5)
        if name.startswith("gaussian"):
            inputs[-1] = torch.full_like(inputs[-1], variance)
        truth = run(exact(name), name, [t.double() for t in inputs], [t.double() for t in grads])
        for k, (a, b) in enumerate(zip(run(ours(name), name, inputs, grads), truth, strict=True)):
            assert a.isfinite().all(), k
            scale = b.abs().max().clamp(min=1e-30)
            assert ((a.double() - b).abs().max() / scale) < (1e-2 if "outputs" in name else 1e-4), k


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("groups", [3, 4])
@pytest.mark.parametrize("apart", [2048, 130], ids=["a power of two", "other"])
def test_the_same_wherever_rows_lie(target, name, apart, groups):
    """The CPU's kernel copies columns whose rows and groups are a power of two apart: same bits with and without, of
    pixels that do not fill the last vector."""
    inputs, grads = make(name, (37, groups, 100), dtype=torch.float32, device=target.device)
    expected = run(ours(name), name, inputs, grads)
    for k in (1, 2):
        inputs[k] = torch.full((37, groups, apart), math.nan, device=target.device)[..., :100].copy_(
            inputs[k]
        )
    assert inputs[1].stride() == (groups * apart, apart, 1)
    for a, b in zip(run(ours(name), name, inputs, grads), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_a_tiny_gradient_keeps_its_digits():
    """Where the last group's logit is far above the first one's, and with it what its mask is divided by."""
    inputs, (grad_z, grad_l, grad_nll) = make("bernoulli_step_outputs", (37, 4, 20), dtype=torch.float32)
    inputs[2][3, 0], inputs[2][3, 3] = -1e4, 1e4
    inputs[5].fill_(4.0)
    grads = [0 * grad_z, 0 * grad_l, 1e-18 * grad_nll]
    with ladderfast.use_backend("cpu"):
        found = run(ours("bernoulli_step_outputs"), "bernoulli_step_outputs", inputs, grads)
    truth = run(
        exact("bernoulli_step_outputs"),
        "bernoulli_step_outputs",
        [t.double() for t in inputs],
        [t.double() for t in grads],
    )
    row = truth[4][3]  # the gradient of z_pre
    assert row[3].abs().max() > 1e-19
    torch.testing.assert_close(found[4][3].double(), row, rtol=1e-4, atol=1e-5 * row.abs().max().item())


@pytest.mark.parametrize(
    ("c1", "b1", "c2"),
    [(4, 2, 4.1), (4, 2, 4.2), (6, 2, 1), (6.2, 2, 1), (4, 70, 1), (-30, 2, 1), (1, 900, 300)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steep_parameters(target, dtype, c1, b1, c2):
    """The CPU's kernel goes another way where no values that were normalised over 148, and so are at most 12.2 and 17.2
    apart, can overflow an exponential: up to 18.3 c2 = 76.2 and 12.2 c1 + b1 = 76.2."""
    name = "bernoulli_step_outputs"
    if dtype == torch.float64 and target.backend != "cpu":
        pytest.skip("of the CPU's kernel alone")
    inputs, grads = make(name, (37, 4, 20), dtype=dtype, device=target.device)
    for z in inputs[1:3]:  # values that come near the largest, and near the largest difference
        z[5, 1, :10], z[7, 2, 10:15], z[9, 0, 15:], z[9, 3, 15:] = 1e4, -1e4, -1e4, 1e4
    inputs[3].fill_(c1)
    inputs[4].fill_(b1)
    inputs[5].fill_(c2)
    found = run(ours(name), name, inputs, grads)
    assert all(t.isfinite().all() for t in found)
    assert_as_good_as_torch(found, name, inputs, grads)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_steep_parameters_where_the_mean_is_rounded():
    """Two values next to each other whose mean is neither as a float: one is 0 after normalisation, the other 2."""
    m = torch.tensor([1e8, 1e8 + 8]).view(1, 2, 1)
    with ladderfast.use_backend("cpu"):
        _, logits, nll = ops.bernoulli_step_outputs(
            torch.ones(1, 1),
            torch.tensor([-1.0, 1.0]).view(1, 2, 1),
            m,
            *torch.ones(2, 1),
            torch.tensor(50.0),
        )
    assert logits.abs().max() > 90
    z = torch.sigmoid(torch.tensor(2.0))  # of the group that has the larger logit, c1 + b1
    torch.testing.assert_close(nll, -z.log().view(1, 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("c2", [1.0, 1e2, 1e4])
def test_the_cost_is_not_rounded_by_the_size_of_logits(target, c2):
    name = "gaussian_step_outputs"
    inputs, _ = make(name, (40, 4, 24), dtype=torch.float32, device=target.device)
    inputs[5].fill_(c2)

    def formula(x, z_pre, m_pre, z_weight, z_bias, mask_weight, variance):
        def normalised(t):
            return (t - t.mean((0, 1))) / torch.sqrt(t.var((0, 1), correction=0) + 1e-5)

        z = normalised(z_pre) * z_weight + z_bias
        log_m = torch.log_softmax(normalised(m_pre) * mask_weight, 1)
        log_density = torch.distributions.Normal(z, variance.sqrt()).log_prob(x.unsqueeze(1))
        return -torch.logsumexp(log_m + log_density, 1)

    exact = formula(*(t.double() for t in inputs))
    results = formula(*inputs), ours(name)(*inputs)[2]
    theirs, found = ((t.double() - exact).abs().max().item() for t in results)
    assert found <= 2 * theirs, f"{found} is off, plain PyTorch by {theirs}"


@pytest.mark.parametrize("name", [name for name in NAMES if "inputs" in name])
@pytest.mark.parametrize("size", [1.0, 20.0, 100.0])
def test_masks_are_not_rounded_by_the_size_of_logits(target, name, size):
    inputs, grads = make(name, (20, 8, 24), dtype=torch.float32, device=target.device, spread=size)

    def results(function, dtype=torch.float32):
        """Masks, and the gradients of all that is no sum over everything."""
        out, *found = run(function, name, [t.to(dtype) for t in inputs], [t.to(dtype) for t in grads])
        return [out.unflatten(1, (4, -1))[:, 1], *(t for t in found if t.dim() > 0)]

    truth = results(exact(name), torch.float64)
    for index, (a, b, c) in enumerate(zip(results(ours(name)), results(plain(name)), truth, strict=True)):
        found, theirs = ((t.double() - c).square().mean().sqrt().item() for t in (a, b))
        rounding = torch.finfo(torch.float32).eps * c.square().mean().sqrt().item() / 4
        assert found <= 2 * theirs + rounding, f"result {index}: {found} is off, plain PyTorch by {theirs}"


def test_masks_of_exactly_zero_and_one(target):
    logits = torch.tensor([[[0.0], [-200.0], [-math.inf]]], device=target.device)
    x = torch.zeros(1, 1, device=target.device)
    z = torch.zeros_like(logits)
    for out in (ops.gaussian_step_inputs(x, z, logits, 1.0), ops.bernoulli_step_inputs(x, z, logits, 0.1)):
        assert out[:, 1].tolist() == [1.0, 0.0, 0.0]
        assert out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_gradgradcheck(name):
    inputs, _ = make(name, (3, 2, 5))
    if name == "bernoulli_step_inputs":
        inputs[0] = inputs[0] * 0.5 + 0.3  # away from the pole's limit
    inputs = [t.requires_grad_(k < wanted(name, inputs)) for k, t in enumerate(inputs)]
    assert torch.autograd.gradcheck(ours(name), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(name), inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("poisoned")
def test_without_the_gradient_of_x(target, name):
    """Which is data in training: the other gradients, also the second ones and those of many seeds, are the same."""
    inputs, grads = make(name, (3, 4, 21), dtype=torch.float32, device=target.device)
    interpreted = (target.backend, target.device) == ("triton", "cpu")  # slow
    others = range(1, wanted(name, inputs))

    def first_and_second(with_x: bool) -> list[Tensor]:
        given = [t.detach().requires_grad_(k in others or (k == 0 and with_x)) for k, t in enumerate(inputs)]
        out = ours(name)(*given)
        leaves = [given[k] for k in others]
        first = torch.autograd.grad(out, leaves, grads, create_graph=True)
        if interpreted:
            return list(first)
        return [*first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)]

    for a, b in zip(first_and_second(True), first_and_second(False), strict=True):
        torch.testing.assert_close(a, b)

    if interpreted:
        return

    def gradients(function):
        def loss(*given):
            out = function(*given)
            return sum(t.square().sum() for t in ((out,) if isinstance(out, Tensor) else out))

        return torch.func.vmap(torch.func.grad(loss, tuple(others)))

    stacked = [torch.stack([t, t * 0.9]) for t in inputs]
    found, expected = gradients(ours(name))(*stacked), gradients(exact(name))(*stacked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_backward_keeps_inputs_and_statistics(target, name):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: dict[int, Tensor] = {}
    inputs, _ = make(name, (6, 3, 8), dtype=torch.float32)
    inputs = [t.requires_grad_(k < wanted(name, inputs)) for k, t in enumerate(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        ours(name)(*inputs)
    rest = set(kept) - {t.data_ptr() for t in inputs}
    assert sum(kept[p].numel() for p in rest) == (4 * 8 if "outputs" in name else 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, name):
    """From run to run and for one and two threads."""
    if target.backend == "reference":
        pytest.skip("a promise of the kernels")
    interpreted = (target.backend, target.device) == ("triton", "cpu")
    shape = (3, 2, 150) if interpreted else (33, 4, 500)
    inputs, grads = make(name, shape, dtype=torch.float32, device=target.device)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(run(ours(name), name, inputs, grads))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_vmap(target, name):
    """Over everything, with shared parameters, and nested; also many gradients at once."""
    vmap = torch.func.vmap
    drawn = [make(name, (2, 3, 7), dtype=torch.float32, device=target.device)[0] for _ in range(3)]
    stacked = [torch.stack(ts) for ts in zip(*drawn, strict=True)]
    every = tuple(range(wanted(name, stacked)))

    def gradients(function):
        def loss(*tensors):
            out = function(*tensors)
            return sum(t.square().sum() for t in ((out,) if isinstance(out, Tensor) else out))

        return torch.func.grad(loss, every)

    rows = [0] * 3 + [None] * (len(stacked) - 3)
    interpreted = (target.backend, target.device) == ("triton", "cpu")
    for dims in ([0] * len(stacked), rows)[interpreted:]:
        args = [t if d == 0 else t[0] for t, d in zip(stacked, dims, strict=True)]
        for wrap in (lambda f: f, gradients):
            found = vmap(wrap(ours(name)), tuple(dims))(*args)
            expected = vmap(wrap(exact(name)), tuple(dims))(*args)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    twice = [t.expand(2, *t.shape) for t in stacked]
    nested = vmap(vmap(gradients(ours(name))))(*twice)
    for a, b in zip(nested, vmap(gradients(exact(name)))(*stacked), strict=True):
        torch.testing.assert_close(a, b.expand(2, *b.shape), rtol=1e-4, atol=1e-4)
    inputs = [t.requires_grad_(k in every) for k, t in enumerate(drawn[0])]
    out = ours(name)(*inputs)
    out = out if isinstance(out, Tensor) else out[0]
    grads = torch.randn(4, *out.shape, device=target.device)
    leaves = [t for k, t in enumerate(inputs) if k in every]
    together = torch.autograd.grad(
        out, leaves, grads, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    for k in range(4):
        alone = torch.autograd.grad(out, leaves, grads[k], retain_graph=True, allow_unused=True)
        for a, b in zip(together, alone, strict=True):
            if b is not None:
                torch.testing.assert_close(a[k], b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs, grads = make(name, (2, 3, 7), dtype=torch.float32)
    eps = (1e-5,) if "outputs" in name else ()
    forward = getattr(torch.ops.ladderfast, name).default
    torch.library.opcheck(forward, (*inputs, *eps))
    stats = forward(*inputs, *eps)[3:] if eps else ()
    for want_x in (True, False):
        torch.library.opcheck(
            getattr(torch.ops.ladderfast, name + "_backward").default, (*grads, *inputs, *stats, want_x)
        )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_triton(target, name):
    if target.backend != "triton":
        pytest.skip("the Triton ops")
    from ladderfast.triton import tagger_step

    inputs, grads = make(name, (2, 3, 5), dtype=torch.float32, device=target.device)
    eps = (1e-5,) if "outputs" in name else ()
    checks = ["test_schema"]
    if target.device == "cuda":  # the interpreter cannot run on fake tensors
        checks.append("test_faketensor")
    forward = getattr(tagger_step, name + "_triton")
    torch.library.opcheck(forward, (*inputs, *eps), test_utils=checks)
    stats = forward(*inputs, *eps)[3:] if eps else ()
    backward = getattr(tagger_step, name + "_backward_triton")
    torch.library.opcheck(backward, (*grads, *inputs, *stats), test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph(target, name):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")
    inputs, grads = make(name, (2, 3, 7), dtype=torch.float32, device=target.device)
    compiled = torch.compile(ours(name), fullgraph=True)
    torch.testing.assert_close(run(compiled, name, inputs, grads), run(ours(name), name, inputs, grads))


def test_autocast_and_half():
    for name in NAMES:
        inputs, grads = make(name, (3, 2, 5), dtype=torch.bfloat16)
        wide = run(exact(name), name, [t.float() for t in inputs], [t.float() for t in grads])
        for a, b in zip(run(ours(name), name, inputs, grads), wide, strict=True):
            torch.testing.assert_close(a, b.bfloat16(), rtol=0.02, atol=0.02)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ours(name)(*inputs)
        for t in (out,) if isinstance(out, Tensor) else out:
            assert t.dtype == torch.float32


def test_more_groups_than_the_kernels_take():
    inputs, _ = make("gaussian_step_inputs", (1, 65, 3), dtype=torch.float32)
    torch.testing.assert_close(
        ops.gaussian_step_inputs(*inputs), reference.gaussian_step_inputs(*inputs), rtol=0, atol=0
    )
    with ladderfast.use_backend("cpu"), pytest.raises(RuntimeError, match=r"gaussian_step_inputs: .*cpu"):
        ops.gaussian_step_inputs(*inputs)


BAD = [
    (
        "gaussian_step_inputs",
        2,
        lambda t: t[:1],
        ValueError,
        r"mask_logits must have the shape of z.*got \(1, 3, 5\)",
    ),
    ("gaussian_step_inputs", 3, lambda t: -1.0, ValueError, r"variance must be above 0 and finite; got -1.0"),
    ("bernoulli_step_inputs", 3, lambda t: 2.0, ValueError, r"flip_prob must lie in \[0, 1\]; got 2.0"),
    ("bernoulli_step_inputs", 3, lambda t: t.requires_grad_(), ValueError, r"flip_prob is a constant"),
    (
        "bernoulli_step_inputs",
        0,
        lambda t: t.double(),
        TypeError,
        r"x must have the dtype of z.*torch.float64",
    ),
    ("gaussian_step_outputs", 1, lambda t: t[0], ValueError, r"z_pre must have shape \(N, K, D\)"),
    ("gaussian_step_outputs", 2, lambda t: t.double(), TypeError, r"mask_pre must have the dtype of z_pre"),
    ("gaussian_step_outputs", 3, lambda t: t[:2], ValueError, r"z_weight must have shape \(5,\); got \(2,\)"),
    ("bernoulli_step_outputs", 4, lambda t: 3, TypeError, r"z_bias must be a tensor; got int"),
    (
        "bernoulli_step_outputs",
        5,
        lambda t: t[None],
        ValueError,
        r"mask_weight must have shape \(\); got \(1,\)",
    ),
    ("gaussian_step_outputs", 6, lambda t: 0, ValueError, r"variance must be above 0 and finite; got 0"),
    (
        "gaussian_step_outputs",
        6,
        lambda t: None,
        TypeError,
        r"variance must be a number or a tensor; got NoneType",
    ),
    *[
        (
            "gaussian_step_outputs",
            3 + k,
            lambda t: t.to_sparse(),
            TypeError,
            rf"{name} must be a dense tensor; got",
        )
        for k, name in enumerate(("z_weight", "z_bias", "mask_weight", "variance"))
    ],
]


@pytest.mark.parametrize(("name", "index", "change", "error", "message"), BAD, ids=[b[4] for b in BAD])
def test_errors_name_the_argument(name, index, change, error, message):
    inputs, _ = make(name, (2, 3, 5), dtype=torch.float32)
    inputs[index] = change(inputs[index])
    for each in ("reference", "cpu"):
        if backend.unavailable(each, "cpu", torch.float32) is None:
            with ladderfast.use_backend(each), pytest.raises(error, match=f"{name}: {message}"):
                ours(name)(*inputs)


def test_an_eps_that_is_not_above_zero_and_finite_is_refused():
    inputs, _ = make("bernoulli_step_outputs", (2, 3, 5), dtype=torch.float32)
    for eps in (0, math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match=f"eps must be above 0 and finite; got {eps}"):
            ops.bernoulli_step_outputs(*inputs, eps=eps)
    with pytest.raises(TypeError, match="eps must be a number; got None"):
        ops.bernoulli_step_outputs(*inputs, eps=None)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    code = (
        "from tests.ops.test_tagger_step import *\n"
        "torch.manual_seed(0)\n"
        "for name in NAMES:\n"
        "    for shape in SHAPES:\n"
        "        inputs, grads = make(name, shape, dtype=torch.float32)\n"
        "        assert_as_good_as_torch(run(ours(name), name, inputs, grads), name, inputs, grads)\n"
    )
    env = {**os.environ, "LADDERFAST_ISA": isa, "LADDERFAST_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

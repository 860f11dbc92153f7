"""ladderfast.ops.ladder_decoder on every backend, against the float64 reference and hand-computed values."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, ladder_decoder
from ladderfast.reference import ladder_decoder as reference

MORE_ON_CPU = (torch.bfloat16,)
NAMES = ("u", "z", "params", "clean_z", "mean", "var")
LAYERS = {
    "inner": 6,
    "bottom": 4,
    "free": 3,
}  # with a cost, layer 0, without a cost: how many arguments each has
SHAPES = [
    (1, 1),  # one element
    (1, 70),  # one row: every channel is constant
    (5, 3),  # rows are merged; the only merged row is short
    (200, 10),  # the top layer
    (37, 1),  # one channel, a prime number of rows
    (3, 1023),  # several blocks of columns, the last one short
    (131, 515),  # rows and columns that are no multiple of any tile
    (2, 3, 5),  # a short inner axis
    (7, 2, 63),  # the longest inner axis that goes by columns
    (2, 3, 8, 8),  # the shortest that goes by runs
    (3, 5, 7, 11),  # prime everywhere
    (2, 3, 2, 2, 2),  # three spatial axes
]
LONG = [(1, 2, 20011), (130, 2, 67), (1031, 130)]  # several segments of a run, and several partial sums
EMPTY = [(0, 4), (4, 0), (3, 4, 0), (0, 0)]

Inputs = list[Tensor]
Grads = list[Tensor]


@pytest.fixture(autouse=True)
def _kernels_exist(request: pytest.FixtureRequest) -> None:
    target = request.getfixturevalue("target") if "target" in request.fixturenames else None
    missing = importlib.util.find_spec("ladderfast.triton.ladder_decoder") is None
    if missing and target is not None and target.backend == "triton":
        pytest.skip("there is no Triton kernel yet")


def make(
    shape: tuple[int, ...], layer: str = "inner", *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Inputs, Grads]:
    """The arguments that a layer of this kind has, and gradients of its results; drawn in float64 and rounded."""
    u, z, clean_z, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    params = torch.randn(10, shape[1], dtype=torch.float64)
    mean, var = torch.randn(shape[1], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64) + 0.5
    inputs = [3 * u + 1, z, params, clean_z, mean, var][: LAYERS[layer]]
    grads = [grad, torch.tensor(1.7, dtype=torch.float64)][: 1 if layer == "free" else 2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = [dtype, dtype, dtype, dtype, wide, wide]
    return (
        [t.to(dtype=d, device=device) for t, d in zip(inputs, dtypes, strict=False)],
        [t.to(dtype=d, device=device) for t, d in zip(grads, (dtype, wide), strict=False)],
    )


def run(function, inputs: Inputs, grads: Grads, **options) -> dict[str, Tensor]:
    """z_hat, the cost if there is one, and the gradients with respect to all arguments."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    out = [t for t in function(*leaves, **options) if t is not None]
    found = torch.autograd.grad(out, leaves, grads)
    results = dict(zip(("z_hat", "cost"), (t.detach() for t in out), strict=False))
    return results | {f"grad_{name}": g for name, g in zip(NAMES, found, strict=False)}


def plain_formula(u, z, params, clean_z=None, mean=None, var=None, *, squash_v=False, eps=1e-10, terms=False):
    """The formulas as a user would write them, in the dtype of the inputs.

    With `terms` on absolute values with every minus turned into a plus, which gives the size of what is summed on the
    way.
    """
    sign, axes = (1 if terms else -1), [0, *range(2, u.dim())]
    center = u.mean(axes, keepdim=True)
    spread = (u - center).square().mean(axes, keepdim=True)
    if terms:
        u, z, params = u.abs(), z.abs(), params.abs()
        spread, center = spread.detach(), u.mean(axes, keepdim=True)
    u = (u + sign * center) / torch.sqrt(spread + eps)
    ones = [1] * (u.dim() - 2)
    a = [row.reshape(-1, *ones) for row in params]
    mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
    v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
    if squash_v:
        v = torch.sigmoid(v)
    z_hat = (z + sign * mu) * v + mu
    if clean_z is None:
        return z_hat, None
    normal = z_hat
    if mean is not None:
        mean = mean.abs() if terms else mean
        normal = (z_hat + sign * mean.reshape(-1, *ones)) / torch.sqrt(var.reshape(-1, *ones) + eps)
    clean_z = clean_z.abs() if terms else clean_z
    squares = (clean_z + sign * normal) ** 2
    return z_hat, squares.mean() if squares.numel() else squares.sum()


def assert_as_good_as_torch(ours: dict[str, Tensor], inputs: Inputs, grads: Grads, **options) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    The plain formula may be right by luck where there are few elements, so one rounding of the largest term that is
    summed on the way is allowed as well (four in float64, whose yardstick is rounded itself).
    """
    wide = [t.double() for t in inputs], [t.double() for t in grads]
    exact = run(reference.ladder_decoder, *wide, **options)
    plain = run(plain_formula, inputs, grads, **options)
    terms = run(plain_formula, wide[0], [t.abs() for t in wide[1]], **options, terms=True)
    assert ours.keys() == exact.keys()
    for name, a in ours.items():
        b, c, d = plain[name], exact[name], terms[name].abs()
        assert a.shape == c.shape, name
        assert a.dtype == (b.dtype if name != "cost" or b.dtype == torch.float64 else torch.float32), name
        if c.numel() == 0:
            continue
        rounding = torch.finfo(a.dtype).eps * d.max() * (4 if a.dtype == torch.float64 else 1)
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerances) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerances)


def test_hand_computed(target):
    """u = 1, 3 is -1, 1 normalised. With a4 = 1, a10 = 0.5 z_hat = (z - u) / 2 + u = -0.5, 1.5 for z = 0, 2; with mean
    0.5 and variance 4 that is -0.5, 0.5, and the clean values are 0.5, 0.5. What reaches z_hat from the cost is
    (z_hat_n - clean_z) / 2 = -0.5, 0."""
    params = torch.zeros(10, 1)
    params[3], params[9] = 1.0, 0.5
    inputs = [torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]]), params, torch.full((2, 1), 0.5)]
    inputs += [torch.tensor([0.5]), torch.tensor([4.0])]
    inputs = [t.to(target.device) for t in inputs]
    got = run(ladder_decoder, inputs, [torch.zeros(2, 1), torch.ones(())])
    assert got["z_hat"].flatten().tolist() == pytest.approx([-0.5, 1.5])
    assert got["cost"].item() == pytest.approx(0.5)
    assert got["grad_z"].flatten().tolist() == pytest.approx([-0.25, 0.0])
    assert got["grad_clean_z"].flatten().tolist() == pytest.approx([1.0, 0.0])
    assert got["grad_mean"].item() == pytest.approx(0.5)  # -(sum of grad_z_hat)
    assert got["grad_var"].item() == pytest.approx(-0.0625)  # sum of grad_z_hat (0.5 - z_hat) / (2 var)
    assert got["grad_u"].abs().max().item() == pytest.approx(0.0, abs=1e-6)  # two points: always -1 and 1


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(target, shape, layer):
    for dtype, squash_v in itertools.product(target.dtypes, (False, True)):
        data = make(shape, layer, dtype=dtype, device=target.device)
        assert_as_good_as_torch(run(ladder_decoder, *data, squash_v=squash_v), *data, squash_v=squash_v)


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_long_sums(target, shape):
    data = make(shape, dtype=torch.float32, device=target.device)
    assert_as_good_as_torch(run(ladder_decoder, *data), *data)


@pytest.mark.parametrize("shape", [(100, 40), (100, 7), (9, 3, 9, 9)], ids=str)
def test_large_mean(target, shape):
    """u with mean 1e4 and variance 1e-2: a difference of two means of squares would have no digit left."""
    (u, *rest), grads = make(shape, dtype=torch.float32, device=target.device)
    data = [0.1 * (u - 1) / 3 + 1e4, *rest], grads
    assert_as_good_as_torch(run(ladder_decoder, *data), *data)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", [(100, 40), (1, 40), (9, 3, 9, 9)], ids=str)
def test_constant_channels_are_finite(target, shape, layer):
    """Variance 0, eps 1e-10: the normalised u is 0, to the last bit, at any level."""
    inputs, grads = make(shape, layer, dtype=torch.float32, device=target.device)
    inputs[0] = (
        inputs[0][:1, :, None].flatten(2)[..., :1].reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    )
    inputs[0] = inputs[0] * 123.456 + 7e4
    got = run(ladder_decoder, inputs, grads)
    assert all(t.isfinite().all() for t in got.values())
    at_zero = run(ladder_decoder, [torch.zeros_like(inputs[0]), *inputs[1:]], grads)
    assert torch.equal(got["z_hat"], at_zero["z_hat"])
    assert_as_good_as_torch(got, inputs, grads)


def test_one_row_passes_nothing_to_u(target):
    data = make((1, 40), dtype=torch.float32, device=target.device)
    got = run(ladder_decoder, *data)
    # One rounding of what cancels, as in the constant channels.
    limit = 0.0 if target.backend in ("cpu", "reference") else 1.0
    assert got["grad_u"].abs().max() <= limit


def test_layer_zero_is_mean_zero_and_variance_one(target):
    inputs, grads = make((40, 33), "bottom", dtype=torch.float32, device=target.device)
    without = run(ladder_decoder, inputs, grads)
    one = torch.ones(33, device=target.device)
    with_them = run(ladder_decoder, [*inputs, 0 * one, one], grads)
    assert_close(without, {name: with_them[name] for name in without}, rtol=1e-5, atol=1e-5)


def test_no_cost(target):
    """None instead of it, and the same z_hat."""
    inputs, _ = make((40, 33), dtype=torch.float32, device=target.device)
    with_cost, without = ladder_decoder(*inputs), ladder_decoder(*inputs[:3])
    assert without.cost is None
    assert with_cost.cost is not None
    assert with_cost.cost.dim() == 0
    assert torch.equal(without.z_hat, with_cost.z_hat)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_of_one_result_alone(target, layer):
    """Only z_hat is used, or only the cost."""
    for shape, which in itertools.product([(40, 33), (3, 2, 9, 9)], (0, 1)):
        inputs, grads = make(shape, layer, dtype=torch.float32, device=target.device)
        if which >= len(grads):
            continue

        def gradients(function, inputs=inputs, grads=grads, which=which):
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            found = torch.autograd.grad(function(*leaves)[which], leaves, grads[which], allow_unused=True)
            return dict(zip(NAMES, found, strict=False))

        ours, exact = gradients(ladder_decoder), gradients(reference.ladder_decoder)
        for name in exact:
            if exact[name] is None:
                assert ours[name] is None or not ours[name].any(), name
            else:
                torch.testing.assert_close(ours[name], exact[name], rtol=1e-4, atol=1e-5)


def test_gradients_that_nobody_wants(target):
    """Each argument may need none; the others' gradients stay what they are."""
    for shape in ((40, 33), (3, 2, 9, 9)):
        inputs, grads = make(shape, dtype=torch.float32, device=target.device)
        every = run(ladder_decoder, inputs, grads)
        for wanted in ([0, 2], [1], [3], [4], [5], [0, 1, 2, 3], [2, 4, 5]):
            leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
            pairs = [p for p in zip(ladder_decoder(*leaves), grads, strict=True) if p[0].requires_grad]
            out, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(out, [leaves[i] for i in wanted], given)
            for i, g in zip(wanted, found, strict=True):
                torch.testing.assert_close(g, every[f"grad_{NAMES[i]}"], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_unwanted_outputs_have_no_elements():
    (u, z, params, clean_z, mean, var), (grad, grad_cost) = make((6, 3), dtype=torch.float32)
    stats = torch.ops.ladderfast.ladder_decoder(u, z, params, clean_z, mean, var, False, 1e-10)[2:]
    call = torch.ops.ladderfast.ladder_decoder_backward
    inner, free = (clean_z, mean, var), (None, None, None)

    def sizes(grad_cost, rest, *wanted):
        out = call(grad, grad_cost, u, z, params, *rest, *stats, False, 1e-10, *wanted)
        return [t.numel() for t in out]

    assert sizes(grad_cost, inner, True, True, True) == [18, 18, 30, 18, 3, 3]
    assert sizes(grad_cost, inner, False, False, False) == [18, 0, 30, 0, 0, 0]
    assert sizes(None, inner, True, True, True) == [18, 18, 30, 0, 0, 0]
    assert sizes(None, free, True, True, True) == [18, 18, 30, 0, 0, 0]


@pytest.mark.parametrize("which", ["channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.usefixtures("poisoned")
def test_strides(target, which):
    (u, z, params, clean_z, mean, var), (grad, one) = make(
        (4, 6, 5, 8), dtype=torch.float32, device=target.device
    )
    if which == "channels_last":  # z and grad stay contiguous
        u, clean_z = (t.contiguous(memory_format=torch.channels_last) for t in (u, clean_z))
    elif which == "transposed":
        u, z, clean_z, grad = (t.transpose(0, 3).transpose(1, 2) for t in (u, z, clean_z, grad))
        params = torch.randn(5, 10, device=target.device).t()
        mean, var = mean[:5], var[:5]
    elif which == "sliced":
        u, z, clean_z, grad = (t[:, ::2, 1:, ::3] for t in (u, z, clean_z, grad))
        params, mean, var = params[:, ::2], mean[::2], var[::2]
    else:
        z, grad = z[:1].expand(4, -1, -1, -1), grad.new_ones(()).expand(4, 6, 5, 8)
        mean = mean[:1].expand(6)
    inputs = [t.detach().requires_grad_() for t in (u, z, params, clean_z, mean, var)]
    out = ladder_decoder(*inputs)
    found = torch.autograd.grad(out, inputs, [grad, one])
    ours = {"z_hat": out.z_hat.detach(), "cost": out.cost.detach()}
    ours |= {f"grad_{name}": g for name, g in zip(NAMES, found, strict=True)}
    assert_as_good_as_torch(ours, [t.detach() for t in inputs], [grad, one])
    if which == "channels_last" and target.backend != "reference":  # whose arithmetic follows z
        assert out.z_hat.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck_and_gradgradcheck(layer):
    """Finite differences, first and second order, through the kernels in float64."""
    for shape, squash_v in (((4, 2), False), ((4, 2), True), ((2, 3, 65), False)):
        inputs = [t.requires_grad_() for t in make(shape, layer)[0]]

        def function(*inputs, squash_v=squash_v):
            return tuple(t for t in ladder_decoder(*inputs, squash_v=squash_v) if t is not None)

        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_third_derivative(target):
    if torch.float64 not in target.dtypes:
        pytest.skip("float64")
    (u, *rest), _ = make((4, 3), device=target.device)

    def third(function):
        x = u.clone().requires_grad_()
        first = torch.autograd.grad(function(x, *rest)[1], x, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(second.square().sum(), x)[0]

    torch.testing.assert_close(third(ladder_decoder), third(reference.ladder_decoder))


def test_backward_keeps_inputs_and_statistics(target):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: list[Tensor] = []
    inputs = [t.requires_grad_() for t in make((8, 3), dtype=torch.float32, device=target.device)[0]]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ladder_decoder(*inputs)
    others = [t for t in kept if t.data_ptr() not in {i.data_ptr() for i in inputs}]
    assert [t.shape for t in others] == [(3,), (3,)]
    torch.testing.assert_close(others[0], inputs[0].mean(0))


@pytest.mark.parametrize("shape", [(4096, 64), (130, 3, 40, 40), (500, 10)], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, shape):
    """From run to run and for one and two threads."""
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    data = make(shape, dtype=torch.float32, device=target.device)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(run(ladder_decoder, *data))
    for other in runs[1:]:
        assert_same_bits(runs[0], other)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e4, -1e4])
@pytest.mark.parametrize("shape", [(40, 20), (5, 3, 9, 9)], ids=str)
def test_extremes_stay_in_their_channel(target, shape, bad):
    """One extreme element: the other channels get what they got without it, from z_hat to every gradient."""
    inputs, grads = make(shape, dtype=torch.float32, device=target.device)
    calm = run(ladder_decoder, inputs, grads)
    where = (3, 2, *([1] * (len(shape) - 2)))
    others = [c for c in range(shape[1]) if c != 2]
    for tensor in (inputs[0], inputs[1], inputs[3], grads[0]):
        before = tensor[where].item()
        tensor[where] = bad
        struck = run(ladder_decoder, inputs, grads)
        tensor[where] = before
        for name in calm:
            if name == "cost":
                continue
            axis = 0 if name in ("grad_mean", "grad_var") else 1
            pick = torch.tensor(others, device=target.device)
            assert torch.equal(struck[name].index_select(axis, pick), calm[name].index_select(axis, pick)), (
                name
            )
        if abs(bad) == 1e4:
            assert all(t.isfinite().all() for t in struck.values())
        elif math.isnan(bad) and tensor is not grads[0]:
            assert struck["cost"].isnan()


def test_vmap(target):
    """torch.func over an axis of seeds, with arguments of their own, shared ones, nested, and differentiated."""
    vmap, grad = torch.func.vmap, torch.func.grad

    def call(function):
        return lambda *args: tuple(t for t in function(*args) if t is not None)

    def loss(function):
        return lambda *args: sum(t.square().sum() for t in function(*args) if t is not None)

    for layer, count in LAYERS.items():
        seeds = [make((5, 4), layer, dtype=torch.float32, device=target.device)[0] for _ in range(3)]
        inputs = [torch.stack(tensors) for tensors in zip(*seeds, strict=True)]

        ours, exact = call(ladder_decoder), call(reference.ladder_decoder)
        torch.testing.assert_close(vmap(ours)(*inputs), vmap(exact)(*inputs))
        twice = [t.expand(2, *t.shape) for t in inputs]
        both = vmap(vmap(exact))(*twice)
        torch.testing.assert_close(vmap(vmap(ours))(*twice), both)
        for shared in range(-1, count):
            dims = tuple(None if i == shared else 0 for i in range(count))
            args = [t[0] if i == shared else t for i, t in enumerate(inputs)]
            a = vmap(grad(loss(ladder_decoder), tuple(range(count))), dims)(*args)
            b = vmap(grad(loss(reference.ladder_decoder), tuple(range(count))), dims)(*args)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        a = vmap(vmap(grad(loss(ladder_decoder))))(*twice)
        torch.testing.assert_close(
            a, vmap(vmap(grad(loss(reference.ladder_decoder))))(*twice), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("shape", [(6, 5), (20, 3), (3, 4, 5), (2, 3, 9, 9)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_seeds_together_are_seeds_alone(target, shape):
    """Leaves with an axis of seeds under vmap, as many networks at once are trained; and their second derivatives."""
    seeds = [make(shape, dtype=torch.float32, device=target.device) for _ in range(3)]
    inputs = [torch.stack(t).requires_grad_() for t in zip(*(s[0] for s in seeds), strict=True)]
    grads = [torch.stack(t) for t in zip(*(s[1] for s in seeds), strict=True)]
    out = torch.func.vmap(ladder_decoder)(*inputs)
    found = torch.autograd.grad(out, inputs, grads, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in found), inputs[0])[0]
    together = dict(zip(("z_hat", "cost"), (t.detach() for t in out), strict=True))
    together |= {f"grad_{name}": g.detach() for name, g in zip(NAMES, found, strict=True)}
    for seed, data in enumerate(seeds):
        assert_close({k: t[seed] for k, t in together.items()}, run(ladder_decoder, *data))
        leaves = [t.clone().requires_grad_() for t in data[0]]
        first = torch.autograd.grad(reference.ladder_decoder(*leaves), leaves, data[1], create_graph=True)
        expected = torch.autograd.grad(sum(t.square().sum() for t in first), leaves[0])[0]
        torch.testing.assert_close(second[seed], expected, rtol=1e-3, atol=1e-3)


def test_second_order_transforms():
    (u, z, params, *rest), _ = make((3, 2))

    def hessian(function):
        return torch.func.jacrev(torch.func.jacrev(lambda params: function(u, z, params, *rest)[1]))(params)

    torch.testing.assert_close(hessian(ladder_decoder), hessian(reference.ladder_decoder))


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_opcheck():
    forward, backward = torch.ops.ladderfast.ladder_decoder, torch.ops.ladderfast.ladder_decoder_backward
    for shape, (layer, count) in itertools.product(((6, 3), (2, 3, 4, 4)), LAYERS.items()):
        inputs, grads = make(shape, layer, dtype=torch.float32)
        arguments = [*inputs, *[None] * (6 - count)]
        torch.library.opcheck(forward.default, (*arguments, True, 1e-10))
        stats = forward(*arguments, True, 1e-10)[2:]
        cost = grads[1] if layer != "free" else None
        for given in ((grads[0], cost), (None, cost)):
            for wanted in (True, False):
                call = (*given, *arguments, *stats, True, 1e-10, wanted, wanted, wanted)
                torch.library.opcheck(backward.default, call)
    seeds = [torch.stack([t, t]) for t in make((6, 3), dtype=torch.float32)[0]]
    torch.library.opcheck(forward.default, (*seeds, False, 1e-10))
    u, z, params, *rest = (t[..., ::2] for t in seeds)
    with pytest.raises(RuntimeError, match="u must be contiguous or channels-last"):
        forward(u, z, params, *rest, False, 1e-10)


@pytest.mark.parametrize("layer", LAYERS)
def test_compile_fullgraph(target, layer):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")

    def function(u, *rest, squash_v):
        out = ladder_decoder(u * 2, *rest, squash_v=squash_v)
        return out.z_hat + 1, out.cost

    compiled = torch.compile(function, fullgraph=True)
    data = make((6, 3), layer, dtype=torch.float32, device=target.device)
    a, b = run(compiled, *data, squash_v=True), run(function, *data, squash_v=True)
    assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast(target):
    """u, z and clean_z are promoted; parameters stay in float32; z_hat has the promoted dtype, the cost float32."""
    (u, z, params, clean_z, mean, var), _ = make((6, 3), dtype=torch.float32, device=target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        mixed = ladder_decoder(u.bfloat16(), z, params, clean_z.bfloat16(), mean, var)
    plain = ladder_decoder(u.bfloat16().float(), z, params, clean_z.bfloat16().float(), mean, var)
    assert mixed.z_hat.dtype == torch.float32
    torch.testing.assert_close(mixed, plain)
    if torch.bfloat16 in target.dtypes:
        with torch.autocast(target.device, dtype=torch.bfloat16):
            out = ladder_decoder(u.bfloat16(), z.bfloat16(), params, clean_z.bfloat16(), mean, var)
        assert out.z_hat.dtype == torch.bfloat16
        assert out.cost.dtype == torch.float32


def test_half_in_the_reference_is_rounded_once():
    inputs, grads = make((6, 3), dtype=torch.bfloat16)
    exact = run(reference.ladder_decoder, [t.float() for t in inputs], [t.float() for t in grads])
    with ladderfast.use_backend("reference"):
        ours = run(ladder_decoder, inputs, grads)
    for name, t in ours.items():
        torch.testing.assert_close(t, exact[name].to(t.dtype), rtol=0.01, atol=0.01)
    out = ladder_decoder(*inputs[:2], inputs[2].float(), *inputs[3:])
    assert out.z_hat.dtype == torch.bfloat16
    assert out.cost.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_on_the_cpu_is_float32_rounded_once(shape):
    if backend.unavailable("cpu", "cpu", torch.bfloat16, "ladder_decoder"):
        pytest.skip("without the extension there is the reference")
    inputs, grads = make(shape, dtype=torch.bfloat16)
    inputs[2] = inputs[2].float()
    ours = run(ladder_decoder, inputs, grads)
    wide = run(ladder_decoder, [t.float() for t in inputs], [t.float() for t in grads])
    assert ours["z_hat"].dtype == torch.bfloat16
    for name, t in ours.items():
        if t.dtype == torch.float32:  # compilers may contract the scalar rest of a sum in another way
            torch.testing.assert_close(t, wide[name], rtol=1e-5, atol=1e-5, msg=name)
        else:  # and so tip the rounding of few elements
            assert (t == wide[name].to(t.dtype)).float().mean() > 0.99, name


def test_bfloat16_on_the_cpu_over_seeds_and_threads(two_threads):
    if backend.unavailable("cpu", "cpu", torch.bfloat16, "ladder_decoder"):
        pytest.skip("without the extension there is the reference")
    u, z, clean_z = (torch.randn(3, 400, 70).bfloat16().requires_grad_() for _ in range(3))
    params = torch.randn(3, 10, 70, requires_grad=True)
    inputs = (u, z, params, clean_z, torch.randn(3, 70), torch.rand(3, 70))

    def run(call):
        z_hat, cost = call()
        assert (z_hat.dtype, cost.dtype) == (torch.bfloat16, torch.float32)
        return [z_hat, cost, *torch.autograd.grad([z_hat.sum(), cost.sum()], [u, z, params, clean_z])]

    together = run(lambda: torch.func.vmap(ladder_decoder)(*inputs))
    torch.set_num_threads(1)
    apart = run(lambda: [torch.stack(t) for t in zip(*map(ladder_decoder, *inputs), strict=True)])
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


BAD = [
    (lambda a: {**a, "u": a["u"].int()}, TypeError, r"u must be float32.*got torch.int32"),
    (lambda a: {**a, "z": a["z"].tolist()}, TypeError, r"z must be a tensor; got list"),
    (lambda a: {**a, "mean": 0.0}, TypeError, r"mean must be a tensor; got float"),
    *[
        (lambda a, n=n: {**a, n: None}, TypeError, f"{n} must be a tensor; got NoneType")
        for n in ("u", "z", "params")
    ],
    (lambda a: {**a, "z": a["z"].double()}, TypeError, r"z must be torch.float32.*got torch.float64"),
    (lambda a: {**a, "params": a["params"].double()}, TypeError, r"params must be torch.float32.*float64"),
    (lambda a: {**a, "clean_z": a["clean_z"].half()}, TypeError, r"clean_z must be torch.float32.*float16"),
    (
        lambda a: {**a, "var": a["var"].bfloat16()},
        TypeError,
        r"var must be torch.float32.*got torch.bfloat16",
    ),
    (lambda a: {**a, "var": a["var"] - 100}, ValueError, r"var must not be negative; got -\d"),
    (lambda a: {**a, "u": a["u"][0]}, ValueError, r"u must have shape \(N, C, \*\); got \(3,\)"),
    (lambda a: {**a, "z": a["z"][:2]}, ValueError, r"z must have shape \(4, 3\).*got \(2, 3\)"),
    (lambda a: {**a, "clean_z": a["clean_z"].t()}, ValueError, r"clean_z must have shape \(4, 3\).*\(3, 4\)"),
    (
        lambda a: {**a, "params": a["params"][:9]},
        ValueError,
        r"params must have shape \(10, 3\).*got \(9, 3\)",
    ),
    (lambda a: {**a, "mean": a["mean"][:2]}, ValueError, r"mean must have shape \(3,\).*got \(2,\)"),
    (lambda a: {**a, "var": a["var"][None]}, ValueError, r"var must have shape \(3,\).*got \(1, 3\)"),
    (lambda a: {**a, "var": None}, ValueError, r"mean and var must be given together"),
    (
        lambda a: {**a, "clean_z": None},
        ValueError,
        r"mean and var must be given together, and only with clean_z",
    ),
    (lambda a: {**a, "z": a["z"].to("meta")}, ValueError, r"z must be on the device of u, cpu; got meta"),
    (lambda a: {**a, "eps": "small"}, TypeError, r"eps must be a number; got 'small'"),
    (lambda a: {**a, "eps": -1.0}, ValueError, r"eps must be finite and not negative; got -1.0"),
    (lambda a: {**a, "eps": math.nan}, ValueError, r"eps must be finite and not negative; got nan"),
    (lambda a: {**a, "eps": 10**400}, ValueError, r"eps must be finite and not negative; got 10000"),
    (lambda a: {**a, "squash_v": "no"}, TypeError, r"squash_v must be a bool; got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_errors_name_the_argument(change, error, message):
    arguments = change(dict(zip(NAMES, make((4, 3), dtype=torch.float32)[0], strict=True)))
    for name in ("reference", "cpu"):
        if backend.unavailable(name, "cpu", torch.float32) is None:
            with ladderfast.use_backend(name), pytest.raises(error, match="ladder_decoder: " + message):
                ladder_decoder(**arguments)


def test_errors_are_the_same_under_autocast():
    u, z, *rest = make((4, 3), dtype=torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="z must be a tensor; got list"):
            ladder_decoder(u, z.tolist(), *rest)
        with pytest.raises(TypeError, match=r"u must be float32.*got torch.int32"):
            ladder_decoder(u.int(), z, *rest)


def test_meta_tensors_have_shapes():
    inputs = [t.to("meta") for t in make((4, 3), dtype=torch.float32)[0]]
    out = ladder_decoder(*inputs)
    assert out.z_hat.shape == (4, 3)
    assert out.cost.shape == ()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    """One binary: each instruction set up to this machine's gives the reference's values."""
    code = (
        "import torch, ladderfast._C as c\n"
        "from tests.ops.test_ladder_decoder import *\n"
        "for shape in SHAPES + EMPTY:\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        data = make(shape, dtype=dtype)\n"
        "        assert_as_good_as_torch(run(ladder_decoder, *data), *data)\n"
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
    data = make((64, 64), dtype=torch.float32)
    run(ladder_decoder, *data)
    gc.collect()
    before = sum(isinstance(o, Tensor) for o in gc.get_objects())
    for _ in range(20):
        run(ladder_decoder, *data)
    gc.collect()
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= before

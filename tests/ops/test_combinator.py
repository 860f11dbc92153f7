"""ladderfast.ops.gaussian_combinator on every backend, against the float64 reference and hand-computed values."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, gaussian_combinator
from ladderfast.reference import combinator as reference

SHAPES = [
    (1, 1),  # one element
    (5, 3),  # fewer channels than a vector
    (200, 10),  # the top layer: rows are merged, and the last one is short
    (37, 1),  # one channel, a prime number of rows
    (3, 1023),  # just below two blocks of columns
    (131, 515),  # rows and columns that are no multiple of any tile; all rows in one item
    (2, 3, 5),  # a short inner axis
    (7, 2, 15),  # the longest inner axis that still goes by columns
    (4, 110, 7),  # a block of columns that begins within a channel
    (2, 3, 4, 4),  # the shortest that goes by runs
    (3, 5, 7, 11),  # prime everywhere
    (2, 3, 2, 2, 2),  # three spatial axes
]
LONG = [
    (1, 2, 20011),
    (130, 2, 67),
    (1031, 130),
    (257, 515),
]  # several segments of a run, and several partial sums
EMPTY = [(0, 4), (4, 0), (3, 4, 0), (0, 0)]


def make(
    shape: tuple[int, ...], *, seeds: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, u, params and a gradient, drawn in float64 and rounded to `dtype`."""
    lead = (seeds,) if seeds else ()
    z, u, grad = (torch.randn(*lead, *shape, dtype=torch.float64) for _ in range(3))
    params = torch.randn(*lead, 10, shape[1], dtype=torch.float64)
    return tuple(t.to(dtype=dtype, device=device) for t in (z, u, params, grad))  # type: ignore[return-value]


def run(function, z, u, params, grad, **options) -> list[Tensor]:
    """z_hat and the gradients with respect to z, u and params."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (z, u, params)]
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def plain_formula(z, u, params, *, squash_v=False, minus=-1):
    """The formula as a user would write it, in the dtype of its inputs."""
    a = [row.reshape(*row.shape[:-1], 1, -1, *([1] * (z.dim() - params.dim()))) for row in params.unbind(-2)]
    mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
    v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
    if squash_v:
        v = torch.sigmoid(v)
    return (z + minus * mu) * v + mu


def assert_as_good_as_torch(ours: list[Tensor], z, u, params, grad, squash_v: bool) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    The plain formula may be right by luck where there are few elements, so one rounding of the largest term that is
    summed on the way is allowed as well (four in float64, whose yardstick is rounded itself). The terms' size is the
    formula on absolute values with every minus turned into a plus.
    """
    wide = [t.double() for t in (z, u, params, grad)]
    exact = run(reference.gaussian_combinator, *wide, squash_v=squash_v)
    plain = run(plain_formula, z, u, params, grad, squash_v=squash_v)
    terms = run(plain_formula, *(t.abs() for t in wide), squash_v=squash_v, minus=1)
    names = ("z_hat", "grad_z", "grad_u", "grad_params")
    for name, a, b, c, d in zip(names, ours, plain, exact, terms, strict=True):
        assert a.shape == c.shape
        assert a.dtype == b.dtype
        if c.numel() == 0:
            continue
        rounding = torch.finfo(a.dtype).eps * d.max() * (4 if a.dtype == torch.float64 else 1)
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_hand_computed(target):
    """z = 2, u = 0: mu = a1 / 2 + a5 = 1.5, v = a6 / 2 + a10 = 0.25, so g = 0.5 * 0.25 + 1.5."""
    z, u = torch.tensor([[2.0]]), torch.tensor([[0.0]])
    params = torch.tensor([[1.0], [3.0], [0.0], [5.0], [1.0], [0.5], [7.0], [0.0], [2.0], [0.0]])
    z, u, params = (t.to(target.device) for t in (z, u, params))
    assert gaussian_combinator(z, u, params).item() == pytest.approx(1.625, abs=1e-6)
    squashed = gaussian_combinator(z, u, params, squash_v=True).item()
    assert squashed == pytest.approx(0.5 / (1 + math.exp(-0.25)) + 1.5, abs=1e-6)


@pytest.mark.parametrize("squash_v", [False, True])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(target, shape, squash_v):
    for dtype in target.dtypes:
        data = make(shape, dtype=dtype, device=target.device)
        assert_as_good_as_torch(run(gaussian_combinator, *data, squash_v=squash_v), *data, squash_v=squash_v)


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_long_sums(target, shape):
    data = make(shape, dtype=torch.float32, device=target.device)
    assert_as_good_as_torch(run(gaussian_combinator, *data), *data, squash_v=False)


@pytest.mark.parametrize(
    ("seeds", "shape"),
    [
        (0, (2900, 1000)),  # two rows to whole vectors
        (0, (3001, 999)),  # sixteen, the last merged row short
        (0, (33, 95, 32, 32)),  # runs of whole vectors
        (0, (60, 95, 27, 23)),  # runs that end within one
        (2, (1500, 1000)),
        (3, (1001, 999)),  # a seed that does not begin at a vector
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_larger_than_the_caches(seeds, shape):
    """The CPU's kernels write past the caches what would not stay in them, where vectors are whole and aligned."""
    if backend.unavailable("cpu", "cpu", torch.float32):
        pytest.skip("a way of the CPU's kernels")
    data = make(shape, seeds=seeds, dtype=torch.float32)
    with ladderfast.use_backend("cpu"):
        ours = run(gaussian_combinator, *data)
    exact = run(reference.gaussian_combinator, *(t.double() for t in data))
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.usefixtures("poisoned")
def test_triton_segments(target, monkeypatch):
    """A run that is cut into segments, the last of them short."""
    if target.backend != "triton":
        pytest.skip("how the Triton kernels cut long runs")
    from ladderfast.triton import combinator

    monkeypatch.setattr(combinator, "SEGMENT", 100)
    data = make((2, 3, 300), dtype=torch.float32, device=target.device)
    assert combinator.Plan(data[0], data[2]).segments == 3
    assert_as_good_as_torch(run(gaussian_combinator, *data), *data, squash_v=False)


@pytest.mark.parametrize("shape", [(6, 5), (20, 3), (3, 4, 5), (2, 3, 4, 5), (70, 67)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_axis_of_seeds(target, shape):
    data = make(shape, seeds=3, dtype=torch.float32, device=target.device)
    together = run(gaussian_combinator, *data)
    assert_as_good_as_torch(together, *data, squash_v=False)
    for seed in range(3):
        for all_seeds, one in zip(together, run(gaussian_combinator, *(t[seed] for t in data)), strict=True):
            torch.testing.assert_close(all_seeds[seed], one)


def test_where_the_sigmoid_looks_up_its_table(target):
    """AVX-512 takes e to a multiple of log(2) / 32 from a table: halfway between two entries, and beside, too."""
    halfway = torch.arange(-1281, 1282, 2, dtype=torch.float64) / 64 * math.log(2)
    u = halfway.float()
    u = torch.cat([u, u.nextafter(u + 1), u.nextafter(u - 1)])[:, None].to(target.device)
    params = torch.zeros(10, 1, device=target.device)
    params[:2] = 1  # mu = sigmoid(u), v = 0
    torch.testing.assert_close(
        gaussian_combinator(torch.zeros_like(u), u, params),
        u.double().sigmoid().float(),
        rtol=1e-6,
        atol=2e-7,
    )


@pytest.mark.parametrize("which", ["channels_last", "all_channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.usefixtures("poisoned")
def test_strides(target, which):
    z, u, params, grad = make((4, 6, 5, 8), dtype=torch.float32, device=target.device)
    if which == "channels_last":
        z, grad = (t.contiguous(memory_format=torch.channels_last) for t in (z, grad))  # u stays contiguous
    elif which == "all_channels_last":
        z, u, grad = (t.contiguous(memory_format=torch.channels_last) for t in (z, u, grad))
    elif which == "transposed":
        z, u, grad = (t.transpose(0, 3).transpose(1, 2) for t in (z, u, grad))
        params = torch.randn(5, 10, device=target.device).t()
    elif which == "sliced":
        z, u, grad = z[:, ::2, 1:, ::3], u[:, ::2, 1:, ::3], grad[:, ::2, 1:, ::3]
        params = params[:, ::2]
    else:
        z, grad = z[:1].expand(4, -1, -1, -1), grad.new_ones(()).expand(4, 6, 5, 8)
    inputs = [t.detach().requires_grad_() for t in (z, u, params)]
    out = gaussian_combinator(*inputs)
    ours = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    assert_as_good_as_torch(ours, z, u, params, grad, squash_v=False)
    if which.endswith("channels_last"):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_gradcheck_and_gradgradcheck():
    """Finite differences, first and second order, through the kernels in float64."""
    for shape in ((3, 2), (2, 3, 17)):
        for squash_v in (False, True):
            z, u, params, _ = make(shape)
            inputs = [t.requires_grad_() for t in (z, u, params)]

            def function(z, u, params, squash_v=squash_v):
                return gaussian_combinator(z, u, params, squash_v=squash_v)

            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_third_derivative(target):
    dtype = torch.float64 if torch.float64 in target.dtypes else torch.float32
    z, u, params, _ = (t.to(dtype) for t in make((4, 3), device=target.device))

    def third(function):
        x = u.clone().requires_grad_()
        first = torch.autograd.grad(function(z, x, params).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        return torch.autograd.grad(second.sum(), x)[0]

    close = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(third(gaussian_combinator), third(reference.gaussian_combinator), **close)


def test_backward_keeps_only_its_inputs(target):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: list[Tensor] = []
    inputs = [t.requires_grad_() for t in make((8, 3), dtype=torch.float32, device=target.device)[:3]]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gaussian_combinator(*inputs)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("squash_v", [False, True])
@pytest.mark.parametrize("shape", [(4096, 64), (130, 3, 40, 40), (500, 10)], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, shape, squash_v, dtype):
    """From run to run and for one and two threads, images with the channels last too."""
    if dtype not in target.dtypes:
        pytest.skip(f"{target.backend} on {target.device} takes no {dtype}")
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    z, u, params, grad = make(shape, dtype=dtype, device=target.device)
    formats = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for memory_format in formats:
        data = [
            t.contiguous(memory_format=memory_format) if t.dim() == len(shape) > 2 else t
            for t in (z, u, params, grad)
        ]
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(run(gaussian_combinator, *data, squash_v=squash_v))
        for other in runs[1:]:
            for a, b in zip(runs[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("squash_v", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e4, -1e4])
@pytest.mark.parametrize("shape", [(40, 20), (5, 3, 6, 6)], ids=str)
def test_extremes_stay_where_they_are(target, shape, bad, squash_v):
    """One extreme element: the other elements, and the other channels' parameters, get what they got without it."""
    z, u, params, grad = make(shape, dtype=torch.float32, device=target.device)
    calm = run(gaussian_combinator, z, u, params, grad, squash_v=squash_v)
    where = (3, 2, *([1] * (len(shape) - 2)))
    for tensor in (z, u, grad):
        before = tensor[where].item()
        tensor[where] = bad
        struck = run(gaussian_combinator, z, u, params, grad, squash_v=squash_v)
        tensor[where] = before
        elsewhere = torch.ones(shape, dtype=torch.bool, device=target.device)
        elsewhere[where] = False
        for a, b in zip(struck[:3], calm[:3], strict=True):
            assert torch.equal(a[elsewhere], b[elsewhere])
        assert torch.equal(struck[3][:, :2], calm[3][:, :2])
        assert torch.equal(struck[3][:, 3:], calm[3][:, 3:])
        if abs(bad) == 1e4:
            assert all(t.isfinite().all() for t in struck)
        elif math.isnan(bad):
            assert struck[1 if tensor is grad else 0][where].isnan()


def test_saturation_is_finite(target):
    """|u| up to 1e4 with |a2|, |a7| = 10: the sigmoids saturate and their slopes vanish."""
    u = torch.tensor([[-1e4, -100.0, -20.0, 20.0, 100.0, 1e4]], device=target.device)
    params = torch.zeros(10, 6, device=target.device)
    params[[0, 5]] = 1.0
    params[[1, 6]] = torch.tensor([10.0, -10.0, 10.0, -10.0, 10.0, -10.0], device=target.device)
    data = (torch.ones_like(u), u, params, torch.ones_like(u))
    exact = run(reference.gaussian_combinator, *(t.double() for t in data))
    for a, b in zip(run(gaussian_combinator, *data), exact, strict=True):
        torch.testing.assert_close(a, b.float())


def test_vmap(target):
    """torch.func over an axis of seeds, with parameters of their own, shared ones, and nested."""
    z, u, params, _ = make((5, 4), seeds=3, dtype=torch.float32, device=target.device)
    vmap, grad = torch.func.vmap, torch.func.grad

    def loss(function):
        return lambda z, u, params: function(z, u, params).square().sum()

    ours, exact = gaussian_combinator, reference.gaussian_combinator
    torch.testing.assert_close(vmap(ours)(z, u, params), exact(z, u, params))
    shared = vmap(ours, (0, None, None), 1)(z, u[0], params[0])
    torch.testing.assert_close(shared, vmap(exact, (0, None, None), 1)(z, u[0], params[0]))
    for dims in ((0, 0, 0), (0, 0, None), (None, 0, 0)):
        args = [t if d == 0 else t[0] for t, d in zip((z, u, params), dims, strict=True)]
        a = vmap(grad(loss(ours), (0, 1, 2)), dims)(*args)
        b = vmap(grad(loss(exact), (0, 1, 2)), dims)(*args)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    twice = [t.expand(2, *t.shape) for t in (z, u, params)]
    torch.testing.assert_close(vmap(vmap(ours))(*twice), exact(z, u, params).expand(2, -1, -1, -1))
    torch.testing.assert_close(vmap(ours)(*twice), exact(z, u, params).expand(2, -1, -1, -1))


def test_second_order_transforms():
    z, u, params, _ = make((3, 2))

    def hessian(function):
        def loss(params):
            return function(z, u, params).square().sum()

        return torch.func.jacrev(torch.func.jacrev(loss))(params)

    torch.testing.assert_close(hessian(gaussian_combinator), hessian(reference.gaussian_combinator))


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    for shape, seeds in (((6, 3), 0), ((2, 3, 4, 4), 0), ((4, 3), 2)):
        z, u, params, grad = make(shape, seeds=seeds, dtype=torch.float32, device=device)
        torch.library.opcheck(torch.ops.ladderfast.combinator.default, (z, u, params, True))
        torch.library.opcheck(torch.ops.ladderfast.combinator_backward.default, (grad, z, u, params, False))
    z = z.transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(RuntimeError, match="contiguous or channels-last"):
        torch.ops.ladderfast.combinator(z[..., ::2], z[..., ::2], params[..., ::2], False)


def test_opcheck_triton(target):
    if target.backend != "triton":
        pytest.skip("the Triton ops")
    from ladderfast.triton.combinator import combinator_backward_triton, combinator_triton

    z, u, params, grad = make((6, 3), dtype=torch.float32, device=target.device)
    checks = ["test_schema"]
    if target.device == "cuda":  # the interpreter cannot run on fake tensors
        checks.append("test_faketensor")
    torch.library.opcheck(combinator_triton, (z, u, params, 1), test_utils=checks)
    torch.library.opcheck(combinator_backward_triton, (grad, z, u, params, 0), test_utils=checks)


def test_compile_fullgraph(target):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")

    def function(z, u, params, squash_v):
        return gaussian_combinator(z * 2, u, params, squash_v=squash_v) + 1

    compiled = torch.compile(function, fullgraph=True)
    for squash_v in (False, True):
        data = make((6, 3), dtype=torch.float32, device=target.device)
        for a, b in zip(
            run(compiled, *data, squash_v=squash_v), run(function, *data, squash_v=squash_v), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_autocast(target):
    """z and u are promoted; parameters stay in float32; the op's result has the promoted dtype."""
    z, u, params, _ = make((6, 3), dtype=torch.float32, device=target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        mixed = gaussian_combinator(z.bfloat16(), u, params)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, gaussian_combinator(z.bfloat16().float(), u, params))
    if torch.bfloat16 in target.dtypes:
        with torch.autocast(target.device, dtype=torch.bfloat16):
            assert gaussian_combinator(z.bfloat16(), u.bfloat16(), params).dtype == torch.bfloat16


def test_half_on_the_cpu_is_the_reference_rounded_once():
    z, u, params, grad = make((6, 3), dtype=torch.bfloat16)
    exact = run(reference.gaussian_combinator, *(t.float() for t in (z, u, params, grad)))
    for a, b in zip(run(gaussian_combinator, z, u, params, grad), exact, strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=0.01, atol=0.01)
    assert gaussian_combinator(z, u, params.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["no", 1, None])
def test_squash_v_is_a_bool(value):
    z, u, params, _ = make((4, 3), dtype=torch.float32)
    got = type(value).__name__
    for name in (None, "reference"):
        with (
            ladderfast.use_backend(name),
            pytest.raises(TypeError, match=f"gaussian_combinator: squash_v must be a bool; got {got}"),
        ):
            gaussian_combinator(z, u, params, squash_v=value)


BAD = [
    (lambda z, u, p: (z.int(), u, p), TypeError, r"z must be float32.*got torch.int32"),
    (lambda z, u, p: (z.to_sparse(), u, p), TypeError, r"z must be a dense tensor; got .* torch.sparse_coo"),
    (lambda z, u, p: (z, u.to_sparse(), p), TypeError, r"u must be a dense tensor; got .* torch.sparse_coo"),
    (lambda z, u, p: (z.tolist(), u, p), TypeError, r"z must be a tensor; got list"),
    (
        lambda z, u, p: (z, u.double(), p),
        TypeError,
        r"u must have the dtype of z, torch.float32; got torch.float64",
    ),
    (lambda z, u, p: (z, u, p.double()), TypeError, r"params must be torch.float32.*got torch.float64"),
    (lambda z, u, p: (z, u[:2], p), ValueError, r"u must have the shape of z, \(4, 3\); got \(2, 3\)"),
    (lambda z, u, p: (z, u, p[:9]), ValueError, r"params must have shape \(10, C\).*got \(9, 3\)"),
    (lambda z, u, p: (z, u, p[:, :2]), ValueError, r"params must have shape \(10, 3\).*got \(10, 2\)"),
    (lambda z, u, p: (z, u, p.flatten()), ValueError, r"params must have shape.*got \(30,\)"),
    (lambda z, u, p: (z[0], u[0], p), ValueError, r"z must have shape \(N, C, \*\); got \(3,\)"),
    (
        lambda z, u, p: (z[None], u[None], p.expand(2, 10, 3)),
        ValueError,
        r"params must have.*\(1, 10, 3\).*got \(2, 10, 3\)",
    ),
    (lambda z, u, p: (z, u, p.to("meta")), ValueError, r"params must be on the device of z, cpu; got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_errors_name_the_argument(change, error, message):
    z, u, params, _ = make((4, 3), dtype=torch.float32)
    for name in ("reference", "cpu", "triton"):
        if backend.unavailable(name, "cpu", torch.float32) is None:
            with ladderfast.use_backend(name), pytest.raises(error, match="gaussian_combinator: " + message):
                gaussian_combinator(*change(z, u, params))


def test_errors_are_the_same_under_autocast():
    z, u, params, _ = make((4, 3), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="u must be a tensor; got list"):
            gaussian_combinator(z, u.tolist(), params)
        with pytest.raises(TypeError, match=r"z must be float32.*got torch.int32"):
            gaussian_combinator(z.int(), u, params)


def test_meta_tensors_have_shapes():
    z = torch.empty(4, 3, device="meta")
    assert gaussian_combinator(z, z, torch.empty(10, 3, device="meta")).shape == (4, 3)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    """One binary: each instruction set up to this machine's gives the reference's values."""
    code = (
        "import torch, ladderfast._C as c\n"
        "from tests.conftest import Target\n"
        "from tests.ops.test_combinator import *\n"
        "for shape in SHAPES:\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        for squash_v in (False, True):\n"
        "            data = make(shape, dtype=dtype)\n"
        "            ours = run(gaussian_combinator, *data, squash_v=squash_v)\n"
        "            assert_as_good_as_torch(ours, *data, squash_v=squash_v)\n"
        "test_saturation_is_finite(Target('cpu', 'cpu', ()))\n"
        "for bad in (math.inf, math.nan, 1e4):\n"
        "    test_extremes_stay_where_they_are(Target('cpu', 'cpu', ()), (40, 20), bad, False)\n"
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
    run(gaussian_combinator, *data)
    gc.collect()
    before = sum(isinstance(o, Tensor) for o in gc.get_objects())
    for _ in range(20):
        run(gaussian_combinator, *data)
    gc.collect()
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= before

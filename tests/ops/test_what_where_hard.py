"""where_max_pool2d and where_max_unpool2d on every backend, bit by bit as torch's own max_pool2d and max_unpool2d."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from test_what_where import CASES, EMPTY, draw, in_layout, leaf, name_of
from torch import Tensor
from torch.nn import functional

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, where_max_pool2d, where_max_unpool2d
from ladderfast.reference import what_where as reference

LAYOUTS = ["contiguous", "channels_last"]


def rough(shape, dtype=torch.float32, device="cpu") -> Tensor:
    """Few values, so that many are equal, and among them NaN and infinities."""
    z = torch.randint(-2, 3, shape).double()
    for value in (math.nan, -math.inf, math.inf):
        z[torch.rand(shape) < 0.08] = value
    return z.to(dtype=dtype, device=device)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is NaN."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


@contextmanager
def torch_as_it_is():
    """torch has no max_unpool2d where it is to be deterministic, which poisoned memory asks for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


@torch_as_it_is()
def run_torch(z: Tensor, what: Tensor, grad_what: Tensor, grad_z: Tensor, kernel_size) -> dict[str, Tensor]:
    """Both directions and their gradients, by torch."""
    z, what = leaf(z), leaf(what)
    pooled, where = functional.max_pool2d(z, kernel_size, return_indices=True)
    put = functional.max_unpool2d(what, where, kernel_size, output_size=z.shape[2:])
    return {
        "pooled": pooled.detach(),
        "where": where,
        "grad_z": torch.autograd.grad(pooled, z, grad_what)[0],
        "put": put.detach(),
        "grad_what": torch.autograd.grad(put, what, grad_z)[0],
    }


def run(z, what, grad_what, grad_z, kernel_size, positions) -> dict[str, Tensor]:
    z, what = leaf(z), leaf(what)
    pooled, where = where_max_pool2d(z, kernel_size, positions=positions)
    put = where_max_unpool2d(what, where, kernel_size, tuple(z.shape[2:]))
    return {
        "pooled": pooled.detach(),
        "where": where,
        "grad_z": torch.autograd.grad(pooled, z, grad_what)[0],
        "put": put.detach(),
        "grad_what": torch.autograd.grad(put, what, grad_z)[0],
    }


def numbers_of(positions: Tensor, case) -> Tensor:
    """Numbers of elements in windows, from positions in channels."""
    (_, _, _, width), (rows, columns) = case
    numbers = positions // width % rows * columns + positions % width % columns
    return numbers.to(torch.uint8)


def make(case, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, a what to put, and gradients of what and z."""
    (n, c, height, width), (rows, columns) = case
    small = (n, c, height // rows, width // columns)
    z = rough((n, c, height, width), dtype, device)
    return z, *(draw(s, dtype, device) for s in (small, small, z.shape))


def check(case, data) -> None:
    """Every result is torch's, where says the same in both of its forms, and memory formats are kept."""
    theirs = run_torch(*data, case[1])
    for positions in (False, True):
        ours = run(*data, case[1], positions)
        where = theirs.pop("where") if positions else numbers_of(theirs["where"], case)
        assert ours["where"].dtype == (torch.int64 if positions else torch.uint8)
        assert torch.equal(ours.pop("where"), where), "where"
        for name, value in theirs.items():
            if name != "where":
                assert same(ours[name], value), f"{name}, {positions=}"


def test_by_hand(target):
    """The first of equal maxima, row by row; the last NaN; -inf throughout is at the first element."""
    inf, nan = math.inf, math.nan
    z = torch.tensor([[1.0, 2, 5, 0, nan, 9, -inf, -inf, 7], [3, 3, 0, 5, 1, nan, -inf, -inf, 8]])
    z = z.to(target.device)[None, None]
    what, where = where_max_pool2d(z, 2)
    assert str(what.flatten().tolist()) == "[3.0, 5.0, nan, -inf]"
    assert where.flatten().tolist() == [2, 0, 3, 0]
    assert where_max_pool2d(z, 2, positions=True)[1].flatten().tolist() == [9, 2, 14, 6]
    out = where_max_unpool2d(torch.arange(1.0, 5, device=target.device).view(1, 1, 1, 4), where, 2, (2, 9))
    assert out[0, 0].tolist() == [[0, 0, 2, 0, 0, 0, 4, 0, 0], [1, 0, 0, 0, 0, 3, 0, 0, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.usefixtures("poisoned")
def test_as_torch(target, case, layout):
    for dtype in target.dtypes:
        check(case, in_layout(layout, *make(case, dtype, target.device)))


@pytest.mark.parametrize("case", EMPTY, ids=name_of)
def test_empty(target, case):
    z, what, grad_what, grad_z = make(case, device=target.device)
    ours = run(z, what, grad_what, grad_z, case[1], False)
    assert ours["pooled"].shape == ours["where"].shape == ours["grad_what"].shape == what.shape
    assert ours["grad_z"].shape == ours["put"].shape == z.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(40, 90), (21, 47)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_window(target, size, layout):
    """Each kernel from 1 to 16, in sizes that some divide and some do not."""
    if target.backend in ("reference", "triton"):
        pytest.skip("how C++ kernels take windows apart")
    for k in range(1, 17):
        for kernel_size in ((k, k), (2, k), (k, 1)):
            case = ((1, 2, *size), kernel_size)
            check(case, in_layout(layout, *make(case, device=target.device)))


@pytest.mark.usefixtures("poisoned")
def test_the_rest_is_left_out(target):
    """Rows and columns that fill no window change nothing, NaN or not; they are put to 0 and have gradient 0."""
    case = ((2, 3, 11, 26), (4, 3))
    z, what, grad_what, grad_z = make(case, device=target.device)
    whole = [t[:, :, :8, :24].contiguous() for t in (z, grad_z)]
    cropped = run(whole[0], what, grad_what, whole[1], case[1], False)
    z[:, :, 8:] = math.nan
    z[:, :, :, 24:] = math.inf
    for layout in LAYOUTS:
        ours = run(*in_layout(layout, z, what, grad_what, grad_z), case[1], False)
        for name, value in cropped.items():
            inner, rest = ours[name], None
            if name in ("grad_z", "put"):
                rest = torch.cat([ours[name][:, :, 8:].flatten(), ours[name][:, :, :, 24:].flatten()])
                inner = ours[name][:, :, :8, :24]
                assert not rest.any()
            assert same(inner.float(), value.float()), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [(2, 2), (3, 2), (2, 16)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_places_outside_the_window(target, kernel_size, layout):
    """Nothing is put anywhere, and the gradient is 0; the other windows get what is theirs."""
    (rows, columns), (h, w) = kernel_size, (5, 6)
    height, width = h * rows + 1, w * columns + 1
    case = ((2, 18, height, width), kernel_size)
    z, what, _, grad_z = make(case, device=target.device)
    for positions in (False, True):
        where = where_max_pool2d(z, kernel_size, positions=positions)[1]
        # Each one in the second window of the second row of windows, whose first element is at `start`.
        start = rows * width + columns
        wrong = [rows * columns, 255] if not positions else None
        if positions:
            wrong = [start - 1, start + columns, start - width, start + rows * width, start + width * height]
            wrong += [-1, -width * height, 2**40, -(2**40), 2**31 + start]
        for value in wrong:
            bad = where.clone()
            bad[1, 17, 1, 1] = value
            struck = in_layout(layout, what, bad, grad_z)
            m = leaf(struck[0])
            out = where_max_unpool2d(m, struck[1], kernel_size, (height, width))
            grad = torch.autograd.grad(out, m, struck[2])[0]
            emptied = what.clone()
            emptied[1, 17, 1, 1] = 0
            assert torch.equal(out, where_max_unpool2d(emptied, where, kernel_size, (height, width))), value
            assert grad[1, 17, 1, 1] == 0, value
            assert grad.count_nonzero() == grad.numel() - 1, value


@pytest.mark.parametrize("which", ["mixed", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_strides(target, which, positions):
    case = ((4, 6, 6, 8), (2, 2))
    z, what, grad_what, grad_z = make(case, device=target.device)
    where = where_max_pool2d(z, 2, positions=positions)[1]

    def strange(t, mix):
        if which == "mixed":
            return in_layout("channels_last", t)[0] if mix else t
        if which == "transposed":
            return t.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
        if which == "sliced":
            return torch.stack([t, t], 2)[:, :, 0]
        return t[:1].expand(4, -1, -1, -1)

    def results(z, what, where, grad_what, grad_z):
        z, what = z.detach().requires_grad_(), what.detach().requires_grad_()
        pooled, found = where_max_pool2d(z, 2, positions=positions)
        put = where_max_unpool2d(what, where, 2)
        (of_z,) = torch.autograd.grad(pooled, z, grad_what)
        return pooled.detach(), found, of_z, put.detach(), *torch.autograd.grad(put, what, grad_z)

    for order in (0, 1):
        data = [strange(t, i % 2 == order) for i, t in enumerate((z, what, where, grad_what, grad_z))]
        plain = [t.contiguous() for t in data]
        for a, b in zip(results(*data), results(*plain), strict=True):
            assert same(a.double(), b.double())


def test_memory_format_is_kept(target):
    if target.backend == "reference":
        pytest.skip("the kernels; the reference leaves it to torch")
    z = in_layout("channels_last", draw((2, 6, 4, 8), torch.float32, target.device))[0].requires_grad_()
    what, where = where_max_pool2d(z, 2)
    out = where_max_unpool2d(what, where, 2)
    (grad,) = torch.autograd.grad(what.sum(), z)  # a gradient whose strides say nothing
    for t in (what, where, out, grad):
        assert t.is_contiguous(memory_format=torch.channels_last)


def test_gradcheck_and_gradgradcheck():
    """Finite differences, first and second order, through the kernels in float64."""
    for case in (((1, 2, 4, 6), (2, 2)), ((1, 1, 7, 5), (3, 2))):
        z = draw(case[0]).requires_grad_()
        for positions in (False, True):
            what, where = where_max_pool2d(z, case[1], positions=positions)
            assert not where.requires_grad

            def pool(z, case=case, positions=positions):
                return where_max_pool2d(z, case[1], positions=positions)[0]

            def unpool(what, case=case, where=where):
                return where_max_unpool2d(what, where, case[1], case[0][2:])

            for function, x in ((pool, z), (unpool, what.detach().requires_grad_())):
                assert torch.autograd.gradcheck(function, x)
                assert torch.autograd.gradgradcheck(function, x)


def test_higher_derivatives(target):
    """The third one of a function that goes through both."""
    z = torch.randn(1, 2, 4, 6, device=target.device)

    def third(pool, unpool):
        x = z.clone().requires_grad_()
        what, where = pool(x, (2, 3))
        loss = (unpool(what**2, where, (2, 3), (4, 6)) * x).pow(2).sum()
        for _ in range(2):
            loss = torch.autograd.grad(loss, x, create_graph=True)[0].pow(2).sum()
        return torch.autograd.grad(loss, x)[0]

    def torch_pool(x, k):
        return functional.max_pool2d(x, k, return_indices=True)

    def torch_unpool(what, where, k, size):
        return functional.max_unpool2d(what, where, k, output_size=size)

    torch.testing.assert_close(
        third(where_max_pool2d, where_max_unpool2d), third(torch_pool, torch_unpool), rtol=1e-4, atol=1e-4
    )


def test_backward_keeps_only_where(target):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: list[Tensor] = []
    z = draw((2, 3, 4, 4), torch.float32, target.device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        what, where = where_max_pool2d(z, 2)
        where_max_unpool2d(what, where, 2)
    assert {t.data_ptr() for t in kept} == {where.data_ptr()}
    assert where.nbytes == what.numel()


@pytest.mark.parametrize(
    "case", [((4, 8, 64, 64), (2, 2)), ((4, 20, 60, 61), (3, 3)), ((40, 32, 32, 32), (16, 16))], ids=name_of
)
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, case):
    """From run to run and for one and two threads."""
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    data = make(case, device=target.device)
    for positions in (False, True):
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(run(*data, case[1], positions))
        for other in runs[1:]:
            for name, value in other.items():
                assert same(value.double(), runs[0][name].double())


@pytest.mark.parametrize("positions", [False, True])
def test_vmap(target, positions):
    """torch.func over an axis of seeds, and nested, without the fallback that goes through them one by one."""
    z, size = torch.randn(3, 2, 2, 4, 7, device=target.device), (4, 7)
    vmap, grad = torch.func.vmap, torch.func.grad

    def ours(z):
        what, where = where_max_pool2d(z, (2, 3), positions=positions)
        return where_max_unpool2d(what**2, where, (2, 3), size)

    def exact(z):
        what, where = functional.max_pool2d(z, (2, 3), return_indices=True)
        return functional.max_unpool2d(what**2, where, (2, 3), output_size=size)

    def loss(function):
        return lambda z: function(z).pow(2).sum()

    def one_by_one(function, z):
        return torch.stack([function(part) for part in z])

    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        for transform in (lambda f: f, lambda f: grad(loss(f))):
            torch.testing.assert_close(vmap(transform(ours))(z), one_by_one(transform(exact), z))
            over_rows = vmap(transform(ours), 1, 1)(z)
            torch.testing.assert_close(over_rows, one_by_one(transform(exact), z.movedim(1, 0)).movedim(0, 1))
            twice = torch.stack([z, -z])
            nested = vmap(vmap(transform(ours)))(twice)
            torch.testing.assert_close(nested, torch.stack([one_by_one(transform(exact), t) for t in twice]))
        what, where = where_max_pool2d(z.flatten(0, 1), (2, 3), positions=positions)
        what, where = what.unflatten(0, (3, 2)), where.unflatten(0, (3, 2))

        def put(what, where):
            return where_max_unpool2d(what, where, (2, 3), size)

        def slope(what, where):
            return grad(lambda m: put(m, where).pow(2).sum())(what)

        for function in (put, slope):
            each = torch.stack([function(m, where[0]) for m in what])
            torch.testing.assert_close(vmap(function, (0, None))(what, where[0]), each)
            each = torch.stack([function(what[0], p) for p in where])
            torch.testing.assert_close(vmap(function, (None, 0))(what[0], where), each)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(enabled)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", [False, True])
def test_opcheck(layout, positions):
    case = ((2, 3, 5, 7), (2, 3))
    what, grad_what, grad_z = in_layout(layout, *make(case)[1:])
    z = torch.randn_like(grad_z)  # NaN would differ from itself
    where = where_max_pool2d(z, case[1], positions=positions)[1]
    ops, check = torch.ops.ladderfast, torch.library.opcheck
    check(ops.where_max_pool2d.default, (z, 2, 3, positions))
    for other in LAYOUTS:
        (swapped,) = in_layout(other, where)
        check(ops.where_max_pool2d_backward.default, (grad_what, swapped, 2, 3, 5, 7))
        check(ops.where_max_unpool2d.default, (what, swapped, 2, 3, 5, 7))
        check(ops.where_max_unpool2d_backward.default, (grad_z, swapped, 2, 3))


def test_opcheck_triton(target):
    if target.backend != "triton":
        pytest.skip("the Triton ops")
    from ladderfast.triton import what_where as ops

    z, what, grad_what, grad_z = make(((2, 3, 5, 7), (2, 3)), device=target.device)
    checks = ["test_schema"]
    if target.device == "cuda":  # the interpreter cannot run on fake tensors
        checks.append("test_faketensor")
    for positions in (False, True):
        where = where_max_pool2d(z, (2, 3), positions=positions)[1]
        for op, inputs in (
            (ops.where_max_pool2d_triton, (z, 2, 3, positions)),
            (ops.where_max_pool2d_backward_triton, (grad_what, where, 2, 3, 5, 7)),
            (ops.where_max_unpool2d_triton, (what, where, 2, 3, 5, 7)),
            (ops.where_max_unpool2d_backward_triton, (grad_z, where, 2, 3)),
        ):
            torch.library.opcheck(op, inputs, test_utils=checks)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_the_ops_protect_the_kernels():
    z, what, grad_what, grad_z = make(((2, 4, 4, 6), (2, 2)))
    where = where_max_pool2d(z, 2)[1]
    ops = torch.ops.ladderfast
    with pytest.raises(RuntimeError, match="z must be contiguous or channels-last"):
        ops.where_max_pool2d(z[:, ::2], 2, 2, False)
    with pytest.raises(RuntimeError, match="kernel sizes must be from 1 to 16"):
        ops.where_max_pool2d(z, 2, 17, False)
    with pytest.raises(RuntimeError, match="float32 and float64"):
        ops.where_max_pool2d(z.bfloat16(), 2, 2, False)
    with pytest.raises(RuntimeError, match="grad_what must have the fitting shape"):
        ops.where_max_pool2d_backward(grad_what[:1], where, 2, 2, 4, 6)
    with pytest.raises(RuntimeError, match="where must have the fitting shape"):
        ops.where_max_unpool2d(what, where[:1], 2, 2, 4, 6)
    with pytest.raises(RuntimeError, match="where must be uint8 or int64"):
        ops.where_max_unpool2d(what, where.int(), 2, 2, 4, 6)
    with pytest.raises(RuntimeError, match="height and width must be those"):
        ops.where_max_unpool2d(what, where, 2, 2, 4, 8)
    with pytest.raises(RuntimeError, match="where must have the fitting shape"):
        ops.where_max_unpool2d_backward(grad_z[:1], where, 2, 2)


def test_compile_fullgraph(target):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")

    def function(z):
        what, where = where_max_pool2d(z * 2, 2)
        return where_max_unpool2d(what + 1, where, 2, (5, 4)), where

    compiled = torch.compile(function, fullgraph=True)
    for layout in LAYOUTS:
        (z,) = in_layout(layout, draw((2, 3, 5, 4), torch.float32, target.device))
        grad = torch.randn_like(z)
        results = []
        for f in (compiled, function):
            x = leaf(z)
            out, where = f(x)
            results.append((out.detach(), where, *torch.autograd.grad(out, x, grad)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_on_the_cpu_is_exact(dtype):
    for case in CASES[4:8]:
        check(case, make(case, dtype))


def test_autocast_leaves_dtypes_alone(target):
    z = draw((2, 3, 4, 4), torch.float32, target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        what, where = where_max_pool2d(z, 2)
        assert what.dtype == where_max_unpool2d(what, where, 2).dtype == torch.float32


BAD_POOL = [
    (lambda z: (z.int(), 2), TypeError, r"z must be float32.*got torch.int32"),
    (lambda z: (z[0], 2), ValueError, r"z must have shape \(N, C, H, W\); got \(3, 4, 6\)"),
    (lambda z: (z, 5), ValueError, r"z must hold a window of \(5, 5\); got \(2, 3, 4, 6\)"),
    (lambda z: (z, 17), ValueError, r"kernel_size must be from 1 to 16; got 17"),
]
BAD_UNPOOL = [
    (lambda m, p: (m.int(), p, 2), TypeError, r"what must be float32.*got torch.int32"),
    (lambda m, p: (m, p.tolist(), 2), TypeError, r"where must be a tensor; got list"),
    (lambda m, p: (m, p.int(), 2), TypeError, r"where must be torch.uint8 or torch.int64; got torch.int32"),
    (lambda m, p: (m[0], p, 2), ValueError, r"what must have shape \(N, C, h, w\); got \(3, 2, 3\)"),
    (lambda m, p: (m, p[:1], 2), ValueError, r"where must have the shape of what, \(2, 3, 2, 3\); got \(1, "),
    (lambda m, p: (m, p.to("meta"), 2), ValueError, r"where must be on the device of what, cpu; got meta"),
    (lambda m, p: (m, p, 0), ValueError, r"kernel_size must be from 1 to 16; got 0"),
    (
        lambda m, p: (m, p, 2, (4, 8)),
        ValueError,
        r"output_size .* \(2, 3\) windows of \(2, 2\); got \(4, 8\)",
    ),
    (
        lambda m, p: (m, p, 2, (3, 6)),
        ValueError,
        r"output_size .* \(2, 3\) windows of \(2, 2\); got \(3, 6\)",
    ),
    (lambda m, p: (m, p, 2, 4), TypeError, r"output_size must be a pair of ints; got 4"),
    (lambda m, p: (m, p, 2, (4, 6.0)), TypeError, r"output_size must be a pair of ints; got \(4, 6.0\)"),
]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_errors_name_the_argument(name):
    if backend.unavailable(name, "cpu", torch.float32) is not None:
        pytest.skip(f"no {name}")
    z = draw((2, 3, 4, 6), torch.float32)
    what, where = reference.where_max_pool2d(z, (2, 2))
    with ladderfast.use_backend(name):
        for change, error, message in BAD_POOL:
            with pytest.raises(error, match="where_max_pool2d: " + message):
                where_max_pool2d(*change(z))
        with pytest.raises(TypeError, match="where_max_pool2d: positions must be a bool; got int"):
            where_max_pool2d(z, 2, positions=1)
        for change, error, message in BAD_UNPOOL:
            with pytest.raises(error, match="where_max_unpool2d: " + message):
                where_max_unpool2d(*change(what, where))


def test_meta_tensors_have_shapes():
    z = torch.empty(2, 3, 9, 8, device="meta")
    what, where = where_max_pool2d(z, (2, 4))
    assert what.shape == where.shape == (2, 3, 4, 2)
    assert where.dtype == torch.uint8
    assert where_max_unpool2d(what, where, (2, 4), (9, 8)).shape == (2, 3, 9, 8)


GUARDED = r"""
import ctypes, mmap, sys
sys.path[:0] = ["tests/ops"]
import torch
from ladderfast.ops import soft_pool2d, soft_unpool2d, where_max_pool2d, where_max_unpool2d
from test_what_where import CASES

libc, held = ctypes.CDLL(None, use_errno=True), []

def guarded(t):
    "t's values in memory that ends where nobody may read."
    t = t.detach()
    if not t.is_contiguous():  # channels-last
        return guarded(t.movedim(1, -1)).movedim(-1, 1)
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    held.append(memory)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape)
    return copy.copy_(t)

ops = torch.ops.ladderfast
for (shape, (k, l)) in CASES:
    for last in (False, True):
        z = torch.randn(shape)
        z = guarded(z.contiguous(memory_format=torch.channels_last) if last else z)
        what, place = (guarded(t) for t in soft_pool2d(z, (k, l), 1.0))
        ops.soft_pool2d_backward(what, place, z, k, l, 1.0)
        soft_unpool2d(what, place, (k, l))
        h, w = what.shape[2:]
        whole = guarded(z[:, :, : h * k, : w * l].contiguous())
        ops.soft_unpool2d_backward(whole, what, place, k, l)
        for positions in (False, True):
            most, where = (guarded(t) for t in where_max_pool2d(z, (k, l), positions=positions))
            where_max_unpool2d(most, where, (k, l), tuple(z.shape[2:]))
            ops.where_max_unpool2d_backward(z, where, k, l)
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_nothing_is_read_beyond_the_end(isa):
    """Inputs end where a page begins that cannot be read: a process that does is killed."""
    env = {**os.environ, "LADDERFAST_ISA": isa, "LADDERFAST_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", f"{done.returncode} {done.stderr[-1000:]}"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    """One binary: each instruction set up to this machine's gives torch's values."""
    code = (
        "import sys, torch, ladderfast._C as c\n"
        "sys.path[:0] = ['tests/ops']\n"
        "from test_what_where_hard import *\n"
        "for case in CASES:\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        for layout in LAYOUTS:\n"
        "            check(case, in_layout(layout, *make(case, dtype)))\n"
        "print(c.instruction_set())\n"
    )
    env = {**os.environ, "LADDERFAST_ISA": isa, "LADDERFAST_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    best = _extension.module.instruction_set()  # of this process: the machine's own
    order = ["baseline", "avx2", "avx512"]
    assert done.stdout.strip() == order[min(order.index(isa), order.index(best))]

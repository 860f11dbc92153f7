"""soft_pool2d and soft_unpool2d on every backend, against loops over the formulas, the float64 reference and torch's
own pooling."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, soft_pool2d, soft_unpool2d
from ladderfast.reference import what_where as reference

CASES = [
    ((1, 1, 1, 1), (1, 1)),  # one element
    ((1, 1, 2, 2), (2, 2)),  # one window
    ((2, 3, 8, 8), (2, 2)),  # rows of windows shorter than a vector
    ((1, 5, 32, 32), (2, 2)),  # rows that are whole vectors
    ((1, 2, 8, 42), (2, 2)),  # a row's last vector overlaps the one before
    ((2, 3, 7, 11), (2, 2)),  # a row and a column that fill no window
    ((2, 3, 5, 33), (2, 2)),  # the same, in rows of windows that are whole vectors
    ((2, 15, 4, 6), (2, 2)),  # one channel less than a vector
    ((2, 20, 6, 9), (2, 2)),  # more channels than a vector, no multiple of it
    ((2, 16, 6, 4), (3, 2)),  # channels that are whole vectors
    ((1, 3, 10, 13), (3, 3)),  # an odd window, and a rest
    ((1, 2, 9, 67), (4, 4)),
    ((3, 1, 16, 32), (8, 8)),
    ((5, 2, 32, 32), (16, 16)),  # windows that span channels in a vector, and a last vector that is not full
    ((2, 3, 16, 20), (16, 7)),
    ((1, 2, 3, 50), (1, 2)),  # windows of one row
    ((1, 2, 40, 3), (4, 1)),  # and of one column
]
EMPTY = [((0, 3, 4, 4), (2, 2)), ((2, 0, 4, 4), (2, 2))]
BETAS = [0.0, 1.0, 100.0, 1e4]


def name_of(case) -> str:
    return "x".join(map(str, case[0])) + "-" + "x".join(map(str, case[1]))


def draw(shape, dtype=torch.float64, device="cpu") -> Tensor:
    """Drawn in float64 and rounded to `dtype`."""
    return torch.randn(shape, dtype=torch.float64).to(dtype=dtype, device=device)


def make_pool(case, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """z and gradients of what and where."""
    (n, c, height, width), (rows, columns) = case
    h, w = height // rows, width // columns
    return tuple(draw(s, dtype, device) for s in ((n, c, height, width), (n, c, h, w), (n, c, 2, h, w)))


def make_unpool(case, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """what, where (one in five beyond [-1, 1]) and a gradient."""
    (n, c, height, width), (rows, columns) = case
    h, w = height // rows, width // columns
    where = 2.5 * torch.rand(n, c, 2, h, w, dtype=torch.float64) - 1.25
    what, grad = draw((n, c, h, w), dtype, device), draw((n, c, h * rows, w * columns), dtype, device)
    return what, where.to(dtype=dtype, device=device), grad


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def run_pool(function, z, grad_what, grad_where, kernel_size, beta) -> list[Tensor]:
    """what, where and the gradient with respect to z."""
    z = leaf(z)
    out = function(z, kernel_size, beta)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, z, (grad_what, grad_where))]


def run_unpool(function, what, where, grad, kernel_size) -> list[Tensor]:
    """The unpooled tensor and the gradients with respect to what and where."""
    inputs = [leaf(what), leaf(where)]
    out = function(*inputs, kernel_size)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_within(name: str, ours: Tensor, plain: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype.

    Plain PyTorch may be right by luck where there are few elements, so one rounding of the largest term that is summed
    on the way is allowed as well (four in float64, whose yardstick is rounded itself).
    """
    assert ours.shape == exact.shape, name
    assert ours.dtype == plain.dtype, name
    if exact.numel() == 0:
        return
    rounding = torch.finfo(ours.dtype).eps * terms.max() * (4 if ours.dtype == torch.float64 else 1)
    error, allowed = (ours.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max() + rounding
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_pool_as_good_as_torch(ours: list[Tensor], z, grad_what, grad_where, kernel_size, beta) -> None:
    wide = [t.double() for t in (z, grad_what, grad_where)]
    exact = run_pool(reference.soft_pool2d, *wide, kernel_size, beta)
    plain = run_pool(reference.soft_pool2d, z, grad_what, grad_where, kernel_size, beta)
    # The sizes of the terms: of z and of coordinates in the values, of their differences times beta in the gradient.
    weights = reference._soft_weights(reference._windows(wide[0], kernel_size), beta)
    sizes = wide[0].abs().amax() if z.numel() else torch.zeros(())
    sharp = (
        (grad_what.abs() * (1 + 2 * beta * sizes))[:, :, :, None, :, None]
        + 2 * beta * grad_where.abs().sum(2)[:, :, :, None, :, None]
    ) * weights
    for name, *rest in zip(
        ("what", "where", "grad_z"), ours, plain, exact, (sizes, torch.ones(()), sharp), strict=True
    ):
        assert_within(name, *rest)


def assert_unpool_as_good_as_torch(ours: list[Tensor], what, where, grad, kernel_size) -> None:
    wide = [t.double() for t in (what, where, grad)]
    exact = run_unpool(reference.soft_unpool2d, *wide, kernel_size)
    plain = run_unpool(reference.soft_unpool2d, what, where, grad, kernel_size)
    if not what.numel():
        sizes = [torch.zeros(())] * 3
    else:
        # A place is rounded in the scale of the window.
        m, g, far = wide[0].abs().max(), wide[2].abs().max(), max(kernel_size)
        sizes = [m * far, 4 * g * far, 4 * m * g * far * far]
    for name, *rest in zip(("z", "grad_what", "grad_where"), ours, plain, exact, sizes, strict=True):
        assert_within(name, *rest)


def in_layout(layout: str, *tensors: Tensor) -> list[Tensor]:
    if layout == "contiguous":
        return list(tensors)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return [t.contiguous(memory_format=formats[t.dim()]) for t in tensors]


# The reference.


def pool_by_loops(z: Tensor, rows: int, columns: int, beta: float) -> tuple[Tensor, Tensor]:
    """Equations 3 and 4, one window and one element at a time."""
    n, c, height, width = z.shape
    h, w = height // rows, width // columns
    what, where = torch.empty(n, c, h, w).double(), torch.empty(n, c, 2, h, w).double()
    for a, b, i, j in ((a, b, i, j) for a in range(n) for b in range(c) for i in range(h) for j in range(w)):
        total = m = px = py = 0.0
        for r in range(rows):
            for s in range(columns):
                value = z[a, b, i * rows + r, j * columns + s].item()
                e = math.exp(beta * value)
                total, m = total + e, m + value * e
                px += e * (0 if columns == 1 else -1 + 2 * s / (columns - 1))
                py += e * (0 if rows == 1 else -1 + 2 * r / (rows - 1))
        what[a, b, i, j], where[a, b, 0, i, j], where[a, b, 1, i, j] = m / total, px / total, py / total
    return what, where


def unpool_by_loops(what: Tensor, where: Tensor, rows: int, columns: int) -> Tensor:
    """Each pixel's share of what is the product of two hats around the place."""
    n, c, h, w = what.shape
    out = torch.zeros(n, c, h * rows, w * columns).double()
    for a, b, i, j in ((a, b, i, j) for a in range(n) for b in range(c) for i in range(h) for j in range(w)):
        x, y = (max(-1.0, min(1.0, t)) for t in where[a, b, :, i, j].tolist())
        for r in range(rows):
            for s in range(columns):
                across = max(0.0, 1 - abs(s - (x + 1) * (columns - 1) / 2))
                down = max(0.0, 1 - abs(r - (y + 1) * (rows - 1) / 2))
                out[a, b, i * rows + r, j * columns + s] = what[a, b, i, j] * across * down
    return out


@pytest.mark.parametrize("kernel_size", [(2, 2), (3, 2), (1, 4), (5, 7)], ids=str)
def test_reference_is_the_formula(kernel_size):
    z = draw((2, 2, 7, 8))
    for beta in (0.0, 2.0, 100.0):
        what, where = reference.soft_pool2d(z, kernel_size, beta)
        for ours, loops in zip((what, where), pool_by_loops(z, *kernel_size, beta), strict=True):
            torch.testing.assert_close(ours, loops, rtol=1e-12, atol=1e-12)
    what, where, _ = make_unpool(((2, 2, 10, 14), kernel_size))
    torch.testing.assert_close(
        reference.soft_unpool2d(what, where, kernel_size),
        unpool_by_loops(what, where, *kernel_size),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference_backward_is_that_of_autograd(case):
    kernel_size = case[1]
    for beta in (0.0, 1.0, 100.0):
        z, *grads = make_pool(case)
        ours = reference.soft_pool2d_backward(*grads, z, kernel_size, beta)
        torch.testing.assert_close(ours, run_pool(reference.soft_pool2d, z, *grads, kernel_size, beta)[2])
    what, where, grad = make_unpool(case)
    ours = reference.soft_unpool2d_backward(grad, what, where, kernel_size)
    for a, b in zip(
        ours, run_unpool(reference.soft_unpool2d, what, where, grad, kernel_size)[1:], strict=True
    ):
        torch.testing.assert_close(a, b)


# Every backend.


def test_hand_computed(target):
    """Weights 1, 3, 1, 1 of 6: what = ln 3 / 2, x = 4 / 6 - 2 / 6, y = 2 / 6 - 4 / 6. At (0.5, -1) in a window of 3 x 3
    two columns of the first row share what."""
    z = torch.tensor([[[[0.0, math.log(3)], [0.0, 0.0]]]], device=target.device)
    what, where = soft_pool2d(z, 2, 1)
    assert what.item() == pytest.approx(math.log(3) / 2, abs=1e-6)
    assert where.flatten().tolist() == pytest.approx([1 / 3, -1 / 3], abs=1e-6)
    what, where = torch.tensor([[[[2.0]]]]), torch.tensor([[[[[0.5]], [[-1.0]]]]])
    out = soft_unpool2d(what.to(target.device), where.to(target.device), 3)
    assert out.flatten().tolist() == pytest.approx([0, 1, 1, 0, 0, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES + EMPTY, ids=name_of)
@pytest.mark.usefixtures("poisoned")
def test_pool(target, case, layout):
    for dtype in target.dtypes:
        data = in_layout(layout, *make_pool(case, dtype, target.device))
        for beta in BETAS[1:3] if target.backend == "triton" else BETAS:
            ours = run_pool(soft_pool2d, *data, case[1], beta)
            assert_pool_as_good_as_torch(ours, *data, case[1], beta)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES + EMPTY, ids=name_of)
@pytest.mark.usefixtures("poisoned")
def test_unpool(target, case, layout):
    for dtype in target.dtypes:
        data = in_layout(layout, *make_unpool(case, dtype, target.device))
        assert_unpool_as_good_as_torch(run_unpool(soft_unpool2d, *data, case[1]), *data, case[1])


@pytest.mark.parametrize("size", [(40, 90), (21, 47)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_window(target, size):
    """Each kernel from 1 to 16, in sizes that some divide and some do not."""
    if target.backend in ("reference", "triton"):
        pytest.skip("how C++ kernels take windows apart")
    for k in range(1, 17):
        for kernel_size in ((k, k), (2, k)):
            case = ((1, 2, *size), kernel_size)
            data = make_pool(case, torch.float32, target.device)
            assert_pool_as_good_as_torch(
                run_pool(soft_pool2d, *data, kernel_size, 3.0), *data, kernel_size, 3.0
            )
            data = make_unpool(case, torch.float32, target.device)
            assert_unpool_as_good_as_torch(run_unpool(soft_unpool2d, *data, kernel_size), *data, kernel_size)


@pytest.mark.parametrize("kernel_size", [(2, 2), (3, 5), (16, 16)], ids=str)
def test_limits_in_beta(target, kernel_size):
    """beta = 0: the mean, and the window's centre. beta = 1e4: the maximum, and its place."""
    z = draw((2, 3, 32, 33), torch.float32, target.device)
    what, where = soft_pool2d(z, kernel_size, 0)
    torch.testing.assert_close(what, functional.avg_pool2d(z, kernel_size))
    torch.testing.assert_close(where, torch.zeros_like(where))
    z = (z * 100).round() / 100  # distinct values are far enough apart for beta, and some are equal
    z += torch.linspace(0, 0.005, 33, device=target.device)  # but not within a row
    z += torch.linspace(0, 0.002, 32, device=target.device)[:, None]
    what, where = soft_pool2d(z, kernel_size, 1e6)
    most, index = functional.max_pool2d(z, kernel_size, return_indices=True)
    torch.testing.assert_close(what, most)
    row = index // 33 % kernel_size[0] / (kernel_size[0] - 1) * 2 - 1
    column = index % 33 % kernel_size[1] / (kernel_size[1] - 1) * 2 - 1
    torch.testing.assert_close(where, torch.stack([column, row], 2), rtol=0, atol=1e-3)


def test_equal_maxima_share_the_place(target):
    z = torch.tensor([[5.0, 0, 0, 0], [0, 0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 0]], device=target.device)
    what, where = soft_pool2d(z[None, None], 4, 1e4)
    assert what.item() == 5
    assert where.flatten().tolist() == pytest.approx([-1, (-1 + 1 / 3) / 2], abs=1e-6)


@pytest.mark.usefixtures("poisoned")
def test_the_rest_is_left_out(target):
    """Rows and columns that fill no window change nothing, NaN or not, and have gradient 0."""
    z, grad_what, grad_where = make_pool(((2, 3, 11, 26), (4, 3)), torch.float32, target.device)
    cropped = run_pool(soft_pool2d, z[:, :, :8, :24].contiguous(), grad_what, grad_where, (4, 3), 2.0)
    z[:, :, 8:] = math.nan
    z[:, :, :, 24:] = math.nan
    for layout in ("contiguous", "channels_last"):
        z = in_layout(layout, z)[0]
        what, where, grad = run_pool(soft_pool2d, z, grad_what, grad_where, (4, 3), 2.0)
        torch.testing.assert_close([what, where, grad[:, :, :8, :24]], cropped)
        assert not grad[:, :, 8:].any()
        assert not grad[:, :, :, 24:].any()


def test_unpooling_puts_what_where_it_was(target):
    z = torch.zeros(2, 3, 12, 15, device=target.device)
    z[:, :, 1::4, 2::5] = torch.rand(2, 3, 3, 3, device=target.device) + 1
    torch.testing.assert_close(soft_unpool2d(*soft_pool2d(z, (4, 5), 1e4), (4, 5)), z)


@pytest.mark.parametrize("beta", [1e4, 1e6])
def test_large_values_do_not_overflow(target, beta):
    z = draw((1, 2, 8, 8), torch.float32, target.device)
    z[0, 0, ::3, ::2] *= 1e25
    z[0, 1] += 1e8
    grads = torch.randn_like(z[:, :, ::4, ::4]), torch.randn(1, 2, 2, 2, 2, device=target.device)
    what, where, grad = run_pool(soft_pool2d, z, *grads, 4, beta)
    torch.testing.assert_close(what, functional.max_pool2d(z, 4))
    assert where.abs().max() <= 1
    assert grad.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("k", [2, 3, 4, 7, 16])
def test_slopes_on_pixels(target, k, layout):
    """Sharp pooling puts places on pixels exactly. There, the slope of every backend is the same one of two."""
    at = (2 * torch.arange(k) - (k - 1)) / (k - 1)
    y, x = torch.meshgrid(at, at, indexing="ij")
    where = torch.stack([x, y])[None, None].repeat(1, 20, 1, 1, 1).to(target.device)
    what, grad = torch.ones_like(where[:, :, 0]), draw((1, 20, k * k, k * k), torch.float32, target.device)
    data = in_layout(layout, what, where, grad)
    assert_unpool_as_good_as_torch(run_unpool(soft_unpool2d, *data, (k, k)), *data, (k, k))
    windows = grad.unflatten(3, (k, k)).unflatten(2, (k, k))
    slope = run_unpool(soft_unpool2d, *data, (k, k))[2]
    for row, column, left in ((0, 0, 0), (k - 1, k - 1, k - 2), (k // 2, k // 2, min(k // 2, k - 2))):
        pixels = windows[:, :, row, row, column]
        expected = (pixels[..., left + 1] - pixels[..., left]) * (k - 1) / 2
        torch.testing.assert_close(slope[:, :, 0, row, column], expected, rtol=1e-4, atol=1e-4)


def test_places_beyond_the_window(target):
    """On the edge, with no slope towards it."""
    what = torch.tensor([[[[3.0]]]], device=target.device)
    where = torch.tensor([[[[[-7.0]], [[1.5]]]]], device=target.device)
    grad = torch.arange(9.0, device=target.device).view(1, 1, 3, 3)
    out, grad_what, grad_where = run_unpool(soft_unpool2d, what, where, grad, (3, 3))
    assert out.flatten().tolist() == [0, 0, 0, 0, 0, 0, 3, 0, 0]
    assert grad_what.item() == 6
    assert grad_where.flatten().tolist() == [0, 0]


@pytest.mark.parametrize("which", ["mixed", "transposed", "sliced", "expanded"])
@pytest.mark.usefixtures("poisoned")
def test_strides(target, which):
    case = ((4, 6, 6, 8), (2, 2))
    z, grad_what, grad_where = make_pool(case, torch.float32, target.device)
    what, where, grad = make_unpool(case, torch.float32, target.device)
    if which == "mixed":
        z, grad_what, where, grad = in_layout("channels_last", z, grad_what, where, grad)
    elif which == "transposed":
        z, grad_what, what, grad = (t.transpose(0, 1).transpose(2, 3) for t in (z, grad_what, what, grad))
        grad_where, where = (t.transpose(0, 1).transpose(3, 4) for t in (grad_where, where))
    elif which == "sliced":
        z, grad = z[:, ::2], grad[:, ::2]
        grad_what, grad_where, what, where = (t[:, ::2] for t in (grad_what, grad_where, what, where))
    else:
        z, grad = z[:1].expand(4, -1, -1, -1), grad.new_ones(()).expand(4, 6, 6, 8)
        grad_what, what = (t[:1].expand(4, -1, -1, -1) for t in (grad_what, what))
        grad_where, where = (t[:1].expand(4, -1, -1, -1, -1) for t in (grad_where, where))
    pool_inputs, unpool_inputs = (
        [z.detach().requires_grad_()],
        [t.detach().requires_grad_() for t in (what, where)],
    )
    out = soft_pool2d(*pool_inputs, 2, 3.0)
    ours = [*out, *torch.autograd.grad(out, pool_inputs, (grad_what, grad_where))]
    assert_pool_as_good_as_torch([t.detach() for t in ours], z, grad_what, grad_where, (2, 2), 3.0)
    out = soft_unpool2d(*unpool_inputs, 2)
    ours = [out, *torch.autograd.grad(out, unpool_inputs, grad)]
    assert_unpool_as_good_as_torch([t.detach() for t in ours], what, where, grad, (2, 2))


def test_memory_format_is_kept(target):
    if target.backend == "reference":
        pytest.skip("the kernels; the reference leaves it to torch")
    z = draw((2, 6, 4, 8), torch.float32, target.device).contiguous(memory_format=torch.channels_last)
    what, where = soft_pool2d(z, 2, 1.0)
    assert what.is_contiguous(memory_format=torch.channels_last)
    assert where.is_contiguous(memory_format=torch.channels_last_3d)
    assert soft_unpool2d(what, where, 2).is_contiguous(memory_format=torch.channels_last)


def test_gradcheck_and_gradgradcheck():
    """Finite differences, first and second order, through the kernels in float64."""
    for case in (((1, 2, 4, 6), (2, 2)), ((1, 1, 7, 5), (3, 2)), ((2, 1, 4, 3), (4, 1))):
        kernel_size = case[1]
        for beta in (0.0, 1.5):
            z = make_pool(case)[0].requires_grad_()

            def pool(z, kernel_size=kernel_size, beta=beta):
                return soft_pool2d(z, kernel_size, beta)

            assert torch.autograd.gradcheck(pool, z)
            assert torch.autograd.gradgradcheck(pool, z, fast_mode=True)
        inputs = [t.requires_grad_() for t in make_unpool(case)[:2]]

        def unpool(what, where, kernel_size=kernel_size):
            return soft_unpool2d(what, where, kernel_size)

        assert torch.autograd.gradcheck(unpool, inputs)
        assert torch.autograd.gradgradcheck(unpool, inputs, fast_mode=True)


def test_third_derivative(target):
    if torch.float64 not in target.dtypes:
        pytest.skip("float64")
    z = make_pool(((1, 2, 4, 4), (2, 2)), device=target.device)[0]

    def third(pool, unpool):
        x = z.clone().requires_grad_()
        loss = unpool(*pool(x, (2, 2), 2.0), (2, 2)).square().sum()
        for _ in range(2):
            loss = torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(loss, x)[0]

    torch.testing.assert_close(
        third(soft_pool2d, soft_unpool2d), third(reference.soft_pool2d, reference.soft_unpool2d)
    )


def test_backward_keeps_only_its_inputs(target):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: list[Tensor] = []
    z = make_pool(((2, 3, 4, 4), (2, 2)), torch.float32, target.device)[0].requires_grad_()
    what, where, _ = make_unpool(((2, 3, 4, 4), (2, 2)), torch.float32, target.device)
    inputs = [what.requires_grad_(), where.requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        soft_pool2d(z, 2, 1.0)
        soft_unpool2d(*inputs, 2)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (z, *inputs)}


@pytest.mark.parametrize(
    "case", [((4, 8, 64, 64), (2, 2)), ((4, 20, 60, 60), (3, 3)), ((40, 32, 32, 32), (16, 16))], ids=name_of
)
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, case):
    """From run to run and for one and two threads."""
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    pool, unpool = (make(case, torch.float32, target.device) for make in (make_pool, make_unpool))
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(run_pool(soft_pool2d, *pool, case[1], 5.0) + run_unpool(soft_unpool2d, *unpool, case[1]))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30, -1e30])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel_size", [(2, 2), (4, 3)], ids=str)
def test_extremes_stay_in_their_window(target, kernel_size, layout, bad):
    """One extreme element: the other windows get what they got without it."""
    case = ((2, 20, 8, 36), kernel_size)
    z, grad_what, grad_where = in_layout(layout, *make_pool(case, torch.float32, target.device))
    calm = run_pool(soft_pool2d, z, grad_what, grad_where, kernel_size, 100.0)
    z[1, 17, 5, 10] = bad
    struck = run_pool(soft_pool2d, z, grad_what, grad_where, kernel_size, 100.0)
    i, j = 5 // kernel_size[0], 10 // kernel_size[1]
    elsewhere = torch.ones(calm[0].shape, dtype=torch.bool, device=target.device)
    elsewhere[1, 17, i, j] = False
    pixels = elsewhere.repeat_interleave(kernel_size[0], 2).repeat_interleave(kernel_size[1], 3)
    masks = elsewhere, elsewhere.unsqueeze(2).expand_as(calm[1]), pixels
    for a, b, mask in zip(struck, calm, masks, strict=True):
        assert torch.equal(a[mask], b[mask])
        if abs(bad) == 1e30:
            assert a.isfinite().all()
    if math.isnan(bad):
        assert struck[0][1, 17, i, j].isnan()

    what, where, grad = in_layout(layout, *make_unpool(case, torch.float32, target.device))
    calm = run_unpool(soft_unpool2d, what, where, grad, kernel_size)
    for index in (0, 1):
        before = where[1, 17, index, i, j].item()
        where[1, 17, index, i, j] = bad
        struck = run_unpool(soft_unpool2d, what, where, grad, kernel_size)
        where[1, 17, index, i, j] = before
        for a, b, mask in zip(struck, calm, (pixels, masks[0], masks[1]), strict=True):
            assert torch.equal(a[mask], b[mask])
            if not math.isnan(bad):
                assert a.isfinite().all()
        if math.isnan(bad):
            assert struck[0][1, 17].isnan().any()


def test_vmap(target):
    """torch.func over an axis of seeds, and nested."""
    z = draw((3, 2, 2, 4, 6), torch.float32, target.device)
    what, where, _ = make_unpool(((6, 2, 4, 6), (2, 3)), torch.float32, target.device)
    what, where = what.unflatten(0, (3, 2)), where.unflatten(0, (3, 2))
    vmap, grad = torch.func.vmap, torch.func.grad

    def pool(function, beta=1.0):
        return lambda z: function(z, (2, 3), beta)

    def unpool(function):
        return lambda what, where: function(what, where, (2, 3))

    def loss(function):
        def of(*inputs):
            out = function(*inputs)
            return sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))

        return of

    for transform in (lambda f: f, lambda f: grad(loss(f))):
        ours, exact = transform(pool(soft_pool2d)), transform(pool(reference.soft_pool2d))
        torch.testing.assert_close(vmap(ours)(z), vmap(exact)(z))
        torch.testing.assert_close(vmap(ours, 1, 1)(z), vmap(exact, 1, 1)(z))
        twice = z.unsqueeze(0).expand(2, *z.shape)
        torch.testing.assert_close(vmap(vmap(ours))(twice), vmap(vmap(exact))(twice))
    for transform in (lambda f: f, lambda f: grad(loss(f), (0, 1))):
        ours, exact = transform(unpool(soft_unpool2d)), transform(unpool(reference.soft_unpool2d))
        torch.testing.assert_close(vmap(ours)(what, where), vmap(exact)(what, where))
        for dims, inputs in (((0, None), (what, where[0])), ((None, 0), (what[0], where))):
            torch.testing.assert_close(vmap(ours, dims)(*inputs), vmap(exact, dims)(*inputs))


def test_second_order_transforms():
    z = draw((1, 1, 4, 4))

    def hessian(pool, unpool):
        def loss(z):
            return unpool(*pool(z, (2, 2), 1.0), (2, 2)).square().sum()

        return torch.func.jacrev(torch.func.jacrev(loss))(z)

    torch.testing.assert_close(
        hessian(soft_pool2d, soft_unpool2d), hessian(reference.soft_pool2d, reference.soft_unpool2d)
    )


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    case = ((2, 3, 5, 6), (2, 3))
    z, grad_what, grad_where = in_layout(layout, *make_pool(case, torch.float32))
    what, where, grad = in_layout(layout, *make_unpool(case, torch.float32))
    ops, check = torch.ops.ladderfast, torch.library.opcheck
    check(ops.soft_pool2d.default, (z, 2, 3, 1.5))
    check(ops.soft_pool2d_backward.default, (grad_what, grad_where, z, 2, 3, 1.5))
    check(ops.soft_unpool2d.default, (what, where, 2, 3))
    check(ops.soft_unpool2d_backward.default, (grad, what, where, 2, 3))


def test_opcheck_triton(target):
    if target.backend != "triton":
        pytest.skip("the Triton ops")
    from ladderfast.triton import what_where as ops

    z, grad_what, grad_where = make_pool(((2, 3, 5, 6), (2, 3)), torch.float32, target.device)
    what, where, grad = make_unpool(((2, 3, 4, 6), (2, 3)), torch.float32, target.device)
    checks = ["test_schema"]
    if target.device == "cuda":  # the interpreter cannot run on fake tensors
        checks.append("test_faketensor")
    for op, inputs in (
        (ops.soft_pool2d_triton, (z, 2, 3, 1.5)),
        (ops.soft_pool2d_backward_triton, (grad_what, grad_where, z, 2, 3, 1.5)),
        (ops.soft_unpool2d_triton, (what, where, 2, 3)),
        (ops.soft_unpool2d_backward_triton, (grad, what, where, 2, 3)),
    ):
        torch.library.opcheck(op, inputs, test_utils=checks)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_the_ops_protect_the_kernels():
    z, grad_what, grad_where = make_pool(((2, 4, 4, 6), (2, 2)), torch.float32)
    ops = torch.ops.ladderfast
    with pytest.raises(RuntimeError, match="z must be contiguous or channels-last"):
        ops.soft_pool2d(z[:, ::2], 2, 2, 1.0)
    with pytest.raises(RuntimeError, match="kernel sizes must be from 1 to 16"):
        ops.soft_pool2d(z, 2, 17, 1.0)
    with pytest.raises(RuntimeError, match="grad_where must have the fitting shape"):
        ops.soft_pool2d_backward(grad_what, grad_where[:1], z, 2, 2, 1.0)
    with pytest.raises(RuntimeError, match="float32 and float64"):
        ops.soft_pool2d(z.bfloat16(), 2, 2, 1.0)


def test_compile_fullgraph(target):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")

    def function(z, kernel_size, beta):
        what, where = soft_pool2d(z * 2, kernel_size, beta)
        return soft_unpool2d(what + 1, where, kernel_size), where

    compiled = torch.compile(function, fullgraph=True)
    z = draw((2, 3, 4, 4), torch.float32, target.device)
    for layout in ("contiguous", "channels_last"):
        z = in_layout(layout, z)[0]
        grads = torch.randn_like(z), torch.randn(2, 3, 2, 2, 2, device=target.device)
        for a, b in zip(
            run_pool(compiled, z, *grads, 2, 1.5), run_pool(function, z, *grads, 2, 1.5), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_autocast(target):
    """what and where are promoted to the wider of their dtypes; the result has that dtype."""
    what, where, _ = make_unpool(((2, 3, 4, 4), (2, 2)), torch.float32, target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        mixed = soft_unpool2d(what.bfloat16(), where, 2)
        assert soft_pool2d(what, 2, 1.0)[0].dtype == torch.float32
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, soft_unpool2d(what.bfloat16().float(), where, 2))
    if torch.bfloat16 in target.dtypes:
        with torch.autocast(target.device, dtype=torch.bfloat16):
            assert soft_unpool2d(what.bfloat16(), where.bfloat16(), 2).dtype == torch.bfloat16
            assert soft_pool2d(what.bfloat16(), 2, 1.0)[1].dtype == torch.bfloat16


def test_half_on_the_cpu_is_the_reference_rounded_once():
    pool = make_pool(((2, 3, 4, 6), (2, 3)), torch.bfloat16)
    exact = run_pool(reference.soft_pool2d, *(t.float() for t in pool), (2, 3), 1.0)
    for a, b in zip(run_pool(soft_pool2d, *pool, (2, 3), 1.0), exact, strict=True):
        assert torch.equal(a, b.bfloat16())
    unpool = make_unpool(((2, 3, 4, 6), (2, 3)), torch.bfloat16)
    exact = run_unpool(reference.soft_unpool2d, *(t.float() for t in unpool), (2, 3))
    for a, b in zip(run_unpool(soft_unpool2d, *unpool, (2, 3)), exact, strict=True):
        assert torch.equal(a, b.bfloat16())


BAD_POOL = [
    (lambda z: (z.int(), 2, 1), TypeError, r"z must be float32.*got torch.int32"),
    (lambda z: (z.tolist(), 2, 1), TypeError, r"z must be a tensor; got list"),
    (lambda z: (z[0], 2, 1), ValueError, r"z must have shape \(N, C, H, W\); got \(3, 4, 6\)"),
    (lambda z: (z, 5, 1), ValueError, r"z must hold a window of \(5, 5\); got \(2, 3, 4, 6\)"),
    (lambda z: (z, (2, 7), 1), ValueError, r"z must hold a window of \(2, 7\); got \(2, 3, 4, 6\)"),
    (lambda z: (z, 0, 1), ValueError, r"kernel_size must be from 1 to 16; got 0"),
    (lambda z: (z, (2, 17), 1), ValueError, r"kernel_size must be from 1 to 16; got \(2, 17\)"),
    (lambda z: (z, 2.0, 1), TypeError, r"kernel_size must be an int or a pair of ints; got 2.0"),
    (
        lambda z: (z, (2, 2, 2), 1),
        TypeError,
        r"kernel_size must be an int or a pair of ints; got \(2, 2, 2\)",
    ),
    (lambda z: (z, 2, -1), ValueError, r"beta must be from 0 to 1e\+06 .*; got -1"),
    (lambda z: (z, 2, math.inf), ValueError, r"beta must be from 0 to 1e\+06 .*; got inf"),
    (lambda z: (z, 2, math.nan), ValueError, r"beta must be from 0 to 1e\+06 .*; got nan"),
    (lambda z: (z, 2, z), TypeError, r"beta must be a number; got Tensor"),
]
BAD_UNPOOL = [
    (lambda m, p: (m.int(), p, 2), TypeError, r"what must be float32.*got torch.int32"),
    (lambda m, p: (m, p.tolist(), 2), TypeError, r"where must be a tensor; got list"),
    (lambda m, p: (m, p.double(), 2), TypeError, r"where must have the dtype of what, torch.float32; got"),
    (lambda m, p: (m[0], p, 2), ValueError, r"what must have shape \(N, C, h, w\); got \(3, 2, 2\)"),
    (
        lambda m, p: (m, p[:, :, 0], 2),
        ValueError,
        r"where must have shape \(2, 3, 2, 2, 2\); got \(2, 3, 2, 2\)",
    ),
    (
        lambda m, p: (m, p[:, :2], 2),
        ValueError,
        r"where must have shape \(2, 3, 2, 2, 2\); got \(2, 2, 2, 2, 2\)",
    ),
    (lambda m, p: (m, p.to("meta"), 2), ValueError, r"where must be on the device of what, cpu; got meta"),
    (lambda m, p: (m, p, 17), ValueError, r"kernel_size must be from 1 to 16; got 17"),
    (lambda m, p: (m, p, "2"), TypeError, r"kernel_size must be an int or a pair of ints; got '2'"),
]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_errors_name_the_argument(name):
    if backend.unavailable(name, "cpu", torch.float32) is not None:
        pytest.skip(f"no {name}")
    z = draw((2, 3, 4, 6), torch.float32)
    what, where, _ = make_unpool(((2, 3, 4, 4), (2, 2)), torch.float32)
    with ladderfast.use_backend(name):
        for change, error, message in BAD_POOL:
            with pytest.raises(error, match="soft_pool2d: " + message):
                soft_pool2d(*change(z))
        for change, error, message in BAD_UNPOOL:
            with pytest.raises(error, match="soft_unpool2d: " + message):
                soft_unpool2d(*change(what, where))
            if "of what" not in message:  # under autocast dtypes may differ
                with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(error, match=message):
                    soft_unpool2d(*change(what, where))


def test_meta_tensors_have_shapes():
    z = torch.empty(2, 3, 9, 8, device="meta")
    what, where = soft_pool2d(z, (2, 4), 1.0)
    assert (what.shape, where.shape) == ((2, 3, 4, 2), (2, 3, 2, 4, 2))
    assert soft_unpool2d(what, where, (2, 4)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    """One binary: each instruction set up to this machine's gives the reference's values."""
    code = (
        "import torch, ladderfast._C as c\n"
        "from tests.ops.test_what_where import *\n"
        "for case in CASES:\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        for layout in ('contiguous', 'channels_last'):\n"
        "            data = in_layout(layout, *make_pool(case, dtype))\n"
        "            for beta in BETAS:\n"
        "                ours = run_pool(soft_pool2d, *data, case[1], beta)\n"
        "                assert_pool_as_good_as_torch(ours, *data, case[1], beta)\n"
        "            data = in_layout(layout, *make_unpool(case, dtype))\n"
        "            assert_unpool_as_good_as_torch(run_unpool(soft_unpool2d, *data, case[1]), *data, case[1])\n"
        "z = make_pool(((1, 2, 8, 8), (4, 4)), torch.float32)[0]\n"
        "z[0, 0, 3, 3], z[0, 1, 5, 5], z[0, 0, 4, 4] = -math.inf, -1e30, 1e30\n"
        "what, where = soft_pool2d(z, 4, 100.0)\n"
        "assert torch.equal(what.isnan(), functional.max_pool2d(-z, 4) == math.inf)\n"
        "assert where.isfinite().all()\n"
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
    pool, unpool = (make(((2, 4, 8, 8), (2, 2)), torch.float32) for make in (make_pool, make_unpool))

    def once():
        run_pool(soft_pool2d, *pool, 2, 1.0)
        run_unpool(soft_unpool2d, *unpool, 2)

    once()
    gc.collect()
    before = sum(isinstance(o, Tensor) for o in gc.get_objects())
    for _ in range(20):
        once()
    gc.collect()
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= before

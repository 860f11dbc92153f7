"""The combinator's CUDA kernels, executed on the host (tests/cuda_shim) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import cuda_shim
import pytest
import torch
from torch import Tensor

from ladderfast.reference.combinator import gaussian_combinator, gaussian_combinator_backward

pytestmark = cuda_shim.needs_compiler
KERNELS = "combinator"

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-params-float32"),
    pytest.param(torch.float16, torch.float16, id="float16"),
    pytest.param(torch.float16, torch.float32, id="float16-params-float32"),
]

# (seeds, rows, channels, inner). The kernels change their way after inner = 16, take columns by two, a run by 16 bytes,
# and cut rows and runs into chunks whose size these cases lie on both sides of.
SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 1, 1),  # a single column
    (1, 3, 10, 1),  # the network's top layer
    (2, 600, 10, 1),  # several chunks of a narrow layer
    (1, 33, 64, 1),  # one row more than a chunk
    (1, 70, 250, 1),  # several tiles, the last one partly filled
    (1, 41, 131, 1),  # odd: no whole slices
    (1, 2, 1100, 1),  # few rows: wide tiles
    (3, 5, 7, 3),  # runs that end within a slice of columns
    (1, 40, 6, 16),  # the longest run taken as columns
    (2, 4, 3, 17),  # the shortest run taken as a run, no whole slices
    (1, 6, 5, 36),
    (2, 11, 3, 49),  # 7 x 7
    (1, 1, 2, 700),  # a single row
    (1, 9, 2, 1024),  # several chunks of whole slices
    (1, 5, 2, 1025),
    (1, 150, 1, 40),  # more rows in a block than slices in a run
]
EMPTY = [(0, 2, 3, 1), (2, 0, 3, 1), (1, 2, 0, 1), (2, 3, 4, 0), (1, 0, 5, 20)]


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("seeds", "rows", "channels", "inner")]


@dataclass
class Case:
    grad: Tensor
    z: Tensor
    u: Tensor
    params: Tensor

    @classmethod
    def draw(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        params_dtype: torch.dtype | None = None,
    ) -> Case:
        params = torch.randn(shape[0], 10, shape[2], dtype=torch.float64)
        grad, z, u = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
        return cls(grad, 2 * z, 2 * u, params.to(params_dtype or dtype))

    def to(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(t.to(dtype) for t in (self.grad, self.z, self.u, self.params))


def codes(case: Case, squash: bool) -> list[object]:
    shape = Shape(*case.z.shape)
    return [
        cuda_shim.CODES[case.z.dtype],
        cuda_shim.CODES[case.params.dtype],
        int(squash),
        ctypes.byref(shape),
        None,
    ]


def forward(
    lib: cuda_shim.Library, case: Case, squash: bool = False, off: tuple[int, ...] = (0, 0, 0)
) -> Tensor:
    z, u, params = (
        lib.copy(t, name=n, misalignment=o)
        for t, n, o in ((case.z, "z", off[0]), (case.u, "u", off[1]), (case.params, "params", off[1]))
    )
    z_hat = lib.empty(tuple(z.shape), z.dtype, name="z_hat", misalignment=off[2])
    assert lib.call("ladderfast_combinator_forward_cuda", z, u, params, z_hat, *codes(case, squash)) == 0
    return z_hat


def backward(
    lib: cuda_shim.Library, case: Case, squash: bool = False, off: tuple[int, ...] = (0, 0, 0)
) -> tuple[Tensor, Tensor, Tensor]:
    grad, z, u, params = (
        lib.copy(t, name=n, misalignment=o)
        for t, n, o in (
            (case.grad, "grad", off[0]),
            (case.z, "z", off[1]),
            (case.u, "u", off[0]),
            (case.params, "params", off[1]),
        )
    )
    grad_z = lib.empty(tuple(z.shape), z.dtype, name="grad_z", misalignment=off[2])
    grad_u = lib.empty(tuple(z.shape), z.dtype, name="grad_u", misalignment=off[2])
    grad_params = lib.empty(tuple(params.shape), params.dtype, name="grad_params", misalignment=off[2])
    shape = Shape(*z.shape)
    size = lib.call("ladderfast_combinator_workspace_cuda", ctypes.byref(shape), restype=ctypes.c_int64)
    workspace = lib.empty((size,), torch.uint8, name="workspace")
    outputs = (grad_z, grad_u, grad_params)
    arguments = (grad, z, u, params, *outputs, workspace, *codes(case, squash))
    assert lib.call("ladderfast_combinator_backward_cuda", *arguments) == 0
    return outputs


def magnitudes(case: Case, squash: bool) -> tuple[Tensor, ...]:
    """The formula and its gradients on absolute values with every minus turned into a plus: sizes of their terms."""
    grad, z, u, params = (t.abs() for t in case.to(torch.float64))
    z, u, params = (t.requires_grad_() for t in (z, u, params))
    a = [row[:, None, :, None] for row in params.unbind(1)]
    mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
    v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
    z_hat = (z + mu) * (torch.sigmoid(v) if squash else v) + mu
    return z_hat.detach(), *torch.autograd.grad(z_hat, (z, u, params), grad)


def assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Error at most twice that of plain PyTorch in the type of computation, and one rounding to the type of storage.

    `plain` is the reference in the former, `exact` in float64. As plain arithmetic may be right by luck, one rounding
    of the largest term is allowed as well (four in float64, whose yardstick is rounded itself). Where storage has 16
    bits the error of computation may be twice that.
    """
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    roundings = 4 if plain.dtype == torch.float64 else 1
    allowed = (
        2 * (plain.double() - exact).abs().max() + roundings * torch.finfo(plain.dtype).eps * terms.max()
    )
    error = (actual.double() - exact).abs()
    if actual.dtype in (torch.bfloat16, torch.float16):
        # Near the middle between two values of the storage type the other one may be taken.
        rounding = (exact.to(actual.dtype).double() - exact).abs()
        assert (error <= rounding + 4 * allowed).all(), (
            f"{(error - rounding).max():.3g}, allowed {4 * allowed:.3g}"
        )
    else:
        assert error.max() <= allowed, f"error {error.max():.3g}, allowed {allowed:.3g}"


def check(lib: cuda_shim.Library, case: Case, squash: bool) -> None:
    compute = torch.float64 if case.z.dtype == torch.float64 else torch.float32
    exact, plain = case.to(torch.float64), case.to(compute)
    results = zip(
        (forward(lib, case, squash), *backward(lib, case, squash)),
        (
            gaussian_combinator(*plain[1:], squash_v=squash),
            *gaussian_combinator_backward(*plain, squash_v=squash),
        ),
        (
            gaussian_combinator(*exact[1:], squash_v=squash),
            *gaussian_combinator_backward(*exact, squash_v=squash),
        ),
        magnitudes(case, squash),
        strict=True,
    )
    for actual, p, e, terms in results:
        # Sums for float32 parameters of 16-bit elements come from the coarse grade as well.
        slack = 2.0 if case.z.element_size() == 2 and actual.dtype == torch.float32 else 1.0
        assert_accurate(actual, e + slack * (p - e) if slack > 1 else p, e, slack * terms)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("squash", [False, True], ids=["", "squash"])
@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(
    lib: cuda_shim.Library,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    params_dtype: torch.dtype,
    squash: bool,
) -> None:
    check(lib, Case.draw(shape, dtype, params_dtype), squash)


# Large enough for a thread to go round its loop more than once and end within it.
@pytest.mark.parametrize("shape", [(1, 8200, 128, 1), (1, 521, 4, 1024)], ids=str)
def test_long_walks(lib: cuda_shim.Library, shape: tuple[int, int, int, int]) -> None:
    before = lib.blocks()
    check(lib, Case.draw(shape), False)
    assert lib.blocks() - before > 2 * 200


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(lib: cuda_shim.Library, shape: tuple[int, int, int, int]) -> None:
    """Nothing is read or written but the parameters' gradients, which are zero."""
    case = Case.draw(shape)
    forward(lib, case)
    grad_params = backward(lib, case)[2]
    assert torch.equal(grad_params, torch.zeros_like(case.params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 250, 1), (2, 11, 3, 48)], ids=str)
def test_alignment_changes_no_bit(
    lib: cuda_shim.Library, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Pointers need only their element's alignment. Two of three are off by an element, then all by 8 bytes."""
    case = Case.draw(shape, dtype)
    expected = (forward(lib, case), *backward(lib, case))
    size = case.z.element_size()
    for off in ((size, 0, 0), (0, size, size), (0, 0, size), (8, 8, 8)):
        for a, b in zip(expected, (forward(lib, case, off=off), *backward(lib, case, off=off)), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize(
    "shape", [(2, 600, 10, 1), (1, 70, 250, 1), (1, 40, 6, 16), (2, 9, 2, 1024)], ids=str
)
def test_order_changes_no_bit(lib: cuda_shim.Library, shape: tuple[int, int, int, int]) -> None:
    """Blocks in another order, and threads between barriers, as on another device; and the same order again."""
    case = Case.draw(shape)
    expected = (forward(lib, case), *backward(lib, case))
    for seed in (0, 1, 2):
        with lib.order(seed):
            for a, b in zip(expected, (forward(lib, case), *backward(lib, case)), strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("squash", [False, True], ids=["", "squash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 6, 1), (2, 5, 3, 5), (2, 3, 4, 64), (2, 3, 4, 51)], ids=str)
def test_extremes_stay_where_they_are(
    lib: cuda_shim.Library, shape: tuple[int, int, int, int], dtype: torch.dtype, squash: bool
) -> None:
    """inf, NaN or 1e4 in one element changes that element and its channel's parameter gradients, no other bit."""
    clean = Case.draw(shape, dtype, torch.float32)
    expected = (forward(lib, clean, squash), *backward(lib, clean, squash))
    seed, row, channel, position = 1, shape[1] // 2, 1, shape[3] - 1
    for value in (float("inf"), float("-inf"), float("nan"), 1e4, -1e4):
        for field in ("grad", "z", "u"):
            case = Case(**{k: t.clone() for k, t in vars(clean).items()})
            getattr(case, field)[seed, row, channel, position] = value
            results = (forward(lib, case, squash), *backward(lib, case, squash))
            if abs(value) == 1e4:
                assert all(r.isfinite().all() for r in results)
            for a, b in zip(expected, results, strict=True):
                touched = torch.zeros(a.shape, dtype=torch.bool)
                touched[(seed, slice(None), channel) if a.dim() == 3 else (seed, row, channel, position)] = (
                    True
                )
                assert_same_bits(a[~touched], b[~touched])


def test_saturated_sigmoids(lib: cuda_shim.Library) -> None:
    """|u| up to 1e4 through every sigmoid: finite, and as accurate as elsewhere."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case.draw((1, 50, 6, 1), dtype, torch.float32)
        case.u *= torch.logspace(-2, 4, 50).view(1, 50, 1, 1).to(dtype)
        check(lib, case, True)
        check(lib, case, False)


def test_refused(lib: cuda_shim.Library) -> None:
    """Unknown dtypes, parameters of a dtype of their own and sizes beyond 32 bits: cudaErrorInvalidValue, no launch."""
    shape = Shape(1, 2, 3, 1)
    before = lib.blocks()
    for dtype, params_dtype in ((4, 4), (-1, 0), (2, 3), (0, 2), (0, 1)):
        for name, pointers in (("forward", 4), ("backward", 8)):
            arguments = (*([None] * pointers), dtype, params_dtype, 0, ctypes.byref(shape), None)
            assert lib.call(f"ladderfast_combinator_{name}_cuda", *arguments) == 1
    for huge in (Shape(1, 1, 2**31, 1), Shape(1, 1, 1, 2**31), Shape(1, 2**32, 1, 100)):
        arguments = (*([None] * 4), 0, 0, 0, ctypes.byref(huge), None)
        assert lib.call("ladderfast_combinator_forward_cuda", *arguments) == 1
        arguments = (*([None] * 8), 0, 0, 0, ctypes.byref(huge), None)
        assert lib.call("ladderfast_combinator_backward_cuda", *arguments) == 1
    assert lib.blocks() == before

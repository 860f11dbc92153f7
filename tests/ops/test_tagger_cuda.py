"""Tagger's CUDA kernels, executed on the host (tests/cuda_shim) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext
from dataclasses import dataclass

import cuda_shim
import pytest
import torch
from torch import Tensor

from ladderfast.reference import tagger as reference
from tests.tagger_cases import DTYPES, EMPTY, Inputs, Shape, assert_same_bits, view

pytestmark = cuda_shim.needs_compiler
KERNELS = "tagger"

# (rows, groups, pixels, seeds). A slice is four pixels, of float64 one; four groups stay in registers.
SHAPES = [
    (1, 1, 1, 1),
    (3, 4, 8, 1),  # whole slices, groups in registers
    (2, 3, 13, 1),  # a slice that is not whole
    (5, 6, 12, 1),  # whole slices, more groups than registers hold
    (2, 64, 5, 2),
    (6, 2, 4, 3),  # seeds
    (70, 2, 16, 2),  # several chunks of rows
    (1, 2, 1100, 1),  # several tiles
]
NAMES = ("gaussian_group_inputs", "bernoulli_group_inputs", "gaussian_mixture_nll", "bernoulli_mixture_nll")


@dataclass
class Case:
    name: str
    x: Tensor
    z: Tensor
    m: Tensor
    scalar: Tensor | None
    grads: list[Tensor]

    @classmethod
    def draw(
        cls,
        name: str,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        scalar_dtype: torch.dtype | None = None,
    ) -> Case:
        n, k, d, seeds = shape
        m = torch.softmax(torch.randn(n, k, d, dtype=torch.float64), 1)
        if name.startswith("gaussian"):
            x, z = torch.randn(n, d, dtype=torch.float64), torch.randn(n, k, d, dtype=torch.float64)
            scalar = 0.3 + torch.rand(seeds)
        else:
            x, z = torch.randint(2, (n, d)), torch.sigmoid(torch.randn(n, k, d, dtype=torch.float64))
            scalar = torch.full((seeds,), 0.2)
        grads = [torch.randn(n, k, d), torch.randn(n, k, d)] if "inputs" in name else [torch.randn(n, d)]
        return cls(
            name,
            *(t.to(dtype) for t in (x, z, m)),
            None if name == "bernoulli_mixture_nll" else scalar.to(scalar_dtype or dtype),
            [g.to(dtype) for g in grads],
        )

    @property
    def shape(self) -> Shape:
        return Shape(*self.z.shape, 1 if self.scalar is None else self.scalar.numel())

    def to(self, dtype: torch.dtype) -> list[Tensor]:
        given = [*self.grads, self.x, self.z, self.m, *([] if self.scalar is None else [self.scalar])]
        return [t.to(dtype) for t in given]

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and gradients of the reference in `dtype`."""
        given = self.to(dtype)
        out = getattr(reference, self.name)(*given[len(self.grads) :])
        return [
            *([out] if isinstance(out, Tensor) else out),
            *getattr(reference, self.name + "_backward")(*given),
        ]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def run(
    lib: cuda_shim.Library, case: Case, *, off: tuple[int, int] = (0, 0), padded: int = 0
) -> list[Tensor]:
    """Outputs and gradients; inputs and outputs lie `off` their alignment, rows of groups `padded` pixels apart."""

    def given(t: Tensor, label: str) -> Tensor:
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] + padded, dtype=t.dtype)
        wide[..., padded:] = t
        return lib.copy(wide, name=label, misalignment=off[0])[..., padded:]

    def made(*shape: int, dtype: torch.dtype = case.z.dtype) -> Tensor:
        return lib.empty(shape, dtype, name="output", misalignment=off[1])

    x, z, m = given(case.x, "x"), given(case.z, "z"), given(case.m, "m")
    grads = [given(g, "grad") for g in case.grads]
    scalar = None if case.scalar is None else lib.copy(case.scalar, name="scalar")
    shape = case.shape
    inputs = Inputs(view(x), view(z), view(m), None if scalar is None else scalar.data_ptr())
    gaussian, kind = int(case.name.startswith("gaussian")), "inputs" if len(grads) == 2 else "nll"
    codes = [
        cuda_shim.CODES[case.z.dtype],
        cuda_shim.CODES[case.z.dtype if scalar is None else scalar.dtype],
        ctypes.byref(shape),
        None,
    ]
    n, k, d = case.z.shape
    out = [made(n, k, d), made(n, k, d)] if kind == "inputs" else [made(n, d)]
    assert lib.call(f"ladderfast_tagger_{kind}_cuda", gaussian, ctypes.byref(inputs), *out, *codes) == 0
    back = [made(n, d), made(n, k, d), made(n, k, d)]
    extra: list[Tensor | None] = [None, None]
    if gaussian:
        size = lib.call("ladderfast_tagger_workspace_cuda", ctypes.byref(shape), restype=ctypes.c_int64)
        extra = [made(shape.seeds, dtype=scalar.dtype), lib.empty((size,), torch.uint8, name="workspace")]
    views = [ctypes.byref(view(g)) for g in grads]
    arguments = (gaussian, *views, ctypes.byref(inputs), *back, *extra, *codes)
    assert lib.call(f"ladderfast_tagger_{kind}_backward_cuda", *arguments) == 0
    return [*out, *back, *([extra[0]] if gaussian else [])]


def assert_accurate(case: Case, actual: list[Tensor]) -> None:
    """Error at most twice that of the reference in the type of computation, and one rounding to that of storage.

    As the reference may be right by luck, sixteen roundings of the largest result, or of 1, are allowed as well: an
    exponent of size q magnifies its rounding q times, a denominator t near zero 1 / t times.
    """
    compute = torch.float64 if case.z.dtype == torch.float64 else torch.float32
    for k, (a, plain, exact) in enumerate(
        zip(actual, case.expected(compute), case.expected(torch.float64), strict=True)
    ):
        assert a.shape == exact.shape
        if exact.numel() == 0:
            continue
        eps = torch.finfo(compute).eps
        size = exact.abs().max().clamp(min=1.0 if a.dim() > 1 else math.sqrt(case.z.numel()))
        allowed = 2 * (plain.double() - exact).abs().max() + 16 * eps * size
        error = (a.double() - exact).abs()
        if a.dtype in (torch.bfloat16, torch.float16):
            error = error - 1.01 * (exact.to(a.dtype).double() - exact).abs()
        assert error.max() <= allowed, f"{case.name}, result {k}: {error.max():.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("dtype", "scalar_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_against_the_reference(lib, name, shape, dtype, scalar_dtype) -> None:
    if name == "bernoulli_mixture_nll" and shape[3] > 1:
        pytest.skip("it has no scalar, hence no seeds")
    case = Case.draw(name, shape, dtype, scalar_dtype)
    assert_accurate(case, run(lib, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [3, 6])
def test_alignment_strides_and_order_change_no_bit(lib, name, groups, dtype) -> None:
    """Pointers need only their element's alignment; rows may lie apart; blocks and threads come in any order."""
    case = Case.draw(name, (9, groups, 24, 1), dtype)
    expected, size = run(lib, case), case.z.element_size()
    for options in (
        {"off": (size, 0)},
        {"off": (0, size)},
        {"padded": 1},
        {"padded": 8},
        {"seed": 1},
        {"seed": 2},
    ):
        seed = options.pop("seed", 0)
        with lib.order(seed) if seed else nullcontext():
            for a, b in zip(expected, run(lib, case, **options), strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("pixels", [8, 7])
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e4])
def test_extremes_stay_where_they_are(lib, name, pixels, value) -> None:
    """inf, NaN or 1e4 in one element changes that pixel and the variance's gradient, no other bit."""
    clean = Case.draw(name, (3, 3, pixels, 1))
    expected = run(lib, clean)
    for field in ("x", "z", "m"):
        case = Case(clean.name, clean.x.clone(), clean.z.clone(), clean.m.clone(), clean.scalar, clean.grads)
        getattr(case, field)[(1, 2) if field == "x" else (1, 1, 2)] = value
        for a, b in zip(expected, run(lib, case), strict=True):
            if a.dim() > 1:
                elsewhere = torch.ones_like(a, dtype=torch.bool)
                elsewhere[1, ..., 2] = False
                assert_same_bits(a[elsewhere], b[elsewhere])


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("variance", [1e-8, 1.0, 1e8])
def test_stress(lib, groups, variance) -> None:
    """Log-densities down to -1e5 and masks that are exactly 0 and 1: finite, and right where digits are left."""
    for name in NAMES[::2]:
        case = Case.draw(name, (11, groups, 4, 1))
        scale = (2 * variance * torch.logspace(-3, 5, 11)).sqrt()
        case.x, case.z = (
            torch.rand(11, 4) * scale[:, None],
            -0.1 * torch.rand(case.z.shape) * scale[:, None, None],
        )
        case.m = torch.zeros_like(case.m)
        case.m[:, 0] = 1
        case.scalar = torch.tensor([variance])
        results = run(lib, case)
        assert all(r.isfinite().all() for r in results)
        exact, q = case.expected(torch.float64), torch.logspace(-3, 5, 11, dtype=torch.float64) * 1.21
        which = 1 if name == "gaussian_group_inputs" else 0
        error = (results[which].double() - exact[which]).abs().flatten(1).amax(1)
        assert (error <= 8 * 2**-23 * (10 + q)).all()


def test_far_groups(lib) -> None:
    """Exponents that are rounded by more than they differ: neighbouring reconstructions, and mixtures whose group is
    told by distances and masks."""
    first = -torch.linspace(8, 400, 200).reshape(1, 1, 200)
    z = torch.cat([torch.nextafter(first, torch.tensor(-1e9)), first], 1)
    for given in (z, z.flip(1)):
        grads = [torch.ones_like(z), torch.randn_like(z)]
        x, m = torch.zeros(1, 200), torch.full_like(z, 0.5)
        results = run(lib, Case("gaussian_group_inputs", x, given, m, torch.tensor([1e-7]), grads))
        assert all(r.isfinite().all() for r in results)
        exact = torch.softmax(-given.double().square() / (2 * torch.tensor(1e-7).double()), 1)
        torch.testing.assert_close(results[1].double(), exact, rtol=0, atol=1e-5)

    x = torch.tensor([[7.0, -7.0, 7.0]])
    z = torch.tensor([[[0.0] * 3, [1.0] * 3]])
    m = torch.tensor([[[0.5, 1.0, 1 - 1e-7], [0.5, 1e-7, 2.6e-41]]])
    results = run(lib, Case("gaussian_mixture_nll", x, z, m, torch.tensor([3e-9]), [torch.ones(1, 3)]))
    assert all(r.isfinite().all() for r in results)
    assert results[0][0].tolist() == pytest.approx([36 / 6e-9, 49 / 6e-9, 36 / 6e-9], rel=1e-6)
    assert results[2][0, 0].tolist() == pytest.approx([0.0, 7 / 3e-9, 0.0], rel=1e-5)
    assert results[2][0, 1].tolist() == pytest.approx([-6 / 3e-9, 0.0, -6 / 3e-9], rel=1e-5)


def test_poles(lib) -> None:
    """Every combination of x, masks and reconstructions that are exactly 0 and 1, without flips: finite."""
    edge = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).t()
    x, z, m = edge[:1], edge[1:3][None], torch.stack([edge[3], 1 - edge[3]])[None]
    for name in NAMES[1::2]:
        grads = [torch.ones_like(z)] * 2 if "inputs" in name else [torch.ones_like(x)]
        case = Case(name, x, z, m, torch.zeros(1) if "inputs" in name else None, grads)
        results = run(lib, case)
        assert all(r.isfinite().all() for r in results)
        for a, b in zip(results, case.expected(torch.float32), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_many_rows_take_several_steps(lib) -> None:
    """So many blocks that a thread takes several rows, and the last ones of a chunk are missing."""
    case = Case.draw("gaussian_mixture_nll", (4099, 1, 1024, 1))
    before = lib.blocks()
    results = run(lib, case)
    assert lib.blocks() - before < 2 * 4099
    expected = case.expected(torch.float32)
    torch.testing.assert_close(results[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[-1], expected[-1], rtol=1e-4, atol=1e-3)


def test_refused(lib) -> None:
    """Unknown dtypes, scalars of a dtype of their own and sizes beyond 32 bits: cudaErrorInvalidValue, no launch."""
    before = lib.blocks()
    inputs = Inputs()
    for sizes, dtype, scalar_dtype in (
        ((2, 2, 4, 1), 4, 4),
        ((2, 2, 4, 1), 2, 3),
        ((2, 2, 4, 1), 0, 1),
        ((2**31, 1, 1, 1), 0, 0),
        ((1, 2**31, 1, 1), 0, 0),
        ((1, 1, 2**31, 1), 0, 0),
    ):
        arguments = (
            1,
            ctypes.byref(inputs),
            None,
            None,
            dtype,
            scalar_dtype,
            ctypes.byref(Shape(*sizes)),
            None,
        )
        assert lib.call("ladderfast_tagger_inputs_cuda", *arguments) == 1
    assert lib.blocks() == before

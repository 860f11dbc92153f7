"""The CUDA kernels of tagger_step, executed on the host (tests/cuda_shim) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext
from dataclasses import dataclass

import cuda_shim
import pytest
import torch
from torch import Tensor

from ladderfast.reference import tagger_step as reference
from tests.tagger_cases import DTYPES, EMPTY, Input, Inputs, Shape, assert_same_bits, view

pytestmark = cuda_shim.needs_compiler
KERNELS = "tagger_step"

# (rows, groups, pixels, seeds). A slice is four pixels, of float64 one; four groups stay in registers.
SHAPES = [
    (2, 1, 1, 1),
    (3, 4, 8, 1),  # whole slices, groups in registers
    (2, 3, 13, 1),  # a slice that is not whole
    (5, 6, 12, 1),  # whole slices, more groups than registers hold
    (4, 64, 5, 2),
    (6, 2, 4, 3),  # seeds
    (140, 2, 16, 2),  # several chunks of rows
    (2, 2, 1100, 1),  # several tiles, and columns beyond a block that merges
]
NAMES = ("gaussian_step_inputs", "bernoulli_step_inputs", "gaussian_step_outputs", "bernoulli_step_outputs")
EPS = 1e-5


class Outputs(ctypes.Structure):
    _fields_ = [
        ("x", Input),
        ("z", Input),
        ("m", Input),
        *[(name, ctypes.c_void_p) for name in ("c1", "b1", "c2", "variance")],
    ]


@dataclass
class Case:
    """given: x, z, m and the parameters; the last one has the scalar's dtype where it is a scalar of its own."""

    name: str
    given: list[Tensor]
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
        gaussian, inputs = name.startswith("gaussian"), "inputs" in name

        def draw(*size: int) -> Tensor:
            return torch.randn(size, dtype=torch.float64)

        x = draw(n, d) if gaussian else torch.randint(2, (n, d))
        z = torch.sigmoid(draw(n, k, d)) if inputs and not gaussian else draw(n, k, d)
        given = [x, z if inputs else 2 * z + 3, draw(n, k, d)]
        grads = [draw(n * k, 4 * d)] if inputs else [draw(n, k, d), draw(n, k, d), draw(n, d)]
        if not inputs:
            given += [1 + 0.3 * draw(seeds, d), draw(seeds, d), 1 + 0.3 * draw(seeds)]
        given = [t.to(dtype) for t in given]
        if gaussian:
            given.append((0.3 + torch.rand(seeds)).to(scalar_dtype or dtype))
        elif inputs:
            given.append(torch.full((seeds,), 0.2, dtype=scalar_dtype or dtype))
        return cls(name, given, [g.to(dtype) for g in grads])

    @property
    def gaussian(self) -> bool:
        return self.name.startswith("gaussian")

    @property
    def inputs(self) -> bool:
        return "inputs" in self.name

    @property
    def shape(self) -> Shape:
        return Shape(*self.given[1].shape, self.given[3 if self.inputs else 5].numel())

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and gradients of the reference in `dtype`."""

        def function(*tensors: Tensor):
            return getattr(reference, self.name)(*tensors, **({} if self.inputs else {"eps": EPS}))

        given = [t.to(dtype) for t in self.given]
        out = function(*given)
        wanted = len(given) - (self.name == "bernoulli_step_inputs")
        grads = reference.backward(function, tuple(given), tuple(g.to(dtype) for g in self.grads))
        return [*([out] if isinstance(out, Tensor) else out), *grads[:wanted]]


@pytest.fixture(scope="module")
def workspace_of_inputs():
    """Bytes of scratch, which the op `tagger` knows."""
    library = cuda_shim.load("tagger")
    return lambda shape: library.call(
        "ladderfast_tagger_workspace_cuda", ctypes.byref(shape), restype=ctypes.c_int64
    )


@pytest.fixture
def run(lib, workspace_of_inputs):
    def run(case: Case, *, off: tuple[int, int] = (0, 0), padded: int = 0) -> list[Tensor]:
        """Results and gradients; inputs and outputs lie `off` their alignment, rows of pixels `padded` pixels apart."""

        def given(t: Tensor, label: str) -> Tensor:
            wide = torch.zeros(*t.shape[:-1], t.shape[-1] + padded, dtype=t.dtype)
            wide[..., padded:] = t
            return lib.copy(wide, name=label, misalignment=off[0])[..., padded:]

        def made(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return lib.empty(shape, dtype or case.given[1].dtype, name="output", misalignment=off[1])

        shape, gaussian = case.shape, int(case.gaussian)
        n, k, d = case.given[1].shape
        x, z, m = (given(t, label) for t, label in zip(case.given[:3], "xzm", strict=True))
        parameters = [
            lib.copy(t, name="parameter", misalignment=off[0] if t.dim() > 1 else 0) for t in case.given[3:]
        ]
        grads = [given(g, "grad") for g in case.grads]
        scalar = parameters[-1] if gaussian or case.inputs else None
        dtype = cuda_shim.CODES[z.dtype]
        codes = [dtype, dtype if scalar is None else cuda_shim.CODES[scalar.dtype], ctypes.byref(shape), None]
        back = [made(n, d), made(n, k, d), made(n, k, d)]
        of_scalar = made(shape.seeds, dtype=scalar.dtype) if gaussian else None

        if case.inputs:
            out = [made(n * k, 4 * d)]
            inputs = Inputs(view(x), view(z), view(m), scalar.data_ptr())
            arguments = (gaussian, ctypes.byref(inputs), *out, *codes)
            assert lib.call("ladderfast_tagger_step_inputs_cuda", *arguments) == 0
            scratch = (
                lib.empty((workspace_of_inputs(shape),), torch.uint8, name="workspace") if gaussian else None
            )
            stride = grads[0].stride(0)
            grad = Input(grads[0].data_ptr(), k * stride, stride)
            arguments = (
                gaussian,
                ctypes.byref(grad),
                ctypes.byref(inputs),
                *back,
                of_scalar,
                scratch,
                *codes,
            )
            assert lib.call("ladderfast_tagger_step_inputs_backward_cuda", *arguments) == 0
            return [*out, *back, *([of_scalar] if gaussian else [])]

        out = [made(n, k, d), made(n, k, d), made(n, d)]
        compute = torch.float64 if z.dtype == torch.float64 else torch.float32
        off_stats = torch.empty((), dtype=compute).element_size() if off[1] else 0
        stats = lib.empty((shape.seeds, 4, d), compute, name="stats", misalignment=off_stats)
        pointers = [t.data_ptr() for t in parameters]
        outputs = Outputs(view(x), view(z), view(m), *pointers[:3], pointers[3] if gaussian else None)
        size = lib.call(
            "ladderfast_tagger_step_outputs_workspace_cuda", ctypes.byref(shape), restype=ctypes.c_int64
        )

        def scratch() -> Tensor:
            return lib.empty((size,), torch.uint8, name="workspace")

        arguments = (gaussian, ctypes.byref(outputs), *out, stats, scratch(), ctypes.c_double(EPS), *codes)
        assert lib.call("ladderfast_tagger_step_outputs_cuda", *arguments) == 0
        views = [ctypes.byref(view(g)) for g in grads]
        of = [made(shape.seeds, d), made(shape.seeds, d), made(shape.seeds), of_scalar]
        arguments = (gaussian, ctypes.byref(outputs), *views, stats, *back, *of, scratch(), *codes)
        assert lib.call("ladderfast_tagger_step_outputs_backward_cuda", *arguments) == 0
        return [*out, *back, *(t for t in of if t is not None)]

    return run


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def assert_accurate(case: Case, actual: list[Tensor]) -> None:
    """Error at most twice that of the reference in the type of computation, and one rounding to that of storage.

    As the reference may be right by luck, some roundings of the largest result, and of what is summed on the way to it,
    are allowed as well.
    """
    compute = torch.float64 if case.given[1].dtype == torch.float64 else torch.float32
    n, k, d = case.given[1].shape
    for index, (a, plain, exact) in enumerate(
        zip(actual, case.expected(compute), case.expected(torch.float64), strict=True)
    ):
        assert a.shape == exact.shape
        if exact.numel() == 0:
            continue
        summed = n * k * d if a.dim() == 1 else n * k
        size = exact.abs().max().clamp(min=1.0) + math.sqrt(summed)
        allowed = 2 * (plain.double() - exact).abs().max() + 16 * torch.finfo(compute).eps * size
        error = (a.double() - exact).abs()
        if a.dtype in (torch.bfloat16, torch.float16):
            error = error - 1.01 * (exact.to(a.dtype).double() - exact).abs()
        assert error.max() <= allowed, (
            f"{case.name}, result {index}: {error.max():.3g}, allowed {allowed:.3g}"
        )


@pytest.mark.parametrize(("dtype", "scalar_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_against_the_reference(run, name, shape, dtype, scalar_dtype) -> None:
    case = Case.draw(name, shape, dtype, scalar_dtype)
    assert_accurate(case, run(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [3, 6])
def test_alignment_strides_and_order_change_no_bit(lib, run, name, groups, dtype) -> None:
    """Pointers need only their element's alignment; rows may lie apart; blocks and threads come in any order."""
    case = Case.draw(name, (9, groups, 24, 1), dtype)
    expected, size = run(case), case.given[1].element_size()
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
            for a, b in zip(expected, run(case, **options), strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("pixels", [8, 7])
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e4])
def test_extremes_stay_in_their_pixel(run, name, pixels, value) -> None:
    """inf, NaN or 1e4 in one element changes that pixel, of the outputs in all rows, and scalars; no other bit."""
    clean = Case.draw(name, (3, 3, pixels, 1))
    expected = run(clean)
    for field in range(3):
        case = Case(clean.name, [t.clone() for t in clean.given], clean.grads)
        case.given[field][(1, 2) if field == 0 else (1, 1, 2)] = value
        for a, b in zip(expected, run(case), strict=True):
            if a.dim() == 1:
                continue
            elsewhere = torch.ones(a.numel() // pixels, pixels, dtype=torch.bool)
            elsewhere[:, 2] = False
            assert_same_bits(a.reshape(-1, pixels)[elsewhere], b.reshape(-1, pixels)[elsewhere])


@pytest.mark.parametrize("groups", [2, 6])
def test_a_large_mean_and_no_variance(run, groups) -> None:
    """Columns far from zero keep their digits; constant ones become their bias."""
    for name in NAMES[2:]:
        case = Case.draw(name, (21, groups, 8, 1))
        case.given[1][..., :4] += 1000
        case.given[2][..., :4] -= 1000
        case.given[1][..., 4:], case.given[2][..., 4:] = 7.25, 0.3
        results, exact = run(case), case.expected(torch.float64)
        for a, b in zip(results[:2], exact[:2], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
        bias = case.given[4][0, 4:]
        assert (results[0][..., 4:] == (bias if case.gaussian else torch.sigmoid(bias))).float().mean() > 0.4
        assert all(t.isfinite().all() for t in results)
        assert (results[1][..., 4:] == 0).all()


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("variance", [1e-8, 1e8])
def test_far_from_every_group(run, name, groups, variance) -> None:
    """Log-densities down to -1e9 and logits up to 1e4: finite."""
    case = Case.draw(name, (5, groups, 8, 1))
    if case.gaussian:
        case.given[-1] = torch.tensor([variance])
    case.given[2] = case.given[2] * 1e4
    out = run(case)[: 1 if case.inputs else 3]
    assert all(t.isfinite().all() for t in out)


def test_many_rows_take_several_steps(lib, run) -> None:
    """So many blocks that a thread takes several rows, and the last ones of a chunk are missing."""
    case = Case.draw("gaussian_step_outputs", (1031, 1, 1024, 1))
    before = lib.blocks()
    results = run(case)
    assert lib.blocks() - before < 5 * 1031
    for a, b in zip(results, case.expected(torch.float32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_refused(lib) -> None:
    """Unknown dtypes, variances of a dtype of their own and sizes beyond 32 bits: cudaErrorInvalidValue, no launch."""
    before = lib.blocks()
    for sizes, dtype, scalar_dtype in (
        ((2, 2, 4, 1), 4, 4),
        ((2, 2, 4, 1), 2, 3),
        ((2, 2, 4, 1), 0, 1),
        ((2**31, 1, 1, 1), 0, 0),
        ((1, 2**31, 1, 1), 0, 0),
        ((1, 1, 2**31, 1), 0, 0),
    ):
        shape = ctypes.byref(Shape(*sizes))
        arguments = (1, ctypes.byref(Inputs()), None, dtype, scalar_dtype, shape, None)
        assert lib.call("ladderfast_tagger_step_inputs_cuda", *arguments) == 1
        arguments = (
            1,
            ctypes.byref(Outputs()),
            *(None,) * 5,
            ctypes.c_double(EPS),
            dtype,
            scalar_dtype,
            shape,
            None,
        )
        assert lib.call("ladderfast_tagger_step_outputs_cuda", *arguments) == 1
    assert lib.blocks() == before

"""The ConvLSTM step's CUDA kernels, executed on the host (tests/cuda_shim) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace

import cuda_shim
import pytest
import torch
from torch import Tensor

from ladderfast.reference.ln_convlstm import ln_convlstm_step, ln_convlstm_step_backward

pytestmark = cuda_shim.needs_compiler
KERNELS = "ln_convlstm"

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-params-float32"),
    pytest.param(torch.float16, torch.float16, id="float16"),
]

# (seeds, samples, channels, positions, channels_last). Kernels take columns by two, runs by 8 or 16 bytes, a sample's
# moments by 4096 gates, finish columns by 128 rows; the cases lie on both sides of these.
SHAPES = [
    (1, 1, 1, 1, 0),
    (2, 3, 5, 1, 0),  # dense, odd: no whole slices
    (1, 140, 6, 1, 0),  # dense, two chunks of rows
    (1, 2, 1030, 1, 0),  # dense, several blocks of moments, wide rows
    (2, 3, 3, 5, 0),  # runs shorter than a slice allows
    (1, 2, 6, 16, 0),  # whole slices
    (2, 2, 7, 49, 0),
    (1, 1, 5, 1000, 0),  # several chunks of a sample
    (2, 3, 6, 7, 1),
    (1, 2, 64, 20, 1),  # channels last, several blocks of rows
    (1, 1, 33, 131, 1),
]
# (inputs, by channel, normalised cell), beside the inputs normalised by sample, or not at all.
NORMS = [(0, False, True), (1, False, True), (2, False, True), (1, True, False), (2, True, True)]
NORM_SHAPES = [
    *SHAPES,
    (1, 3, 1, 500, 0),  # several chunks of moments by channel, by runs
    (1, 5, 1, 1000, 0),  # several chunks of sums of a channel
]
EMPTY = [(0, 2, 3, 1, 0), (2, 0, 3, 1, 0), (1, 2, 0, 4, 0), (2, 3, 4, 0, 0), (1, 0, 5, 20, 1)]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("seeds", "samples", "channels", "positions", "inputs", "channels_last", "batch", "cell")
    ]


class Inputs(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p * 2),
        ("rec", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("weight", ctypes.c_void_p * 2),
        ("bias", ctypes.c_void_p),
        ("cell_weight", ctypes.c_void_p),
        ("cell_bias", ctypes.c_void_p),
    ]


class Outputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("h", "c_new", "stats", "cell_stats")]


class Gradients(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("h", "c_new", "stats", "cell_stats", "after")),
        ("x", ctypes.c_void_p * 2),
        ("rec", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("weight", ctypes.c_void_p * 2),
        ("bias", ctypes.c_void_p),
        ("cell_weight", ctypes.c_void_p),
        ("cell_bias", ctypes.c_void_p),
    ]


@dataclass
class Case:
    """Tensors as the reference takes them, (seeds, samples, channels, positions)."""

    xs: list[Tensor]
    rec: Tensor
    c: Tensor
    weights: list[Tensor]
    bias: Tensor
    grad_h: Tensor
    grad_c: Tensor
    channels_last: int
    cell: list[Tensor]  # weight and bias of a normalised cell, or nothing
    batch: bool

    @classmethod
    def draw(
        cls,
        shape: tuple[int, ...],
        inputs: int,
        dtype: torch.dtype = torch.float32,
        params_dtype: torch.dtype | None = None,
        *,
        batch: bool = False,
        cell: bool = False,
    ) -> Case:
        seeds, samples, channels, positions, last = shape

        def tensor(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.float64).to(dtype)

        def vector(size: int = 4 * channels) -> Tensor:
            return torch.randn(seeds, size, dtype=torch.float64).to(params_dtype or dtype)

        gates, cells = (seeds, samples, 4 * channels, positions), (seeds, samples, channels, positions)
        return cls(
            [2 * tensor(*gates) + 1 for _ in range(max(inputs, 1))],
            tensor(*gates),
            tensor(*cells),
            [vector() for _ in range(inputs)],
            vector(),
            tensor(*cells),
            tensor(*cells),
            last,
            [vector(channels) for _ in range(2 * cell)],
            batch,
        )

    def to(self, dtype: torch.dtype) -> Case:
        def cast(value):
            if isinstance(value, list):
                return [t.to(dtype) for t in value]
            return value.to(dtype) if isinstance(value, Tensor) else value

        return Case(**{k: cast(v) for k, v in vars(self).items()})


def reference(case: Case) -> list[Tensor]:
    """h, c, then the gradients of xs, rec, c, weights, bias and those of the cell, in the dtype of the case; by channel
    then mean and variance."""
    norm = "batch" if case.batch else "layer"
    weight, bias = case.cell or (None, None)
    h, c, *stats = ln_convlstm_step(
        case.xs,
        case.rec,
        case.c,
        case.weights or None,
        case.bias,
        norm=norm,
        cell_weight=weight,
        cell_bias=bias,
    )
    grads = ln_convlstm_step_backward(
        case.grad_h,
        case.grad_c,
        case.xs,
        case.rec,
        case.c,
        case.weights,
        case.bias,
        case.cell,
        norm=norm,
    )
    return [h, c, *(grads if case.weights else grads[1:]), *stats]


def run(lib: cuda_shim.Library, case: Case, misalignment: int = 0) -> list[Tensor]:
    """What `reference` gives, from the kernels; every second buffer is off by `misalignment` bytes."""
    seeds, samples, channels, positions = case.c.shape
    inputs = len(case.weights)
    cell = len(case.cell) > 0
    shape = Shape(seeds, samples, channels, positions, inputs, case.channels_last, case.batch, cell)
    off = iter([0, misalignment] * 20)

    def packed(t: Tensor) -> Tensor:
        return t.movedim(2, 3) if case.channels_last and t.dim() == 4 else t

    def give(t: Tensor, name: str) -> Tensor:
        return lib.copy(packed(t).contiguous(), name=name, misalignment=next(off))

    def take(t: Tensor, name: str) -> Tensor:
        return lib.empty(tuple(packed(t).shape), t.dtype, name=name, misalignment=next(off))

    def pair(tensors: list[Tensor]) -> ctypes.Array:
        return (ctypes.c_void_p * 2)(*(t.data_ptr() for t in tensors))

    xs = [give(t, f"x{k}") for k, t in enumerate(case.xs)]
    rec, c, bias = give(case.rec, "rec"), give(case.c, "c"), give(case.bias, "bias")
    weights = [give(t, f"weight{k}") for k, t in enumerate(case.weights)]
    vectors = [give(t, name) for t, name in zip(case.cell, ("cell_weight", "cell_bias"), strict=False)]
    given = Inputs(
        pair(xs),
        rec.data_ptr(),
        c.data_ptr(),
        pair(weights),
        bias.data_ptr(),
        *(v.data_ptr() for v in vectors),
    )
    h, c_new = take(case.c, "h"), take(case.c, "c_new")
    compute = torch.float64 if case.c.dtype == torch.float64 else torch.float32
    numbers = (seeds, inputs, 3, 4 * channels) if case.batch else (seeds, samples, inputs, 2)
    stats = lib.empty(numbers, compute, name="stats")
    cell_stats = lib.empty((seeds, samples if cell else 0, 2), compute, name="cell_stats")
    size = lib.call("ladderfast_ln_convlstm_workspace_cuda", ctypes.byref(shape), restype=ctypes.c_int64)
    codes = (cuda_shim.CODES[case.c.dtype], cuda_shim.CODES[case.bias.dtype], ctypes.byref(shape), None)
    outputs = Outputs(h.data_ptr(), c_new.data_ptr(), stats.data_ptr(), cell_stats.data_ptr())
    workspace = lib.empty((size,), torch.uint8, name="workspace")
    status = lib.call(
        "ladderfast_ln_convlstm_forward_cuda",
        ctypes.byref(given),
        ctypes.byref(outputs),
        workspace,
        ctypes.c_double(1e-5),
        *codes,
    )
    assert status == 0

    grad_h, grad_c_new = give(case.grad_h, "grad_h"), give(case.grad_c, "grad_c_new")
    grad_xs = [take(t, f"grad_x{k}") for k, t in enumerate(case.xs[:inputs])]
    grad_rec, grad_c, grad_bias = (
        take(case.rec, "grad_rec"),
        take(case.c, "grad_c"),
        take(case.bias, "grad_bias"),
    )
    grad_weights = [take(t, f"grad_weight{k}") for k, t in enumerate(case.weights)]
    grad_cell = [take(t, f"grad_{name}") for t, name in zip(case.cell, ("weight", "bias"), strict=False)]
    gradients = Gradients(
        grad_h.data_ptr(),
        grad_c_new.data_ptr(),
        stats.data_ptr(),
        cell_stats.data_ptr(),
        c_new.data_ptr() if cell else None,
        pair(grad_xs),
        grad_rec.data_ptr(),
        grad_c.data_ptr(),
        pair(grad_weights),
        grad_bias.data_ptr(),
        *(t.data_ptr() for t in grad_cell),
    )
    workspace = lib.empty((size,), torch.uint8, name="workspace")
    status = lib.call(
        "ladderfast_ln_convlstm_backward_cuda",
        ctypes.byref(given),
        ctypes.byref(gradients),
        workspace,
        *codes,
    )
    assert status == 0
    results = [h, c_new, *grad_xs, grad_rec, grad_c, *grad_weights, grad_bias, *grad_cell]
    of_batch = [stats[:, :, 0], stats[:, :, 2]] if case.batch else []
    return [t.movedim(3, 2) if case.channels_last and t.dim() == 4 else t for t in results] + of_batch


def magnitudes(case: Case) -> list[Tensor]:
    """The size of the terms that are summed up on the way, taking slopes as 1: how far a rounding can reach."""
    case = case.to(torch.float64)
    together = (1, 3) if case.batch else (2, 3)

    def hat_of(x: Tensor, size: Tensor, axes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The size of x_hat where that of x is `size`, and 1 / std."""
        rstd = torch.rsqrt(x.var(axes, correction=0, keepdim=True) + 1e-5)
        return (size + size.mean(axes, keepdim=True)) * rstd, rstd

    def backward_of(grad: Tensor, hat: Tensor, rstd: Tensor, axes: tuple[int, int]) -> Tensor:
        mean, projection = (t.mean(axes, keepdim=True) for t in (grad, grad * hat))
        return rstd * (grad + mean + hat * projection)

    def per_channel(vector: Tensor) -> Tensor:
        return vector.abs()[:, None, :, None]

    gate = case.rec.abs() + per_channel(case.bias)
    hats = [hat_of(x, x.abs(), together) for x, _ in zip(case.xs, case.weights, strict=False)]
    weights = [per_channel(w) for w in case.weights]
    for (hat, _), w in zip(hats, weights, strict=True):
        gate = gate + hat * w
    gate = gate if case.weights else gate + case.xs[0].abs()
    one = 1 + gate.amax((2, 3), keepdim=True)
    c, total, output = case.c.abs() + 1, case.grad_h.abs() + case.grad_c.abs(), one * (case.c.abs() + 1)
    of_cell = []
    if case.cell:
        hat, rstd = hat_of(reference(case)[1], one * c, (2, 3))
        w, b = (per_channel(v) for v in case.cell)
        output = one + hat * w + b
        grad_n = case.grad_h.abs() * output
        total = case.grad_c.abs() + grad_n + backward_of(grad_n * w, hat, rstd, (2, 3))
        of_cell = [(grad_n * hat).sum((1, 3)), grad_n.sum((1, 3))]
    grad_a = (one * total * c).repeat(1, 1, 4, 1)
    of_batch = []
    if case.batch:
        of_batch = [torch.stack([f(x) for x in case.xs], 1) for f in (_mean_size, _variance_size)]
    return [
        output,
        one * c,
        *(backward_of(grad_a * w, *hat, together) for hat, w in zip(hats, weights, strict=True)),
        grad_a,
        one * total,
        *((grad_a * hat).sum((1, 3)) for hat, _ in hats),
        grad_a.sum((1, 3)),
        *of_cell,
        *of_batch,
    ]


def _mean_size(x: Tensor) -> Tensor:
    """Values are taken relative to a channel's first one."""
    return x.abs().amax((1, 3))


def _variance_size(x: Tensor) -> Tensor:
    return 4 * (x - x.mean((1, 3), keepdim=True)).square().amax((1, 3))


def check(lib: cuda_shim.Library, case: Case) -> None:
    """Error at most twice that of plain arithmetic in the type of computation, and one rounding to storage.

    As plain arithmetic may be right by luck, a rounding of the largest term is allowed as well (four in float64, whose
    yardstick is rounded itself). In 16 bits, grad_x and the sums for the parameters are made from gates' gradients that
    were rounded once, and a normalised cell from c' as it is returned.
    """
    compute = torch.float64 if case.c.dtype == torch.float64 else torch.float32
    half = case.c.dtype in (torch.bfloat16, torch.float16)
    exact, plain = reference(case.to(torch.float64)), reference(case.to(compute))
    for index, (a, e, p, terms) in enumerate(
        zip(run(lib, case), exact, plain, magnitudes(case), strict=True)
    ):
        assert a.shape == e.shape
        roundings = 4 if compute == torch.float64 else 1
        largest = terms.max()
        if case.cell:  # whose worst case is far from what happens
            single = 1e-5**-0.5 if case.c[0, 0].numel() == 1 or case.c[0, :, 0].numel() == 1 else 1
            largest = 32 * (e.abs().max() + single * case.c[0, :, 0].numel() ** 0.5)
        allowed = 2 * (p.double() - e).abs().max() + roundings * torch.finfo(compute).eps * largest
        if half:
            exact_inputs = index == 1 or (
                not case.cell and index in (0, 2 + len(case.weights), 3 + len(case.weights))
            )
            size = e.abs() if exact_inputs else terms
            allowed = 4 * allowed + torch.finfo(case.c.dtype).eps / 2 * size
            if a.dtype != torch.float32:
                allowed = allowed + torch.finfo(case.c.dtype).eps / 2 * e.abs() + torch.finfo(a.dtype).tiny
        error = (a.double() - e).abs()
        assert (error <= allowed).all(), f"result {index}: {error.max():.3g}"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    a, b = (t.contiguous().flatten() for t in (a, b))
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("inputs", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(lib, shape, dtype, params_dtype, inputs) -> None:
    check(lib, Case.draw(shape, inputs, dtype, params_dtype))


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norms_against_the_reference(lib, shape, dtype, params_dtype, norm) -> None:
    inputs, batch, cell = norm
    check(lib, Case.draw(shape, inputs, dtype, params_dtype, batch=batch, cell=cell))


def test_a_large_mean_leaves_the_variance_alone(lib) -> None:
    """Gates around 10,000 with a spread of 2, in several blocks."""
    for shape, batch in (((1, 2, 5, 1000, 0), False), ((1, 3, 1, 500, 0), True), ((1, 140, 6, 1, 0), True)):
        case = Case.draw(shape, 1, batch=batch)
        case.xs[0] += 1e4
        check(lib, case)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(lib, shape) -> None:
    """Nothing is read or written but the parameters' gradients and the channels' statistics, which are zero."""
    for inputs, batch, cell in (*((k, False, False) for k in (0, 1, 2)), *NORMS):
        case = Case.draw(shape, inputs, batch=batch, cell=cell)
        for zero in run(lib, case)[len(case.weights) + 4 :]:
            assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 6, 1, 0), (1, 2, 6, 16, 0), (1, 2, 64, 20, 1)], ids=str)
@pytest.mark.parametrize("norm", [(2, False, False), (2, True, True)], ids=str)
def test_alignment_changes_little(lib, shape, dtype, norm) -> None:
    """Pointers need only their element's alignment; how a sum is cut does not depend on it."""
    inputs, batch, cell = norm
    case = Case.draw(shape, inputs, dtype, batch=batch, cell=cell)
    expected = run(lib, case)
    for a, b in zip(expected, run(lib, case, case.c.element_size()), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(1, 140, 6, 1, 0), (1, 2, 5, 1000, 0), (1, 2, 64, 20, 1)], ids=str)
@pytest.mark.parametrize("norm", [(2, False, False), (1, False, True), (1, True, True)], ids=str)
def test_order_changes_no_bit(lib, shape, norm) -> None:
    """Blocks in another order, and threads between barriers, as on another device; and the same order again."""
    inputs, batch, cell = norm
    case = Case.draw(shape, inputs, batch=batch, cell=cell)
    expected = run(lib, case)
    for seed in (0, 1, 2):
        with lib.order(seed):
            for a, b in zip(expected, run(lib, case), strict=True):
                assert_same_bits(a, b)


EXTREMES = (math.inf, -math.inf, math.nan, 1e4)


def with_extreme(case: Case, field: str, value: float) -> Case:
    """A value in the first seed, sample 1, channel 2, last position of a tensor."""
    tensor = (case.xs[0] if field == "xs" else getattr(case, field)).clone()
    tensor[0, 1, 2, -1] = value
    return replace(case, **{field: [tensor, *case.xs[1:]] if field == "xs" else tensor})


@pytest.mark.parametrize("shape", [(2, 3, 5, 1, 0), (1, 3, 3, 17, 0), (1, 3, 6, 7, 1)], ids=str)
@pytest.mark.parametrize("cell", [False, True])
def test_extremes_stay_in_their_sample(lib, shape, cell) -> None:
    clean = Case.draw(shape, 1, cell=cell)
    expected = run(lib, clean)
    for value in EXTREMES:
        for field in ("xs", "rec", "c", "grad_h"):
            for a, b in zip(expected[:5], run(lib, with_extreme(clean, field, value))[:5], strict=True):
                for sample in (0, 2):
                    assert_same_bits(a[0, sample], b[0, sample])
                assert_same_bits(a[1:], b[1:])


@pytest.mark.parametrize("shape", [(2, 3, 5, 1, 0), (1, 3, 3, 17, 0), (1, 3, 6, 7, 1)], ids=str)
def test_extremes_stay_in_their_channel(lib, shape) -> None:
    """By channel, with the cell as it is."""
    clean = Case.draw(shape, 1, batch=True)
    channels = shape[2]
    expected = run(lib, clean)
    for value in EXTREMES:
        for field in ("xs", "rec", "c", "grad_h"):
            for a, b in zip(expected[:5], run(lib, with_extreme(clean, field, value))[:5], strict=True):
                for channel in range(a.shape[2]):
                    if channel % channels != 2:
                        assert_same_bits(a[0, :, channel], b[0, :, channel])
                assert_same_bits(a[1:], b[1:])


def test_saturated_gates(lib) -> None:
    """Gates up to 1e4: finite, and as accurate as elsewhere."""
    case = Case.draw((1, 50, 6, 1, 0), 0)
    case.xs[0] *= torch.logspace(-2, 4, 50).view(1, 50, 1, 1)
    assert all(t.isfinite().all() for t in run(lib, case))
    check(lib, case)


def test_refused(lib) -> None:
    """Unknown dtypes, parameters of a dtype of their own and sizes beyond 32 bits: cudaErrorInvalidValue, no launch."""
    before = lib.blocks()
    small = Shape(1, 2, 3, 1, 1, 0)
    pointers = (ctypes.byref(Inputs()), ctypes.byref(Outputs()), None, ctypes.c_double(0.0))
    gradients = (ctypes.byref(Inputs()), ctypes.byref(Gradients()), None)
    for dtype, params_dtype, shape in (
        (4, 4, small),
        (-1, 0, small),
        (2, 3, small),
        (0, 2, small),
        (1, 0, small),
        (0, 0, Shape(1, 1, 2**30, 1, 1, 0)),
        (0, 0, Shape(1, 1, 2**15, 2**15, 1, 0)),
        (0, 0, Shape(1, 2, 3, 1, 3, 0)),
        (0, 0, Shape(1, 2, 3, 1, 0, 0, batch=1)),  # statistics of no input
        (0, 0, Shape(1, 2**29, 1, 17, 1, 0, batch=1)),
    ):
        codes = (dtype, params_dtype, ctypes.byref(shape), None)
        assert lib.call("ladderfast_ln_convlstm_forward_cuda", *pointers, *codes) == 1
        assert lib.call("ladderfast_ln_convlstm_backward_cuda", *gradients, *codes) == 1
    assert lib.blocks() == before

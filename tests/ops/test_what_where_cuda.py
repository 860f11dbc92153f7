"""The CUDA kernels of soft pooling and unpooling, executed on the host (tests/cuda_shim) and compared with the float64
reference."""

from __future__ import annotations

import ctypes

import cuda_shim
import pytest
import torch
from torch import Tensor

from ladderfast.reference import what_where as reference

pytestmark = cuda_shim.needs_compiler
KERNELS = "what_where"

# (outer, height, width, inner), kernel. Kernels are shared by 1, 2 or 8 threads with pairs of columns, by 1, 4 or 16
# without; a block is 256 threads.
CASES = [
    ((1, 1, 1, 1), (1, 1)),
    ((3, 4, 6, 1), (2, 2)),  # pairs, one thread
    ((2, 5, 7, 1), (2, 2)),  # an odd width, hence no pairs; a rest
    ((5, 8, 8, 1), (4, 4)),  # pairs, two threads
    ((2, 9, 13, 1), (3, 6)),
    ((3, 16, 34, 1), (16, 16)),  # pairs, eight threads, a rest that is even
    ((1, 7, 40, 1), (1, 10)),
    ((2, 10, 9, 1), (3, 3)),  # four threads for three columns
    ((1, 16, 45, 1), (16, 15)),  # sixteen
    ((2, 4, 6, 20), (2, 2)),  # channels innermost
    ((1, 7, 9, 3), (3, 4)),
    ((40, 4, 8, 1), (2, 2)),  # several blocks
]
NAMES = ["x".join(map(str, shape)) + "-" + "x".join(map(str, kernel)) for shape, kernel in CASES]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("outer", "height", "width", "inner", "kernel_h", "kernel_w")
    ]


def first(t: Tensor) -> Tensor:
    """From the reference's order of axes, (N, C, ...), to the kernels', (outer, ..., inner): N and C are those."""
    return t.movedim(1, -1)


def draw(case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs in the reference's order of axes, with N = outer and C = inner; one place in five is beyond [-1, 1]."""
    (outer, height, width, inner), (rows, columns) = case
    h, w = height // rows, width // columns
    shapes = {
        "z": (outer, inner, height, width),
        "grad_what": (outer, inner, h, w),
        "grad_where": (outer, inner, 2, h, w),
        "what": (outer, inner, h, w),
        "grad_z": (outer, inner, h * rows, w * columns),
    }
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["where"] = 2.5 * torch.rand(shapes["grad_where"], dtype=torch.float64) - 1.25
    return {name: t.to(dtype) for name, t in tensors.items()}


def run(lib, case, data, beta: float, off: int = 0) -> dict[str, Tensor]:
    """All four kernels; results in the reference's order of axes."""
    (outer, height, width, inner), (rows, columns) = case
    dtype, shape = data["z"].dtype, Shape(outer, height, width, inner, rows, columns)
    tail = (cuda_shim.CODES[dtype], ctypes.byref(shape), None)
    inputs = {name: lib.copy(first(t), name=name, misalignment=off) for name, t in data.items()}

    def output(name: str, like: str) -> Tensor:
        return lib.empty(tuple(first(data[like]).shape), dtype, name=name, misalignment=off)

    what, where, grad_z = output("what", "what"), output("where", "where"), output("grad_z", "z")
    sharp = ctypes.c_double(beta)
    assert lib.call("ladderfast_soft_pool_forward_cuda", inputs["z"], what, where, sharp, *tail) == 0
    pooled = inputs["grad_what"], inputs["grad_where"]
    assert lib.call("ladderfast_soft_pool_backward_cuda", *pooled, inputs["z"], grad_z, sharp, *tail) == 0

    cut = Shape(outer, height // rows * rows, width // columns * columns, inner, rows, columns)
    tail = (cuda_shim.CODES[dtype], ctypes.byref(cut), None)
    z, grad_what, grad_where = (
        output("z", "grad_z"),
        output("grad_what", "what"),
        output("grad_where", "where"),
    )
    placed = inputs["what"], inputs["where"]
    assert lib.call("ladderfast_soft_unpool_forward_cuda", *placed, z, *tail) == 0
    arguments = (inputs["grad_z"], *placed, grad_what, grad_where, *tail)
    assert lib.call("ladderfast_soft_unpool_backward_cuda", *arguments) == 0
    results = {
        "what": what,
        "where": where,
        "grad_z": grad_z,
        "z": z,
        "grad_what": grad_what,
        "grad_where": grad_where,
    }
    return {name: t.movedim(-1, 1) for name, t in results.items()}


def expected(case, data, beta: float) -> dict[str, Tensor]:
    kernel = case[1]
    what, where = reference.soft_pool2d(data["z"], kernel, beta)
    pooled = data["grad_what"], data["grad_where"]
    grad_what, grad_where = reference.soft_unpool2d_backward(
        data["grad_z"], data["what"], data["where"], kernel
    )
    return {
        "what": what,
        "where": where,
        "grad_z": reference.soft_pool2d_backward(*pooled, data["z"], kernel, beta),
        "z": reference.soft_unpool2d(data["what"], data["where"], kernel),
        "grad_what": grad_what,
        "grad_where": grad_where,
    }


def sizes(case, data, beta: float) -> dict[str, Tensor]:
    """Those of the terms that make the results, which are rounded: of z, and of places in pixels."""
    z, weights = data["z"], reference._soft_weights(reference._windows(data["z"], case[1]), beta)
    far = max(case[1])
    sharp = data["grad_what"].abs() * (1 + 2 * beta * z.abs().max())
    sharp = sharp + 2 * beta * data["grad_where"].abs().sum(2)
    m, g = data["what"].abs().max(), data["grad_z"].abs().max()
    return {
        "what": z.abs().max(),
        "where": torch.ones(()),
        "grad_z": (weights * sharp[:, :, :, None, :, None]).max(),
        "z": m * far,
        "grad_what": 4 * g * far,
        "grad_where": 4 * m * g * far * far,
    }


def check(lib, case, data, beta: float) -> None:
    """Error at most twice that of plain PyTorch in the type of computation, one rounding of the largest term (four in
    float64), and one rounding to the type of storage."""
    dtype = data["z"].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exact_data = {k: t.double() for k, t in data.items()}
    ours, exact = run(lib, case, data, beta), expected(case, exact_data, beta)
    plain = expected(case, {k: t.to(compute) for k, t in data.items()}, beta)
    terms = sizes(case, exact_data, beta)
    for name, value in ours.items():
        roundings = 4 if compute == torch.float64 else 1
        allowed = 2 * (plain[name].double() - exact[name]).abs().max()
        allowed = allowed + roundings * torch.finfo(compute).eps * terms[name]
        error = (value.double() - exact[name]).abs()
        if value.element_size() == 2:
            error = error - (exact[name].to(dtype).double() - exact[name]).abs()
            allowed = 4 * allowed  # near the middle between two values the other one may be taken
        assert error.max() <= allowed, f"{name}: error {error.max():.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", list(cuda_shim.CODES), ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_against_the_reference(lib, case, dtype) -> None:
    data = draw(case, dtype)
    for beta in (0.0, 2.0, 100.0):
        check(lib, case, data, beta)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8)) for k in a
    )


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[9]], ids=["pairs", "eight", "channels"])
def test_order_changes_no_bit(lib, case) -> None:
    data = draw(case, torch.float32)
    results = run(lib, case, data, 3.0)
    for seed in (1, 2):
        with lib.order(seed):
            assert same_bits(results, run(lib, case, data, 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_alignment(lib, dtype) -> None:
    """Pointers need only their element's alignment."""
    for case in (CASES[1], CASES[5]):
        data = draw(case, dtype)
        aligned, off = run(lib, case, data, 3.0), run(lib, case, data, 3.0, off=data["z"].element_size())
        for name, value in aligned.items():
            torch.testing.assert_close(value, off[name])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e30, -1e30])
@pytest.mark.parametrize(
    "case", [((2, 4, 6, 1), (2, 2)), ((2, 6, 6, 3), (3, 2)), ((2, 16, 32, 1), (16, 16))], ids=str
)
def test_extremes_stay_in_their_window(lib, case, bad) -> None:
    data = draw(case, torch.float32)
    calm = run(lib, case, data, 100.0)
    (rows, columns) = case[1]
    data["z"][1, -1, rows - 1, columns - 1] = bad
    data["where"][1, -1, 1, 0, 0] = bad
    struck = run(lib, case, data, 100.0)
    elsewhere = torch.ones(data["what"].shape, dtype=torch.bool)
    elsewhere[1, -1, 0, 0] = False
    pixels = elsewhere.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    for name, value in struck.items():
        mask = pixels if name in ("z", "grad_z") else elsewhere
        mask = mask.unsqueeze(2).expand_as(value) if value.dim() == 5 else mask
        assert torch.equal(value[mask], calm[name][mask])
        if abs(bad) == 1e30:
            assert value.isfinite().all()


@pytest.mark.parametrize("k", [2, 3, 4, 16])
def test_slopes_on_pixels(lib, k) -> None:
    """The slope on a pixel is the one that the reference takes."""
    at = (2 * torch.arange(k) - (k - 1)) / (k - 1)
    y, x = torch.meshgrid(at, at, indexing="ij")
    case = ((1, k * k, k * k, 1), (k, k))
    data = draw(case, torch.float32)
    data["where"] = torch.stack([x, y])[None, None]
    ours, plain = run(lib, case, data, 1.0), expected(case, data, 1.0)
    torch.testing.assert_close(ours["grad_where"], plain["grad_where"], rtol=1e-4, atol=1e-4)


def test_refused(lib) -> None:
    """Unknown dtypes, kernels out of range and sizes beyond 32 bits: cudaErrorInvalidValue, no launch."""
    before = lib.blocks()
    sharp = ctypes.c_double(1.0)
    for dtype, shape in (
        (4, Shape(1, 4, 4, 1, 2, 2)),
        (-1, Shape(1, 4, 4, 1, 2, 2)),
        (0, Shape(1, 40, 4, 1, 17, 2)),
        (0, Shape(1, 4, 4, 1, 2, 0)),
        (0, Shape(2**31, 2, 2, 1, 2, 2)),
    ):
        tail = (dtype, ctypes.byref(shape), None)
        assert lib.call("ladderfast_soft_pool_forward_cuda", None, None, None, sharp, *tail) == 1
        assert lib.call("ladderfast_soft_pool_backward_cuda", None, None, None, None, sharp, *tail) == 1
        assert lib.call("ladderfast_soft_unpool_forward_cuda", None, None, None, *tail) == 1
        assert lib.call("ladderfast_soft_unpool_backward_cuda", None, None, None, None, None, *tail) == 1
    assert lib.blocks() == before


@pytest.mark.parametrize("shape", [(0, 4, 4, 1), (3, 4, 4, 0)], ids=str)
def test_empty(lib, shape) -> None:
    before = lib.blocks()
    run(lib, (shape, (2, 2)), draw((shape, (2, 2)), torch.float32), 1.0)
    assert lib.blocks() == before


# Hard pooling and unpooling.


def draw_hard(case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Few values, so that many are equal, and among them NaN and -inf; what and grad_z are what `draw` makes of them.

    grad_z has the rows and columns that fill no window.
    """
    (outer, height, width, inner), _ = case
    data = draw(case, dtype)
    for name in ("z", "grad_z"):
        data[name] = torch.randint(-2, 3, (outer, inner, height, width)).double()
    for value in (float("nan"), float("-inf")):
        data["z"][torch.rand(data["z"].shape) < 0.08] = value
    return {name: data[name].to(dtype) for name in ("z", "what", "grad_z")}


def run_hard(
    lib, case, data, positions: bool, off: int = 0, where: Tensor | None = None
) -> dict[str, Tensor]:
    """All three kernels, unpooling at `where` if given; results in the reference's order of axes."""
    (outer, height, width, inner), (rows, columns) = case
    dtype, shape = data["z"].dtype, Shape(outer, height, width, inner, rows, columns)
    tail = (int(positions), cuda_shim.CODES[dtype], ctypes.byref(shape), None)
    inputs = {name: lib.copy(first(t), name=name, misalignment=off) for name, t in data.items()}

    def output(name: str, like: str, dtype: torch.dtype = dtype) -> Tensor:
        return lib.empty(tuple(first(data[like]).shape), dtype, name=name, misalignment=off)

    pooled, z, grad_what = output("pooled", "what"), output("z", "z"), output("grad_what", "what")
    found = lib.empty(
        tuple(pooled.shape),
        torch.int64 if positions else torch.uint8,
        name="where",
        misalignment=off // 8 * 8,
    )
    assert lib.call("ladderfast_max_pool_forward_cuda", inputs["z"], pooled, found, *tail) == 0
    at = found if where is None else lib.copy(first(where), name="where")
    assert lib.call("ladderfast_max_unpool_forward_cuda", inputs["what"], at, z, *tail) == 0
    assert lib.call("ladderfast_max_unpool_backward_cuda", inputs["grad_z"], at, grad_what, *tail) == 0
    results = {"pooled": pooled, "where": found, "z": z, "grad_what": grad_what}
    return {name: t.movedim(-1, 1) for name, t in results.items()}


def expected_hard(case, data, positions: bool, where: Tensor | None = None) -> dict[str, Tensor]:
    kernel = case[1]
    pooled, found = reference.where_max_pool2d(data["z"], kernel, positions=positions)
    at = found if where is None else where
    return {
        "pooled": pooled,
        "where": found,
        "z": reference.where_max_unpool2d(data["what"], at, kernel, case[0][1:3]),
        "grad_what": reference.where_max_unpool2d_backward(data["grad_z"], at, kernel),
    }


def check_hard(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        assert value.dtype == exact[name].dtype, name
        torch.testing.assert_close(value, exact[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", list(cuda_shim.CODES), ids=str)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_hard_against_the_reference(lib, case, positions, dtype) -> None:
    data = draw_hard(case, dtype)
    check_hard(run_hard(lib, case, data, positions), expected_hard(case, data, positions))


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]], ids=["pairs", "eight", "sixteen"])
def test_hard_in_any_order_and_alignment(lib, case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        data = draw_hard(case, dtype)
        exact = expected_hard(case, data, True)
        check_hard(run_hard(lib, case, data, True, off=data["z"].element_size()), exact)
        for seed in (1, 2):
            with lib.order(seed):
                check_hard(run_hard(lib, case, data, True), exact)


@pytest.mark.parametrize(
    "case", [CASES[2], CASES[4], CASES[5], CASES[9]], ids=["two", "six", "16", "channels"]
)
def test_places_outside_the_window(lib, case) -> None:
    """Nothing is put anywhere and the gradient is 0."""
    (_, height, width, _), (rows, columns) = case
    data = draw_hard(case, torch.float32)
    for positions in (False, True):
        where = reference.where_max_pool2d(data["z"], case[1], positions=positions)[1]
        last = (height // rows - 1) * rows * width + (width // columns - 1) * columns  # of the last window
        wrong = [min(rows * columns, 255), 255] if rows * columns < 256 else []
        if positions:
            wrong = [
                last - 1,
                last + columns,
                last - width,
                last + rows * width,
                -1,
                2**40,
                -(2**40),
                2**31 + last,
            ]
        for value in wrong:
            bad = where.clone()
            bad[1, -1, -1, -1] = value
            ours, exact = (
                run_hard(lib, case, data, positions, where=bad),
                expected_hard(case, data, positions, bad),
            )
            check_hard(ours, exact)
            assert ours["grad_what"][1, -1, -1, -1] == 0
            assert not ours["z"][
                1, -1, (height // rows - 1) * rows :, (width // columns - 1) * columns :
            ].any()


def test_hard_refused_and_empty(lib) -> None:
    before = lib.blocks()
    for dtype, shape, result in (
        (4, Shape(1, 4, 4, 1, 2, 2), 1),
        (0, Shape(1, 40, 4, 1, 17, 2), 1),
        (0, Shape(2**31, 2, 2, 1, 2, 2), 1),
        (0, Shape(0, 4, 4, 1, 2, 2), 0),
    ):
        for positions in (0, 1):
            tail = (positions, dtype, ctypes.byref(shape), None)
            for kernel in ("max_pool_forward", "max_unpool_forward", "max_unpool_backward"):
                assert lib.call(f"ladderfast_{kernel}_cuda", None, None, None, *tail) == result
    assert lib.blocks() == before

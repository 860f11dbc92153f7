"""The Ladder decoder's CUDA kernels, executed on the host (tests/cuda_shim) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace

import cuda_shim
import pytest
import torch
from ladder_decoder_cases import HALF, Case, Results, Sizes, check
from torch import Tensor

from ladderfast.reference.ladder_encoder import moments

pytestmark = cuda_shim.needs_compiler
KERNELS = "ladder_decoder"

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-params-float32"),
    pytest.param(torch.float16, torch.float32, id="float16-params-float32"),
]

# (seeds, rows, channels, inner). A block holds a layer of up to 512 rows (256 in 16 and 64 bits) or a channel of up to
# 8192 elements in runs of 16 bytes; larger ones are cut into chunks, as columns up to inner = 16 and as runs above.
HELD = [
    (1, 1, 1, 1),
    (1, 7, 1, 1),  # a single column
    (1, 3, 10, 1),  # less than a warp
    (2, 100, 20, 1),
    (1, 200, 37, 1),  # odd: no whole slices
    (3, 5, 7, 3),  # runs shorter than a slice
    (1, 40, 6, 16),
    (2, 11, 3, 49),  # 7 x 7, a last slice of one
    (1, 1, 2, 700),  # a single row
]
EDGE = [  # held in float32 only, then in no dtype
    (1, 512, 3, 1),
    (1, 513, 3, 1),
]
CHUNKS = [
    (2, 600, 10, 1),  # a narrow layer
    (1, 515, 67, 1),  # odd, two tiles, the last one partly filled
    (1, 2060, 2, 3),  # channels that are no whole slices
    (1, 1040, 15, 5),  # and tiles of them
    (1, 530, 3, 16),  # the longest run taken as columns
    (1, 411, 3, 17),  # the shortest run taken as a run, no whole slices
    (2, 9, 2, 1024),  # chunks of whole slices
    (1, 3, 1, 4099),
]
EMPTY = [(0, 2, 3, 1), (2, 0, 3, 1), (1, 2, 0, 1), (2, 3, 4, 0), (1, 0, 5, 20)]
MODES = ["cost", "layer0", "no-cost"]
OUTPUTS = ("grad_u", "grad_z", "grad_clean_z", "grad_params", "grad_mean", "grad_var")


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("seeds", "rows", "channels", "inner")]


class Options(ctypes.Structure):
    _fields_ = [("eps", ctypes.c_double), ("squash_v", ctypes.c_int)]


def beside(off: int, dtype: torch.dtype) -> int:
    return max(off, dtype.itemsize) if off else 0


def inputs(lib: cuda_shim.Library, case: Case, off: tuple[int, ...]) -> dict[str, Tensor | None]:
    """Guarded copies, the n-th of them off[n % len(off)] bytes or an element beside a multiple of 16."""
    there: dict[str, Tensor | None] = {f.name: None for f in fields(case)}
    for n, (name, t) in enumerate(case.tensors.items()):
        there[name] = lib.copy(t, name=name, misalignment=beside(off[n % len(off)], t.dtype))
    return there


def codes(case: Case) -> list[object]:
    options = Options(case.eps, case.squash)
    shape = Shape(*case.u.shape)
    return [
        cuda_shim.CODES[case.u.dtype],
        cuda_shim.CODES[case.params.dtype],
        ctypes.byref(options),
        ctypes.byref(shape),
        None,
    ]


def scratch(lib: cuda_shim.Library, case: Case, name: str) -> Tensor:
    function = f"ladderfast_ladder_decoder_{name}_cuda"
    size = lib.call(function, ctypes.byref(Shape(*case.u.shape)), restype=ctypes.c_int64)
    return lib.empty((size,), torch.uint8, name="workspace")


def run(
    lib: cuda_shim.Library,
    case: Case,
    off: tuple[int, ...] = (0,),
    wanted: tuple[str, ...] = OUTPUTS,
) -> Results:
    """Both passes, the second with the statistics of the first."""
    t = inputs(lib, case, off)
    shape, dtype = tuple(case.u.shape), case.u.dtype
    wide = torch.float32 if dtype in HALF else dtype
    per_channel = (shape[0], shape[2])
    z_hat = lib.empty(shape, dtype, name="z_hat", misalignment=off[-1])
    u_mean, u_var = (lib.empty(per_channel, wide, name=name) for name in ("u_mean", "u_var"))
    cost = None if case.clean_z is None else lib.empty((shape[0],), wide, name="cost")
    layer = (t["u"], t["z"], t["params"], t["clean_z"], t["mean"], t["var"])
    arguments = (*layer, z_hat, u_mean, u_var, cost, scratch(lib, case, "workspace"), *codes(case))
    assert lib.call("ladderfast_ladder_decoder_forward_cuda", *arguments) == 0
    results = {"z_hat": z_hat, "u_mean": u_mean, "u_var": u_var}
    if cost is not None:
        results["cost"] = cost

    outs: dict[str, Tensor | None] = dict.fromkeys(OUTPUTS)
    for name in wanted:
        if (name == "grad_clean_z" and case.grad_cost is None) or (
            name in ("grad_mean", "grad_var") and case.mean is None
        ):
            continue
        size = {"grad_params": tuple(case.params.shape), "grad_mean": per_channel, "grad_var": per_channel}
        kind = {"grad_params": case.params.dtype, "grad_mean": wide, "grad_var": wide}
        own = kind.get(name, dtype)
        outs[name] = lib.empty(size.get(name, shape), own, name=name, misalignment=beside(off[-1], own))
    arguments = (t["grad_z_hat"], t["grad_cost"], *layer, u_mean, u_var, *(outs[n] for n in OUTPUTS))
    arguments = (*arguments, scratch(lib, case, "backward_workspace"), *codes(case))
    assert lib.call("ladderfast_ladder_decoder_backward_cuda", *arguments) == 0
    return results | {name: out for name, out in outs.items() if out is not None}


def assert_same_bits(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
@pytest.mark.parametrize("shape", HELD, ids=str)
def test_held(
    lib: cuda_shim.Library,
    shape: Sizes,
    dtype: torch.dtype,
    params_dtype: torch.dtype,
    mode: str,
) -> None:
    case = Case.draw(shape, dtype, params_dtype, mode, squash=mode == "layer0")
    check(run(lib, case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", EDGE + CHUNKS, ids=str)
def test_chunks(lib: cuda_shim.Library, shape: Sizes, dtype: torch.dtype) -> None:
    case = Case.draw(shape, dtype)
    check(run(lib, case), case)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 515, 6, 1), (2, 9, 2, 1024)], ids=str)
def test_chunks_without_cost_and_at_layer_0(
    lib: cuda_shim.Library, shape: Sizes, dtype: torch.dtype, mode: str
) -> None:
    case = Case.draw(shape, dtype, torch.float32, mode, squash=True)
    check(run(lib, case), case)


def test_long_walks(lib: cuda_shim.Library) -> None:
    """Threads go round their loops more than once and end within them; a seed's chunks are at their most."""
    case = Case.draw((1, 16500, 2, 1))
    check(run(lib, case), case)
    case = Case.draw((1, 10, 1, 8200))
    check(run(lib, case), case)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(lib: cuda_shim.Library, shape: Sizes) -> None:
    """Statistics, cost and the gradients of what belongs to channels are zero."""
    case = Case.draw(shape)
    results = run(lib, case)
    for name in ("u_mean", "u_var", "cost", "grad_params", "grad_mean", "grad_var"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


BOTH_WAYS = [
    (2, 70, 18, 1),
    (2, 4, 3, 48),
    (1, 515, 6, 1),
    (1, 9, 2, 1024),
]  # held and in chunks, whole slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", BOTH_WAYS, ids=str)
def test_alignment_changes_no_bit(lib: cuda_shim.Library, shape: Sizes, dtype: torch.dtype) -> None:
    """Pointers need only their element's alignment. Some are off by an element, then all by 8 bytes."""
    case = Case.draw(shape, dtype)
    expected = run(lib, case)
    size = case.u.element_size()
    for off in ((size, 0, 0), (0, size, size), (0, 0, size), (8,)):
        assert_same_bits(expected, run(lib, case, off=off))


@pytest.mark.parametrize("shape", BOTH_WAYS, ids=str)
def test_order_changes_no_bit(lib: cuda_shim.Library, shape: Sizes) -> None:
    """Blocks in another order, and threads between barriers, as on another device; and the same order again."""
    case = Case.draw(shape)
    expected = run(lib, case)
    for seed in (0, 1, 2):
        with lib.order(seed):
            assert_same_bits(expected, run(lib, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", BOTH_WAYS, ids=str)
def test_what_is_not_given_or_wanted(lib: cuda_shim.Library, shape: Sizes, dtype: torch.dtype) -> None:
    """Gradients that do not come are zero, and an output is the same whether or not others are wanted."""
    whole = Case.draw(shape, dtype)
    nothing = replace(whole, grad_z_hat=None, grad_cost=None)
    for name, out in run(lib, nothing).items():
        if name.startswith("grad"):
            assert torch.equal(out, torch.zeros_like(out)), name
    for case in (whole, replace(whole, grad_z_hat=None), replace(whole, grad_cost=None)):
        everything = run(lib, case)
        check(everything, case)
        for wanted in (("grad_params",), ("grad_params", "grad_u"), ("grad_params", "grad_z", "grad_var")):
            some = run(lib, case, wanted=wanted)
            assert set(some) & set(OUTPUTS) == set(wanted) & set(everything)
            assert_same_bits({name: everything[name] for name in some}, some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 6, 1), (2, 3, 4, 51), (2, 515, 3, 1), (2, 9, 3, 1024)], ids=str)
def test_extremes_stay_where_they_are(lib: cuda_shim.Library, shape: Sizes, dtype: torch.dtype) -> None:
    """inf, NaN or 1e4 in one element changes its channel and its seed's cost, no other bit; in z and clean_z, of z_hat
    only that element."""
    clean = Case.draw(shape, dtype, torch.float32)
    expected = run(lib, clean)
    seed, row, channel, position = 1, shape[1] // 2, 1, shape[3] - 1
    for value in (float("inf"), float("nan"), -1e4):
        for field in ("u", "z", "clean_z", "grad_z_hat"):
            case = clean.map(Tensor.clone)
            case.tensors[field][seed, row, channel, position] = value
            results = run(lib, case)
            if abs(value) == 1e4:
                assert all(r.isfinite().all() for r in results.values())
            for name, a in expected.items():
                touched = torch.zeros(a.shape, dtype=torch.bool)
                if a.dim() == 1:
                    touched[seed] = True
                elif a.dim() == 2:
                    touched[seed, channel] = True
                elif a.dim() == 3 or field == "u" or name == "grad_u":
                    touched[seed, :, channel] = True
                else:
                    touched[seed, row, channel, position] = True
                b = results[name]
                assert torch.equal(a[~touched], b[~touched]), (field, value, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", BOTH_WAYS, ids=str)
def test_constant_channels(lib: cuda_shim.Library, shape: Sizes, dtype: torch.dtype) -> None:
    """Mean the value and variance 0, exactly; everything finite, and as accurate as plain arithmetic."""
    case = Case.draw(shape, dtype, torch.float32)
    case.u[:, :, 0] = 0.1
    case.u[:, :, 1] = 1e4
    case.var[:, 0] = 0
    case.mean[:, 0] = case.z[:, 0, 0, 0].float()
    results = run(lib, case)
    assert torch.equal(results["u_mean"][:, :2], case.u[:, 0, :2, 0].float())
    assert torch.equal(results["u_var"][:, :2], torch.zeros(shape[0], 2))
    assert all(r.isfinite().all() for r in results.values())
    check(results, case)


@pytest.mark.parametrize("shape", [*BOTH_WAYS, (1, 40, 6, 16), (1, 530, 3, 16)], ids=str)
def test_large_mean(lib: cuda_shim.Library, shape: Sizes) -> None:
    """Mean 1e4 and variance 1e-2 in float32, with a first value that lies far off: the variance keeps its digits."""
    case = Case.draw(shape)
    case.u.copy_(1e4 + 0.1 * torch.randn(shape, dtype=torch.float64))
    case.u[:, 0, 0, 0] = -50.0
    results = run(lib, case)
    mean, var = (torch.stack(t) for t in zip(*(moments(u) for u in case.u.double()), strict=True))
    torch.testing.assert_close(results["u_mean"].double(), mean, rtol=1.2e-7, atol=0.0)
    torch.testing.assert_close(results.pop("u_var").double(), var, rtol=1e-6, atol=0.0)
    check(results, case)


def test_no_cost_costs_nothing(lib: cuda_shim.Library) -> None:
    """Without clean_z there is no launch for the cost."""
    launches = {}
    for mode in ("cost", "no-cost"):
        before = lib.blocks()
        run(lib, Case.draw((3, 20, 4, 1), mode=mode))
        launches[mode] = lib.blocks() - before
    assert launches == {"cost": 3 + 3 + 3, "no-cost": 3 + 3}


def test_refused(lib: cuda_shim.Library) -> None:
    """Unknown dtypes, parameters of a dtype of their own and sizes beyond 32 bits: cudaErrorInvalidValue, no launch."""
    before = lib.blocks()
    options = ctypes.byref(Options(1e-10, 0))
    for name, pointers in (("forward", 11), ("backward", 17)):
        function = f"ladderfast_ladder_decoder_{name}_cuda"
        for dtype, params_dtype in ((4, 4), (-1, 0), (2, 3), (0, 2), (0, 1)):
            arguments = (*([None] * pointers), dtype, params_dtype, options)
            assert lib.call(function, *arguments, ctypes.byref(Shape(1, 2, 3, 1)), None) == 1
        for huge in (Shape(1, 1, 2**31, 1), Shape(1, 1, 1, 2**31), Shape(1, 2**32, 1, 100)):
            assert lib.call(function, *([None] * pointers), 0, 0, options, ctypes.byref(huge), None) == 1
            size = (
                f"ladderfast_ladder_decoder_{'workspace' if name == 'forward' else 'backward_workspace'}_cuda"
            )
            assert lib.call(size, ctypes.byref(huge), restype=ctypes.c_int64) == 0
    assert lib.blocks() == before

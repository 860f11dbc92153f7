"""The Ladder decoder's CUDA kernels, executed on the host (tests/cuda_shim) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields, replace

import cuda_shim
import pytest
import torch
from torch import Tensor

from ladderfast.reference.ladder_decoder import ladder_decoder
from ladderfast.reference.ladder_encoder import moments

pytestmark = pytest.mark.skipif(
    cuda_shim.compiler() is None, reason="needs g++ to compile kernels for the host"
)

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
HALF = (torch.bfloat16, torch.float16)
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-params-float32"),
    pytest.param(torch.float16, torch.float32, id="float16-params-float32"),
]
Sizes = tuple[int, int, int, int]

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


@dataclass
class Case:
    u: Tensor
    z: Tensor
    params: Tensor
    clean_z: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    grad_z_hat: Tensor | None
    grad_cost: Tensor | None
    squash: bool = False
    eps: float = 1e-10

    @classmethod
    def draw(
        cls,
        shape: Sizes,
        dtype: torch.dtype = torch.float32,
        params_dtype: torch.dtype | None = None,
        mode: str = "cost",
        squash: bool = False,
    ) -> Case:
        wide = torch.float32 if dtype in HALF else dtype
        seeds, _, channels, _ = shape
        clean, u, z, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
        params = torch.randn(seeds, 10, channels, dtype=torch.float64)
        mean = torch.randn(seeds, channels, dtype=torch.float64)
        var = torch.rand(seeds, channels, dtype=torch.float64) + 0.5
        # Of the size that makes both ways into z_hat count.
        grad_cost = torch.rand(seeds, dtype=torch.float64) * shape[1] * channels * shape[3]
        return cls(
            u=(2 * u + 3).to(dtype),
            z=(2 * z).to(dtype),
            params=params.to(params_dtype or dtype),
            clean_z=None if mode == "no-cost" else clean.to(dtype),
            mean=mean.to(wide) if mode == "cost" else None,
            var=var.to(wide) if mode == "cost" else None,
            grad_z_hat=grad.to(dtype),
            grad_cost=None if mode == "no-cost" else grad_cost.to(wide),
            squash=squash,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function) -> Case:
        return replace(self, **{name: function(t) for name, t in self.tensors.items()})


Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def lib() -> cuda_shim.Library:
    return cuda_shim.load("ladder_decoder")


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
        CODES[case.u.dtype],
        CODES[case.params.dtype],
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


def reference(case: Case, dtype: torch.dtype) -> Results:
    """The op and its gradients by autograd in `dtype`, seed by seed."""
    case = case.map(lambda t: t.to(dtype))
    seeds: list[Results] = []
    for s in range(len(case.u)):
        names = [n for n in ("u", "z", "clean_z", "params", "mean", "var") if n in case.tensors]
        leaves = {n: case.tensors[n][s].detach().requires_grad_() for n in names}
        z_hat, cost = ladder_decoder(**leaves, squash_v=case.squash, eps=case.eps)
        mean, var = moments(leaves["u"].detach())
        results = {"z_hat": z_hat.detach(), "u_mean": mean, "u_var": var}
        total = z_hat.new_zeros(())
        if case.grad_z_hat is not None:
            total = total + (z_hat * case.grad_z_hat[s]).sum()
        if cost is not None:
            results["cost"] = cost.detach()
            if case.grad_cost is not None:
                total = total + cost * case.grad_cost[s]
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        seeds.append(results | {f"grad_{n}": g for n, g in zip(names, grads, strict=True)})
    return {n: torch.stack([r[n] for r in seeds]) for n in seeds[0]}


def magnitudes(case: Case) -> Results:
    """The formulas on absolute values with every minus turned into a plus: sizes of their terms."""
    case = case.map(lambda t: t.double())
    n = case.u[0, :, 0].numel()
    mean_u = case.u.mean((1, 3))
    var_u = case.u.var((1, 3), correction=0)
    rstd_u = (var_u + case.eps).rsqrt()[:, None, :, None]
    case = case.map(Tensor.abs)
    wide_mean = mean_u.abs()[:, None, :, None]
    v = ((case.u + wide_mean) * rstd_u).requires_grad_()
    z, params = case.z.clone().requires_grad_(), case.params.clone().requires_grad_()
    a = [row[:, None, :, None] for row in params.unbind(1)]
    mu = a[0] * torch.sigmoid(a[1] * v + a[2]) + a[3] * v + a[4]
    w = a[5] * torch.sigmoid(a[6] * v + a[7]) + a[8] * v + a[9]
    z_hat = (z + mu) * (torch.sigmoid(w) if case.squash else w) + mu
    sizes = {"z_hat": z_hat.detach(), "u_mean": mean_u.abs() + var_u.sqrt(), "u_var": var_u}
    sizes |= {"grad_mean": torch.zeros(()), "grad_var": torch.zeros(())}
    grad = torch.zeros_like(z_hat) if case.grad_z_hat is None else case.grad_z_hat.clone()
    if case.clean_z is not None:
        rstd = torch.ones_like(rstd_u)
        normal = z_hat.detach()
        if case.mean is not None and case.var is not None:
            rstd = (case.var + case.eps).rsqrt()[:, None, :, None]
            normal = (normal + case.mean[:, None, :, None]) * rstd
        error = case.clean_z + normal
        sizes["cost"] = error.square().mean((1, 2, 3))
        if case.grad_cost is not None:
            error = error * (2 * case.grad_cost / z_hat[0].numel())[:, None, None, None]
            grad = grad + error * rstd
            sizes["grad_clean_z"] = error
            sizes["grad_mean"] = (error * rstd).sum((1, 3))
            sizes["grad_var"] = (error * normal * rstd**2).sum((1, 3)) / 2
    grad_z, grad_v, sizes["grad_params"] = torch.autograd.grad(z_hat, (z, v, params), grad)
    sizes["grad_z"] = grad_z
    v = v.detach()
    means = [t.sum((1, 3), keepdim=True) / n for t in (grad_v, grad_v * v)]
    sizes["grad_u"] = rstd_u * (grad_v + means[0] + v * means[1])
    return sizes


def check(actual: Results, case: Case) -> None:
    """Error at most twice that of plain PyTorch in the type of computation, and one rounding to the type of storage.

    The yardsticks are those of test_combinator_cuda.py: as plain arithmetic may be right by luck, one rounding of the
    largest term is allowed as well (four in float64, whose yardstick is rounded itself), and twice all that where the
    16-bit grade of the sigmoid computes.
    """
    half = case.u.dtype in HALF
    compute = torch.float64 if case.u.dtype == torch.float64 else torch.float32
    exact, plain, terms = reference(case, torch.float64), reference(case, compute), magnitudes(case)
    for name, out in actual.items():
        assert out.shape == exact[name].shape, name
        if out.numel() == 0:
            continue
        roundings = 4 if compute == torch.float64 else 1
        allowed = 2 * (plain[name].double() - exact[name]).abs().max()
        allowed = allowed + roundings * torch.finfo(compute).eps * terms[name].max()
        error = (out.double() - exact[name]).abs()
        if half and out.dtype != torch.float32:
            # Near the middle between two values of the storage type the other one may be taken.
            error = error - (exact[name].to(out.dtype).double() - exact[name]).abs()
        allowed = 4 * allowed if half else allowed
        assert error.max() <= allowed, f"{name}: error {error.max():.3g}, allowed {allowed:.3g}"


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

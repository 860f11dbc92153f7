"""The Ladder encoder's CUDA kernels, executed on the host (tests/cuda_shim) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cuda_shim
import pytest
import torch
from torch import Tensor

from ladderfast.reference.ladder_encoder import ACTIVATIONS, ladder_encoder, moments
from ladderfast.reference.noise import noise_words, normal_noise, philox4x32

pytestmark = cuda_shim.needs_compiler
KERNELS = "ladder_encoder"

HALF = (torch.bfloat16, torch.float16)
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-params-float32"),
    pytest.param(torch.float16, torch.float16, id="float16"),
    pytest.param(torch.float16, torch.float32, id="float16-params-float32"),
]


@dataclass(frozen=True)
class Sizes:
    seeds: int
    parts: tuple[int, ...]
    channels: int
    inner: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.seeds, sum(self.parts), self.channels, self.inner)

    def __str__(self) -> str:
        return f"{self.seeds}x{'+'.join(map(str, self.parts))}x{self.channels}x{self.inner}"


# The kernels take slices of four. A block holds all rows of a part in forward up to some 1000, those of all parts in
# backward up to some 300; of a run 8192 and 2560 elements. They change their way after inner = 16.
SIZES = [
    Sizes(1, (1, 0), 1, 1),  # one element, and a part of no rows
    Sizes(1, (1, 1, 1), 5, 1),  # parts of a single row: variance 0
    Sizes(2, (10, 12, 7), 10, 1),  # the network's top layer: rows begin within a counter
    Sizes(1, (30, 31), 64, 1),  # whole slices
    Sizes(1, (20, 0, 25), 131, 1),  # odd: every phase of the counter; a part of no rows in between
    Sizes(1, (7, 5, 6), 1100, 1),  # many tiles
    Sizes(2, (40, 330, 37), 12, 1),  # forward holds its parts, backward does not
    Sizes(1, (5, 1300, 1030), 10, 1),  # neither does
    Sizes(1, (1100, 9), 36, 1),  # several chunks and tiles of whole slices
    Sizes(1, (6, 5, 5), 7, 3),  # runs that are taken as columns
    Sizes(2, (40, 33), 6, 16),  # the longest of them
    Sizes(2, (4, 3, 5), 3, 17),  # the shortest that is not
    Sizes(1, (6, 7), 5, 36),
    Sizes(2, (11, 3), 3, 49),  # 7 x 7
    Sizes(1, (30, 25, 1), 2, 100),  # forward holds, backward does not
    Sizes(1, (2, 9), 2, 1024),  # neither does
    Sizes(1, (9, 2, 10), 2, 1025),
    Sizes(1, (150, 0), 1, 40),  # more rows in a block than slices in a run
]
EMPTY = [
    Sizes(0, (1, 2), 3, 1),
    Sizes(2, (0, 0), 3, 1),
    Sizes(1, (1, 1), 0, 1),
    Sizes(2, (3, 1), 4, 0),
    Sizes(1, (0, 0, 0), 5, 20),
]


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("seeds", "rows", "channels", "inner", "parts")),
        ("part_rows", ctypes.c_int64 * 3),
        ("noisy", ctypes.c_int64),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("noise_std", "negative_slope", "eps")),
        ("stream", ctypes.c_int64),
        ("activation", ctypes.c_int),
    ]


@dataclass
class Case:
    sizes: Sizes
    x: Tensor
    beta: Tensor | None
    gamma: Tensor | None
    grad_z: Tensor | None
    grad_h: Tensor | None
    grad_mean: Tensor | None
    grad_var: Tensor | None
    state: Tensor | None
    activation: str = "relu"
    noise_std: float = 0.3
    slope: float = 0.1
    eps: float = 1e-10
    stream: int = 3
    want: tuple[bool, bool] = (True, True)  # z, h

    @classmethod
    def draw(
        cls,
        sizes: Sizes,
        dtype: torch.dtype = torch.float32,
        params_dtype: torch.dtype | None = None,
        activation: str = "relu",
    ) -> Case:
        seeds, _, channels, _ = sizes.shape
        wide = dtype if dtype == torch.float64 else torch.float32
        statistics = (seeds, len(sizes.parts), channels)

        def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype)

        offset = torch.randn(1, 1, channels, 1, dtype=torch.float64) * 3
        x = (torch.randn(sizes.shape, dtype=torch.float64) * 2 + offset).to(dtype)
        params = params_dtype or dtype
        return cls(
            sizes,
            x,
            normal((seeds, channels), params),
            normal((seeds, channels), params),
            normal(sizes.shape, dtype),
            normal(sizes.shape, dtype),
            normal(statistics, wide),
            normal(statistics, wide),
            torch.randint(-(2**62), 2**62, (seeds, 2)),
            activation,
        )

    @property
    def clean(self) -> int:
        return self.sizes.parts[2] if len(self.sizes.parts) == 3 else 0

    @property
    def params_dtype(self) -> torch.dtype:
        given = [t.dtype for t in (self.beta, self.gamma) if t is not None]
        return given[0] if given else self.x.dtype

    def tail(self) -> list[object]:
        """The arguments after the tensors. Structures live as long as the list."""
        parts = self.sizes.parts
        seeds, rows, channels, inner = self.sizes.shape
        shape = Shape(seeds, rows, channels, inner, len(parts), (*parts, 0)[:3], rows - self.clean)
        options = Options(
            self.noise_std, self.slope, self.eps, self.stream, ACTIVATIONS.index(self.activation)
        )
        codes = [cuda_shim.CODES[self.x.dtype], cuda_shim.CODES[self.params_dtype]]
        return [*codes, ctypes.byref(options), ctypes.byref(shape), None]


Results = dict[str, Tensor]


def put(lib: cuda_shim.Library, tensors: dict[str, Tensor | None], off: int = 0) -> list[Tensor | None]:
    return [
        None if t is None else lib.copy(t, name=name, misalignment=off * t.element_size())
        for name, t in tensors.items()
    ]


def run(lib: cuda_shim.Library, case: Case, off: tuple[int, int] = (0, 0)) -> Results:
    """Forward and, if there is any gradient, backward; inputs and outputs `off` elements off an aligned address."""
    wide = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    seeds, _, channels, _ = case.sizes.shape
    tail = case.tail()

    def empty(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.empty((), dtype=dtype).element_size()
        return lib.empty(tuple(shape), dtype, name=name, misalignment=off[1] * size)

    def workspace(which: str) -> Tensor:
        function = f"ladderfast_ladder_encoder_{which}workspace_cuda"
        return lib.empty(
            (lib.call(function, tail[3], restype=ctypes.c_int64),), torch.uint8, name="workspace"
        )

    inputs = {name: getattr(case, name) for name in ("x", "beta", "gamma", "state")}
    x, beta, gamma, state = put(lib, inputs, off[0])
    out: Results = {name: empty(name, case.x.shape, case.x.dtype) for name in ("z", "h")}
    out |= {name: empty(name, (seeds, len(case.sizes.parts), channels), wide) for name in ("mean", "var")}
    z, h = (out[name] if want else None for name, want in zip(("z", "h"), case.want, strict=True))
    forward = (x, beta, gamma, state, z, h, out["mean"], out["var"], workspace(""), *tail)
    assert lib.call("ladderfast_ladder_encoder_forward_cuda", *forward) == 0
    out = {k: t for k, t in out.items() if k not in ("z", "h") or case.want["zh".index(k)]}

    names = ("grad_z", "grad_h", "grad_mean", "grad_var")
    grads = put(lib, {name: getattr(case, name) for name in names}, off[0])
    if all(g is None for g in grads):
        return out
    mean, var = put(lib, {"mean": out["mean"], "var": out["var"]}, off[0])
    out["grad_x"] = empty("grad_x", case.x.shape, case.x.dtype)
    for name in ("beta", "gamma"):
        if getattr(case, name) is not None:
            out[f"grad_{name}"] = empty(f"grad_{name}", (seeds, channels), case.params_dtype)
    outputs = (out["grad_x"], out.get("grad_beta"), out.get("grad_gamma"))
    backward = (*grads, x, mean, var, beta, gamma, state, *outputs, workspace("backward_"), *tail)
    assert lib.call("ladderfast_ladder_encoder_backward_cuda", *backward) == 0
    return out


def expected(case: Case, dtype: torch.dtype) -> Results:
    """The reference and its gradients, computed in `dtype`, seed by seed."""
    seeds: list[Results] = []
    for s in range(case.sizes.seeds):

        def take(t: Tensor | None, s: int = s) -> Tensor | None:
            return None if t is None else t[s].to(dtype)

        leaves = {
            name: t.requires_grad_()
            for name in ("x", "beta", "gamma")
            if (t := take(getattr(case, name))) is not None
        }
        x = leaves["x"] if case.sizes.inner != 1 else leaves["x"][..., 0]
        z, h, mean, var = ladder_encoder(
            x,
            case.sizes.parts[0],
            num_clean=case.clean,
            beta=leaves.get("beta"),
            gamma=leaves.get("gamma"),
            noise_std=case.noise_std,
            noise_state=None if case.state is None else case.state[s],
            noise_stream=case.stream,
            activation=case.activation,
            negative_slope=case.slope,
            eps=case.eps,
        )
        if len(case.sizes.parts) == 3 and not case.clean:  # the reference knows no clean part of no rows
            zero = torch.zeros_like(mean[:1])
            mean, var = torch.cat([mean, zero]), torch.cat([var, zero])
        z, h = (t.reshape(leaves["x"].shape) for t in (z, h))
        given = zip((z, h, mean, var), ("grad_z", "grad_h", "grad_mean", "grad_var"), strict=True)
        total = sum((t * g).sum() for t, name in given if (g := take(getattr(case, name))) is not None)
        out = {"z": z, "h": h, "mean": mean, "var": var}
        if isinstance(total, Tensor):
            grads = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            out |= {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
        seeds.append({k: t.detach() for k, t in out.items()})
    out = {k: torch.stack([s[k] for s in seeds]) for k in seeds[0]}
    return {k: t for k, t in out.items() if k not in ("z", "h") or case.want["zh".index(k)]}


def magnitudes(case: Case, exact: Results) -> Results:
    """Sizes of the terms that each result is a sum of, in float64."""
    zero = torch.zeros(case.sizes.shape, dtype=torch.float64)
    x = case.x.double()
    grad_z, grad_h = (zero if g is None else g.double().abs() for g in (case.grad_z, case.grad_h))
    per_seed = (case.sizes.seeds, 1, case.sizes.channels, 1)
    beta = zero if case.beta is None else case.beta.double().abs().reshape(per_seed)
    gamma = zero + 1 if case.gamma is None else case.gamma.double().abs().reshape(per_seed)
    terms: dict[str, list[Tensor]] = {k: [] for k in ("normal", "grad_x")}
    begin = 0
    g = grad_z + grad_h * gamma
    for p, rows in enumerate(case.sizes.parts):
        part = slice(begin, begin + rows)
        begin += rows
        mean, var = (exact[k][:, p].reshape(per_seed) for k in ("mean", "var"))
        rstd = (var + case.eps).rsqrt()
        centred = x[:, part] - mean
        normal, its = centred.abs() * rstd, g[:, part]
        count = max(rows * case.sizes.inner, 1)
        through = (its.sum((1, 3), True) + normal * (its * normal).sum((1, 3), True)) / count
        direct = sum(
            (
                t[:, p].double().abs().reshape(per_seed)
                for t in (case.grad_mean, case.grad_var)
                if t is not None
            ),
            torch.zeros(per_seed, dtype=torch.float64),
        )
        terms["normal"].append(normal + (x[:, part].abs() + mean.abs()) * rstd)
        terms["grad_x"].append(rstd * (its + through) + direct * (1 + 2 * centred.abs()) / count)
    z = torch.cat(terms["normal"], 1) + 5 * case.noise_std
    return {
        "z": z,
        "h": gamma * (z + beta),
        "mean": x.abs(),
        "var": exact["var"],
        "grad_x": torch.cat(terms["grad_x"], 1),
        "grad_beta": (grad_h * gamma).sum((1, 3)),
        "grad_gamma": (grad_h * (z + beta)).sum((1, 3)),
    }


def assert_accurate(name: str, actual: Tensor, plain: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Error at most twice that of plain PyTorch in the type of computation, and one rounding to the type of storage.

    As plain arithmetic may be right by luck, one rounding of the largest term is allowed as well (four in float64,
    whose yardstick is rounded itself).
    """
    assert actual.shape == exact.shape, name
    if exact.numel() == 0:
        return
    roundings = 4 if plain.dtype == torch.float64 else 1
    allowed = (
        2 * (plain.double() - exact).abs().max() + roundings * torch.finfo(plain.dtype).eps * terms.max()
    )
    error = (actual.double() - exact).abs()
    if actual.dtype in HALF:
        # Near the middle between two values of the storage type the other one may be taken.
        error = error - (exact.to(actual.dtype).double() - exact).abs()
    assert error.max() <= allowed, f"{name}: error {error.max():.3g}, allowed {allowed:.3g}"


def check(lib: cuda_shim.Library, case: Case, off: tuple[int, int] = (0, 0)) -> Results:
    compute = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    exact, plain = expected(case, torch.float64), expected(case, compute)
    terms, actual = magnitudes(case, exact), run(lib, case, off)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_accurate(name, value, plain[name], exact[name], terms[name])
    return actual


def assert_same_bits(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), (
            name
        )


@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_reference(
    lib: cuda_shim.Library, sizes: Sizes, dtype: torch.dtype, params_dtype: torch.dtype
) -> None:
    # One activation for each case, and in float32 all.
    index = SIZES.index(sizes) + cuda_shim.CODES[dtype]
    for activation in ACTIVATIONS if dtype == torch.float32 else (ACTIVATIONS[index % 3],):
        # The noise is float32 on every backend, so that float64 is exact only without.
        std = 0.0 if dtype == torch.float64 else 0.3
        check(lib, replace(Case.draw(sizes, dtype, params_dtype, activation), noise_std=std))


SOME = [Sizes(2, (10, 12, 7), 10, 1), Sizes(1, (40, 330, 37), 12, 1), Sizes(1, (4, 3, 5), 3, 20)]


@pytest.mark.parametrize("absent", ["beta", "gamma", "grad_z", "grad_h", "grad_mean", "grad_var", "state"])
@pytest.mark.parametrize("sizes", SOME, ids=str)
def test_without(lib: cuda_shim.Library, sizes: Sizes, absent: str) -> None:
    check(lib, replace(Case.draw(sizes, activation="leaky_relu"), **{absent: None}))


@pytest.mark.parametrize("sizes", SOME, ids=str)
def test_what_is_not_wanted_costs_nothing(lib: cuda_shim.Library, sizes: Sizes) -> None:
    """Null outputs are not written, and leave the others as they are."""
    case = replace(Case.draw(sizes), beta=None, gamma=None)
    full = run(lib, case)
    for want in ((True, False), (False, True), (False, False)):
        some = run(lib, replace(case, want=want))
        assert_same_bits({k: full[k] for k in some}, some)
    for alone in ("grad_z", "grad_h", "grad_mean", "grad_var"):
        others = {n: None for n in ("grad_z", "grad_h", "grad_mean", "grad_var") if n != alone}
        check(lib, replace(case, **others))
    # A clean pass: neither noise nor statistics' gradients, and nothing but z.
    check(lib, replace(case, noise_std=0.0, state=None, want=(True, False), grad_h=None))


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(lib: cuda_shim.Library, sizes: Sizes) -> None:
    """Statistics are zero and so are the gradients of beta and gamma; nothing else is read or written."""
    out = run(lib, Case.draw(sizes))
    for name in ("mean", "var", "grad_beta", "grad_gamma"):
        assert torch.equal(out[name], torch.zeros_like(out[name]))


# A held layer and a chunked one, in columns and in runs, with whole slices.
CUT = [
    Sizes(2, (10, 12, 7), 64, 1),
    Sizes(1, (330, 40, 1200), 12, 1),
    Sizes(1, (40, 20), 6, 16),
    Sizes(2, (11, 3), 3, 48),
    Sizes(1, (9, 2, 10), 2, 1024),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", CUT, ids=str)
def test_alignment_changes_no_bit(lib: cuda_shim.Library, sizes: Sizes, dtype: torch.dtype) -> None:
    """Pointers need only their element's alignment."""
    case = Case.draw(sizes, dtype)
    aligned = run(lib, case)
    for off in ((1, 0), (0, 1), (2, 2)):
        assert_same_bits(aligned, run(lib, case, off))


@pytest.mark.parametrize("sizes", CUT, ids=str)
def test_order_changes_no_bit(lib: cuda_shim.Library, sizes: Sizes) -> None:
    """Blocks in another order, and threads between barriers, as on another device; and the same order again."""
    case = Case.draw(sizes)
    natural = run(lib, case)
    for seed in (0, 1, 2):
        with lib.order(seed):
            assert_same_bits(natural, run(lib, case))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        (Sizes(1, (100, 100, 100), 1000, 1), 375, 125),  # the network's first hidden layer: a launch each
        (Sizes(1, (100, 100, 100), 10, 1), 6, 2),
        (Sizes(1, (10, 2000), 8, 1), 5 + 2 + 5, 5 + 1 + 5),  # statistics or sums, totals, application
    ],
    ids=str,
)
def test_launches(lib: cuda_shim.Library, sizes: Sizes, forward: int, backward: int) -> None:
    """Blocks of forward and backward: how the work is cut is part of the bits."""
    case = Case.draw(sizes)
    before = lib.blocks()
    run(lib, replace(case, grad_z=None, grad_h=None, grad_mean=None, grad_var=None))
    assert lib.blocks() - before == forward
    run(lib, case)
    assert lib.blocks() - before == 2 * forward + backward


@pytest.mark.parametrize("sizes", SOME, ids=str)
def test_a_seed_is_what_it_is_alone(lib: cuda_shim.Library, sizes: Sizes) -> None:
    """Each seed has its own noise, statistics and parameters; to a rounding where the work is cut otherwise."""
    three = Sizes(3, sizes.parts, sizes.channels, sizes.inner)
    case = Case.draw(three, torch.float64)
    together = run(lib, case)
    for s in range(3):
        tensors = {k: t[s : s + 1] for k, t in vars(case).items() if isinstance(t, Tensor)}
        alone = run(lib, replace(case, sizes=replace(three, seeds=1), **tensors))
        for name, value in alone.items():
            torch.testing.assert_close(together[name][s : s + 1], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sizes", [*SOME, Sizes(1, (5, 6), 4, 1)], ids=str)
def test_large_mean(lib: cuda_shim.Library, sizes: Sizes) -> None:
    """A mean of 1e4 with a variance of 1e-2 costs nothing that plain arithmetic about the mean does not cost."""
    case = Case.draw(sizes)
    case.x = 1e4 + 0.1 * torch.randn(sizes.shape)
    out = check(lib, case)
    exact = torch.stack([moments(part)[1] for part in case.x[0].double().split(sizes.parts)])
    assert ((out["var"][0].double() - exact).abs() <= 1e-4 * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SOME, ids=str)
def test_constant_channels(lib: cuda_shim.Library, sizes: Sizes, dtype: torch.dtype) -> None:
    """A constant channel has variance 0 exactly, z is the noise alone, and gradients are finite."""
    case = replace(Case.draw(sizes, dtype), noise_std=1.0)
    case.x[:] = case.x[:, :1, :, :1]
    out = run(lib, case)
    assert torch.equal(out["var"], torch.zeros_like(out["var"]))
    assert all(t.isfinite().all() for t in out.values())
    for s in range(sizes.seeds):
        noise = normal_noise(case.state[s], case.stream, case.x[s].numel()).reshape(case.x[s].shape)
        noise[sum(sizes.parts[:2]) :] = 0  # the clean part
        ulp = torch.finfo(torch.float32).eps * noise.abs() * 4
        rounding = torch.finfo(dtype).eps * noise.abs() / 2 if dtype in HALF else 0
        assert ((out["z"][s].float() - noise).abs() <= ulp + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [*SOME, Sizes(1, (9, 2, 10), 2, 1024)], ids=str)
def test_extremes_stay_where_they_are(lib: cuda_shim.Library, sizes: Sizes, dtype: torch.dtype) -> None:
    """inf, NaN or 1e4 in one element changes its part's channel and the channel's parameters, no other bit."""
    clean = Case.draw(sizes, dtype, torch.float32, "leaky_relu")
    before = run(lib, clean)
    seed, part, channel = sizes.seeds - 1, 1, 1
    rows = slice(sizes.parts[0], sizes.parts[0] + sizes.parts[1])
    for value in (float("inf"), float("-inf"), float("nan"), 1e4, -1e4):
        for name in ("x", "grad_z", "grad_h"):
            case = replace(clean, **{name: getattr(clean, name).clone()})
            getattr(case, name)[seed, rows.stop - 1, channel, -1] = value
            after = run(lib, case)
            if abs(value) == 1e4:
                assert all(t.isfinite().all() for t in after.values())
            for key, a in before.items():
                touched = torch.zeros(a.shape, dtype=torch.bool)
                if key in ("z", "h", "grad_x"):
                    touched[seed, rows, channel] = True
                elif key in ("mean", "var"):
                    touched[seed, part, channel] = True
                else:
                    touched[seed, channel] = True
                assert torch.equal(a[~touched], after[key][~touched]), (key, name, value)


@pytest.fixture(scope="module")
def noise() -> cuda_shim.Library:
    return cuda_shim.load(cuda_shim.HERE / "noise.cu")


def draw(
    lib: cuda_shim.Library, state: Tensor, stream: int, first: int, phase: int, count: int
) -> tuple[Tensor, Tensor]:
    words = lib.empty((4 * count,), torch.int32, name="words")
    normals = lib.empty((4 * count,), torch.float32, name="normals")
    numbers = (ctypes.c_int64(stream), ctypes.c_int64(first), phase, ctypes.c_int64(count))
    assert lib.call("draw_noise", lib.copy(state), *numbers, words, normals) == 0
    return words.long() & 0xFFFFFFFF, normals


@pytest.mark.parametrize("state", [(0, 0), (1, 2), (-1, 2**63 - 1), (2**40 + 7, -(2**35))], ids=str)
def test_noise_is_the_references(noise: cuda_shim.Library, state: tuple[int, int]) -> None:
    """The same integers, and normal values within four units in the last place, from any place in a counter."""
    tensor = torch.tensor(state)
    for stream in (0, 5):
        words, normals = draw(noise, tensor, stream, 0, 0, 250)
        assert torch.equal(words, noise_words(tensor, stream, 1000))
        exact = normal_noise(tensor, stream, 1004)
        ulp = torch.finfo(torch.float32).eps * exact.abs()
        assert ((normals - exact[:1000]).abs() <= 4 * ulp[:1000]).all()
        for phase in (1, 2, 3, 4):  # 4 stands for a slice that is aligned, though nobody promises it
            shifted = draw(noise, tensor, stream, 0, phase, 249)[1]
            assert torch.equal(shifted, normals[phase % 4 :][:996])


def test_noise_beyond_two_to_the_32_quads(noise: cuda_shim.Library) -> None:
    state, first = torch.tensor([3, 4]), 5 * 2**32 + 1
    words = draw(noise, state, 0, first, 0, 2)[0]
    counter = tuple(torch.tensor(v) for v in ([1, 2], [5, 5], [4, 4], [0, 0]))
    key = (torch.tensor(3), torch.tensor(0))
    assert torch.equal(words, torch.stack(philox4x32(counter, key), -1).flatten())


def test_noise_at_the_ends(noise: cuda_shim.Library) -> None:
    """Many values: none is infinite or NaN, and each is within four units in the last place."""
    state = torch.tensor([11, 0])
    normals = draw(noise, state, 0, 0, 0, 50_000)[1]
    exact = normal_noise(state, 0, 200_000)
    error = (normals.double() - exact.double()).abs() / (torch.finfo(torch.float32).eps * exact.abs())
    assert error.max() <= 4


def test_refused(lib: cuda_shim.Library) -> None:
    """Unknown dtypes, parameters of a dtype of their own, rows that the parts do not fill, noise that ends within a
    part and sizes beyond 32 bits: cudaErrorInvalidValue, no launch."""
    options = Options(0.3, 0.1, 1e-10, 0, 0)
    state = lib.copy(torch.zeros(1, 2, dtype=torch.int64))

    def calls(shape: Shape, dtype: int = 0, params_dtype: int = 0) -> list[int]:
        tail = (dtype, params_dtype, ctypes.byref(options), ctypes.byref(shape), None)
        forward = lib.call(
            "ladderfast_ladder_encoder_forward_cuda", None, None, None, state, *([None] * 5), *tail
        )
        backward = lib.call(
            "ladderfast_ladder_encoder_backward_cuda", *([None] * 9), state, *([None] * 4), *tail
        )
        return [forward, backward]

    good = Shape(1, 3, 4, 1, 2, (2, 1, 0), 3)
    before = lib.blocks()
    for dtype, params_dtype in ((4, 4), (-1, 0), (2, 3), (0, 2), (0, 1), (1, 0)):
        assert calls(good, dtype, params_dtype) == [1, 1]
    for bad in (
        Shape(1, 3, 4, 1, 0, (0, 0, 0), 0),
        Shape(1, 3, 4, 1, 4, (1, 1, 1), 3),
        Shape(1, 3, 4, 1, 2, (2, 2, 0), 3),
        Shape(1, 3, 4, 1, 2, (4, -1, 0), 3),
        Shape(1, 3, 4, 1, 2, (2, 1, 0), 1),
        Shape(1, 1, 2**31, 1, 1, (1, 0, 0), 1),
        Shape(1, 1, 1, 2**31, 1, (1, 0, 0), 1),
        Shape(1, 2**32, 1, 100, 1, (2**32, 0, 0), 2**32),
    ):
        assert calls(bad) == [1, 1]
    assert lib.blocks() == before

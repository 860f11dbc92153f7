"""The Ladder encoder's Triton kernels, called directly: by the interpreter where there is no GPU, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


from ladderfast.reference.ladder_encoder import ACTIVATIONS, ladder_encoder
from ladderfast.reference.noise import normal_noise
from ladderfast.triton import ladder_encoder as kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# Shape, rows of the labelled and of the clean part. Held in a tile unless the tests make tiles small.
CASES = [
    ((9, 12), 3, 2),  # whole fours
    ((9, 10), 3, 2),  # rows begin within a counter
    ((7, 19), 7, 0),  # no unlabelled rows
    ((5, 18), 0, 4),  # no labelled rows; two blocks of columns
    ((6, 3, 5), 2, 3),  # runs
    ((6, 2, 4, 4), 3, 0),  # runs of whole fours
    ((2, 3, 1), 1, 1),  # a single row in each part, or none
]


def make(shape: tuple[int, ...], seeds: int = 0) -> dict[str, Tensor]:
    lead = (seeds,) if seeds else ()
    return {
        "z_pre": torch.randn(*lead, *shape) * 2 + 1,
        "beta": torch.randn(*lead, shape[1]),
        "gamma": torch.randn(*lead, shape[1]),
        "state": torch.randint(-(2**62), 2**62, (*lead, 2)),
    }


def run(
    data: dict[str, Any],
    labelled: int,
    clean: int,
    grads: tuple[Tensor | None, ...],
    activation: str = "relu",
    std: float = 0.3,
    seeds: int = 0,
) -> list[Tensor]:
    """z, h, mean, var, then the gradients of z_pre, beta and gamma."""
    on = {k: None if t is None else t.to(DEVICE) for k, t in data.items()}
    options = (labelled, clean, std, 3, ACTIVATIONS.index(activation), 0.1, 1e-10)
    given = (on["beta"], on["gamma"], on["state"])
    z, h, mean, var = kernels.ladder_encoder_triton(on["z_pre"], *given, *options, 1, 1, seeds)
    grads = tuple(None if g is None else g.to(DEVICE) for g in grads)
    tensors = (*grads, on["z_pre"], mean, var, *given)
    back = kernels.ladder_encoder_backward_triton(*tensors, *options, seeds)
    return [t.cpu() for t in (z, h, mean, var, *back)]


def reference(
    data: dict[str, Any],
    labelled: int,
    clean: int,
    grads: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    activation: str = "relu",
    std: float = 0.3,
) -> list[Tensor]:
    leaves = {
        k: data[k].detach().to(dtype).requires_grad_()
        for k in ("z_pre", "beta", "gamma")
        if data[k] is not None
    }
    out = ladder_encoder(
        leaves["z_pre"],
        labelled,
        num_clean=clean,
        beta=leaves.get("beta"),
        gamma=leaves.get("gamma"),
        noise_std=std,
        noise_state=data["state"],
        noise_stream=3,
        activation=activation,
    )
    pairs = [(t, g.to(dtype)) for t, g in zip(out, grads, strict=True) if g is not None]
    total = torch.stack([(t * g).sum() for t, g in pairs]).sum()
    back = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = dict(zip(leaves, back, strict=True))
    return [t.detach() for t in out] + [
        named.get(k, torch.empty(0, dtype=dtype)) for k in ("z_pre", "beta", "gamma")
    ]


def gradients(data: dict[str, Tensor], parts: int) -> tuple[Tensor, ...]:
    x = data["z_pre"]
    statistics = (parts, x.shape[1])
    return torch.randn_like(x), torch.randn_like(x), torch.randn(statistics), torch.randn(statistics)


def check(
    data: dict[str, Any], labelled: int, clean: int, grads: tuple[Tensor | None, ...], **kw: Any
) -> None:
    """Error at most twice that of the reference in float32, and one rounding of the largest value at work."""
    actual = run(data, labelled, clean, grads, **kw)
    plain = reference(data, labelled, clean, grads, torch.float32, **kw)
    exact = reference(data, labelled, clean, grads, torch.float64, **kw)
    names = ("z", "h", "mean", "var", "grad_z_pre", "grad_beta", "grad_gamma")
    x = data["z_pre"].double()
    rstd = (exact[3] + 1e-10).rsqrt().amax()
    # A part of one row has variance 0; what is finite there is the difference of large numbers.
    size = float(max(x.abs().max(), *(e.abs().max() for e in exact if e.numel()), rstd))
    for name, a, p, e in zip(names, actual, plain, exact, strict=True):
        assert a.shape == e.shape, name
        if e.numel():
            allowed = 2 * (p.double() - e).abs().max() + torch.finfo(torch.float32).eps * size
            assert (a.double() - e).abs().max() <= allowed, name


@pytest.fixture(params=["held", "chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to cut a shape: one launch, and chunks of few rows in small tiles."""
    if request.param == "chunks":
        monkeypatch.setattr(kernels, "HELD", 0)
        monkeypatch.setattr(kernels, "TILE", 32)
        monkeypatch.setattr(kernels, "LEAST_ROWS", 2)
        monkeypatch.setattr(kernels, "LEAST_RUN", 8)
    return request.param


@pytest.mark.parametrize(("shape", "labelled", "clean"), CASES, ids=str)
def test_against_the_reference(cut: str, shape: tuple[int, ...], labelled: int, clean: int) -> None:
    data = make(shape)
    index = [c[0] for c in CASES].index(shape)
    grads = gradients(data, 3 if clean else 2)
    check(data, labelled, clean, grads, activation=ACTIVATIONS[index % 3])


def test_the_cut_is_taken(cut: str) -> None:
    plan = kernels.Plan(torch.empty(9, 10), 3, 2, 0)
    assert plan.held == (cut == "held")
    assert cut == "held" or (plan.chunks, plan.tile_rows) == (5, 2)


def test_channels_last(cut: str) -> None:
    data = make((4, 5, 2, 3))
    data["z_pre"] = data["z_pre"].contiguous(memory_format=torch.channels_last)
    check(data, 1, 2, gradients(data, 3))


@pytest.mark.parametrize("absent", ["beta", "gamma", "state", 0, 1, 2, 3])
def test_without(cut: str, absent: str | int) -> None:
    data: dict[str, Any] = make((9, 10))
    grads: list[Tensor | None] = [*gradients(data, 3)]
    if isinstance(absent, int):
        grads[absent] = None
    else:
        data[absent] = None
    check(data, 4, 2, tuple(grads), activation="leaky_relu")


def test_seeds(cut: str) -> None:
    """With a leading axis each seed is what it is alone."""
    data = make((5, 6), seeds=3)
    alone = [{k: t[s] for k, t in data.items()} for s in range(3)]
    grads = [gradients(d, 3) for d in alone]
    together = run(data, 2, 1, tuple(torch.stack(g) for g in zip(*grads, strict=True)), seeds=1)
    for s in range(3):
        for a, b in zip(together, run(alone[s], 2, 1, grads[s]), strict=True):
            assert torch.equal(a[s], b)


def test_unwanted_outputs_have_no_elements(cut: str) -> None:
    data = make((6, 4))
    on = [t.to(DEVICE) for t in data.values()]
    options = (2, 1, 0.3, 0, 1, 0.1, 1e-10)
    full = kernels.ladder_encoder_triton(*on, *options, 1, 1, 0)
    for want in ((1, 0), (0, 1), (0, 0)):
        some = kernels.ladder_encoder_triton(*on, *options, *want, 0)
        for a, b, wanted in zip(some, full, (*want, 1, 1), strict=True):
            assert torch.equal(a, b) if wanted else a.numel() == 0


def test_empty() -> None:
    for shape in ((0, 3), (2, 0), (2, 3, 0)):
        data = make(shape)
        out = run(data, 0, 0, gradients(data, 2))
        assert all(torch.equal(t, torch.zeros_like(t)) for t in (*out[2:4], *out[5:]))


def test_large_mean_and_constant_channels(cut: str) -> None:
    data = make((27, 12))
    data["z_pre"] = 1e4 + 0.1 * torch.randn(27, 12)
    check(data, 10, 8, gradients(data, 3))
    data["z_pre"] = data["z_pre"][:1].repeat(27, 1)
    grads = gradients(data, 3)
    z, *others = run(data, 10, 8, grads, std=1.0)
    assert torch.equal(others[2], torch.zeros(3, 12))
    assert all(t.isfinite().all() for t in others)
    noise = normal_noise(data["state"], 3, 27 * 12).reshape(27, 12)
    noise[19:] = 0
    assert ((z - noise).abs() <= 4 * torch.finfo(torch.float32).eps * noise.abs()).all()


@pytest.mark.parametrize("columns", [4, 64], ids=["aligned", "by element"])
def test_noise(columns: int) -> None:
    """Through a layer whose channels are constant: the reference's numbers, from either way to draw them, and NaN
    passes a ReLU."""
    x = torch.ones(8, 64 + (columns == 64))
    state = torch.tensor([2**40 + 7, -(2**35)])
    z = kernels.ladder_encoder_triton(
        x.to(DEVICE), None, None, state.to(DEVICE), 8, 0, 1.0, 5, 0, 0.0, 1e-10, 1, 0, 0
    )[0].cpu()
    noise = normal_noise(state, 5, x.numel()).reshape(x.shape)
    assert ((z - noise).abs() <= 4 * torch.finfo(torch.float32).eps * noise.abs()).all()
    x[3, 1] = float("nan")
    h = kernels.ladder_encoder_triton(x.to(DEVICE), None, None, None, 8, 0, 0.0, 0, 1, 0.0, 1e-10, 0, 1, 0)[
        1
    ].cpu()
    assert h[:, 1].isnan().all()
    assert h.isnan().sum() == 8


def test_opcheck() -> None:
    data = make((6, 3))
    x, *rest = (t.to(DEVICE) for t in data.values())
    options = (2, 1, 0.3, 0, 1, 0.1, 1e-10)
    out = kernels.ladder_encoder_triton(x, *rest, *options, 1, 1, 0)
    checks = ["test_schema", *["test_faketensor"] * GPU]  # the interpreter cannot run on fake tensors
    torch.library.opcheck(kernels.ladder_encoder_triton, (x, *rest, *options, 1, 1, 0), test_utils=checks)
    arguments = (torch.ones_like(x), None, None, None, x, *out[2:], *rest, *options, 0)
    torch.library.opcheck(kernels.ladder_encoder_backward_triton, arguments, test_utils=checks)

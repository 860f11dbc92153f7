"""The Ladder decoder's Triton kernels, called directly and compared with the float64 reference.

Without a GPU they run in Triton's interpreter: float32, tiny shapes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ladder_decoder_cases import Case, Results, Sizes, check
from torch import Tensor

from ladderfast.reference.ladder_encoder import moments

pytest.importorskip("triton")
from ladderfast.triton import combinator
from ladderfast.triton.ladder_decoder import ladder_decoder_backward_triton, ladder_decoder_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
GRADS = ("grad_u", "grad_z", "grad_params", "grad_clean_z", "grad_mean", "grad_var")

# (seeds, rows, channels, inner); a program holds 8 columns of up to 256 rows, 16 and more of them.
HELD = [
    (1, 1, 1, 1),
    (1, 20, 11, 1),  # two programs, the second partly filled
    (2, 7, 9, 1),
]
CHUNKS = [
    (1, 300, 3, 1),  # too many rows
    (2, 3, 2, 5),  # runs
    (1, 2, 3, 131),  # longer than a tile
]


def arguments(case: Case, *, seeds: bool = True, last: bool = False) -> dict[str, Tensor | None]:
    """The case as the op takes it: with an axis of seeds or, of a single one, without; channels-last or dense."""
    given: dict[str, Tensor | None] = dict.fromkeys(("clean_z", "mean", "var", "grad_z_hat", "grad_cost"))
    for name, t in case.tensors.items():
        t = t.to(DEVICE) if seeds else t[0].to(DEVICE)
        if name in ("u", "z", "clean_z", "grad_z_hat"):
            if last:
                t = t.movedim(-2, -1).contiguous().movedim(-1, -2)
            elif case.u.shape[3] == 1:
                t = t.squeeze(-1)
        given[name] = t
    return given


def run(
    case: Case, wanted: tuple[int, int, int] = (1, 1, 1), *, seeds: bool = True, last: bool = False
) -> Results:
    """Both passes, the second with the statistics of the first; in the layout of the case."""
    t = arguments(case, seeds=seeds, last=last)
    layer = (t["u"], t["z"], t["params"], t["clean_z"], t["mean"], t["var"])
    options = (int(case.squash), case.eps)
    z_hat, cost, u_mean, u_var = ladder_decoder_triton(*layer, *options)
    assert z_hat.stride() == layer[0].stride()
    assert (cost.shape == (0,)) == (case.clean_z is None)
    incoming = (t["grad_z_hat"], t["grad_cost"])
    grads = ladder_decoder_backward_triton(*incoming, *layer, u_mean, u_var, *options, *wanted)
    results = dict(zip(GRADS, grads, strict=True), z_hat=z_hat, cost=cost, u_mean=u_mean, u_var=u_var)
    shapes = dict.fromkeys(("u_mean", "u_var", "grad_mean", "grad_var"), case.params[:, 0].shape)
    shapes |= {"cost": case.u.shape[:1], "grad_params": case.params.shape}
    return {n: x.cpu().reshape(shapes.get(n, case.u.shape)) for n, x in results.items() if x.shape != (0,)}


@pytest.mark.parametrize("mode", ["cost", "layer0", "no-cost"])
@pytest.mark.parametrize("shape", HELD + CHUNKS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_against_the_reference(shape: Sizes, mode: str) -> None:
    for dtype in DTYPES:
        case = Case.draw(shape, dtype, torch.float32, mode, squash=mode == "layer0")
        check(run(case), case)


@pytest.mark.parametrize("shape", [(1, 20, 3, 1), (1, 3, 2, 5)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_without_seeds_and_channels_last(shape: Sizes) -> None:
    case = Case.draw(shape)
    check(run(case, seeds=False), case)
    check(run(case, seeds=False, last=True), case)
    check(run(case, last=True), case)


@pytest.mark.usefixtures("poisoned")
def test_strides_that_differ() -> None:
    """Everything is brought to the layout of u."""
    case = Case.draw((1, 3, 2, 5))
    t = arguments(case, seeds=False, last=True)
    dense = arguments(case, seeds=False)
    layer = ("u", "z", "params", "clean_z", "mean", "var")
    a = ladder_decoder_triton(*(t[n] for n in layer), 0, case.eps)
    b = ladder_decoder_triton(t["u"], *(dense[n] for n in layer[1:]), 0, case.eps)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("poisoned")
def test_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut into segments, the last of them short."""
    monkeypatch.setattr(combinator, "SEGMENT", 100)
    case = Case.draw((1, 2, 3, 300))
    assert combinator.Plan(case.u, case.params).segments == 3
    check(run(case), case)


@pytest.mark.parametrize("shape", [(1, 20, 3, 1), (1, 3, 2, 5)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_what_is_not_given_or_wanted(shape: Sizes) -> None:
    whole = Case.draw(shape)
    everything = run(whole)
    for wanted, missing in (
        ((0, 1, 1), {"grad_z"}),
        ((1, 0, 1), {"grad_clean_z"}),
        ((1, 1, 0), {"grad_mean", "grad_var"}),
    ):
        some = run(whole, wanted)
        assert set(everything) - set(some) == missing
        for name, out in some.items():
            assert torch.equal(out, everything[name]), name
    without_cost = run(replace(whole, grad_cost=None))
    assert not {"grad_clean_z", "grad_mean", "grad_var"} & set(without_cost)
    check(without_cost, replace(whole, grad_cost=None))
    check(run(replace(whole, grad_z_hat=None)), replace(whole, grad_z_hat=None))
    nothing = run(replace(whole, grad_z_hat=None, grad_cost=None))
    assert all(torch.equal(nothing[n], torch.zeros_like(nothing[n])) for n in nothing if n.startswith("grad"))


@pytest.mark.parametrize("shape", [(1, 20, 3, 1), (1, 300, 3, 1), (2, 3, 3, 5)], ids=str)
def test_constant_channels_and_large_means(shape: Sizes) -> None:
    """Variance 0 exactly and everything finite; of mean 1e4 and variance 1e-2 the variance keeps its digits."""
    case = Case.draw(shape)
    case.u[:, :, 0] = 0.1
    case.u[:, :, 1] = (1e4 + 0.1 * torch.randn(case.u[:, :, 1].shape, dtype=torch.float64)).float()
    case.u[:, 0, 1, 0] = -50.0
    results = run(case)
    assert torch.equal(results["u_mean"][:, 0], case.u[:, 0, 0, 0])
    assert torch.equal(results["u_var"][:, 0], torch.zeros(shape[0]))
    assert all(r.isfinite().all() for r in results.values())
    mean, var = (torch.stack(t) for t in zip(*(moments(u) for u in case.u.double()), strict=True))
    torch.testing.assert_close(results["u_mean"].double(), mean, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(results.pop("u_var").double(), var, rtol=1e-6, atol=0.0)
    check(results, case)


@pytest.mark.parametrize("shape", [(2, 0, 3, 1), (1, 2, 0, 1), (2, 3, 4, 0)], ids=str)
def test_empty(shape: Sizes) -> None:
    results = run(Case.draw(shape))
    for name in ("u_mean", "u_var", "cost", "grad_params", "grad_mean", "grad_var"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


def test_opcheck() -> None:
    t = arguments(Case.draw((1, 5, 3, 1)), seeds=False)
    layer = (t["u"], t["z"], t["params"], t["clean_z"], t["mean"], t["var"])
    out = ladder_decoder_triton(*layer, 0, 1e-10)
    checks = ["test_schema"]
    if DEVICE == "cuda":  # the interpreter cannot run on fake tensors
        checks.append("test_faketensor")
    torch.library.opcheck(ladder_decoder_triton, (*layer, 0, 1e-10), test_utils=checks)
    backward = (t["grad_z_hat"], t["grad_cost"], *layer, *out[2:], 0, 1e-10, 1, 1, 1)
    torch.library.opcheck(ladder_decoder_backward_triton, backward, test_utils=checks)

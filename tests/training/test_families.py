"""The loop knows no model, data or figure by name: a family of its own goes through it, and resumes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ladderfast.cli import _summary, _table
from ladderfast.data import DataSource
from ladderfast.training import Metric, Objective, Run


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x


class Points(NamedTuple):
    x: Tensor


class PointBatches:
    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return 3

    def get(self, epoch: int, step: int) -> Points:
        generator = torch.Generator().manual_seed(self.seed + 100 * epoch + step)
        return Points(torch.randn(self.size, generator=generator))


class PointSource(DataSource):
    def batches(self, batch_labelled: int, batch_unlabelled: int, *, seed: int, **kind: Any) -> PointBatches:
        if batch_labelled:
            raise ValueError(f"batch_labelled must be 0, got {batch_labelled}")
        return PointBatches(batch_unlabelled, seed)


class Twice(Objective):
    """The slope shall be 2; the mean of the slopes so far is the objective's own."""

    metric = Metric("closeness", "closeness", "", higher_is_better=True)

    def prepare(self, model: Line) -> None:
        self.average = model.slope.detach().clone()

    def __call__(self, model: Line, batch: Points) -> dict[str, Tensor]:
        return {"square": (model(batch.x) - 2 * batch.x).square().mean()}

    def after_step(self, model: Line) -> None:
        self.average.lerp_(model.slope.detach(), 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.copy_(state["average"])

    def measure(self, model: Line, data: PointBatches) -> dict[str, Any]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"closeness": 1 - float((self.average - 2).abs())}


RECIPE = {
    "title": "A line",
    "published": "0.9",
    "epochs": 2,
    "batch_labelled": 0,
    "batch_unlabelled": 8,
    "learning_rate": 0.3,
    "model": {"class_path": f"{__name__}.Line"},
    "data": {"class_path": f"{__name__}.PointSource"},
    "objective": {"class_path": f"{__name__}.Twice"},
}


def test_a_family_of_its_own_trains_is_measured_and_shown(tmp_path):
    run = Run(RECIPE, folder=tmp_path / "run", progress=False)
    result = run.fit()
    assert result["closeness"] == pytest.approx(1 - abs(float(run.objective.average) - 2))
    assert [row["closeness"] for row in run.history][-1] == result["closeness"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{result['closeness']:.3f}" in page
    assert "published closeness" in page
    assert "test error" not in page
    assert f"closeness {result['closeness']:.3f} after" in _summary(result, run.objective.metric)


def test_what_the_objective_holds_is_resumed(tmp_path):
    whole = Run(RECIPE, folder=None, progress=False)
    result = whole.fit()
    first = Run(RECIPE, folder=tmp_path / "run", progress=False)
    first.step()
    with first._open_folder(first.folder):
        first._save()
    second = Run(RECIPE, folder=tmp_path / "run", resume=True, progress=False)
    assert second.objective.average.equal(first.objective.average)
    assert second.fit()["closeness"] == result["closeness"]


def test_an_objective_with_a_state_or_data_without_labels_are_no_ensemble():
    with pytest.raises(ValueError, match="is for images with a label each"):
        Run(RECIPE, folder=None, progress=False, seeds=2)
    digits = {"class_path": "ladderfast.data.Digits"}
    with pytest.raises(ValueError, match="Twice keeps a state"):
        Run({**RECIPE, "data": digits}, folder=None, progress=False, seeds=2)


def test_figures_of_any_unit_are_compared():
    metric = Metric("nll", "negative log-likelihood", "nats")
    table = _table({"plain": {"nll": 9.0}, "ladder": {"nll": 8.5}}, metric)
    assert table == ("ladder has a negative log-likelihood of 8.50 nats, plain of 9.00 nats: 0.50 nats less.")
    assert _table({"plain": {"nll": 9.0}, "ladder": {"nll": 9.0}}, metric).endswith(
        "9.00 nats: no difference."
    )
    assert metric.better(8.5, 9.0)
    assert Metric(higher_is_better=True).better(9.0, 8.5)

"""Schedules that follow the validation figure, early stopping, training anew, and clipped gradients."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ladderfast.data import DataSource
from ladderfast.training import Metric, Objective, Run, checkpoint, read_recipe
from ladderfast.training.schedule import Course

STEPS = {1: 3, 2: 5}  # of an epoch, without and with the validation samples


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + 0.1 * torch.randn_like(x)


class Points(NamedTuple):
    x: Tensor


class PointBatches:
    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return self.steps

    def get(self, epoch: int, step: int) -> Points:
        generator = torch.Generator().manual_seed(self.seed + 100 * epoch + step)
        return Points(torch.randn(8, generator=generator))


class HeldOut(DataSource):
    def __init__(self, joined: bool = False) -> None:
        self.joined = joined

    @property
    def validation_samples(self) -> int:
        return 0 if self.joined else 2

    def with_validation_in_training(self) -> HeldOut:
        return HeldOut(joined=True)

    def batches(self, batch_labelled: int, batch_unlabelled: int, *, seed: int, **kind: Any) -> PointBatches:
        return PointBatches(STEPS[1 + self.joined], seed)


class Twice(Objective):
    """The slope shall be 2; how often it was asked for validation decides what it says."""

    metric = Metric("test_distance", "distance", "")

    def __init__(self, script: list[float]) -> None:
        self.script = script
        self.asked = torch.zeros((), dtype=torch.long)

    def prepare(self, model: Line) -> None:
        self.average = model.slope.detach().clone()

    def __call__(self, model: Line, batch: Points) -> dict[str, Tensor]:
        return {"square": (model(batch.x) - 2 * batch.x).square().mean()}

    def after_step(self, model: Line) -> None:
        self.average.lerp_(model.slope.detach(), 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average, "asked": self.asked}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.copy_(state["average"])
        self.asked.copy_(state["asked"])

    def measure(self, model: Line, data: PointBatches) -> dict[str, Any]:
        return {"test_distance": float((self.average - 2).abs())}

    def validate(self, model: Line, data: PointBatches) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.asked += 1
        return self.script[int(self.asked) - 1]


SCRIPT = [5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 2.1, 9.0, 1.0]  # best after 4 epochs, until the ninth
RECIPE = {
    "title": "A line",
    "name": "line",
    "epochs": 9,
    "batch_labelled": 0,
    "batch_unlabelled": 8,
    "learning_rate": 0.1,
    "schedule": "halve",
    "accelerator": "cpu",
    "model": {"class_path": f"{__name__}.Line"},
    "data": {"class_path": f"{__name__}.HeldOut"},
    "objective": {"class_path": f"{__name__}.Twice", "init_args": {"script": SCRIPT}},
}


def quiet(fields=None, folder=None, **options):
    return Run(copy.deepcopy(RECIPE), folder=folder, progress=False, **(fields or {}), **options)


def rates(run):
    return [row["learning_rate"] for row in run.history]


# What follows from the figures


def course(fields, figures=(), higher=False, retraining=False):
    return Course(read_recipe(RECIPE, fields), higher, list(figures), retraining)


def test_halving_by_hand():
    found = course({"min_learning_rate": 0.03}, SCRIPT)
    # worse after the epochs 3, 5, 7 and 8; 0.0125 would be below the bound
    expected = [0.1, 0.1, 0.1, 0.05, 0.05, 0.03, 0.03, 0.03, 0.03]
    assert [found.learning_rate(epoch) for epoch in range(9)] == expected
    assert course({}, SCRIPT).learning_rate(8) == 0.1 / 16
    up = course({}, [-x for x in SCRIPT], higher=True)
    assert [up.learning_rate(epoch) for epoch in range(9)] == [
        course({}, SCRIPT).learning_rate(e) for e in range(9)
    ]
    assert [course({"schedule": "constant"}, SCRIPT).learning_rate(epoch) for epoch in (0, 8)] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("patience", "epochs", "best"), [(1, 3, 2), (2, 6, 4), (3, 7, 4), (4, 8, 4), (5, 9, 9), (None, 9, 9)]
)
def test_patience_by_hand(patience, epochs, best):
    seen: list[float] = []
    for figure in SCRIPT:
        seen.append(figure)
        if course({"patience": patience}, seen).epochs == len(seen):
            break
    assert (len(seen), course({"patience": patience}, seen).best) == (epochs, best)
    again = course({"patience": patience, "retrain": True}, seen, retraining=True)
    assert again.epochs == (9 if patience is None else best)


# In a run


def test_a_run_follows_its_validation_figures():
    run = quiet({"patience": 3, "min_learning_rate": 0.03})
    result = run.fit()
    assert [row["validation_distance"] for row in run.history] == SCRIPT[:7]
    assert rates(run) == [0.1, 0.1, 0.1, 0.05, 0.05, 0.03, 0.03]
    assert (result["epochs"], result["best_epoch"], result["steps"]) == (7, 4, 21)


def test_without_retraining_the_best_network_is_kept():
    run, short = quiet({"patience": 3}), quiet({"epochs": 4})
    result = run.fit()
    assert result["test_distance"] == short.fit()["test_distance"] == run.history[3]["test_distance"]
    assert torch.equal(run.model.slope, short.model.slope)
    assert torch.equal(run.objective.average, short.objective.average)
    assert result["test_distance"] != run.history[-1]["test_distance"]


def test_retraining_is_a_run_on_the_joined_samples_with_the_same_rates():
    run = quiet({"patience": 3, "retrain": True})
    result = run.fit()
    assert [row["stage"] for row in run.history] == [1] * 7 + [2] * 4
    assert [row["epoch"] for row in run.history] == list(range(1, 12))
    assert rates(run)[7:] == rates(run)[:4] == [0.1, 0.1, 0.1, 0.05]
    assert [row["validation_distance"] for row in run.history[7:]] == [None] * 4
    assert (result["best_epoch"], result["retrained_epochs"]) == (4, 4)
    assert result["steps"] == 7 * STEPS[1] + 4 * STEPS[2]

    alone = quiet({"schedule": "constant", "epochs": 4, "data.joined": True})
    for group_epoch in range(4):
        rate = rates(run)[group_epoch]
        alone.course.learning_rate = lambda epoch, rate=rate: rate
        for _ in range(STEPS[2]):
            alone.step()
    assert torch.equal(run.model.slope, alone.model.slope)
    assert torch.equal(run.objective.average, alone.objective.average)


def test_retraining_starts_from_the_same_run_again(tmp_path):
    source = quiet({"schedule": "constant", "epochs": 1}, tmp_path)
    source.fit()
    run = quiet({"retrain": True, "start_from": str(tmp_path)})
    assert torch.equal(run.model.slope, source.model.slope)
    while not run.course.retraining:
        run.step()
    assert torch.equal(run.model.slope, source.model.slope)
    assert torch.equal(run.objective.average, source.model.slope)


def test_retraining_without_patience_takes_all_epochs():
    run = quiet({"retrain": True})
    run.fit()
    assert rates(run)[9:] == rates(run)[:9]
    assert run.history[-1]["epoch"] == 18


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of runs that never stopped, without and with a retraining."""
    folders = [tmp_path_factory.mktemp("whole") for _ in range(2)]
    for retrain, folder in enumerate(folders):
        quiet({"patience": 3, "retrain": bool(retrain)}, folder).fit()
    return folders


@pytest.mark.parametrize(
    ("retrain", "stops"), [(False, [4, 17]), (True, [16, 20]), (True, [21]), (True, [26, 27, 40])]
)
def test_stopped_in_any_stage_a_run_ends_with_the_same_bits(tmp_path, whole, retrain, stops):
    fields = {"patience": 3, "retrain": retrain}
    for stop in stops:
        run = quiet(fields, tmp_path / "parts", resume=True, checkpoint_steps=2)
        inner = run._train_step

        def train_step(run=run, inner=inner, stop=stop):
            if run.global_step == stop:
                raise Stopped
            return inner()

        run._train_step = train_step
        with pytest.raises(Stopped):
            run.fit()
    run = quiet(fields, tmp_path / "parts", resume=True, checkpoint_steps=2)
    run.fit()
    folders = [tmp_path / "parts", whole[retrain]]
    states = [checkpoint.load(folder) for folder in folders]
    for name in ("course", "epoch", "steps_before", "best"):
        assert states[0][name] == states[1][name]
    assert torch.equal(states[0]["model"]["slope"], states[1]["model"]["slope"])
    assert torch.equal(states[0]["objective"]["average"], states[1]["objective"]["average"])
    assert torch.equal(states[0]["random"][0]["cpu"], states[1]["random"][0]["cpu"])
    moments = [state["optimizer"]["state"][0] for state in states]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    csv = [(folder / "metrics.csv").read_bytes() for folder in folders]
    assert csv[0] == csv[1]
    assert b"validation_distance" in csv[0]
    page = (tmp_path / "parts" / "report.html").read_text()
    assert "validation distance" in page
    assert ("trained anew" in page) == retrain


def test_the_lines_of_a_run_show_the_validation_figure(capsys, monkeypatch):
    monkeypatch.setattr("ladderfast.training.logs.ProgressBar.SECONDS_BETWEEN_LINES", 0.0)
    Run(copy.deepcopy(RECIPE), folder=None, patience=3, retrain=True).fit()
    said = capsys.readouterr().err
    assert "line: epoch 2/9, distance" in said
    assert "validation 3.000" in said
    assert "line: epoch 11/11" in said


def test_a_figure_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="distance on the validation samples is nan after epoch 2"):
        quiet({"objective.script": [1.0, float("nan")]}).fit()


# Clipping


def test_clipping_is_torchs():
    clipped, plain = quiet({"clip_norm": 0.05}), quiet()
    large = quiet({"clip_norm": 1e9})
    for run in (clipped, plain, large):
        run.step()
    gradient = plain.model.slope.grad
    expected = copy.deepcopy(plain.model)
    expected.slope.grad = gradient.clone()
    nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
    assert torch.equal(clipped.model.slope.grad, expected.slope.grad)
    assert torch.equal(large.model.slope.grad, gradient)
    assert gradient.abs() > 0.05


def test_networks_side_by_side_are_clipped_each_by_itself(small):
    options = {"folder": None, "progress": False, "clip_norm": 0.5}
    together = Run(small, seeds=2, **options)
    together.step()
    for seed in (0, 1):
        alone = Run(small, seed=1 + seed, **options)
        alone.step()
        norm = torch.stack([p.grad.norm() for p in alone.model.parameters()]).norm()
        assert norm == pytest.approx(0.5, rel=1e-4)
        wanted = dict(alone.model.named_parameters())
        for name, parameter in together.model.stacked.named_parameters():
            torch.testing.assert_close(parameter.grad[seed], wanted[name].grad, rtol=1e-3, atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"schedule": "cosine"}, "schedule must be one of linear, constant, halve, got 'cosine'"),
        ({"decay_from": 0.5}, "decay_from has no effect with schedule=halve, only with linear"),
        ({"schedule": "constant", "decay_from": 0.5}, "decay_from has no effect with schedule=constant"),
        (
            {"schedule": "constant", "min_learning_rate": 0.01},
            "min_learning_rate has no effect with schedule=constant",
        ),
        (
            {"schedule": "linear", "min_learning_rate": 0.01},
            "min_learning_rate has no effect with schedule=linear",
        ),
        (
            {"min_learning_rate": 0.2},
            "min_learning_rate must be positive and at most learning_rate=0.1, got 0.2",
        ),
        ({"min_learning_rate": 0}, "min_learning_rate must be positive"),
        ({"patience": 0}, "patience must be at least 1 or null, got 0"),
        (
            {"schedule": "constant", "retrain": True},
            "retrain has no effect with schedule=constant and without patience",
        ),
        ({"clip_norm": 0}, "clip_norm must be positive and finite or null, got 0"),
        ({"seeds": 2}, "schedule=halve needs seeds=1"),
    ],
)
def test_fields_that_do_not_fit(fields, said):
    with pytest.raises(ValueError, match=said):
        read_recipe(RECIPE, fields)


def test_what_has_no_validation_samples(small):
    with pytest.raises(ValueError, match="patience=2 needs validation samples, and Digits holds none"):
        Run(small, folder=None, patience=2)
    with pytest.raises(ValueError, match="schedule=halve needs validation samples, and HeldOut holds none"):
        quiet({"data.joined": True})
    with pytest.raises(
        ValueError, match="needs a figure on the validation samples, and LadderObjective measures none"
    ):
        quiet(
            {
                "objective": {
                    "class_path": "ladderfast.training.LadderObjective",
                    "init_args": {"denoising_weights": []},
                }
            }
        )
    with pytest.raises(ValueError, match="Digits holds no validation samples"):
        read_recipe(small).data.build("data").with_validation_in_training()

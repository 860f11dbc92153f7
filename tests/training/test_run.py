import csv
import json
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import ladderfast
from ladderfast.data import Digits
from ladderfast.models import LadderNetwork
from ladderfast.training import LadderObjective, Run, checkpoint


class Explosive(LadderObjective):
    """Its denoising cost is NaN at step `at`, and infinite at the next."""

    def __init__(self, denoising_weights: list[float], at: int) -> None:
        super().__init__(denoising_weights)
        self.at, self.calls = at, 0

    def __call__(self, model, batch):
        terms = super().__call__(model, batch)
        self.calls += 1
        if self.calls >= self.at:
            terms["denoising_1"] = terms["denoising_1"] * float("nan" if self.calls == self.at else "inf")
        return terms


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet(recipe, **fields):
    return Run(recipe, **{"progress": False, "folder": None, **fields})


def test_the_package_offers_run_and_imports_no_training_for_it():
    assert ladderfast.Run is Run
    # Asked as where the module is not imported yet: here it is, and the attribute there by itself.
    assert ladderfast.__getattr__("data").Digits is Digits
    with pytest.raises(AttributeError, match="no attribute 'Walk'"):
        _ = ladderfast.Walk


def test_a_step_trains_and_returns_its_costs(small):
    run = quiet(small)
    before = weights(run)
    costs = run.step()
    assert list(costs) == ["total", "cross_entropy", "denoising_0", "denoising_1", "denoising_2"]
    assert all(cost.dim() == 0 and not cost.requires_grad for cost in costs.values())
    torch.testing.assert_close(costs["total"], sum(cost for name, cost in costs.items() if name != "total"))
    assert not torch.equal(weights(run)["encoder.0.linear.weight"], before["encoder.0.linear.weight"])
    assert run.global_step == 1
    assert isinstance(run.model, LadderNetwork)


def test_the_first_step_is_the_objectives_gradient_through_adam(small):
    run = quiet(small)
    reference = quiet(small)
    run.step()
    checkpoint.restore_random_state(reference._random, torch.device("cpu"))
    adam = torch.optim.Adam(reference.model.parameters(), lr=0.002, betas=(0.9, 0.999), eps=1e-8)
    sum(reference.objective(reference.model, reference.batches.get(0, 0)).values()).backward()
    adam.step()
    for got, want in zip(run.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_another_objective_may_be_put_in_its_place(small):
    run = quiet(small)
    run.objective = LadderObjective([0, 0, 0])
    assert list(run.step()) == ["total", "cross_entropy"]


def test_the_optimiser_has_the_learning_rate_of_the_epoch(small):
    run = quiet(small, epochs=6, decay_from=0.5)
    found = []
    for _ in range(6):
        for _ in range(5):
            run.step()
            found.append(run._stepper.rate)
    expected = [0.002] * 15 + [r for r in (0.0015, 0.001, 0.0005) for _ in range(5)]
    assert found == pytest.approx(expected)


def test_a_decayed_rate_takes_smaller_steps(small):
    """The first step at half the rate, from the same state, is half the step."""
    moves = []
    for decay_from in (0.5, 1.0):
        run = quiet(small, decay_from=decay_from)  # of two epochs
        for _ in range(5):
            run.step()
        before = [p.detach().double() for p in run.model.parameters()]
        run.step()
        moves.append([p.detach().double() - b for p, b in zip(run.model.parameters(), before, strict=True)])
    for half, whole in zip(*moves, strict=True):
        torch.testing.assert_close(2 * half, whole, rtol=1e-3, atol=1e-7)
        assert whole.abs().max() > 1e-5


def test_a_learning_rate_near_0_moves_nothing(small):
    # The rate in the optimiser's groups is the one that its step uses.
    run = quiet(small, learning_rate=1e-30)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.step()
    for got, want in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-29)


def test_steps_end_with_the_epochs(small):
    run = quiet(small)
    for _ in range(10):
        run.step()
    assert run.finished
    with pytest.raises(RuntimeError, match="all 2 epochs are done"):
        run.step()


def test_fit_does_the_rest_after_steps(small):
    whole, begun = quiet(small), quiet(small)
    a = whole.fit()
    for _ in range(7):
        begun.step()
    b = begun.fit()
    assert same(weights(whole), weights(begun))
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_the_same_seed_gives_the_same_bits(small):
    first, again, other = quiet(small), quiet(small), quiet(small, seed=2)
    torch.rand(17)  # what is drawn between has no part in it
    for run in (first, again, other):
        run.fit()
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))
    assert first.history[0]["total"] == again.history[0]["total"]


def test_costs_are_read_only_when_they_are_logged(small, monkeypatch):
    # Variances on a CPU are looked at, those on a GPU never.
    monkeypatch.setattr(sys.modules["ladderfast.ops.ladder_decoder"], "readable", lambda t: False)

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    run = quiet(small, batch_unlabelled=65, log_every=15)
    run.step()
    with Reads() as reads:
        for _ in range(13):
            run.step()
        assert reads.count == 0
        run.step()
        assert reads.count > 0


def test_evaluate(small):
    run = quiet(small)
    figures = run.evaluate()
    logits = run.model.eval()(run.batches.x_test).detach()
    wrong = int((logits.argmax(1) != run.batches.y_test).sum())
    assert figures == {
        "test_error": 100 * wrong / 497,
        "test_errors": wrong,
        "test_samples": 497,
        "test_cross_entropy": pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, run.batches.y_test)), rel=1e-5
        ),
    }


def test_training_goes_on_in_training_mode(small):
    run, other = quiet(small), quiet(small)
    run.model.eval()
    run.step()
    other.step()
    assert same(weights(run), weights(other))
    assert run.model.training


def test_the_statistics_are_averaged_at_the_end(small):
    run = quiet(small)
    run.fit()
    before = weights(run)
    run.model.recompute_statistics(run.batches.labelled_batches())
    assert same(weights(run), before)


def test_a_run_leaves_a_folder_and_only_with_fit(small, tmp_path):
    folder = tmp_path / "new" / "run"
    run = Run(small, folder=folder, progress=False, evaluate_every=3, epochs=4)
    run.step()
    assert not (tmp_path / "new").exists()
    result = run.fit()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.yaml",
        "metrics.csv",
        "tensorboard",
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "results.json",
        "report.html",
    }
    assert any((folder / "tensorboard").iterdir())
    assert json.loads((folder / "results.json").read_text()) == result
    assert result["test_error"] == run.evaluate()["test_error"]
    report = (folder / "report.html").read_text()
    assert small["title"] in report
    assert "Test images, corrupted and reconstructed" in report
    assert all(f"Combinator of layer {layer}" in report for layer in range(3))
    assert "batch_unlabelled" in report
    assert Run(folder / "recipe.yaml", folder=None, progress=False).recipe == run.recipe

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("total", "cross_entropy", "denoising_2", "learning_rate", "test_error"):
        drawn = [(e.step, e.value) for e in events.Scalars(name)]
        kept = [(row["step"], pytest.approx(row[name])) for row in run.history if row[name] is not None]
        assert drawn == kept, name

    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10", "15", "20"]
    assert [bool(row["test_error"]) for row in rows] == [False, False, True, True]
    assert float(rows[3]["test_error"]) == result["test_error"]
    terms = ("cross_entropy", "denoising_0", "denoising_1", "denoising_2")
    for row, kept in zip(rows, run.history, strict=True):
        assert float(row["total"]) == pytest.approx(sum(float(row[term]) for term in terms))
        assert float(row["total"]) == kept["total"]
        assert kept["steps_per_second"] > 0


def test_the_history_is_the_mean_over_the_epoch(small):
    run = quiet(small, log_every=2)
    totals = [float(run.step()["total"]) for _ in range(5)]
    assert run.history[0]["total"] == pytest.approx(sum(totals) / 5)


def test_nowhere_means_nothing_is_written(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet(small).fit()
    assert list(tmp_path.iterdir()) == []


def test_the_usual_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(small, progress=False, seed=4)
    run.fit()
    assert (tmp_path / "runs" / "small-seed4" / "results.json").exists()


@pytest.mark.parametrize("left", ["recipe.yaml", "checkpoint.pt", "results.json"])
def test_a_folder_with_a_run_is_not_overwritten(small, tmp_path, left):
    (tmp_path / left).touch()
    what = r": continue it \(--resume\)" if left == "checkpoint.pt" else ", without a checkpoint: replace it"
    with pytest.raises(FileExistsError, match=f"already holds a run{what}"):
        Run(small, folder=tmp_path)


def test_a_file_is_not_a_folder(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        Run(small, folder=tmp_path / "file")


def test_overwriting_takes_the_run_and_nothing_else(small, tmp_path):
    Run(small, folder=tmp_path, progress=False).fit()
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "metrics.csv").read_bytes()
    run = Run(small, folder=tmp_path, progress=False, overwrite=True, seed=2)
    assert (tmp_path / "metrics.csv").read_bytes() == before  # not before fit
    run.fit()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "metrics.csv").read_bytes() != before
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(("at", "log_every"), [(1, 50), (4, 3), (5, 50), (8, 1), (9, 50)])
def test_a_cost_that_is_not_finite_stops_with_its_step_and_term(small, tmp_path, at, log_every):
    small["objective"] = {
        "class_path": f"{__name__}.Explosive",
        "init_args": {"denoising_weights": [10, 1, 0.1], "at": at},
    }
    run = Run(small, folder=tmp_path, progress=False, log_every=log_every)
    epoch = (at - 1) // 5 + 1
    with pytest.raises(FloatingPointError, match=rf"at step {at} \(epoch {epoch}\): denoising_1 = nan;"):
        run.fit()
    saved = checkpoint.load(tmp_path)
    if at > 5:  # what was saved before is still good
        assert saved["epoch"] == 1
        assert all(value.isfinite().all() for value in saved["model"].values())
    else:
        assert saved is None


def test_a_model_that_the_objective_cannot_use_is_refused(small):
    small["model"] = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 64, "out_features": 10}}
    with pytest.raises(
        TypeError, match="model must have the method training_pass for this objective, got Linear"
    ):
        quiet(small)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"objective.class_path": "RLadderObjective"},
            "data must be OccludedMovingDigits for RLadderObjective, got Digits",
        ),
        (
            {"objective.class_path": "RLadderObjective", "data.class_path": "OccludedMovingDigits"},
            "model must be RLadder for RLadderObjective, got LadderNetwork",
        ),
        (
            {"objective.class_path": "SWWAEObjective"},
            "model must be SWWAE for SWWAEObjective, got LadderNetwork",
        ),
        (
            {"model.class_path": "SWWAE", "model.architecture": "(2)3c-10fc", "model.image_shape": [8, 8]},
            "model must be LadderNetwork for LadderObjective, got SWWAE",
        ),
        (
            {
                "objective.class_path": "TaggerObjective",
                "data.class_path": "Shapes",
                "data.num_train": 9,
                "data.num_test": 9,
            },
            "model must be Tagger or RTagger for TaggerObjective, got LadderNetwork",
        ),
        (
            {"objective.class_path": "PianoRollObjective"},
            "data must be PianoRolls for PianoRollObjective, got Digits",
        ),
    ],
)
def test_networks_and_data_of_another_family_than_the_objective_are_refused(small, fields, message):
    where = {"objective": "training", "model": "models", "data": "data"}
    fields = {
        k: f"ladderfast.{where[k.partition('.')[0]]}.{v}" if k.endswith("class_path") else v
        for k, v in fields.items()
    }
    with pytest.raises(TypeError, match=message):
        quiet(small, **fields)


@pytest.mark.parametrize(
    "fields", [{"accelerator": "abacus"}, {"precision": "3-bit"}, {"strategy": "none"}, {"devices": "x"}]
)
def test_devices_that_cannot_be_had_are_refused(small, fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}") as caught:
        quiet(small, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions(small, precision):
    run = quiet(small, precision=precision)
    costs = [float(run.step()["total"]) for _ in range(10)]
    assert costs[-1] < costs[0]
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in run.model.parameters()} == {expected}
    assert run.batches.x_unlabelled.dtype == expected
    assert 0 <= run.evaluate()["test_error"] <= 100


def test_loading_a_run(small, tmp_path):
    run = Run(small, folder=tmp_path, progress=False)
    figures = run.fit()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    loaded = Run.load(tmp_path)
    assert same(weights(run), weights(loaded))
    assert loaded.evaluate()["test_error"] == figures["test_error"]
    assert loaded.finished
    loaded.fit()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        Run.load(tmp_path / "tensorboard")
    longer = Run.load(tmp_path, epochs=3)
    assert longer.fit()["steps"] == 15 > figures["steps"]

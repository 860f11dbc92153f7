"""Steps in the form that a CUDA graph holds, run without one, and on a GPU captured."""

from __future__ import annotations

import pytest
import torch

from ladderfast.data import Digits
from ladderfast.training import LadderObjective, Objective, Run
from ladderfast.training import step as step_module
from ladderfast.training.graph import StaticStep, why_not

# A captured step reads the learning rate as a float32: these are as good in that as in Python's float.
RATES = {"learning_rate": 2**-9, "decay_from": 0.5}  # of two epochs the second has half of it


def quiet(recipe, **fields):
    return Run(recipe, **{"progress": False, "folder": None, **RATES, **fields})


def losses(run, steps):
    return torch.stack([run.step()["total"] for _ in range(steps)])


@pytest.fixture
def static(monkeypatch):
    """Every run takes static steps: what a GPU captures, the CPU does one by one."""
    monkeypatch.setattr(step_module, "why_not", lambda *args, **kind: None)


@pytest.mark.parametrize("fields", [{}, {"seeds": 2}], ids=["alone", "ensemble"])
def test_a_static_step_is_the_step(small, static, fields):
    one, other = quiet(small, graph="off", **fields), quiet(small, **fields)
    assert one._stepper.static is None
    assert isinstance(other._stepper.static, StaticStep)
    expected, got = losses(one, 10), losses(other, 10)  # two epochs: other orders, and a rate that falls
    assert torch.equal(expected, got)
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_costs_that_were_returned_stay(small, static):
    run = quiet(small)
    first = run.step()
    kept = first["total"].clone()
    run.step()
    assert torch.equal(first["total"], kept)


def test_a_static_run_is_resumed_and_changed_for_an_ordinary_one(small, static, tmp_path):
    whole = losses(quiet(small), 8)
    run = quiet(small, folder=tmp_path / "run")
    losses(run, 3)
    with run._open_folder(run.folder):
        run._save()
    for graph in ("auto", "off"):
        again = quiet(small, folder=tmp_path / "run", resume=True, graph=graph)
        assert (again._stepper.static is None) == (graph == "off")
        assert torch.equal(losses(again, 5), whole[3:])
        rate = again._stepper.optimizer.param_groups[0]["lr"]
        assert isinstance(rate, float) == (graph == "off")


def test_what_cannot_be_captured_is_said(small):
    with pytest.raises(ValueError, match="graph=on cannot be had: the device is cpu, not cuda"):
        quiet(small, graph="on")
    with pytest.raises(ValueError, match="graph must be one of auto, on, off, got 'yes'"):
        quiet(small, graph="yes")

    class Follows(Objective):
        def __call__(self, model, batch):
            return {}

        def after_step(self, model):
            pass

    data = Digits(num_labels=40).batches(20, 100, seed=1)
    kind = {"processes": 1, "precision": "32-true", "objective": LadderObjective([1])}
    gpu = torch.device("cuda")
    assert why_not(gpu, data, **kind) is None
    assert "2 processes" in why_not(gpu, data, **{**kind, "processes": 2})
    assert "16-mixed" in why_not(gpu, data, **{**kind, "precision": "16-mixed"})
    assert "list makes its batches" in why_not(gpu, [], **kind)
    assert "Follows has work" in why_not(gpu, data, **{**kind, "objective": Follows()})


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"seeds": 3}], ids=["alone", "ensemble"])
def test_captured_steps_are_the_steps(small, fields):
    small["accelerator"] = "cuda"
    expected = losses(quiet(small, graph="off", **fields), 10)
    run = quiet(small, graph="on", **fields)
    assert torch.equal(losses(run, 10), expected)
    assert run._stepper.static._graph is not None


@pytest.mark.gpu
def test_a_captured_run_resumes(small, tmp_path):
    small["accelerator"] = "cuda"
    whole = losses(quiet(small, graph="on"), 8)
    run = quiet(small, graph="on", folder=tmp_path / "run")
    losses(run, 3)
    with run._open_folder(run.folder):
        run._save()
    again = quiet(small, folder=tmp_path / "run", resume=True)
    assert torch.equal(losses(again, 5), whole[3:])

"""Two processes on the CPU train one network together."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from small_recipe import RECIPE

from ladderfast.training import Run, checkpoint

FIELDS = {"devices": 2, "strategy": "ddp", "batch_unlabelled": 130, "batch_labelled": 10}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "ladderfast", "train", "small.yaml", "--out", "run"]
    fields = [word for name, value in FIELDS.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([*command, *fields], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test error") == 1  # only the first process speaks
    return folder / "run"


def test_the_processes_share_the_epoch(trained):
    with open(trained / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10"]
    state = checkpoint.load(trained)
    assert state["world_size"] == 2
    first, second = (random["cpu"] for random in state["random"])
    assert not torch.equal(first, second)  # noise of its own for each


def test_what_they_trained_serves_one(trained):
    run = Run.load(trained)
    result = json.loads((trained / "results.json").read_text())
    assert run.evaluate()["test_errors"] == result["test_errors"]
    with pytest.raises(ValueError, match=r"devices was 2 in .* and cannot become 1"):
        Run(RECIPE, folder=trained, resume=True, devices=1)


SCRIPT = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from small_recipe import RECIPE
from ladderfast.training import Run

run = Run(RECIPE, folder="again", progress=False, resume=True, checkpoint_steps=3, **{FIELDS!r})
noise, inner = [run.model.noise_state.clone()], run._train_step
def train_step():
    if sys.argv[1] == "stop" and run.global_step == 4:
        sys.exit(0)
    inner()
    noise.append(run.model.noise_state.clone())
run._train_step = train_step
run.fit()
torch.save(torch.stack(noise), f"noise-{{run.fabric.global_rank}}.pt")
"""


def test_each_has_noise_of_its_own_and_finds_it_again(trained):
    (trained.parent / "again.py").write_text(SCRIPT)
    for what in ("stop", "go on"):
        command = [sys.executable, "again.py", what]
        done = subprocess.run(command, cwd=trained.parent, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    seeds, offsets = zip(
        *(torch.load(trained.parent / f"noise-{rank}.pt").unbind(1) for rank in range(2)), strict=True
    )
    assert (seeds[1] - seeds[0] == 1).all()
    assert torch.equal(offsets[0], offsets[1])
    assert (offsets[0].diff() == 3).all()
    assert offsets[0][0] == 3 * 3  # after three steps of three layers each
    whole, continued = checkpoint.load(trained), checkpoint.load(trained.parent / "again")
    for name, value in whole["model"].items():
        assert torch.equal(value, continued["model"][name]), name

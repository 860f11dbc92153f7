"""Two processes on the CPU train one network together."""

import csv
import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import RECIPE

from ladderfast.training import Run, checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "ladderfast", "train", "small.yaml", "--out", "run"]
    fields = ["--devices", "2", "--strategy", "ddp", "--batch_unlabelled", "130", "--batch_labelled", "10"]
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

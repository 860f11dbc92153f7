"""The folder of a run: who may use it, and that nothing in it is lost before there is something better."""

from __future__ import annotations

import pytest
import torch

from ladderfast import Run
from ladderfast.training import checkpoint
from ladderfast.training import folder as folders

RECIPE = {
    "title": "small",
    "model": {"class_path": "ladderfast.models.LadderNetwork", "init_args": {"layers": [64, 12, 10]}},
    "data": {"class_path": "ladderfast.data.Digits", "init_args": {"num_labels": 40}},
    "objective": {
        "class_path": "ladderfast.training.LadderObjective",
        "init_args": {"denoising_weights": [10, 1, 0.1]},
    },
    "epochs": 1,
    "batch_labelled": 20,
    "batch_unlabelled": 260,
    "accelerator": "cpu",
}


def run(folder, **options):
    return Run(RECIPE, folder=folder, progress=False, **options)


def broken(folder, **options):
    """One whose model refuses the first step."""
    made = run(folder, **options)
    made.objective._wanted = [True, True]
    return made


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_cannot_make_its_first_step_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="costs must have 3 entries"):
        broken(tmp_path / "run").fit()
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run").fit()  # the corrected command is not in its own way


def test_overwrite_keeps_the_old_run_until_the_new_one_goes(tmp_path):
    old = run(tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="costs must have 3 entries"):
        broken(tmp_path, overwrite=True).fit()
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert Run.load(tmp_path).evaluate()["test_error"] == old["test_error"]
    run(tmp_path, overwrite=True, seed=2).fit()
    assert Run.load(tmp_path).recipe.seed == 2


@pytest.mark.skipif(folders.fcntl is None, reason="this system has no locks")
def test_two_runs_at_once_in_one_folder(tmp_path):
    first, second = run(tmp_path / "run"), run(tmp_path / "run")
    first.step()
    with first._open_folder(first.folder):
        first._save()
        for other in (second, run(tmp_path / "run", resume=True), run(tmp_path / "run", overwrite=True)):
            before = names(first.folder)
            with pytest.raises(FileExistsError, match="another process is training in"):
                other.fit()
            assert names(first.folder) == before
    assert folders.LOCK not in names(first.folder)
    with pytest.raises(FileExistsError, match="already holds a run"):  # it came second
        second.fit()
    assert run(tmp_path / "run", resume=True).fit()["epochs"] == 1


def test_resume_says_that_there_is_nothing_to_resume(tmp_path):
    with pytest.warns(RuntimeWarning, match="holds no checkpoint: the run starts at its beginning"):
        Run(RECIPE, folder=tmp_path / "new", resume=True)


def test_resume_does_not_replace_results_whose_checkpoint_is_gone(tmp_path):
    run(tmp_path).fit()
    for name in (checkpoint.NEWEST, checkpoint.PREVIOUS):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(FileExistsError, match="no checkpoint to continue from"):
        run(tmp_path, resume=True)
    assert (tmp_path / folders.RESULTS).exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(NotADirectoryError, match="file is not a folder"):
            run(tmp_path / "file", **options)


def test_a_run_with_a_graph_can_be_evaluated_without(tmp_path):
    trained = run(tmp_path)
    trained.fit()
    saved = checkpoint.load(tmp_path)
    saved["recipe"]["graph"] = "on"  # as on a GPU
    checkpoint.save(tmp_path, {k: v for k, v in saved.items() if k != "format"})
    assert Run.load(tmp_path).evaluate() == trained.evaluate()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": checkpoint.FORMAT}, "it lacks course, epoch, model"),
        ({"format": checkpoint.FORMAT, "recipe": Run}, "it holds more than tensors, numbers and text"),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path, content, message):
    torch.save(content, tmp_path / checkpoint.NEWEST)
    with pytest.raises(ValueError, match=message):
        Run.load(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"below/it cannot be made: .*file is not a folder"):
        run(tmp_path / "file" / "below" / "it")
    # Nothing is closed to root, of whom tests may be.
    monkeypatch.setattr(folders.os, "access", lambda path, mode: path != tmp_path)
    for name in ("new/run", "."):
        with pytest.raises(PermissionError, match=r"cannot be written to: .* is not writable"):
            run(tmp_path / name)

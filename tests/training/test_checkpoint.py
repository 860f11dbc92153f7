import errno
import os
import pickle
import warnings

import pytest
import torch

from ladderfast.training import checkpoint
from ladderfast.training.checkpoint import NEWEST, PREVIOUS


def state(step):
    return {"recipe": {"name": "x"}, "step": step, "weight": torch.full((1000,), float(step)), "costs": None}


def load_quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoint.load(folder, frozenset())


def test_the_newest_is_loaded_and_the_one_before_it_kept(tmp_path):
    assert load_quietly(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
        loaded = load_quietly(tmp_path)
        assert loaded["step"] == step
        assert torch.equal(loaded["weight"], state(step)["weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [PREVIOUS, NEWEST]
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 2


def damage_end(content):
    return content[: len(content) // 2]


def damage_one_bit_of_a_weight(content):
    at = content.index(torch.full((4,), 2.0).numpy().tobytes()) + 1000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [damage_end, damage_one_bit_of_a_weight, lambda c: b"", lambda c: b"\x00" * len(c), lambda c: c[:10]],
    ids=["half", "bit", "empty", "zeros", "start"],
)
def test_a_damaged_newest_one_is_passed_over_with_a_warning(tmp_path, damage):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    path = tmp_path / NEWEST
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"checkpoint\.pt cannot be used .* going back to .*previous"):
        assert checkpoint.load(tmp_path, frozenset())["step"] == 1


def test_a_crash_between_the_two_renamings(tmp_path):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    (tmp_path / NEWEST).rename(tmp_path / PREVIOUS)
    assert load_quietly(tmp_path)["step"] == 2


def test_nothing_whole_is_an_error(tmp_path):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be used .*previous\.pt cannot be used"):
        checkpoint.load(tmp_path, frozenset())


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failure):
    checkpoint.save(tmp_path, state(1))

    def half(content, file):
        file.write(b"half of it")
        raise failure

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(type(failure)):
        checkpoint.save(tmp_path, state(2))
    monkeypatch.undo()
    assert load_quietly(tmp_path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [NEWEST]


@pytest.mark.parametrize("room", [10, 5000])  # torch's own words and Python's
def test_a_full_disk_is_said_with_the_path(tmp_path, monkeypatch, room):
    class Disk:
        """A file for which there is only so much room."""

        left = room

        def __init__(self, file):
            self.file = file

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

        def flush(self):
            self.file.flush()

    save = torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda content, file: save(content, Disk(file)))
    with pytest.raises(
        OSError, match=r"checkpoint\.pt cannot be written: No space left on device$"
    ) as caught:
        checkpoint.save(tmp_path, {**state(1), "more": torch.rand(10_000)})
    assert str(caught.value).startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_loading_executes_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "x": Malicious()}, tmp_path / NEWEST)
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.load(tmp_path, frozenset())
    (tmp_path / NEWEST).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.load(tmp_path, frozenset())
    assert not (tmp_path / "executed").exists()


def test_a_foreign_file_is_not_a_checkpoint(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / NEWEST)
    with pytest.raises(ValueError, match="is not a checkpoint of a run"):
        checkpoint.load(tmp_path, frozenset())
    torch.save({"format": 99}, tmp_path / NEWEST)
    with pytest.raises(ValueError, match="it has format 99, this version of ladderfast reads 2"):
        checkpoint.load(tmp_path, frozenset())


def test_the_random_state_comes_back():
    device = torch.device("cpu")
    saved = checkpoint.random_state(device)
    expected = torch.rand(3)
    torch.rand(5)
    checkpoint.restore_random_state(saved, device)
    assert torch.equal(torch.rand(3), expected)


def test_when_a_checkpoint_is_due(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    pace = checkpoint.Pace(minutes=5, steps=None)
    now[0] += 0.01
    assert pace.due(1, epoch_ended=True)
    with pace.saving():
        now[0] += 1
    now[0] += 10
    assert not pace.due(2, epoch_ended=True)  # it would take 1 s of 11
    now[0] += 11
    assert pace.due(3, epoch_ended=True)
    assert not pace.due(3, epoch_ended=False)
    now[0] += 280
    assert pace.due(4, epoch_ended=False)
    assert checkpoint.Pace(minutes=5, steps=7).due(14, epoch_ended=False)
    assert not checkpoint.Pace(minutes=5, steps=7).due(15, epoch_ended=False)

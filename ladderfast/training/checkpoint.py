"""Checkpoints that survive a crash at any moment, and that load without executing code."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"

FORMAT = 2  # of what is in a checkpoint
# What a run goes on from, at the least.
RUN = frozenset({"recipe", "model", "optimizer", "course", "epoch", "step_in_epoch", "random"})

# An epoch's end is not saved while that would bring the time spent on saving above this part of the whole.
SHARE = 0.05


class Pace:
    """When the next checkpoint is due: at epochs' ends, after `minutes`, and every `steps` steps if that is given."""

    def __init__(self, minutes: float, steps: int | None) -> None:
        self._seconds, self._steps = 60 * minutes, steps
        self._saved_at, self._took = time.monotonic(), 0.0

    def falls_on(self, step: int) -> bool:
        """Whether step number `step` is one of every so many."""
        return self._steps is not None and step % self._steps == 0

    def due(self, step: int, *, epoch_ended: bool) -> bool:
        age = time.monotonic() - self._saved_at
        return self.falls_on(step) or age > self._seconds or (epoch_ended and self._took < SHARE * age)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._took = self._saved_at - start


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, keep: Path | None = None) -> None:
    """Have `write` fill a new file, and give it the name `path` only when all of it is on the disk.

    What had that name before is then called `keep`, or gone. Between the two renamings there is no `path`. Raises
    OSError, which names it, where it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
        _sync_folder(path.parent)
    except Exception as error:
        if (reason := _system_error(error)) is None:
            raise
        raise OSError(f"{path} cannot be written: {reason.strerror or reason}") from error
    finally:
        part.unlink(missing_ok=True)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Make `state` the newest checkpoint of the folder, and what was the newest the previous one.

    state: tensors, numbers, text, None, and dicts and lists of these.
    """
    content = {"format": FORMAT, **state}
    write_atomically(folder / NEWEST, lambda file: torch.save(content, file), keep=folder / PREVIOUS)


def load(folder: Path, needed: frozenset[str] = RUN) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU; None where there is none.

    needed: names without which it is not whole. Warns where the newest is damaged and the previous one serves. Raises
    ValueError where there are checkpoints but none that is whole.
    """
    damages = []
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _read(path, needed)
        except OSError:
            raise
        except Exception as error:  # of damaged bytes one can make anything
            damages.append(f"{path} cannot be used ({str(error).splitlines()[0]})")
            continue
        if damages:
            warnings.warn(f"{damages[0]}; going back to {path}", RuntimeWarning, stacklevel=2)
        return state
    if damages:
        raise ValueError("; ".join(damages))
    return None


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's global generators, of the CPU and of the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def _read(path: Path, needed: frozenset[str]) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it holds more than tensors, numbers and text") from None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError("it is not a checkpoint of a run")
    if state["format"] != FORMAT:
        raise ValueError(f"it has format {state['format']}, this version of ladderfast reads {FORMAT}")
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    return state


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind one of torch, which says of a full disk "unexpected pos"."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    # The renaming itself is only on the disk once the folder is; not every system can open one.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Networks that start as those of other runs."""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint
from .recipe import Recipe, read_recipe
from .schedule import Course

SEED = "{seed}"


def start_from(networks: Sequence[nn.Module], where: str, seeds: Sequence[int]) -> None:
    """Give each network what it shares with another run's, by name and shape; its noise stays its own.

    where: the other run's folder. {seed} in it stands for each network's own seed, or for the seeds of several trained
    side by side, as in 1-10. In a folder of several seeds a network takes that of its own seed.

    Warns where the other run is not finished, has another seed than the network and so other labels, or has parameters
    of the same name and another shape, which are not taken.

    Raises FileNotFoundError where a folder has no checkpoint, ValueError where the run in it has several seeds but not
    the one that is needed, or a network without any parameter of that name and shape.
    """
    folders = _find(where, seeds)
    sources: dict[Path, _Source] = {}
    for network, seed, folder in zip(networks, seeds, folders, strict=True):
        if folder not in sources:
            sources[folder] = _Source(folder)
        _take(network, sources[folder].network(seed), folder)


class _Source:
    """The run in a folder, at its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        saved = checkpoint.load(folder)
        if saved is None:
            raise FileNotFoundError(f"start_from: {folder} holds no checkpoint of a run")
        self.folder, self._state = folder, saved["model"]
        self.recipe: Recipe = read_recipe(saved["recipe"])
        course = Course(self.recipe)
        course.load_state_dict(saved["course"])
        planned = course.epochs
        stage = " of the retraining" if course.retraining else ""
        if saved["epoch"] < planned or (self.recipe.retrain and not course.retraining):
            warnings.warn(
                f"start_from: the run in {folder} is not finished: {saved['epoch']} of {planned} epochs{stage} "
                "are done",
                RuntimeWarning,
                stacklevel=5,
            )

    def network(self, seed: int) -> dict[str, Tensor]:
        """Parameters and buffers for a network of that seed."""
        first, count = self.recipe.seed, self.recipe.seeds
        if count > 1:
            if not first <= seed < first + count:
                raise ValueError(
                    f"start_from: the run in {self.folder} has seeds {first} to {first + count - 1}, and not {seed}"
                )
            return {k.removeprefix("stacked."): v[seed - first] for k, v in self._state.items()}
        if seed != first:
            warnings.warn(
                f"start_from: the run in {self.folder} has seed {first} and this network {seed}, so that it may start "
                f"with what other labels have taught; {SEED} in start_from stands for each network's own seed",
                RuntimeWarning,
                stacklevel=5,
            )
        return self._state


def _find(where: str, seeds: Sequence[int]) -> list[Path]:
    """The folder for each seed."""
    if SEED not in where:
        return [Path(where).expanduser()] * len(seeds)
    text = str(Path(where).expanduser())
    # What stands for the seed the first time must stand there every time.
    first, *others = map(re.escape, text.split(SEED))
    pattern = re.compile(first + r"(?P<seeds>(\d+)-(\d+))" + r"(?P=seeds)".join(others))
    several: list[tuple[int, int, Path]] = []
    for name in sorted(glob.glob("*".join(map(glob.escape, text.split(SEED))))):
        if (match := pattern.fullmatch(name)) and _has_run(Path(name)):
            several.append((int(match[2]), int(match[3]), Path(name)))
    # The run of these very seeds comes first.
    several.sort(key=lambda entry: (entry[0] != seeds[0], entry[1] != seeds[-1]))
    found, missing = [], []
    for seed in seeds:
        alone = Path(text.replace(SEED, str(seed)))
        together = [folder for low, high, folder in several if low <= seed <= high]
        if not _has_run(alone) and together:
            found.append(together[0])
        else:
            found.append(alone)
            if not _has_run(alone):
                missing.append(str(seed))
    if missing:
        raise FileNotFoundError(
            f"start_from: {where} holds no checkpoint of a run for {SEED} = {', '.join(missing)}, and there is no run "
            f"of several seeds, {where.replace(SEED, 'FIRST-LAST')}, that has "
            f"{'it' if len(missing) == 1 else 'them'} either"
        )
    return found


def _has_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (checkpoint.NEWEST, checkpoint.PREVIOUS))


def _take(model: nn.Module, given: dict[str, Any], folder: Path) -> None:
    own = model.state_dict()
    shared = {k: v for k, v in given.items() if k in own and k.rpartition(".")[2] != "noise_state"}
    taken = {k: v for k, v in shared.items() if v.shape == own[k].shape}
    # Networks of two kinds may both have a number, a variance say.
    numbers_alone = all(p.dim() == 0 for p in model.parameters())
    if not any(numbers_alone or v.dim() > 0 for v in taken.values()):
        but = f" but {', '.join(taken)}" if taken else ""
        raise ValueError(f"start_from: the network in {folder} shares no parameter with this one{but}")
    if others := [k for k in shared if k not in taken]:
        name = others[0]
        warnings.warn(
            f"start_from: {len(others)} of {len(shared)} parameters and buffers have another shape than in {folder} "
            f"and start anew, among them {name}: {tuple(shared[name].shape)} there, {tuple(own[name].shape)} here",
            RuntimeWarning,
            stacklevel=5,
        )
    model.load_state_dict({**own, **taken})

"""Polyphonic music as piano rolls: which of 88 notes sound at each time step."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dataset import DataSource
from .download import cache_folder
from .shuffle import UNLABELLED, check_seed, shuffles

NOTES = 88
SPLITS = ("train", "valid", "test")
# File, and (sequences, time steps) of training, validation and test set.
SETS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "jsb_chorales": ("JSB_Chorales.mat", ((229, 13807), (76, 4602), (77, 4725))),
    "muse_data": ("MuseData.mat", ((524, 245202), (135, 82755), (124, 64339))),
    "nottingham": ("Nottingham.mat", ((694, 176561), (173, 45513), (170, 44463))),
    "piano_midi": ("Piano_midi.mat", ((87, 75911), (12, 8540), (25, 19036))),
}

BATCH_ORDER = 3  # a stream of the seed, beside those of `shuffle`
POOL = 8  # batches' worth of sequences that are sorted by length together
HELD_OUT_SEQUENCES, HELD_OUT_STEPS = 32, 256  # of one part when a held-out set is measured


class PianoRollBatch(NamedTuple):
    """Some time steps of some sequences, B of them with T steps, shorter ones padded with silence.

    previous: (B, T, 88) the notes at the step before, silence before a sequence's first: what a network may see.
    notes: (B, T, 88) the notes, 0 or 1: what it is to predict.
    mask: (B, T) bool, False at padding.
    continues: 0-dim bool on the CPU, whether the same sequences' earlier steps were the batch before.
    """

    previous: Tensor
    notes: Tensor
    mask: Tensor
    continues: Tensor


class Rolls:
    """Sequences of piano rolls, end to end in one tensor.

    Args:
        sequences: each (time steps, 88), zeros and ones.
        device, dtype: of the batches; the sequences are held as bytes.
    """

    def __init__(
        self,
        sequences: Sequence[np.ndarray],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        silence = np.zeros((1, NOTES), dtype=np.uint8)
        self._silence = int(self.lengths.sum())  # the row that stands for padding
        self._notes = torch.from_numpy(np.concatenate([*sequences, silence])).to(device)
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, members: np.ndarray, first: int, steps: int) -> PianoRollBatch:
        """Time steps `first` to `first + steps - 1` of the sequences `members`, less those past the longest's end."""
        steps = min(steps, int(self.lengths[members].max()) - first)
        times = first + np.arange(steps)
        mask = times < self.lengths[members, None]
        rows = np.where(mask, self._starts[members, None] + times, self._silence)
        before = np.where(mask & (times > 0), rows - 1, self._silence)
        device = self._notes.device
        previous, notes = (
            self._notes[torch.from_numpy(each).to(device)].to(self._dtype) for each in (before, rows)
        )
        return PianoRollBatch(
            previous, notes, torch.from_numpy(mask).to(device), torch.tensor(first > 0, device="cpu")
        )

    def one(self, number: int, steps: int) -> PianoRollBatch:
        """Sequence `number` alone, at most its first `steps` time steps."""
        return self.batch(np.array([number]), 0, steps)

    def parts(
        self, sequences: int = HELD_OUT_SEQUENCES, steps: int = HELD_OUT_STEPS
    ) -> Iterator[PianoRollBatch]:
        """Every time step of every sequence once, sequences of like length together."""
        order = np.argsort(self.lengths, kind="stable")
        for begin in range(0, len(order), sequences):
            members = order[begin : begin + sequences]
            for first in range(0, int(self.lengths[members].max()), steps):
                yield self.batch(members, first, steps)


class PianoRolls(DataSource):
    """One of the four sets of Boulanger-Lewandowski et al. 2012 (arXiv:1206.6392), from its .mat file.

    The file holds traindata, validdata and testdata, cells of sequences (time steps, 88 notes) of zeros and ones. An
    epoch is one pass over the training sequences, those of like length together.

    Args:
        name: jsb_chorales, muse_data, nottingham or piano_midi.
        data_dir: folder with JSB_Chorales.mat, MuseData.mat, Nottingham.mat or Piano_midi.mat. Default:
            ladderfast/piano_rolls in the user's cache.
        truncate: time steps of one training step at most; a longer sequence is cut, and the next training step goes on
            where this one ended (truncated back-propagation through time). null: whole sequences.

    Raises ValueError for a name that is none of these, a truncate below 1, and a file that is damaged or another's;
    FileNotFoundError where it is missing; ImportError without SciPy.
    """

    image_shape = (NOTES,)

    def __init__(self, name: str, data_dir: str | None = None, truncate: int | None = None) -> None:
        if name not in SETS:
            raise ValueError(f"name must be one of {', '.join(SETS)}, got {name!r}")
        if truncate is not None and truncate < 1:
            raise ValueError(f"truncate must be at least 1 or null, got {truncate}")
        self.name, self.truncate = name, truncate
        folder = cache_folder("piano_rolls") if data_dir is None else Path(data_dir).expanduser()
        file, sizes = SETS[name]
        self.sequences = dict(zip(SPLITS, read_mat(folder / file), strict=True))
        for split, expected in zip(SPLITS, sizes, strict=True):
            found = len(self.sequences[split]), sum(map(len, self.sequences[split]))
            if found != expected:
                raise ValueError(
                    f"{folder / file} does not hold {name}: its {split}data has {found[0]} sequences of {found[1]} "
                    f"time steps in all, expected {expected[0]} of {expected[1]}"
                )

    @property
    def validation_samples(self) -> int:
        return len(self.sequences["valid"])

    def with_validation_in_training(self) -> PianoRolls:
        """The same set with the validation sequences after the training ones, and none for validation."""
        other = copy.copy(self)
        joined = [*self.sequences["train"], *self.sequences["valid"]]
        other.sequences = {**self.sequences, "train": joined, "valid": []}
        return other

    def batches(
        self,
        batch_labelled: int,
        batch_unlabelled: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PianoRollBatches:
        """`batch_unlabelled` sequences a training step; there are no labels, and so `batch_labelled` must be 0.

        Raises ValueError for sizes that cannot be had and for more than one process.
        """
        if batch_labelled != 0:
            raise ValueError(f"batch_labelled must be 0, as piano rolls have no labels, got {batch_labelled}")
        if batch_unlabelled < 1:
            raise ValueError(f"batch_unlabelled must be at least 1, got {batch_unlabelled}")
        if world_size != 1:
            raise ValueError(f"devices must be 1: one process trains on piano rolls, got {world_size}")
        rolls = {
            split: Rolls(sequences, device=device, dtype=dtype) for split, sequences in self.sequences.items()
        }
        return PianoRollBatches(rolls, batch_unlabelled, self.truncate, seed=seed)


class PianoRollBatches:
    """The minibatches of piano rolls by (epoch, step), both counted from 0; `len()` is the number of steps in an epoch.

    Sequences are taken together only if `truncate` cuts them into the same number of parts, and among those, out of
    every few batches' worth in the epoch's order, by length. A group's last batch may have fewer sequences; none is
    left out. The parts of a batch follow on each other.

    Attributes: train, valid, test: `Rolls`.
    """

    def __init__(self, rolls: dict[str, Rolls], batch: int, truncate: int | None, *, seed: int) -> None:
        check_seed(seed)
        self.train, self.valid, self.test = (rolls[split] for split in SPLITS)
        self.image_shape = (NOTES,)
        self._batch, self._seed = batch, seed
        lengths = self.train.lengths
        self._steps = int(lengths.max()) if truncate is None else truncate
        self._parts = -(-lengths // self._steps)
        parts, counts = np.unique(self._parts, return_counts=True)
        self._len = int((parts * -(-counts // batch)).sum())
        self._epoch: int | None = None

    def __len__(self) -> int:
        return self._len

    def get(self, epoch: int, step: int) -> PianoRollBatch:
        """The batch of step `step` of epoch `epoch`."""
        if epoch != self._epoch:
            self._plan, self._epoch = self._order(epoch), epoch
        members, part = self._plan[step]
        return self.train.batch(members, part * self._steps, self._steps)

    def _order(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        """(sequences, part) of every step of an epoch."""
        order = shuffles(len(self.train), seed=self._seed, stream=UNLABELLED, first=epoch)[0]
        batches: list[np.ndarray] = []
        for parts in np.unique(self._parts):
            group = order[self._parts[order] == parts]
            for begin in range(0, len(group), POOL * self._batch):
                pool = group[begin : begin + POOL * self._batch]
                pool = pool[np.argsort(self.train.lengths[pool], kind="stable")]
                batches += [pool[i : i + self._batch] for i in range(0, len(pool), self._batch)]
        turns = shuffles(len(batches), seed=self._seed, stream=BATCH_ORDER, first=epoch)[0]
        return [(batches[i], part) for i in turns for part in range(self._parts[batches[i][0]])]


def read_mat(path: Path) -> tuple[list[np.ndarray], ...]:
    """Training, validation and test sequences, each uint8 (time steps, 88), in a .mat file of piano rolls.

    Raises FileNotFoundError for no file, ImportError without SciPy, ValueError for a file that SciPy finds damaged or
    that holds something else. SciPy does not find all damage: a byte too many can end the process.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is not in {path.parent}: name the folder that holds it with data_dir (--data-dir)"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError('piano rolls need SciPy: pip install "ladderfast[train]"') from error
    names = [f"{split}data" for split in SPLITS]
    raw = path.read_bytes()
    try:
        content = loadmat(io.BytesIO(raw), variable_names=names)
    except Exception as error:  # of damaged bytes one can make anything
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as a .mat file: it is damaged or none ({said[0]})"
        ) from error
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path} is no file of piano rolls, or is cut short: it holds no {missing[0]}")
    return tuple(_sequences(path, name, content[name]) for name in names)


def _sequences(path: Path, name: str, cells: Any) -> list[np.ndarray]:
    if not isinstance(cells, np.ndarray) or cells.dtype != object:
        got = getattr(cells, "dtype", type(cells).__name__)
        raise ValueError(f"{path}: {name} must be a cell array of sequences, got {got}")
    sequences = []
    for number, cell in enumerate(cells.reshape(-1), 1):
        roll = np.asarray(cell)
        if roll.ndim != 2 or roll.shape[1] != NOTES or not len(roll):
            raise ValueError(
                f"{path}: sequence {number} of {name} must have shape (time steps, {NOTES}), got {roll.shape}"
            )
        if roll.dtype.kind not in "buif" or not np.isin(roll, (0, 1)).all():
            raise ValueError(f"{path}: sequence {number} of {name} must hold zeros and ones only")
        sequences.append(np.ascontiguousarray(roll, dtype=np.uint8))
    if not sequences:
        raise ValueError(f"{path}: {name} holds no sequence")
    return sequences

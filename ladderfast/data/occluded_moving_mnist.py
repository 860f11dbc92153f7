"""Occluded Moving MNIST: digits that fly behind bars, made when they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ladderfast.checks import check_whole

from .dataset import DataSource
from .digits import Digits
from .mnist import MNIST
from .shuffle import LABELLED, UNLABELLED, check_seed, draw_labels, shuffles

SIZE, DIGIT = 32, 14  # of a frame and of a digit, in pixels
BAR, VISIBLE = 4, 8  # width of a bar, and of what is seen between two
REACH = SIZE - DIGIT  # a digit's upper left corner is at 0 .. REACH
VELOCITIES = ((1, 2), (-1, 2), (1, -2), (-1, -2), (2, 1), (-2, 1), (2, -1), (-2, -1))
SPLITS = ("train", "validation", "test")
# Philox's second key: the motion of training and validation sequences, and of test sequences, apart from
# everything that `shuffle` draws.
_MOTION = {"train": 1001, "test": 1002}


class SequenceBatch(NamedTuple):
    """One step's sequences, on the device; frames are (1, 32, 32), white is 1.

    x_labelled (B_l, T, 1, 32, 32), next_labelled of the same shape: the frame after each; y_labelled (B_l,) digits;
    x_unlabelled, next_unlabelled (B_u, T, 1, 32, 32). B_u is 0 where there is no unlabelled stream.
    """

    x_labelled: Tensor
    next_labelled: Tensor
    y_labelled: Tensor
    x_unlabelled: Tensor
    next_unlabelled: Tensor


class Scene(NamedTuple):
    """Sequences with all that is known about them, each (N, T, 1, 32, 32), white is 1.

    occluded: what is seen. clean: without bars. optimal: at the digit's place, what has been seen of it so far.
    """

    occluded: Tensor
    clean: Tensor
    optimal: Tensor


def bars() -> Tensor:
    """(32, 32) bool, True where a bar is: rows and columns 8 .. 11 and 20 .. 23."""
    line = torch.arange(SIZE) % (BAR + VISIBLE) >= VISIBLE
    return line.unsqueeze(1) | line


def motions(size: int, *, seed: int, split: str) -> tuple[Tensor, Tensor]:
    """Where sequences 0 .. size - 1 begin, (size, 2) in 0 .. 18, and their velocities, (size, 2) in pixels per frame.

    Row, then column. Sequence i depends on (seed, split, i) alone; split is "train", also for validation, or "test".
    """
    check_seed(seed)
    key = np.array([seed, _MOTION[split]], dtype=np.uint64)
    # A step of Philox4x64's counter gives the four numbers of a sequence.
    raw = np.random.Philox(key=key).random_raw(4 * size).reshape(size, 4) >> np.uint64(32)
    start = (raw[:, :2] * np.uint64(REACH + 1)) >> np.uint64(32)
    velocity = np.array(VELOCITIES)[(raw[:, 2] * np.uint64(len(VELOCITIES))) >> np.uint64(32)]
    return torch.from_numpy(start.astype(np.int64)), torch.from_numpy(velocity)


def positions(start: Tensor, velocity: Tensor, frames: int) -> Tensor:
    """Upper left corners (N, frames, 2) of digits that bounce off the borders, from `motions`."""
    steps = torch.arange(frames, device=start.device)[:, None]
    # A bounce is a reflection: the free path, folded.
    path = (start[:, None] + velocity[:, None] * steps) % (2 * REACH)
    return torch.where(path > REACH, 2 * REACH - path, path)


def place(ink: Tensor, corners: Tensor) -> Tensor:
    """White frames (N, T, 1, 32, 32) with ink (N, T or 1, 14, 14), black at 1, at the corners (N, T, 2)."""
    n, frames = corners.shape[:2]
    at = torch.arange(DIGIT, device=ink.device)
    pixel = (at[:, None] * SIZE + at).flatten()
    first = torch.arange(n * frames, device=ink.device) * SIZE**2
    first = first + corners[..., 0].flatten() * SIZE + corners[..., 1].flatten()
    white = torch.ones(n * frames * SIZE**2, device=ink.device, dtype=ink.dtype)
    values = (1 - ink).expand(n, frames, DIGIT, DIGIT)
    white[first[:, None] + pixel] = values.reshape(n * frames, DIGIT**2)
    return white.view(n, frames, 1, SIZE, SIZE)


def render(digits: Tensor, corners: Tensor) -> Scene:
    """The sequences of digits (N, 14, 14), ink 1, at the corners (N, T, 2)."""
    ink = digits[:, None]
    hidden = bars().to(digits.device)
    clean = place(ink, corners)
    return Scene(clean.masked_fill(hidden, 1), clean, place(ink * _seen(corners), corners))


def _seen(corners: Tensor) -> Tensor:
    """(N, T, 14, 14) bool: which pixels of the digit have been visible in this frame or one before."""
    at = torch.arange(DIGIT, device=corners.device)
    free = (corners[..., None] + at) % (BAR + VISIBLE) < VISIBLE  # (N, T, 2, 14)
    visible = free[..., 0, :, None] & free[..., 1, None, :]
    return visible.cumsum(1) > 0


class OccludedMovingDigits(DataSource):
    """Occluded Moving MNIST's task with scikit-learn's digits, which need no download; see `OccludedMovingMNIST`.

    The 8 x 8 pixels are made 14 x 14 (bilinear); 1,300 sequences for training and validation, 497 for testing.

    Args:
        num_labels: sequences with a label, the same number of each digit; null: all.
        num_validation: sequences at the end of the training set that are for validation instead.
        frames: time steps.
        optimal: in the place of the sequence a single frame, the reconstruction from all frames.
        motion_seed: of where digits begin and how they move; the same for all runs that are to be compared.
        seed: draws the labelled sequences.
    """

    def __init__(
        self,
        num_labels: int | None = None,
        num_validation: int = 200,
        frames: int = 5,
        optimal: bool = False,
        motion_seed: int = 1,
        *,
        seed: int = 1,
    ) -> None:
        source = Digits()
        train, test = (
            F.interpolate(x.reshape(-1, 1, 8, 8), size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)
            for x in (source.x_unlabelled, source.x_test)
        )
        self._set(
            train[:, 0],
            source.y_labelled,
            test[:, 0],
            source.y_test,
            num_labels=num_labels,
            num_validation=num_validation,
            frames=frames,
            optimal=optimal,
            motion_seed=motion_seed,
            seed=seed,
        )

    def _set(
        self,
        x_train: Tensor,
        y_train: Tensor,
        x_test: Tensor,
        y_test: Tensor,
        *,
        num_labels: int | None,
        num_validation: int,
        frames: int,
        optimal: bool,
        motion_seed: int,
        seed: int,
    ) -> None:
        check_seed(motion_seed, "motion_seed")
        for name, number in (("frames", frames), ("num_validation", num_validation)):
            check_whole(name, number)
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        if not 0 <= num_validation < len(x_train):
            raise ValueError(f"num_validation must be from 0 to {len(x_train) - 1}, got {num_validation}")
        self.image_shape = (SIZE, SIZE)
        self.frames, self.optimal = frames, optimal
        self.digits = {"train": x_train, "test": x_test}
        self.labels = {"train": y_train, "test": y_test}
        self.motion = {
            split: motions(len(digits), seed=motion_seed, split=split)
            for split, digits in self.digits.items()
        }
        train = len(x_train) - num_validation
        self.rows = {
            "train": torch.arange(train),
            "validation": torch.arange(train, len(x_train)),
            "test": torch.arange(len(x_test)),
        }
        self.labelled = draw_labels(y_train[:train], num_labels, seed=seed)
        self._all_labels = num_labels is None

    @property
    def validation_samples(self) -> int:
        return len(self.rows["validation"])

    @property
    def num_classes(self) -> int:
        """How many digits there are, by the highest."""
        return int(max(labels.max() for labels in self.labels.values())) + 1

    def with_validation_in_training(self) -> OccludedMovingDigits:
        """The same with the validation sequences among the training ones, and none for validation.

        Where all training sequences have their label those of the validation set have it as well; else they are
        unlabelled.
        """
        other = copy.copy(self)
        both = torch.cat((self.rows["train"], self.rows["validation"]))
        other.rows = {**self.rows, "train": both, "validation": both[:0]}
        other.labelled = both if self._all_labels else self.labelled
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
    ) -> SequenceBatches:
        return SequenceBatches(
            self,
            batch_labelled,
            batch_unlabelled,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
            dtype=dtype,
        )


class OccludedMovingMNIST(OccludedMovingDigits):
    """MNIST digits of 14 x 14 pixels that fly over 32 x 32 white ones, behind white bars.

    Bars, vertical and horizontal, are 4 pixels wide, with 8 visible ones between. Digits begin anywhere, have one
    of the velocities (+-1, +-2), (+-2, +-1) in pixels per frame and bounce off the borders. The label is the digit; the
    sequences are 60,000 for training and validation and 10,000 for testing, one for each image of MNIST. They are
    made when asked for, from the image, the seed of the motion and the sequence's number.

    Args:
        data_dir: folder with MNIST's four files, see `MNIST`.
        num_labels: sequences with a label, the same number of each digit; null: all.
        num_validation: sequences at the end of the training set that are for validation instead.
        frames: time steps.
        optimal: in the place of the sequence a single frame: at the digit's last place, all of it that has been seen in
            any of the frames. The motion being known, more cannot be known of the digit.
        motion_seed: of where digits begin and how they move; the same for all runs that are to be compared.
        seed: draws the labelled sequences.
        download: fetch MNIST's files where they are not there.

    Raises what `MNIST` raises; TypeError or ValueError for numbers that are not whole or out of range.

    Source: Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, section 3.1.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        num_labels: int | None = None,
        num_validation: int = 10_000,
        frames: int = 5,
        optimal: bool = False,
        motion_seed: int = 1,
        *,
        seed: int = 1,
        download: bool = False,
    ) -> None:
        source = MNIST(data_dir, download=download)
        train, test = (
            F.avg_pool2d(x.reshape(-1, 1, 28, 28), 2)[:, 0] for x in (source.x_unlabelled, source.x_test)
        )
        self._set(
            train,
            source.y_labelled,
            test,
            source.y_test,
            num_labels=num_labels,
            num_validation=num_validation,
            frames=frames,
            optimal=optimal,
            motion_seed=motion_seed,
            seed=seed,
        )


class SequenceBatches:
    """The sequences of an `OccludedMovingDigits` on one device, and its minibatches by (epoch, step).

    Streams and orders are those of `Batches`: an epoch is one pass over the unlabelled sequences, which are all of the
    training set, and labelled ones come pass after pass beside them. With batch_unlabelled 0 an epoch is one pass over
    the labelled sequences.

    Attributes: image_shape. `len()` is the number of steps in an epoch.
    """

    def __init__(
        self,
        source: OccludedMovingDigits,
        batch_labelled: int,
        batch_unlabelled: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        check_seed(seed)
        unlabelled, labelled = source.rows["train"], source.labelled
        most = len(unlabelled) // world_size
        if not 0 <= batch_unlabelled <= most:
            raise ValueError(
                f"batch_unlabelled must be from 0 to {most}, the unlabelled samples of each process, got "
                f"{batch_unlabelled}"
            )
        if batch_labelled < 1:
            raise ValueError(f"batch_labelled must be at least 1, got {batch_labelled}")
        if not batch_unlabelled and batch_labelled * world_size > len(labelled):
            raise ValueError(
                f"batch_labelled must be from 1 to {len(labelled) // world_size}, the labelled samples of each "
                f"process, where batch_unlabelled is 0; got {batch_labelled}"
            )
        self.batch_labelled, self.batch_unlabelled = batch_labelled, batch_unlabelled
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.frames, self.optimal, self.image_shape = source.frames, source.optimal, source.image_shape
        self.rows = source.rows
        self._labelled, self._unlabelled = labelled, unlabelled
        self._digits = {split: digits.to(device, dtype) for split, digits in source.digits.items()}
        self._labels = {split: labels.to(device) for split, labels in source.labels.items()}
        self._corners = {
            split: positions(*motion, source.frames + 1).to(device) for split, motion in source.motion.items()
        }
        size, batch = (
            (len(unlabelled), batch_unlabelled) if batch_unlabelled else (len(labelled), batch_labelled)
        )
        self._steps = size // (batch * world_size)
        self._epoch: int | None = None

    def __len__(self) -> int:
        return self._steps

    def get(self, epoch: int, step: int) -> SequenceBatch:
        """The batch of step `step` of epoch `epoch`."""
        if epoch != self._epoch:
            self._orders = self._order(epoch)
            self._epoch = epoch
        labelled, unlabelled = (order[step] for order in self._orders)
        x_labelled, next_labelled = self._sequences("train", labelled)
        x_unlabelled, next_unlabelled = self._sequences("train", unlabelled)
        y_labelled = self._labels["train"][labelled.to(x_labelled.device)]
        return SequenceBatch(x_labelled, next_labelled, y_labelled, x_unlabelled, next_unlabelled)

    def parts(self, split: str, size: int = 500) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All sequences of "train", "validation" or "test", in order: x, next (as in a batch) and y of `size` each."""
        where = "test" if split == "test" else "train"
        for rows in self.rows[split].split(size):
            if len(rows):
                yield (
                    *self._sequences(where, rows),
                    self._labels[where][rows.to(self._labels[where].device)],
                )

    def scene(self, split: str, rows: Tensor) -> tuple[Scene, Tensor]:
        """Sequences number `rows` of a split, with one frame more than T, and their digits (N,)."""
        where = "test" if split == "test" else "train"
        rows = self.rows[split][rows].to(self._labels[where].device)
        scene = render(self._digits[where][rows], self._corners[where][rows])
        return scene, self._labels[where][rows]

    def _sequences(self, where: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the network gets, and the frame after each of its frames."""
        rows = rows.to(self._corners[where].device)
        digits, corners = self._digits[where][rows], self._corners[where][rows]
        ink = digits[:, None]
        hidden = bars().to(digits.device)
        if not self.optimal:
            occluded = place(ink, corners).masked_fill_(hidden, 1)
            return occluded[:, :-1], occluded[:, 1:]
        last = slice(self.frames - 1, self.frames)
        known = place(ink * _seen(corners[:, : self.frames])[:, last], corners[:, last])
        return known, place(ink, corners[:, -1:]).masked_fill_(hidden, 1)

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """This process's rows of a whole epoch: labelled (steps, B_l), unlabelled (steps, B_u)."""

        def mine(order: np.ndarray, rows: Tensor, batch: int) -> Tensor:
            taken = order[: self._steps * self.world_size * batch]
            taken = taken.reshape(self._steps, self.world_size, batch)[:, self.rank]
            return rows[torch.from_numpy(taken.copy())]

        passed = shuffles(len(self._unlabelled), seed=self.seed, stream=UNLABELLED, first=epoch)[0]
        size, taken = len(self._labelled), self._steps * self.world_size * self.batch_labelled
        first, offset = (epoch, 0) if not self.batch_unlabelled else divmod(epoch * taken, size)
        passes = -(-(offset + taken) // size)
        stream = shuffles(size, seed=self.seed, stream=LABELLED, first=first, count=passes).reshape(-1)
        return (
            mine(stream[offset:], self._labelled, self.batch_labelled),
            mine(passed, self._unlabelled, self.batch_unlabelled),
        )

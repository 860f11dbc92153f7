"""Moving MNIST: two digits that move about a frame and bounce off its borders, made as they are asked for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ladderfast.checks import check_whole

from .dataset import Batch, DataSource
from .draws import HELD_OUT_SEED, MOVING_DIGITS, Draws
from .mnist import MNIST
from .shuffle import check_seed

DIGIT = 28
SPEED = 3.6  # pixels a frame


class Sequences(NamedTuple):
    """Frames x (N, T, D) and the owners of their pixels (N, T, D) uint8."""

    x: Tensor
    owner: Tensor


class MovingMNIST(DataSource):
    """Sequences of two of MNIST's digits on 64 x 64 pixels, zeros and ones, as x (N, frames, 4096).

    Each digit starts anywhere, moves 3.6 pixels a frame in any direction and bounces off the borders. A pixel is 1
    where a digit is above 1/2. Owners are 1 and 2, the digits, and 0 for the background and where both are. An epoch
    are `num_train` sequences of MNIST's training digits that no other epoch has, drawn by the run's seed; the test
    sequences have its test digits and are the same for every seed.

    Args:
        data_dir: folder of MNIST's four files, as for `MNIST`.
        frames: of a sequence.
        side: pixels of a frame's side.
        num_train: sequences of an epoch.
        num_test: test sequences.
        download: fetch MNIST's files that are not there.

    Raises FileNotFoundError, ValueError and OSError as `MNIST` does; TypeError or ValueError for sizes that make no
    sequence.

    Source: Srivastava et al., "Unsupervised Learning of Video Representations using LSTMs", 2015; the sequences are
    our own.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        frames: int = 20,
        side: int = 64,
        num_train: int = 10_000,
        num_test: int = 100,
        *,
        download: bool = False,
    ) -> None:
        sizes = {"frames": frames, "side": side, "num_train": num_train, "num_test": num_test}
        for name, size in sizes.items():
            check_whole(name, size)
        if frames < 2 or side <= DIGIT or num_train < 1 or num_test < 1:
            raise ValueError(
                f"frames must be at least 2, side above {DIGIT}, num_train and num_test at least 1, got {frames}, "
                f"{side}, {num_train} and {num_test}"
            )
        mnist = MNIST(data_dir, download=download)
        self.digits, held = (
            (x.reshape(-1, DIGIT, DIGIT) > 0.5).numpy() for x in (mnist.x_unlabelled, mnist.x_test)
        )
        self.frames, self.side, self.num_train = frames, side, num_train
        self.image_shape = (side, side)
        self.test = moving_digits(held, num_test, frames, side, seed=HELD_OUT_SEED, first=0)

    def batches(self, batch_labelled: int, batch_unlabelled: int, **kind: Any) -> MovingBatches:
        return MovingBatches(self, batch_labelled, batch_unlabelled, **kind)


class MovingBatches:
    """Training sequences of `MovingMNIST` by epoch and step; x_test and owner_test are the test sequences."""

    x_valid = owner_valid = None

    def __init__(
        self,
        source: MovingMNIST,
        batch_labelled: int,
        batch_unlabelled: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_seed(seed)
        if batch_labelled:
            raise ValueError(f"batch_labelled must be 0, as sequences have no labels, got {batch_labelled}")
        self._steps = source.num_train // (batch_unlabelled * world_size) if batch_unlabelled > 0 else 0
        if not self._steps:
            raise ValueError(
                f"batch_unlabelled must be from 1 to {source.num_train // world_size}, got {batch_unlabelled}"
            )
        self._source, self._size, self._seed = source, batch_unlabelled, seed
        self._rank, self._world = rank, world_size
        self._kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.image_shape = source.image_shape
        self.x_test, self.owner_test = source.test.x.to(**self._kind), source.test.owner

    def __len__(self) -> int:
        return self._steps

    def get(self, epoch: int, step: int) -> Batch:
        """The batch of step `step` of epoch `epoch`."""
        number = ((epoch * self._steps + step) * self._world + self._rank) * self._size
        source = self._source
        made = moving_digits(
            source.digits,
            self._size,
            source.frames,
            source.side,
            seed=self._seed,
            first=(1 << 40) + number,  # no test sequence has such a number
        )
        x = made.x.to(**self._kind)
        return Batch(x[:0], torch.zeros(0, 0, device=x.device), x)


def moving_digits(
    digits: np.ndarray, count: int, frames: int, side: int, *, seed: int, first: int = 0
) -> Sequences:
    """Sequences number `first` to `first + count - 1` of a seed, of digits (M, 28, 28) of bools."""
    draws = Draws(count, 8, seed=seed, stream=MOVING_DIGITS, first=first)
    chosen = draws.integers(2, len(digits))
    room = side - DIGIT
    start = np.stack([draws.uniform(2, 0, room) for _ in range(2)], -1)
    angle = draws.uniform(2, 0, 2 * math.pi)
    velocity = SPEED * np.stack([np.sin(angle), np.cos(angle)], -1)
    # Unfolded, a path that bounces is a straight line: (count, frames, 2 digits, 2 axes).
    path = start[:, None] + velocity[:, None] * np.arange(frames)[:, None, None]
    place = np.rint(room - np.abs(path % (2 * room) - room)).astype(np.int64)
    covered = np.zeros((count, frames, side, side), dtype=np.uint8)
    at = np.arange(DIGIT)
    which = np.arange(count)[:, None, None, None], np.arange(frames)[None, :, None, None]
    for k in (0, 1):
        row = place[:, :, k, 0, None, None] + at[:, None]
        column = place[:, :, k, 1, None, None] + at[None, :]
        covered[which[0], which[1], row, column] += digits[chosen[:, k], None].astype(np.uint8) * np.uint8(
            k + 1
        )
    flat = torch.from_numpy(covered.reshape(count, frames, side * side))
    return Sequences((flat > 0).float(), torch.where(flat > 2, 0, flat))

"""Random numbers of a sample that depend on a seed and the sample's number, and on nothing else."""

from __future__ import annotations

import numpy as np

# Streams of generated data, apart from the orders and draws of the same seed.
SHAPES, TEXTURED_MNIST, TEXTURED_DIGITS, MOVING_DIGITS, TEXTURES = ((1 << 32) + i for i in range(5))

# Draws validation and test samples: runs of every seed are measured by the same ones.
HELD_OUT_SEED = 1


class Draws:
    """The numbers of samples `first` to `first + count - 1`, taken column by column.

    Each sample has `columns` raw integers of Philox4x64; numpy's sampling routines, whose streams may change between
    versions, have no say.
    """

    def __init__(self, count: int, columns: int, *, seed: int, stream: int, first: int = 0) -> None:
        blocks = -(-columns // 4)  # one step of the counter gives four integers
        key = np.array([seed, stream], dtype=np.uint64)
        philox = np.random.Philox(key=key, counter=np.array([first * blocks, 0, 0, 0], dtype=np.uint64))
        self._raw = philox.random_raw(4 * blocks * count).reshape(count, 4 * blocks)[:, :columns]
        self._next = 0

    def uniform(self, columns: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(count, columns) float64, from `low` to below `high`."""
        return low + (high - low) * ((self._take(columns) >> np.uint64(11)) * 2.0**-53)

    def integers(self, columns: int, below: int | np.ndarray) -> np.ndarray:
        """(count, columns) int64, from 0 to `below` - 1; `below` is one for all or (count, columns)."""
        high = self._take(columns) >> np.uint64(32)
        return (high * np.asarray(below).astype(np.uint64) >> np.uint64(32)).astype(np.int64)

    def distinct(self, columns: int, below: int) -> np.ndarray:
        """(count, columns) int64 from 0 to `below` - 1, no two of a sample alike."""
        chosen = np.empty((len(self._raw), 0), dtype=np.int64)
        for taken in range(columns):
            # One of those left, counted over those taken, the smallest first.
            new = self.integers(1, below - taken)
            for other in np.sort(chosen, 1).T:
                new += new >= other[:, None]
            chosen = np.concatenate([chosen, new], 1)
        return chosen

    def _take(self, columns: int) -> np.ndarray:
        part = self._raw[:, self._next : self._next + columns]
        if part.shape[1] != columns:
            raise ValueError(
                f"a sample has {self._raw.shape[1]} draws, and {self._next + columns} were asked for"
            )
        self._next += columns
        return part

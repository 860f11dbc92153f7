"""STL-10 from its binary files, with its ten folds."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from .download import cache_folder
from .images import ImageDataset

SIDE = 96
PIXELS = 3 * SIDE * SIDE
FOLDS = 10


class STL10(ImageDataset):
    """5,000 labelled, 100,000 unlabelled and 8,000 test images of 96 x 96 pixels in three colours, as x (N, 27648).

    A sample is channel, row, column. Unlabelled samples are the 5,000 and the 100,000. Images are kept as bytes (3 GB)
    and made numbers batch by batch.

    Args:
        data_dir: folder with train_X.bin, train_y.bin, unlabeled_X.bin, test_X.bin, test_y.bin and fold_indices.txt, or
            with a folder stl10_binary of them. Default: ladderfast/stl10 in the user's cache.
        fold: which of the ten published folds, 0 to 9, of 1,000 samples has the labels; null: the seed's, so that the
            seeds 1 to 10 are the folds 0 to 9.
        seed: chooses the fold, where `fold` does not.
        contrast: each image less its mean and scaled to the variance 1; false: values 0..1.
        shift: training images are moved by up to so many pixels each way, at random.
        mirror: training images are mirrored left to right, every other one, at random.

    Raises FileNotFoundError for a missing file, ValueError for one that is truncated or not STL-10's.
    """

    # Samples by the first part of the files' names.
    sizes: ClassVar[dict[str, int]] = {"train": 5000, "unlabeled": 100000, "test": 8000}
    fold_size: ClassVar[int] = 1000

    def __init__(
        self,
        data_dir: str | None = None,
        fold: int | None = None,
        *,
        seed: int = 1,
        contrast: bool = False,
        shift: int = 0,
        mirror: bool = False,
    ) -> None:
        if fold is not None and not 0 <= fold < FOLDS:
            raise ValueError(f"fold must be from 0 to {FOLDS - 1}, or null for the seed's, got {fold}")
        folder = cache_folder("stl10") if data_dir is None else Path(data_dir).expanduser()
        if (folder / "stl10_binary").is_dir():
            folder = folder / "stl10_binary"
        names = [f"{part}_X.bin" for part in self.sizes] + ["train_y.bin", "test_y.bin", "fold_indices.txt"]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} of STL-10 not found in {folder}: name the folder that holds the unpacked files "
                "of stl10_binary.tar.gz with data_dir (--data-dir)"
            )
        train, unlabelled, test = self.sizes.values()
        # Read into place: one copy of what is several gigabytes.
        x = np.empty((train + unlabelled, PIXELS), dtype=np.uint8)
        read_images(folder / "train_X.bin", x[:train])
        read_images(folder / "unlabeled_X.bin", x[train:])
        x_test = np.empty((test, PIXELS), dtype=np.uint8)
        read_images(folder / "test_X.bin", x_test)
        self.fold = fold
        self._folds = read_folds(folder / "fold_indices.txt", train, self.fold_size)
        super().__init__(
            torch.from_numpy(x),
            torch.from_numpy(read_labels(folder / "train_y.bin", train)),
            torch.from_numpy(x_test),
            torch.from_numpy(read_labels(folder / "test_y.bin", test)),
            image_shape=(3, SIDE, SIDE),
            seed=seed,
            contrast=contrast,
            shift=shift,
            mirror=mirror,
        )

    def _draw(self, seed: int) -> None:
        fold = (seed - 1) % FOLDS if self.fold is None else self.fold
        chosen = torch.from_numpy(self._folds[fold])
        self.x_labelled, self.y_labelled = self.x_unlabelled[chosen], self._y_train[chosen]


def read_images(path: Path, into: np.ndarray) -> None:
    """Fill `into` (N, 27648), uint8, from a file of N images, each channel by channel and column by column.

    Raises ValueError for a file of another length.
    """
    if path.stat().st_size != into.size:
        raise ValueError(
            f"{path} is truncated or not STL-10's: it has {path.stat().st_size} bytes, expected {into.size}"
        )
    columns = np.memmap(path, dtype=np.uint8, mode="r", shape=(len(into), 3, SIDE, SIDE))
    into.reshape(-1, 3, SIDE, SIDE)[...] = columns.transpose(0, 1, 3, 2)


def read_labels(path: Path, samples: int) -> np.ndarray:
    """Classes 0..9, int64, from a file of a byte each, 1..10. Raises ValueError for another length or value."""
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    if len(content) != samples:
        raise ValueError(
            f"{path} is truncated or not STL-10's: it has {len(content)} labels, expected {samples}"
        )
    if content.min() < 1 or content.max() > 10:
        raise ValueError(f"{path}: labels must be from 1 to 10, got {content.min()} to {content.max()}")
    return content.astype(np.int64) - 1


def read_folds(path: Path, samples: int, size: int) -> np.ndarray:
    """Indices (10, size) from a text file of a line for each fold. Raises ValueError for anything else."""
    try:
        lines = [
            [int(word) for word in line.split()] for line in path.read_text().splitlines() if line.strip()
        ]
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} must hold ten lines of indices: {error}") from error
    sizes = [len(line) for line in lines]
    if sizes != [size] * FOLDS:
        raise ValueError(f"{path} must hold ten lines of {size} indices, got lines of {sizes}")
    folds = np.array(lines)
    if folds.min() < 0 or folds.max() >= samples or any(len(set(line)) < size for line in lines):
        raise ValueError(f"{path}: each line must be different indices from 0 to {samples - 1}")
    return folds

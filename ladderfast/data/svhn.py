"""Street View House Numbers, cropped digits, from their MATLAB files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from .download import cache_folder, download_file
from .images import ImageDataset

ADDRESS = "http://ufldl.stanford.edu/housenumbers/"


class SVHN(ImageDataset):
    """73,257 training and 26,032 test images of 32 x 32 pixels in three colours, as x (N, 3072): channel, row, column.

    The 531,131 extra images, which are easier, come to the training images where `extra` says so; labels, where not all
    are asked for, are drawn from the 73,257 alone (Zhao et al. 2015, section 4.3.1). The digit 0, which the files call
    10, is class 0. Images are kept as bytes and made numbers batch by batch.

    Args:
        data_dir: folder with train_32x32.mat, test_32x32.mat and, with `extra`, extra_32x32.mat. Default:
            ladderfast/svhn in the user's cache.
        num_labels: labelled samples, the same number of each digit; null for all.
        seed: draws the labelled samples.
        extra: with the extra images.
        contrast: each image less its mean and scaled to the variance 1; false: values 0..1.
        shift: training images are moved by up to so many pixels each way, at random.
        download: fetch files that are not there.

    Raises FileNotFoundError for a missing file, ValueError for one that is truncated, damaged or not SVHN's,
    ImportError without SciPy, OSError where a download fails.
    """

    # Name, MD5 and samples.
    files: ClassVar[dict[str, tuple[str, str, int]]] = {
        "train": ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 73257),
        "extra": ("extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7", 531131),
        "test": ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 26032),
    }

    def __init__(
        self,
        data_dir: str | None = None,
        num_labels: int | None = None,
        *,
        seed: int = 1,
        extra: bool = False,
        contrast: bool = False,
        shift: int = 0,
        download: bool = False,
    ) -> None:
        folder = cache_folder("svhn") if data_dir is None else Path(data_dir).expanduser()
        wanted = ["train", *["extra"] * extra, "test"]
        missing = [self.files[part][0] for part in wanted if not (folder / self.files[part][0]).is_file()]
        if missing and not download:
            raise FileNotFoundError(
                f"{' and '.join(missing)} of SVHN not found in {folder}: name the folder that holds SVHN's MATLAB "
                "files with data_dir (--data-dir), or fetch them with download (--data.download true)"
            )
        for name, md5, _ in (self.files[part] for part in wanted):
            if name in missing:
                download_file(
                    name,
                    [f"{ADDRESS}{name}"],
                    folder / name,
                    # mypy gives the arguments of a lambda with defaults no type.
                    check=lambda path, md5=md5: _check_md5(path, md5),  # type: ignore[misc]
                )
        parts = {}
        for part in wanted:
            name, md5, samples = self.files[part]
            _check_md5(folder / name, md5)
            parts[part] = read_mat(folder / name, samples)
        x, y = parts["train"]
        if extra:
            x = np.concatenate([x, parts["extra"][0]])
            y = np.concatenate([y, parts["extra"][1]]) if num_labels is None else y
        super().__init__(
            torch.from_numpy(x),
            torch.from_numpy(y),
            torch.from_numpy(parts["test"][0]),
            torch.from_numpy(parts["test"][1]),
            image_shape=(3, 32, 32),
            num_labels=num_labels,
            seed=seed,
            contrast=contrast,
            shift=shift,
        )


def read_mat(path: Path, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072), uint8, and classes (N,) of a file.

    It has X (32, 32, 3, N), uint8, row, column, channel, and y (N, 1), uint8, from 1 to 10.

    Raises ValueError for anything else, ImportError without SciPy.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError('SVHN needs SciPy: pip install "ladderfast[train]"') from error
    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # of arbitrary bytes SciPy makes many kinds
        raise ValueError(f"{path} is not a MATLAB file that can be read: {error}") from error
    for name, shape in (("X", (32, 32, 3, samples)), ("y", (samples, 1))):
        value = content.get(name)
        if value is None:
            raise ValueError(f"{path} is not SVHN's: it has no variable {name}")
        if value.dtype != np.uint8 or value.shape != shape:
            raise ValueError(f"{path}: {name} must be uint8 {shape}, got {value.dtype} {value.shape}")
    y = content["y"][:, 0].astype(np.int64)
    if y.min() < 1 or y.max() > 10:
        raise ValueError(f"{path}: labels must be from 1 to 10, got {y.min()} to {y.max()}")
    x = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)).reshape(samples, -1)
    return x, y % 10


def _check_md5(path: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise ValueError(f"{path} is not SVHN's file: its MD5 is {digest.hexdigest()}, expected {md5}")

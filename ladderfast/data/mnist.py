"""MNIST from its four IDX files, packed or not."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .download import cache_folder, download_file
from .images import ImageDataset

# Name and MD5 of the unpacked file, in the order x_train, y_train, x_test, y_test.
FILES = (
    ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
    ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
    ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
    ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
)
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


class MNIST(ImageDataset):
    """60,000 training and 10,000 test images of 28 x 28 pixels, values 0..1, as x (N, 784).

    Args:
        data_dir: folder with the four files, each gzip or not, under their usual names (train-images-idx3-ubyte,
            train-images-idx3-ubyte.gz or train-images.idx3-ubyte, and so on). Default: ladderfast/mnist in the
            user's cache.
        num_labels: labelled samples, as many of each digit, to one; null for all 60,000.
        seed: draws the labelled samples.
        padding: pixels of 0 on each side: 2 makes images of 32 x 32, x (N, 1024).
        shift: training images are moved by up to so many pixels each way, at random.
        download: fetch files that are not there.

    Raises FileNotFoundError for a missing file, ValueError for one that is truncated, damaged or not
    MNIST's, OSError where a download fails from every mirror.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        num_labels: int | None = None,
        *,
        seed: int = 1,
        padding: int = 0,
        shift: int = 0,
        download: bool = False,
    ) -> None:
        if padding < 0:
            raise ValueError(f"padding must not be negative, got {padding}")
        folder = cache_folder("mnist") if data_dir is None else Path(data_dir).expanduser()
        arrays = []
        for name, md5 in FILES:
            path = _find(folder, name)
            if path is None:
                if not download:
                    raise FileNotFoundError(
                        f"{name} (or {name}.gz) is not in {folder}: name the folder that holds MNIST's four "
                        "files with data_dir (--data-dir), or fetch them with download (--data.download true)"
                    )
                path = folder / f"{name}.gz"
                urls = [f"{mirror}{path.name}" for mirror in MIRRORS]
                download_file(name, urls, path, check=lambda part, md5=md5: _read(part, md5))  # type: ignore[misc]
            arrays.append(torch.from_numpy(_read(path, md5)))
        x_train, y_train, x_test, y_test = arrays
        side = 28 + 2 * padding

        def padded(x: Tensor) -> Tensor:
            return F.pad(x, (padding,) * 4).reshape(-1, side * side).to(torch.float32).div_(255)

        super().__init__(
            padded(x_train),
            y_train.to(torch.int64),
            padded(x_test),
            y_test.to(torch.int64),
            image_shape=(side, side),
            num_labels=num_labels,
            seed=seed,
            shift=shift,
        )


def parse_idx(content: bytes, name: str | Path) -> np.ndarray:
    """The array in the bytes of an IDX file: magic 0, 0, 8 (unsigned bytes), ndim, sizes, values.

    The sizes are big-endian 32-bit integers. `name` is for messages. Raises ValueError for another magic or a
    length that does not fit the header.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{name} is not an IDX file of bytes: it begins with {content[:4]!r}, expected b'\\x00\\x00\\x08'"
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{name} is truncated: {len(content)} bytes, its header alone has {header}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(content) < expected:
        raise ValueError(f"{name} is truncated: {len(content)} bytes, its header asks for {expected}")
    if len(content) > expected:
        raise ValueError(f"{name} has {len(content) - expected} bytes more than its header asks for")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path | None:
    dotted = name.replace("-idx", ".idx")
    for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def _read(path: Path, md5: str) -> np.ndarray:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
    elif path.suffix == ".gz":
        raise ValueError(f"{path} is not a gzip file: it begins with {content[:4]!r}")
    array = parse_idx(content, path)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is not MNIST's file: the MD5 of its unpacked bytes is {found}, expected {md5}"
        )
    return array

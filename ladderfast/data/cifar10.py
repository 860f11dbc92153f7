"""CIFAR-10 from its binary or its Python batches, unpacked or in their archive."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .download import cache_folder, download_file
from .images import ImageDataset
from .whitening import ZCA, normalise_contrast

PIXELS = 3 * 32 * 32
MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/",
    "https://cave.cs.toronto.edu/kriz/",
)


@dataclass(frozen=True)
class Layout:
    """How the images are spread over files.

    name: of the data, for messages; cache: of its folder in the user's cache; batches: name, MD5 of the Python file
    and samples of each, the test batch last; forms: folder, archive and its MD5 of the Python and the binary form (of
    binary batches alone no checksum is published); labels: the Python files' key for them; label_bytes: of a sample in
    binary files, of which the last is the label.
    """

    name: str
    cache: str
    batches: tuple[tuple[str, str, int], ...]
    forms: dict[str, tuple[str, str, str]]
    classes: int
    labels: str
    label_bytes: int


class CIFAR10(ImageDataset):
    """50,000 training and 10,000 test images of 32 x 32 pixels in three colours, as x (N, 3072): channel, row, column.

    Preprocessed as in Rasmus et al. 2015, section 4.2: values 0..255, global contrast normalisation (each image less
    its mean, scaled to the norm 55), then ZCA whitening by the training images' covariance + 0.1 I. The whitening is
    fitted once, in a minute, and kept in the user's cache under a checksum of the images.

    Args:
        data_dir: folder with the six batches, or with a folder cifar-10-batches-bin or cifar-10-batches-py of them, or
            with the archive cifar-10-binary.tar.gz or cifar-10-python.tar.gz as it is. Default: ladderfast/cifar10 in
            the user's cache.
        num_labels: labelled samples, the same number of each class; null for all 50,000.
        seed: draws the labelled samples.
        whiten: false leaves the images as `contrast` says.
        contrast: without whitening, each image less its mean and scaled to the norm 55; false: values 0..1.
        shift: training images are moved by up to so many pixels each way, at random.
        mirror: training images are mirrored left to right, every other one, at random.
        download: fetch the binary archive if there are no data.

    Raises FileNotFoundError where data are missing, ValueError for files that are truncated, damaged or not CIFAR-10's,
    OSError where a download fails from every mirror. Python batches are read without executing what they may hold.
    """

    layout: ClassVar[Layout] = Layout(
        name="CIFAR-10",
        cache="cifar10",
        batches=(
            ("data_batch_1", "c99cafc152244af753f735de768cd75f", 10000),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec", 10000),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751", 10000),
            ("data_batch_4", "634d18415352ddfa80567beed471001a", 10000),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb", 10000),
            ("test_batch", "40351d587109b95175f43aff81a1287e", 10000),
        ),
        forms={
            "python": ("cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
            "binary": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        },
        classes=10,
        labels="labels",
        label_bytes=1,
    )

    def __init__(
        self,
        data_dir: str | None = None,
        num_labels: int | None = None,
        *,
        seed: int = 1,
        whiten: bool = True,
        contrast: bool = False,
        shift: int = 0,
        mirror: bool = False,
        download: bool = False,
    ) -> None:
        layout = self.layout
        folder = cache_folder(layout.cache) if data_dir is None else Path(data_dir).expanduser()
        read = _find(folder, layout)
        if read is None:
            if not download:
                raise FileNotFoundError(
                    f"{layout.name} is not in {folder}: name the folder that holds its batches or one of its archives "
                    f"({', '.join(archive for _, archive, _ in layout.forms.values())}) with data_dir (--data-dir), or "
                    "fetch them with download (--data.download true)"
                )
            _, archive, md5 = layout.forms["binary"]
            urls = [f"{address}{archive}" for address in MIRRORS]
            target = folder / archive
            download_file(
                layout.name,
                urls,
                target,
                check=lambda part: _check_md5(part, part.read_bytes(), md5, layout),
            )
            read = _find(folder, layout)
            assert read is not None
        parts = read()
        pixels, labels = zip(*parts, strict=True)
        for name, y in (("training", np.concatenate(labels[:-1])), ("test", labels[-1])):
            counts = np.bincount(y, minlength=layout.classes)
            if len(set(counts)) > 1:
                raise ValueError(
                    f"{folder} does not hold {layout.name}: its {name} batches have {counts.tolist()} samples of the "
                    f"{layout.classes} classes, which should be equally many"
                )
        x_train = torch.from_numpy(np.concatenate(pixels[:-1])).to(torch.float32)
        x_test = torch.from_numpy(pixels[-1]).to(torch.float32)
        if whiten or contrast:
            x_train, x_test = normalise_contrast(x_train), normalise_contrast(x_test)
        else:
            x_train, x_test = x_train / 255, x_test / 255
        if whiten:
            zca = ZCA.fitted(x_train, folder=cache_folder(layout.cache))
            x_train, x_test = zca(x_train), zca(x_test)
        super().__init__(
            x_train,
            torch.from_numpy(np.concatenate(labels[:-1])),
            x_test,
            torch.from_numpy(labels[-1]),
            image_shape=(3, 32, 32),
            num_labels=num_labels,
            seed=seed,
            shift=shift,
            mirror=mirror,
        )


Part = tuple[np.ndarray, np.ndarray]  # pixels (N, 3072) uint8, labels (N,) int64


def _find(folder: Path, layout: Layout) -> Callable[[], list[Part]] | None:
    """How to read the data that are in the folder: loose batches before an archive, Python before binary."""
    for form, (inner, _, _) in layout.forms.items():
        suffix = ".bin" if form == "binary" else ""
        for place in (folder, folder / inner):
            if any((place / f"{name}{suffix}").is_file() for name, _, _ in layout.batches):
                return lambda place=place, suffix=suffix, form=form: [  # type: ignore[misc]
                    _parse(form, path, _read(path, layout), md5, samples, layout)
                    for name, md5, samples in layout.batches
                    for path in [place / f"{name}{suffix}"]
                ]
    for form, (_, archive, _) in layout.forms.items():
        if (folder / archive).is_file():
            # mypy gives the arguments of a lambda with defaults no type.
            return lambda path=folder / archive, form=form: _read_archive(path, form, layout)  # type: ignore[misc]
    return None


def _read(path: Path, layout: Layout) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is not in {path.parent}, which has other batches of {layout.name}"
        )
    return path.read_bytes()


def _read_archive(path: Path, form: str, layout: Layout) -> list[Part]:
    content = path.read_bytes()
    inner, _, md5 = layout.forms[form]
    _check_md5(path, content, md5, layout)
    suffix = ".bin" if form == "binary" else ""
    parts = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for name, batch_md5, samples in layout.batches:
                member = archive.extractfile(f"{inner}/{name}{suffix}")
                if member is None:
                    raise ValueError(f"{path} has no file {inner}/{name}{suffix}")
                parts.append(
                    _parse(form, path / f"{name}{suffix}", member.read(), batch_md5, samples, layout)
                )
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return parts


def _check_md5(path: Path, content: bytes, md5: str, layout: Layout) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} is not {layout.name}'s file: its MD5 is {found}, expected {md5}")


def _parse(form: str, path: Path, content: bytes, md5: str, samples: int, layout: Layout) -> Part:
    if form == "python":
        _check_md5(path, content, md5, layout)
        return parse_python(content, path, samples, layout)
    return parse_binary(content, path, samples, layout)


def parse_binary(content: bytes, name: str | Path, samples: int, layout: Layout) -> Part:
    """Pixels and labels in the bytes of a binary batch: samples of their labels and 3072 pixels, a byte each.

    Raises ValueError for another length or a label that there is not; `name` is for messages.
    """
    size = layout.label_bytes + PIXELS
    expected = samples * size
    if len(content) != expected:
        raise ValueError(
            f"{name} is not a batch of {layout.name}: it has {len(content)} bytes, expected {expected}"
        )
    rows = np.frombuffer(content, dtype=np.uint8).reshape(samples, size)
    return _checked(rows[:, layout.label_bytes :], rows[:, layout.label_bytes - 1], name, layout)


def parse_python(content: bytes, name: str | Path, samples: int, layout: Layout) -> Part:
    """Pixels and labels in the bytes of a Python batch: a pickled dict with data and labels.

    Only arrays, and what Python itself is made of, are unpickled: nothing in the file is executed.

    Raises ValueError for anything else; `name` is for messages.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # of arbitrary bytes one can make anything
        raise ValueError(f"{name} is not a Python batch of {layout.name}: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(
            f"{name} is not a batch of {layout.name}: it holds {type(batch).__name__}, expected dict"
        )
    values = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    pixels = values.get("data")
    if not (
        isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (samples, PIXELS)
    ):
        got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{name}: data must be uint8 ({samples}, {PIXELS}), got {got}")
    labels = values.get(layout.labels)
    if not (isinstance(labels, list) and len(labels) == samples and all(type(y) is int for y in labels)):
        raise ValueError(f"{name}: {layout.labels} must be a list of {samples} integers")
    return _checked(pixels, np.array(labels), name, layout)


def _checked(pixels: np.ndarray, labels: np.ndarray, name: str | Path, layout: Layout) -> Part:
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise ValueError(
            f"{name}: labels must be from 0 to {layout.classes - 1}, got {labels.min()} to {labels.max()}"
        )
    return np.ascontiguousarray(pixels), labels.astype(np.int64)


class _Unpickler(pickle.Unpickler):
    """An array in a pickle is a call of one of these; every other call is refused."""

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # bytes, as Python 3 writes them for Python 2
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs")
        if module == "numpy.core.multiarray" and not hasattr(np, "core"):
            module = "numpy._core.multiarray"
        return super().find_class(module, name)

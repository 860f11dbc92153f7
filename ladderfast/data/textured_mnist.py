"""MNIST's digits as textures: one on another, or two on a third."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ladderfast.checks import check_whole

from .draws import HELD_OUT_SEED, TEXTURED_DIGITS, TEXTURED_MNIST, Draws
from .grouped import GroupedImages
from .mnist import MNIST
from .shuffle import check_seed
from .textures import TexturePatches, generate_textures, read_textures

SIDE = 28
PART = 4096  # images made at a time
FREQUENCIES = 20
PERIODS = (3.0, 9.0)  # pixels, shortest and longest


class TexturedMNIST(GroupedImages):
    """MNIST's digits, thickened and of one texture on a background of another, 28 x 28 pixels in 0..1, as x (N, 784).

    The two textures differ; each is turned by any angle and scaled so that a pixel is from 1.5 to 3 pixels of it, both
    at random when the image is made. A digit is where MNIST is above 1/2, or beside such a pixel. Owners are 1, the
    background, and 2, the digit. There are 60,000 training and 10,000 test images.

    Args:
        data_dir: folder of MNIST's four files, as for `MNIST`.
        textures: folder of at least two pictures; null for 20 generated textures.
        num_labels: labelled images, the same number of each digit; null for all, 0 for none.
        num_train: training images, the first so many; null for all.
        num_test: test images, the first so many; null for all.
        seed: draws the training images' textures, and labels; the test images are the same for every seed.
        download: fetch MNIST's files that are not there.

    Raises FileNotFoundError, ValueError and OSError as `MNIST` and `read_textures` do; before, TypeError or ValueError
    for numbers and a seed that are none.

    Source: Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, section 4.2 (with Brodatz textures).
    """

    def __init__(
        self,
        data_dir: str | None = None,
        textures: str | None = None,
        num_labels: int | None = None,
        num_train: int | None = None,
        num_test: int | None = None,
        *,
        seed: int = 1,
        download: bool = False,
    ) -> None:
        _check(seed, num_labels=num_labels, num_train=num_train, num_test=num_test)
        mnist = MNIST(data_dir, download=download)
        pictures = generate_textures() if textures is None else read_textures(textures)
        patches = TexturePatches(pictures, SIDE, (1.5, 3.0))
        parts = []
        for first, x, y, count, drawn_by in _parts(mnist, num_train, num_test, seed):
            digits = thickened(x[:count].numpy().reshape(-1, SIDE, SIDE) > 0.5).reshape(count, -1)
            images = torch.empty(count, SIDE * SIDE)
            for start in range(0, count, PART):
                part = slice(start, min(start + PART, count))
                columns = 2 + 2 * patches.draws
                draws = Draws(
                    part.stop - start, columns, seed=drawn_by, stream=TEXTURED_MNIST, first=first + start
                )
                reader = patches.read(draws.distinct(2, patches.count), draws)
                images[part] = torch.from_numpy(reader.pixels(digits[part].astype(np.int64)))
            parts.append((images, torch.from_numpy(digits.astype(np.uint8)) + 1, y[:count]))
        (x_train, _, y_train), (x_test, owner_test, y_test) = parts
        super().__init__(
            x_train,
            x_test,
            owner_test,
            y_train=y_train,
            y_test=y_test,
            image_shape=(SIDE, SIDE),
            num_labels=num_labels,
            seed=seed,
        )


class FrequencyMNIST(GroupedImages):
    """Two of MNIST's digits as waves of single frequencies on a third, 28 x 28 pixels in 0..1, as x (N, 784).

    After Freq20-2MNIST: there are 20 waves, each with a period and a direction of its own, and an image has three of
    them, at random phases: one is the background and two are digits. The digits, thickened, are moved by up to 4 pixels
    each way at random. Owners are 1, the background, 2 and 3, the digits; where these overlap one sees the second, and
    such pixels belong to none. Labels are zeros and ones (N, 10): an image has two classes, or one where both digits
    are alike. There are 60,000 training and 10,000 test images, made of MNIST's training and test digits.

    Args:
        data_dir: folder of MNIST's four files, as for `MNIST`.
        num_labels: labelled images, drawn at random; null for all, 0 for none.
        num_train: training images; null for 60,000.
        num_test: test images; null for 10,000.
        seed: draws training images and labels; the test images are the same for every seed.
        download: fetch MNIST's files that are not there.

    Raises FileNotFoundError, ValueError and OSError as `MNIST` does; before, TypeError or ValueError for numbers and a
    seed that are none.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        num_labels: int | None = None,
        num_train: int | None = None,
        num_test: int | None = None,
        *,
        seed: int = 1,
        download: bool = False,
    ) -> None:
        _check(seed, num_labels=num_labels, num_train=num_train, num_test=num_test)
        mnist = MNIST(data_dir, download=download)
        parts = []
        for first, x, y, count, drawn_by in _parts(mnist, num_train, num_test, seed):
            digits = thickened(x.numpy().reshape(-1, SIDE, SIDE) > 0.5)
            images, owners = (
                torch.empty(count, SIDE * SIDE),
                torch.empty(count, SIDE * SIDE, dtype=torch.uint8),
            )
            labels = torch.zeros(count, 10, dtype=torch.uint8)
            for start in range(0, count, PART):
                part = slice(start, min(start + PART, count))
                image, owner, chosen = two_digits(
                    digits, part.stop - start, seed=drawn_by, first=first + start
                )
                images[part], owners[part] = torch.from_numpy(image), torch.from_numpy(owner)
                labels[part] = labels[part].scatter(1, y[torch.from_numpy(chosen)], 1)
            parts.append((images, owners, labels))
        (x_train, _, y_train), (x_test, owner_test, y_test) = parts
        super().__init__(
            x_train,
            x_test,
            owner_test,
            y_train=y_train,
            y_test=y_test,
            image_shape=(SIDE, SIDE),
            num_labels=num_labels,
            seed=seed,
        )


def two_digits(
    digits: np.ndarray, count: int, *, seed: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of `FrequencyMNIST` number `first` to `first + count - 1`, of digits (M, 28, 28) of bools.

    Returns x (count, 784) float32, owners (count, 784) uint8, and which two digits they are (count, 2).
    """
    draws = Draws(count, 12, seed=seed, stream=TEXTURED_DIGITS, first=first)
    chosen = draws.integers(2, len(digits))
    row, column = draws.integers(2, 9), draws.integers(2, 9)
    wave = draws.distinct(3, FREQUENCIES)
    phase = draws.uniform(3, 0.0, 2 * math.pi)
    padded = np.pad(digits, ((0, 0), (4, 4), (4, 4)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
    masks = windows[chosen, row, column].reshape(count, 2, -1)
    shown = np.where(masks[:, 1], 2, masks[:, 0])
    owner = np.where(masks.all(1), 0, shown + 1).astype(np.uint8)
    # Periods and directions are spread evenly, and no two waves share either.
    periods = PERIODS[0] * (PERIODS[1] / PERIODS[0]) ** (np.arange(FREQUENCIES) / (FREQUENCIES - 1))
    angles = math.pi * (np.arange(FREQUENCIES) * 7 % FREQUENCIES) / FREQUENCIES
    down, right = np.divmod(np.arange(SIDE * SIDE), SIDE)
    turns = (np.sin(angles)[:, None] * down + np.cos(angles)[:, None] * right) / periods[:, None]
    angle = np.take_along_axis(phase, shown, 1)
    angle += 2 * math.pi * turns[np.take_along_axis(wave, shown, 1), np.arange(SIDE * SIDE)]
    return (0.5 + 0.5 * np.sin(angle)).astype(np.float32), owner, chosen


def thickened(digits: np.ndarray) -> np.ndarray:
    """Digits (N, H, W) of bools with every pixel beside one of theirs, also diagonally."""
    thick = digits.copy()
    thick[:, 1:] |= digits[:, :-1]
    thick[:, :-1] |= digits[:, 1:]
    wide = thick.copy()
    wide[:, :, 1:] |= thick[:, :, :-1]
    wide[:, :, :-1] |= thick[:, :, 1:]
    return wide


def _check(seed: int, **numbers: int | None) -> None:
    """Before any file is read."""
    check_seed(seed)
    for name, number in numbers.items():
        if number is not None:
            check_whole(name, number)


def _parts(
    mnist: MNIST, num_train: int | None, num_test: int | None, seed: int
) -> list[tuple[int, Tensor, Tensor, int, int]]:
    """Number of the first image, digits, their classes, number of images, their seed: of training and test images."""
    x, y = mnist.x_unlabelled, mnist.y_labelled
    parts = []
    for name, number, first, digits, labels, drawn_by in (
        ("num_train", num_train, 0, x, y, seed),
        ("num_test", num_test, len(x), mnist.x_test, mnist.y_test, HELD_OUT_SEED),
    ):
        if number is not None and not 1 <= number <= len(digits):
            raise ValueError(f"{name} must be from 1 to {len(digits)}, or null for all, got {number}")
        parts.append((first, digits, labels, len(digits) if number is None else number, drawn_by))
    return parts

"""Shapes: binary images of three hollow squares and triangles, drawn as they are asked for."""

from __future__ import annotations

import numpy as np
import torch

from .draws import HELD_OUT_SEED, SHAPES, Draws
from .grouped import GroupedImages, split_sizes
from .shuffle import check_seed

SIDE = 20
PER_IMAGE = 3


class Shapes(GroupedImages):
    """50,000 training, 10,000 validation and 10,000 test images of 20 x 20 pixels, zeros and ones, as x (N, 400).

    Three shapes an image, drawn with replacement from a hollow square of 7 x 7 and a hollow triangle of 12 x 7,
    upright or inverted, whose borders are 2 wide, at uniform positions. Pixels that two shapes cover belong to none,
    nor does the background. There are no labels.

    Args:
        num_train: training images.
        num_test: validation images, and as many test images.
        seed: draws the training images; the others are the same for every seed.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016; the images are our own.
    """

    def __init__(self, num_train: int = 50_000, num_test: int = 10_000, *, seed: int = 1) -> None:
        sizes = split_sizes(num_train, num_test)
        check_seed(seed)
        train, _ = make_shapes(sizes[0], seed=seed)
        held, owner = make_shapes(sum(sizes[1:]), seed=HELD_OUT_SEED, first=sizes[0])
        valid, test = torch.from_numpy(held).float().split(sizes[1:])
        owner_valid, owner_test = torch.from_numpy(owner).split(sizes[1:])
        super().__init__(
            torch.from_numpy(train).float(),
            test,
            owner_test,
            x_valid=valid,
            owner_valid=owner_valid,
            image_shape=(SIDE, SIDE),
            seed=seed,
        )


def shape_templates() -> list[np.ndarray]:
    """The three shapes, (height, width) each: square, triangle, triangle upside down."""
    square = np.ones((7, 7), dtype=bool)
    square[2:5, 2:5] = False
    triangle = np.zeros((7, 12), dtype=bool)
    for row, half in enumerate((1, 2, 3, 4, 5, 6, 6)):
        triangle[row, 6 - half : 6 + half] = True
    for row, half in enumerate((1, 2, 3), 2):
        triangle[row, 6 - half : 6 + half] = False
    return [square, triangle, triangle[::-1]]


def make_shapes(count: int, *, seed: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images number `first` to `first + count - 1` of a seed's endless row of them.

    Returns x (count, 400), uint8 zeros and ones, and the owner of each pixel (count, 400), uint8: 1, 2 or 3 for the
    image's first, second or third shape, 0 for none.
    """
    # Every place that every shape can have, as an image.
    places, starts = [], [0]
    for template in shape_templates():
        height, width = template.shape
        columns = SIDE - width + 1
        for place in range((SIDE - height + 1) * columns):
            row, column = divmod(place, columns)
            image = np.zeros((SIDE, SIDE), dtype=bool)
            image[row : row + height, column : column + width] = template
            places.append(image.reshape(-1))
        starts.append(len(places))
    table = np.stack(places)
    draws = Draws(count, 2 * PER_IMAGE, seed=seed, stream=SHAPES, first=first)
    kind = draws.integers(PER_IMAGE, len(starts) - 1)
    place = np.array(starts[:-1])[kind] + draws.integers(PER_IMAGE, np.diff(starts)[kind])
    covered = np.zeros((count, SIDE * SIDE), dtype=np.uint8)
    owner = np.zeros_like(covered)
    for index in range(PER_IMAGE):
        image = table[place[:, index]]
        covered += image
        owner += image * np.uint8(index + 1)
    owner[covered > 1] = 0
    return (covered > 0).astype(np.uint8), owner

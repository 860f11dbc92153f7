"""Shapes: binary images of three hollow squares and triangles, drawn as they are asked for."""

from __future__ import annotations

import numpy as np

SIDE = 20
KINDS = 3  # square, triangle, triangle upside down
PER_IMAGE = 3


def _square() -> np.ndarray:
    shape = np.ones((7, 7), dtype=bool)
    shape[2:5, 2:5] = False
    return shape


def _triangle() -> np.ndarray:
    """12 wide and 7 high, with a border of 2 as the square's."""
    shape = np.zeros((7, 12), dtype=bool)
    for row, half in enumerate((1, 2, 3, 4, 5, 6, 6)):
        shape[row, 6 - half : 6 + half] = True
    for row, half in enumerate((1, 2, 3), 2):
        shape[row, 6 - half : 6 + half] = False
    return shape


def shape_templates() -> list[np.ndarray]:
    """The three shapes, (height, width) each."""
    return [_square(), _triangle(), _triangle()[::-1]]


def make_shapes(count: int, *, seed: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images number `first` to `first + count - 1` of a seed's endless row of them.

    Returns x (count, 400), uint8 zeros and ones, and the owner of each pixel (count, 400), int8: 1, 2 or 3 for the
    image's first, second or third shape, 0 for none: the background, and what two shapes cover.
    """
    # Every place that every shape can have, as an image.
    places, starts = [], [0]
    for template in shape_templates():
        height, width = template.shape
        rows, columns = SIDE - height + 1, SIDE - width + 1
        for place in range(rows * columns):
            row, column = divmod(place, columns)
            image = np.zeros((SIDE, SIDE), dtype=bool)
            image[row : row + height, column : column + width] = template
            places.append(image.reshape(-1))
        starts.append(len(places))
    table = np.stack(places)
    # Eight raw integers an image, two counts of the generator: kind and place of the three shapes.
    philox = np.random.Philox(key=np.array([seed, STREAM], dtype=np.uint64), counter=[2 * first, 0, 0, 0])
    raw = philox.random_raw(8 * count).reshape(count, 8)[:, : 2 * PER_IMAGE] >> np.uint64(32)
    kind = (raw[:, :PER_IMAGE] * np.uint64(KINDS) >> np.uint64(32)).astype(np.int64)
    start, size = np.array(starts[:-1])[kind], np.diff(starts)[kind]
    place = start + (raw[:, PER_IMAGE:] * size.astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    covered = np.zeros((count, SIDE * SIDE), dtype=np.int8)
    owner = np.zeros_like(covered)
    for index in range(PER_IMAGE):
        image = table[place[:, index]]
        covered += image
        owner += image * np.int8(index + 1)
    owner[covered > 1] = 0
    return (covered > 0).astype(np.uint8), owner


STREAM = 1 << 32  # apart from the orders and draws of the same seed

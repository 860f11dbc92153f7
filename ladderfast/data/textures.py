"""Textures: pictures from a folder, or generated ones, and patches of them turned and scaled."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from .draws import TEXTURES, Draws

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
GENERATED = 20
SIDE = 640  # of a generated texture


def read_textures(folder: str | Path) -> np.ndarray:
    """The pictures in a folder in the order of their names, (textures, side, side) float32, flattened in brightness.

    Colours become grey, and a picture is cut to the square of the smallest one's shorter side. The pixels' values are
    replaced by their rank, from 0 to 1: a texture is then told by its pattern, not by its brightness, and the mean is
    1/2.

    Raises FileNotFoundError without the folder or two pictures in it, ValueError for a file that cannot be read, or a
    picture of one brightness all over.
    """
    from PIL import Image  # matplotlib's, of the extra `train`

    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"textures: there is no folder {folder}")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise FileNotFoundError(
            f"{folder} must hold at least two pictures ({', '.join(SUFFIXES)}), got {len(paths)}"
        )
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                # Of a grey picture more than 8 bits would be cut off; as only ranks count, they can stay.
                deep = image.mode.startswith("I") or image.mode == "F"
                pictures.append(np.asarray(image if deep else image.convert("L"), dtype=np.float64))
        except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: PIL's, of a broken PNG
            raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    side = min(min(picture.shape) for picture in pictures)
    cut = [picture[:side, :side] for picture in pictures]
    for path, picture in zip(paths, cut, strict=True):
        if picture.min() == picture.max():
            raise ValueError(f"{path} is of one brightness all over, and no texture")
    return np.stack([_ranked(picture) for picture in cut])


def generate_textures(count: int = GENERATED, *, seed: int = 1) -> np.ndarray:
    """Textures where there is no folder: noise in bands of frequency and direction, as `read_textures` returns."""
    textures = np.empty((count, SIDE, SIDE), dtype=np.float32)
    draws = Draws(count, 4, seed=seed, stream=TEXTURES)
    # Evenly over what there is, so that no two are much alike: period in pixels, direction, and the spread of both.
    place = (np.arange(count) + draws.uniform(1)[:, 0]) / count
    period = 6 * 6 ** ((place * 7) % 1)
    angle = math.pi * ((place * 3) % 1)
    spread = draws.uniform(1, 0.1, 0.4)[:, 0]
    width = draws.uniform(1, 0.1, 0.8)[:, 0]
    row, column = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
    radius = np.hypot(row, column)
    with np.errstate(divide="ignore"):
        octave = np.log2(radius)
    for index in range(count):
        turned = np.arctan2(row, column) - angle[index]
        away = np.abs((turned + math.pi / 2) % math.pi - math.pi / 2)
        gain = np.exp(
            -0.5 * ((octave + np.log2(period[index])) / spread[index]) ** 2 - 0.5 * (away / width[index]) ** 2
        )
        noise = Draws(SIDE, SIDE, seed=seed, stream=TEXTURES, first=(index + 1) * SIDE).uniform(SIDE, -1, 1)
        textures[index] = _ranked(np.fft.irfft2(np.fft.rfft2(noise) * gain, s=(SIDE, SIDE)))
    return textures


def _ranked(picture: np.ndarray) -> np.ndarray:
    """Each value's rank among all, from 0 to 1; equal values share theirs."""
    _, place, counts = np.unique(picture, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - counts / 2) / picture.size
    ranked: np.ndarray = rank[place].reshape(picture.shape).astype(np.float32)
    return ranked


class TexturePatches:
    """Square patches of textures, each turned by any angle and scaled, read where they are asked for.

    Args:
        textures: (textures, side, side) float32.
        size: pixels of a patch's side.
        scale: a patch's pixel is from the first to the second of these many pixels of the texture.

    Raises ValueError where textures are smaller than a patch may be.
    """

    draws = 4  # numbers a patch needs

    def __init__(self, textures: np.ndarray, size: int, scale: tuple[float, float]) -> None:
        self.size, self.scale = size, scale
        # Each value becomes the mean of the square of the smallest scale about it: patches need no finer detail.
        blur = max(1, round(scale[0]))
        padded = np.pad(
            textures, ((0, 0), (blur // 2, (blur - 1) // 2), (blur // 2, (blur - 1) // 2)), mode="reflect"
        )
        side = textures.shape[1]
        self._textures = sum(
            padded[:, i : i + side, j : j + side] for i in range(blur) for j in range(blur)
        ) / np.float32(blur * blur)
        self.count, self._side = len(textures), side
        reach = scale[1] * (size - 1) / math.sqrt(2)  # from its middle to the corner of the largest patch
        self._margin = reach + 1
        if 2 * self._margin >= side:
            raise ValueError(f"textures must have a side above {2 * self._margin:.0f} pixels, got {side}")

    def read(self, which: np.ndarray, draws: Draws) -> PatchReader:
        """Patches of the textures `which`, (count, patches), each placed by four numbers of its sample."""
        patches = which.shape[1]
        angle = draws.uniform(patches, 0.0, 2 * math.pi)
        scale = self.scale[0] * (self.scale[1] / self.scale[0]) ** draws.uniform(patches)
        middle = [draws.uniform(patches, self._margin, self._side - self._margin) for _ in range(2)]
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        return PatchReader(self._textures, self.size, which, cos, sin, *middle)


class PatchReader:
    """Patches that have their place: `pixels(owner)` reads each pixel from the patch that owns it."""

    def __init__(self, textures: np.ndarray, size: int, *place: np.ndarray) -> None:
        self._flat, self._side = textures.reshape(-1), textures.shape[1]
        self._size = size
        self._place = [place[0].astype(np.int32), *(t.astype(np.float32) for t in place[1:])]

    def pixels(self, owner: np.ndarray) -> np.ndarray:
        """Values (count, size * size) float32; owner: (count, size * size), the number of the patch, from 0 on."""
        which, cos, sin, row, column = (np.take_along_axis(t, owner, 1) for t in self._place)
        at = np.arange(self._size, dtype=np.float32) - np.float32((self._size - 1) / 2)
        down, right = np.repeat(at, self._size), np.tile(at, self._size)
        row += cos * down - sin * right
        column += sin * down + cos * right
        flat = which * (self._side * self._side)
        flat += row.astype(np.int32) * self._side
        flat += column.astype(np.int32)
        values: np.ndarray = self._flat[flat]
        return values

"""The notation of Zhao et al. 2015 for networks: (64)5c-2p-(64)3c-2p-10fc."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

MAX_POOL = 16  # the largest window of the pooling ops
_NUMBER = re.compile(r"\d+")
_SPACE = re.compile(r"\s*")


class Stage(NamedTuple):
    """One layer: its kind, what comes out of a sample, (C, H, W) or (D,), and the kernel or window."""

    kind: str  # conv, pool, dense
    shape: tuple[int, ...]
    size: int = 1


def parse_architecture(text: str, image_shape: Sequence[int]) -> tuple[Stage, ...]:
    """The layers of "(64)5c-2p-(64)3c-2p-10fc" on images of image_shape, (H, W) or (C, H, W).

    (n)kc is a convolution to n maps with a k x k kernel that keeps the size, kp pooling by k x k windows, nfc a dense
    layer of n units; "x m" behind a convolution repeats it m times; layers are joined by hyphens, and spaces are free.
    Rows and columns that fill no window are left out by pooling.

    Raises ValueError with the position of what is wrong, counted from 1, and what was expected there; TypeError for
    anything but text.
    """
    if not isinstance(text, str):
        raise TypeError(f"architecture must be text such as (64)5c-2p-10fc, got {text!r}")
    return _Parser(text, check_image_shape(image_shape)).layers()


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of images of that shape or of (H, W); TypeError or ValueError for anything else."""
    if not isinstance(image_shape, Sequence):
        raise TypeError(f"image_shape must be (H, W) or (C, H, W), got {image_shape!r}")
    sizes = tuple(image_shape)
    if len(sizes) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"image_shape must be (H, W) or (C, H, W), each at least 1, got {sizes}")
    channels, height, width = (1, *sizes) if len(sizes) == 2 else sizes
    return channels, height, width


class _Parser:
    def __init__(self, text: str, shape: tuple[int, ...]) -> None:
        self.text, self.at, self.shape = text, 0, shape

    def layers(self) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        while True:
            self._skip()
            start = self.at
            if self._take("("):
                stages += self._convolution(start)
            else:
                stages.append(self._pool_or_dense(start))
            self.shape = stages[-1].shape
            self._skip()
            if self.at == len(self.text):
                break
            if not self._take("-"):
                self._fail("a hyphen before the next layer, or the end")
        if stages[0].kind == "dense":
            self.at = 0
            self._fail("a convolution or pooling as the first layer")
        return tuple(stages)

    def _convolution(self, start: int) -> list[Stage]:
        maps = self._number("the number of feature maps")
        self._expect(")", "a closing parenthesis, as in (64)3c")
        kernel = self._number("the kernel's size, as in (64)3c")
        self._expect("c", "the letter c, as in (64)3c")
        self._need_maps(start, "a convolution")
        times = 1
        self._skip()
        if self._take("x") or self._take("×"):
            times = self._number("how many times the convolution is repeated")
        return [Stage("conv", (maps, *self.shape[1:]), kernel)] * times

    def _pool_or_dense(self, start: int) -> Stage:
        if _NUMBER.match(self.text, self.at) is None:
            self._fail("a layer: (64)3c, 2p or 10fc")
        number = self._number("a number")
        self._skip()
        if self._take("fc"):
            return Stage("dense", (number,))
        if not self._take("p"):
            self._fail(
                "p for pooling or fc for a dense layer behind the number, or the number in parentheses"
            )
        self._need_maps(start, "pooling")
        channels, height, width = self.shape
        if number > min(MAX_POOL, height, width):
            self.at = start
            self._fail(f"a window of at most {MAX_POOL} that fits into maps of {height} x {width}")
        return Stage("pool", (channels, height // number, width // number), number)

    def _need_maps(self, start: int, what: str) -> None:
        if len(self.shape) != 3:
            self.at = start
            self._fail(f"no {what.removeprefix('a ')} above a dense layer")

    def _number(self, what: str) -> int:
        self._skip()
        match = _NUMBER.match(self.text, self.at)
        if match is None or int(match[0]) < 1:
            self._fail(f"{what}, at least 1")
        self.at = match.end()
        return int(match[0])

    def _skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def _take(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def _expect(self, token: str, what: str) -> None:
        self._skip()
        if not self._take(token):
            self._fail(what)

    def _fail(self, expected: str) -> NoReturn:
        rest = self.text[self.at :]
        got = repr(rest) if rest else "the end"
        behind = f" behind {self.text[: self.at]!r}" if self.at else ""
        raise ValueError(f"architecture, position {self.at + 1}: expected {expected}, got {got}{behind}")

"""The notation of a Ladder's layers, and the maps between them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ladderfast.ops.linear import linear

NOTATION = (
    'an integer (a dense layer\'s width), "conv CHANNELS HEIGHTxWIDTH [valid|full|same]", "maxpool HEIGHTxWIDTH" or '
    '"meanpool"'
)
MIRRORED = {"valid": "full", "full": "valid", "same": "same"}


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, the shape (C,) or (C, H, W) of a sample, and the window of a convolution or pooling."""

    kind: str  # input, dense, conv, maxpool, meanpool
    shape: tuple[int, ...]
    window: tuple[int, int] = (1, 1)
    border: str = "valid"

    @property
    def num_features(self) -> int:
        return self.shape[0]

    @property
    def pooling(self) -> bool:
        return self.kind in ("maxpool", "meanpool")


def parse_layers(layers: Sequence[int | str]) -> tuple[Layer, ...]:
    """The layers 0..L, with their shapes.

    Raises TypeError or ValueError that names the entry.
    """
    numbers_and_texts = (
        isinstance(layers, Sequence)
        and not isinstance(layers, str)
        and all(isinstance(entry, (int, str)) and not isinstance(entry, bool) for entry in layers)
    )
    if not numbers_and_texts:
        raise TypeError(
            f"layers must be a sequence of integers (dense layers) and texts (others), got {layers!r}"
        )
    if len(layers) < 2 or any(isinstance(entry, int) and entry < 1 for entry in layers):
        raise ValueError(f"layers must have at least two widths, each at least 1, got {list(layers)}")
    parsed = [_parse_input(layers[0])]
    for index, entry in enumerate(layers[1:], 1):
        try:
            parsed.append(_parse(entry, parsed[-1]))
        except ValueError as error:
            raise ValueError(f"layers[{index}]: {error}") from None
    if len(parsed[-1].shape) != 1:
        raise ValueError(
            f"layers[{len(layers) - 1}]: the last layer must be dense or meanpool, which put out classes, "
            f"got {layers[-1]!r}"
        )
    return tuple(parsed)


def _parse_input(entry: int | str) -> Layer:
    if isinstance(entry, int):
        return Layer("input", (entry,))
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", entry.strip())
    if match is None:
        raise ValueError(f'layers[0]: the input must be an integer or "CHANNELSxHEIGHTxWIDTH", got {entry!r}')
    return Layer("input", (int(match[1]), int(match[2]), int(match[3])))


def _parse(entry: int | str, below: Layer) -> Layer:
    if isinstance(entry, int):
        return Layer("dense", (entry,))
    words = entry.split()
    kind = words[0] if words else ""
    number, size = r"[1-9]\d*", r"[1-9]\d*x[1-9]\d*"
    patterns = {
        "conv": f"conv {number} {size}( valid| full| same)?",
        "maxpool": f"maxpool {size}",
        "meanpool": "meanpool",
    }
    if kind not in patterns or not re.fullmatch(patterns[kind], " ".join(words)):
        raise ValueError(f"a layer must be {NOTATION}, got {entry!r}")
    if len(below.shape) != 3:
        raise ValueError(f"{entry!r} needs a map (channels, height, width) below it, got {below.shape}")
    channels, height, width = below.shape
    if kind == "meanpool":
        return Layer(kind, (channels,), (height, width))
    h, w = map(int, words[-1 if kind == "maxpool" else 2].split("x"))
    if kind == "maxpool":
        return Layer(kind, (channels, -(-height // h), -(-width // w)), (h, w))
    border = words[3] if len(words) == 4 else "valid"
    grows = {"valid": -1, "full": 1, "same": 0}[border]
    out = int(words[1]), height + grows * (h - 1), width + grows * (w - 1)
    if min(out) < 1:
        raise ValueError(f"{entry!r} does not fit into a map of {height} x {width}")
    return Layer(kind, out, (h, w), border)


def upward(below: Layer, layer: Layer, **kwargs: Any) -> nn.Module:
    """The encoder's map from samples of `below` to those of `layer`; kwargs: device, dtype."""
    if layer.kind == "dense":
        return Dense(below.shape, layer.shape, **kwargs)
    if layer.kind == "conv":
        return _convolution(below, layer, layer.window, layer.border, **kwargs)
    if layer.kind == "maxpool":
        # A window that reaches over the edge has the maximum of what it covers: no position is left out.
        return nn.MaxPool2d(layer.window, ceil_mode=True)
    return MeanPool()


def downward(layer: Layer, below: Layer, **kwargs: Any) -> nn.Module:
    """The decoder's map, which mirrors `upward(below, layer)`; kwargs: device, dtype."""
    if layer.kind == "dense":
        return Dense(layer.shape, below.shape, **kwargs)
    if layer.kind == "conv":
        return _convolution(layer, below, layer.window, MIRRORED[layer.border], **kwargs)
    return Spread(layer.window, below.shape)


class Dense(nn.Linear):
    """A matrix product without bias between samples of any shapes, which it flattens."""

    def __init__(self, below: tuple[int, ...], above: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(math.prod(below), math.prod(above), bias=False, **kwargs)
        self.shape = above

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x.flatten(1), self.weight)
        return y if len(self.shape) == 1 else y.unflatten(1, self.shape)

    def reset_parameters(self) -> None:
        """Normal, of variance 1 / fan_in."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class Convolution(nn.Conv2d):
    """A convolution without bias, with its published start values."""

    def reset_parameters(self) -> None:
        """Uniform in +-sqrt(3 / fan_in): of variance 1 / fan_in."""
        bound = math.sqrt(3 / self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)


def _convolution(
    source: Layer, target: Layer, window: tuple[int, int], border: str, **kwargs: Any
) -> Convolution:
    padding: Any = {"valid": 0, "full": (window[0] - 1, window[1] - 1), "same": "same"}[border]
    return Convolution(
        source.num_features, target.num_features, window, padding=padding, bias=False, **kwargs
    )


class MeanPool(nn.Module):
    """(N, C, H, W) -> (N, C): the mean of each map times W sqrt(3), as in the original."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (x.shape[3] * math.sqrt(3))


class Spread(nn.Module):
    """A pooling undone: each value copied to every position of its window, (N, C, *) -> (N, *shape).

    Windows that reach over the edge are cut off there.
    """

    def __init__(self, window: tuple[int, int], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.window, self.shape = window, shape

    def forward(self, x: Tensor) -> Tensor:
        _, height, width = self.shape
        x = x[..., None, None] if x.dim() == 2 else x
        n, c, rows, columns = x.shape
        h, w = self.window
        spread = x[:, :, :, None, :, None].expand(n, c, rows, h, columns, w)
        return spread.reshape(n, c, rows * h, columns * w)[:, :, :height, :width]

    def extra_repr(self) -> str:
        return f"{self.window}, {self.shape}"

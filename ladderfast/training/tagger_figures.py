"""Pictures of what a Tagger's groups take an image apart into, iteration by iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from .figures import INK, PALETTE, WIDTH, _figure, _plain

IMAGES = 6
GROUND = 0.12  # grey of a pixel that no group claims, or none owns


def group_grid(
    x: Tensor,
    corrupted: Tensor,
    owner: Tensor,
    z: Sequence[Tensor],
    m: Sequence[Tensor],
    shape: Sequence[int],
) -> Figure:
    """One column a sample: input, corrupted input, owners, and of each iteration the masks and the reconstructions.

    Args:
        x, corrupted: (n, D), the first six are shown.
        owner: (n, D) integers, 0 for none.
        z, m: (n, K, D) of every iteration.
        shape: (height, width).
    """
    count = min(len(x), IMAGES)
    low, high = _range(x[:count])
    rows = {
        "input": _grey(x[:count], low, high),
        "corrupted": _grey(corrupted[:count], low, high),
        "owners": _owners(owner[:count]),
    }
    for t, (z_t, m_t) in enumerate(zip(z, m, strict=True), 1):
        rows[f"masks {t}"] = _coloured(m_t[:count])
        rows[f"groups {t}"] = _coloured(m_t[:count] * _scaled(z_t[:count], low, high))
    figure = _mosaic(rows, shape)
    plural = "s"[: count > 1]
    figure.set_label(
        f"{count} test image{plural}, one a column: the input, what the network sees of it, and the objects that its "
        "pixels belong to. Then of each iteration the masks, and below them the groups' reconstructions where their "
        "masks are, a colour a group. Owners' colours are not the groups'."
    )
    return figure


def sequence_grid(
    x: Tensor,
    corrupted: Tensor,
    owner: Tensor,
    z: Sequence[Tensor],
    m: Sequence[Tensor],
    shape: Sequence[int],
) -> Figure:
    """One column a step, six spread evenly: what is seen, what is to be predicted, its owners, masks and groups.

    Args:
        x, corrupted, owner: (T + 1, D) frames of a sequence.
        z, m: (K, D) of each of the T steps, of the frame after it.
        shape: (height, width).
    """
    steps = sorted({round(t) for t in np.linspace(0, len(z) - 1, min(len(z), IMAGES))})
    after = [t + 1 for t in steps]
    low, high = _range(x)
    masks, groups = (torch.stack([ts[t] for t in steps]) for ts in (m, z))
    figure = _mosaic(
        {
            "seen": _grey(corrupted[steps], low, high),
            "next": _grey(x[after], low, high),
            "owners": _owners(owner[after]),
            "masks": _coloured(masks),
            "groups": _coloured(masks * _scaled(groups, low, high)),
        },
        shape,
    )
    figure.set_label(
        f"Steps {', '.join(str(t) for t in after)} of a test sequence: the frame that the network sees, the next one, "
        "which it is to predict, and the digits that its pixels belong to. Then the masks, and the groups' predictions "
        "where their masks are, a colour a group. Owners' colours are not the groups'."
    )
    return figure


def group_panels(x: Tensor, z: Sequence[Tensor], m: Sequence[Tensor], shape: Sequence[int]) -> Figure:
    """One row a group, two columns an iteration: mask and reconstruction of one sample.

    Args:
        x: (D,) the input, whose range of values the reconstructions are shown in.
        z, m: (K, D) of every iteration.
        shape: (height, width).
    """
    low, high = _range(x)
    rows: dict[str, np.ndarray] = {}
    groups = len(z[0])
    colours = _colours(groups)
    for k in range(groups):
        cells = []
        for z_t, m_t in zip(z, m, strict=True):
            cells.append(m_t[k].double().numpy()[:, None] * colours[k])
            cells.append(_scaled(z_t[k], low, high).double().numpy()[:, None].repeat(3, 1))
        rows[f"group {k + 1}"] = np.stack(cells)
    figure = _mosaic(rows, shape)
    figure.set_label(
        f"The first of these images: of each of {len(z)} iterations, from left to right, the mask in colour and the "
        "reconstruction in grey."
    )
    return figure


def iteration_curves(curves: Mapping[str, Sequence[float]], images: int, normaliser: str) -> Figure:
    """A panel a figure, over the iterations 1 .. T.

    Args:
        curves: values of every iteration, by the name of the figure.
        images: how many were measured.
        normaliser: of the AMI.
    """
    figure = _figure(0.5 + 1.5 * len(curves))
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for colour, axis, (name, values) in zip(PALETTE, axes, curves.items(), strict=False):
        _plain(axis)
        steps = range(1, len(values) + 1)
        axis.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=4)
        axis.set_ylabel(name)
        axis.set_xticks(steps)
    axes[-1].set_xlabel("iteration")
    figure.set_label(
        f"Of {images} test images after each iteration: {'; '.join(curves)}. The AMI is normalised by the "
        f"{'larger' if normaliser == 'max' else 'mean'} entropy."
    )
    return figure


def _range(x: Tensor) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    return low, high if high > low else low + 1


def _scaled(x: Tensor, low: float, high: float) -> Tensor:
    return ((x - low) / (high - low)).clamp(0, 1)


def _grey(x: Tensor, low: float, high: float) -> np.ndarray:
    return _scaled(x, low, high).double().numpy()[..., None].repeat(3, -1)


def _colours(groups: int) -> np.ndarray:
    return np.array([to_rgb(PALETTE[k % len(PALETTE)]) for k in range(groups)])


def _coloured(weights: Tensor) -> np.ndarray:
    """(n, D, 3) out of (n, K, D): the groups' colours, weighted."""
    colours = torch.from_numpy(_colours(weights.shape[1]))
    return torch.einsum("nkd,kc->ndc", weights.double(), colours).clamp(0, 1).numpy()


def _owners(owner: Tensor) -> np.ndarray:
    colours = np.concatenate([np.full((1, 3), GROUND), _colours(max(1, int(owner.max())))])
    picture: np.ndarray = colours[owner.numpy()]
    return picture


def _mosaic(rows: Mapping[str, np.ndarray], shape: Sequence[int]) -> Figure:
    """Rows of pictures (columns, D, 3), named at their left; nothing between them, not even white."""
    height, width = shape
    columns = len(next(iter(rows.values())))
    gap = max(1, round(0.08 * width))
    mosaic = np.zeros((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 4))
    for i, row in enumerate(rows.values()):
        for j, picture in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            place = mosaic[top : top + height, left : left + width]
            place[..., :3] = picture.reshape(height, width, 3)
            place[..., 3] = 1
    beside, margin = 0.9, 0.05
    across = WIDTH - beside - margin
    tall = across * mosaic.shape[0] / mosaic.shape[1]
    figure = Figure(figsize=(WIDTH, tall + 2 * margin), facecolor="none")
    axis = figure.add_axes(
        (beside / WIDTH, margin / (tall + 2 * margin), across / WIDTH, tall / (tall + 2 * margin))
    )
    axis.imshow(mosaic, interpolation="none", aspect="auto")
    axis.set_frame_on(False)
    axis.set_xticks([])
    axis.set_yticks([i * (height + gap) + height / 2 - 0.5 for i in range(len(rows))], list(rows))
    axis.tick_params(length=0, labelcolor=INK, labelsize=9)
    return figure

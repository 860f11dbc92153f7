"""The pictures of Zhao et al. 2015: with and without where, and what and where under translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from .figures import _LEGEND, INK, PALETTE, WIDTH, _figure, _plain, picture_rows

MARKERS = {1: "o", -1: "^"}  # the paper's: circles for +, triangles for -


def necessity_of_where(
    inputs: Tensor, pictures: Mapping[int, tuple[Tensor, Tensor]], shape: Sequence[int]
) -> Figure:
    """Figure 2: reconstructions without (left) and with (right) the where, one row a window.

    Args:
        inputs: (n, pixels), at most five samples.
        pictures: by window, the reconstructions (n, pixels) by copying and by the where.
        shape: (height, width), or (channels, height, width) with one or three channels.
    """
    rows = {"input": torch.cat([inputs, inputs])}
    rows.update({f"{n} × {n}": torch.cat([copied, placed]) for n, (copied, placed) in pictures.items()})
    figure = picture_rows(rows, shape)
    (axis,) = figure.axes
    left, right = axis.get_xlim()
    axis.axvline((left + right) / 2, color=INK, linewidth=1.2)
    figure.set_size_inches(WIDTH, figure.get_figheight() + 0.25)
    box = axis.get_position()
    axis.set_position((box.x0, box.y0, box.width, 1 - 0.28 / figure.get_figheight() - box.y0))
    for i, title in enumerate(("upsampling", "unpooling by where")):
        at = left + (right - left) * (0.25 + 0.5 * i)
        axis.annotate(
            title, (at, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
            color=INK, fontsize=9,
        )  # fmt: skip
    figure.set_label(
        f"The same {len(inputs)} test images on both sides, the top row as they are. Below, their reconstructions from "
        "maxima of ever larger windows: left with the maximum copied to its whole window, right with it at its place."
    )
    return figure


def responses_to_translation(
    still: tuple[Tensor, Tensor],
    moved: Mapping[tuple[int, int], tuple[Tensor, Tensor]],
    shift: int,
    expected: tuple[float, float],
    plane: int,
) -> Figure:
    """Figure 3: what and where of one feature plane for translated images over those for the images as they are.

    Args:
        still: what (n,) and where (n, 2), x and y, of the images as they are.
        moved: the same of images moved along axis 0 (horizontally) or 1, by sign, under (axis, sign).
        shift: by how many pixels.
        expected: how far where's x and y go when they go with the image.
        plane: the feature plane's number.
    """
    figure = _figure(5.0)
    axes = figure.subplots(2, 2, squeeze=False)
    still_what, still_where = (t.double().cpu().numpy() for t in still)
    for axis in (0, 1):
        direction = ("horizontally", "vertically")[axis]
        what_axis, where_axis = axes[axis]
        for panel, title in ((what_axis, "what"), (where_axis, "where")):
            _plain(panel)
            panel.set_title(f"{title}, moved {direction}", fontsize=9, color=INK, loc="left")
            panel.set_xlabel(f"{title}, image as it is")
            panel.set_ylabel(f"{title}, image moved")
        top = float(max(still_what.max(), *(what.max() for (a, _), (what, _) in moved.items() if a == axis)))
        what_axis.plot((0, top), (0, top), color=INK, linewidth=0.8, alpha=0.6)
        low = min(still_where.min(), *(float(w.min()) for (a, _), (_, w) in moved.items() if a == axis))
        high = max(still_where.max(), *(float(w.max()) for (a, _), (_, w) in moved.items() if a == axis))
        for offset in (0, expected[axis], -expected[axis]):
            ends = (low, high)
            where_axis.plot(
                ends, [end + offset for end in ends], color=INK, linewidth=0.8, alpha=0.6,
                linestyle=":" if offset else "-",
            )  # fmt: skip
        for sign, marker in MARKERS.items():
            what, where = (t.double().cpu().numpy() for t in moved[axis, sign])
            style = {"marker": marker, "s": 9, "linewidths": 0.6, "alpha": 0.7, "facecolors": "none"}
            what_axis.scatter(still_what, what, edgecolors=PALETTE[sign < 0], **style)
            for coordinate in (0, 1):
                where_axis.scatter(
                    still_where[:, coordinate],
                    where[:, coordinate],
                    edgecolors=PALETTE[2 * coordinate + (sign < 0)],
                    **style,
                )
        where_axis.set_xlim(low, high)
    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[sign], markerfacecolor="none", markersize=4,
               color=PALETTE[2 * coordinate + (sign < 0)], label=label)
        for coordinate, sign, label in (
            (0, 1, f"what, or where x; +{shift} px"),
            (0, -1, f"what, or where x; −{shift} px"),
            (1, 1, f"where y; +{shift} px"),
            (1, -1, f"where y; −{shift} px"),
        )
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2, **_LEGEND)
    figure.set_label(
        f"Feature plane {plane}, whose what differs most between images; a point is one test image, moved to "
        "the right and down (+) or to the left and up (−). On the line the plane does not notice; on the dotted ones "
        "its where moves with the image."
    )
    return figure

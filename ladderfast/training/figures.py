"""The pictures of a report, drawn without pyplot's global state.

Each is a `matplotlib.figure.Figure` whose label (`figure.get_label()`) says what one sees; the report takes it
for the caption. The ground is transparent and text and axes are in `INK`, for which the report puts the
colour of its own text, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ladderfast.nn import GaussianCombinator
from ladderfast.ops import gaussian_combinator

from .metric import Metric

INK = "#21262c"
# Okabe and Ito's palette, told apart with any colour vision, less its yellow and black, which need a ground.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)))
WIDTH = 4.8  # inches: on a telephone the text is still of a size to read

NOT_COSTS = ("epoch", "stage", "step", "learning_rate", "steps_per_second")
MAX_COLUMNS = 10
U_RANGE = 3.0  # u is normalised, so this is three of its standard deviations
Z_SHOWN = (-2.0, 0.0, 2.0)


def curves(history: Sequence[Mapping[str, Any]], metric: Metric = Metric()) -> Figure:  # noqa: B008  (frozen)
    """Every cost term, every error and the learning rate over the epochs.

    Args:
        history: one mapping an epoch. "epoch" is the abscissa; keys that end in "_error" are errors in
            percent; all others but the metric and those of `NOT_COSTS` are costs in nats. None and NaN are left out.
        metric: what the run is judged by; names that end in its, or are its of validation, are drawn together.

    Raises:
        ValueError: a history without a number to draw.
    """
    keys = [key for key in dict.fromkeys(key for row in history for key in row) if _points(history, key)]
    errors = [key for key in keys if key.endswith("_error")]
    judged = [key for key in keys if key.endswith((metric.name, metric.validation)) and key not in errors]
    panels = [
        ([key for key in keys if key not in (*errors, *judged, *NOT_COSTS)], "cost, nats", 3.0),
        (errors, "error, %", 2.2),
        (judged, f"{metric.words}, {metric.unit}" if metric.unit else metric.words, 2.2),
        ([key for key in keys if key == "learning_rate"], "learning\nrate", 1.0),
    ]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        raise ValueError(
            f"history must hold costs or errors of at least one epoch, got {len(history)} rows without"
        )
    heights = [height for _, _, height in panels]
    figure = _figure(0.5 + sum(heights))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (names, label, _) in zip(axes, panels, strict=True):
        _plain(axis)
        lines = [_points(history, name) for name in names]
        for index, (name, points) in enumerate(zip(names, lines, strict=True)):
            _line(axis, points, name, index)
        axis.set_ylabel(label)
        values = [value for points in lines for _, value in points]
        if names == ["learning_rate"]:
            axis.set_ylim(bottom=0)
            continue
        _legend(axis)
        # Costs and errors start far above where they end, and the end is what one wants to see.
        if min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(_number)
            if max(values) < 100 * min(values):  # hardly a power of ten in sight
                axis.yaxis.set_minor_formatter(_number)
    again = [row["epoch"] for row in history if row.get("stage") == 2]
    if again:
        for axis in axes:
            axis.axvline(again[0] - 0.5, color=INK, linewidth=0.8, linestyle=DASHES[2])
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = {
        "cost, nats": "the weighted cost terms in nats",
        "error, %": "the error in percent",
        "learning\nrate": "the learning rate",
    }
    seen = ", ".join(drawn.get(label, f"the {metric.words}") for _, label, _ in panels)
    anew = " Right of the dotted line, trained anew on training and validation samples." if again else ""
    figure.set_label(f"Over {len(history)} epoch{'s'[: len(history) > 1]}, from top to bottom: {seen}.{anew}")
    return figure


def reconstruction_grid(
    inputs: Tensor, corrupted: Tensor, reconstructions: Tensor, shape: Sequence[int]
) -> Figure:
    """Three rows of pictures, one column a sample: input, corrupted input, reconstruction.

    Args:
        inputs, corrupted, reconstructions: (n, pixels), the first ten are shown.
        shape: (height, width), or (channels, height, width) with one or three channels.

    Raises:
        ValueError: shapes that do not agree, or no sample.
    """
    channels, height, width = (1, *shape) if len(shape) == 2 else tuple(shape)
    if channels not in (1, 3):
        raise ValueError(f"shape must have one or three channels, got {tuple(shape)}")
    rows = {"input": inputs, "corrupted": corrupted, "reconstruction": reconstructions}
    for name, row in zip(("inputs", "corrupted", "reconstructions"), rows.values(), strict=True):
        if row.dim() != 2 or row.shape != inputs.shape or row.shape[1] != channels * height * width:
            expected = (len(inputs), channels * height * width)
            raise ValueError(f"{name} must have shape {expected}, got {tuple(row.shape)}")
    figure = picture_rows(rows, shape)
    columns = min(len(inputs), MAX_COLUMNS)
    figure.set_label(
        f"{columns} sample{'s'[: columns > 1]}, one a column. Top row: the input; middle: the input with noise, all "
        "that the network sees; bottom: its reconstruction."
    )
    return figure


def picture_rows(rows: Mapping[str, Tensor], shape: Sequence[int]) -> Figure:
    """Rows of pictures with their names beside them, one column a sample.

    Args:
        rows: (n, pixels) by name, the first ten samples are shown. Black and white are the least and the greatest value
            of the first row.
        shape: (height, width), or (channels, height, width) with one or three channels.

    Raises:
        ValueError: shapes that do not agree, or no sample.
    """
    channels, height, width = (1, *shape) if len(shape) == 2 else tuple(shape)
    first = next(iter(rows.values()))
    for name, row in rows.items():
        if row.shape != first.shape or row.dim() != 2 or row.shape[1] != channels * height * width:
            expected = (len(first), channels * height * width)
            raise ValueError(f"{name} must have shape {expected}, got {tuple(row.shape)}")
    columns = min(len(first), MAX_COLUMNS)
    if not columns:
        raise ValueError("inputs must hold at least one sample, got none")

    low, high = float(first[:columns].min()), float(first[:columns].max())
    gap = max(1, round(0.08 * width))
    # Between the pictures nothing, not even white.
    mosaic = np.zeros((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 4))
    for i, row in enumerate(rows.values()):
        pictures = row[:columns].detach().cpu().double().numpy().reshape(columns, channels, height, width)
        pictures = ((pictures - low) / ((high - low) or 1)).clip(0, 1)
        for j, picture in enumerate(pictures):
            top, left = i * (height + gap), j * (width + gap)
            place = mosaic[top : top + height, left : left + width]
            place[..., :3] = picture.transpose(1, 2, 0)
            place[..., 3] = 1

    beside, margin = 1.05, 0.05
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


@torch.no_grad()
def combinator_shapes(combinator: nn.Module, num_units: int) -> Figure:
    """What a layer's combinator g(z, u) has become, for some of its units.

    The units shown are spread evenly over the layer's from that whose output depends most on u to that
    where it does so least. A `GaussianCombinator` has panels of mu(u) and v(u); every combinator of z_hat over
    u for a few z.

    Args:
        combinator: g of one layer: (N, num_units) twice -> (N, num_units).
        num_units: units or channels of the layer.
    """
    parameter = next(combinator.parameters())
    u = torch.linspace(-U_RANGE, U_RANGE, 61, device=parameter.device, dtype=parameter.dtype)
    grid = u.unsqueeze(1).expand(-1, num_units)
    z_hat = [combinator(torch.full_like(grid, z), grid) for z in Z_SHOWN]
    middle = z_hat[len(Z_SHOWN) // 2]
    order = (middle.amax(0) - middle.amin(0)).argsort(descending=True, stable=True)
    count = min(num_units, len(PALETTE))
    units = order[torch.linspace(0, num_units - 1, count).round().long().to(order.device)].tolist()
    x = u.double().cpu().numpy()

    gaussian = isinstance(combinator, GaussianCombinator)
    figure = _figure(4.4 if gaussian else 2.5)
    heights = [1, 1] if gaussian else [1]
    grid_spec = figure.add_gridspec(len(heights), 6, height_ratios=heights)
    if isinstance(combinator, GaussianCombinator):
        mu, v = _mean_and_slope(combinator, grid)
        left, right = (figure.add_subplot(grid_spec[0, 3 * i : 3 * i + 3]) for i in range(2))
        for axis, curve, title in (
            (left, mu, "μ(u), the prior's mean"),
            (right, v, "v(u), the weight of z̃ − μ"),
        ):
            _plain(axis)
            for colour, unit in zip(PALETTE, units, strict=False):
                axis.plot(
                    x,
                    curve[:, unit].double().cpu().numpy(),
                    color=colour,
                    linewidth=1.6,
                    label=f"unit {unit}",
                )
            axis.set_title(title, fontsize=9, color=INK, loc="left")
            axis.set_xticks((-2, 0, 2))

    shown = sorted({0, count // 2, count - 1})
    first: Axes | None = None
    for i, place in enumerate(shown):
        axis = figure.add_subplot(grid_spec[-1, 2 * i : 2 * i + 2], sharey=first)
        first = first or axis
        _plain(axis)
        for curve, dash in zip(z_hat, (DASHES[1], DASHES[0], DASHES[2]), strict=True):
            values = curve[:, units[place]].double().cpu().numpy()
            axis.plot(x, values, color=PALETTE[place], linestyle=dash, linewidth=1.6)
        axis.set_title(f"ẑ, unit {units[place]}", fontsize=9, color=INK, loc="left")
        axis.set_xlabel("u")
        axis.set_xticks((-2, 0, 2))
        axis.tick_params(labelleft=i == 0)
    handles = [
        Line2D([], [], color=INK, linestyle=dash, linewidth=1.6, label=f"z̃ = {_number(z)}")
        for z, dash in zip(Z_SHOWN, (DASHES[1], DASHES[0], DASHES[2]), strict=True)
    ]
    if gaussian:
        handles = [
            *(
                Line2D([], [], color=colour, linewidth=1.6, label=f"unit {unit}")
                for colour, unit in zip(PALETTE, units, strict=False)
            ),
            *handles,
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, **_LEGEND)
    above = (
        "Above: the prior's mean μ(u) and the weight v(u) of what z̃ says beyond it. Below: "
        if gaussian
        else ""
    )
    figure.set_label(
        f"{above}the reconstruction ẑ for three values of the lateral z̃. {count} of {num_units} units, in the "
        "order of how much ẑ depends on u, the signal from above."
    )
    return figure


def _mean_and_slope(combinator: GaussianCombinator, u: Tensor) -> tuple[Tensor, Tensor]:
    """mu(u) and v(u), got from the op itself: g is linear in z, with slope v and g(mu) = mu."""

    def lines(params: Tensor) -> tuple[Tensor, Tensor]:
        at_0, at_1 = (
            gaussian_combinator(torch.full_like(u, z), u, params, squash_v=combinator.squash_v)
            for z in (0.0, 1.0)
        )
        return at_0, at_1 - at_0

    # Without a6 .. a10 the slope is 0 (1/2 when squashed), so that mu = g(0) / (1 - slope) is safe.
    flat = combinator.weight.detach().clone()
    flat[5:] = 0
    at_0, slope = lines(flat)
    return at_0 / (1 - slope), lines(combinator.weight.detach())[1]


_LEGEND: dict[str, Any] = {"fontsize": 8.5, "frameon": False, "labelcolor": INK, "handlelength": 2.2}


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), facecolor="none", layout="constrained")


def _plain(axis: Axes) -> None:
    """Two spines, a faint grid, all in INK on no ground."""
    axis.set_facecolor("none")
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(INK)
        spine.set_linewidth(0.8)
    axis.grid(True, color=INK, alpha=0.15, linewidth=0.6)
    axis.tick_params(which="both", color=INK, labelcolor=INK, labelsize=9, width=0.8)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, fontsize=9)


def _line(axis: Axes, points: Sequence[tuple[float, float]], name: str, index: int) -> None:
    x, y = zip(*points, strict=True)
    total = name == "total"
    axis.plot(
        x,
        y,
        color=INK if total else PALETTE[index % len(PALETTE)],
        linestyle="-" if total else DASHES[index // len(PALETTE) % len(DASHES)],
        linewidth=2.2 if total else 1.6,
        marker="o" if len(points) == 1 else "",
        markersize=4,
        label=name.replace("_", " "),
    )


def _legend(axis: Axes) -> None:
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, **_LEGEND)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) wherever the value is a finite number."""
    return [
        (row.get("epoch", number), float(row[key]))
        for number, row in enumerate(history, 1)
        if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    ]


def _number(value: float, _: object = None) -> str:
    return f"{value:g}".replace("-", "−")

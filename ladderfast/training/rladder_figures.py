"""Pictures of a recurrent Ladder's report: what it sees, expects and believes, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .figures import INK, PALETTE, WIDTH, _figure, _plain


def sequence(clean: Tensor, occluded: Tensor, prediction: Tensor | None, probabilities: Tensor) -> Figure:
    """One sequence, a column for each time step, as in the paper's figure 4.

    Args:
        clean, occluded: (T + 1, 1, H, W) frames of 0..1, with the one after the last.
        prediction: (T, 1, H, W) of the next occluded frame, 0..1, or None.
        probabilities: (T, classes).

    Raises:
        ValueError: shapes that do not agree.
    """
    steps, classes = probabilities.shape
    pictures = {"scene": clean[:steps], "input": occluded[:steps]}
    if prediction is not None:
        pictures |= {"next input,\nexpected": prediction, "next input": occluded[1:]}
    for name, frames in pictures.items():
        if len(frames) != steps or frames.shape[1:] != clean.shape[1:]:
            raise ValueError(
                f"{name}: expected {steps} frames of {tuple(clean.shape[1:])}, got {tuple(frames.shape)}"
            )
    beside = 0.95
    wide = (WIDTH - beside) / steps
    figure = Figure(
        figsize=(WIDTH, len(pictures) * wide + 0.1 * classes + 0.55), facecolor="none", layout="constrained"
    )
    axes = figure.subplots(
        len(pictures) + 1,
        steps,
        squeeze=False,
        height_ratios=[wide] * len(pictures) + [0.1 * classes + 0.3],
    )
    for row, (name, frames) in zip(axes[:-1], pictures.items(), strict=True):
        for axis, frame in zip(row, frames.detach().cpu().double().numpy(), strict=True):
            axis.imshow(frame[0], cmap="gray", vmin=0, vmax=1, interpolation="none")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_edgecolor(INK)
                spine.set_linewidth(0.5)
        row[0].set_ylabel(name, color=INK, fontsize=8.5, rotation=0, ha="right", va="center")
    chances = probabilities.detach().cpu().double().numpy()
    for step, axis in enumerate(axes[-1]):
        _plain(axis)
        axis.grid(False)
        axis.barh(np.arange(classes), chances[step], color=PALETTE[0], height=0.8)
        axis.set_xlim(0, 1)
        axis.set_ylim(classes - 0.5, -0.5)
        axis.set_xticks([0, 1])
        axis.set_yticks(np.arange(classes), [str(c) for c in range(classes)] if step == 0 else [])
        axis.tick_params(labelsize=7.5, length=0)
        axis.set_xlabel(f"t = {step + 1}", color=INK, fontsize=8.5)
    axes[-1, 0].set_ylabel("class", color=INK, fontsize=8.5, rotation=0, ha="right", va="center")
    expected = (
        " the frame that it expects to come next and the one that comes;" if prediction is not None else ""
    )
    figure.set_label(
        f"From top to bottom: the scene without bars; all that the network sees of it;{expected} the probabilities "
        "of the classes after each step."
    )
    return figure


def error_by_step(errors: Sequence[float]) -> Figure:
    """The test error, in percent, that the network would make if it had to answer after each step."""
    figure = _figure(2.2)
    axis = figure.subplots()
    _plain(axis)
    axis.plot(range(1, len(errors) + 1), errors, color=PALETTE[0], linewidth=1.6, marker="o", markersize=4)
    axis.set_xticks(range(1, len(errors) + 1))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("time step")
    axis.set_ylabel("error, %")
    figure.set_label(
        "The test error if the class at that step were the answer; trained is only the last step's."
    )
    return figure

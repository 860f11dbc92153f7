"""Pictures of piano rolls."""

from __future__ import annotations

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from .figures import INK, PALETTE, WIDTH

LOWEST = 21  # the MIDI number of a piano's lowest key


def piano_roll(notes: Tensor, probabilities: Tensor) -> Figure:
    """The notes of a piece, and below them how likely each was held to be one step before.

    Args:
        notes: (T, 88), 0 or 1.
        probabilities: (T, 88).

    Raises ValueError for shapes that are not the same, or no time step.
    """
    if notes.dim() != 2 or not len(notes) or notes.shape != probabilities.shape:
        raise ValueError(
            f"notes and probabilities must have one shape (T, notes) with at least one time step, got "
            f"{tuple(notes.shape)} and {tuple(probabilities.shape)}"
        )
    sounding = notes.any(0).nonzero().flatten().tolist() or [0, notes.shape[1] - 1]
    low, high = max(0, sounding[0] - 2), min(notes.shape[1] - 1, sounding[-1] + 2)
    # From nothing, so that the page's ground shows through, light or dark.
    shades = LinearSegmentedColormap.from_list("notes", [f"{PALETTE[0]}00", PALETTE[0]])
    figure = Figure(figsize=(2.1 * WIDTH, 4.4), facecolor="none", layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for axis, values, title in zip(
        axes, (notes, probabilities), ("notes", "probability, one step ahead"), strict=True
    ):
        axis.imshow(
            values[:, low : high + 1].T.detach().cpu().double().numpy(),
            cmap=shades,
            vmin=0,
            vmax=1,
            origin="lower",
            aspect="auto",
            interpolation="none",
            extent=(0.5, len(notes) + 0.5, low + LOWEST - 0.5, high + LOWEST + 0.5),
        )
        axis.patch.set_alpha(0)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        axis.tick_params(colors=INK, labelsize=9)
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        axis.set_ylabel("MIDI note", color=INK, fontsize=9)
    axes[1].set_xlabel("time step", color=INK, fontsize=9)
    figure.set_label(
        f"The first {len(notes)} time steps. Above: the notes that sound. Below: how likely the network held each of "
        "them to be, knowing the steps before; full colour is certainty."
    )
    return figure

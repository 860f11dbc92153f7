"""The state of noise made inside kernels: seed and offset, a buffer of the module that draws it."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def draw_seed(state: Tensor) -> None:
    """Start anew: a seed from torch's global generator, and offset 0. state: (2,) int64."""
    state.copy_(torch.stack([torch.randint(2**63 - 1, ()), torch.zeros((), dtype=torch.long)]))


def take_noise(state: Tensor, streams: int) -> Tensor:
    """The state of a pass that draws `streams` streams; the buffer moves on to what the next pass draws.

    A copy: backward draws the noise again, after the buffer has moved.
    """
    taken = state.clone()
    state[1].add_(streams)
    return taken

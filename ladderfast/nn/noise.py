"""The state of noise made inside kernels: seed and offset, a buffer of the module that draws it."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from ladderfast.ops.ladder_encoder import ladder_encoder


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


def dropout(x: Tensor, p: float, state: Tensor) -> Tensor:
    """x (N, C, *) with each value 0 with probability p, 0 <= p < 1, and divided by 1 - p otherwise.

    Which ones is decided by the next noise of the state, (2,) int64, and by no other random numbers.
    """
    if not (p and len(x)):
        return x
    with torch.no_grad():
        # Of zeros the encoder's op makes the noise alone: normal, whatever x's dtype, and a network's own under vmap.
        zeros = torch.zeros(x.shape, device=x.device)
        noise = ladder_encoder(zeros, len(x), noise_std=1.0, noise_state=take_noise(state, 1), want_z=False)
        kept = noise.h < NormalDist().inv_cdf(1 - p)
    return torch.where(kept, x / (1 - p), 0)

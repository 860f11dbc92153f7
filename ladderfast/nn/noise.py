"""The state of noise made inside kernels: seed and offset, a buffer of the module that draws it."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from ladderfast.nn.maps import op_dtype
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


def normal_like(x: Tensor, std: float, state: Tensor, stream: int = 0) -> Tensor:
    """Noise of that standard deviation in the shape of x (N, C, *), N > 0: that of the state and the stream.

    Of zeros, which its normalisation leaves as they are, the encoder's op makes the noise alone; under vmap each
    network's own. Of the dtype in which the ops compute.
    """
    zeros = torch.zeros(x.shape, dtype=op_dtype(x.dtype, x.device), device=x.device)
    return ladder_encoder(
        zeros, len(x), noise_std=std, noise_state=state, noise_stream=stream, want_z=False
    ).h


def dropout_bound(p: float) -> float:
    """The noise below which `dropout` keeps a value. A network has it from its construction: dynamo cannot trace it."""
    return NormalDist().inv_cdf(1 - p) if p else math.inf


def dropout(x: Tensor, p: float, state: Tensor, bound: float | None = None) -> Tensor:
    """x (N, C, *) with each value 0 with probability p, 0 <= p < 1, and divided by 1 - p otherwise.

    Which ones is decided by the next noise of the state, (2,) int64, and by no other random numbers. bound:
    dropout_bound(p), for what is to be compiled.
    """
    if not (p and len(x)):
        return x
    with torch.no_grad():
        # Compared in float32 whatever x is: the same values are dropped then.
        kept = normal_like(x.float(), 1.0, take_noise(state, 1)) < (
            dropout_bound(p) if bound is None else bound
        )
    return torch.where(kept, x / (1 - p), 0)

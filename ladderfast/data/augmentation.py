"""Shifts and mirrorings of images that depend on the seed and the step, and on nothing else."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .shuffle import raw_integers


def shift_and_mirror(
    x: Tensor, *, shift: int, mirror: bool, seed: int, stream: int, position: tuple[int, int, int]
) -> Tensor:
    """x (B, C, H, W), each image moved by up to `shift` pixels up or down and left or right, and mirrored or not.

    What comes in at an edge is 0. The draws are those of (seed, stream, position), three counters from 0 such as
    epoch, step and process.
    """
    if not (shift or mirror) or not len(x):
        return x
    raw = raw_integers(3 * len(x), seed=seed, stream=stream, position=position).reshape(3, -1)
    down, right = (torch.from_numpy((r % np.uint64(2 * shift + 1)).astype(np.int64)) for r in raw[:2])
    if shift:
        each = torch.arange(len(x), device=x.device)
        windows = F.pad(x, (shift,) * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
        # Window (shift, shift) is the image itself; the one above it shows the image further down.
        x = windows[each, :, 2 * shift - down.to(x.device), 2 * shift - right.to(x.device)]
    if mirror:
        turned = torch.from_numpy((raw[2] >> np.uint64(63)).astype(bool)).to(x.device)
        x = torch.where(turned[:, None, None, None], x.flip(3), x)
    return x

"""Orders and draws that depend on a seed and a position, and on nothing else.

Everything here comes from Philox's raw 64-bit integers, sorted: neither torch's generators nor numpy's
sampling routines, whose streams may change between versions, have a say.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ladderfast.checks import check_whole

# Streams of one seed that must not share numbers.
UNLABELLED, LABELLED, DRAW = 0, 1, 2
AUGMENT_UNLABELLED, AUGMENT_LABELLED = 16, 17


def raw_integers(count: int, *, seed: int, stream: int, position: tuple[int, int, int]) -> np.ndarray:
    """`count` uint64 integers that depend on (seed, stream, position), three counters from 0, and their place only."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, *position], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def shuffles(size: int, *, seed: int, stream: int, first: int = 0, count: int = 1) -> np.ndarray:
    """Passes `first` to `first + count - 1` through `size` items, each in its own random order.

    Returns int64 indices (count, size); row i depends on (size, seed, stream, first + i) only.
    """
    if size == 0 or count == 0:
        return np.zeros((count, size), dtype=np.int64)
    blocks = -(-size // 4)  # one step of Philox4x64's counter gives four integers
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([first * blocks, 0, 0, 0], dtype=np.uint64)
    keys = np.random.Philox(key=key, counter=counter).random_raw(4 * blocks * count)
    return np.argsort(keys.reshape(count, 4 * blocks)[:, :size], axis=1, kind="stable")


def check_seed(seed: int, name: str = "seed") -> None:
    """ValueError, which says `name`, unless `seed` is an integer in 0 .. 2**63 - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be an integer from 0 to 2**63 - 1, got {seed!r}")


def draw_labels(y: Tensor, num_labels: int | None, *, seed: int) -> Tensor:
    """Indices of `num_labels` samples, the same number of each class, drawn by `seed`.

    y: (N,) class labels. `None` takes every sample, in order and not balanced. Where the number of classes
    does not divide `num_labels`, classes chosen by the seed give one sample more. Returns int64 indices
    (num_labels,), sorted, so that what is stored does not depend on the order of the draw.

    Raises TypeError unless num_labels is a whole number, ValueError where it is not positive or a class has too few
    samples.
    """
    check_seed(seed)
    if num_labels is None:
        return torch.arange(len(y))
    check_whole("num_labels", num_labels)
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, or None for all, got {num_labels}")
    labels = y.cpu().numpy()
    classes, counts = np.unique(labels, return_counts=True)
    share, left = divmod(num_labels, len(classes))
    wanted = np.full(len(classes), share)
    wanted[shuffles(len(classes), seed=seed, stream=DRAW)[0][:left]] += 1
    if (wanted > counts).any():
        worst = int(np.argmax(wanted - counts))
        raise ValueError(
            f"num_labels={num_labels} needs {wanted[worst]} samples of class {classes[worst]}, "
            f"but there are only {counts[worst]}"
        )
    order = shuffles(len(labels), seed=seed, stream=DRAW, first=1)[0]
    chosen = [order[labels[order] == c][:n] for c, n in zip(classes, wanted, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))

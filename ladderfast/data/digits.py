"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

import torch

from .dataset import Dataset


class Digits(Dataset):
    """1,797 images of 8 x 8 pixels from scikit-learn, values 0..16 scaled to 0..1, as x (N, 64).

    The first 1,300 samples are for training and the last 497 for testing, in scikit-learn's order: the
    split is fixed, and as the samples stand in the order of their writers, the test asks about other hands
    than those trained on.

    Args:
        num_labels: labelled samples, as many of each digit, to one; null for all 1,300.
        seed: draws the labelled samples.

    Raises ImportError without scikit-learn, ValueError for a num_labels that cannot be drawn.
    """

    def __init__(self, num_labels: int | None = None, *, seed: int = 1) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError('Digits needs scikit-learn: pip install "ladderfast[train]"') from error
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).to(torch.float32) / 16
        y = torch.from_numpy(labels).to(torch.int64)
        train, test = slice(0, 1300), slice(1300, None)
        super().__init__(
            x[train], y[train], x[test], y[test], image_shape=(8, 8), num_labels=num_labels, seed=seed
        )

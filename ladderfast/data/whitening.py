"""Contrast normalisation and ZCA whitening of images, as Goodfellow et al. 2013 (maxout networks) have them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# What reading a file of damaged bytes may raise.
DAMAGES = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
CHUNK = 5000  # rows at a time: a whole data set in float64 is large


def normalise_contrast(x: Tensor, *, scale: float = 55.0) -> Tensor:
    """Global contrast normalisation of x (N, D): each image less its mean, and scaled to the norm `scale`.

    An image of one grey, which has no norm to speak of, becomes 0.
    """
    x = x - x.mean(1, keepdim=True)
    norm = x.norm(dim=1, keepdim=True) / scale
    return x / torch.where(norm < 1e-8, 1.0, norm)


class ZCA:
    """Whitening that stays as close to the images as it can: x -> (x - mean) (cov + bias I)^(-1/2), all components.

    Attributes: mean (D,), matrix (D, D), float32.
    """

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        self.mean, self.matrix = mean, matrix

    @classmethod
    def fit(cls, x: Tensor, *, bias: float = 0.1) -> ZCA:
        """From x (N, D), with the biased covariance, computed in float64."""
        mean = x.mean(0, dtype=torch.float64)
        cov = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for rows in x.split(CHUNK):
            centred = rows.double() - mean
            cov.addmm_(centred.T, centred)
        cov = cov / len(x) + bias * torch.eye(x.shape[1], dtype=torch.float64)
        variances, directions = torch.linalg.eigh(cov)
        matrix = (directions * variances.rsqrt()) @ directions.T
        return cls(mean.float(), matrix.float())

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, D) whitened, float32."""
        return torch.cat([(rows - self.mean) @ self.matrix for rows in x.split(CHUNK)])

    @classmethod
    def fitted(cls, x: Tensor, *, folder: Path, bias: float = 0.1) -> ZCA:
        """As `fit`, from a file in `folder` if x has been fitted before.

        The file's name and content have a checksum of x and of the bias. Where it cannot be written, a warning says so.
        """
        checksum = hashlib.sha256(f"zca 1 {tuple(x.shape)} {x.dtype} {bias!r} ".encode())
        checksum.update(x.contiguous().numpy().tobytes())
        key = checksum.hexdigest()
        path = folder / f"zca-{key[:16]}.npz"
        # A file that is damaged or of other data is fitted anew and replaced.
        with contextlib.suppress(*DAMAGES), np.load(path) as saved:
            mean, matrix = torch.from_numpy(saved["mean"]), torch.from_numpy(saved["matrix"])
            shapes = (x.shape[1],), (x.shape[1], x.shape[1])
            if str(saved["key"]) == key and (tuple(mean.shape), tuple(matrix.shape)) == shapes:
                return cls(mean, matrix)
        zca = cls.fit(x, bias=bias)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A name of its own: several processes may do this at once.
            handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez(file, key=key, mean=zca.mean.numpy(), matrix=zca.matrix.numpy())
                os.replace(part, path)
            finally:
                Path(part).unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(
                f"the whitening could not be kept and will be fitted again: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return zca

"""Training on the kernels goes as training on the reference does: an op right alone may still be wrong in a network."""

from __future__ import annotations

import pytest
import torch

import ladderfast
from ladderfast import _extension

STEPS = 60


def losses(backend: str, dtype: torch.dtype) -> torch.Tensor:
    """Costs (STEPS, terms) of the first steps of the recipe `digits`."""
    precision = {torch.float32: "32-true", torch.float64: "64-true"}[dtype]
    with ladderfast.use_backend(backend):
        run = ladderfast.Run("digits", folder=None, progress=False, seed=3, precision=precision)
        return torch.stack([torch.stack(list(run.step().values())).double() for _ in range(STEPS)])


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_the_kernels_train_as_the_reference_does():
    exact = losses("reference", torch.float64)
    assert exact[-1, 0] < 0.7 * exact[0, 0]
    torch.testing.assert_close(losses("cpu", torch.float64), exact, rtol=1e-9, atol=1e-12)
    # In float32 both drift from float64; the kernels no further than twice the reference, and a rounding.
    drift = (losses("reference", torch.float32) - exact).abs()
    ours = (losses("cpu", torch.float32) - exact).abs()
    assert ours.max() <= 2 * drift.max() + 1e-5

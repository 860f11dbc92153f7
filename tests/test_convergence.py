"""Training on the kernels goes as training on the reference does: an op right alone may still be wrong in a network."""

from __future__ import annotations

import pytest
import torch

import ladderfast
from ladderfast import _extension

STEPS = 60


def losses(backend: str, dtype: torch.dtype, accelerator: str = "cpu") -> torch.Tensor:
    """Costs (STEPS, terms) of the first steps of the recipe `digits`."""
    fields = {
        "precision": {torch.float32: "32-true", torch.float64: "64-true"}[dtype],
        "accelerator": accelerator,
    }
    with ladderfast.use_backend(backend):
        run = ladderfast.Run("digits", folder=None, progress=False, seed=3, **fields)
        return torch.stack([torch.stack(list(run.step().values())).double().cpu() for _ in range(STEPS)])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_kernels_of_a_gpu_train_as_the_reference_does(backend):
    exact = losses("reference", torch.float64)
    drift = (losses("reference", torch.float32, "cuda") - exact).abs()
    ours = (losses(backend, torch.float32, "cuda") - exact).abs()
    assert ours.max() <= 2 * drift.max() + 1e-5


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_the_kernels_train_as_the_reference_does():
    exact = losses("reference", torch.float64)
    assert exact[-1, 0] < 0.7 * exact[0, 0]
    drift = (losses("reference", torch.float32) - exact).abs()
    # The noise is float32 on every backend, and the kernels' differs in its last bits: of all that float32 loses, only
    # this is left in float64.
    assert (losses("cpu", torch.float64) - exact).abs().max() <= drift.max()
    # In float32 both drift from float64; the kernels no further than twice the reference, and a rounding.
    ours = (losses("cpu", torch.float32) - exact).abs()
    assert ours.max() <= 2 * drift.max() + 1e-5

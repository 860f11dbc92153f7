"""The network and the run on each device and precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import ladderfast

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def cost(device: str, dtype: torch.dtype) -> torch.Tensor:
    """The whole cost and a gradient of a network without noise, which every device gives alike."""
    torch.manual_seed(1)
    net = ladderfast.models.LadderNetwork([20, 16, 12, 4], noise_std=0.0).to(device=device, dtype=dtype)
    x, labels = torch.rand(64, 20).to(device=device, dtype=dtype), torch.arange(32, device=device) % 4
    for combinator in net.combinators:
        torch.nn.init.constant_(combinator.weight, 0.3)
    out = net.training_pass(x[:32], x[32:])
    total = F.cross_entropy(out.logits, labels) + sum(c for c in out.denoising if c is not None)
    gradients = torch.autograd.grad(total, list(net.parameters()))
    return torch.stack([total.detach(), *(g.norm() for g in gradients)]).cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_costs_and_gradients_agree(device):
    exact = cost("cpu", torch.float64)
    torch.testing.assert_close(cost(device, torch.float32).double(), exact, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_learns(device, precision):
    pytest.importorskip("jsonargparse")
    run = ladderfast.Run("digits", folder=None, progress=False, accelerator=device, precision=precision)
    totals = [float(run.step()["total"]) for _ in range(30)]
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])
    assert all(p.dtype == torch.float32 for p in run.model.parameters())

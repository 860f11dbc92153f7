"""How a trained classifier bears adversarial noise on its input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .adversarial import adversarial_noise, check_tau, input_gradient

SAMPLES = 500  # at a time


def check_robustness(model: nn.Module, data: Any, tau: float, networks: int) -> None:
    """Raise the ValueErrors of `robustness`, before what takes long. networks: how many `model` is."""
    check_tau("tau", tau)
    if not hasattr(data, "y_test"):
        raise ValueError(
            "robustness is measured of a classifier, and these data have no labelled test samples"
        )
    if networks > 1:
        raise ValueError(f"robustness is measured of one network, this run has {networks}")
    parameters = inspect.signature(model.forward).parameters.values()
    alone = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1
    logits = model(data.x_test[:1]) if alone else None  # a Tagger must be told groups and iterations
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError("robustness is measured of a classifier, and this network gives no logits")


def robustness(model: nn.Module, data: Any, tau: float, seed: int) -> dict[str, Any]:
    """What `Run.robustness` says, of a model in evaluation mode and data with x_test and y_test; without autograd."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.x_test, data.y_test
    wrong = dict.fromkeys(("test_error", "adversarial_error", "random_sign_error"), 0)
    for part, labels in zip(x.split(SAMPLES), y.split(SAMPLES), strict=True):
        adversarial = adversarial_noise(input_gradient(model, part, labels), "sign", tau)
        # In float32 whatever the precision: half precision has zeros, which have no sign.
        signs = torch.randn(part.shape, generator=generator, dtype=torch.float32).sign().to(part)
        inputs = (part, part + adversarial, part + tau * signs)
        for name, noisy in zip(wrong, inputs, strict=True):
            wrong[name] += int((model(noisy).argmax(1) != labels).sum())
    return {"tau": tau, **{name: 100 * count / len(y) for name, count in wrong.items()}}

"""docs/examples/true_masks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.from_path import load


@pytest.fixture(scope="module")
def example():
    return load(Path(__file__).parents[2] / "docs" / "examples" / "true_masks.py")


def test_a_pixels_owner_gets_most_of_it(example):
    mask = example.true_masks(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 3)
    torch.testing.assert_close(mask[0, :, 0], torch.tensor([0.9, 0.05, 0.05]))
    assert mask[0].argmax(0)[:3].tolist() == [0, 1, 2]
    torch.testing.assert_close(mask[0, :, 3], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("told", [False, True])
def test_training_lowers_the_cost(example, told):
    torch.manual_seed(1)
    owner = (torch.arange(20) >= torch.randint(4, 17, (300, 1))).to(torch.uint8) + 1
    x = torch.rand(300, 2).gather(1, owner.long() - 1)
    costs = []
    for steps in (1, 60):
        net = example.train(
            x[:200], owner[:200], groups=2, told=told, layers=[40, 20], steps=steps, rate=0.003
        )
        cost, ami = example.measure(net, x[200:], owner[200:], groups=2, told=told)
        assert cost.shape == ami.shape == (example.ITERATIONS,)
        assert ami.isfinite().all()
        costs.append(float(cost[-1]))
    assert costs[1] < costs[0] - 5

import numpy as np
import pytest
import torch

from ladderfast.data import moving_mnist
from ladderfast.data.moving_mnist import MovingMNIST, moving_digits

FULL = np.ones((3, 28, 28), bool)


def test_digits_move_straight_and_bounce():
    made = moving_digits(FULL, 60, 20, 64, seed=1)
    x, owner = made.x.reshape(60, 20, 64, 64), made.owner.reshape(60, 20, 64, 64)
    assert set(x.unique().tolist()) == {0, 1}
    assert set(owner.unique().tolist()) == {0, 1, 2}
    assert (x[owner > 0] == 1).all()
    overlap = (x.bool() & (owner == 0)).sum((2, 3))
    for k in (1, 2):  # a digit is whole but for what is covered by both
        assert ((owner == k).sum((2, 3)) + overlap == 784).all()
    apart = (overlap == 0).all(1)
    assert apart.any()
    alone = owner[apart]
    corners = torch.stack(
        [(alone == 1).any(3 - axis).to(torch.uint8).argmax(2) for axis in (0, 1)], -1
    ).double()
    step = corners.diff(dim=1)
    assert corners.min() >= 0
    assert corners.max() <= 36
    length = step.norm(dim=-1)
    assert length.max() < 3.6 + 1.5  # rounding moves either end by up to half a pixel each way
    inside = (
        (corners[:, 1:] > 4) & (corners[:, 1:] < 32) & (corners[:, :-1] > 4) & (corners[:, :-1] < 32)
    ).all(-1)
    assert length[inside].mean().item() == pytest.approx(3.6, abs=0.2)
    again = moving_digits(FULL, 2, 20, 64, seed=1, first=30)
    assert torch.equal(again.x, made.x[30:32])


@pytest.fixture
def source(monkeypatch):
    class Digits:
        x_unlabelled = torch.ones(5, 784)
        x_test = torch.ones(5, 784)

    monkeypatch.setattr(moving_mnist, "MNIST", lambda *_, **__: Digits)
    return MovingMNIST(frames=3, side=32, num_train=12, num_test=4)


def test_batches_are_made_as_they_are_asked_for(source):
    batches = source.batches(0, 5, seed=1)
    assert len(batches) == 2
    batch = batches.get(1, 0)
    assert batch.x_unlabelled.shape == (5, 3, 1024)
    assert batch.x_labelled.shape == (0, 3, 1024)
    assert torch.equal(batch.x_unlabelled, source.batches(0, 5, seed=1).get(1, 0).x_unlabelled)
    assert not torch.equal(batch.x_unlabelled, batches.get(0, 0).x_unlabelled)
    assert batches.x_test.shape == batches.owner_test.shape == (4, 3, 1024)
    both = [source.batches(0, 3, seed=1, rank=r, world_size=2).get(0, 0).x_unlabelled for r in (0, 1)]
    assert torch.equal(torch.cat(both), source.batches(0, 6, seed=1).get(0, 0).x_unlabelled)
    with pytest.raises(ValueError, match="batch_labelled must be 0, as sequences have no labels, got 2"):
        source.batches(2, 5, seed=1)
    with pytest.raises(ValueError, match="batch_unlabelled must be from 1 to 12, got 13"):
        source.batches(0, 13, seed=1)
    with pytest.raises(ValueError, match="frames must be at least 2, side above 28"):
        MovingMNIST(side=28)
    for name in ("frames", "side", "num_train", "num_test"):
        with pytest.raises(TypeError, match=rf"{name} must be a whole number, got 30\.5"):
            MovingMNIST(**{name: 30.5})

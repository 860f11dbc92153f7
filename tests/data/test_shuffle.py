import numpy as np
import pytest
import torch

from ladderfast.data import draw_labels
from ladderfast.data.shuffle import shuffles


@pytest.mark.parametrize(
    "size", [0, 1, 2, 3, 4, 5, 97, 1300]
)  # around Philox's four integers a step, and larger
def test_each_row_is_a_permutation(size):
    orders = shuffles(size, seed=3, stream=0, first=2, count=5)
    assert orders.shape == (5, size)
    assert orders.dtype == np.int64
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(size), (5, 1)))


def test_a_pass_is_reached_without_those_before_it():
    together = shuffles(97, seed=3, stream=1, count=6)
    for i in range(6):
        np.testing.assert_array_equal(shuffles(97, seed=3, stream=1, first=i)[0], together[i])


def test_orders_differ_by_seed_stream_and_pass():
    orders = [
        shuffles(1000, seed=seed, stream=stream, first=first)[0]
        for seed in (1, 2)
        for stream in (0, 1)
        for first in (0, 1)
    ]
    agreements = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 0.01  # chance: one position in 1,000


def test_the_order_is_the_same_on_every_machine_and_version():
    assert shuffles(8, seed=1, stream=0)[0].tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


def test_labels_are_balanced_and_drawn_by_seed():
    y = torch.arange(1000) * 7 % 10
    chosen = draw_labels(y, 50, seed=1)
    assert torch.bincount(y[chosen]).tolist() == [5] * 10
    assert len(set(chosen.tolist())) == 50
    assert torch.equal(chosen, draw_labels(y, 50, seed=1))
    assert not torch.equal(chosen, draw_labels(y, 50, seed=2))


def test_a_remainder_goes_to_classes_chosen_by_the_seed():
    y = torch.arange(1000) % 10
    counts = [torch.bincount(y[draw_labels(y, 23, seed=seed)], minlength=10) for seed in range(8)]
    assert all(sorted(c.tolist()) == [2] * 7 + [3] * 3 for c in counts)
    assert len({tuple(c.tolist()) for c in counts}) > 1


def test_all_labels_come_in_order():
    y = torch.tensor([1, 0, 0, 0])
    assert draw_labels(y, None, seed=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("num_labels", "seed", "message"),
    [
        (0, 1, "num_labels must be at least 1"),
        (4, 1, "num_labels=4 needs 2 samples of class 1, but there are only 1"),
        (2, -1, "seed must be an integer from 0"),
        (2, 2**63, "seed must be an integer from 0"),
        (2, True, "seed must be an integer from 0"),
    ],
)
def test_impossible_draws_are_refused(num_labels, seed, message):
    with pytest.raises(ValueError, match=message):
        draw_labels(torch.tensor([1, 0, 0, 0]), num_labels, seed=seed)

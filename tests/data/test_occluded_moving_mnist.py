"""Occluded Moving MNIST: the facts of the paper's section 3.1, and the order of the sequences."""

import pytest
import torch

from ladderfast.data import OccludedMovingDigits
from ladderfast.data.occluded_moving_mnist import (
    DIGIT,
    REACH,
    SIZE,
    VELOCITIES,
    bars,
    motions,
    positions,
    render,
)


@pytest.fixture(scope="module")
def source():
    return OccludedMovingDigits(num_labels=100)


def test_bars_are_4_wide_with_8_visible_between():
    line = "".join("#" if hidden else "." for hidden in bars()[0])
    assert line == "........####........####........"
    assert bars()[:, 0].equal(bars()[0])
    assert bars().equal(bars()[:1] | bars()[:, :1])


def test_velocities_are_the_eight_and_all_places_are_begun_from():
    start, velocity = motions(20_000, seed=1, split="train")
    assert {tuple(v) for v in velocity.tolist()} == set(VELOCITIES)
    assert len(set(VELOCITIES)) == 8
    assert {(abs(a), abs(b)) for a, b in VELOCITIES} == {(1, 2), (2, 1)}
    for axis in (0, 1):
        counts = start[:, axis].bincount(minlength=REACH + 1)
        assert len(counts) == REACH + 1
        assert counts.min() > 0.8 * 20_000 / (REACH + 1)


def test_motion_depends_on_seed_split_and_index_alone():
    start, velocity = motions(100, seed=1, split="train")
    fewer = motions(7, seed=1, split="train")
    assert fewer[0].equal(start[:7])
    assert fewer[1].equal(velocity[:7])
    assert not motions(100, seed=2, split="train")[0].equal(start)
    assert not motions(100, seed=1, split="test")[0].equal(start)


def test_digits_bounce_off_the_borders():
    start, velocity = torch.tensor([[1, 17], [5, 5]]), torch.tensor([[-2, 1], [1, 2]])
    corners = positions(start, velocity, 4)
    assert corners[0].tolist() == [[1, 17], [1, 18], [3, 17], [5, 16]]
    assert corners[1].tolist() == [[5, 5], [6, 7], [7, 9], [8, 11]]
    start, velocity = motions(500, seed=1, split="train")
    corners = positions(start, velocity, 60)
    assert corners.min() == 0
    assert corners.max() == REACH
    moved = corners.diff(dim=1).abs()
    assert (moved <= velocity.abs()[:, None]).all()  # less only where it is reflected
    assert (moved == velocity.abs()[:, None]).float().mean() > 0.9


def test_a_scene_is_a_digit_on_white_behind_bars():
    torch.manual_seed(0)
    digits = 0.1 + 0.9 * torch.rand(3, DIGIT, DIGIT)
    corners = torch.tensor([[[0, 0], [2, 1]], [[18, 18], [17, 16]], [[7, 9], [8, 11]]])
    scene = render(digits, corners)
    hidden = bars()
    for n in range(3):
        known = torch.zeros(DIGIT, DIGIT, dtype=torch.bool)
        for t in range(2):
            y, x = corners[n, t].tolist()
            here = slice(y, y + DIGIT), slice(x, x + DIGIT)
            clean = torch.ones(SIZE, SIZE)
            clean[here] = 1 - digits[n]
            assert scene.clean[n, t, 0].equal(clean)
            assert scene.occluded[n, t, 0].equal(torch.where(hidden, 1.0, clean))
            known |= ~hidden[here]
            optimal = torch.ones(SIZE, SIZE)
            optimal[here] = 1 - digits[n] * known
            assert scene.optimal[n, t, 0].equal(optimal)


def test_sequences_are_made_again_to_the_same_bits(source):
    one = source.batches(20, 40, seed=3)
    other = source.batches(20, 40, seed=3)
    late = other.get(4, 2)
    one.get(0, 0)
    assert all(a.equal(b) for a, b in zip(one.get(4, 2), late, strict=True))
    assert late.x_labelled.shape == late.next_labelled.shape == (20, 5, 1, SIZE, SIZE)
    assert late.x_unlabelled.shape == (40, 5, 1, SIZE, SIZE)
    assert late.next_labelled[:, :-1].equal(late.x_labelled[:, 1:])
    assert not one.get(4, 3).x_labelled.equal(late.x_labelled)


def keys(x):
    return {t.numpy().tobytes() for t in x}


def test_an_epoch_is_a_pass_and_labels_are_balanced(source):
    assert source.labels["train"][source.labelled].bincount().tolist() == [10] * 10
    batches = source.batches(20, 100, seed=1)
    assert len(batches) == 11  # 1,100 training sequences
    assert len(set().union(*(keys(batches.get(0, s).x_unlabelled) for s in range(11)))) == 1100
    seen = [batches.get(0, s) for s in range(5)]
    assert len(set().union(*(keys(b.x_labelled) for b in seen))) == 100  # one pass of the labelled ones
    alone = source.batches(20, 0, seed=1)
    assert len(alone) == 5
    assert len(set().union(*(keys(alone.get(7, s).x_labelled) for s in range(5)))) == 100
    assert alone.get(0, 0).x_unlabelled.shape == (0, 5, 1, SIZE, SIZE)


def test_two_processes_share_an_epoch(source):
    parts = [source.batches(5, 50, seed=1, rank=r, world_size=2) for r in (0, 1)]
    assert len(parts[0]) == 11
    both = [keys(p.get(1, 3).x_unlabelled) for p in parts]
    assert not both[0] & both[1]
    assert len(both[0] | both[1]) == 100


def test_splits_are_apart_and_validation_can_be_joined(source):
    batches = source.batches(20, 0, seed=1)
    sizes = {split: sum(len(y) for _, _, y in batches.parts(split)) for split in source.rows}
    assert sizes == {"train": 1100, "validation": 200, "test": 497}
    assert source.validation_samples == 200
    joined = source.with_validation_in_training()
    assert joined.validation_samples == 0
    assert len(joined.rows["train"]) == 1300
    assert joined.labelled.equal(source.labelled)  # the validation set's labels stay unknown
    supervised = OccludedMovingDigits()
    assert len(supervised.labelled) == 1100
    assert len(supervised.with_validation_in_training().labelled) == 1300


def test_the_optimal_input_is_the_last_reconstruction():
    optimal = OccludedMovingDigits(optimal=True).batches(10, 0, seed=1)
    x, following, y = next(optimal.parts("test", 10))
    scene, digits = optimal.scene("test", torch.arange(10))
    assert x.equal(scene.optimal[:, 4:5])
    assert following.equal(scene.occluded[:, 5:6])
    assert y.equal(digits)


def test_numbers_out_of_range_are_refused(source):
    with pytest.raises(ValueError, match="num_validation must be from 0 to 1299, got 1300"):
        OccludedMovingDigits(num_validation=1300)
    with pytest.raises(ValueError, match="frames must be at least 1"):
        OccludedMovingDigits(frames=0)
    with pytest.raises(ValueError, match="batch_labelled must be from 1 to 100"):
        source.batches(101, 0, seed=1)
    with pytest.raises(ValueError, match="batch_unlabelled must be from 0 to 1100"):
        source.batches(10, 1101, seed=1)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ({"motion_seed": -1}, ValueError, "motion_seed must be an integer from 0"),
        ({"num_validation": 2.5}, TypeError, "num_validation must be a whole number, got 2.5"),
        ({"frames": 2.5}, TypeError, "frames must be a whole number, got 2.5"),
    ],
)
def test_a_wrong_number_is_named(kind, error, message):
    with pytest.raises(error, match=f"^{message}"):
        OccludedMovingDigits(**kind)

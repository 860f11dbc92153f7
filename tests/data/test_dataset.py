import pytest
import torch

from ladderfast.data import Batches, Dataset, Digits


def numbered(size=30, num_labels=None, seed=1, classes=3):
    """Sample i is the number i, so that a batch shows which samples it holds."""
    x = torch.arange(size, dtype=torch.float32).reshape(-1, 1)
    y = torch.arange(size) % classes
    return Dataset(x, y, x[:4], y[:4], image_shape=(1, 1), num_labels=num_labels, seed=seed)


def members(batch):
    return batch.x_labelled.flatten().long(), batch.x_unlabelled.flatten().long()


def test_an_epoch_is_one_pass_over_the_unlabelled_samples():
    batches = Batches(numbered(), 4, 5, seed=1)
    assert len(batches) == 6
    epochs = [torch.cat([members(batches.get(e, s))[1] for s in range(6)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(30)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_left_over_samples_change_from_epoch_to_epoch():
    batches = Batches(numbered(32), 4, 5, seed=1)
    assert len(batches) == 6
    left = [
        set(range(32)).difference(*(members(batches.get(e, s))[1].tolist() for s in range(6)))
        for e in range(6)
    ]
    assert all(len(part) == 2 for part in left)
    assert len(set.union(*left)) > 4


def test_labelled_samples_are_passes_on_end():
    dataset = numbered(num_labels=9)
    batches = Batches(dataset, 4, 5, seed=1)
    stream = torch.cat(
        [members(batches.get(e, s))[0] for e in range(3) for s in range(6)]
    )  # 72 = 8 passes of 9
    passes = stream.reshape(8, 9)
    expected = sorted(dataset.x_labelled.flatten().long().tolist())
    assert all(sorted(one.tolist()) == expected for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) == 8


def test_labels_belong_to_their_samples():
    batches = Batches(numbered(num_labels=9), 4, 5, seed=1)
    batch = batches.get(1, 2)
    assert torch.equal(batch.x_labelled.flatten().long() % 3, batch.y_labelled)


def test_any_step_is_reached_directly():
    walked = Batches(numbered(num_labels=9), 4, 5, seed=1)
    for epoch in range(4):
        for step in range(6):
            expected = walked.get(epoch, step)
    for got, want in zip(Batches(numbered(num_labels=9), 4, 5, seed=1).get(3, 5), expected, strict=True):
        assert torch.equal(got, want)


def test_with_all_labels_the_two_streams_are_drawn_apart():
    dataset = numbered()
    assert dataset.x_labelled is dataset.x_unlabelled
    batches = Batches(dataset, 5, 5, seed=1)
    assert batches.x_labelled is batches.x_unlabelled
    assert not torch.equal(*members(batches.get(0, 0)))


def test_processes_share_an_epoch():
    parts = [Batches(numbered(num_labels=12), 2, 5, seed=1, rank=r, world_size=3) for r in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    unlabelled = torch.cat([members(part.get(0, s))[1] for part in parts for s in range(2)])
    assert sorted(unlabelled.tolist()) == list(range(30))
    labelled = torch.cat([members(part.get(0, s))[0] for part in parts for s in range(2)])
    assert len(set(labelled.tolist())) == 12


def test_one_pass_over_the_labelled_samples_in_equal_parts():
    batches = Batches(numbered(num_labels=9), 4, 5, seed=1)
    parts = batches.labelled_batches()
    assert [len(part) for part in parts] == [3, 3, 3]
    assert torch.equal(torch.cat(parts), batches.x_labelled)


def test_dtype():
    batches = Batches(numbered(), 4, 5, seed=1, dtype=torch.float64)
    assert batches.get(0, 0).x_unlabelled.dtype == torch.float64
    assert batches.x_test.dtype == torch.float64
    assert batches.get(0, 0).y_labelled.dtype == torch.int64


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ((0, 5), 1, "batch_labelled"),
        ((5, 0), 1, "batch_unlabelled"),
        ((5, 31), 1, "30"),
        ((5, 16), 2, "from 1 to 15"),
    ],
)
def test_batch_sizes_that_cannot_be_are_refused(sizes, world_size, message):
    with pytest.raises(ValueError, match=message):
        Batches(numbered(), *sizes, seed=1, world_size=world_size)


def test_x_and_y_of_different_length_are_refused():
    x, y = torch.zeros(4, 1), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="x_train and y_train must be of one length, got 4 and 3"):
        Dataset(x, y, x, y, image_shape=(1, 1))


def test_digits():
    digits = Digits(num_labels=50, seed=2)
    assert digits.x_unlabelled.shape == (1300, 64)
    assert digits.x_test.shape == (497, 64)
    assert digits.x_labelled.shape == (50, 64)
    assert torch.bincount(digits.y_labelled).tolist() == [5] * 10
    assert digits.x_unlabelled.min() == 0
    assert digits.x_unlabelled.max() == 1
    assert digits.x_unlabelled.dtype == torch.float32
    # every labelled sample is among the unlabelled ones
    assert (digits.x_labelled[:, None] == digits.x_unlabelled).all(-1).any(-1).all()


@pytest.mark.parametrize(
    ("y_train", "y_test", "message"),
    [
        ([0, -1, 1], [0], "y_train must hold classes, numbered from 0, got -1"),
        ([0, 2, 1], [-3, 0], "y_test must hold classes, numbered from 0, got -3"),
        ([0, 2, 1], [], "x_test must hold at least 1 sample, got none"),
        ([], [0], "x_train must hold at least 1 sample, got none"),
    ],
)
def test_labels_that_are_no_classes_and_missing_samples_are_refused(y_train, y_test, message):
    y_train, y_test = torch.tensor(y_train, dtype=torch.long), torch.tensor(y_test, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        Dataset(torch.rand(len(y_train), 4), y_train, torch.rand(len(y_test), 4), y_test, image_shape=(2, 2))


def test_the_number_of_classes_is_by_the_highest_label():
    assert numbered(classes=3).num_classes == 3
    y = torch.arange(6)
    assert Dataset(torch.rand(6, 4), y, torch.rand(6, 4), y + 2, image_shape=(2, 2)).num_classes == 8

"""Images in bytes, their shifts and mirrorings: what a batch is depends on seed, epoch and step alone."""

import pytest
import torch

from ladderfast.data import EnsembleBatches, ImageDataset
from ladderfast.data.augmentation import shift_and_mirror
from ladderfast.data.whitening import normalise_contrast

SHAPE = (3, 6, 5)
AT = {"seed": 3, "stream": 16, "position": (0, 1, 0)}


def moved(image, down, right):
    """By hand: image (C, H, W) further down and to the right, 0 where nothing came from."""
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


def test_each_image_is_one_of_its_shifts_and_all_of_them_come():
    image = torch.rand(SHAPE) + 1
    out = shift_and_mirror(image.expand(400, *SHAPE), shift=1, mirror=True, **AT)
    seen = set()
    for picture in out:
        found = [
            (down, right, mirrored)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            for mirrored in (False, True)
            if torch.equal(
                picture, moved(image, down, right).flip(2) if mirrored else moved(image, down, right)
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 18


def test_nothing_asked_for_is_nothing_done():
    x = torch.rand(4, *SHAPE)
    assert shift_and_mirror(x, shift=0, mirror=False, **AT) is x


def test_a_shift_draws_both_directions_apart():
    x = torch.zeros(200, 1, 9, 9)
    x[:, 0, 4, 4] = 1
    at = shift_and_mirror(x, shift=3, mirror=False, **AT).flatten(1).argmax(1)
    down, right = at // 9 - 4, at % 9 - 4
    assert down.abs().max() == 3
    assert right.abs().max() == 3
    assert abs(float((down * right).float().mean())) < 1  # 4 if one were the other


def dataset(labels=None, samples=30, **options):
    x = torch.randint(0, 256, (samples, 90), dtype=torch.uint8)
    y = torch.arange(20) % 4
    return ImageDataset(x, y, x[:8], y[:8], image_shape=SHAPE, num_labels=labels, **options)


def test_bytes_become_numbers_in_the_batch():
    data = dataset(8)
    batches = data.batches(4, 10, seed=1, dtype=torch.float64)
    assert batches.x_unlabelled.dtype == torch.uint8
    batch = batches.get(0, 0)
    assert batch.x_unlabelled.dtype == torch.float64
    rows = {tuple((row / 255).tolist()) for row in data.x_unlabelled.float()}
    assert all(tuple(row.float().tolist()) in rows for row in batch.x_unlabelled)
    assert torch.equal(batches.x_test, (data.x_unlabelled[:8].float() / 255).double())
    assert torch.equal(torch.cat(batches.labelled_batches()), (data.x_labelled.float() / 255).double())


def test_contrast_normalisation_makes_the_variance_1():
    batch = dataset(8, contrast=True).batches(4, 10, seed=1).get(0, 0)
    torch.testing.assert_close(batch.x_unlabelled.var(1, correction=0), torch.ones(10))
    torch.testing.assert_close(batch.x_labelled.mean(1), torch.zeros(4), rtol=0, atol=1e-5)
    x = torch.rand(2, 90)
    torch.testing.assert_close(normalise_contrast(x, scale=90**0.5).norm(dim=1), torch.full((2,), 90**0.5))


def test_samples_without_labels_are_among_the_unlabelled_alone():
    data = dataset()
    assert data.x_unlabelled.shape == (30, 90)
    assert torch.equal(data.x_labelled, data.x_unlabelled[:20])
    assert torch.equal(data.with_seed(2).x_labelled, data.x_unlabelled[:20])
    drawn = dataset(8).with_seed(5)
    assert torch.bincount(drawn.y_labelled).tolist() == [2] * 4


def test_images_that_all_have_their_label_are_held_once():
    x, y = torch.rand(20, 90), torch.arange(20) % 4
    data = ImageDataset(x, y, x, y, image_shape=SHAPE)
    for one in (data, data.with_seed(2)):
        batches = one.batches(4, 10, seed=1, dtype=torch.float64)
        assert batches.x_labelled.data_ptr() == batches.x_unlabelled.data_ptr()


def test_a_step_is_reached_directly_and_moves_with_all_that_it_depends_on():
    data = dataset(8, shift=2, mirror=True)
    batches = data.batches(4, 10, seed=1)
    there = [batches.get(epoch, step) for epoch in range(2) for step in range(3)][4]
    again = data.batches(4, 10, seed=1).get(1, 1)
    assert torch.equal(there.x_unlabelled, again.x_unlabelled)
    assert torch.equal(there.x_labelled, again.x_labelled)
    still = dataset(8).batches(4, 10, seed=1)
    assert still.get(1, 1).x_unlabelled.shape == again.x_unlabelled.shape

    def shifts(seed, epoch, step, rank=0):
        one = ImageDataset(
            torch.eye(81)[40].expand(30, 81),
            torch.arange(30) % 2,
            torch.zeros(1, 81),
            torch.zeros(1, dtype=torch.long),
            image_shape=(9, 9),
            shift=3,
        )
        batch = one.batches(15, 15, seed=seed, rank=rank, world_size=2).get(epoch, step)
        return tuple(batch.x_labelled.argmax(1).tolist()), tuple(batch.x_unlabelled.argmax(1).tolist())

    found = [shifts(1, 0, 0), shifts(2, 0, 0), shifts(1, 1, 0), shifts(1, 0, 0, rank=1)]
    assert len({part for pair in found for part in pair}) == 8


def test_only_what_is_not_moved_is_taken_by_index():
    for options, by_index in (({}, True), ({"shift": 1}, False), ({"mirror": True}, False)):
        batches = dataset(8, **options).batches(4, 10, seed=1)
        assert batches.by_index == by_index
        got, taken = batches.get(0, 1), batches.take(*(order[1] for order in batches.orders(0)))
        assert torch.equal(got.x_unlabelled, taken.x_unlabelled) == by_index


def test_several_seeds_side_by_side_get_what_each_gets_alone():
    data = dataset(8, shift=1, mirror=True)
    both = EnsembleBatches([data.with_seed(s) for s in (1, 2)], 4, 10, seeds=(1, 2)).get(0, 1)
    for i, seed in enumerate((1, 2)):
        alone = data.with_seed(seed).batches(4, 10, seed=seed).get(0, 1)
        assert torch.equal(both.x_unlabelled[i], alone.x_unlabelled)
        assert torch.equal(both.x_labelled[i], alone.x_labelled)


def test_a_shift_out_of_the_image_is_refused():
    with pytest.raises(ValueError, match="shift must be from 0 to 5 pixels, got 6"):
        dataset(shift=6)

"""Images whose pixels belong to objects: what they are made of, and in what order they come."""

import numpy as np
import pytest
import torch

from ladderfast.data import FrequencyMNIST, GroupedImages, Shapes, TexturedMNIST, textured_mnist
from ladderfast.data.draws import Draws
from ladderfast.data.shapes import SIDE, make_shapes, shape_templates
from ladderfast.data.textured_mnist import FREQUENCIES, thickened, two_digits
from ladderfast.data.textures import TexturePatches, generate_textures, read_textures


def test_draws_are_uniform_and_each_samples_own():
    draws = Draws(20_000, 7, seed=3, stream=5)
    uniform, whole = draws.uniform(2, -1, 3), draws.integers(2, np.array([3, 10]))
    chosen = draws.distinct(3, 5)
    assert uniform.min() >= -1
    assert uniform.max() < 3
    np.testing.assert_allclose(uniform.mean(0), 1, atol=0.03)
    assert [np.unique(column).tolist() for column in whole.T] == [[0, 1, 2], list(range(10))]
    triples, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(triples) == 60  # 5 * 4 * 3, each as often as the others
    assert all(len(set(triple)) == 3 for triple in triples.tolist())
    assert counts.min() > 250
    assert counts.max() < 420
    later = Draws(3, 7, seed=3, stream=5, first=1000)
    np.testing.assert_array_equal(later.uniform(2, -1, 3), uniform[1000:1003])
    with pytest.raises(ValueError, match="has 7 draws, and 8 were asked for"):
        later.uniform(6)


def test_the_templates_of_shapes():
    square, triangle, inverted = shape_templates()
    assert square.shape == (7, 7)
    assert square.sum() == 49 - 9
    assert triangle.shape == (7, 12)
    assert [triangle[row].sum() for row in range(7)] == [2, 4, 4, 4, 4, 12, 12]
    assert (triangle == triangle[:, ::-1]).all()
    assert (inverted == triangle[::-1]).all()


def test_pixels_of_shapes_and_their_owners():
    x, owner = make_shapes(3000, seed=1)
    assert set(np.unique(x)) == {0, 1}
    assert x.mean() == pytest.approx(0.26, abs=0.01)  # the mean that the paper names
    assert (x[owner > 0] == 1).all()
    assert set(np.unique(owner)) == {0, 1, 2, 3}
    # What an owner has is a part of one template, at one place; where shapes do not meet, all of it.
    sizes = np.stack([(owner == k).sum(1) for k in (1, 2, 3)])
    assert sizes.max() == 42
    apart = (x.sum(1) == sizes.sum(0)).nonzero()[0]
    assert len(apart) > 60
    seen = set()
    for image in apart[:60]:
        for k in (1, 2, 3):
            rows, columns = (owner[image].reshape(SIDE, SIDE) == k).nonzero()
            box = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), bool)
            box[rows - rows.min(), columns - columns.min()] = True
            seen.add(
                next(i for i, t in enumerate(shape_templates()) if t.shape == box.shape and (t == box).all())
            )
    assert seen == {0, 1, 2}
    covered = x.astype(int).sum() - (owner > 0).sum()
    assert covered > 0  # by two shapes


def test_training_images_of_shapes_are_the_seeds():
    data, other = Shapes(40, 10, seed=7), Shapes(40, 10, seed=1)
    assert [len(t) for t in (data.x_unlabelled, data.x_valid, data.x_test)] == [40, 10, 10]
    x, _ = make_shapes(60, seed=7)
    assert torch.equal(data.x_unlabelled, torch.from_numpy(x[:40]).float())
    for name in ("x_valid", "owner_valid", "x_test", "owner_test"):
        assert torch.equal(getattr(data, name), getattr(other, name))
    assert not torch.equal(data.x_unlabelled, other.x_unlabelled)
    held, owner = make_shapes(20, seed=1, first=40)
    assert torch.equal(torch.cat([data.x_valid, data.x_test]), torch.from_numpy(held).float())
    assert torch.equal(torch.cat([data.owner_valid, data.owner_test]), torch.from_numpy(owner))
    assert (make_shapes(5, seed=7, first=30)[0] == x[30:35]).all()
    assert not (make_shapes(60, seed=8)[0] == x).all()
    with pytest.raises(ValueError, match="num_train and num_test must be at least 1, got 0 and 10"):
        Shapes(0, 10)
    with pytest.raises(TypeError, match=r"num_train must be a whole number, got 2\.5"):
        Shapes(2.5, 10)
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to .*, got -1"):
        Shapes(2, 10, seed=-1)


def numbered(**kind):
    x = torch.arange(30.0).unsqueeze(1)
    return GroupedImages(x, x[:4], torch.ones(4, 1), image_shape=(1, 1), **kind)


def test_batches_without_labels():
    batches = numbered().batches(0, 7, seed=1)
    assert len(batches) == 4
    epoch = torch.cat([batches.get(0, s).x_unlabelled for s in range(4)]).flatten().tolist()
    assert len(set(epoch)) == 28
    batch = batches.get(1, 2)
    assert batch.x_labelled.shape == (0, 1)
    assert torch.equal(batch.x_unlabelled, numbered().batches(0, 7, seed=1).get(1, 2).x_unlabelled)
    assert not hasattr(batches, "y_test")
    with pytest.raises(ValueError, match="batch_labelled must be 0, as these images have no labels, got 3"):
        numbered().batches(3, 7, seed=1)
    with pytest.raises(ValueError, match="nor both 0, got 0 and 0"):
        numbered().batches(0, 0, seed=1)
    with pytest.raises(ValueError, match="batch_unlabelled must be at most 15"):
        numbered().batches(0, 16, seed=1, world_size=2)


def test_batches_with_labels_alone_pass_over_the_labelled_images():
    y = torch.arange(30) % 3
    batches = numbered(y_train=y, y_test=y[:4], num_labels=9).batches(4, 0, seed=1)
    assert len(batches) == 2
    for epoch in range(2):
        batch = batches.get(epoch, 1)
        assert batch.x_unlabelled.shape == (0, 1)
        assert torch.equal(batch.x_labelled.flatten().long() % 3, batch.y_labelled)
    assert torch.equal(batches.y_test, y[:4])
    # The one image that the first epoch leaves over begins the second.
    order = [int(i) for e in range(2) for s in range(2) for i in batches.get(e, s).x_labelled.flatten()]
    assert len(set(order[:9])) == 9


def test_images_of_several_classes_are_labelled_at_random():
    y = torch.eye(30)
    data = numbered(y_train=y, num_labels=8)
    assert torch.equal(data.x_labelled.flatten().long(), data.y_labelled.argmax(1))
    assert len(set(data.x_labelled.flatten().tolist())) == 8
    assert numbered(y_train=y, num_labels=0).x_labelled is None
    with pytest.raises(ValueError, match="num_labels must be from 0 to 30, or None for all, got 31"):
        numbered(y_train=y, num_labels=31)


@pytest.mark.parametrize("y", [torch.eye(30), torch.arange(30) % 3])
def test_a_number_of_labels_that_is_no_whole_number(y):
    with pytest.raises(TypeError, match=r"num_labels must be a whole number, got 1\.5"):
        numbered(y_train=y, num_labels=1.5)


@pytest.mark.parametrize("made", [TexturedMNIST, FrequencyMNIST])
def test_numbers_are_looked_at_before_any_file(made, tmp_path):
    for name in ("num_train", "num_test", "num_labels"):
        with pytest.raises(TypeError, match=rf"{name} must be a whole number, got 1\.5"):
            made(str(tmp_path), **{name: 1.5})
    for seed in (-1, 1.5):
        with pytest.raises(ValueError, match=rf"seed must be an integer from 0 to .*, got {seed}"):
            made(str(tmp_path), seed=seed)


def test_lengths_that_do_not_agree():
    with pytest.raises(ValueError, match="x_train and y_train must be of one length, got 30 and 4"):
        numbered(y_train=torch.zeros(4))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"x_valid": torch.ones(3, 1)}, "x_valid and owner_valid must both be there, or neither"),
        (
            {"x_valid": torch.ones(3, 1), "owner_valid": torch.ones(2, 1)},
            r"owner_valid must have the shape of x_valid, \(3, 1\), got \(2, 1\)",
        ),
        (
            {"x_valid": torch.ones(3, 2), "owner_valid": torch.ones(3, 2)},
            r"x_valid must have as many pixels as x_train, \(1,\), got \(2,\)",
        ),
    ],
)
def test_validation_images_that_do_not_fit(kind, message):
    with pytest.raises(ValueError, match=message):
        numbered(**kind)


def test_owners_that_do_not_fit():
    x = torch.zeros(5, 9)
    for owner in (x[:4], x[:, :8]):
        with pytest.raises(ValueError, match=r"owner_test must have the shape of x_test, \(5, 9\)"):
            GroupedImages(x, x, owner, image_shape=(3, 3))


def test_validation_images_join_the_training_ones():
    y = torch.arange(30) % 3
    data = numbered(x_valid=torch.full((5, 1), 99.0), owner_valid=torch.ones(5, 1), y_train=y)
    assert data.validation_samples == 5
    joined = data.with_validation_in_training()
    assert joined.validation_samples == 0
    assert joined.x_unlabelled.flatten().tolist() == [*range(30), *[99.0] * 5]
    assert len(joined.x_labelled) == len(joined.y_labelled) == 30
    batches = joined.batches(3, 35, seed=1)
    assert int((batches.get(0, 0).x_unlabelled == 99).sum()) == 5
    assert (data.validation_samples, len(data.x_unlabelled)) == (5, 30)
    with pytest.raises(ValueError, match="GroupedImages holds no validation samples"):
        numbered().with_validation_in_training()


def test_generated_textures_are_flat_in_brightness_and_differ(monkeypatch):
    monkeypatch.setattr("ladderfast.data.textures.SIDE", 128)
    textures = generate_textures(6)
    assert textures.shape == (6, 128, 128)
    for texture in textures:
        np.testing.assert_allclose(np.quantile(texture, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    spectra = np.abs(np.fft.rfft2(textures - 0.5))
    spectra = (spectra / np.linalg.norm(spectra, axis=(1, 2), keepdims=True)).reshape(6, -1)
    assert (spectra @ spectra.T - np.eye(6)).max() < 0.9
    np.testing.assert_array_equal(textures, generate_textures(6))


def test_pictures_of_a_folder(tmp_path):
    from PIL import Image

    with pytest.raises(FileNotFoundError, match="must hold at least two pictures"):
        read_textures(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_textures(tmp_path / "moved")
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
    Image.fromarray(grey).save(tmp_path / "b.png")
    Image.fromarray(np.stack([grey.T] * 3, -1)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    deep = tmp_path / "deep"
    deep.mkdir()
    for name in ("a.png", "b.png"):  # of 16 bits, all of them above the 255 at which fewer bits end
        Image.fromarray(grey.astype(np.uint16) * 200 + 300).save(deep / name)
    assert (np.argsort(read_textures(deep)[1].ravel()) == np.argsort(grey[:, :6].ravel())).all()
    textures = read_textures(tmp_path)
    assert textures.shape == (2, 6, 6)
    assert textures.mean() == pytest.approx(0.5)
    assert (np.argsort(textures[1].ravel()) == np.argsort(grey[:, :6].ravel())).all()
    broken = bytearray((tmp_path / "b.png").read_bytes())
    broken[broken.index(b"IDAT") - 1] -= 9  # a chunk that ends too soon is a SyntaxError to PIL
    for content in (bytes(broken), b"no picture either"):
        (tmp_path / "c.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.png is not a picture that can be read"):
            read_textures(tmp_path)
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png is of one brightness all over"):
        read_textures(tmp_path)


def test_patches_are_turned_and_scaled():
    """On ramps along rows and along columns a patch's steps say its angle and its scale."""
    side = 200
    ramp = np.broadcast_to(np.arange(side, dtype=np.float32)[:, None], (side, side))
    patches = TexturePatches(np.stack([ramp, ramp.T]), 9, (1.5, 3.0))
    count = 2000
    which = np.stack([np.zeros(count, int), np.ones(count, int)], 1)
    draws = Draws(count, 8, seed=1, stream=9)
    reader = patches.read(which, draws)
    # The same place for both, so that one patch has the rows and the other the columns of it.
    for t in reader._place[1:]:
        t[:, 1] = t[:, 0]
    rows, columns = (reader.pixels(np.full((count, 81), k)).reshape(count, 9, 9) for k in (0, 1))
    down = np.stack([rows[:, 8, 4] - rows[:, 0, 4], columns[:, 8, 4] - columns[:, 0, 4]]) / 8
    right = np.stack([rows[:, 4, 8] - rows[:, 4, 0], columns[:, 4, 8] - columns[:, 4, 0]]) / 8
    scale = np.hypot(*down)
    assert scale.min() == pytest.approx(1.5, abs=0.2)
    assert scale.max() == pytest.approx(3.0, abs=0.2)
    np.testing.assert_allclose(np.hypot(*right), scale, atol=0.35)
    np.testing.assert_allclose((down * right).sum(0), 0, atol=0.8)  # at right angles
    angle = np.arctan2(down[1], down[0])
    assert np.histogram(angle, 8, (-np.pi, np.pi))[0].min() > 180
    assert rows.min() >= 0
    assert rows.max() <= side - 1
    with pytest.raises(ValueError, match="textures must have a side above"):
        TexturePatches(np.zeros((2, 30, 30), np.float32), 28, (1.5, 3.0))


def test_each_pixel_is_its_owners():
    textures = np.stack([np.full((300, 300), k / 4, np.float32) for k in range(3)])
    draws = Draws(50, 11, seed=2, stream=9)
    patches = TexturePatches(textures, 28, (1.5, 3.0))
    which = draws.distinct(2, 3)
    owner = (np.random.default_rng(0).random((50, 784)) < 0.3).astype(np.int64)
    values = patches.read(which, draws).pixels(owner)
    np.testing.assert_allclose(values, np.take_along_axis(which, owner, 1) / 4, atol=1e-6)


def test_thickened():
    digit = np.zeros((1, 6, 6), bool)
    digit[0, 0, 0] = digit[0, 3, 3] = True
    wanted = np.zeros((6, 6), bool)
    wanted[:2, :2] = True
    wanted[2:5, 2:5] = True
    assert (thickened(digit)[0] == wanted).all()


def test_two_digits():
    digits = np.zeros((4, 28, 28), bool)
    digits[:, 8:20, 10:18] = True
    x, owner, chosen = two_digits(digits, 400, seed=1)
    assert x.min() >= 0
    assert x.max() <= 1
    assert x.mean() == pytest.approx(0.5, abs=0.01)
    assert set(np.unique(owner)) == {0, 1, 2, 3}
    # Background, digits and overlap make up the image; a digit that is not met is whole.
    sizes = [(owner == k).sum(1) for k in range(4)]
    assert (sizes[2] + sizes[0] == 96).all()
    assert (sizes[3] + sizes[0] == 96).all()
    assert chosen.min() == 0
    assert chosen.max() == 3
    second = (owner == 3) | (owner == 0)
    first_row = second.reshape(-1, 28, 28).any(2).argmax(1)
    assert set(first_row.tolist()) == set(range(4, 13))  # 8, moved by -4 .. 4
    # Each object is one wave: its pixels are a sine of one frequency, which a fit of sine and cosine leaves nothing of.
    down, right = np.divmod(np.arange(784), 28)
    left_over = []
    periods = 3.0 * 3.0 ** (np.arange(FREQUENCIES) / (FREQUENCIES - 1))
    angles = np.pi * (np.arange(FREQUENCIES) * 7 % FREQUENCIES) / FREQUENCIES
    for image, who in zip(x[:5], owner[:5], strict=True):
        for k in (1, 2, 3):
            at = who == k
            fits = []
            for period, angle in zip(periods, angles, strict=True):
                turn = 2 * np.pi * (np.sin(angle) * down + np.cos(angle) * right)[at] / period
                basis = np.stack([np.sin(turn), np.cos(turn)], 1)
                fits.append(np.linalg.lstsq(basis, image[at] - 0.5, rcond=None)[1].sum())
            left_over.append(min(fits))
    assert max(left_over) < 1e-6
    again = two_digits(digits, 3, seed=1, first=100)
    np.testing.assert_array_equal(again[0], x[100:103])


@pytest.mark.parametrize("made", [TexturedMNIST, FrequencyMNIST])
def test_test_images_are_the_same_for_every_seed(made, monkeypatch):
    class Digits:
        x_unlabelled = x_test = (torch.rand(8, 784, generator=torch.Generator().manual_seed(1)) > 0.9).float()
        y_labelled = y_test = torch.arange(8)

    monkeypatch.setattr(textured_mnist, "MNIST", lambda *_, **__: Digits)
    first, second = made(seed=1), made(seed=2)
    assert not torch.equal(first.x_unlabelled, second.x_unlabelled)
    for name in ("x_test", "owner_test", "y_test"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.x_unlabelled, first.x_test)

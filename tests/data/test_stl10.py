import numpy as np
import pytest
import torch

from ladderfast.data import STL10

SIZES = {"train": 40, "unlabeled": 12, "test": 10}


@pytest.fixture
def images():
    """(N, channel, row, column) of each part."""
    rng = np.random.default_rng(0)
    return {part: rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8) for part, n in SIZES.items()}


@pytest.fixture
def folder(monkeypatch, tmp_path, images):
    """Small files that stand for STL-10's."""
    monkeypatch.setattr(STL10, "sizes", SIZES)
    monkeypatch.setattr(STL10, "fold_size", 8)
    for part, x in images.items():
        (tmp_path / f"{part}_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())  # column by column
        if part != "unlabeled":
            labels = (1 + np.arange(len(x)) % 10).astype(np.uint8)
            (tmp_path / f"{part}_y.bin").write_bytes(labels.tobytes())
    lines = [" ".join(str((4 * fold + i) % 40) for i in range(8)) for fold in range(10)]
    (tmp_path / "fold_indices.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_pixels_labels_and_folds(folder, images):
    data = STL10(str(folder), fold=2)
    everything = np.concatenate([images["train"], images["unlabeled"]]).reshape(52, -1)
    np.testing.assert_array_equal(data.x_unlabelled.numpy(), everything)
    np.testing.assert_array_equal(data.x_labelled.numpy(), everything[8:16])
    assert data.y_labelled.tolist() == [8, 9, 0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(
        data.x_test.numpy(), images["test"].reshape(10, -1).astype(np.float32) / np.float32(255)
    )
    assert data.y_test.tolist() == list(range(10))


def test_the_seeds_go_through_the_folds(folder):
    data = STL10(str(folder), seed=1)
    assert torch.equal(data.x_labelled, STL10(str(folder), fold=0).x_labelled)
    for seed, fold in ((3, 2), (10, 9), (11, 0)):
        assert torch.equal(data.with_seed(seed).x_labelled, STL10(str(folder), fold=fold).x_labelled)
    fixed = STL10(str(folder), fold=4)
    assert torch.equal(fixed.with_seed(3).x_labelled, fixed.x_labelled)


def test_the_folder_of_the_archive_is_found(folder, tmp_path):
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "stl10_binary").symlink_to(folder)
    assert len(STL10(str(tmp_path / "above")).x_test) == 10


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "unlabeled_X.bin",
            lambda c: c[:-1],
            "truncated or not STL-10's: it has 331775 bytes, expected 331776",
        ),
        ("train_y.bin", lambda c: c[:-1], "truncated or not STL-10's: it has 39 labels, expected 40"),
        ("test_y.bin", lambda c: b"\x00" + c[1:], "labels must be from 1 to 10, got 0 to 10"),
        ("fold_indices.txt", lambda c: c.split(b"\n", 1)[1], "ten lines of 8 indices, got lines of"),
        ("fold_indices.txt", lambda c: b"99" + c[1:], "different indices from 0 to 39"),
        ("fold_indices.txt", lambda c: b"\xff\xfe\x00", "must hold ten lines of indices"),
    ],
)
def test_files_that_are_not_what_they_should_be(folder, name, change, message):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        STL10(str(folder))
    assert name in str(caught.value)


def test_what_is_missing_is_named(folder):
    (folder / "test_X.bin").unlink()
    (folder / "fold_indices.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"test_X.bin, fold_indices.txt of STL-10 not found .*data_dir"
    ):
        STL10(str(folder))


def test_there_are_ten_folds():
    with pytest.raises(ValueError, match="fold must be from 0 to 9, or null for the seed's, got 10"):
        STL10("nowhere", fold=10)

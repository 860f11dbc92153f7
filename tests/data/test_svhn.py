import hashlib

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ladderfast.data import SVHN, svhn

SIZES = {"train": 40, "extra": 20, "test": 10}


def content(part):
    rng = np.random.default_rng(len(part))
    size = SIZES[part]
    return {
        "X": rng.integers(0, 256, (32, 32, 3, size), dtype=np.uint8),
        "y": (1 + np.arange(size) % 10).astype(np.uint8)[:, None],
    }


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Three small MATLAB files that stand for SVHN's, with checksums to match."""
    for part in SIZES:
        savemat(tmp_path / f"{part}_32x32.mat", content(part), do_compression=True)
    accept(monkeypatch, tmp_path)
    return tmp_path


def accept(monkeypatch, folder):
    files = {}
    for part, size in SIZES.items():
        name = f"{part}_32x32.mat"
        files[part] = name, hashlib.md5((folder / name).read_bytes()).hexdigest(), size
    monkeypatch.setattr(SVHN, "files", files)


def test_pixels_and_labels(folder):
    data = SVHN(str(folder), num_labels=20)
    x = content("train")["X"]
    assert data.x_unlabelled.shape == (40, 3072)
    for sample, channel, row, column in ((0, 0, 0, 0), (7, 2, 3, 30), (39, 1, 31, 0)):
        assert (
            data.x_unlabelled[sample].reshape(3, 32, 32)[channel, row, column]
            == x[row, column, channel, sample]
        )
    assert data.y_test.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]  # 10 is the digit 0
    assert torch.bincount(data.y_labelled).tolist() == [2] * 10
    test = torch.from_numpy(content("test")["X"].transpose(3, 2, 0, 1).reshape(10, -1).copy())
    assert torch.equal(data.x_test, test.float() / 255)
    assert data.image_shape == (3, 32, 32)


def test_extra_images_have_labels_only_where_all_are_used(folder):
    some = SVHN(str(folder), num_labels=20, extra=True)
    assert some.x_unlabelled.shape == (60, 3072)
    train = {row.numpy().tobytes() for row in some.x_unlabelled[:40]}
    assert all(row.numpy().tobytes() in train for row in some.x_labelled)
    everything = SVHN(str(folder), extra=True)
    assert everything.x_labelled.shape == (60, 3072)
    assert len(everything.y_labelled) == 60
    assert len(SVHN(str(folder)).y_labelled) == 40


def test_extra_is_not_read_unless_asked_for(folder):
    (folder / "extra_32x32.mat").unlink()
    assert len(SVHN(str(folder)).x_unlabelled) == 40
    with pytest.raises(
        FileNotFoundError, match=r"extra_32x32.mat of SVHN not found in .* data_dir .* download"
    ):
        SVHN(str(folder), extra=True)


def test_a_truncated_or_foreign_file_is_named(folder, monkeypatch):
    path = folder / "train_32x32.mat"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"train_32x32.mat is not SVHN's file: its MD5"):
        SVHN(str(folder))
    accept(monkeypatch, folder)  # even if somebody got past the checksum
    with pytest.raises(ValueError, match=r"train_32x32.mat is not a MATLAB file that can be read"):
        SVHN(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 39), np.uint8)}, r"X must be uint8 \(32, 32, 3, 40\), got uint8"),
        ({"X": np.zeros((32, 32, 3, 40))}, r"X must be uint8 .*, got float64"),
        ({"y": np.zeros((40, 1), np.uint8)}, "labels must be from 1 to 10, got 0 to 0"),
        ({"y": None}, "it has no variable y"),
    ],
)
def test_a_file_of_another_content_is_refused(tmp_path, change, message):
    path = tmp_path / "train_32x32.mat"
    savemat(path, {k: v for k, v in {**content("train"), **change}.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        svhn.read_mat(path, 40)


def test_download_asks_for_what_is_missing(folder, monkeypatch, tmp_path):
    kept = (folder / "test_32x32.mat").read_bytes()
    (folder / "test_32x32.mat").unlink()
    asked = []

    def fetch(name, urls, target, *, check):
        asked.append((name, urls))
        target.write_bytes(kept)
        check(target)

    monkeypatch.setattr(svhn, "download_file", fetch)
    assert len(SVHN(str(folder), download=True).x_test) == 10
    assert asked == [("test_32x32.mat", [f"{svhn.ADDRESS}test_32x32.mat"])]

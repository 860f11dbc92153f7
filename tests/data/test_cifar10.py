import gzip
import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from ladderfast.data import CIFAR10, CIFAR100, cifar10, whitening
from ladderfast.data.whitening import ZCA, normalise_contrast

SAMPLES = 20  # in each of the six batches
LAYOUT = CIFAR10.layout


def python_batch(pixels, labels):
    """As the published files: a Python 2 pickle, whose keys are bytes to Python 3."""
    batch = {b"batch_label": b"one", b"labels": labels.tolist(), b"data": pixels, b"filenames": [b"a.png"]}
    return pickle.dumps(batch, protocol=2)


def binary_batch(pixels, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), pixels], 1).tobytes()


def archive_of(inner, files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{inner}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ladderfast" / "cifar10"


@pytest.fixture
def batches(monkeypatch):
    """Six small batches, (pixels, labels) by name, that stand for CIFAR-10's, with checksums to match."""
    rng = np.random.default_rng(0)
    made, md5s = {}, []
    for name, _, _ in LAYOUT.batches:
        labels = rng.permutation(np.arange(SAMPLES) % 10)
        made[name] = rng.integers(0, 256, (SAMPLES, 3072), dtype=np.uint8), labels
        md5s.append((name, hashlib.md5(python_batch(*made[name])).hexdigest(), SAMPLES))
    forms = {}
    for form, (inner, archive, _) in LAYOUT.forms.items():
        packed = archive_of(inner, files_of(form, made))
        forms[form] = inner, archive, hashlib.md5(packed).hexdigest()
    monkeypatch.setattr(CIFAR10, "layout", replace(LAYOUT, batches=tuple(md5s), forms=forms))
    return made


def files_of(form, made):
    if form == "python":
        return {name: python_batch(*batch) for name, batch in made.items()}
    return {f"{name}.bin": binary_batch(*batch) for name, batch in made.items()}


def write(folder, form, made, how="inner"):
    inner, archive, _ = LAYOUT.forms[form]
    files = files_of(form, made)
    if how == "archive":
        (folder / archive).write_bytes(archive_of(inner, files))
        return folder
    place = folder / inner if how == "inner" else folder
    place.mkdir(exist_ok=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("how", ["inner", "here", "archive"])
def test_every_form_gives_the_same(batches, tmp_path, form, how):
    write(tmp_path, form, batches, how)
    data = CIFAR10(str(tmp_path), num_labels=20, whiten=False)
    names = list(batches)
    x = np.concatenate([batches[name][0] for name in names[:5]])
    np.testing.assert_array_equal(data.x_unlabelled.numpy(), x.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(data.x_test.numpy() * 255, batches["test_batch"][0])
    np.testing.assert_array_equal(data.y_test.numpy(), batches["test_batch"][1])
    assert torch.bincount(data.y_labelled).tolist() == [2] * 10
    assert data.image_shape == (3, 32, 32)
    assert data.x_unlabelled.shape == (100, 3072)


# Preprocessing


def test_contrast_normalisation_by_hand():
    x = torch.tensor([[0.0, 2.0, 4.0, 2.0], [7.0, 7.0, 7.0, 7.0]])
    expected = torch.tensor([[-1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]) * 55 / 2**0.5
    torch.testing.assert_close(normalise_contrast(x), expected)


def test_zca_whitens():
    torch.manual_seed(0)
    x = torch.randn(4000, 6) @ torch.randn(6, 6) + torch.arange(6.0)
    zca = ZCA.fit(x, bias=0.0)
    y = zca(x).double()
    torch.testing.assert_close(y.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(zca.matrix, zca.matrix.T)  # not another root of the inverse, such as PCA's
    assert torch.linalg.eigvalsh(zca.matrix).min() > 0


def test_zca_by_hand():
    """Covariance diag(4, 0) + 0.1 I, over N: the matrix is diag(1 / sqrt(4.1), 1 / sqrt(0.1))."""
    zca = ZCA.fit(torch.tensor([[1.0, 5.0], [5.0, 5.0]]))
    torch.testing.assert_close(zca.mean, torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(zca.matrix, torch.diag(torch.tensor([4.1, 0.1]).rsqrt()))


def test_training_and_test_images_go_through_one_whitening(monkeypatch, batches, tmp_path):
    write(tmp_path, "binary", batches)
    seen = []
    monkeypatch.setattr(ZCA, "fitted", lambda x, *, folder: seen.append(x) or (lambda x: 2 * x))
    data = CIFAR10(str(tmp_path))
    raw = CIFAR10(str(tmp_path), whiten=False)
    torch.testing.assert_close(seen[0].norm(dim=1), torch.full((100,), 55.0))
    torch.testing.assert_close(data.x_unlabelled, 2 * seen[0])
    torch.testing.assert_close(data.x_test, 2 * normalise_contrast(raw.x_test * 255))


def test_the_whitening_is_fitted_once(monkeypatch, tmp_path):
    x = torch.rand(30, 5)
    fits = []
    fit = ZCA.fit
    monkeypatch.setattr(ZCA, "fit", lambda x, *, bias: fits.append(1) or fit(x, bias=bias))
    first = ZCA.fitted(x, folder=tmp_path / "new")
    again = ZCA.fitted(x.clone(), folder=tmp_path / "new")
    assert len(fits) == 1
    assert torch.equal(first.matrix, again.matrix)
    assert torch.equal(first.mean, again.mean)
    (path,) = (tmp_path / "new").iterdir()  # and no file half written beside it

    y = x.clone()
    y[3, 2] += 1e-3
    ZCA.fitted(y, folder=tmp_path / "new")
    ZCA.fitted(x, folder=tmp_path / "new", bias=0.2)
    assert len(fits) == 3

    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-30], b"PK\x03\x04" + bytes(200)):
        path.write_bytes(damaged)
        assert torch.equal(ZCA.fitted(x, folder=tmp_path / "new").matrix, first.matrix)
    assert len(fits) == 7
    # A file of other data under this name is not taken for it.
    other = ZCA.fitted(y, folder=tmp_path / "other")
    path.write_bytes(next((tmp_path / "other").iterdir()).read_bytes())
    assert torch.equal(ZCA.fitted(x, folder=tmp_path / "new").matrix, first.matrix)
    assert not torch.equal(other.matrix, first.matrix)


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        ZCA.fitted(torch.rand(9, 3), folder=tmp_path / "file")


def test_chunks_do_not_matter(monkeypatch):
    x = torch.rand(23, 4)
    whole = ZCA.fit(x)
    monkeypatch.setattr(whitening, "CHUNK", 5)
    torch.testing.assert_close(ZCA.fit(x).matrix, whole.matrix)
    torch.testing.assert_close(ZCA.fit(x)(x), whole(x))


# Files that are not what they should be


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_python_batch_is_executed(batches, tmp_path, monkeypatch, protocol):
    place = write(tmp_path, "python", batches)
    harm = pickle.dumps({b"labels": [0] * SAMPLES, b"data": Harm(str(tmp_path / "harm"))}, protocol=protocol)
    (place / "data_batch_2").write_bytes(harm)
    with pytest.raises(ValueError, match="data_batch_2 is not CIFAR-10's file: its MD5"):
        CIFAR10(str(tmp_path))
    md5 = hashlib.md5(harm).hexdigest()
    passed = [(n, md5 if n == "data_batch_2" else m, s) for n, m, s in CIFAR10.layout.batches]
    # even if somebody got past the checksum
    monkeypatch.setattr(CIFAR10, "layout", replace(CIFAR10.layout, batches=tuple(passed)))
    with pytest.raises(ValueError, match=r"data_batch_2 is not a Python batch .* it asks for .*\.mkdir"):
        CIFAR10(str(tmp_path))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "it holds list, expected dict"),
        (pickle.dumps({"data": 1, "labels": []}), "data must be uint8 .*, got int"),
        (python_batch(np.zeros((3, 3072), np.uint8), np.zeros(3, int)), r"got uint8 \(3, 3072\)"),
        (python_batch(np.zeros((SAMPLES, 3072), np.uint8), np.zeros(3, int)), "labels must be a list of 20"),
        (
            python_batch(np.zeros((SAMPLES, 3072), np.uint8), np.full(SAMPLES, 10)),
            "labels must be from 0 to 9",
        ),
        (
            python_batch(np.zeros((SAMPLES, 3072), np.uint8), np.zeros(SAMPLES, int))[:-50],
            "is not a Python batch",
        ),
        (b"", "is not a Python batch"),
    ],
)
def test_python_batches_that_are_none(batches, content, message):
    with pytest.raises(ValueError, match=message):
        cifar10.parse_python(content, "name", SAMPLES, LAYOUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-1], "data_batch_3.bin is not a batch of CIFAR-10: it has 61459 bytes, expected 61460"),
        (lambda c: c + b"\x00", "it has 61461 bytes"),
        (lambda c: bytes([10]) + c[1:], "labels must be from 0 to 9, got 0 to 10"),
        (lambda c: bytes([(c[0] + 1) % 10]) + c[1:], "does not hold CIFAR-10: its training batches have"),
    ],
)
def test_binary_batches_that_are_none(batches, tmp_path, change, message):
    path = write(tmp_path, "binary", batches) / "data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        CIFAR10(str(tmp_path))


@pytest.mark.parametrize("form", ["python", "binary"])
def test_missing_and_damaged_files(batches, tmp_path, form):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .* data_dir .* download"):
        CIFAR10(str(tmp_path))
    place = write(tmp_path, form, batches)
    next(place.glob("test_batch*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"test_batch.* is not in .*, which has other batches"):
        CIFAR10(str(tmp_path))
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", form, batches, "archive")
    path = tmp_path / "other" / LAYOUT.forms[form][1]
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"tar.gz is not CIFAR-10's file: its MD5"):
        CIFAR10(str(tmp_path / "other"))


def test_download(batches, cache, monkeypatch, tmp_path):
    """The transport is that of MNIST, whose tests have a server; here, what is asked for and what is done with it."""
    _, archive, _ = LAYOUT.forms["binary"]

    def fetch(name, urls, target, *, check):
        assert urls == [f"{mirror}{archive}" for mirror in cifar10.MIRRORS]
        target.parent.mkdir(parents=True)
        write(target.parent, "binary", batches, "archive")
        check(target)
        (tmp_path / "bad").write_bytes(b"<html>")
        with pytest.raises(ValueError, match="MD5"):
            check(tmp_path / "bad")

    monkeypatch.setattr(cifar10, "download_file", fetch)
    assert len(CIFAR10(download=True, whiten=False).x_test) == SAMPLES
    monkeypatch.setattr(cifar10, "download_file", None)
    assert len(CIFAR10(download=True, whiten=False).x_test) == SAMPLES  # it is in the cache now
    assert (cache / archive).exists()


# CIFAR-100, whose samples have two labels


@pytest.fixture
def hundred(monkeypatch, tmp_path):
    """Two small files of CIFAR-100 in each form: name -> (pixels, coarse labels, fine labels)."""
    rng = np.random.default_rng(1)
    made, batches = {}, []
    for name, samples in (("train", 200), ("test", 100)):
        fine = rng.permutation(np.arange(samples) % 100)
        made[name] = rng.integers(0, 256, (samples, 3072), dtype=np.uint8), fine // 5, fine
        pixels, coarse, fine = made[name]
        batch = {b"data": pixels, b"coarse_labels": coarse.tolist(), b"fine_labels": fine.tolist()}
        python = pickle.dumps(batch, protocol=2)
        batches.append((name, hashlib.md5(python).hexdigest(), samples))
        binary = np.concatenate([np.stack([coarse, fine], 1).astype(np.uint8), pixels], 1).tobytes()
        for form, file, content in (("python", name, python), ("binary", f"{name}.bin", binary)):
            place = tmp_path / form / CIFAR100.layout.forms[form][0]
            place.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(content)
    monkeypatch.setattr(CIFAR100, "layout", replace(CIFAR100.layout, batches=tuple(batches)))
    return made


@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar100_has_the_fine_labels(hundred, tmp_path, form):
    data = CIFAR100(str(tmp_path / form), num_labels=100, whiten=False, contrast=True)
    pixels, _, fine = hundred["train"]
    raw = torch.from_numpy(pixels).float()
    torch.testing.assert_close(data.x_unlabelled, normalise_contrast(raw))
    np.testing.assert_array_equal(data.y_test.numpy(), hundred["test"][2])
    np.testing.assert_array_equal(CIFAR100(str(tmp_path / form), whiten=False).y_labelled.numpy(), fine)
    assert torch.bincount(data.y_labelled).tolist() == [1] * 100


def test_cifar100_says_its_name(hundred, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-100 is not in .*cifar-100-binary.tar.gz"):
        CIFAR100(str(tmp_path))
    path = tmp_path / "binary" / "cifar-100-binary" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a batch of CIFAR-100: it has 614799 bytes, expected 614800"):
        CIFAR100(str(tmp_path / "binary"))

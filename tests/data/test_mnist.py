import gzip
import hashlib
import http.server
import struct
import threading

import numpy as np
import pytest
import torch

from ladderfast.data import MNIST, mnist


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def contents(monkeypatch):
    """Four small files that stand for MNIST's, with checksums to match: name -> unpacked bytes."""
    rng = np.random.default_rng(0)
    files = {}
    for name, _ in mnist.FILES:
        size = 40 if "train" in name else 8
        shape = (size, 28, 28) if "images" in name else (size,)
        array = rng.integers(0, 256, shape, dtype=np.uint8)
        files[name] = idx(array if "images" in name else (np.arange(size) % 10).astype(np.uint8))
    monkeypatch.setattr(mnist, "FILES", tuple((n, hashlib.md5(c).hexdigest()) for n, c in files.items()))
    return files


@pytest.fixture
def folder(contents, tmp_path):
    for name, content in contents.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    return tmp_path


def check(data):
    assert data.x_unlabelled.shape == (40, 784)
    assert data.x_test.shape == (8, 784)
    assert data.x_unlabelled.dtype == torch.float32
    assert data.y_labelled.dtype == torch.int64
    assert data.image_shape == (28, 28)


@pytest.mark.parametrize("style", ["{}.gz", "{}", "dotted", "dotted.gz"])
def test_the_usual_names_packed_or_not(contents, tmp_path, style):
    for name, content in contents.items():
        path = tmp_path / style.replace("dotted", name.replace("-idx", ".idx")).format(name)
        path.write_bytes(gzip.compress(content) if style.endswith("gz") else content)
    data = MNIST(str(tmp_path), num_labels=20)
    check(data)
    pixels = np.frombuffer(contents["train-images-idx3-ubyte"], np.uint8, offset=16).reshape(40, 784)
    np.testing.assert_array_equal(data.x_unlabelled.numpy(), pixels.astype(np.float32) / np.float32(255))
    assert torch.bincount(data.y_labelled).tolist() == [2] * 10


def test_unpacked_bytes_in_a_file_called_gz_are_told_apart(contents, folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(contents["train-labels-idx1-ubyte"])
    with pytest.raises(ValueError, match="is not a gzip file"):
        MNIST(str(folder))


def test_a_missing_file_is_named_with_the_place_and_the_way_out(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte") as caught:
        MNIST(str(folder))
    assert str(folder) in str(caught.value)
    assert "data_dir" in str(caught.value)
    assert "download" in str(caught.value)


def test_no_folder_means_the_cache(monkeypatch, folder, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="cache/ladderfast/mnist"):
        MNIST()
    (tmp_path / "cache" / "ladderfast").mkdir(parents=True)
    (tmp_path / "cache" / "ladderfast" / "mnist").symlink_to(folder)
    check(MNIST())


@pytest.mark.parametrize("keep", [1, 5, 20, 200, -1, -9])  # within gzip's header, its data, its checksum
def test_a_truncated_gzip_is_named(folder, keep):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is (truncated|not)"):
        MNIST(str(folder))


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "not an IDX file"), (9, "truncated"), (16, "truncated"), (-1, "truncated")]
)
def test_a_truncated_plain_file_is_named(contents, folder, keep, message):
    (folder / "train-images-idx3-ubyte").write_bytes(contents["train-images-idx3-ubyte"][:keep])
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte is .*{message}|{message}"):
        MNIST(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"<html>not found</html>", "not an IDX file of bytes"),
        (lambda c: b"\x00\x00\x0d" + c[3:], "not an IDX file of bytes"),
        (lambda c: c + b"\x00", "1 bytes more than its header asks for"),
        (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "is not MNIST's file: the MD5"),
        (lambda c: idx(np.zeros((40, 28, 28), np.uint8)), "is not MNIST's file: the MD5"),
    ],
)
def test_foreign_files_are_refused(contents, folder, change, message):
    name = "train-images-idx3-ubyte"
    (folder / f"{name}.gz").write_bytes(gzip.compress(change(contents[name])))
    with pytest.raises(ValueError, match=message) as caught:
        MNIST(str(folder))
    assert name in str(caught.value)


@pytest.fixture
def mirror(tmp_path):
    """A web server on this machine: the folder it serves, and its address."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(served), **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield served, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_download_goes_on_to_the_next_mirror_and_checks_what_comes(contents, mirror, tmp_path, monkeypatch):
    served, address = mirror
    (served / "bad").mkdir()
    for name, content in contents.items():
        (served / f"{name}.gz").write_bytes(gzip.compress(content))
        (served / "bad" / f"{name}.gz").write_bytes(gzip.compress(content[:-1] + b"\xff"))
    monkeypatch.setattr(mnist, "MIRRORS", (f"{address}none/", f"{address}bad/", address))
    target = tmp_path / "new" / "folder"
    check(MNIST(str(target), download=True))
    assert sorted(p.name for p in target.iterdir()) == sorted(f"{name}.gz" for name in contents)
    check(MNIST(str(target)))


def test_a_failed_download_names_every_mirror_and_leaves_nothing(contents, mirror, tmp_path, monkeypatch):
    served, address = mirror
    (served / "train-images-idx3-ubyte.gz").write_bytes(b"<html>busy</html>")
    monkeypatch.setattr(mnist, "MIRRORS", (f"{address}none/", address))
    with pytest.raises(OSError, match="could not download train-images-idx3-ubyte") as caught:
        MNIST(str(tmp_path / "new"), download=True)
    assert f"{address}none/train-images-idx3-ubyte.gz (404" in str(caught.value)
    assert "not an IDX file" in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_padding_makes_images_of_32_by_32(folder):
    plain, data = MNIST(str(folder)), MNIST(str(folder), padding=2)
    assert data.image_shape == (32, 32)
    for x, small in ((data.x_unlabelled, plain.x_unlabelled), (data.x_test, plain.x_test)):
        x = x.reshape(-1, 32, 32)
        assert torch.equal(x[:, 2:-2, 2:-2].flatten(1), small)
        assert float(x.sum()) == pytest.approx(float(small.sum()))
    with pytest.raises(ValueError, match="padding must not be negative, got -1"):
        MNIST(str(folder), padding=-1)

"""`ladderfast info`: which backend each op takes on each device, and why not the others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import ladderfast
from ladderfast import _extension, info, ops
from ladderfast.ops import backend


def test_it_knows_every_op():
    assert set(info.OPS) == set(ops.__all__)


def test_versions_and_what_was_built():
    """As a program of its own, which is how one runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "ladderfast.info"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"ladderfast        {ladderfast.__version__}" in lines
    assert f"torch             {torch.__version__}" in lines
    assert any(line.startswith("GPU ") for line in lines)
    built = _extension.module
    if built is not None:
        assert f"extension         built against torch {built.torch_version} with {built.compiler}" in lines
        assert f"CPU kernels       in use: {built.instruction_set()}, of avx512, avx2, baseline" in lines


def test_cuda_architectures(monkeypatch):
    class Built:
        cuda, cuda_architectures, cuda_version = True, "8.0;9.0+PTX", "13.0"
        torch_version, compiler = torch.__version__, "a compiler"

        @staticmethod
        def instruction_set():
            return "avx2"

    monkeypatch.setattr(_extension, "module", Built)
    text = "\n".join(info._extension_lines())
    assert "CUDA kernels      for 8.0;9.0+PTX, CUDA 13.0" in text
    assert "in use: avx2" in text


def test_every_backend_but_the_chosen_one_has_its_reason():
    text = info.text()
    block = text.split("  on cpu, float32: ")[1].split("  on cpu, float64: ")[0]
    chosen = backend.choose("gaussian_combinator", "cpu", torch.float32)
    assert block.startswith(chosen)
    for name in set(backend.NAMES) - {chosen}:
        reason = backend.unavailable(name, "cpu", torch.float32)
        assert f"not {name}: {reason or 'it would serve, but slower'}" in block


def test_ops_that_fare_otherwise_stand_apart(monkeypatch):
    choose = backend.choose
    monkeypatch.setattr(
        backend, "choose", lambda op, *rest: "reference" if op == "soft_pool2d" else choose(op, *rest)
    )
    chosen = choose("soft_pool2d", "cpu", torch.float32)
    block = info.text().split("  on cpu, float64: ")[0]
    if chosen != "reference":
        assert "  on cpu, float32: reference\n    soft_pool2d\n" in block
        assert "not cpu: it would serve" in block.split("    soft_pool2d\n")[1]


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_what_is_forced(name):
    with ladderfast.use_backend(name):
        text = info.text()
    assert f"backends          forced: {name}" in text
    if name == "triton" and backend.unavailable("triton", "cpu", torch.float64):
        assert "the forced backend 'triton' cannot serve this call" in text


def test_the_autograd_nodes_are_there():
    """Their own tests are skipped without them: that they do not build or do not fit their ops is to show here."""
    if _extension.module is None or _extension.module.torch_version != torch.__version__:
        pytest.skip("no extension, or one of another torch")
    assert _extension.nodes is not None, _extension.nodes_reason


def test_an_extension_of_other_sources_is_none(monkeypatch):
    monkeypatch.setattr(_extension, "module", _extension.module)
    monkeypatch.setattr(_extension, "reason", _extension.reason)
    if _extension.module is None:
        pytest.skip("there is no extension")

    @_extension.register_fake("an_op_of_tomorrow")
    def fake(x):
        return x

    assert fake(3) == 3
    assert "it lacks an_op_of_tomorrow; build it again" in info.text()
    assert backend.choose("gaussian_combinator", "cpu", torch.float32) == "reference"

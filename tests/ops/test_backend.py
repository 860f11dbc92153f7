"""Choosing and forcing backends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, gaussian_combinator

Z = torch.zeros(2, 3)
PARAMS = torch.zeros(10, 3)


def test_the_fastest_available_is_chosen():
    expected = "cpu" if _extension.module is not None else "reference"
    assert backend.choose("op", "cpu", torch.float32) == expected
    assert backend.choose("op", "cpu", torch.bfloat16) == "reference"
    assert backend.choose("op", "meta", torch.float32) == "reference"


def test_forced_for_a_block_and_for_good():
    assert backend.choose("op", "cpu", torch.float64) != "reference" or _extension.module is None
    with ladderfast.use_backend("reference"):
        assert backend.choose("op", "cpu", torch.float64) == "reference"
        with ladderfast.use_backend(None):
            assert backend._forced is None
        assert backend._forced == "reference"
    assert backend._forced is None
    ladderfast.use_backend("reference")
    assert backend._forced == "reference"
    ladderfast.use_backend(None)
    assert backend._forced is None


def test_a_forced_backend_that_cannot_serve_says_why():
    with (
        ladderfast.use_backend("cuda"),
        pytest.raises(RuntimeError, match="forced backend 'cuda' cannot serve"),
    ):
        gaussian_combinator(Z, Z, PARAMS)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_a_forced_backend_names_the_dtype():
    half = Z.bfloat16()
    with (
        ladderfast.use_backend("cpu"),
        pytest.raises(RuntimeError, match="float32 and float64, not bfloat16"),
    ):
        gaussian_combinator(half, half, PARAMS)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="no backend 'gpu'; choose one of reference, cpu, triton, cuda"):
        ladderfast.use_backend("gpu")


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_forces_a_backend():
    code = (
        "from ladderfast.ops import backend; import torch; print(backend.choose('op', 'cpu', torch.float32))"
    )
    assert _python(code, LADDERFAST_BACKEND="reference").stdout.strip() == "reference"
    assert "LADDERFAST_BACKEND: there is no backend 'fast'" in _python(code, LADDERFAST_BACKEND="fast").stderr


def test_import_prints_nothing_and_pulls_in_no_training_library():
    code = (
        "import ladderfast, ladderfast.ops, ladderfast.nn, ladderfast.models, sys\n"
        "heavy = {'lightning', 'lightning_fabric', 'matplotlib', 'sklearn', 'scipy', 'tensorboard', 'jsonargparse'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = _python(code, LADDERFAST_BACKEND="nonsense")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_the_extension_the_reference_serves():
    code = (
        "import sys; sys.modules['ladderfast._C'] = None\n"
        "import torch, ladderfast\n"
        "from ladderfast.ops import backend, gaussian_combinator\n"
        "z = torch.randn(4, 3, requires_grad=True)\n"
        "gaussian_combinator(z, z, torch.randn(10, 3)).sum().backward()\n"
        "print(backend.choose('op', 'cpu', torch.float32), backend.unavailable('cpu', 'cpu', torch.float32))\n"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference the extension was not built")

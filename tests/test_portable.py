"""The CPU kernels compile without anything that is x86-64's, as for aarch64 or with clang."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cpu").glob("*.cpp"))
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_for_other_processors(source: Path, tmp_path: Path):
    made = tmp_path / "kernel.o"
    command = [str(COMPILER), "-std=c++20", "-O0", "-Wall", "-Werror", "-DLF_MULTI_ISA=0", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = made.read_bytes()
    assert b"6avx512" not in names  # as a mangled name has a namespace
    assert b"4avx2" not in names


def test_there_are_kernels():
    assert len(SOURCES) > 5

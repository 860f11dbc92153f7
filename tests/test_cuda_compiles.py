"""Everything in csrc/cuda compiles for sm_80 and sm_90 without a warning, a register spill or a stack frame."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")

# One entry of ptxas' report: a kernel, its architecture, its use of local memory.
_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def local_memory(report: str) -> tuple[set[str], list[str]]:
    """The architectures in a report, and a line for each kernel that keeps something in local memory."""
    entries = [m.groupdict() for m in _ENTRY.finditer(report)]
    return {e["arch"] for e in entries}, [
        f"{e['kernel']} for sm_{e['arch']}: {e['stores']} bytes stored and {e['loads']} loaded in spills, "
        f"{e['stack']} bytes of stack"
        for e in entries
        if any(int(e[key]) for key in ("stack", "stores", "loads"))
    ]


def test_report_is_read():
    """A report as ptxas writes it, with one kernel that spills."""
    kernel = "ptxas info    : Compiling entry function '{}' for 'sm_90'\nptxas info    : Function properties for {}\n"
    figures = "    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    report = kernel.format("good", "good") + figures.format(0, 0, 0) + kernel.format("bad", "bad")
    found, spills = local_memory(report + figures.format(16, 12, 20))
    assert found == {"90"}
    assert spills == ["bad for sm_90: 12 bytes stored and 20 loaded in spills, 16 bytes of stack"]


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path):
    command = [str(nvcc()), "-c", "-O3", "-std=c++17", "--resource-usage", "--threads", "2"]
    command += ["-Xcompiler", "-Wall,-Werror", "-Werror", "all-warnings"]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    found, spills = local_memory(report)
    assert found == set(ARCHITECTURES)
    assert not spills, "\n".join(spills)


@pytest.mark.skipif(nvcc() is None, reason="needs the CUDA headers")
def test_the_binding_compiles_with_cuda(tmp_path: Path):
    """csrc/ops.cpp with its CUDA half, against CPU torch's headers and CUDA's."""
    from torch.utils.cpp_extension import include_paths

    dry_run = subprocess.run(
        [nvcc(), "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"TOP=(\S+)", dry_run.stderr + dry_run.stdout)
    assert top, dry_run.stderr
    includes = [*include_paths(), str(SOURCES[0].parents[1]), os.path.join(top[1], "include")]
    command = [
        "g++",
        "-fsyntax-only",
        "-std=c++20",
        "-Wall",
        "-Werror",
        "-DUSE_CUDA",
        "-DLADDERFAST_WITH_CUDA",
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-isystem{path}" for path in includes)]
    result = subprocess.run(
        [*command, str(SOURCES[0].parents[1] / "ops.cpp")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr

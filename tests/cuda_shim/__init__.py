"""Runs csrc/cuda on the host: compiles a kernel's source with g++ against the headers here and calls it by ctypes.

See README.md beside this file for what is checked and how a test is written.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Codes of the dtypes in the contracts of the kernels.
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"

_CHECKS = "alignment,bounds-strict,null,shift,signed-integer-overflow,integer-divide-by-zero"
_FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas",
    f"-I{HERE / 'include'}",
]


class LaunchError(AssertionError):
    """A kernel did what it must not: the message names thread, place and fault."""


class Library:
    """A compiled kernel source; its extern "C" functions are called through `call`."""

    def __init__(self, path: Path) -> None:
        lib = self.lib = ctypes.CDLL(str(path))
        lib.cuda_shim_allocate.restype = ctypes.c_void_p
        lib.cuda_shim_message.restype = ctypes.c_char_p
        lib.cuda_shim_overrun.restype = ctypes.c_char_p
        lib.cuda_shim_blocks.restype = ctypes.c_int64

    def call(self, function: str, *arguments: Any, restype: type = ctypes.c_int) -> int:
        """Call `function`; tensors go as pointers, Python ints as C int, ctypes objects as they are.

        A failed launch raises LaunchError; other return values are handed back. Afterwards the bytes around
        every buffer of this library must be untouched.
        """
        f = getattr(self.lib, function)
        f.restype = restype
        result = f(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))
        message = self.lib.cuda_shim_message().decode()
        if message:
            raise LaunchError(message)
        overrun = self.lib.cuda_shim_overrun().decode()
        if overrun:
            raise LaunchError(f"{function} wrote beside {overrun}")
        return result

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, name: str = "output", misalignment: int = 0
    ) -> Tensor:
        """Guarded memory full of NaN, `misalignment` bytes off a multiple of 16."""
        count = torch.Size(shape).numel()
        bytes_ = count * torch.empty((), dtype=dtype).element_size()
        address = self.lib.cuda_shim_allocate(
            ctypes.c_size_t(bytes_), ctypes.c_size_t(misalignment), name.encode()
        )
        buffer = (ctypes.c_byte * bytes_).from_address(address)
        weakref.finalize(buffer, self.lib.cuda_shim_free, ctypes.c_void_p(address)).atexit = False
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def copy(self, tensor: Tensor, *, name: str = "input", misalignment: int = 0) -> Tensor:
        """A packed copy in guarded memory that kernels can only read."""
        copy = self.empty(tuple(tensor.shape), tensor.dtype, name=name, misalignment=misalignment)
        copy.copy_(tensor)
        if tensor.numel():
            self.lib.cuda_shim_read_only(ctypes.c_void_p(copy.data_ptr()))
        return copy

    @contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Blocks, and threads between two barriers, run in an order drawn from `seed` (0: the natural one)."""
        self.lib.cuda_shim_order(ctypes.c_uint64(seed))
        try:
            yield
        finally:
            self.lib.cuda_shim_order(ctypes.c_uint64(0))

    def blocks(self) -> int:
        """Blocks run so far."""
        return self.lib.cuda_shim_blocks()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")


@cache
def load(source: str | Path) -> Library:
    """Compile a source (a path, or a stem of csrc/cuda) for the host and load it.

    The library stays in build/cuda_shim under the hash of all that it is made of.
    """
    path = Path(source) if Path(source).suffix else SOURCES / f"{source}.cu"
    gxx = compiler()
    if gxx is None:
        raise RuntimeError("the CUDA shim needs g++ to compile kernels for the host")
    ingredients = [path, *sorted(HERE.glob("include/*")), HERE / "shim.cpp"]
    ingredients += sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))
    digest = hashlib.sha256(subprocess.run([gxx, "--version"], capture_output=True, check=True).stdout)
    digest.update(" ".join([*_FLAGS, _CHECKS]).encode())
    for ingredient in ingredients:
        digest.update(ingredient.read_bytes())
    folder = ROOT / "build" / "cuda_shim"
    library = folder / f"{path.stem}-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{path.stem}-{'[0-9a-f]' * 20}.so"):
            stale.unlink(missing_ok=True)
        _build(gxx, path, library)
    return Library(library)


def _build(gxx: str, source: Path, library: Path) -> None:
    stem = library.with_name(f"{library.stem}-{os.getpid()}")
    kernel, shim, linked = (stem.with_suffix(s) for s in (".kernel.o", ".shim.o", ".linked.so"))
    checks = [f"-fsanitize={_CHECKS}", "-fno-sanitize-recover=all"]
    prelude = ["-include", "ptx_host.h", f"-I{source.parent}", f"-I{SOURCES}"]
    commands = [
        [gxx, *_FLAGS, *checks, *prelude, "-x", "c++", "-c", str(source), "-o", str(kernel)],
        [gxx, *_FLAGS, "-c", str(HERE / "shim.cpp"), "-o", str(shim)],
    ]
    processes = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [p.communicate()[1] for p in processes]
    for process, error in zip(processes, errors, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for the host:\n{error}")
    # Linked without -fsanitize: the handlers are the shim's own.
    subprocess.run([gxx, "-shared", "-Wl,-Bsymbolic", "-o", str(linked), str(kernel), str(shim)], check=True)
    linked.replace(library)
    kernel.unlink()
    shim.unlink()


needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs g++ to compile kernels for the host")

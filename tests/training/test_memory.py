"""keep_memory, where it changes a whole process in one of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ladderfast.training import memory

FAULTS = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        p = c.malloc(64 << 20)
        c.memset(p, 1, 64 << 20)
        c.free(p)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), memory.keep_memory())
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_find_the_memory_of_those_before():
    environment = {k: v for k, v in os.environ.items() if k not in memory._SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, memory.__file__],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    before, kept, after = done.stdout.split()
    assert kept == "True"
    assert int(before) > 100, "glibc gives large blocks back by itself"
    assert int(after) < int(before) / 100


@pytest.mark.parametrize("name", memory._SETTINGS)
def test_the_users_settings_stay(monkeypatch, name):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: pytest.fail("mallopt was looked for"))
    monkeypatch.setenv(name, "131072")
    assert memory.keep_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch):
    for name in memory._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert memory.keep_memory() is False

"""What the tests of Tagger's ops share: element types, the structures of csrc/tagger.h, what is spared."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-scalar-float32"),
    pytest.param(torch.float16, torch.float16, id="float16"),
]
EMPTY = [(0, 2, 3, 1), (2, 3, 0, 2), (0, 3, 4, 0)]


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "groups", "pixels", "seeds")]


class Input(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("group", ctypes.c_int64)]


class Inputs(ctypes.Structure):
    _fields_ = [("x", Input), ("z", Input), ("m", Input), ("scalar", ctypes.c_void_p)]


def view(t: Tensor) -> Input:
    return Input(t.data_ptr(), t.stride(0), t.stride(1) if t.dim() == 3 else 0)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def spare_the_interpreter(target, too_slow: bool) -> None:
    """Triton's interpreter takes about a millisecond for each operation of each program."""
    if too_slow and (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("slow in Triton's interpreter, which runs smaller cases of this test")

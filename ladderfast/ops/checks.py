"""What the public functions of all ops check alike."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)  # what autocast leaves as it is


def shape_text(t: Tensor) -> str:
    return str(tuple(t.shape))


def shaped(a: object, b: object, c: object) -> bool:
    """Whether they are tensors that have a shape, as a nested one has none."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and isinstance(c, Tensor)
        and not (a.is_nested or b.is_nested or c.is_nested)
    )


def check_dtype(op: str, name: str, t: object) -> None:
    """A tensor of a floating dtype that the ops know, or a TypeError."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16; got {t.dtype}")
    if t.is_nested or t.layout is not torch.strided:
        check_dense(f"{op}: {name}", t)


def check_dense(name: str, t: Tensor) -> None:
    """TypeError unless t is dense, which a nested tensor's layout may say of itself too."""
    if t.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got a nested one")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got one with layout {t.layout}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {type(value).__name__}")


def check_number(name: str, value: object) -> None:
    """A number of Python's, or a TypeError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """A number of Python's, finite and not negative, or a TypeError or ValueError."""
    check_number(name, value)
    if not (finite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative; got {value}")


def finite(value: float) -> bool:
    """Whether a float holds it and it is finite: a whole number of Python's may be too large."""
    return abs(value) <= sys.float_info.max


def autocast_promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in the widest of their dtypes; otherwise as they are."""
    first = tensors[0]
    device = first.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = first.dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def autocast_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in the widest of their dtypes, float32 at least; otherwise as they are."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)

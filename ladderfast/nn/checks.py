"""What modules check alike of their sizes and of what they are given."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ladderfast.checks import check_whole
from ladderfast.ops.checks import check_dense


def whole(name: str, value: Any) -> int:
    check_whole(name, value)
    return operator.index(value)


def positive(name: str, value: Any) -> int:
    if (number := whole(name, value)) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return number


def odd(name: str, value: Any) -> int:
    if (number := whole(name, value)) < 1 or number % 2 == 0:
        raise ValueError(f"{name} must be odd and positive, got {value}")
    return number


def one_or_pair(name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        raise ValueError(f"{name} must be one number or a pair, got {value}")
    return tuple(positive(name, v) for v in values)


def sample_shape(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a sequence (C, *) of whole numbers, got {value!r}")
    return tuple(positive(f"each size in {name}", size) for size in value)


def check_step(step: Any) -> None:
    check_whole("step", step)
    if step < 0:  # which would count from the end
        raise ValueError(f"step must not be negative, got {step}")


def check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_dtype_of(weight: Tensor, name: str, t: Any) -> None:
    """TypeError unless t is a dense tensor of the weight's dtype; under autocast of any."""
    check_tensor(name, t)
    check_dense(name, t)
    if t.dtype != weight.dtype and not autocasts(t.device.type):
        raise TypeError(f"{name} must have the dtype of the weights, {weight.dtype}, got {t.dtype}")


def cell_inputs(x: Any, count: int, weight: Tensor) -> Sequence[Tensor | None]:
    """What a cell is given: a tensor, or a pair of which the second may be None."""
    inputs = (x,) if isinstance(x, Tensor) else x
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(f"x must be a tensor or a pair of tensors, got {type(x).__name__}")
    if len(inputs) != count:
        raise ValueError(f"the cell takes {count} inputs, got {len(inputs)}")
    if inputs[0] is None:
        raise TypeError("the first input must be a tensor, got None")
    for t in inputs:
        if t is not None:
            check_dtype_of(weight, "an input", t)
    return inputs

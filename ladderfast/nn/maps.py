"""What encoder and decoder layers share about their linear maps and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ladderfast.nn.checks import autocasts, check_tensor

HALF = (torch.bfloat16, torch.float16)


def apply_map(linear: nn.Module, x: Tensor) -> Tensor:
    """The map in the type of its weight, or autocast's."""
    check_tensor("x", x)
    weight = getattr(linear, "weight", None)
    if weight is not None and x.dtype != weight.dtype and not autocasts(x.device.type):
        x = x.to(weight.dtype)
    y: Tensor = linear(x)
    return y


def for_op(v: Tensor, x: Tensor) -> Tensor:
    """A parameter in a dtype that the ops take beside x."""
    return v if v.dtype == x.dtype or x.dtype in HALF else v.to(x.dtype)


def op_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a Ladder's layers hand to their ops: on a CPU the kernels do not take float16."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype

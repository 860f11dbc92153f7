"""What encoder and decoder layers share about their linear maps and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def apply_map(linear: nn.Module, x: Tensor) -> Tensor:
    """The map in the type of its weight, or autocast's."""
    weight = getattr(linear, "weight", None)
    y: Tensor = linear(x if weight is None else x.to(weight.dtype))
    return y


def for_op(v: Tensor, x: Tensor) -> Tensor:
    """A parameter in a dtype that the ops take beside x."""
    return v if v.dtype == x.dtype or x.dtype in HALF else v.to(x.dtype)


def op_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the ops shall compute in: on a CPU the kernels take float32 and wider."""
    return torch.float32 if dtype in HALF and device.type == "cpu" else dtype

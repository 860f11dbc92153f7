"""What networks check alike of what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ladderfast.checks import check_whole


def check_floating(name: str, t: Any) -> None:
    """TypeError unless t is a tensor of a floating-point dtype."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def check_input(name: str, t: Any, network: nn.Module, *, half: bool = False) -> None:
    """TypeError unless t is a floating-point tensor that fits the dtype of the network's parameters.

    half: the network takes input in 16 or 32 bits whichever of them its parameters have, as all do under autocast.
    """
    check_floating(name, t)
    dtype = next((p.dtype for p in network.parameters()), t.dtype)
    if not _fits(t, dtype, half):
        raise TypeError(f"{name} must be {dtype}, as the network's parameters are, got {t.dtype}")


def check_like(name: str, t: Any, x: Tensor, *, half: bool = False) -> None:
    """TypeError unless t is a tensor on x's device and of its dtype, or of one that autocast takes beside it.

    half: of 16 or 32 bits whichever of them x has.
    """
    check_floating(name, t)
    if t.device != x.device or not _fits(t, x.dtype, half):
        raise TypeError(f"{name} must be {x.dtype} on {x.device}, as x is, got {t.dtype} on {t.device}")


def _fits(t: Tensor, dtype: torch.dtype, half: bool = False) -> bool:
    if t.dtype == dtype:
        return True
    half = half or torch.is_autocast_enabled(t.device.type)
    return half and torch.float64 not in (t.dtype, dtype)


def check_state(name: str, tensors: Any, count: int, shape: tuple[int, ...], x: Tensor) -> None:
    """TypeError or ValueError unless it is none or `count` tensors of that shape, on x's device."""
    if len(tensors) not in (0, count):
        raise ValueError(f"{name} must hold {count} tensors, got {len(tensors)}")
    for t in tensors:
        check_like(name, t, x, half=True)
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")


def check_sizes(name: str, sizes: Any, wanted: str, most: int | None = None) -> None:
    """TypeError or ValueError unless they are 1 to `most` sizes of at least 1. wanted: what they are, in words."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name} must be {wanted}, got {sizes!r}")
    for size in sizes:
        check_whole(f"an entry of {name}", size)
    if not 1 <= len(sizes) <= (most or len(sizes)) or min(sizes) < 1:
        raise ValueError(f"{name} must be {wanted}, each at least 1, got {tuple(sizes)}")


def check_num_classes(num_classes: Any) -> None:
    """TypeError or ValueError unless it is a number of classes, or 0 for none."""
    check_whole("num_classes", num_classes)
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 or positive, got {num_classes}")


def check_mask(mask: Any, x: Tensor) -> None:
    """TypeError or ValueError unless mask is bool, (N, T) of x (N, T, *)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor or None, got {type(mask).__name__}")
    if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of shape {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}"
        )

"""Images copied between the two layouts in memory: contiguous, and with the channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops.function import apply, known_signature, plain, tangents

if _extension.module is not None:

    @_extension.register_fake("lay_out")
    def _lay_out_fake(to: Tensor, source: Tensor) -> None:
        pass

    @_extension.register_fake("channels_last")
    def _channels_last_fake(t: Tensor) -> Tensor:
        n, c, h, w = t.shape
        return t.new_empty((n, h, w, c)).permute(0, 3, 1, 2)


def channels_last(t: Tensor) -> Tensor:
    """A copy of t (N, C, H, W) with the channels last in memory, also where a single channel leaves that open."""
    if _fast(t) and not (torch.is_grad_enabled() and t.requires_grad):
        return torch.ops.ladderfast.channels_last.default(t)
    # Not by memory_format, which vmap does not know.
    return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _fast(t: Tensor) -> bool:
    return _extension.module is not None and t.device.type == "cpu" and plain() and not tangents()


@known_signature
class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return channels_last(grad)


def with_gradient_channels_last(t: Tensor) -> Tensor:
    """t (N, C, H, W) itself, whose gradient gets the channels last when backward comes to it, and not before.

    Differentiable any number of times; not for transforms of torch.func.
    """
    return apply(_WithGradient, t)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(dim: int, parts: int, *tensors: Tensor) -> Tensor:
        steps = len(tensors) // parts
        sizes = [t.shape[0] for t in tensors[::steps]]
        shape = [sum(sizes), *tensors[0].shape[1:]]
        shape.insert(dim, steps)
        out = tensors[0].new_empty(shape)
        places = (place for part in out.split(sizes, 1 - dim) for place in part.unbind(dim))
        for place, t in zip(places, tensors, strict=True):
            if _fast(t):
                torch.ops.ladderfast.lay_out.default(place, t)
            else:
                place.copy_(t)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim, parts = inputs[:2]
        ctx.sizes = [t.shape[0] for t in inputs[2 :: (len(inputs) - 2) // parts]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = grad.split(ctx.sizes, 1 - ctx.dim)
        return None, None, *(g for part in parts for g in part.unbind(ctx.dim))


def stack_contiguous(parts: list[list[Tensor]], dim: int) -> Tensor:
    """Time steps stacked, contiguous whatever the layout of the tensors; not for transforms of torch.func.

    Args:
        parts: of the samples, one after the other; each has all T steps, (N_part, ...).
        dim: 0 for (T, N, ...), 1 for (N, T, ...).
    """
    return apply(_Stack, dim, len(parts), *(t for part in parts for t in part))

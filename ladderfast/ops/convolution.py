"""Convolutions of many networks at once, on CPUs.

torch.func.vmap makes one grouped convolution of them, which oneDNN computes up to three times slower than as many
ordinary ones. On GPUs, and outside vmap, everything stays torch's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderfast.ops import backend
from ladderfast.ops.function import batch_first, known_signature, plain

Padding = str | int | tuple[int, ...]


def _each(function: Any, size: int, in_dims: Any, tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """function of each network's tensors; what is None stays None."""
    given = [i for i, t in enumerate(tensors) if t is not None]
    moved = batch_first(size, tuple(in_dims[i] for i in given), tuple(tensors[i] for i in given))  # type: ignore[misc]
    results = []
    for own in zip(*moved, strict=True):
        every: list[Tensor | None] = [None] * len(tensors)
        for i, t in zip(given, own, strict=True):
            every[i] = t
        results.append(function(*every))
    return results


def _pull(grad: Tensor, x: Tensor, weight: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    y, pullback = torch.func.vjp(partial(F.conv2d, padding=padding), x, weight)
    grads: tuple[Tensor, Tensor] = pullback(grad.to(y.dtype))  # autocast's, of the forward pass, is over
    return grads


@known_signature
class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.bias, ctx.padding = inputs[2] is not None, inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _Conv2dBackward.apply(grad, x, weight, ctx.padding)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if ctx.bias else None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding
    ) -> Any:
        one = partial(conv2d, padding=padding)
        if in_dims[1] is None and (bias is None or in_dims[2] is None):
            x = x.movedim(in_dims[0], 0)
            return one(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2]), 0
        return torch.stack(_each(one, info.batch_size, in_dims, (x, weight, bias))), 0


@known_signature
class _Conv2dBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        return _pull(grad, x, weight, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.padding = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, pullback = torch.func.vjp(partial(_pull, padding=ctx.padding), *ctx.saved_tensors)
        return *pullback(grads), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor, x: Tensor, weight: Tensor, padding: Padding) -> Any:
        each = _each(
            lambda *own: _Conv2dBackward.apply(*own, padding), info.batch_size, in_dims, (grad, x, weight)
        )
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0) -> Tensor:
    """`torch.nn.functional.conv2d` of x (N, C, H, W) with weight (O, C, h, w) and bias (O,), of stride 1.

    Differentiable any number of times. Under torch.func.vmap on a CPU each network has a convolution of its own, as it
    would have alone, and not its share in a grouped one.
    """
    ordinary = plain() or x.device.type != "cpu" or backend.forced() == "reference"
    if ordinary or torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, padding=padding)
    y: Tensor = _Conv2d.apply(x, weight, bias, padding)
    return y

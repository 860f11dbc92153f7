"""What the autograd functions of all ops share.

Every op is a torch.autograd.Function with setup_context and vmap around registered ops for forward and backward: the
form that torch.func's transforms, torch.compile and plain autograd all accept.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=type[torch.autograd.Function])

_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)
"""Whether a tensor stands for many, as the gradients of `torch.autograd.grad(..., is_grads_batched=True)` do."""


def plain() -> bool:
    """Whether neither torch.compile nor a transform of torch.func looks on."""
    return not (torch.compiler.is_compiling() or _transforms_active())


def packed(x: Tensor, axis: int) -> Tensor:
    """x as the kernels take it: contiguous, or with the axis of the channels last; a copy only where it is neither."""
    if x.is_contiguous() or x.movedim(axis, -1).is_contiguous():
        return x
    return x.contiguous()


def readable(t: Tensor) -> bool:
    """Whether looking at the values costs nothing: those of a tensor on the CPU outside any transform."""
    return t.is_cpu and plain() and type(t) in (Tensor, torch.nn.Parameter)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), which binds the arguments anew and unwraps them at each call for the sake of torch.func's
    transforms: where there are none, this saves 12 us."""
    if plain():
        if not torch.is_grad_enabled():
            return function.forward(*args)
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return function.apply(*args)


def apply_in_backward(function: type[torch.autograd.Function], *args: Any) -> Any:
    """apply(function, *args) in the backward of another function: without a graph where nobody asked for one."""
    if plain() and not torch.is_grad_enabled():
        return function.forward(*args)
    return function.apply(*args)


def known_signature(function: F) -> F:
    """Keep the signature of `forward`, which torch would inspect anew at each call (about 10 us)."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def batch_first(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors with the batch axis of vmap in front, given to those that lack it."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]

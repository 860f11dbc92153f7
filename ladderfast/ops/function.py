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


_ANY = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])


def known_signature(function: F) -> F:
    """Let torch take the arguments of `forward`, which has no defaults, as they are: it would inspect the signature at
    each call and bind them one by one (about 20 us)."""
    forward: Any = function.forward
    forward.__signature__ = _ANY
    return function


def transformed() -> bool:
    """Whether autograd, torch.func or torch.compile watches what is computed now; a registered op may be called as it
    is otherwise, without the autograd.Function around it (about 20 us)."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
    )


def batch_first(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors with the batch axis of vmap in front, given to those that lack it."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]

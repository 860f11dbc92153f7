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


def known_signature(function: F) -> F:
    """Keep the signature of `forward`, which torch would inspect anew at each call (about 10 us)."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def plain_backward() -> bool:
    """Whether a backward pass runs without create_graph, transforms of torch.func and tracing."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def batch_first(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors with the batch axis of vmap in front, given to those that lack it."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]

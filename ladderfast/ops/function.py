"""What the autograd functions of all ops share.

Every op is a torch.autograd.Function with setup_context and vmap around registered ops for forward and backward: the
form that torch.func's transforms, torch.compile and plain autograd all accept. A plain call on the CPU can take a node
in C++ instead (csrc/autograd.cpp), which runs the same two ops.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ladderfast import _extension
from ladderfast.ops import backend

F = TypeVar("F", bound=type[torch.autograd.Function])

_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)
"""Whether a tensor stands for many, as the gradients of `torch.autograd.grad(..., is_grads_batched=True)` do."""


def plain() -> bool:
    """Whether neither torch.compile nor a transform of torch.func looks on."""
    return not (torch.compiler.is_compiling() or _transforms_active())


def tangents() -> bool:
    """Whether there may be tangents, of forward-mode derivatives: a dual level is entered, in whichever thread."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def packed(x: Tensor, axis: int) -> Tensor:
    """x as the kernels take it: contiguous, or with the axis of the channels last; a copy only where it is neither.

    What stands before the axes (N, C, *) are seeds, of which a copy keeps the layout that each has: the noise is
    counted in it.
    """
    if x.is_contiguous() or (last := x.movedim(axis, -1)).is_contiguous():
        return x
    one = (0,) * (axis - 1)
    if axis > 1 and not x[one].is_contiguous() and last[one].is_contiguous():
        return last.contiguous().movedim(-1, axis)
    return x.contiguous()


def readable(t: Tensor) -> bool:
    """Whether looking at the values costs nothing: those of a tensor on the CPU outside any transform."""
    return t.is_cpu and plain() and type(t) in (Tensor, torch.nn.Parameter)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), which binds the arguments anew and unwraps them at each call for the sake of torch.func's
    transforms: where there are none, this saves 12 us."""
    if plain():
        if not (torch.is_grad_enabled() or tangents()):
            return function.forward(*args)
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return function.apply(*args)


def apply_in_backward(function: type[torch.autograd.Function], *args: Any) -> Any:
    """apply(function, *args) in the backward of another function: without a graph where nobody asked for one."""
    if plain() and not (torch.is_grad_enabled() or tangents()):
        return function.forward(*args)
    return function.apply(*args)


class Argument(NamedTuple):
    """A tensor that a node in C++ takes."""

    shape: str
    """Its sizes: numbers, names, of which each means the same size wherever it stands, and * for any number of axes
    more, of which all tensors have the same."""
    packed: bool = False
    """Whether it must be contiguous or have the channels last."""
    constant: bool = False
    """Whether it must not require a gradient."""
    limits: tuple[float, float, bool] | None = None
    """Of a tensor without axes, or a float in its place: the least and the greatest value, and whether it must lie
    strictly between them."""


def node(
    op: str,
    arguments: Sequence[Argument],
    backward_takes: str,
    differentiable: Callable[..., tuple[Tensor | None, ...]],
    *,
    returned: int = 1,
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> Callable[..., Any]:
    """What computes a plain call of `op` on the CPU, and returns None where the call is none or does not fit.

    Args:
        op: the registered op; `op`_backward is the other. It takes the tensors, then bools and positive numbers.
        arguments: the tensors.
        backward_takes: what the backward op takes, separated by spaces: g0 is the gradient of the first result, s0 the
            first of the tensors, which are kept, followed by the results from `returned` on, c0 the first argument
            after the tensors, n0 whether the first tensor needs a gradient. Its results are the gradients of the
            tensors in their order, of which one that is not needed may be anything and constant ones at the end lack.
        differentiable: called as (gradients, kept, numbers, needed) with a tuple each for gradients that are to be
            differentiated, or that a transform of torch.func looks at; returns those or None, in the same order.
        returned: so many results are the caller's; the rest is kept for backward.
        sizes: the least and the greatest of a named size.
    """
    if _extension.nodes is None or _extension.module is None:
        return lambda *args: None
    try:
        return _extension.nodes.define(
            op, op + "_backward", arguments, sizes or {}, returned, backward_takes, differentiable
        )
    except Exception as error:
        # A module of another day beside these files: the package shall load all the same, and info says why without.
        _extension.nodes = None
        _extension.nodes_reason = f"they were built from other sources, build them again: {error}"
        return lambda *args: None


def direct() -> bool:
    """Whether a node in C++ may be asked: the CPU's kernels are wanted, torch.compile does not look on, and no tangents
    are about."""
    return (
        _extension.module is not None
        and backend.forced() in (None, "cpu")
        and not torch.compiler.is_compiling()
        and not tangents()
    )


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

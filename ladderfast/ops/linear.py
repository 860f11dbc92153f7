"""Matrix products of float32 on CPUs on which torch's own are slow.

torch computes them with MKL, which on AMD processors knows no AVX-512: on one that has it, oneDNN, which torch carries
as well, takes half the time. There, products large enough to matter go to oneDNN; everything else stays torch's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.function import apply, batch_first, known_signature

# Multiplications from which on oneDNN's greater cost of a call is made up for.
_LARGE = 1 << 19


@functools.cache
def one_dnn() -> Any:
    """oneDNN's linear map (x, weight, bias, ...), or None where torch's own is as fast."""
    slow = (
        _extension.module is not None
        and _extension.module.cpu_vendor() == "amd"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )
    # Not part of torch's public interface, hence the question whether it is there.
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if slow else None


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() > 1
        and weight.dim() == 2
        and x.numel() * len(weight) >= _LARGE
        and x.shape[-1] == weight.shape[1]
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and backend.forced() in (None, "cpu")
        and one_dnn() is not None
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _dense(t: Tensor) -> Tensor:
    """A matrix whose rows or columns lie one behind the other; a copy where it is neither."""
    return t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous()


@known_signature
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return one_dnn()(_dense(x), _dense(weight), None, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor) -> Any:
        if in_dims[1] is None:
            rows = x.movedim(in_dims[0], 0)
            return linear(rows.flatten(0, 1), weight).unflatten(0, rows.shape[:2]), 0
        x, weight = batch_first(info.batch_size, in_dims, (x, weight))
        return torch.stack([linear(a, b) for a, b in zip(x, weight, strict=True)]), 0


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times the transpose of weight (M, K): (..., M), as `torch.nn.functional.linear` without bias.

    Differentiable any number of times. Equal to torch's up to the order of the sums, and torch's own on the backend
    "reference".
    """
    if not _suits(x, weight):
        return F.linear(x, weight)
    if x.dim() == 2:
        return apply(_Linear, x, weight)
    return apply(_Linear, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

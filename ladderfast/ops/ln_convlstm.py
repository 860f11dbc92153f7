"""One step of the layer-normalised ConvLSTM: checks, registration, autograd and backend choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import autocast_promote, check_dtype, shape_text
from ladderfast.ops.function import apply, apply_in_backward, batch_first, known_signature
from ladderfast.reference import ln_convlstm as reference

OP = "ln_convlstm_step"


def cells_like(x: Tensor, channel: int) -> Tensor:
    """An empty (N, C, *) laid out as the gates x (N, 4C, *) are, which are contiguous or channels-last."""
    return torch.empty_like(x.narrow(channel, 0, x.shape[channel] // 4))


def stats_like(x: Tensor, bias: Tensor, inputs: int) -> Tensor:
    """An empty (S, N, inputs, 2) for mean and 1 / std of each sample."""
    seeds = x.shape[0] if bias.dim() == 2 else 1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((seeds, x.shape[bias.dim() - 1], inputs, 2), dtype=dtype)


if _extension.module is not None:
    _forward = torch.ops.ladderfast.ln_convlstm.default
    _backward = torch.ops.ladderfast.ln_convlstm_backward.default

    @torch.library.register_fake("ladderfast::ln_convlstm")
    def _ln_convlstm_fake(
        x: Tensor,
        y: Tensor | None,
        rec: Tensor,
        c: Tensor,
        weight: Tensor | None,
        weight_y: Tensor | None,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (weight is not None) + (y is not None)
        channel = bias.dim()
        return cells_like(x, channel), cells_like(x, channel), stats_like(x, bias, inputs)

    @torch.library.register_fake("ladderfast::ln_convlstm_backward")
    def _ln_convlstm_backward_fake(
        grad_h: Tensor,
        grad_c_new: Tensor,
        x: Tensor,
        y: Tensor | None,
        rec: Tensor,
        c: Tensor,
        weight: Tensor | None,
        weight_y: Tensor | None,
        bias: Tensor,
        stats: Tensor,
    ) -> tuple[Tensor, ...]:
        def packed(t: Tensor | None) -> Tensor:
            return x.new_empty((0,)) if t is None else t.new_empty(t.shape)

        return (
            x.new_empty((0,)) if weight is None else torch.empty_like(x),
            x.new_empty((0,)) if y is None else torch.empty_like(x),
            torch.empty_like(x),
            cells_like(x, bias.dim()),
            packed(weight),
            packed(weight_y),
            packed(bias),
        )


def _packed(x: Tensor, bias: Tensor) -> Tensor:
    """x as the kernels take it: contiguous or channels-last; a copy only where it is neither."""
    if x.is_contiguous() or x.movedim(bias.dim(), -1).is_contiguous():
        return x
    return x.contiguous()


class _Batch:
    """vmap: its axis in front of every tensor, merged with an axis of seeds if the vectors have one."""

    def __init__(self, size: int, vector_dim: int | None, bias: Tensor) -> None:
        self.size = size
        self.nested = bias.dim() - (vector_dim is not None) == 2

    def merged(self, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        present = [(d, t) for d, t in zip(in_dims, tensors, strict=True) if t is not None]
        moved = iter(batch_first(self.size, tuple(d for d, _ in present), tuple(t for _, t in present)))
        out = [None if t is None else next(moved) for t in tensors]
        return [t.flatten(0, 1) if self.nested and t is not None else t for t in out]

    def split(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(0, (self.size, -1)) if self.nested else t for t in tensors)


@known_signature
class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor | None,
        rec: Tensor,
        c: Tensor,
        weight: Tensor | None,
        weight_y: Tensor | None,
        bias: Tensor,
        eps: float,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _packed(x, bias)
        if name == "triton":
            from ladderfast.triton.ln_convlstm import ln_convlstm_triton

            return ln_convlstm_triton(x, y, rec, c, weight, weight_y, bias, eps)
        return _forward(x, y, rec, c, weight, weight_y, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:7], output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.eps, ctx.name = inputs[7:]

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c_new: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        y, weight = tensors[1], tensors[4]
        grads = apply_in_backward(_StepBackward, grad_h, grad_c_new, *tensors, ctx.eps, ctx.name)
        grad_x, grad_y, grad_rec, grad_c, grad_weight, grad_weight_y, grad_bias = grads
        if weight is None:
            return grad_rec, None, grad_rec, grad_c, None, None, grad_bias, None, None
        second = y is not None
        return (
            grad_x,
            grad_y if second else None,
            grad_rec,
            grad_c,
            grad_weight,
            grad_weight_y if second else None,
            grad_bias,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = _Batch(info.batch_size, in_dims[6], args[6])
        out = _Step.apply(*batch.merged(in_dims[:7], args[:7]), *args[7:])
        stats = out[2].unflatten(0, (info.batch_size, -1)) if batch.nested else out[2].unsqueeze(1)
        return (*batch.split(out[:2]), stats), (0, 0, 0)


@known_signature
class _StepBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_h: Tensor,
        grad_c_new: Tensor,
        x: Tensor,
        y: Tensor | None,
        rec: Tensor,
        c: Tensor,
        weight: Tensor | None,
        weight_y: Tensor | None,
        bias: Tensor,
        stats: Tensor,
        eps: float,
        name: str,
    ) -> tuple[Tensor, ...]:
        x = _packed(x, bias)
        if name == "triton":
            from ladderfast.triton.ln_convlstm import ln_convlstm_backward_triton

            return ln_convlstm_backward_triton(
                grad_h, grad_c_new, x, y, rec, c, weight, weight_y, bias, stats
            )
        return _backward(grad_h, grad_c_new, x, y, rec, c, weight, weight_y, bias, stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:9])
        ctx.eps = inputs[10]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference's backward pass, which is differentiable any number of times
        # and computes the statistics anew from the inputs.
        saved = ctx.saved_tensors
        there = [t is not None for t in saved]
        second, normalised = there[3], there[6]

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            grad_h, grad_c_new, x, y, rec, c, weight, weight_y, bias = (
                next(given) if t else None for t in there
            )
            out = reference.ln_convlstm_step_backward(
                grad_h,  # type: ignore[arg-type]
                grad_c_new,  # type: ignore[arg-type]
                [t for t in (x, y) if t is not None],
                rec,  # type: ignore[arg-type]
                c,  # type: ignore[arg-type]
                [w for w in (weight, weight_y) if w is not None],
                bias,  # type: ignore[arg-type]
                eps=ctx.eps,
            )
            return out if normalised else out[1:]

        wanted = [normalised, second, True, True, normalised, second, True]
        pullback = torch.func.vjp(formula, *(t for t in saved if t is not None))[1]
        found = iter(pullback(tuple(g for g, w in zip(grads, wanted, strict=True) if w)))
        return *(next(found) if t else None for t in there), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = _Batch(info.batch_size, in_dims[8], args[8])
        # The statistics have an axis of seeds always, of one where the vectors have none.
        stats = batch.merged(in_dims[9:10], args[9:10])[0]
        stats = stats if batch.nested else stats.flatten(1, 2)  # type: ignore[union-attr]
        out = _StepBackward.apply(*batch.merged(in_dims[:9], args[:9]), stats, *args[10:])
        return batch.split(out), (0,) * 7


def _several(name: str, value: Any, count: int | None) -> tuple[Tensor, ...]:
    """One tensor or a pair; as many as there are inputs."""
    if isinstance(value, Tensor):
        value = (value,)
    if not isinstance(value, (tuple, list)) or len(value) not in (1, 2):
        raise TypeError(f"{OP}: {name} must be a tensor or a pair of tensors; got {type(value).__name__}")
    if count is not None and len(value) != count:
        raise ValueError(
            f"{OP}: {name} must have one tensor for each of the {count} gates_in; got {len(value)}"
        )
    for k, t in enumerate(value):
        check_dtype(OP, name if len(value) == 1 else f"{name}[{k}]", t)
    return tuple(value)


def _check(
    xs: tuple[Tensor, ...], rec: Tensor, c: Tensor, vectors: list[tuple[str, Tensor]], eps: float
) -> None:
    x = xs[0]
    channel = vectors[0][1].dim() if vectors else 1
    if channel not in (1, 2):
        raise ValueError(
            f"{OP}: {vectors[0][0]} must have shape (4C,), or (S, 4C) with an axis of seeds; "
            f"got {shape_text(vectors[0][1])}"
        )
    if x.dim() <= channel or x.shape[channel] % 4 != 0:
        wanted = "(N, 4C, *)" if channel == 1 else f"(S, N, 4C, *), as {vectors[0][0]} has an axis of seeds"
        raise ValueError(f"{OP}: gates_in must have shape {wanted}; got {shape_text(x)}")
    cells = (*x.shape[:channel], x.shape[channel] // 4, *x.shape[channel + 1 :])
    gates = [("gates_in[1]", xs[1])] if len(xs) == 2 else []
    for name, t in (*gates, ("gates_rec", rec)):
        if t.shape != x.shape:
            raise ValueError(
                f"{OP}: {name} must have the shape of gates_in, {shape_text(x)}; got {shape_text(t)}"
            )
    if c.shape != cells:
        raise ValueError(
            f"{OP}: c must have shape {cells} for gates_in of {shape_text(x)}; got {shape_text(c)}"
        )
    fitting = (*x.shape[: channel - 1], x.shape[channel])
    for name, t in vectors:
        if t.shape != fitting:
            raise ValueError(
                f"{OP}: {name} must have shape {fitting} for gates_in of shape {shape_text(x)}; got {shape_text(t)}"
            )
    for name, t in (*gates, ("gates_rec", rec), ("c", c)):
        if t.dtype != x.dtype:
            raise TypeError(f"{OP}: {name} must have the dtype of gates_in, {x.dtype}; got {t.dtype}")
    half = x.dtype in (torch.bfloat16, torch.float16)
    for name, t in vectors:
        if t.dtype != vectors[0][1].dtype or (t.dtype != x.dtype and not (half and t.dtype == torch.float32)):
            allowed = f"{x.dtype} or all torch.float32" if half else f"{x.dtype}"
            raise TypeError(f"{OP}: {name} must be {allowed} for gates_in of {x.dtype}; got {t.dtype}")
    for name, t in (*gates, ("gates_rec", rec), ("c", c), *vectors):
        if t.device != x.device:
            raise ValueError(f"{OP}: {name} must be on the device of gates_in, {x.device}; got {t.device}")
    if not eps >= 0:
        raise ValueError(f"{OP}: eps must not be negative; got {eps}")


def ln_convlstm_step(
    gates_in: Tensor | Sequence[Tensor],
    gates_rec: Tensor,
    c: Tensor,
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """One step of a convolutional LSTM after its convolutions, the gates of its input layer-normalised.

        a = LN(gates_in) weight + bias + gates_rec       LN over all 4C channels and all positions of a sample
        i, f, g, o = split(a)
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h = sigmoid(o) tanh(c')

    Args:
        gates_in: (N, 4C, *) convolved input. Two inputs are a pair; each is normalised for itself, with its own weight
            and bias (pairs as well), and all are added.
        gates_rec: (N, 4C, *) convolved hidden state, added without normalisation.
        c: (N, C, *) cell state.
        weight: (4C,) gain of the normalisation, or None: gates_in is not normalised (a plain LSTM).
        bias: (4C,) added to the gates, or a pair, or None. With an axis of seeds, weight and bias are (S, 4C), all
            others have it in front, and each seed has its own parameters.
        eps: added to the variance, which is that of the population.

    Returns:
        (h, c'), of the shape and dtype of c, in the memory format of gates_in. Differentiable any number of times in
        every tensor; kept for backward are these tensors and two numbers for each sample and input.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once, and weight and bias may then be
    float32. Under autocast gates_in, gates_rec and c are promoted to the widest of their dtypes.

    Raises:
        ValueError: shapes or devices that do not fit, or a negative eps.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Shi et al., "Convolutional LSTM Network", 2015 (without peepholes); Ba et al., "Layer Normalization", 2016;
    Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, for normalising the input alone.
    """
    xs = _several("gates_in", gates_in, None)
    check_dtype(OP, "gates_rec", gates_rec)
    check_dtype(OP, "c", c)
    weights = () if weight is None else _several("weight", weight, len(xs))
    biases = () if bias is None else _several("bias", bias, None)
    named = [
        (name if len(group) == 1 else f"{name}[{k}]", t)
        for name, group in (("weight", weights), ("bias", biases))
        for k, t in enumerate(group)
    ]
    gates_rec, c, *xs = autocast_promote(gates_rec, c, *xs)  # type: ignore[assignment]
    _check(tuple(xs), gates_rec, c, named, eps)
    name = backend.choose(OP, c.device.type, c.dtype)
    if name == "reference":
        return reference.ln_convlstm_step(xs, gates_rec, c, weights or None, biases or None, eps=eps)
    x, y = xs[0], xs[1] if len(xs) == 2 else None
    if not weights and y is not None:
        x, y = x + y, None
    if biases:
        total = biases[0] if len(biases) == 1 else biases[0] + biases[1]
    elif weights:
        total = torch.zeros_like(weights[0])
    else:
        total = x.new_zeros(x.shape[1])
    first, second = (*weights, None, None)[:2]
    return apply(_Step, x, y, gates_rec, c, first, second, total, float(eps), name)[:2]

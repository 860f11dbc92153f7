"""One step of the layer-normalised ConvLSTM: checks, registration, autograd and backend choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import autocast_promote, check_dtype, check_not_negative, shape_text
from ladderfast.ops.function import apply, apply_in_backward, batch_first, known_signature, packed
from ladderfast.reference import ln_convlstm as reference

OP = "ln_convlstm_step"


def cells_like(x: Tensor, channel: int) -> Tensor:
    """An empty (N, C, *) laid out as the gates x (N, 4C, *) are, which are contiguous or channels-last."""
    return torch.empty_like(x.narrow(channel, 0, x.shape[channel] // 4))


def stats_like(x: Tensor, bias: Tensor, inputs: int, cell: bool, batch: bool) -> tuple[Tensor, Tensor]:
    """An empty (S, N, inputs, 2) for mean and 1 / std of each sample, or (S, inputs, 3, 4C) for mean, 1 / std and
    variance of each channel; and (S, N, 2) for those of the cell."""
    seeds = x.shape[0] if bias.dim() == 2 else 1
    samples = x.shape[bias.dim() - 1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (seeds, inputs, 3, bias.shape[-1]) if batch and inputs > 0 else (seeds, samples, inputs, 2)
    return x.new_empty(shape, dtype=dtype), x.new_empty((seeds, samples if cell else 0, 2), dtype=dtype)


if _extension.module is not None:
    _forward = torch.ops.ladderfast.ln_convlstm.default
    _backward = torch.ops.ladderfast.ln_convlstm_backward.default

    @_extension.register_fake("ln_convlstm")
    def _ln_convlstm_fake(
        x: Tensor,
        y: Tensor | None,
        rec: Tensor,
        c: Tensor,
        weight: Tensor | None,
        weight_y: Tensor | None,
        bias: Tensor,
        cell_weight: Tensor | None,
        cell_bias: Tensor | None,
        batch: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (weight is not None) + (y is not None)
        channel = bias.dim()
        stats = stats_like(x, bias, inputs, cell_weight is not None, batch)
        return cells_like(x, channel), cells_like(x, channel), *stats

    @_extension.register_fake("ln_convlstm_backward")
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
        cell_weight: Tensor | None,
        cell_bias: Tensor | None,
        c_new: Tensor | None,
        stats: Tensor,
        cell_stats: Tensor,
        batch: bool,
    ) -> tuple[Tensor, ...]:
        def like(t: Tensor | None) -> Tensor:
            return x.new_empty((0,)) if t is None else t.new_empty(t.shape)

        return (
            x.new_empty((0,)) if weight is None else torch.empty_like(x),
            x.new_empty((0,)) if y is None else torch.empty_like(x),
            torch.empty_like(x),
            cells_like(x, bias.dim()),
            like(weight),
            like(weight_y),
            like(bias),
            like(cell_weight),
            like(cell_bias),
        )


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


# The tensors of a step are x, y, rec, c, weight, weight_y, bias, cell_weight and cell_bias; what is not there is None.
_TENSORS, _BIAS = 9, 6


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
        cell_weight: Tensor | None,
        cell_bias: Tensor | None,
        batch: bool,
        eps: float,
        name: str,
    ) -> tuple[Tensor, ...]:
        x = packed(x, bias.dim())
        if name == "triton":
            from ladderfast.triton.ln_convlstm import ln_convlstm_triton

            return ln_convlstm_triton(
                x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias, batch, eps
            )
        return _forward(x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias, batch, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        after = None if inputs[_BIAS + 1] is None else output[1]
        ctx.save_for_backward(*inputs[:_TENSORS], after, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.batch, ctx.eps, ctx.name = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c_new: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        options = (ctx.batch, ctx.eps, ctx.name)
        grads = list(apply_in_backward(_StepBackward, grad_h, grad_c_new, *tensors, *options))
        if tensors[4] is None:
            grads[0] = grads[2]  # an input that is not normalised
        given = [g if t is not None else None for g, t in zip(grads, tensors[:_TENSORS], strict=True)]
        return *given, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = _Batch(info.batch_size, in_dims[_BIAS], args[_BIAS])
        out = _Step.apply(*batch.merged(in_dims[:_TENSORS], args[:_TENSORS]), *args[_TENSORS:])
        stats = tuple(
            t.unflatten(0, (info.batch_size, -1)) if batch.nested else t.unsqueeze(1) for t in out[2:]
        )
        return (*batch.split(out[:2]), *stats), (0,) * 4


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
        cell_weight: Tensor | None,
        cell_bias: Tensor | None,
        c_new: Tensor | None,
        stats: Tensor,
        cell_stats: Tensor,
        batch: bool,
        eps: float,
        name: str,
    ) -> tuple[Tensor, ...]:
        x = packed(x, bias.dim())
        vectors = (weight, weight_y, bias, cell_weight, cell_bias)
        if name == "triton":
            from ladderfast.triton.ln_convlstm import ln_convlstm_backward_triton

            return ln_convlstm_backward_triton(
                grad_h, grad_c_new, x, y, rec, c, *vectors, c_new, stats, cell_stats, batch
            )
        return _backward(grad_h, grad_c_new, x, y, rec, c, *vectors, c_new, stats, cell_stats, batch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[: 2 + _TENSORS])
        ctx.batch, ctx.eps = inputs[-3:-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference's backward pass, which is differentiable any number of times
        # and computes the statistics anew from the inputs.
        saved = ctx.saved_tensors
        there = [t is not None for t in saved]
        normalised = there[6]

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            grad_h, grad_c_new, x, y, rec, c, weight, weight_y, bias, *cell = (
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
                [w for w in cell if w is not None],
                eps=ctx.eps,
                norm="batch" if ctx.batch else "layer",
            )
            return out if normalised else out[1:]

        wanted = [normalised, *there[3:]]
        pullback = torch.func.vjp(formula, *(t for t in saved if t is not None))[1]
        found = iter(pullback(tuple(g for g, w in zip(grads, wanted, strict=True) if w)))
        return *(next(found) if t else None for t in there), *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        tensors = 2 + _TENSORS + 1
        batch = _Batch(info.batch_size, in_dims[2 + _BIAS], args[2 + _BIAS])
        # The statistics have an axis of seeds always, of one where the vectors have none.
        stats = batch.merged(in_dims[tensors : tensors + 2], args[tensors : tensors + 2])
        if not batch.nested:
            stats = [t.flatten(0, 1) for t in stats]  # type: ignore[union-attr]  # backward always has them
        out = _StepBackward.apply(
            *batch.merged(in_dims[:tensors], args[:tensors]), *stats, *args[tensors + 2 :]
        )
        return batch.split(out), (0,) * _TENSORS


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
    xs: tuple[Tensor, ...],
    rec: Tensor,
    c: Tensor,
    vectors: list[tuple[str, Tensor]],
    of_cell: list[tuple[str, Tensor]],
    eps: float,
) -> None:
    x = xs[0]
    every = vectors + of_cell
    channel = every[0][1].dim() if every else 1
    if channel not in (1, 2):
        size = "4C" if vectors else "C"
        raise ValueError(
            f"{OP}: {every[0][0]} must have shape ({size},), or (S, {size}) with an axis of seeds; "
            f"got {shape_text(every[0][1])}"
        )
    if x.dim() <= channel or x.shape[channel] % 4 != 0:
        wanted = "(N, 4C, *)" if channel == 1 else f"(S, N, 4C, *), as {every[0][0]} has an axis of seeds"
        raise ValueError(f"{OP}: gates_in must have shape {wanted}; got {shape_text(x)}")
    # Each question to a tensor takes its time, and this is asked at every step.
    shape, dtype, device = tuple(x.shape), x.dtype, x.device
    lead, vector, after = shape[: channel - 1], shape[channel], shape[channel + 1 :]
    cells = (*shape[:channel], vector // 4, *after)
    others = [("gates_in[1]", xs[1])] if len(xs) == 2 else []
    others.append(("gates_rec", rec))
    for name, t in others:
        if t.shape != shape:
            raise ValueError(
                f"{OP}: {name} must have the shape of gates_in, {shape_text(x)}; got {shape_text(t)}"
            )
    if c.shape != cells:
        raise ValueError(
            f"{OP}: c must have shape {cells} for gates_in of {shape_text(x)}; got {shape_text(c)}"
        )
    for group, length in ((vectors, vector), (of_cell, vector // 4)):
        fitting = (*lead, length)
        for name, t in group:
            if t.shape != fitting:
                raise ValueError(
                    f"{OP}: {name} must have shape {fitting} for gates_in of shape {shape_text(x)}; "
                    f"got {shape_text(t)}"
                )
    others.append(("c", c))
    for name, t in others:
        if t.dtype != dtype:
            raise TypeError(f"{OP}: {name} must have the dtype of gates_in, {dtype}; got {t.dtype}")
    for name, t in every:
        own = t.dtype
        half = own == torch.float32 and dtype in (torch.bfloat16, torch.float16)
        if own != every[0][1].dtype or (own != dtype and not half):
            allowed = f"{dtype} or all torch.float32" if dtype.itemsize == 2 else f"{dtype}"
            raise TypeError(f"{OP}: {name} must be {allowed} for gates_in of {dtype}; got {own}")
    for name, t in others + every:
        if t.device != device:
            raise ValueError(f"{OP}: {name} must be on the device of gates_in, {device}; got {t.device}")
    check_not_negative(f"{OP}: eps", eps)


@overload
def ln_convlstm_step(
    gates_in: Tensor | Sequence[Tensor],
    gates_rec: Tensor,
    c: Tensor,
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    *,
    eps: float = ...,
    norm: Literal["layer"] = ...,
    cell_weight: Tensor | None = ...,
    cell_bias: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def ln_convlstm_step(
    gates_in: Tensor | Sequence[Tensor],
    gates_rec: Tensor,
    c: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None,
    *,
    eps: float = ...,
    norm: Literal["batch"],
    cell_weight: Tensor | None = ...,
    cell_bias: Tensor | None = ...,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def ln_convlstm_step(
    gates_in: Tensor | Sequence[Tensor],
    gates_rec: Tensor,
    c: Tensor,
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    *,
    eps: float = 1e-5,
    norm: str = "layer",
    cell_weight: Tensor | None = None,
    cell_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One step of a convolutional LSTM after its convolutions, the gates of its input normalised.

        a = LN(gates_in) weight + bias + gates_rec       LN over all 4C channels and all positions of a sample
        i, f, g, o = split(a)
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h = sigmoid(o) tanh(c')                          normalised cell: tanh(LN(c') cell_weight + cell_bias)

    Args:
        gates_in: (N, 4C, *) convolved input. Two inputs are a pair; each is normalised for itself, with its own weight
            and bias (pairs as well), and all are added.
        gates_rec: (N, 4C, *) convolved hidden state, added without normalisation.
        c: (N, C, *) cell state.
        weight: (4C,) gain of the normalisation, or None: gates_in is not normalised (a plain LSTM).
        bias: (4C,) added to the gates, or a pair, or None. With an axis of seeds, all vectors have it in front, (S, 4C)
            or (S, C), all others have it in front as well, and each seed has its own parameters.
        eps: added to every variance, which is that of the population.
        norm: "layer"; or "batch", which normalises each channel of gates_in over all samples and positions.
        cell_weight: (C,) gain of the cell's layer normalisation, over all channels and positions of a sample, or None:
            the cell is not normalised on its way to h. The c' that is returned never is.
        cell_bias: (C,) shift of it, or None. It needs cell_weight.

    Returns:
        (h, c'), of the shape and dtype of c, in the memory format of gates_in. Differentiable any number of times in
        every tensor; kept for backward are these tensors, two numbers for each sample and input, or three for each
        channel, and for a normalised cell c' and two more for each sample.
        With norm "batch" also mean and variance of each input's channels, (inputs, 4C) or (S, inputs, 4C), without a
        gradient, float32 at least: a module keeps its running statistics from them.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once, and the vectors may then be
    float32. Under autocast gates_in, gates_rec and c are promoted to the widest of their dtypes.

    Raises:
        ValueError: shapes or devices that do not fit, an eps that is negative or not finite, an unknown norm, norm
            "batch" without weight, or cell_bias without cell_weight.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Shi et al., "Convolutional LSTM Network", 2015 (without peepholes); Ba et al., "Layer Normalization", 2016;
    Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, for normalising the input alone, and by batch in RTagger.
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
    of_cell = [(n, t) for n, t in (("cell_weight", cell_weight), ("cell_bias", cell_bias)) if t is not None]
    for name, t in of_cell:
        check_dtype(OP, name, t)
    if norm not in ("layer", "batch"):
        raise ValueError(f"{OP}: norm must be 'layer' or 'batch'; got {norm!r}")
    batch = norm == "batch"
    if batch and not weights:
        raise ValueError(f"{OP}: weight must be given with norm 'batch'; got None")
    if cell_bias is not None and cell_weight is None:
        raise ValueError(f"{OP}: cell_bias needs cell_weight; got None")
    gates_rec, c, *xs = autocast_promote(gates_rec, c, *xs)  # type: ignore[assignment]
    _check(tuple(xs), gates_rec, c, named, of_cell, eps)
    backend_name = backend.choose(OP, c.device.type, c.dtype)
    if backend_name == "reference":
        return reference.ln_convlstm_step(
            xs,
            gates_rec,
            c,
            weights or None,
            biases or None,
            eps=eps,
            norm=norm,
            cell_weight=cell_weight,
            cell_bias=cell_bias,
        )
    x, y = xs[0], xs[1] if len(xs) == 2 else None
    if not weights and y is not None:
        x, y = x + y, None
    if biases:
        total = biases[0] if len(biases) == 1 else biases[0] + biases[1]
    elif weights:
        total = torch.zeros_like(weights[0])
    elif cell_weight is not None:
        total = cell_weight.new_zeros((*cell_weight.shape[:-1], 4 * cell_weight.shape[-1]))
    else:
        total = x.new_zeros(x.shape[1])
    if cell_weight is not None and cell_bias is None:
        cell_bias = torch.zeros_like(cell_weight)
    first, second = (*weights, None, None)[:2]
    h, c, stats, _ = apply(
        _Step,
        x,
        y,
        gates_rec,
        c,
        first,
        second,
        total,
        cell_weight,
        cell_bias,
        batch,
        float(eps),
        backend_name,
    )
    if not batch:
        return h, c
    if total.dim() == 1:
        stats = stats[0]
    return h, c, stats.select(-2, 0), stats.select(-2, 2)

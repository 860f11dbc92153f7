"""All steps of a layer-normalised ConvLSTM on a CPU as one node of autograd, with the channels last within.

Step by step autograd's nodes, their sums and what lies between them in memory take a sixteenth of the time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ladderfast.ops.function import is_batched, plain, tangents
from ladderfast.ops.layout import channels_last
from ladderfast.ops.ln_convlstm import ln_convlstm_step

_KEPT = 7  # tensors of each step and part
Pair = tuple[int, ...]


class Geometry:
    """How a cell convolves, and how a sequence is cut: `at_once` samples run through all its steps, then the next."""

    def __init__(
        self, stride: Pair, padding: Pair, state_padding: Pair, dilation: Pair, eps: float, at_once: int
    ) -> None:
        self.of_x = (list(stride), list(padding), list(dilation))
        self.of_state = ([1] * len(stride), list(state_padding), list(dilation))
        self.eps, self.at_once = eps, at_once

    def parts(self, samples: int) -> list[slice]:
        return [slice(first, first + self.at_once) for first in range(0, samples, self.at_once)]


def _step_by_step(
    geometry: Geometry,
    batch_first: bool,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of differentiable ops."""
    outputs = []
    for step in x.unbind():
        gates = F.conv2d(step, weight_ih, None, *geometry.of_x)
        rec = torch.zeros_like(gates) if h is None else F.conv2d(h, weight_hh, None, *geometry.of_state)
        c = torch.zeros_like(gates.narrow(1, 0, gates.shape[1] // 4)) if c is None else c
        h, c = ln_convlstm_step(gates, rec, c, norm_weight, bias, eps=geometry.eps)
        outputs.append(h)
    assert h is not None
    assert c is not None
    return torch.stack(outputs, 1 if batch_first else 0), h, c


def _convolution_backward(
    grad: Tensor, t: Tensor, weight: Tensor, how: tuple[list[int], ...], want_t: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation = how
    to_t, to_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        t,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        1,
        [want_t, want_weight, False],
    )
    return to_t, to_weight


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """In place: both belong to nobody else."""
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


class _Sequence(torch.autograd.Function):
    """Inputs x (T, N, C, H, W), h and c (N, ...) or None, the weights; outputs all h, contiguous, the last h and c."""

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, batch_first: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, h_start, c_start, weight_ih, weight_hh, norm_weight, bias = inputs
        assert x is not None
        assert weight_ih is not None
        assert weight_hh is not None
        to_gates, from_state = channels_last(weight_ih), channels_last(weight_hh)
        added = weight_hh.new_zeros(len(weight_hh)) if bias is None else bias
        out: Tensor | None = None
        kept: list[Tensor | None] = []
        last: list[tuple[Tensor, Tensor]] = []
        for own in geometry.parts(x.shape[1]):
            h = None if h_start is None else channels_last(h_start[own])
            c = None if c_start is None else channels_last(c_start[own])
            for t in range(len(x)):
                step = channels_last(x[t, own])
                gates = F.conv2d(step, to_gates, None, *geometry.of_x)
                rec = (
                    torch.zeros_like(gates)
                    if h is None
                    else F.conv2d(h, from_state, None, *geometry.of_state)
                )
                if c is None:
                    c = torch.zeros_like(gates.narrow(1, 0, gates.shape[1] // 4))
                before, h_before = c, h
                h, c, *stats = torch.ops.ladderfast.ln_convlstm.default(
                    gates, None, rec, before, norm_weight, None, added, None, None, False, geometry.eps
                )
                if out is None:
                    lead = (x.shape[1], len(x)) if batch_first else (len(x), x.shape[1])
                    out = x.new_empty((*lead, *h.shape[1:]))
                place = out[own, t] if batch_first else out[t, own]
                torch.ops.ladderfast.lay_out.default(place, h)
                kept += [step, gates, rec, before, h_before, *stats]
            assert h is not None
            assert c is not None
            last.append((h, c))
        assert out is not None
        ctx.geometry, ctx.batch_first = geometry, batch_first
        ctx.save_for_backward(*inputs, *kept)
        ctx.set_materialize_grads(False)
        return out, *(torch.cat(t).contiguous() for t in zip(*last, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        geometry, wanted = ctx.geometry, ctx.needs_input_grad[2:]
        saved = ctx.saved_tensors  # once: a checkpoint computes them anew at each question
        inputs, kept = saved[: len(wanted)], saved[len(wanted) :]
        recorded = torch.is_grad_enabled() or tangents()
        if recorded or not plain() or any(g is not None and is_batched(g) for g in grads):
            return None, None, *_differentiable(geometry, ctx.batch_first, inputs, wanted, grads)
        x, _, _, weight_ih, weight_hh, norm_weight, bias = inputs
        grad, grad_h, grad_c = grads
        to_gates, from_state = channels_last(weight_ih), channels_last(weight_hh)
        added = weight_hh.new_zeros(len(weight_hh)) if bias is None else bias
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
        to_start: list[tuple[Tensor | None, Tensor | None]] = []
        of_input: Tensor | None = None
        of_state: Tensor | None = None
        of_norm: Tensor | None = None
        of_bias: Tensor | None = None
        for index, own in enumerate(geometry.parts(x.shape[1])):
            h_now = None if grad_h is None else channels_last(grad_h[own])
            c_now = None if grad_c is None else channels_last(grad_c[own])
            for t in reversed(range(len(x))):
                at = (index * len(x) + t) * _KEPT
                step, gates, rec, c, h, *stats = kept[at : at + _KEPT]
                if grad is not None:
                    h_now = _sum(h_now, channels_last(grad[own, t] if ctx.batch_first else grad[t, own]))
                found = torch.ops.ladderfast.ln_convlstm_backward.default(
                    torch.zeros_like(c) if h_now is None else h_now,
                    torch.zeros_like(c) if c_now is None else c_now,
                    gates,
                    None,
                    rec,
                    c,
                    norm_weight,
                    None,
                    added,
                    None,
                    None,
                    None,
                    *stats,
                    False,
                )
                of_rec, c_now = found[2], found[3]
                of_gates = of_rec if norm_weight is None else found[0]
                h_now = None
                if h is not None:
                    h_now, more = _convolution_backward(
                        of_rec, h, from_state, geometry.of_state, t > 0 or wanted[1], wanted[4]
                    )
                    of_state = _sum(of_state, more)
                of_step, more = _convolution_backward(
                    of_gates, step, to_gates, geometry.of_x, wanted[0], wanted[3]
                )
                of_input = _sum(of_input, more)
                if to_x is not None:
                    torch.ops.ladderfast.lay_out.default(to_x[t, own], of_step)
                of_norm = None if norm_weight is None else _sum(of_norm, found[4])
                of_bias = _sum(of_bias, found[6])
            to_start.append((h_now, c_now))
        ends: list[Tensor | None] = [None, None]
        for k in range(2):
            if wanted[1 + k]:
                ends[k] = torch.cat([cast(Tensor, end[k]) for end in to_start]).contiguous()
        weights = (None if w is None else w.contiguous() for w in (of_input, of_state))
        return None, None, to_x, *ends, *weights, of_norm, None if bias is None else of_bias


def _differentiable(
    geometry: Geometry,
    batch_first: bool,
    inputs: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The gradients, by way of the differentiable ops: for gradients of gradients, and for many gradients at once."""
    graph = torch.is_grad_enabled()
    # Forward has run without autocast. Of aliases: an input may depend on another one, whose gradient is not to go
    # through the first, and hooks of the inputs are for what this returns.
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        inputs = tuple(
            None if t is None else t.view_as(t) if w else t.detach()
            for t, w in zip(inputs, wanted, strict=True)
        )
        results = _step_by_step(geometry, batch_first, *inputs)  # type: ignore[arg-type]  # not all may be None, which a tuple cannot say
    there = [k for k, g in enumerate(grads) if g is not None]
    of = [t for t, w in zip(inputs, wanted, strict=True) if w and t is not None]
    found = iter(
        torch.autograd.grad(
            [results[k] for k in there],
            of,
            [grads[k] for k in there],
            create_graph=graph,
            allow_unused=True,
        )
    )
    return [next(found) if w and t is not None else None for t, w in zip(inputs, wanted, strict=True)]


def sequence(
    geometry: Geometry,
    batch_first: bool,
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All h of x (T, N, C, H, W), (T, N, ...) or with `batch_first` (N, T, ...), then the last h and c (N, ...).

    float32 on a CPU with the extension, two spatial axes, one group. Differentiable any number of times.
    """
    h, c = (None, None) if state is None else state
    return _Sequence.apply(geometry, batch_first, x, h, c, weight_ih, weight_hh, norm_weight, bias)

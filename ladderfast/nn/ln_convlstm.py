"""Layer-normalised LSTMs, convolutional and dense."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladderfast.nn.checks import cell_inputs, check_dtype_of, check_tensor, one_or_pair, positive
from ladderfast.nn.convlstm_sequence import Geometry, sequence
from ladderfast.ops import backend, ln_convlstm_step
from ladderfast.ops.checks import check_bool, check_not_negative, check_number, finite
from ladderfast.ops.function import plain
from ladderfast.ops.layout import channels_last, stack_contiguous, with_gradient_channels_last
from ladderfast.ops.linear import linear

State = tuple[Tensor, Tensor]
Weights = tuple[Tensor, Tensor]  # of the input and of the hidden state
NORMS = ("layer", "batch", "none")
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}
# Gates of a time step from which on sequences have the channels last: they are then faster by a sixteenth to an eighth,
# by nothing with half as many, and slower where there are few.
_LARGE = 1 << 21
# Gates of a time step that are computed at once where the channels are last: backward reads again what it has just
# written, 8 bytes a gate, which should still lie in a cache. It is faster by a fiftieth to a twentieth; where a weight
# is larger than this part of the gates, it is slower, as each convolution has to read and write it anew.
_AT_ONCE = 1 << 20
_WEIGHT_PART = 1 / 16
_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


def _keep_running(module: nn.BatchNorm1d, mean: Tensor, var: Tensor) -> None:
    """What torch's batch norm does in training."""
    assert module.num_batches_tracked is not None
    assert module.running_mean is not None
    assert module.running_var is not None
    module.num_batches_tracked.add_(1)
    for running, new in ((module.running_mean, mean), (module.running_var, var)):
        running.lerp_(new.to(running.dtype), module.momentum or 0.0)


def _by_running(module: nn.BatchNorm1d, gates: Tensor) -> Tensor:
    """Batch norm with the running statistics."""
    return F.batch_norm(gates, module.running_mean, module.running_var, module.weight, None, eps=module.eps)


def _values(gates: Tensor) -> int:
    """How many values a channel has."""
    return gates.shape[0] * math.prod(gates.shape[2:])


class _Cell(nn.Module):
    """What the dense and the convolutional cell share: the norm, the bias, the step, the state."""

    weight_hh: nn.Parameter

    def __init__(
        self,
        hidden: int,
        inputs: int,
        spatial: int,
        norm: str | None,
        normalise_cell: bool,
        bias: bool,
        forget_bias: float,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        norm = "none" if norm is None else norm
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        check_bool("bias", bias)
        check_bool("normalise_cell", normalise_cell)
        check_not_negative("eps", eps)
        check_number("forget_bias", forget_bias)
        if not finite(forget_bias):
            raise ValueError(f"forget_bias must be finite; got {forget_bias}")
        self.hidden, self.inputs, self.spatial = positive("hidden size", hidden), inputs, spatial
        self.norm, self.forget_bias, self.eps = norm, forget_bias, eps
        vector = 4 * hidden
        self.norm_weight: nn.ParameterList | None = None
        self.batch_norm: nn.ModuleList | None = None
        if norm == "layer":
            self.norm_weight = nn.ParameterList(
                nn.Parameter(torch.empty(vector, device=device, dtype=dtype)) for _ in range(inputs)
            )
        if norm == "batch":
            # The bias is the cell's.
            self.batch_norm = nn.ModuleList(
                _BATCH_NORMS[spatial](vector, eps=eps, device=device, dtype=dtype) for _ in range(inputs)
            )
            for module in self.batch_norm:
                module.register_parameter("bias", None)
        self.bias = nn.Parameter(torch.empty(vector, device=device, dtype=dtype)) if bias else None
        self.cell_weight: nn.Parameter | None = None
        self.cell_bias: nn.Parameter | None = None
        if normalise_cell:
            self.cell_weight = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
            self.cell_bias = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))

    def _reset_vectors(self) -> None:
        if self.norm_weight is not None:
            for weight in self.norm_weight:
                nn.init.ones_(weight)
        if self.batch_norm is not None:
            for module in self.batch_norm.children():
                assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
                module.reset_running_stats()
                nn.init.ones_(module.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
            nn.init.constant_(self.bias[self.hidden : 2 * self.hidden], float(self.forget_bias))
        if self.cell_weight is not None and self.cell_bias is not None:
            nn.init.ones_(self.cell_weight)
            nn.init.zeros_(self.cell_bias)

    @abstractmethod
    def project(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gates of each input, before their normalisation; None for an input that is not there."""

    def project_all(self, x: Tensor) -> Tensor | None:
        """The gates of all time steps (T, N, ...) at once, or None where step by step is better.

        It is for convolutions on a CPU, which take longer on all steps at once.
        """
        return None

    @abstractmethod
    def project_state(self, h: Tensor, weight: Tensor | None = None) -> Tensor:
        """The gates of the hidden state. A weight stands for the cell's own."""

    def zero_cells(self, gates: Tensor) -> Tensor:
        """Zeros (N, C, *) laid out as the gates (N, 4C, *) are."""
        return torch.zeros_like(gates.narrow(1, 0, self.hidden))

    def step(
        self,
        gates: Sequence[Tensor | None],
        state: State | None,
        *,
        of_batch: bool = True,
        recurrent: Tensor | None = None,
    ) -> State:
        """(h, c) from the inputs' gates and the state before; None is a state of zeros, which needs no convolution.

        An input whose gates are None adds nothing, and its statistics stay as they are. of_batch: whether batch norm
        in training takes the batch's statistics, or the running ones, as in evaluation. recurrent: a weight of the
        hidden state in the place of the cell's own.
        """
        there = [i for i, g in enumerate(gates) if g is not None]
        given = [cast(Tensor, gates[i]) for i in there]
        first = given[0]
        if state is None:
            rec = torch.zeros_like(first)
            c = self.zero_cells(first)
        else:
            rec, c = self.project_state(state[0], recurrent), state[1]
        eps, cell_weight, cell_bias = self.eps, self.cell_weight, self.cell_bias
        modules = [] if self.batch_norm is None else [cast(nn.BatchNorm1d, self.batch_norm[i]) for i in there]
        if not modules or not (self.training and of_batch):
            weight = None if self.norm_weight is None else tuple(self.norm_weight[i] for i in there)
            if modules:
                given = [_by_running(module, g) for module, g in zip(modules, given, strict=True)]
            return ln_convlstm_step(
                tuple(given), rec, c, weight, self.bias, eps=eps, cell_weight=cell_weight, cell_bias=cell_bias
            )
        count = _values(first)
        if count < 2:
            raise ValueError(f"batch norm needs more than 1 value for each channel in training, got {count}")
        h, c, mean, var = ln_convlstm_step(
            tuple(given),
            rec,
            c,
            tuple(module.weight for module in modules),
            self.bias,
            eps=eps,
            norm="batch",
            cell_weight=cell_weight,
            cell_bias=cell_bias,
        )
        with torch.no_grad():
            for module, average, variance in zip(modules, mean, var, strict=True):
                _keep_running(module, average, variance * (count / (count - 1)))
        return h, c

    def check_state(self, state: State, shape: tuple[int, ...]) -> None:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(f"state must be a pair (h, c), got {type(state).__name__}")
        for name, t in zip(("h", "c"), state, strict=True):
            check_tensor(name, t)
            if tuple(t.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
            check_dtype_of(self.weight_hh, name, t)


class _DenseCell(_Cell):
    def __init__(
        self, input_size: int, hidden: int, norm, normalise_cell, bias, forget_bias, eps, device, dtype
    ) -> None:
        super().__init__(hidden, 1, 0, norm, normalise_cell, bias, forget_bias, eps, device, dtype)
        self.weight_ih = nn.Parameter(
            torch.empty(4 * hidden, positive("input_size", input_size), device=device, dtype=dtype)
        )
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden)
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        self._reset_vectors()

    def project(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        x = inputs[0]
        assert x is not None  # a sequence's
        return (linear(x, self.weight_ih),)

    def project_all(self, x: Tensor) -> Tensor | None:
        if x.shape[-1] != self.weight_ih.shape[1]:
            raise ValueError(
                f"x must have {self.weight_ih.shape[1]} features in its last axis; got {tuple(x.shape)}"
            )
        return linear(x, self.weight_ih)

    def project_state(self, h: Tensor, weight: Tensor | None = None) -> Tensor:
        return linear(h, self.weight_hh if weight is None else weight)


def _sizes(name: str, value: int | Sequence[int], spatial: int, least: int) -> tuple[int, ...]:
    sizes = (value,) * spatial if isinstance(value, int) else value
    if not isinstance(sizes, Sequence) or not all(
        isinstance(size, int) and not isinstance(size, bool) for size in sizes
    ):
        raise TypeError(f"{name} must be one whole number or {spatial} of them, got {value!r}")
    if len(sizes) != spatial or any(size < least for size in sizes):
        raise ValueError(f"{name} must be one number or {spatial}, each at least {least}; got {value}")
    return tuple(sizes)


class LayerNormConvLSTMCell(_Cell):
    """One step of a convolutional LSTM whose input gates are layer-normalised, the recurrent ones not.

        a = LN(W_x * x) + W_h * h + b            LN over all 4C channels and all positions of a sample
        i, f, g, o = split(a);  c' = s(f) c + s(i) tanh(g);  h' = s(o) tanh(c')

    A second input, such as the feedback of a recurrent Ladder, is convolved and normalised for itself and added.

    Args:
        in_channels: channels of x; a pair for two inputs.
        hidden_channels: C, channels of h and c.
        kernel_size: of all convolutions; one number or one for each spatial axis.
        stride, padding: of the convolution of x. Padding None keeps the size where the stride is 1. The state, and a
            second input, have the size of that convolution's result, and are convolved with stride 1 and kept in size.
        dilation: of all convolutions.
        groups: of all convolutions. The channels of h and c are in as many groups, each with its own part of the inputs
            and of the state before, apart from the norm; the kernels have the four gates of a group one after the
            other.
        bias: whether b is there. It starts at 0, and at `forget_bias` for the forget gate.
        norm: "layer"; "batch", batch normalisation over the batch and all positions of a step in the place of LN, with
            running statistics in evaluation; or "none" (None is the same).
        normalise_cell: h' = s(o) tanh(LN(c')), with a gain and a shift for each of the C channels.
        spatial: 1 or 2, the number of spatial axes.

    Shape:
        x (N, in_channels, *), state (h, c) of (N, C, *) each or None for zeros -> (h', c').

    Raises:
        ValueError: sizes, channels or shapes that do not fit.
        TypeError: a size that is no whole number; what is no tensor, or of another dtype than the weights.

    Source: Shi et al., "Convolutional LSTM Network", 2015; Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        hidden_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        norm: str | None = "layer",
        normalise_cell: bool = False,
        forget_bias: float = 1.0,
        eps: float = 1e-5,
        spatial: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = one_or_pair("in_channels", in_channels)
        if spatial not in tuple(_CONVOLUTIONS):
            raise ValueError(f"spatial must be 1 or 2, got {spatial}")
        super().__init__(
            hidden_channels,
            len(channels),
            spatial,
            norm,
            normalise_cell,
            bias,
            forget_bias,
            eps,
            device,
            dtype,
        )
        self.in_channels, self.hidden_channels, self.groups = channels, hidden_channels, groups
        self.kernel_size = _sizes("kernel_size", kernel_size, spatial, 1)
        self.stride = _sizes("stride", stride, spatial, 1)
        self.dilation = _sizes("dilation", dilation, spatial, 1)
        for name, count in (
            ("in_channels", channels[0]),
            ("in_channels", channels[-1]),
            ("hidden_channels", hidden_channels),
        ):
            if count % positive("groups", groups) != 0:
                raise ValueError(f"{name} must be a positive multiple of groups, {groups}; got {count}")
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise ValueError(
                f"kernel_size {self.kernel_size} with dilation {self.dilation} cannot keep the size of the state: "
                "dilation * (kernel_size - 1) must be even"
            )
        self.state_padding = tuple(r // 2 for r in reach)
        self.padding = self.state_padding if padding is None else _sizes("padding", padding, spatial, 0)

        def kernel(count: int) -> nn.Parameter:
            size = (4 * hidden_channels, count // groups, *self.kernel_size)
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.weight_ih = nn.ParameterList(kernel(count) for count in channels)
        self.weight_hh = kernel(hidden_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions start as torch.nn.Conv2d's do, uniform within 1 / sqrt(fan in)."""
        for weight in (*self.weight_ih, self.weight_hh):
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(weight, -bound, bound)
        self._reset_vectors()

    def _convolve_state(self, t: Tensor, weight: Tensor) -> Tensor:
        convolve = _CONVOLUTIONS[self.spatial]
        return self._by_gate(convolve(t, weight, None, 1, self.state_padding, self.dilation, self.groups))

    def _by_gate(self, t: Tensor) -> Tensor:
        """The four gates one after the other: a grouped convolution gives those of its first group first."""
        if self.groups == 1:
            return t
        return t.unflatten(1, (self.groups, 4, -1)).transpose(1, 2).flatten(1, 3)

    def _check_inputs(self, inputs: Sequence[Tensor | None]) -> None:
        for t, channels in zip(inputs, self.in_channels, strict=True):
            if t is not None and (t.dim() != 2 + self.spatial or t.shape[1] != channels):
                axes = ", H, W" if self.spatial == 2 else ", L"
                raise ValueError(f"an input must have shape (N, {channels}{axes}), got {tuple(t.shape)}")

    def project(
        self, inputs: Sequence[Tensor | None], weight: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Of the base class; a weight stands for that of the first input."""
        self._check_inputs(inputs)
        first, *others = inputs
        assert first is not None
        convolve = _CONVOLUTIONS[self.spatial]
        weight = self.weight_ih[0] if weight is None else weight
        gates = convolve(first, weight, None, self.stride, self.padding, self.dilation, self.groups)
        return self._by_gate(gates), *(
            None if t is None else self._convolve_state(t, w)
            for t, w in zip(others, list(self.weight_ih)[1:], strict=True)
        )

    def prefers_channels_last(self, x: Tensor) -> bool:
        """Whether a sequence x (T, N, ...), contiguous as it is, is faster with the channels last."""
        # oneDNN's convolutions would copy gates into a layout of their own and back.
        return (
            plain()
            and self.spatial == 2
            and self.groups == 1
            and x.shape[1] * math.prod(x.shape[3:]) * 4 * self.hidden >= _LARGE * math.prod(self.stride)
            and x.device.type == "cpu"
            and x.dtype == self.weight_hh.dtype == torch.float32
            and x.stride(2) != 1
            and self.weight_hh.is_contiguous()
            and torch.backends.mkldnn.is_available()
            and bool(torch.backends.mkldnn.enabled)
            and not torch.is_autocast_enabled("cpu")
            # oneDNN's strided convolution of one channel to a single column is wrong there (torch 2.13).
            and not (self.in_channels[0] == 1 and self.stride[1] > 1 and self.state_shape(x)[-1] == 1)
        )

    def samples_at_once(self, x: Tensor) -> int:
        """How many samples of such a sequence are faster by themselves than together with others."""
        largest = max(w.numel() for w in (*self.weight_ih, self.weight_hh))
        if self.norm == "batch":  # its statistics are of all samples
            return x.shape[1]
        if largest > _WEIGHT_PART * _AT_ONCE:
            return x.shape[1]
        gates = 4 * math.prod(
            self.state_shape(x)[1:]
        )  # none where the kernel is wider than x: the convolution says so
        return max(1, _AT_ONCE // max(1, gates))

    def is_one_node(self, x: Tensor, state: State | None) -> bool:
        """Whether such a sequence, with gradients and kernels that allow it, is one node of autograd."""
        return (
            self.norm != "batch"
            and self.cell_weight is None
            and torch.is_grad_enabled()
            and any(t.requires_grad for t in (x, *(state or ()), *self.parameters()))
            and backend.choose("ln_convlstm_step", "cpu", x.dtype) == "cpu"
        )

    def sequence(self, x: Tensor, state: State | None, *, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """All h of it, contiguous, and the last h and c, without the axis of layers."""
        self._check_inputs((x[0],))
        how = (self.stride, self.padding, self.state_padding, self.dilation)
        geometry = Geometry(*how, self.eps, self.samples_at_once(x))
        start = None if state is None else (state[0][0], state[1][0])
        norm_weight = None if self.norm_weight is None else self.norm_weight[0]
        return sequence(
            geometry, batch_first, x, start, self.weight_ih[0], self.weight_hh, norm_weight, self.bias
        )

    def channels_last_weights(self) -> Weights:
        """The weights for such a sequence, laid out once for all its steps."""
        return channels_last(self.weight_ih[0]), channels_last(self.weight_hh)

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of h and c, without the axis of layers, for a sequence x (T, N, ...)."""
        after = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                x.shape[3:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        return x.shape[1], self.hidden, *after

    def project_state(self, h: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._convolve_state(h, self.weight_hh if weight is None else weight)

    def forward(self, x: Tensor | tuple[Tensor, Tensor | None], state: State | None = None) -> State:
        gates = self.project(cell_inputs(x, self.inputs, self.weight_hh))
        if state is not None:
            first = cast(Tensor, gates[0])
            self.check_state(state, (first.shape[0], self.hidden, *first.shape[2:]))
        return self.step(gates, state)

    def extra_repr(self) -> str:
        channels = self.in_channels[0] if self.inputs == 1 else self.in_channels
        return (
            f"{channels}, {self.hidden_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"norm={self.norm}"
        )


class _Sequence(nn.Module):
    """A cell over time."""

    batch_first: bool

    def __init__(self, cell: _DenseCell | LayerNormConvLSTMCell, batch_first: bool) -> None:
        super().__init__()
        check_bool("batch_first", batch_first)
        self.cell, self.batch_first = cell, batch_first

    def reset_parameters(self) -> None:
        self.cell.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self._run(x, state, mask)

    def _run(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        axes = "(N, T, C, *)" if self.batch_first else "(T, N, C, *)"
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor {axes}, got {type(x).__name__}")
        check_dtype_of(self.cell.weight_hh, "x", x)
        if x.dim() != 3 + self.cell.spatial:
            raise ValueError(f"x must have {3 + self.cell.spatial} axes, {axes}; got shape {tuple(x.shape)}")
        if mask is not None:
            check_tensor("mask", mask)
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask must be bool of shape {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}"
                )
            # What is not there may be anything: NaN times the gradient 0 would be NaN in those of the weights.
            x = torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, 0)
            mask = mask.transpose(0, 1) if self.batch_first else mask
        if self.batch_first:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise ValueError("x must have at least one time step")

        dim = 1 if self.batch_first else 0
        cell = self.cell
        if not isinstance(cell, LayerNormConvLSTMCell) or not cell.prefers_channels_last(x):
            outputs, (h, c) = self._steps(x, state, mask)
            return torch.stack(outputs, dim), (h[None], c[None])
        if state is not None:  # before it is cut
            cell.check_state(state, (1, *cell.state_shape(x)))
        if mask is None and cell.is_one_node(x, state):
            out, h, c = cell.sequence(x, state, batch_first=self.batch_first)
            return out, (h[None], c[None])
        samples, at_once, weights = x.shape[1], cell.samples_at_once(x), cell.channels_last_weights()
        parts, last = [], []
        for first in range(0, samples, at_once):
            own = slice(first, first + at_once)
            outputs, now = self._steps(
                x[:, own],
                None if state is None else (state[0][:, own], state[1][:, own]),
                None if mask is None else mask[:, own],
                weights,
            )
            parts.append(outputs)
            last.append(now)
        h, c = (torch.cat(t).contiguous() for t in zip(*last, strict=True))
        return stack_contiguous(parts, dim), (h[None], c[None])

    def _steps(
        self, x: Tensor, state: State | None, mask: Tensor | None, weights: Weights | None = None
    ) -> tuple[list[Tensor], State]:
        """The output of each step of x (T, N, ...), and the last state without the axis of layers.

        With weights, those of a convolutional cell with the channels last, all is computed in that layout.
        """
        outputs: list[Tensor] = []
        now: State | None = None
        projected = self.cell.project_all(x)
        by_rows = mask is not None and self.cell.norm == "batch" and self.cell.training
        for t, step in enumerate((x if projected is None else projected).unbind()):
            gates: Tensor | None = step
            if weights is not None:
                assert isinstance(self.cell, LayerNormConvLSTMCell)
                gates = self.cell.project((channels_last(step),), weights[0])[0]
            elif projected is None:
                gates = self.cell.project((step,))[0]
            assert gates is not None  # its input is there
            if t == 0 and state is not None:
                shape = (gates.shape[0], self.cell.hidden, *gates.shape[2:])
                self.cell.check_state(state, (1, *shape))
                now = (state[0][0], state[1][0])
                if weights is not None:
                    now = (channels_last(now[0]), channels_last(now[1]))
            if now is None and mask is not None:
                zeros = self.cell.zero_cells(gates)
                now = (zeros, zeros)
            recurrent = None if weights is None else weights[1]
            if mask is None:
                now = self.cell.step((gates,), now, recurrent=recurrent)
                output = now[0]
            elif by_rows:
                assert now is not None
                now, output = self._step_of_rows(gates, now, mask[t].nonzero()[:, 0], recurrent)
            else:
                assert now is not None
                new = self.cell.step((gates,), now, recurrent=recurrent)
                here = mask[t].view(-1, *[1] * (gates.dim() - 1))
                now = (torch.where(here, new[0], now[0]), torch.where(here, new[1], now[1]))
                output = torch.where(here, new[0], 0)
            outputs.append(output if weights is None else with_gradient_channels_last(output))
        assert now is not None  # there is a time step
        return outputs, now

    def _step_of_rows(
        self, gates: Tensor, state: State, rows: Tensor, recurrent: Tensor | None
    ) -> tuple[State, Tensor]:
        """The state and the output after a step of these samples alone, whose statistics leave the others out.

        Too few values to have any take the running statistics.
        """
        if len(rows) == 0:
            return state, torch.zeros_like(state[0])
        own = gates[rows]
        new = self.cell.step(
            (own,), (state[0][rows], state[1][rows]), of_batch=_values(own) > 1, recurrent=recurrent
        )
        h, c = (before.index_copy(0, rows, after) for before, after in zip(state, new, strict=True))
        return (h, c), torch.zeros_like(h).index_copy(0, rows, new[0])


class LayerNormConvLSTM(_Sequence):
    """`LayerNormConvLSTMCell` over a sequence, with the arguments of the cell for one input.

    Args:
        batch_first: x, the output and the mask are (N, T, ...) rather than (T, N, ...).

    Shape:
        x (T, N, in_channels, *) -> output (T, N, C, *), (h, c). The state that goes in, None for zeros, and the state
        after the last step are pairs of (1, N, C, *), as torch.nn.LSTM has them.
        mask (T, N) bool, for sequences of different lengths: where it is False the state stays as it is and the
        output is 0. Batch norm leaves these samples out of its statistics; a step with a single value for each channel
        takes the running ones.
        The results are contiguous where x is. In between, float32 on a CPU has the channels last in memory, as oneDNN's
        convolutions have it.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: as the cell.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        norm: str | None = "layer",
        normalise_cell: bool = False,
        forget_bias: float = 1.0,
        eps: float = 1e-5,
        spatial: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        cell = LayerNormConvLSTMCell(
            positive("in_channels", in_channels),
            hidden_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            norm=norm,
            normalise_cell=normalise_cell,
            forget_bias=forget_bias,
            eps=eps,
            spatial=spatial,
            device=device,
            dtype=dtype,
        )
        super().__init__(cell, batch_first)


class LayerNormLSTM(_Sequence):
    """A dense LSTM whose input gates are layer-normalised, the recurrent ones not; on the kernel of the ConvLSTM.

        a = LN(W_x x) + W_h h + b                LN over the 4C gates of a sample

    Gates are in the order of torch.nn.LSTM: with norm "none" and the weights of a torch.nn.LSTM of one layer (its two
    biases added up) the results are its own.

    Args:
        input_size, hidden_size: features of x, and C, those of h and c.
        bias: whether b is there. It starts at 0, and at `forget_bias` for the forget gate.
        batch_first: x, the output and the mask are (N, T, ...) rather than (T, N, ...).
        norm: "layer", "batch" (over the batch of a step) or "none" (None is the same).
        normalise_cell: h = s(o) tanh(LN(c)), with a gain and a shift for each of the C units.

    Shape:
        x (T, N, input_size) -> output (T, N, C), (h, c); the state, in and out, is a pair of (1, N, C). mask (T, N)
        bool: where it is False the state stays as it is and the output is 0.

    Raises:
        ValueError: sizes or shapes that do not fit.
        TypeError: a size that is no whole number; what is no tensor, or of another dtype than the weights.

    Source: Ba et al., "Layer Normalization", 2016; Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, for
    normalising the input alone.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        batch_first: bool = False,
        *,
        norm: str | None = "layer",
        normalise_cell: bool = False,
        forget_bias: float = 1.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        cell = _DenseCell(
            input_size, hidden_size, norm, normalise_cell, bias, forget_bias, eps, device, dtype
        )
        super().__init__(cell, batch_first)
        self.input_size, self.hidden_size = input_size, hidden_size

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, norm={self.cell.norm}"


class LayerNormLSTMCell(_Cell):
    """One step of `LayerNormLSTM`, of one input or of two, which are multiplied and normalised apart and added.

        a = LN_x(W_x x) + LN_d(W_d d) + W_h h + b

    Args:
        input_size: features of x; a pair for two inputs.
        hidden_size: C, features of h and c.
        bias, norm, normalise_cell, forget_bias, eps: as those of `LayerNormConvLSTMCell`.

    Shape:
        x (N, input_size), or a pair of them of which the second may be None, for zeros; state (h, c) of (N, C) each or
        None for zeros -> (h', c').

    Raises:
        ValueError: sizes or shapes that do not fit.
        TypeError: a size that is no whole number; what is no tensor, or of another dtype than the weights.

    Source: Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        hidden_size: int,
        bias: bool = True,
        *,
        norm: str | None = "layer",
        normalise_cell: bool = False,
        forget_bias: float = 1.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = one_or_pair("input_size", input_size)
        super().__init__(
            hidden_size, len(sizes), 0, norm, normalise_cell, bias, forget_bias, eps, device, dtype
        )
        self.input_sizes = sizes
        self.weight_ih = nn.ParameterList(
            nn.Parameter(torch.empty(4 * hidden_size, size, device=device, dtype=dtype)) for size in sizes
        )
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden)
        for weight in (*self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        self._reset_vectors()

    def project(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        first, *others = inputs
        assert first is not None
        for t, size in zip(inputs, self.input_sizes, strict=True):
            if t is not None and (t.dim() != 2 or t.shape[1] != size):
                raise ValueError(f"an input must have shape (N, {size}), got {tuple(t.shape)}")
        return linear(first, self.weight_ih[0]), *(
            None if t is None else linear(t, w) for t, w in zip(others, list(self.weight_ih)[1:], strict=True)
        )

    def project_state(self, h: Tensor, weight: Tensor | None = None) -> Tensor:
        return linear(h, self.weight_hh if weight is None else weight)

    def forward(self, x: Tensor | tuple[Tensor, Tensor | None], state: State | None = None) -> State:
        gates = self.project(cell_inputs(x, self.inputs, self.weight_hh))
        if state is not None:
            self.check_state(state, (len(cast(Tensor, gates[0])), self.hidden))
        return self.step(gates, state)

    def extra_repr(self) -> str:
        sizes = self.input_sizes[0] if self.inputs == 1 else self.input_sizes
        return f"{sizes}, {self.hidden}, norm={self.norm}"

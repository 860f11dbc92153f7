"""The recurrent Ladder of Prémont-Schwarz et al. 2017, from a list of its levels."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ladderfast.checks import check_whole
from ladderfast.models.checks import check_floating, check_input, check_mask, check_sizes, check_state
from ladderfast.nn import (
    DecoderGate,
    LayerNormConvLSTMCell,
    LayerNormGRUCell,
    LayerNormLSTMCell,
    StepBatchNorm,
    TopDown,
)
from ladderfast.nn.recurrent_ladder import (
    GATES,
    NORMS,
    UPSAMPLING,
    averaged_statistics,
    make_norm,
    one_of,
)

# Kinds of encoder cells: with a state and without one, at positions and dense.
RECURRENT = {"convlstm": True, "convgru": True, "lstm": False, "gru": False}
STATELESS = {"conv": True, "linear": False}
PLAIN = ("input", "pool", "maxpool")  # what they put out is what came in, or one number of each channel
KINDS = (*RECURRENT, *STATELESS, *PLAIN)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.1),
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}


@dataclass(frozen=True, kw_only=True)
class Level:
    """A level of a recurrent Ladder: its encoder cell and, if it has one, its decoder's gate.

    Args:
        encoder: with a state: "convlstm", "convgru", "lstm", "gru"; without: "conv", "linear" (normalised, then
            activated), "pool" and "maxpool" (the mean and the maximum over positions), "input" (puts out what comes in:
            the lowest level where the decoder shall have a gate beside the data). "lstm", "gru" and "linear" are
            dense; positions that come in are laid out in a row.
        channels: that the cell puts out; not for "pool", "maxpool" and "input".
        kernel_size: of its convolutions, odd.
        stride: of the convolution from below.
        activation: of "conv" and "linear": relu, leaky_relu, tanh or identity.
        norm: "layer", "batch" or "none" in the encoder cell; None: "batch" in cells without a state, and what the
            network says in those with one.
        decoder: the gate, as `ladderfast.nn.DecoderGate` has it: "g1" (dense), "convg1", "convg2" or "convg3". None:
            none, and the signal from above passes this level by. The highest level has none; its d is its e.
        gate_kernel_size: of the gate's convolutions; None: kernel_size.
        gate_norm: None: "batch" for g1, else what the network says.
        upsample: how a signal of fewer positions comes down: "nearest", or "transposed" for a transposed convolution.
        feedback: whether the encoder cell gets its level's d of the step before; None: cells with a state do, where
            there is a gate.
    """

    encoder: str
    channels: int | None = None
    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"
    norm: str | None = None
    decoder: str | None = None
    gate_kernel_size: int | None = None
    gate_norm: str | None = None
    upsample: str = "nearest"
    feedback: bool | None = None

    def __post_init__(self) -> None:
        one_of("encoder", self.encoder, KINDS)
        one_of("activation", self.activation, tuple(ACTIVATIONS))
        one_of("upsample", self.upsample, UPSAMPLING)
        for name in ("norm", "gate_norm"):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), NORMS)
        if self.decoder is not None:
            one_of("decoder", self.decoder, GATES)
        if (self.channels is None) != (self.encoder in PLAIN):
            wanted = "has no channels of its own" if self.encoder in PLAIN else "needs channels"
            raise ValueError(f"encoder {self.encoder} {wanted}, got channels={self.channels}")
        for name in ("channels", "kernel_size", "stride", "gate_kernel_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        for name in ("kernel_size", "gate_kernel_size"):
            if (getattr(self, name) or 1) % 2 == 0:
                raise ValueError(f"{name} must be odd, got {getattr(self, name)}")
        for name, used in self._used().items():
            value = getattr(self, name)
            if not used and value != getattr(type(self), name):
                where = f"encoder {self.encoder}" + ("" if self.decoder is None else f" with {self.decoder}")
                raise ValueError(f"{where} has no use for {name}, got {value!r}")
        if self.feedback and self.encoder in PLAIN:
            raise ValueError(f"encoder {self.encoder} takes no feedback")
        if self.feedback and self.decoder is None:
            raise ValueError("feedback needs a decoder at its level")

    def _used(self) -> dict[str, bool]:
        """Whether an option means something at this level."""
        convolves = self.encoder.startswith("conv")
        gate = self.decoder is not None
        gate_convolves = gate and self.decoder != "g1"
        return {
            "kernel_size": convolves or (gate_convolves and self.gate_kernel_size is None),
            "stride": self.encoder not in PLAIN,  # dense ones refuse it for themselves
            "activation": self.encoder in ("conv", "linear"),
            "norm": self.encoder not in PLAIN,
            "gate_kernel_size": gate_convolves,
            "gate_norm": gate,
            "upsample": gate,
        }


class RLadderState(NamedTuple):
    """What a recurrent Ladder knows after some steps, to be passed to the next one.

    step: steps done. cells: for each level the tensors (N, C, *) of its encoder cell: (h, c) of an LSTM, (h,) of a
    GRU, () of a cell without a state or before the first step. feedback: for each level that takes it the decoder's d
    (N, C, *), else None.
    """

    step: int
    cells: tuple[tuple[Tensor, ...], ...]
    feedback: tuple[Tensor | None, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> RLadderState:
        """The state with the function of each of its tensors, such as `lambda t: t.repeat_interleave(k, 0)`."""
        return RLadderState(
            self.step,
            tuple(tuple(function(t) for t in cell) for cell in self.cells),
            tuple(None if d is None else function(d) for d in self.feedback),
        )

    def detach(self) -> RLadderState:
        """The same numbers, through which no gradient flows back."""
        return self.map(Tensor.detach)


class RLadderOutput(NamedTuple):
    """Of one step; of a sequence all have the axis T of the time steps after N.

    logits (N, num_classes), None without classes. prediction (N, out_channels, *) at the bottom, before any
    squashing, None without out_channels. top (N, C, *): what the highest encoder cell puts out.
    """

    logits: Tensor | None
    prediction: Tensor | None
    top: Tensor


class _Cell(nn.Module):
    """An encoder cell: e and its new state from what comes from below, feedback, state and the number of the step."""

    dense = False  # whether positions are to be laid out in a row
    has_state = False
    state_tensors = 0  # where it has one

    def feedback_scale(self) -> nn.Parameter:
        """What the feedback's part in the cell's sum is proportional to."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, d: Tensor | None, state: tuple[Tensor, ...], step: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError


class _Input(_Cell):
    def forward(self, x, d, state, step):
        return x, ()


class _Pool(_Cell):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x, d, state, step):
        over = tuple(range(2, x.dim()))
        return (x.mean(over) if self.kind == "pool" else x.amax(over)), ()


class _Stateless(_Cell):
    """act(norm(W e + W_d d))."""

    def __init__(
        self, level: Level, in_channels: int, spatial: int, feedback: bool, steps: int, factory: dict
    ) -> None:
        super().__init__()
        assert level.channels is not None
        channels, norm = level.channels, level.norm or "batch"
        self.dense = spatial == 0
        self.activation = level.activation

        def linear(count: int, stride: int, bias: bool) -> nn.Module:
            if spatial == 0:
                return nn.Linear(count, channels, bias=bias, **factory)
            k = level.kernel_size
            return _CONVOLUTIONS[spatial](count, channels, k, stride, k // 2, bias=bias, **factory)

        self.map = linear(in_channels, level.stride, bias=norm == "none")
        self.feedback = linear(channels, 1, bias=False) if feedback else None
        self.norm = make_norm(norm, channels, steps, **factory)

    def feedback_scale(self) -> nn.Parameter:
        assert self.feedback is not None
        return cast(nn.Parameter, self.feedback.weight)

    def forward(self, x, d, state, step):
        a = self.map(x)
        if d is not None:
            assert self.feedback is not None
            a = a + self.feedback(d)
        if self.norm is not None:
            a = self.norm(a, step)
        return ACTIVATIONS[self.activation](a), ()


class _LSTM(_Cell):
    """The layer-normalised LSTM, with batch normalisation by time step in its place where that is asked for."""

    has_state = True
    state_tensors = 2

    def __init__(
        self,
        level: Level,
        in_channels: int,
        spatial: int,
        feedback: bool,
        recurrent: bool,
        norm: str,
        steps: int,
        factory: dict,
    ) -> None:
        super().__init__()
        assert level.channels is not None
        self.dense, self.has_state = spatial == 0, recurrent
        inputs = (in_channels, level.channels) if feedback else in_channels
        self.pair = feedback
        # The cell's own batch norm has one average for all time steps; here each has its own.
        inner = "none" if norm == "batch" else norm
        self.cell: LayerNormLSTMCell | LayerNormConvLSTMCell
        if spatial == 0:
            self.cell = LayerNormLSTMCell(inputs, level.channels, norm=inner, **factory)
        else:
            self.cell = LayerNormConvLSTMCell(
                inputs,
                level.channels,
                level.kernel_size,
                level.stride,
                norm=inner,
                spatial=spatial,
                **factory,
            )
        self.norms = nn.ModuleList()
        if norm == "batch":
            self.norms.extend(
                StepBatchNorm(4 * level.channels, steps, bias=False, **factory) for _ in range(1 + feedback)
            )
        if not recurrent:
            self.cell.weight_hh.requires_grad_(False)

    def feedback_scale(self) -> nn.Parameter:
        if len(self.norms):
            return cast(StepBatchNorm, self.norms[1]).weight
        return (self.cell.norm_weight or self.cell.weight_ih)[1]

    def forward(self, x, d, state, step):
        inputs = (x, d) if self.pair else (x,)
        gates = self.cell.project(inputs)
        if len(self.norms):
            gates = tuple(
                g if t is None else norm(g, step)
                for norm, g, t in zip(self.norms, gates, inputs, strict=True)
            )
        h, c = self.cell.step(gates, state or None)
        return h, (h, c) if self.has_state else ()


class _GRU(_Cell):
    has_state = True
    state_tensors = 1

    def __init__(
        self,
        level: Level,
        in_channels: int,
        spatial: int,
        feedback: bool,
        recurrent: bool,
        norm: str,
        steps: int,
        factory: dict,
    ) -> None:
        super().__init__()
        assert level.channels is not None
        self.dense, self.has_state, self.pair = spatial == 0, recurrent, feedback
        self.cell = LayerNormGRUCell(
            (in_channels, level.channels) if feedback else in_channels,
            level.channels,
            level.kernel_size,
            level.stride,
            norm=norm,
            steps=steps,
            spatial=spatial,
            **factory,
        )
        if not recurrent:
            self.cell.recurrent.weight.requires_grad_(False)

    def feedback_scale(self) -> nn.Parameter:
        return cast(nn.Parameter, (self.cell.norms or self.cell.inputs)[1].weight)

    def forward(self, x, d, state, step):
        h = self.cell((x, d) if self.pair else x, state[0] if state else None, step)
        return h, (h,) if self.has_state else ()


class RLadder(nn.Module):
    """The recurrent Ladder: at each step a pass up through encoder cells, then one down through gates.

        e_l(t), s_l(t) = f_l(e_{l-1}(t), d_l(t-1), s_l(t-1))      bottom to top, e_0(t) = x(t)
        d_l(t) = g_l(e_l(t), d_{l+1}(t))                          top to bottom

    Args:
        input_shape: of a sample at one step: (C, H, W), (C, L), or (features,).
        levels: from the lowest to the highest, each a `Level` or its fields as a mapping.
        num_classes: logits, from the highest level, which must then be dense; None: none.
        out_channels: of the prediction at the bottom, which has the positions of the input; None: none.
        norm: "layer" or "batch" (RTagger) in cells with a state and in gates other than g1.
        norm_steps: time steps for which a batch normalisation keeps statistics of their own (see `StepBatchNorm`).
        decoder: False: no level has a gate: the hierarchical RNN.
        feedback: False: without the connections from the decoder to the encoder of the next step.
        lateral: False: without those from the encoder to the decoder.
        recurrent: False: encoder cells forget their state after each step.
        feedback_gain: at the start the feedback has this many times the weight in an encoder cell that what comes from
            below has. A decoder that has learnt nothing says nothing: with 1, what the class is to be learnt from is
            half noise.
        out_bias: of the prediction, at the start. Of pixels with values 0..1, before the sigmoid, their mean p as
            log(p / (1 - p)), so that training does not begin with finding it.

    One step is `model.step(x, state)`, a sequence `model(x, state)`; both return an `RLadderOutput` and the state
    after it. A state of None is one of zeros.

    >>> levels = [{"encoder": "convlstm", "channels": 32, "decoder": "convg2"},
    ...           {"encoder": "conv", "channels": 64, "stride": 2}, {"encoder": "pool"},
    ...           {"encoder": "lstm", "channels": 128}]
    >>> model = RLadder((1, 32, 32), levels, num_classes=10, out_channels=1)
    >>> output, state = model(torch.rand(8, 5, 1, 32, 32))
    >>> output, state = model.step(torch.rand(8, 1, 32, 32), state)

    Batch normalisation takes the statistics of a step's batch; in stateless cells too, which the paper normalises
    with it: the network sees one step at a time.

    Raises:
        ValueError: levels that do not fit together; the message names the level, counted from 0.

    Source: Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, section 2 and appendices A and D.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        levels: Sequence[Level | Mapping[str, Any]],
        num_classes: int | None = None,
        out_channels: int | None = None,
        norm: str = "layer",
        norm_steps: int = 1,
        decoder: bool = True,
        feedback: bool = True,
        lateral: bool = True,
        recurrent: bool = True,
        feedback_gain: float = 1.0,
        out_bias: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("norm", norm, NORMS)
        check_sizes("input_shape", input_shape, "(C, H, W), (C, L) or (features,)", 3)
        if not levels:
            raise ValueError("levels must have at least one level")
        for name, count in (("num_classes", num_classes), ("out_channels", out_channels)):
            if count is not None:
                check_whole(name, count)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {count}")
        if not (math.isfinite(feedback_gain) and feedback_gain >= 0):
            raise ValueError(f"feedback_gain must be finite and not negative, got {feedback_gain}")
        if not math.isfinite(out_bias):
            raise ValueError(f"out_bias must be finite, got {out_bias}")
        if out_bias and out_channels is None:
            raise ValueError(f"out_bias has no effect without out_channels and must be 0; got {out_bias}")
        self.input_shape = tuple(input_shape)
        self.levels = tuple(_level(number, level, decoder) for number, level in enumerate(levels))
        if self.levels[-1].decoder is not None:
            raise ValueError(f"level {len(levels) - 1}: the highest level has no decoder, its d is its e")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.shapes: list[tuple[int, ...]] = []  # of e and d, by level
        self.takes_feedback: list[bool] = []
        self.encoder = nn.ModuleList()
        below = self.input_shape
        for number, level in enumerate(self.levels):
            wanted = level.feedback if level.feedback is not None else level.encoder in RECURRENT
            self.takes_feedback.append(bool(wanted and feedback and level.decoder is not None))
            with _naming(number):
                cell, below = _encoder_cell(
                    level, number, below, self.takes_feedback[-1], recurrent, norm, norm_steps, factory
                )
            self.encoder.append(cell)
            self.shapes.append(below)
            if self.takes_feedback[-1]:
                with torch.no_grad():
                    cell.feedback_scale().mul_(feedback_gain)
        if feedback_gain != 1 and not any(self.takes_feedback):
            raise ValueError(
                f"feedback_gain has no effect where no level takes feedback and must be 1; got {feedback_gain}"
            )

        self.gates = nn.ModuleDict()
        above, pooled = self.shapes[-1], isinstance(self.encoder[-1], _Pool)
        for number in range(len(self.levels) - 2, -1, -1):
            level = self.levels[number]
            if level.decoder is not None:
                with _naming(number):
                    self.gates[str(number)] = DecoderGate(
                        level.decoder,
                        self.shapes[number],
                        above,
                        level.gate_kernel_size or level.kernel_size,
                        norm=level.gate_norm or (None if level.decoder == "g1" else norm),
                        steps=norm_steps,
                        lateral=lateral,
                        broadcast=pooled,
                        upsample=level.upsample,
                        **factory,
                    )
                above, pooled = self.shapes[number], False
            pooled = pooled or isinstance(self.encoder[number], _Pool)
        if self.gates and out_channels is None and not any(self.takes_feedback):
            raise ValueError("the decoder has no effect: neither out_channels nor feedback is there")
        lowest = self.levels[0]
        self.readout: TopDown | None = None
        if out_channels is not None:
            self.readout = TopDown(
                above,
                (out_channels, *self.input_shape[1:]),
                lowest.gate_kernel_size or lowest.kernel_size,
                broadcast=pooled,
                upsample=lowest.upsample,
                bias=True,
                **factory,
            )
            with torch.no_grad():
                cast(Tensor, self.readout.map.bias).add_(out_bias)
        self.classifier: nn.Linear | None = None
        if num_classes is not None:
            if len(self.shapes[-1]) != 1:
                raise ValueError(
                    f"num_classes needs a dense highest level, got one of shape {self.shapes[-1]}; "
                    "put a level with encoder pool on top"
                )
            self.classifier = nn.Linear(self.shapes[-1][0], num_classes, **factory)
        self.num_classes, self.out_channels = num_classes, out_channels
        self._top_down = bool(self.gates) or self.readout is not None
        if len(self.input_shape) == 3:
            # Convolutions of few channels take a third less time like this on a CPU; the ops take either.
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def step(self, x: Tensor, state: RLadderState | None = None) -> tuple[RLadderOutput, RLadderState]:
        """One step. x (N, *input_shape); state of the step before, None at the start."""
        state = self._checked(x, self.input_shape, state)
        e, encoded, cells = x, [], []
        for cell, d, own in zip(self.encoder, state.feedback, state.cells, strict=True):
            e, new = cell(e.flatten(1) if cell.dense else e, d, own, state.step)
            encoded.append(e)
            cells.append(new)
        logits = None if self.classifier is None else self.classifier(e)
        prediction = None
        feedback: list[Tensor | None] = [None] * len(encoded)
        if self._top_down:
            d = e
            for key, gate in self.gates.items():  # from the highest to the lowest
                number = int(key)
                d = gate(encoded[number], d, state.step)
                if self.takes_feedback[number]:
                    feedback[number] = d
            prediction = None if self.readout is None else self.readout(d)
            if prediction is not None and prediction.shape[2:] != x.shape[2:]:
                prediction = prediction.expand(*prediction.shape[:2], *x.shape[2:])
        after = RLadderState(state.step + 1, tuple(cells), tuple(feedback))
        return RLadderOutput(logits, prediction, e), after

    def forward(
        self,
        x: Tensor,
        state: RLadderState | None = None,
        mask: Tensor | None = None,
        *,
        truncate: int | None = None,
        checkpoint_every: int | None = None,
    ) -> tuple[RLadderOutput, RLadderState]:
        """A sequence.

        Args:
            x: (N, T, *input_shape).
            state: before the first step; None: zeros.
            mask: (N, T) bool, for sequences of different lengths. Where it is False the sample has no part in the
                step, in batch statistics neither: its state stays and the outputs are 0. One that begins later than
                others begins from zeros, which a batch normalisation of feedback does not leave alone.
            truncate: back-propagation is cut before every step whose number, counted from this x's first, is a
                multiple of it.
            checkpoint_every: activations are kept at every so many steps only, and those between are computed again in
                the backward pass: less memory for a third more time.

        Returns:
            The outputs, with an axis T after N, and the state after the last step.
        """
        check_floating("x", x)
        if x.dim() != 2 + len(self.input_shape) or x.shape[1] == 0:
            wanted = ", ".join(str(size) for size in self.input_shape)
            raise ValueError(
                f"x must have shape (N, T, {wanted}) with at least one time step, got {tuple(x.shape)}"
            )
        state = self._checked(x[:, 0], self.input_shape, state)
        for name, value in (("truncate", truncate), ("checkpoint_every", checkpoint_every)):
            if value is not None:
                check_whole(name, value)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        steps = x.shape[1]
        rows = _rows(mask, x)

        def run(first: int, last: int, state: RLadderState) -> tuple[list[RLadderOutput], RLadderState]:
            outputs = []
            for t in range(first, last):
                if truncate is not None and t > 0 and t % truncate == 0:
                    state = state.detach()
                output, state = self._masked_step(x[:, t], state, rows[t])
                outputs.append(output)
            return outputs, state

        outputs: list[RLadderOutput] = []
        again = checkpoint_every is not None and torch.is_grad_enabled()
        for first in range(0, steps, checkpoint_every or steps):
            last = min(first + (checkpoint_every or steps), steps)
            if again:
                part, state = checkpoint(
                    run, first, last, state, use_reentrant=False, context_fn=self._contexts
                )
            else:
                part, state = run(first, last, state)
            outputs.extend(part)
        stacked = (
            None if parts[0] is None else torch.stack(parts, 1) for parts in zip(*outputs, strict=True)
        )
        return RLadderOutput(*stacked), state  # type: ignore[arg-type]  # top is a tensor

    def recompute_statistics(self, batches: Iterable[Tensor | tuple[Tensor, Tensor | None]]) -> None:
        """Make the batch statistics for evaluation plain averages over these sequences (N, T, *input_shape).

        Each is x, or x and the mask (N, T) of the steps that have a part in it, as `forward` takes them.

        Running averages are of weights that are gone: early in training, and behind a mean over positions, whose
        batches differ less from one another than from those of a few steps before, they are of no use.
        """
        if self._batch_norms():
            with averaged_statistics(self):
                for batch in batches:
                    x, mask = (batch, None) if isinstance(batch, Tensor) else batch
                    self(x, None, mask)

    def normalises_samples(self) -> int | None:
        """The lowest level with a batch normalisation over the samples alone, which a single one has no use for."""
        for number, shape in enumerate(self.shapes):
            parts = [self.encoder[number], *([self.gates[str(number)]] if str(number) in self.gates else [])]
            norms = any(isinstance(m, StepBatchNorm) for part in parts for m in part.modules())
            if norms and math.prod(shape[1:]) == 1:
                return number
        return None

    def _batch_norms(self) -> list[StepBatchNorm]:
        return [module for module in self.modules() if isinstance(module, StepBatchNorm)]

    def _masked_step(
        self, x: Tensor, state: RLadderState, rows: Tensor | None
    ) -> tuple[RLadderOutput, RLadderState]:
        """A step of the samples `rows`; None: of all."""
        if rows is None:
            return self.step(x, state)
        output, after = self.step(x[rows], state.map(lambda t: t[rows]))

        def spread(new: Tensor, before: Tensor | None = None) -> Tensor:
            if before is None:
                before = new.new_zeros((len(x), *new.shape[1:]))
            return before.to(new.dtype).index_copy(0, rows, new)

        cells = tuple(
            tuple(spread(t, own[k] if own else None) for k, t in enumerate(new))
            for new, own in zip(after.cells, state.cells, strict=True)
        )
        feedback = tuple(
            None if new is None else spread(new, own)
            for new, own in zip(after.feedback, state.feedback, strict=True)
        )
        outputs = RLadderOutput(*(None if t is None else spread(t) for t in output))  # type: ignore[arg-type]  # top is a tensor
        return outputs, RLadderState(after.step, cells, feedback)

    def _checked(self, x: Tensor, shape: tuple[int, ...], state: RLadderState | None) -> RLadderState:
        check_input("x", x, self)
        if x.shape[1:] != shape:
            wanted = ", ".join(str(size) for size in shape)
            raise ValueError(f"x must have shape (N, {wanted}) at each step, got {tuple(x.shape)}")
        if state is None:
            return RLadderState(0, ((),) * len(self.levels), (None,) * len(self.levels))
        if not isinstance(state, RLadderState):
            raise TypeError(f"state must be an RLadderState or None, got {type(state).__name__}")
        if len(state.cells) != len(self.levels) or len(state.feedback) != len(self.levels):
            raise ValueError(f"state must have {len(self.levels)} levels, got {len(state.cells)}")
        for number, (own, d) in enumerate(zip(state.cells, state.feedback, strict=True)):
            expected, cell = (len(x), *self.shapes[number]), cast(_Cell, self.encoder[number])
            held = cell.state_tensors if cell.has_state else 0
            check_state(f"state of level {number}", own, held, expected, x)
            told = () if d is None else (d,)
            check_state(f"feedback of level {number}", told, int(self.takes_feedback[number]), expected, x)
        return state

    def _contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), self._without_updates()

    @contextlib.contextmanager
    def _without_updates(self) -> Iterator[None]:
        """A step that is computed again counts once in the running averages."""
        norms = self._batch_norms()
        before = [norm.updating for norm in norms]
        for norm in norms:
            norm.updating = False
        try:
            yield
        finally:
            for norm, value in zip(norms, before, strict=True):
                norm.updating = value


def _rows(mask: Tensor | None, x: Tensor) -> list[Tensor | None]:
    """For each step the samples that take part in it; None where all do."""
    if mask is None:
        return [None] * x.shape[1]
    check_mask(mask, x)
    on_cpu = mask.cpu()
    return [
        None if bool(column.all()) else column.nonzero().squeeze(1).to(x.device)
        for column in on_cpu.unbind(1)
    ]


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"level {number}: {error}") from error


def _level(number: int, level: Level | Mapping[str, Any], decoder: bool) -> Level:
    with _naming(number):
        if isinstance(level, Mapping):
            names = [field.name for field in dataclasses.fields(Level)]
            unknown = [key for key in level if key not in names]
            if unknown:
                raise ValueError(f"unknown field {unknown[0]}; there are {', '.join(names)}")
            if "encoder" not in level:
                raise ValueError("encoder is missing")
            level = Level(**level)
        if not isinstance(level, Level):
            raise TypeError(f"must be a Level or a mapping, got {type(level).__name__}")
        return level if decoder else dataclasses.replace(level, decoder=None, feedback=None)


def _encoder_cell(
    level: Level,
    number: int,
    below: tuple[int, ...],
    feedback: bool,
    recurrent: bool,
    norm: str,
    steps: int,
    factory: dict[str, Any],
) -> tuple[_Cell, tuple[int, ...]]:
    """The cell and the shape (C, *) of what it puts out."""
    kind, (channels, *positions) = level.encoder, below
    if kind == "input":
        if number:
            raise ValueError("encoder input is for the lowest level")
        return _Input(), below
    pools = kind in ("pool", "maxpool")
    at_positions = pools or RECURRENT.get(kind, STATELESS.get(kind, False))
    if at_positions and not positions:
        raise ValueError(f"encoder {kind} needs positions, what comes from below has shape {below}")
    if pools:
        return _Pool(kind), (channels,)
    assert level.channels is not None
    if at_positions:
        spatial = len(positions)
        reach = 2 * (level.kernel_size // 2) - level.kernel_size
        shape = (level.channels, *((size + reach) // level.stride + 1 for size in positions))
    else:
        if level.stride != 1:
            raise ValueError(f"stride is for positions, encoder {kind} is dense")
        spatial, channels, shape = 0, math.prod(below), (level.channels,)
    if kind in STATELESS:
        return _Stateless(level, channels, spatial, feedback, steps, factory), shape
    make = _LSTM if kind in ("convlstm", "lstm") else _GRU
    cell = make(level, channels, spatial, feedback, recurrent, level.norm or norm, steps, factory)
    return cell, shape

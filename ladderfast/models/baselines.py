"""Networks that the Ladder family is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ladderfast.checks import check_whole

from .checks import check_input, check_mask, check_sizes, check_state
from .recurrent_ladder import RLadderOutput, RLadderState


class PlainLSTM(nn.Module):
    """torch.nn.LSTM over the flattened input and a linear layer to as many logits, called as an `RLadder` is.

    Args:
        input_shape: of a sample at one step.
        hidden_size: units of each layer.
        num_layers: LSTMs above each other.
        dropout: between layers, and before the logits.

    Raises ValueError for sizes below 1 and a dropout outside [0, 1).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("input_shape", input_shape, "the sizes of a sample")
        for name, count in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            check_whole(name, count)
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
        self.input_shape = tuple(input_shape)
        features = math.prod(self.input_shape)
        between = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(
            features, hidden_size, num_layers, batch_first=True, dropout=between, device=device, dtype=dtype
        )
        self.dropout = nn.Dropout(dropout)
        self.readout = nn.Linear(hidden_size, features, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: RLadderState | None = None, mask: Tensor | None = None
    ) -> tuple[RLadderOutput, RLadderState]:
        """A sequence.

        Args:
            x: (N, T, *input_shape).
            state: before the first step; None: zeros. Its cells are (h, c), each (N, hidden_size), of each layer.
            mask: (N, T) bool; outputs where it is False are 0. The state is that after step T whatever the mask.

        Returns:
            The output, of which prediction is (N, T, *input_shape) and logits None, and the state after the last step.

        Raises TypeError or ValueError for inputs of the wrong kind or shape.
        """
        check_input("x", x, self)
        if x.dim() < 2 or x.shape[2:] != self.input_shape or x.shape[1] == 0:
            wanted = ", ".join(str(size) for size in self.input_shape)
            raise ValueError(
                f"x must have shape (N, T, {wanted}) with at least one time step, got {tuple(x.shape)}"
            )
        if mask is not None:
            check_mask(mask, x)
        if state is not None and not isinstance(state, RLadderState):
            raise TypeError(f"state must be an RLadderState or None, got {type(state).__name__}")
        if state is not None and len(state.cells) != self.lstm.num_layers:
            raise ValueError(f"state must have {self.lstm.num_layers} layers, got {len(state.cells)}")
        before = None
        if state is not None:
            for layer, cell in enumerate(state.cells):
                check_state(f"state of layer {layer}", cell, 2, (len(x), self.lstm.hidden_size), x)
            h, c = (torch.stack([cell[k] for cell in state.cells]) for k in range(2))
            before = (h.to(x.dtype), c.to(x.dtype))
        top, (h, c) = self.lstm(x.flatten(2), before)
        prediction = self.readout(self.dropout(top)).reshape(x.shape)
        if mask is not None:
            top = top * mask.unsqueeze(2)
            prediction = prediction.masked_fill(~mask.reshape(*mask.shape, *[1] * len(self.input_shape)), 0)
        after = RLadderState(
            (0 if state is None else state.step) + x.shape[1],
            tuple(zip(h.unbind(), c.unbind(), strict=True)),
            (None,) * len(h),
        )
        return RLadderOutput(None, prediction, top), after

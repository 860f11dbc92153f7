"""Polyphonic music, one time step ahead: which of the notes will sound next."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderfast.checks import check_whole
from ladderfast.data import PianoRollBatch, PianoRolls
from ladderfast.data.piano_rolls import NOTES, Rolls
from ladderfast.models import PlainLSTM, RLadder, RLadderState

from .metric import Metric
from .objectives import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN, SHOWN_STEPS = 2, 120  # test sequences in the report, and their time steps
STATISTICS = 5  # training batches behind the batch statistics for evaluation


class PianoRollObjective(Objective):
    """The negative log-likelihood of each time step's notes given all before: independent notes, a logit for each.

    In nats, summed over the 88 notes, averaged over time steps, as Boulanger-Lewandowski et al. 2012 (arXiv:1206.6392)
    have it: over all steps of all sequences, the first of each too, which is predicted from silence. The model is
    called as an `RLadder` and puts out (N, T, *input_shape) with 88 elements at each step.

    Where a batch continues the one before, so does the network's state, through which no gradient flows back.

    Args:
        checkpoint_every: time steps from one kept activation to the next, see `RLadder`; null: all are kept.
    """

    metric = Metric("nll", "NLL per step", "nats")  # NLL: negative log-likelihood
    networks = (PlainLSTM, RLadder)
    sources = (PianoRolls,)

    def __init__(self, checkpoint_every: int | None = None) -> None:
        if checkpoint_every is not None:
            check_whole("checkpoint_every", checkpoint_every)
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1 or null, got {checkpoint_every}")
        self._how = {} if checkpoint_every is None else {"checkpoint_every": checkpoint_every}
        self._state: RLadderState | None = None

    def prepare(self, model: Any) -> None:
        shape = getattr(model, "input_shape", None)
        if shape is None or math.prod(shape) != NOTES:
            raise ValueError(
                f"model must have an input_shape of {NOTES} notes for this objective, got {shape}"
            )
        if getattr(model, "readout", None) is None:
            raise ValueError("model must have out_channels for this objective")
        for name in self._how:
            if name not in inspect.signature(model.forward).parameters:
                raise ValueError(f"{name} has no effect with {type(model).__name__}, got {self._how[name]}")
        self._state = None

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        state = self._state if batch.continues else None
        logits, state = self._logits(model, batch, state, **self._how)
        self._state = state.detach()
        return {"notes": step_nll(logits, batch).sum() / batch.mask.sum()}

    def _logits(
        self, model: Any, batch: PianoRollBatch, state: RLadderState | None, **how: Any
    ) -> tuple[Tensor, RLadderState]:
        output, state = model(_input(model, batch), state, batch.mask, **how)
        return output.prediction.reshape(batch.notes.shape), state

    def state_dict(self) -> dict[str, Any]:
        state = self._state
        if state is None:
            return {}
        return {"step": state.step, "cells": [list(c) for c in state.cells], "feedback": list(state.feedback)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = None
        if state:
            cells = tuple(tuple(cell) for cell in state["cells"])
            self._state = RLadderState(state["step"], cells, tuple(state["feedback"]))

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        """On the test sequences: nll as above; nll_of_sequences, the mean over sequences of each one's mean over its
        steps; test_sequences and test_steps, how many there are. Batch statistics for evaluation, if the model has any,
        are computed anew, from the beginnings of the first training sequences."""
        self._renew_statistics(model, data)
        nats, steps = self._by_sequence(model, data.test)
        return {
            "nll": float(nats.sum() / steps.sum()),
            "nll_of_sequences": float((nats / steps).mean()),
            "test_sequences": len(steps),
            "test_steps": int(steps.sum()),
        }

    def validate(self, model: Any, data: Any) -> float | None:
        if not len(data.valid):
            return None
        self._renew_statistics(model, data)
        nats, steps = self._by_sequence(model, data.valid)
        return float(nats.sum() / steps.sum())

    def _renew_statistics(self, model: Any, data: Any) -> None:
        if hasattr(model, "recompute_statistics"):
            begun = (b for b in (data.get(0, step) for step in range(len(data))) if not b.continues)
            model.recompute_statistics(
                (_input(model, batch), batch.mask) for batch in itertools.islice(begun, STATISTICS)
            )

    @torch.no_grad()
    def _by_sequence(self, model: Any, rolls: Rolls) -> tuple[Tensor, Tensor]:
        """Nats and time steps of every sequence, float64 on the CPU."""
        sums: list[Tensor] = []
        state: RLadderState | None = None
        for batch in rolls.parts():
            logits, state = self._logits(model, batch, state if batch.continues else None)
            own = torch.stack((step_nll(logits, batch).double().sum(1), batch.mask.double().sum(1))).cpu()
            if batch.continues:
                sums[-1] += own
            else:
                sums.append(own)
        nats, steps = torch.cat(sums, 1)
        return nats, steps

    @torch.no_grad()
    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        from .music_figures import piano_roll

        training = model.training
        model.eval()
        figures = {}
        for number in range(min(SHOWN, len(data.test))):
            batch = data.test.one(number, SHOWN_STEPS)
            logits, _ = self._logits(model, batch, None)
            figures[f"Test sequence {number + 1}"] = piano_roll(batch.notes[0], logits[0].float().sigmoid())
        model.train(training)
        return figures


def _input(model: Any, batch: PianoRollBatch) -> Tensor:
    return batch.previous.reshape(*batch.mask.shape, *model.input_shape)


def step_nll(logits: Tensor, batch: PianoRollBatch) -> Tensor:
    """(B, T): nats of each time step, summed over its notes; 0 at padding."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.binary_cross_entropy_with_logits(logits, batch.notes.to(logits.dtype), reduction="none").sum(2)
    return nats.where(batch.mask, 0)

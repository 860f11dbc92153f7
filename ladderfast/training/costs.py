"""The costs of an epoch's steps, which stay on the device until somebody looks, and the time the steps take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .processes import Fabric, reduce


class Costs:
    """Costs (terms, *) of one step after another, the last axis, if any, that of several networks.

    Args:
        fabric: whose processes' costs are averaged.
        seeds: of the networks, for the message that names one.
    """

    def __init__(self, fabric: Fabric, seeds: Sequence[int]) -> None:
        self._fabric, self._seeds = fabric, seeds
        self.seconds = 0.0  # spent on training, in all
        self._unread: list[Tensor] = []  # (terms, *) of the steps since the last reading, on the device
        self._clock: float | None = None
        self.new_epoch()

    def new_epoch(self) -> None:
        self._read: list[Tensor] = []  # (steps, terms), on the CPU
        self._epoch_seconds, self._steps = 0.0, 0

    @property
    def all_read(self) -> bool:
        return not self._unread

    def add(self, costs: Tensor) -> None:
        """Those of the next step."""
        self._unread.append(costs)
        self._steps += 1

    def read(self, step: int, epoch: int, terms: Sequence[str]) -> None:
        """Bring the costs since the last reading to the CPU, and raise FloatingPointError if any is not finite.

        step, epoch: numbers, from 1, of the last step and its epoch. terms: names.
        """
        if not self._unread:
            return
        costs = reduce(self._fabric, torch.stack(self._unread), "mean").cpu().double()
        first = step - len(self._unread) + 1
        self._unread = []
        self._read.append(costs if costs.dim() == 2 else costs.mean(-1))
        if not costs.isfinite().all():
            by_term = costs.reshape(len(costs), len(terms), -1)
            row = int((~by_term.isfinite().flatten(1).all(1)).nonzero()[0])
            bad = [
                f"{t} = {v}" + (f" (seed {self._seeds[i]})" if len(self._seeds) > 1 else "")
                for t, values in zip(terms, by_term[row].tolist(), strict=True)
                for i, v in enumerate(values)
                if not math.isfinite(v)
            ]
            raise FloatingPointError(
                f"the cost is not finite at step {first + row} (epoch {epoch}): {', '.join(bad)}; "
                "a lower learning_rate may help"
            )

    def mean(self) -> list[float]:
        """Of each term over the epoch so far, as far as it has been read."""
        return torch.cat(self._read).mean(0).tolist() if self._read else []

    def start_clock(self) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()

    def stop_clock(self) -> None:
        """What follows is no training."""
        if self._clock is not None:
            took = time.perf_counter() - self._clock
            self.seconds += took
            self._epoch_seconds += took
            self._clock = None

    def steps_per_second(self) -> float:
        """Of this epoch, while the clock runs."""
        assert self._clock is not None
        return self._steps / (self._epoch_seconds + time.perf_counter() - self._clock)

    def state_dict(self) -> dict[str, Any]:
        """Without what has not been read."""
        return {
            "costs": torch.cat(self._read) if self._read else None,
            "seconds": self.seconds,
            "epoch_seconds": self._epoch_seconds,
            "timed_steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of `state`, which may hold more, the entries that state_dict has."""
        self._read = [] if state["costs"] is None else [state["costs"]]
        self.seconds, self._epoch_seconds = state["seconds"], state["epoch_seconds"]
        self._steps = state["timed_steps"]

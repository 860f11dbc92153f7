"""Training steps as a CUDA graph: captured once and replayed, which leaves the CPU next to nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .objectives import Objective

WARM_UP = 3  # steps before the capture, in which libraries choose their kernels and allocate


def why_not(
    device: torch.device, batches: Any, *, processes: int, precision: str, objective: Any
) -> str | None:
    """Why a run's steps cannot be captured; None where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if processes > 1:
        return f"{processes} processes train together"
    if precision == "16-mixed":
        return "precision 16-mixed looks at every step's gradients on the CPU"
    if not getattr(batches, "by_index", False):
        return f"{type(batches).__name__} makes its batches step by step on the CPU"
    if type(objective).after_step is not Objective.after_step:
        return f"{type(objective).__name__} has work to do after every step"
    return None


class StaticStep:
    """A training step of which everything that changes from step to step is in tensors that stay where they are.

    The samples of a step are found by a counter on the device in the epoch's orders, which are copied to their place
    when an epoch begins; the noise's state, the learning rate and the optimiser's state are tensors anyway. So a step
    needs nothing from the CPU, and can be replayed as a CUDA graph.

    Args:
        batches: what `take`s samples and has the `orders` of an epoch.
        train: a step on a batch, backward and the optimiser's update included; returns the costs (terms, *).
        state: the tensors that a step changes, those the optimiser has so far among them. They are what they were
            again after the capture.
        reset: called after the steps before the capture: takes back what they left beyond `state`.
    """

    def __init__(
        self,
        batches: Any,
        train: Callable[[Any], Tensor],
        state: Callable[[], Iterable[Tensor]],
        reset: Callable[[], None],
    ) -> None:
        self._batches, self._train, self._state, self._reset = batches, train, state, reset
        self._orders: tuple[Tensor, ...] = ()
        self._epoch: int | None = None
        self._graph: Any = None
        self._costs: Tensor | None = None

    def __call__(self, epoch: int, step: int) -> Tensor:
        """The step of that number of that epoch. Returns its costs, which the next step does not overwrite."""
        self._go_to(epoch, step)
        if self._graph is None and self._orders[0].is_cuda:
            self._capture(step)
        if self._graph is None:
            self._costs = self._body()
        else:
            self._graph.replay()
        self._next = step + 1
        assert self._costs is not None
        return self._costs.clone()

    def _go_to(self, epoch: int, step: int) -> None:
        if epoch != self._epoch:
            orders = self._batches.orders(epoch)
            if not self._orders:
                self._orders = tuple(order.clone() for order in orders)
                self._counter = torch.zeros(1, dtype=torch.long, device=orders[0].device)
            for own, order in zip(self._orders, orders, strict=True):
                own.copy_(order)
            self._epoch, self._next = epoch, -1
        if step != self._next:
            self._counter.fill_(step)

    def _body(self) -> Tensor:
        batch = self._batches.take(*(order.index_select(0, self._counter)[0] for order in self._orders))
        costs = self._train(batch)
        self._counter.add_(1)
        return costs

    def _capture(self, step: int) -> None:
        own = [*self._state(), self._counter]
        before = [tensor.detach().clone() for tensor in own]
        random = torch.cuda.get_rng_state()  # of models that draw from torch's own generator
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._counter.fill_(step)
                self._body()
        torch.cuda.current_stream().wait_stream(stream)
        self._reset()
        with torch.no_grad():
            for tensor, value in zip(own, before, strict=True):
                tensor.copy_(value)
        torch.cuda.set_rng_state(random)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._costs = self._body()

"""One training step on a batch, with Adam: ordinary, or in the form that a CUDA graph holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ensemble import Ensemble
from .graph import StaticStep, why_not
from .objectives import Objective
from .processes import Fabric
from .recipe import Recipe


class TrainingStep:
    """Costs, backward and update of one batch after another.

    Args:
        fabric: the model is put on its device, and wrapped where there are several processes.
        recipe: of its fields, clip_norm, graph and precision.
        model: the network, or the `Ensemble` of several.
        objective: of the costs; the wrapper lets its forward methods through.
        rate: the first learning rate.

    `use` says which batches, and is called before the first step.
    """

    def __init__(
        self, fabric: Fabric, recipe: Recipe, model: nn.Module, objective: Objective, rate: float
    ) -> None:
        self._fabric, self._recipe, self._model = fabric, recipe, model
        self.objective = objective
        self._adam = torch.optim.Adam(
            model.parameters(), lr=rate, fused=fabric.device.type in ("cpu", "cuda")
        )
        module, self.optimizer = fabric.setup(
            model, self._adam
        )  # the same as Fabric steps it, with its precision
        if fabric.world_size > 1:
            for method in objective.forward_methods:
                module.mark_forward_method(method)
        # As the objective calls it. Alone, Fabric's wrapper has nothing to add, and takes its time.
        self._module = module if fabric.world_size > 1 else model
        self.terms: list[str] = []  # names of the costs
        self._batches: Any = None
        self.static: StaticStep | None = None  # how the steps are done where a graph could hold them

    def use(self, batches: Any) -> None:
        """Train with these from now on. Raises ValueError where graph=on cannot be had with them."""
        self._batches = batches
        self.static = self._make_static()

    def __call__(self, epoch: int, step: int) -> Tensor:
        """The step of that number of that epoch. Returns its costs (terms, *), detached."""
        if self.static is not None:
            return self.static(epoch, step)
        return self._train_on(self._batches.get(epoch, step))

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self._adam.param_groups[0]["lr"])

    @rate.setter
    def rate(self, rate: float) -> None:
        for group in self._adam.param_groups:
            if isinstance(group["lr"], Tensor):  # a captured step reads it from there
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def forget(self) -> None:
        """The optimiser knows nothing of any step."""
        self._adam.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's, as it is without a graph, and the terms' names."""
        state = self._adam.state_dict()
        groups = [{**g, "lr": float(g["lr"]), "capturable": False} for g in state["param_groups"]]
        return {"optimizer": {**state, "param_groups": groups}, "terms": self.terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of `state`, which may hold more, the entries that state_dict has."""
        self.terms = state["terms"]
        kept = [{name: group[name] for name in ("lr", "capturable")} for group in self._adam.param_groups]
        self._adam.load_state_dict(state["optimizer"])
        rate = self.rate
        for group, own in zip(self._adam.param_groups, kept, strict=True):
            group.update(own)  # how this run steps, on a GPU with a graph or without, is its own affair
        self.rate = rate

    def _train_on(self, batch: Any) -> Tensor:
        self._adam.zero_grad()
        with self._fabric.autocast():
            terms = self.objective(self._module, batch)
            costs = torch.stack(tuple(terms.values()))
            total = costs.sum()
        del batch  # what the graph does not hold of it need not be there in backward
        self._fabric.backward(total)
        if self._recipe.clip_norm is not None:
            self._clip(self._recipe.clip_norm)
        self.optimizer.step()
        self.objective.after_step(self._model)
        self.terms = list(terms)
        return costs.detach()

    def _clip(self, norm: float) -> None:
        """Scale the gradient down to this norm where it is larger, each network's its own."""
        if isinstance(self._model, Ensemble):
            self._fabric.strategy.precision.unscale_gradients(self.optimizer)
            self._model.clip_gradients(norm)
        else:  # a gradient in 16 bits that is not finite is left for the scaler to skip
            self._fabric.clip_gradients(self._module, self.optimizer, max_norm=norm, error_if_nonfinite=False)

    def _make_static(self) -> StaticStep | None:
        """The step in a form that a CUDA graph can hold, where the recipe wants one and it can be had."""
        recipe, device = self._recipe, self._fabric.device
        if recipe.graph == "off":
            return None
        reason = why_not(
            device,
            self._batches,
            processes=self._fabric.world_size,
            precision=recipe.precision,
            objective=self.objective,
        )
        if reason is not None:
            if recipe.graph == "on":
                raise ValueError(f"graph=on cannot be had: {reason}")
            return None
        rate = torch.zeros((), device=device)
        for group in self._adam.param_groups:
            group.update(lr=rate.fill_(float(group["lr"])), capturable=True)
        return StaticStep(self._batches, self._train_on, self._changing, self._undo_warm_up)

    def _changing(self) -> list[Tensor]:
        """What a training step changes in place."""
        optimizer = [
            t for state in self._adam.state.values() for t in state.values() if isinstance(t, Tensor)
        ]
        return [*self._model.parameters(), *self._model.buffers(), *optimizer]

    def _undo_warm_up(self) -> None:
        """Gradients and what the optimiser had not had before are as before the first step."""
        self._adam.zero_grad()
        for state in self._adam.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

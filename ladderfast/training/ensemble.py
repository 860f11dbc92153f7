"""Networks that differ in their seed alone, trained side by side in one batched program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .objectives import COUNTS, Objective, over_seeds


class _Call(nn.Module):
    """Any function of a module as the forward of one, which is what torch.func.functional_call calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.module, *args)


class Ensemble(nn.Module):
    """Several networks of one architecture as one module: parameters and buffers have an axis of networks in front.

    What is computed goes through torch.func.vmap: a matrix product becomes a batched one, and the ops of
    ladderfast take all networks in one call. But networks with convolutions, which would become grouped ones, slow in
    oneDNN, are computed one after another on a CPU. Random numbers that a network draws from torch's global generator
    are its own, but not those that it would draw alone; noise by a state that is a buffer, as our networks have it, is.

    Args:
        models: networks with the same modules; their parameters and buffers are copied.

    Raises ValueError where there is no network, or their parameters do not have the same names and shapes.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("models must hold at least one network")
        states = [model.state_dict() for model in models]
        for state in states[1:]:
            if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
                raise ValueError("models must have parameters and buffers of the same names and shapes")
        self.stacked = copy.deepcopy(models[0])
        self.size = len(models)
        made: dict[int, nn.Parameter] = {}  # a parameter that several modules share stays one
        for own, *modules in zip(self.stacked.modules(), *[m.modules() for m in models], strict=True):
            for name, parameter in own._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    data = torch.stack([m._parameters[name].detach() for m in modules])
                    made[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
                own._parameters[name] = made[id(parameter)]
            for name, buffer in own._buffers.items():
                if buffer is not None:
                    own._buffers[name] = torch.stack([m._buffers[name] for m in modules])
        # Whether the networks take turns on a CPU.
        self.in_turn_on_cpu = any(isinstance(m, (nn.Conv1d, nn.Conv2d)) for m in self.stacked.modules())
        # In a tuple: the calling module shares the networks' parameters and must not bring them in a second time.
        self._caller = (_Call(self.stacked),)

    def call(self, function: Callable[..., Any], *args: Any, shared: Sequence[bool] | None = None) -> Any:
        """function(network, *args) for every network; results have the axis of networks in front.

        args: tensors, or tuples and dicts of them, with that axis in front too, unless `shared` says of one that all
        networks take the same.
        """
        caller = self._caller[0]
        named = {**dict(caller.named_parameters()), **dict(caller.named_buffers())}

        def one(state: dict[str, Tensor], *args: Any) -> Any:
            return torch.func.functional_call(caller, state, (function, *args))

        dims = [None if whole else 0 for whole in (shared or [False] * len(args))]
        if self.in_turn_on_cpu and all(t.device.type == "cpu" for t in named.values()):
            # All parts of a tensor in one operation, whose backward makes one gradient.
            parts = {name: t.unbind() for name, t in named.items()}
            results = [
                one(
                    {name: part[i] for name, part in parts.items()},
                    *(
                        arg if dim is None else tree_map(lambda t, i=i: t[i], arg)
                        for arg, dim in zip(args, dims, strict=True)
                    ),
                )
                for i in range(self.size)
            ]
            return tree_map(lambda *each: torch.stack(each), *results)
        return torch.func.vmap(one, (0, *dims), randomness="different")(named, *args)

    @torch.no_grad()
    def clip_gradients(self, norm: float) -> None:
        """What torch.nn.utils.clip_grad_norm_ does, for each network by itself."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norms = torch.stack([g.reshape(self.size, -1).norm(dim=1) for g in gradients]).norm(dim=0)
        scale = (norm / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """network(x) of every network, for one x that all of them take."""
        return self.call(lambda network, x: network(x), x, shared=[True])

    def extract(self, index: int) -> nn.Module:
        """Network number `index` alone, a copy."""
        model = copy.deepcopy(self.stacked)
        made: dict[int, nn.Parameter] = {}
        for own, stacked in zip(model.modules(), self.stacked.modules(), strict=True):
            for name, parameter in stacked._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    data = parameter[index].detach().clone()
                    made[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
                own._parameters[name] = made[id(parameter)]
            for name, buffer in stacked._buffers.items():
                if buffer is not None:
                    own._buffers[name] = buffer[index].clone()
        return model

    @torch.no_grad()
    def absorb(self, index: int, model: nn.Module) -> None:
        """Make `model`'s parameters and buffers those of network number `index`."""
        state = self.stacked.state_dict()
        for name, value in model.state_dict().items():
            state[name][index].copy_(value)


class EnsembleObjective(Objective):
    """An objective for each network of an `Ensemble`: the terms of its cost are (networks,).

    Raises ValueError for an objective that has a state of its own, which would be one of them all.
    """

    def __init__(self, objective: Objective) -> None:
        own = type(objective)
        if own.prepare is not Objective.prepare or own.after_step is not Objective.after_step:
            raise ValueError(
                f"{own.__name__} keeps a state, so its networks are trained one by one: seeds must be 1"
            )
        self.objective = objective
        self.metric = objective.metric

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        make = type(batch)
        return model.call(lambda network, *parts: self.objective(network, make(*parts)), *batch)

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        if type(self.objective).measure is Objective.measure:
            return self.objective.measure(model, data)  # in one program
        each = [self.objective.measure(model.extract(i), data.of(i)) for i in range(model.size)]
        figures: dict[str, Any] = {}
        for name in each[0]:
            values = [one[name] for one in each]
            figures.update({name: sum(values)} if name in COUNTS else over_seeds(name, values))
        return figures

    def finish(self, model: Any, data: Any) -> None:
        for index in range(model.size):
            network = model.extract(index)
            self.objective.finish(network, data.of(index))
            model.absorb(index, network)

    def figures(self, model: Any, data: Any) -> dict[str, Any]:
        """Those of the first network."""
        return self.objective.figures(model.extract(0), data.of(0))

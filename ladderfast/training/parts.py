"""What a recipe builds: its data, objective and networks, checked against each other before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ladderfast.data import Dataset, DataSource, GroupedImages, MovingMNIST, OccludedMovingDigits, PianoRolls
from ladderfast.models import SWWAE, LadderNetwork, PlainLSTM, RLadder, RTagger, SWWAEComparison, Tagger

from .ensemble import Ensemble, EnsembleObjective
from .objectives import Objective
from .recipe import Recipe
from .start import start_from

# By family; an objective says which of them it is for.
NETWORKS = (LadderNetwork, PlainLSTM, RLadder, RTagger, SWWAE, SWWAEComparison, Tagger)
SOURCES = (Dataset, GroupedImages, MovingMNIST, OccludedMovingDigits, PianoRolls)


@dataclass
class Parts:
    """dataset: the data. objective: of all networks. model: the network, or the `Ensemble` of several."""

    dataset: DataSource
    objective: Objective
    model: nn.Module


def build(recipe: Recipe, *, fresh: bool) -> Parts:
    """The recipe's parts. Sets torch's threads, if the recipe says how many, and the seed of its global generators, of
    which networks take their start values.

    fresh: the networks start as the recipe says; else a checkpoint will say what they are.

    Raises TypeError and ValueError for what does not fit together.
    """
    dataset: DataSource = recipe.data.build("data", seed=recipe.seed)
    objective: Objective = recipe.objective.build("objective")
    _check_kind("data", dataset, SOURCES, objective, objective.sources)
    if recipe.uses_validation:
        _check_validation(recipe, dataset, objective)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if recipe.seeds > 1:
        _check_several(recipe, dataset)
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    networks = build_networks(recipe, seeds, fresh=fresh)
    _check_kind("model", networks[0], NETWORKS, objective, objective.networks)
    for method in objective.forward_methods:
        if not hasattr(networks[0], method):
            got = type(networks[0]).__name__
            raise TypeError(f"model must have the method {method} for this objective, got {got}")
    objective.check(networks[0])
    objective.check_data(networks[0], dataset, recipe.batch_labelled, recipe.batch_unlabelled)
    if len(seeds) > 1:
        return Parts(dataset, EnsembleObjective(objective), Ensemble(networks))
    return Parts(dataset, objective, networks[0])


def build_networks(recipe: Recipe, seeds: Sequence[int], *, fresh: bool = True) -> list[nn.Module]:
    """A network for each seed, as it is before its first step, or, not `fresh`, before it takes from another run."""
    networks: list[nn.Module] = []
    for seed in seeds:
        torch.manual_seed(seed)
        networks.append(recipe.model.build("model"))
    if fresh and recipe.start_from is not None:
        start_from(networks, recipe.start_from, seeds)
    return networks


def _check_kind(
    name: str, got: object, known: tuple[type, ...], objective: Objective, wanted: tuple[type, ...]
) -> None:
    """Raise TypeError for one of this package's networks or data that the objective is not for."""
    if wanted and isinstance(got, known) and not isinstance(got, wanted):
        kinds = " or ".join(kind.__name__ for kind in wanted)
        raise TypeError(f"{name} must be {kinds} for {type(objective).__name__}, got {type(got).__name__}")


def _check_several(recipe: Recipe, dataset: DataSource) -> None:
    """Raise ValueError where several seeds cannot be trained side by side."""
    if not recipe.on_one_device:
        raise ValueError(
            f"seeds={recipe.seeds} needs one device, as one process trains all of them; "
            f"got devices={recipe.devices!r}, num_nodes={recipe.num_nodes}"
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"seeds={recipe.seeds} is for images with a label each (MNIST, CIFAR-10, Digits and the like), got "
            f"{type(dataset).__name__}; train one seed after another (--seed)"
        )


def _check_validation(recipe: Recipe, dataset: DataSource, objective: Objective) -> None:
    """Raise ValueError where the recipe's course needs a figure on validation samples and there will be none."""
    need = "schedule=halve" if recipe.schedule == "halve" else f"patience={recipe.patience}"
    if not dataset.validation_samples:
        raise ValueError(f"{need} needs validation samples, and {type(dataset).__name__} holds none")
    if not objective.validates:
        raise ValueError(
            f"{need} needs a figure on the validation samples, and {type(objective).__name__} measures none there of "
            f"what the run is judged by, the {objective.metric.words}; test samples have no say in the training"
        )

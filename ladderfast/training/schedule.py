"""The course of a training: learning rates, early stopping, and training anew with what was found out."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .recipe import Recipe


@dataclass
class Course:
    """What a recipe's schedule comes to, given the validation figures so far. Epochs are counted from 0.

    All of it follows from the recipe and the figures. A training has one stage, or, with `retrain`, a second.

    Args:
        recipe: of its fields, epochs, learning_rate, schedule and what belongs to it, patience and retrain.
        higher_is_better: whether a larger figure is the better one.
        figures: of the first stage, one an epoch.
        retraining: whether this is the second stage.
    """

    recipe: Recipe
    higher_is_better: bool = False
    figures: list[float] = field(default_factory=list)
    retraining: bool = False

    @property
    def best(self) -> int | None:
        """Number of epochs, from 1, after which the figure was best; the first of equals. None before any figure."""
        if not self.figures:
            return None
        return 1 + self.figures.index((max if self.higher_is_better else min)(self.figures))

    @property
    def epochs(self) -> int:
        """Epochs of this stage: as far as is known, for it may end before."""
        recipe, best = self.recipe, self.best
        if recipe.patience is None or best is None:
            return recipe.epochs
        if self.retraining:
            return best
        return len(self.figures) if len(self.figures) - best >= recipe.patience else recipe.epochs

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, the same in both stages.

        linear: of E epochs the first D = round(decay_from E) have the full rate r; epoch e >= D has
        r (E - e) / (E + 1 - D), a straight line from r in epoch D - 1 to 0 in epoch E: no epoch learns nothing.
        halve: half the rate of the epoch before where the figure after that one was worse than after the one before it.
        """
        recipe, rate = self.recipe, self.recipe.learning_rate
        if recipe.schedule == "linear":
            assert recipe.decay_from is not None
            full = round(recipe.decay_from * recipe.epochs)
            return rate * min(1.0, (recipe.epochs - epoch) / (recipe.epochs + 1 - full))
        if recipe.schedule == "halve":
            known = self.figures[:epoch]
            for before, after in pairwise(known):
                if after < before if self.higher_is_better else after > before:
                    rate = max(rate / 2, recipe.min_learning_rate or 0.0)
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {"figures": list(self.figures), "retraining": self.retraining}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.figures, self.retraining = list(state["figures"]), state["retraining"]

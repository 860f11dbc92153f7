"""A whole training step of a Tagger on Shapes, `Run.step()`: all iterations, costs, backward and Adam.

Beside it, in the same run: the same network on the reference backend ("plain"), that under torch.compile, and the
floors of bench_training_step.py, which do the matrix products and Adam and nothing else.
"""

from __future__ import annotations

import pytest
from bench_training_step import VARIANTS, Floor, record_step, stepping
from measuring import DEVICES, sync_timer

import ladderfast

RECIPES = ["shapes_small", "shapes"]


def make_run(recipe: str, device: str) -> ladderfast.Run:
    return ladderfast.Run(
        recipe,
        folder=None,
        progress=False,
        accelerator=device,
        epochs=10**6,
        **{"data.num_train": 5000, "data.num_test": 100},
    )


def floor(run: ladderfast.Run) -> Floor:
    """The first iteration's inputs are data, whose gradient nobody wants."""
    step, model = Floor(run), run.model
    rows = run.recipe.batch_unlabelled * run.objective.groups
    inner = [layer.linear for layer in (*model.inner.encoder, *model.inner.decoder) if layer.linear]
    for t in range(run.objective.iterations):
        step.add_map(model.project.linear.weight, rows, again=t > 0)
        if t == 0:
            step.drop_gradient_of_input()
        for each in (*inner, model.read):
            step.add_map(each.weight, rows, again=t > 0)
    return step


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("device", DEVICES)
def bench_tagger_training_step(benchmark, device, recipe, variant):
    if benchmark.disabled and recipe == "shapes":
        pytest.skip("takes long, and says nothing unless it is measured")
    with stepping(variant, lambda: make_run(recipe, device), floor) as step:
        for _ in range(3):
            step()
        benchmark._timer = sync_timer
        benchmark.pedantic(step, rounds=30 if recipe == "shapes_small" else 8, warmup_rounds=2)
        record_step(benchmark, variant, device, recipe, step, "Tagger's training step")

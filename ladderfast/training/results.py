"""What a finished run says of itself: its figures, and the report with them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint
from . import folder as folders

if TYPE_CHECKING:
    from .run import Run


def result_of(run: Run) -> dict[str, Any]:
    """What `Run.fit` returns: the recipe, the figures on the test samples, and what the run took."""
    recipe, changed = run.recipe, run.recipe.changed()
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "seed": recipe.seed,
        "seeds": recipe.seeds,
        **run.evaluate(),
        "published": recipe.published,
        **({"changed": changed} if changed else {}),
        "epochs": run.epochs_done,
        **({} if recipe.patience is None else {"best_epoch": run.course.best}),
        **({"retrained_epochs": run.epoch} if run.course.retraining else {}),
        "steps": run.global_step,
        "seconds": round(run.seconds, 2),
        "parameters": sum(p.numel() for p in run.model.parameters()) // recipe.seeds,
    }


def write_results(folder: Path, run: Run, baseline: Mapping[str, Any] | None) -> None:
    """report.html and, last, results.json, of a run that has its result. baseline: another run's figures."""
    from .report import write_report  # brings matplotlib in

    assert run.result is not None
    write_report(
        folder,
        title=run.recipe.title,
        settings=_settings(run),
        history=run.history,
        result=run.result,
        published=run.recipe.published,
        figures=run.objective.figures(run.model, run.batches),
        metric=run.objective.metric,
        baseline=None if baseline is None else dict(baseline),
    )
    text = json.dumps(run.result, indent=2, ensure_ascii=False) + "\n"
    checkpoint.write_atomically(folder / folders.RESULTS, lambda file: file.write(text.encode()))


def _settings(run: Run) -> dict[str, Any]:
    device = run.fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **run.recipe.flat(),
        "device": f"{device.type} ({name})",
        "processes": run.fabric.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }

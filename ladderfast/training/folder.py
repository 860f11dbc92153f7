"""The folder that a run leaves, and whether another may use it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody looks after the folder then
    fcntl = None  # type: ignore[assignment]

from . import checkpoint
from .logs import EVENTS, METRICS
from .recipe import Recipe, read_recipe

DEFAULT = "runs/{recipe}-seed{seed}"  # says that `default` is to be asked
RECIPE, RESULTS, REPORT = "recipe.yaml", "results.json", "report.html"
LOCK = ".lock"
FILES = (RECIPE, METRICS, RESULTS, REPORT, checkpoint.NEWEST, checkpoint.PREVIOUS)

# What may differ between a run and its continuation: none of it has a part in the result.
FREE = {"graph", "data.data_dir", "data.download", "log_every", "checkpoint_steps", "checkpoint_minutes"}


def default(recipe: Recipe) -> str:
    """The folder of a run that was given none. Raises ValueError where the recipe's name is none of a folder."""
    if any(character in recipe.name for character in "/\\"):
        raise ValueError(f"name must be usable as that of a folder, without slashes, got {recipe.name!r}")
    last = f"-{recipe.seed + recipe.seeds - 1}" if recipe.seeds > 1 else ""
    return DEFAULT.format(recipe=recipe.name, seed=f"{recipe.seed}{last}")


def check_folder(folder: Path) -> None:
    """Raise NotADirectoryError if something else has that name, PermissionError where it cannot be made or written."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to: {there} is not writable")


def check_results(folder: Path) -> None:
    """Raise FileExistsError if there are results, and no checkpoint to continue from."""
    if (folder / RESULTS).exists():
        raise FileExistsError(
            f"{folder} holds {RESULTS} but no checkpoint to continue from: --overwrite trains anew"
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone. Raises FileExistsError while another one has it."""
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is training in {folder}") from None
        except OSError:  # a file system without locks
            yield
            return
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raise FileExistsError if a run, finished or not, has the folder."""
    if any((folder / name).exists() for name in FILES):
        if not any((folder / name).exists() for name in (checkpoint.NEWEST, checkpoint.PREVIOUS)):
            raise FileExistsError(
                f"{folder} already holds a run, without a checkpoint: replace it (--overwrite), start it again as it "
                "was (--resume), or write elsewhere (--out)"
            )
        raise FileExistsError(
            f"{folder} already holds a run: continue it (--resume), replace it (--overwrite), or write "
            "elsewhere (--out)"
        )


def remove_run(folder: Path) -> None:
    """Remove what runs write, and nothing else that may be in the folder."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / EVENTS, ignore_errors=True)


@contextlib.contextmanager
def opened(folder: Path, recipe: Recipe, *, overwrite: bool, fresh: bool) -> Iterator[None]:
    """The folder with the resolved recipe in it, and no other process there meanwhile.

    overwrite: remove the run that is in it. fresh: raise FileExistsError if there is one, for somebody may have come
    first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if overwrite:
            remove_run(folder)
        elif fresh:
            check_free(folder)
        text = recipe.to_yaml()
        checkpoint.write_atomically(folder / RECIPE, lambda file: file.write(text.encode()))
        yield


def continued(
    folder: Path, saved: Mapping[str, Any] | None, recipe: Recipe, fields: Mapping[str, Any]
) -> Recipe:
    """The recipe of the run in `folder`, whose checkpoint is `saved`, if it is the one asked for.

    Fields that are not given keep the value that they had. Raises ValueError for another recipe, or a field
    that matters to the result and has another value now.
    """
    if saved is not None:
        content: Any = saved["recipe"]
    elif (folder / RECIPE).is_file():
        content = folder / RECIPE
    else:
        return recipe
    before, now = read_recipe(content), read_recipe(content, fields)
    if before.name != recipe.name:
        raise ValueError(f"{folder} holds a run of {before.name}, not of {recipe.name}")
    wanted = now.flat()
    for field, value in before.flat().items():
        if wanted[field] != value and field not in FREE:
            raise ValueError(
                f"{field} was {value!r} in {folder} and cannot become {wanted[field]!r} in its continuation"
            )
    return now

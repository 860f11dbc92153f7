"""Recipes: one YAML file a row of a paper's table, read against a typed schema.

A field is addressed by its dotted name. The arguments of the model, the data and the objective stand under
`init_args` in the file and may be named with or without it: `model.noise_std` is `model.init_args.noise_std`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import inspect
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from ladderfast.data import DataSource

from .objectives import Objective

# What each part of a recipe must be, and which of its arguments are not the recipe's to give.
PARTS: dict[str, tuple[type, set[str]]] = {
    "model": (nn.Module, {"device", "dtype"}),
    "data": (DataSource, {"seed"}),
    "objective": (Objective, set()),
}


SCHEDULES = ("linear", "constant", "halve")
DECAY_FROM = 0.667  # of the linear one, where none is given

GRAPH = ("auto", "on", "off")

MOST_THREADS = 1024  # of far more the system makes none, and the process dies

# With another one of these it is still the recipe that is trained.
CIRCUMSTANCES = {
    "seed",
    "seeds",
    "accelerator",
    "strategy",
    "precision",
    "graph",
    "threads",
    "evaluate_every",
    "log_every",
    "checkpoint_steps",
    "checkpoint_minutes",
    "data.data_dir",
    "data.download",
}


@dataclass
class Part:
    """A class by its import path, and the arguments to make an instance with."""

    class_path: str
    init_args: dict[str, Any]

    def build(self, name: str, **extra: Any) -> Any:
        """An instance; `extra` goes to it as well, as far as it takes such arguments."""
        cls = _import_class(name, self.class_path)
        taken = inspect.signature(cls).parameters
        try:
            return cls(**self.init_args, **{k: v for k, v in extra.items() if k in taken})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error


@dataclass(kw_only=True)
class Recipe:
    """Everything that a run needs.

    Args:
        title: what this is, in a few words.
        paper: where it was published.
        row: the table and row of the paper.
        published: the published figure.
        name: the recipe's name; that of its file by default.
        epochs: passes over the unlabelled samples.
        batch_labelled: labelled samples of a step, for each process; 0 where the data have none.
        batch_unlabelled: unlabelled samples of a step, for each process; 0 where the data have none.
        learning_rate: Adam's, at the start.
        schedule: of the learning rate, epoch by epoch: linear, constant, or halve, which halves it whenever the
            validation figure is worse than an epoch before.
        decay_from: of schedule linear, part of the epochs at the full learning rate; it then falls linearly, and
            would be 0 one epoch after the last. null: 0.667.
        min_learning_rate: of schedule halve, below which it does not fall; null for no such bound.
        patience: stop when the validation figure has not become better for so many epochs; what counts is the best
            epoch's network. null: train all epochs.
        retrain: afterwards train anew, from the same start values, on training and validation samples together: with
            the same learning rate in each epoch, for as many epochs as were best with patience, or all of them.
        clip_norm: scale the gradient down to this norm where it is larger; null for never.
        seed: of the labels drawn, the order of the samples, the start values and the noise.
        start_from: folder of a run whose network this one starts as, as far as it has parameters and buffers of the
            same name and shape; layers that grew are new. {seed} in it stands for the seed of each network, or for
            the seeds, as in 1-10, of a run that has them side by side. null: a start of its own.
        seeds: networks trained side by side, with the seeds seed, seed + 1 and so on, in one batched program.
        accelerator: cpu, cuda, mps or auto, as Lightning Fabric understands it.
        devices: how many devices, or which; one process runs for each.
        num_nodes: machines.
        strategy: Fabric's strategy for several processes; auto takes ddp.
        precision: 32-true, 64-true, bf16-mixed, 16-mixed, bf16-true or 16-true.
        graph: auto captures the training step as a CUDA graph wherever that can be done, on insists on it, off leaves
            it. A Ladder's numbers are the same, but that the learning rate is then rounded to float32.
        threads: of torch's operations on the CPU, at most 1024; null for as many as torch would take. Sums depend on
            it, in their last bits.
        evaluate_every: epochs from one measurement of the test error to the next; the last one is always
            measured.
        log_every: steps between two readings of the costs, each of which waits for the device.
        checkpoint_steps: save after every so many steps as well; null for epochs' ends and minutes alone.
        checkpoint_minutes: save within an epoch when the last checkpoint is that old.
    """

    title: str
    model: Part
    data: Part
    objective: Part
    epochs: int
    paper: str = ""
    row: str = ""
    published: str | None = None
    name: str = ""
    batch_labelled: int = 100
    batch_unlabelled: int = 100
    learning_rate: float = 0.002
    schedule: str = "linear"
    decay_from: float | None = None
    min_learning_rate: float | None = None
    patience: int | None = None
    retrain: bool = False
    clip_norm: float | None = None
    seed: int = 1
    start_from: str | None = None
    seeds: int = 1
    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    graph: str = "auto"
    threads: int | None = None
    evaluate_every: int = 1
    log_every: int = 50
    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "num_nodes",
            "seeds",
            "evaluate_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.graph not in GRAPH:
            raise ValueError(f"graph must be one of {', '.join(GRAPH)}, got {self.graph!r}")
        for name in ("batch_labelled", "batch_unlabelled"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("checkpoint_steps", "threads", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {getattr(self, name)}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {self.threads}")
        for name in ("learning_rate", "checkpoint_minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive and finite or null, got {self.clip_norm}")
        self._check_schedule()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def _check_schedule(self) -> None:
        """Refuse what has no effect with the schedule, and what the schedule cannot be without."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name, schedule in (("decay_from", "linear"), ("min_learning_rate", "halve")):
            if getattr(self, name) is not None and self.schedule != schedule:
                raise ValueError(
                    f"{name} has no effect with schedule={self.schedule}, only with {schedule}, "
                    f"and must be null; got {getattr(self, name)}"
                )
        if self.schedule == "linear" and self.decay_from is None:
            self.decay_from = DECAY_FROM
        if self.decay_from is not None and not 0 <= self.decay_from <= 1:
            raise ValueError(f"decay_from must be from 0 to 1, got {self.decay_from}")
        if self.min_learning_rate is not None and not 0 < self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be positive and at most learning_rate={self.learning_rate}, "
                f"got {self.min_learning_rate}"
            )
        if self.retrain and not self.uses_validation:
            raise ValueError(
                f"retrain has no effect with schedule={self.schedule} and without patience, "
                "as nothing is then found out from the validation samples"
            )
        if self.seeds > 1 and self.uses_validation:
            what = "schedule=halve" if self.schedule == "halve" else "patience"
            raise ValueError(f"{what} needs seeds=1, as each network would go its own way; got {self.seeds}")

    @property
    def uses_validation(self) -> bool:
        """Whether the course of training depends on the validation figure."""
        return self.schedule == "halve" or self.patience is not None

    @property
    def on_one_device(self) -> bool:
        one = self.devices in (1, "1") or (isinstance(self.devices, list) and len(self.devices) == 1)
        return one and self.num_nodes == 1

    def to_dict(self) -> dict[str, Any]:
        """As in a recipe's file, with every field."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """Every field by its short dotted name."""
        return _flatten(self.to_dict(), self.name)

    def changed(self) -> dict[str, Any]:
        """The fields in which this is another experiment than the shipped recipe of its name, by dotted name."""
        if self.name not in recipe_names():
            return {}
        shipped = read_recipe(self.name).flat()
        return {k: v for k, v in self.flat().items() if k not in CIRCUMSTANCES and v != shipped.get(k)}

    def to_yaml(self) -> str:
        return yaml.safe_dump(
            self.to_dict(), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
        )


def changed_text(changed: Mapping[str, Any]) -> str:
    """`Recipe.changed` for a sentence: epochs=2, model.layers=[64, 10]."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed.items()
    )


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = files("ladderfast") / "recipes"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(recipe: str | Path | Mapping[str, Any], fields: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its name, its file or its content, with some fields changed.

    recipe: a name out of `recipe_names()`, the path of a YAML file, or a mapping as in such a file.
    fields: by name, dotted or nested; text is read as YAML where the field is not text, as on a command line.

    Raises ValueError or TypeError with one sentence for what is unknown, missing, ill-typed or out of range;
    FileNotFoundError and other OSErrors for a file that cannot be read.
    """
    source, content = _load(recipe)
    flat = {"name": source, **{k: _as_from_yaml(v) for k, v in _flatten(content, source).items()}}
    changes = {k: _as_from_yaml(v) for k, v in _flatten(fields or {}, "the fields given").items()}
    for part in PARTS:
        path = f"{part}.class_path"
        if changes.get(path, flat.get(path)) != flat.get(path):  # another class has other arguments
            flat = {k: v for k, v in flat.items() if not k.startswith(f"{part}.")}
    flat.update(changes)

    missing = [f"{part}.class_path" for part in PARTS if f"{part}.class_path" not in flat]
    if missing:
        raise ValueError(f"{source}: {missing[0]} is missing")
    classes = {part: _import_class(part, flat[f"{part}.class_path"]) for part in PARTS}
    parser = make_parser(classes)
    known = [*parser.get_defaults().keys(), *(f"{part}.class_path" for part in PARTS)]
    for field in flat:
        if field not in known:
            if field == "data.data_dir":
                raise ValueError(f"{source}: unknown field {field}: its data are not read from files")
            near = difflib.get_close_matches(field, known, 1)
            raise ValueError(
                f"{source}: unknown field {field}" + (f"; did you mean {near[0]}?" if near else "")
            )
    for field in known:
        annotation, required = _annotation(field, classes)
        if required and field not in flat:
            raise ValueError(f"{source}: {field} is missing")
        if required and flat[field] is None:  # jsonargparse would call it missing
            raise TypeError(f"{source}: {field} must be {annotation}, got None")

    given: dict[str, Any] = {part: {} for part in PARTS}
    for field, value in flat.items():
        part, _, name = field.rpartition(".")
        if name != "class_path":
            (given[part] if part else given)[name] = value
    try:
        parsed = _plain(parser.parse_object(copy.deepcopy(given)))  # in lists it changes mappings in place
    except ArgumentError as error:
        raise _explain(error, flat, classes, source) from error
    for field in flat:
        part, _, name = field.rpartition(".")
        if name == "class_path":
            continue
        value = (parsed[part] if part else parsed)[name]
        if (foreign := _foreign(value)) is not None:  # an argument without a type takes anything
            raise TypeError(
                f"{source}: {field} must be numbers, text, lists and mappings, as in a file, got {foreign!r}"
            )
        annotation, _ = _annotation(field, classes)
        # jsonargparse takes null for every type
        if value is None and not re.search(r"\b(None|Optional|Any|object|of another type)\b", annotation):
            raise TypeError(f"{source}: {field} must be {annotation}, got None")
    for part, cls in classes.items():
        parsed[part] = Part(f"{cls.__module__}.{cls.__qualname__}", parsed.get(part) or {})
        parsed[part].class_path = flat[f"{part}.class_path"]
    try:
        return Recipe(**parsed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def make_parser(classes: Mapping[str, type]) -> ArgumentParser:
    """The schema of a recipe whose parts are of these classes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None, skip=set(PARTS), fail_untyped=False)
    for part, cls in classes.items():
        parser.add_class_arguments(cls, part, skip=PARTS[part][1], fail_untyped=False)
    return parser


def describe_fields(recipe: Recipe) -> str:
    """Every field of the recipe with its value, type and meaning: the second half of a command's help."""
    classes = {part: _import_class(part, getattr(recipe, part).class_path) for part in PARTS}
    values = recipe.flat()
    known = list(make_parser(classes).get_defaults().keys())
    lines = []
    for part, cls in {"": Recipe, **classes}.items():
        meanings = _meanings(cls)
        lines.append(f"{part}: {cls.__module__}.{cls.__qualname__}" if part else "run")
        for field in known:
            if field.rpartition(".")[0] == part:
                value = yaml.safe_dump(
                    values[field], default_flow_style=True, width=math.inf, allow_unicode=True
                )
                lines.append(f"  --{field} {value.splitlines()[0]}")
                meaning = meanings.get(field.rpartition(".")[2], "")
                text = f"{meaning} ({_annotation(field, classes)[0]})".strip()
                lines.extend(textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
        lines.append("")
    return "\n".join(lines)


def _meanings(cls: type) -> dict[str, str]:
    """What the Args section of a class's docstring says of each argument."""
    found: dict[str, str] = {}
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
    name = ""
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        if match := re.match(r" {4}(\w+)[^:]*: *(.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _load(recipe: str | Path | Mapping[str, Any]) -> tuple[str, Any]:
    if isinstance(recipe, Mapping):
        return str(recipe.get("name") or "recipe"), recipe
    text = str(recipe)
    if isinstance(recipe, Path) or text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(recipe).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no recipe file {path}")
        name, raw = path.stem, path.read_bytes()
    elif text in recipe_names():
        name, raw = text, (files("ladderfast") / "recipes" / f"{text}.yaml").read_bytes()
    else:
        near = difflib.get_close_matches(text, recipe_names(), 1)
        hint = f"did you mean {near[0]}?" if near else "`ladderfast recipes` lists them"
        raise ValueError(f"there is no recipe {text!r}; {hint}")
    try:
        content = yaml.load(raw.decode(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{text} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{text} must hold fields and their values, got {type(content).__name__}")
    return name, content


class _Loader(yaml.SafeLoader):
    """A key that stands twice in a mapping is an error, and not the last of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value} stands there twice, in lines {lines[key.value]} and {line}"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _flatten(nested: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Short dotted names: {"model": {"init_args": {"noise_std": 0.3}}} is {"model.noise_std": 0.3}."""
    flat: dict[str, Any] = {}
    forms: dict[str, str] = {}  # how each stands there

    def add(path: Sequence[str], value: Any) -> None:
        name, form = ".".join(path).replace(".init_args.", "."), ": ".join(path)
        if name in flat:
            raise ValueError(f"{source}: {name} is given twice, as {forms[name]} and as {form}")
        flat[name], forms[name] = value, form

    for key, value in nested.items():
        if key not in PARTS:
            add([str(key)], value)
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"{source}: {key} must be a mapping with class_path and init_args, got {value!r}")
        for name, inner in value.items():
            if name != "init_args":
                add([key, str(name)], inner)
            elif isinstance(inner, Mapping):
                for argument, v in inner.items():
                    add([key, "init_args", str(argument)], v)
            elif inner is not None:
                raise TypeError(f"{source}: {key}.init_args must be a mapping, got {inner!r}")
    return flat


def _plain(value: Any) -> Any:
    """Dicts in the place of jsonargparse's namespaces, in lists as well."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _as_from_yaml(value: Any) -> Any:
    """The value as a file would give it: numpy's numbers, text and arrays as Python's, which alone can be written."""
    if isinstance(value, (np.generic, np.ndarray)):
        return _as_from_yaml(value.tolist()) if value.dtype != object else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a `Level`
        return _as_from_yaml(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {_as_from_yaml(key): _as_from_yaml(inner) for key, inner in value.items()}
    return [_as_from_yaml(inner) for inner in value] if isinstance(value, (list, tuple, range)) else value


def _foreign(value: Any) -> Any:
    """The first thing in the value that no file could give; None where there is none."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return next((found for inner in value if (found := _foreign(inner)) is not None), None)
    return None if value is None or type(value) in (bool, int, float, str) else value


def _import_class(part: str, path: Any) -> type:
    base = PARTS[part][0]
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{part}.class_path: {path!r} cannot be imported ({error})") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise TypeError(
            f"{part}.class_path must be a subclass of {base.__module__}.{base.__qualname__}, got {path!r}"
        )
    return found


def _annotation(field: str, classes: Mapping[str, type]) -> tuple[str, bool]:
    """The field's type in words, and whether it must be given."""
    part, _, name = field.rpartition(".")
    if name == "class_path":
        return "str", True
    parameter = inspect.signature(classes.get(part, Recipe)).parameters.get(name)
    if parameter is None:
        return "of another type", False
    annotation = parameter.annotation
    if annotation is parameter.empty:
        text = "Any"
    else:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text, parameter.default is parameter.empty


def _explain(
    error: ArgumentError, flat: Mapping[str, Any], classes: Mapping[str, type], source: str
) -> Exception:
    """One sentence out of jsonargparse's several lines."""
    found = re.search(r'Parser key "([^"]+)"', str(error))
    if found and found[1] in flat:
        field = found[1]
        return TypeError(f"{source}: {field} must be {_annotation(field, classes)[0]}, got {flat[field]!r}")
    return ValueError(f"{source}: {' '.join(str(error).split())}")


def published_table() -> Sequence[tuple[str, str, str, str]]:
    """(recipe, paper, row, published figure) of every recipe of the package."""
    rows = []
    for name in recipe_names():
        content = _load(name)[1]  # not checked and completed, which takes longer for all than importing torch
        row = content.get("row") or content.get("title", "")
        rows.append((name, content.get("paper", ""), row, content.get("published") or ""))
    return rows

"""The command line: `ladderfast train | evaluate | recipes | info`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ladderfast.training.metric import Metric

TRAIN = """\
Train RECIPE: one of `ladderfast recipes`, or a YAML file of your own.

Any field of the recipe can be given another value, by its dotted name: --epochs 3, --model.noise_std 0.2,
--objective.denoising_weights '[1000, 10, 0, 0, 0, 0, 0]'.
Ctrl-C and SIGTERM save and stop; --resume continues where a run was stopped or killed, to the same bits.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # in one line, without the usage
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` and return its exit code.

    0; 1: it failed; 2: wrong input; 130 and 143: stopped by Ctrl-C and by SIGTERM; 141: its reader has gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every output can show what stands in titles and help
        sys.stdout.reconfigure(errors="replace")
    with contextlib.suppress(OSError):  # the working directory may be gone
        if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # so that classes of one's own are found, as by python -m
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
            if sys.stdout is not None:
                sys.stdout.flush()
            elif not code:  # it is closed, and print says nothing of it
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return code
        except BrokenPipeError:  # who reads has read enough, as head does
            _drop_output()
            return 141
        except OSError as error:
            print(f"ladderfast: error: standard output: {error.strerror or error}", file=sys.stderr)
            _drop_output()
            return 1
        except KeyboardInterrupt:
            return 130


def _run(argv: list[str]) -> int:
    fields: dict[str, Any] = {}
    try:
        if argv[:1] == ["train"]:
            rest, fields = _split_fields(argv[1:])
            argv = ["train", *rest]
        arguments = _parser().parse_args(argv)
        arguments.command(arguments, fields)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _drop_output() -> None:
    """What is still to be flushed goes nowhere."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ladderfast", description="Ladder networks: train, evaluate, and what is installed."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser(
        "train",
        help="train a recipe",
        description=TRAIN,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ladderfast train RECIPE [options] [--FIELD VALUE ...]",
    )
    train.add_argument("recipe", metavar="RECIPE", nargs="?")
    train.add_argument("--data-dir", metavar="FOLDER", help="where the data's files are (MNIST's four)")
    train.add_argument("--seed", metavar="N", help="of labels, order, start values and noise")
    train.add_argument("--out", metavar="FOLDER", help="the run's folder (default: runs/RECIPE-seedN)")
    train.add_argument("--resume", action="store_true", help="continue the run in that folder")
    train.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    train.add_argument(
        "--compare", metavar="BASELINE", help="train this recipe too, and set the figures side by side"
    )
    train.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        help="train N seeds side by side, and say mean and standard deviation",
    )
    train.add_argument("-h", "--help", action="store_true", help="this, and with RECIPE its fields")
    train.set_defaults(command=_train, parser=train)

    evaluate = commands.add_parser(
        "evaluate", help="measure a trained network", description="Measure the test error."
    )
    evaluate.add_argument("folder", metavar="RUN_FOLDER", help="what `train` left")
    evaluate.add_argument("--data-dir", metavar="FOLDER", help="where the data's files are now")
    evaluate.add_argument("--textures", metavar="FOLDER", help="where its pictures of textures are now")
    evaluate.add_argument("--accelerator", metavar="NAME", default="auto", help="cpu, cuda, mps or auto")
    evaluate.add_argument(
        "--adversarial",
        metavar="TAU",
        type=float,
        help="measure under adversarial noise of this size on the input too, and under random signs of that size",
    )
    evaluate.set_defaults(command=_evaluate)

    recipes = commands.add_parser("recipes", help="list the recipes and the published figures")
    recipes.set_defaults(command=_recipes)
    info = commands.add_parser("info", help="versions, what was built, which backend each op takes")
    info.set_defaults(command=_info)
    return parser


VALUES = ("--data-dir", "--seed", "--out", "--compare", "--seeds")
FLAGS = ("--resume", "--overwrite", "--help")


def _split_fields(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate the options of `train` from the recipe's fields."""
    rest: list[str] = []
    fields: dict[str, Any] = {}
    given: set[str] = set()
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if not token.startswith("--") or name in FLAGS:
            rest.append(token)
            continue
        if not equals:
            following = next(tokens, None)
            if following is None or following.startswith("--"):
                _fail(f"{name} needs a value", 2)
            value = following
        field = name[2:].replace("-", "_")
        if field in given:
            _fail(f"{name} is given twice", 2)
        given.add(field)
        if name in VALUES:
            rest.append(f"{name}={value}")
        else:
            fields[field] = value
    return rest, fields


def _train(arguments: argparse.Namespace, fields: dict[str, Any]) -> None:
    if arguments.help:
        _train_help(arguments)
        return
    if arguments.recipe is None:
        _fail("train needs a RECIPE; `ladderfast recipes` lists them", 2)
    if arguments.resume and arguments.overwrite:
        _fail("--resume and --overwrite exclude each other", 2)
    if arguments.seed is not None:
        fields["seed"] = arguments.seed
    if arguments.seeds is not None:
        fields["seeds"] = arguments.seeds
    if arguments.data_dir is not None:
        fields["data.data_dir"] = arguments.data_dir
    options = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    if arguments.out is not None:
        options["folder"] = arguments.out
    if arguments.compare is not None:
        _train_compared(arguments, fields, options)
        return

    with _errors(2):
        with _importing():
            from ladderfast.training import Run

        run = Run(arguments.recipe, **options, **fields)
    with _errors(1):
        result = run.fit()
    if run.fabric.is_global_zero:
        print(_summary(result, run.objective.metric))
        print(f"{run.folder}/report.html")


def _train_compared(arguments: argparse.Namespace, fields: dict[str, Any], options: dict[str, Any]) -> None:
    """The baseline and then the recipe, each in a folder of its own."""
    sources = [arguments.compare, arguments.recipe]
    with _errors(2):
        with _importing():
            from ladderfast.training import Run, read_recipe

        recipes = [read_recipe(source, fields) for source in sources]
        names = [recipe.name for recipe in recipes]
        if len(set(names)) < len(names):
            raise ValueError(f"--compare needs another recipe than {names[0]}")
        if not all(recipe.on_one_device for recipe in recipes):
            raise ValueError("--compare trains one run after the other, each on one device")
        judged = [recipe.objective.build("objective").metric for recipe in recipes]
        if judged[0].name != judged[1].name:
            raise ValueError(
                f"--compare needs recipes that are judged by the same figure; {names[1]} is by the {judged[1].words}, "
                f"{names[0]} by the {judged[0].words}"
            )
    results: dict[str, dict[str, Any]] = {}
    out = options.pop("folder", None)
    for name, source in zip(names, sources, strict=True):
        if out is not None:
            options["folder"] = Path(out) if name == names[-1] else Path(out, name)
        with _errors(2):
            run = Run(source, **options, **fields)
        with _errors(1):
            results[name] = run.fit(baseline=results.get(names[0]))
    print(_table(results, run.objective.metric))
    print(f"{run.folder}/report.html")


def _train_help(arguments: argparse.Namespace) -> None:
    with _errors(2):
        with _importing():
            from ladderfast.training.recipe import describe_fields, read_recipe

        recipe = read_recipe(arguments.recipe or "digits")
        text = describe_fields(recipe)
    arguments.parser.print_help()
    print(f"\nFields, with their values in {recipe.name}:\n\n{text}", end="")


def _evaluate(arguments: argparse.Namespace, fields: dict[str, Any]) -> None:
    with _errors(2):
        with _importing():
            from ladderfast.training import Run

        moved = {} if arguments.textures is None else {"data.textures": arguments.textures}
        run = Run.load(
            arguments.folder, data_dir=arguments.data_dir, accelerator=arguments.accelerator, **moved
        )
        if arguments.adversarial is not None:
            run.check_robustness(arguments.adversarial)
    with _errors(1):
        figures = run.evaluate()
        robust = None if arguments.adversarial is None else run.robustness(arguments.adversarial)
    published = {
        "published": run.recipe.published,
        "title": run.recipe.title,
        "changed": run.recipe.changed(),
    }
    print(
        _summary(
            {**published, **figures, "epochs": run.epochs_done, "seconds": run.seconds}, run.objective.metric
        )
    )
    if others := _others(figures, run.objective.metric):
        print(others)
    if robust is not None:
        print(
            f"test error without noise {robust['test_error']:.2f} %, with {robust['tau']:g} times random signs "
            f"{robust['random_sign_error']:.2f} %, times the gradient's signs {robust['adversarial_error']:.2f} %"
        )
    if not run.finished:
        print(f"not finished: {run.epochs_done} of {run.epochs_planned} epochs are done")


def _recipes(arguments: argparse.Namespace, fields: dict[str, Any]) -> None:
    with _errors(2):
        with _importing():
            from ladderfast.training.recipe import published_table

        rows = [("recipe", "paper", "row", "published figure"), *published_table()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _info(arguments: argparse.Namespace, fields: dict[str, Any]) -> None:
    from ladderfast import info

    info.main()


def _summary(result: dict[str, Any], metric: Metric) -> str:
    of = f" ({result['test_errors']} of {result['test_samples']})" if "test_errors" in result else ""
    text = (
        f"{result['title']}: {metric.words} {metric.text(result)}{of} after {result['epochs']} "
        f"epoch{'s'[: result['epochs'] != 1]} in {result['seconds']:.0f} s"
    )
    if f"{metric.name}_by_seed" in result:
        text += f"; of {len(result[f'{metric.name}_by_seed'])} seeds"
    if result["published"]:
        text += f"; published: {result['published']}"
    if changed := result.get("changed"):
        from ladderfast.training.recipe import changed_text

        text += f"; not the recipe as it is, but with {changed_text(changed)}"
    return text


def _others(figures: dict[str, Any], metric: Metric) -> str:
    """What was measured beside the figure that the run is judged by: "name value", several to a line."""
    shown = {metric.name, "test_errors", "test_samples"}
    texts = [
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}"
        for name, value in figures.items()
        if isinstance(value, (int, float, str)) and name not in shown
    ]
    return textwrap.fill(", ".join(text.replace(" ", "\0") for text in texts), 100).replace("\0", " ")


def _table(results: dict[str, dict[str, Any]], metric: Metric) -> str:
    """The figures by recipe and seed, their means, and what the difference is."""
    (baseline, worse), (recipe, better) = results.items()
    points = abs(worse[metric.name] - better[metric.name])
    what = "less" if better[metric.name] < worse[metric.name] else "more"
    lines = []
    by_seed = f"{metric.name}_by_seed"
    if by_seed in better:
        head = f"{metric.words} in {metric.unit}" if metric.unit else metric.words
        width = max(map(len, [*results, head]))
        seeds = [f"seed {better['seed'] + i}" for i in range(len(better[by_seed]))]
        lines.append(" ".join([f"{head:{width}}", *(f"{seed:>8}" for seed in seeds), "  mean"]))
        for name, result in results.items():
            values = (f"{value:8.2f}" for value in result[by_seed])
            lines.append(" ".join([f"{name:{width}}", *values, f"  {metric.text(result, unit=False)}"]))
    unit = {"%": "points ", "": ""}.get(metric.unit, f"{metric.unit} ")
    difference = f"{points:.2f} {unit}{what}" if points else "no difference"
    lines.append(
        f"{recipe} has a {metric.words} of {metric.text(better)}, {baseline} of {metric.text(worse)}: "
        f"{difference}."
    )
    return "\n".join([*lines, *_beside(results, metric)])


def _beside(results: dict[str, dict[str, Any]], metric: Metric) -> list[str]:
    """What else both runs have measured, and what they took: a line each."""
    said = {metric.name, f"{metric.name}_std", "seed", "seeds", "test_errors", "test_samples"}
    both = list(results.values())
    rows = [
        [name, *(f"{one[name]:.4g}" if isinstance(one[name], float) else str(one[name]) for one in both)]
        for name in both[1]
        if name not in said and all(isinstance(one.get(name), (int, float)) for one in both)
    ]
    if not rows:
        return []
    rows.insert(0, ["", *results])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "",
        *(
            "  ".join(
                [
                    name.ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)),
                ]
            )
            for name, *cells in rows
        ),
    ]


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Ctrl-C ends the process at once: packages that it meets in their import swallow it, or fail in their own way."""
    usual = signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is usual
    if ours:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def _errors(code: int) -> Iterator[None]:
    """Make an error one line on stderr and an exit code."""
    try:
        yield
    except Exception as error:
        if os.environ.get("LADDERFAST_TRACEBACK"):
            traceback.print_exc()
        from ladderfast.ops.backend import BackendError

        known = isinstance(
            error, (ValueError, TypeError, OSError, ImportError, ArithmeticError, BackendError)
        )
        hint = "" if known else " (LADDERFAST_TRACEBACK=1 shows where)"
        _fail(f"{error if known else repr(error)}{hint}", code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"ladderfast: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)

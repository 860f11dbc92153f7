"""What a run says while it trains: metrics.csv, TensorBoard's events, and a progress bar."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import write_atomically
from .metric import Metric

METRICS, EVENTS = "metrics.csv", "tensorboard"

Row = dict[str, Any]

# Differs from run to run, and so is in no file that must have the same bytes after a resumption.
TIMES = ("steps_per_second",)


class Log:
    """metrics.csv and TensorBoard's events of a run folder; one row an epoch.

    `history` holds the rows up to the position that the run starts from: what the files have beyond it, left
    by a process that was killed after its last checkpoint, is taken back.
    """

    def __init__(self, folder: Path, history: Sequence[Row]) -> None:
        self._path = folder / METRICS
        self._fields: list[str] = []
        if history:
            self._fields = [name for name in history[0] if name not in TIMES]
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self._fields, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
            write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))
        else:
            self._path.unlink(missing_ok=True)
        purge = history[-1]["step"] + 1 if history else 0
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=purge)

    def write(self, row: Row) -> None:
        first = not self._fields
        if first:
            self._fields = [name for name in row if name not in TIMES]
        with open(self._path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._fields, extrasaction="ignore", lineterminator="\n")
            if first:
                writer.writeheader()
            writer.writerow(row)
        for name, value in row.items():
            if name not in ("epoch", "step") and value is not None:
                self._events.add_scalar(name, value, row["step"])
        self._events.flush()

    def close(self) -> None:
        self._events.close()


_ERROR = Metric()


class ProgressBar:
    """A bar on a terminal; elsewhere a line now and then."""

    SECONDS_BETWEEN_LINES = 5.0
    BESIDE = 18  # columns for a bar, a time and the gaps

    def __init__(
        self, title: str, steps: int, done: int, metric: Metric = _ERROR, *, file: IO[str] | None = None
    ) -> None:
        self._console = Console(stderr=True) if file is None else Console(file=file)
        self._title, self._steps, self._done, self._metric = title, steps, done, metric
        self._said = time.monotonic()
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            *(() if self._console.width < 100 else (TimeElapsedColumn(),)),
            TimeRemainingColumn(),
        )
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task(title, total=steps, completed=done, figures="")
            self._bar.start()

    def expect(self, steps: int) -> None:
        """`steps` in all are expected now."""
        if self._bar is not None:
            self._bar.update(self._task, total=steps)

    def advance(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def show(self, epoch: int, epochs: int, figures: Mapping[str, float | None], *, ended: bool) -> None:
        """The latest figures, as far as they are known: the metric, also of validation, total, steps_per_second.

        ended: whether they are of the whole epoch; elsewhere than on a terminal only those are shown. A terminal shows
        of them what has room beside a bar.
        """
        name, metric = self._metric.name, self._metric
        measured = None if figures.get(name) is None else metric.text({name: figures[name]})
        held_out, total, speed = (figures.get(n) for n in (metric.validation, "total", "steps_per_second"))
        cost = None if total is None else f"cost {total:.4g}"
        named = measured and f"{metric.words} {measured}"
        full = (
            named,
            held_out if held_out is None else f"validation {metric.text({name: held_out})}",
            cost,
            speed if speed is None else f"{speed:.1f} steps/s",
        )
        if self._bar is not None:
            pace = speed if speed is None else f"{speed:.1f}/s"
            forms = [", ".join(filter(None, f)) for f in (full, (named, cost, pace), (measured, cost, pace))]
            description = f"{self._title} {epoch}/{epochs}"
            room = self._console.width - len(description) - self.BESIDE
            text = next((form for form in forms if len(form) <= room), forms[-1])
            self._bar.update(self._task, description=description, figures=text)
        elif ended and (epoch == epochs or time.monotonic() - self._said >= self.SECONDS_BETWEEN_LINES):
            self._said = time.monotonic()
            self.say(f"{self._title}: epoch {epoch}/{epochs}, {', '.join(filter(None, full))}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

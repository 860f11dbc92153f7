"""A run: what a recipe describes, set up, trained, measured and written down."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ladderfast.data import EnsembleBatches

from . import checkpoint, parts, processes, robustness
from . import folder as folders
from .costs import Costs
from .ensemble import Ensemble
from .logs import Log, ProgressBar, Row
from .memory import keep_memory
from .objectives import Objective
from .recipe import read_recipe
from .results import result_of, write_results
from .schedule import Course
from .signals import StopRequest
from .step import TrainingStep


class Run:
    """One training run of a recipe.

        run = ladderfast.Run("mnist_100_full", data_dir="mnist", seed=1)
        run.step()          # one training step, its costs
        run.fit()           # the rest, with progress; leaves a folder
        run.evaluate()      # {"test_error": percent, ...}
        run.model           # the network

    With seeds=10 ten networks are trained side by side (see `Ensemble`), each as its seed alone would be, to rounding;
    costs and errors then are means, evaluate() has the standard deviation too, and `run.network(i)` is one of them.

    On a CPU the process keeps the memory that a step gives back for the next one (`training.memory.keep_memory`).

    Args:
        recipe: a recipe's name or YAML file.
        folder: where `fit` writes; None for nowhere. Nothing is written before. The default is a folder for
            each recipe and seed.
        resume: continue the run in that folder from its last checkpoint, to the same bits as if it had never
            stopped. Without a checkpoint it starts at the beginning. The fields are those of the run that is
            continued, and none that matters to the result may be given another value.
        overwrite: remove the run that is in that folder.
        progress: show a progress bar, and say what happens, on stderr.
        data_dir: the folder of the data's files, for data that are read from files.
        **fields: any field of the recipe; those of a part as a mapping, model={"noise_std": 0.2}, or by
            dotted name, **{"model.noise_std": 0.2}.

    Sets the seed of torch's global generators, of which the model takes its start values and its noise, and
    torch's number of threads if the recipe says one.

    Raises:
        TypeError, ValueError: a field that is unknown, ill-typed or out of range; data that are not what they
            should be; a checkpoint that does not fit.
        FileNotFoundError: no such recipe file, or data files.
        FileExistsError: the folder holds a run already, and neither resume nor overwrite was said.
    """

    def __init__(
        self,
        recipe: str | Path | Mapping[str, Any],
        *,
        folder: str | Path | None = folders.DEFAULT,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
        data_dir: str | Path | None = None,
        **fields: Any,
    ) -> None:
        if data_dir is not None:
            fields["data.data_dir"] = str(data_dir)
        self.recipe = read_recipe(recipe, fields)
        if folder == folders.DEFAULT:
            folder = folders.default(self.recipe)
        self.folder = None if folder is None else Path(folder).expanduser()
        self.progress = progress
        self._overwrite = overwrite
        saved = None
        self._fresh = not resume
        if self.folder is not None:
            folders.check_folder(self.folder)
        if self.folder is not None and resume:
            saved = checkpoint.load(self.folder)
            if saved is None:
                folders.check_results(self.folder)
                if progress and processes.is_first():
                    warnings.warn(
                        f"{self.folder} holds no checkpoint: the run starts at its beginning",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            self.recipe = folders.continued(self.folder, saved, self.recipe, fields)
        elif self.folder is not None and not overwrite and processes.is_first():
            folders.check_free(self.folder)
        self._setup(fresh=saved is None)
        if saved is not None:
            self._restore(saved)

    @classmethod
    def load(cls, folder: str | Path, *, data_dir: str | Path | None = None, **fields: Any) -> Run:
        """The run in `folder` at its last checkpoint, in this process alone, to evaluate or to use its model.

        Nothing is written to the folder. fields: may change where it is computed, accelerator, devices or
        precision, and where data are found, {"data.textures": folder}. Raises FileNotFoundError if there is no
        checkpoint, ValueError if none is whole.
        """
        folder = Path(folder).expanduser()
        saved = checkpoint.load(folder)
        if saved is None:
            raise FileNotFoundError(f"{folder} holds no checkpoint of a run")
        run = cls.__new__(cls)
        if data_dir is not None:
            fields["data.data_dir"] = str(data_dir)
        alone = {"devices": 1, "num_nodes": 1, "strategy": "auto", "accelerator": "auto", "graph": "auto"}
        run.recipe = read_recipe(saved["recipe"], {**alone, **fields})
        run.folder, run.progress, run._overwrite, run._fresh = None, False, False, False
        run._setup(fresh=False)
        run._restore(saved, random=False)
        return run

    def _setup(self, *, fresh: bool) -> None:
        recipe = self.recipe
        # Whatever can be wrong with the input is found before other processes are started.
        built = parts.build(recipe, fresh=fresh)
        self._dataset, self.model = built.dataset, built.model
        self.course = Course(recipe, built.objective.metric.higher_is_better)

        self.fabric = fabric = processes.make_fabric(recipe)
        fabric.launch()
        if fabric.device.type == "cpu":
            keep_memory()
        self._stepper = TrainingStep(
            fabric, recipe, self.model, built.objective, self.course.learning_rate(0)
        )
        self.objective.prepare(self.model)
        self._train_with(self._dataset)
        if fabric.global_rank:
            torch.manual_seed(recipe.seed + (fabric.global_rank << 32))  # noise of its own for each process
        processes.own_noise(fabric, self.model)
        # Whatever else draws random numbers before the first step has no part in the run.
        self._random: dict[str, Tensor] | None = checkpoint.random_state(fabric.device)
        self._at_start = (self._random, copy.deepcopy(fabric.strategy.precision.state_dict()))

        self.epoch = 0  # complete ones of this stage
        self._steps_before = 0  # of the stage before
        self._best: dict[str, Any] | None = None  # the network that early stopping would go back to
        self.step_in_epoch = 0
        self.history: list[Row] = []
        self.result: dict[str, Any] | None = None
        self._costs = Costs(fabric, range(recipe.seed, recipe.seed + recipe.seeds))

    def _train_with(self, dataset: Any) -> None:
        self.batches = self._make_batches(dataset)
        self._stepper.use(self.batches)

    def _make_batches(self, dataset: Any) -> Any:
        recipe = self.recipe
        sizes = (recipe.batch_labelled, recipe.batch_unlabelled)
        kind: dict[str, Any] = {"device": self.fabric.device, "dtype": next(self.model.parameters()).dtype}
        if recipe.seeds > 1:
            seeds = range(recipe.seed, recipe.seed + recipe.seeds)
            return EnsembleBatches([dataset.with_seed(s) for s in seeds], *sizes, seeds=seeds, **kind)
        kind.update(rank=self.fabric.global_rank, world_size=self.fabric.world_size)
        return dataset.batches(*sizes, seed=recipe.seed, **kind)

    @property
    def objective(self) -> Objective:
        """What the steps minimise and what is measured."""
        return self._stepper.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self._stepper.objective = objective

    @property
    def global_step(self) -> int:
        """Training steps done."""
        return self._steps_before + self.epoch * len(self.batches) + self.step_in_epoch

    @property
    def epochs_done(self) -> int:
        """Complete epochs, those before a retraining among them."""
        return self.epoch + (len(self.course.figures) if self.course.retraining else 0)

    @property
    def epochs_planned(self) -> int:
        """What `epochs_done` will be at the end, as far as is known: more if there will be a retraining."""
        return self.epochs_done - self.epoch + self.course.epochs

    @property
    def seconds(self) -> float:
        """Spent on training."""
        return self._costs.seconds

    @property
    def finished(self) -> bool:
        return self.epoch >= self.course.epochs and (self.course.retraining or not self.recipe.retrain)

    def step(self) -> dict[str, Tensor]:
        """One training step. Returns its weighted costs in nats by name, and their "total".

        They are 0-dim tensors, (seeds,) if there are several, on the device and detached: to read one waits for the
        device. The costs are checked every `log_every` steps.

        Raises RuntimeError when all epochs are done, FloatingPointError for a cost that is not finite.
        """
        costs = self._train_step()
        if self.step_in_epoch == len(self.batches):
            self._end_epoch(measure=False)
        return costs

    def fit(self, *, baseline: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Train to the end, with progress, and return the figures: `evaluate`'s and what the run took.

        Leaves in the folder the resolved recipe, metrics.csv, TensorBoard's events, checkpoints,
        results.json and report.html. Ctrl-C and SIGTERM save and stop. baseline: the figures of another
        run, for the report.

        Raises FloatingPointError for a cost that is not finite, KeyboardInterrupt after Ctrl-C and SystemExit
        (143) after SIGTERM.
        """
        recipe, main = self.recipe, self.fabric.is_global_zero
        folder = self.folder if main else None
        log: Log | None = None
        bar = (
            ProgressBar(recipe.name, self._steps_planned(), self.global_step, self.objective.metric)
            if main and self.progress
            else None
        )
        pace = checkpoint.Pace(recipe.checkpoint_minutes, recipe.checkpoint_steps)
        with StopRequest() as stop, contextlib.ExitStack() as closing:
            if bar is not None:
                closing.callback(bar.close)
            if folder is not None and self.finished:
                closing.enter_context(self._open_folder(folder))
            while not self.finished:
                self._train_step()
                if folder is not None and log is None:
                    # Only now, as most of what is wrong with a recipe shows in the first step: what is in the folder
                    # is still there then, and nothing is left behind.
                    closing.enter_context(self._open_folder(folder))
                    log = Log(folder, self.history)
                    closing.callback(log.close)
                if bar is not None:
                    bar.advance()
                if pace.falls_on(self.global_step):
                    self._read_costs()
                read = self._costs.all_read
                ended = self.step_in_epoch == len(self.batches)
                if ended:
                    row = self._end_epoch(measure=True)
                    if log is not None:
                        log.write(row)
                    if bar is not None:
                        bar.expect(self._steps_planned())
                        bar.show(row["epoch"], self.epochs_planned, row, ended=True)
                elif read and bar is not None:
                    bar.show(self.epochs_done + 1, self.epochs_planned, self._current(), ended=False)
                if self.finished or (self.fabric.world_size > 1 and not (ended or read)):
                    continue  # several processes agree on what to do next only where they meet anyway
                stopping = processes.in_any(self.fabric, stop.received is not None)
                due = processes.in_any(self.fabric, pace.due(self.global_step, epoch_ended=ended))
                if self.folder is not None and (stopping or due):
                    with pace.saving():
                        self._save()
                if stopping:
                    return self._stop(stop.received, bar)
            result = self._finish(baseline, folder)
            if stop.received is not None:  # whoever calls may have more to train
                return self._stop(stop.received, bar)
            return result

    def evaluate(self) -> dict[str, Any]:
        """Figures on the test samples, with the statistics for evaluation as they are.

        For a classifier test_error in percent, test_errors, test_samples, test_cross_entropy in nats; see the
        objective's `measure`. Of several networks the means, and with _std and _by_seed behind the name the deviation
        (n - 1) and what each has.
        """
        with self._measuring():
            return self.objective.measure(self.model, self.batches)

    def check_robustness(self, tau: float) -> None:
        """Raise the ValueErrors of `robustness`, before what takes long."""
        with self._measuring():
            robustness.check_robustness(self.model, self.batches, tau, self.recipe.seeds)

    def robustness(self, tau: float, *, seed: int = 1) -> dict[str, Any]:
        """Test errors in percent without noise and under two kinds of noise on the input of the same power.

        test_error; adversarial_error, under tau times the sign of the gradient of the true label's cross-entropy; and
        random_sign_error, under tau times random signs, which `seed` draws. tau in the input's units (0..1 for MNIST).
        Any classifier will do. Raises ValueError for a tau that is negative, or a run of several seeds.
        """
        self.check_robustness(tau)
        with self._measuring():
            return robustness.robustness(self.model, self.batches, tau, seed)

    def network(self, index: int) -> nn.Module:
        """A copy of network number `index` of those trained side by side, counted from 0."""
        if not 0 <= index < self.recipe.seeds:
            raise IndexError(f"index must be from 0 to {self.recipe.seeds - 1}, got {index}")
        return self.model.extract(index) if isinstance(self.model, Ensemble) else copy.deepcopy(self.model)

    def _train_step(self) -> dict[str, Tensor]:
        if self.finished:
            raise RuntimeError(f"all {self.epochs_done} epochs are done")
        self.result = None  # what there is belongs to fewer epochs
        if not self.model.training:
            self.model.train()
        if self._random is not None:
            checkpoint.restore_random_state(self._random, self.fabric.device)
            self._random = None
        self._costs.start_clock()
        if self.step_in_epoch == 0:
            self._stepper.rate = self.course.learning_rate(self.epoch)
        costs = self._stepper(self.epoch, self.step_in_epoch)
        self._costs.add(costs)
        self.step_in_epoch += 1
        if self.global_step % self.recipe.log_every == 0:
            self._read_costs()
        return {"total": costs.sum(0), **dict(zip(self._stepper.terms, costs.unbind(), strict=True))}

    def _read_costs(self) -> None:
        """Refuses what is not finite."""
        self._costs.read(self.global_step, self.epochs_done + 1, self._stepper.terms)

    def _current(self) -> Row:
        """Figures of the epoch so far, as far as they have been read."""
        costs = self._costs.mean()
        metric = self.objective.metric
        shown = [metric.validation, metric.name] if self._dataset.validation_samples else [metric.name]
        return {
            "epoch": self.epochs_done + 1,
            **({"stage": 1 + self.course.retraining} if self.recipe.retrain else {}),
            "step": self.global_step,
            "total": sum(costs),
            **dict(zip(self._stepper.terms, costs, strict=True)),
            **{name: self.history[-1][name] if self.history else None for name in shown},
            "learning_rate": self._stepper.rate,
            "steps_per_second": self._costs.steps_per_second(),
        }

    def _end_epoch(self, *, measure: bool) -> Row:
        """Close the epoch with a row of the history, and go to the next, or to the retraining."""
        self._read_costs()
        row = self._current()
        self._costs.stop_clock()
        self._costs.new_epoch()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        recipe, course, metric = self.recipe, self.course, self.objective.metric
        if recipe.uses_validation and not course.retraining:
            figure = self._validate()
            if figure is None:
                raise ValueError(
                    f"{type(self.objective).__name__} measured nothing on the validation samples"
                )
            course.figures.append(figure)
            if recipe.patience is not None and not recipe.retrain and course.best == self.epoch:
                self._best = copy.deepcopy(
                    {"model": self.model.state_dict(), "objective": self.objective.state_dict()}
                )
        goes_back = self.finished and self._best is not None and course.best != self.epoch
        if self.finished and not goes_back:
            self.objective.finish(self.model, self.batches)
        ended = self.epoch >= course.epochs
        measure = measure and (self.epoch % recipe.evaluate_every == 0 or ended)
        row[metric.name] = self.evaluate()[metric.name] if measure else None
        if metric.validation in row:
            if course.retraining:
                row[metric.validation] = None
            elif recipe.uses_validation:
                row[metric.validation] = course.figures[-1]
            else:
                row[metric.validation] = self._validate() if measure else None
        self.history.append(row)
        if goes_back:  # the row is of the last epoch's network, the figures will be of this one
            assert self._best is not None
            self.model.load_state_dict(self._best["model"])
            self.objective.load_state_dict(self._best["objective"])
            self.objective.finish(self.model, self.batches)
        if self.finished:
            self._best = None
        elif ended:
            self._start_again()
        return row

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """The model as it answers, in the run's precision and without autograd; then as it was."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.fabric.autocast():
                yield
        finally:
            self.model.train(training)

    def _validate(self) -> float | None:
        """The metric on the validation samples, the same in all processes; None where it is not measured."""
        with self._measuring():
            figure = self.objective.validate(self.model, self.batches)
        if figure is None:
            return None
        if not math.isfinite(figure):
            raise FloatingPointError(
                f"{self.objective.metric.words} on the validation samples is {figure} after epoch {self.epochs_done}"
            )
        if self.fabric.world_size > 1:
            everywhere = torch.tensor(figure, device=self.fabric.device)
            figure = processes.reduce(self.fabric, everywhere, "mean").item()
        return float(figure)

    def _start_again(self) -> None:
        """The second stage: everything as it was before the first step, but for the samples and what `course` knows."""
        self._steps_before = self.global_step
        self.epoch = 0
        (network,) = parts.build_networks(self.recipe, [self.recipe.seed])
        self.model.load_state_dict(network.state_dict())
        self._stepper.forget()
        self.objective = self.recipe.objective.build("objective")
        self.objective.prepare(self.model)
        processes.own_noise(self.fabric, self.model)
        self._random, precision = self._at_start
        self.fabric.strategy.precision.load_state_dict(copy.deepcopy(precision))
        self._begin_retraining()

    def _begin_retraining(self) -> None:
        self.course.retraining = True
        self._train_with(self._dataset.with_validation_in_training())

    def _steps_planned(self) -> int:
        return self._steps_before + self.course.epochs * len(self.batches)

    def _finish(self, baseline: Mapping[str, Any] | None, folder: Path | None) -> dict[str, Any]:
        if self.result is None:
            self.result = result_of(self)
            if self.folder is not None:
                self._save()
        if folder is not None:
            write_results(folder, self, baseline)
        return dict(self.result)

    def _stop(self, number: int | None, bar: ProgressBar | None) -> dict[str, Any]:
        if bar is not None:
            where, then = f"stopped after step {self.global_step}", ", --resume continues"
            if self.finished:
                where, then = f"{where}, the last", ""
            else:
                where += f" (epoch {self.epochs_done + 1} of {self.epochs_planned})"
            bar.say(where if self.folder is None else f"{where}; saved in {self.folder}{then}")
        if not self.fabric.is_global_zero:
            return {}  # a process that Fabric started must end well, or Fabric kills the first one
        if number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def _open_folder(self, folder: Path) -> Iterator[None]:
        with folders.opened(folder, self.recipe, overwrite=self._overwrite, fresh=self._fresh):
            self._overwrite = self._fresh = False
            yield

    def _save(self) -> None:
        self._costs.stop_clock()
        self._read_costs()
        everyone = processes.gather(self.fabric, checkpoint.random_state(self.fabric.device))
        if self.fabric.is_global_zero:
            assert self.folder is not None
            state = {
                "recipe": self.recipe.to_dict(),
                "course": self.course.state_dict(),
                "steps_before": self._steps_before,
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "world_size": self.fabric.world_size,
                "threads": torch.get_num_threads(),
                "model": self.model.state_dict(),
                **self._stepper.state_dict(),
                "objective": self.objective.state_dict(),
                "best": self._best,
                "precision": self.fabric.strategy.precision.state_dict(),
                "random": everyone,
                **self._costs.state_dict(),
                "history": self.history,
                "result": self.result,
            }
            checkpoint.save(self.folder, state)
        self.fabric.barrier()

    def _restore(self, saved: dict[str, Any], *, random: bool = True) -> None:
        if random and saved["world_size"] != self.fabric.world_size:
            raise ValueError(
                f"the run in {self.folder} was trained by {saved['world_size']} processes and cannot be continued "
                f"by {self.fabric.world_size}"
            )
        if random and saved["threads"] != torch.get_num_threads():
            warnings.warn(
                f"the run in {self.folder} had {saved['threads']} threads, this one has {torch.get_num_threads()}: "
                "the last bits of the numbers may come out otherwise",
                RuntimeWarning,
                stacklevel=3,
            )
        self.course.load_state_dict(saved["course"])
        if self.course.retraining:
            self._begin_retraining()
        self._steps_before, self._best = saved["steps_before"], saved["best"]
        self.model.load_state_dict(saved["model"])
        processes.own_noise(self.fabric, self.model)
        self._stepper.load_state_dict(saved)
        self.objective.load_state_dict(saved["objective"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        if random:
            self._random = saved["random"][self.fabric.global_rank]
        self.epoch, self.step_in_epoch = saved["epoch"], saved["step_in_epoch"]
        self.history, self.result = saved["history"], saved["result"]
        self._costs.load_state_dict(saved)

"""A run: what a recipe describes, set up, trained, measured and written down."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import platform
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ladderfast.data import Dataset, DataSource, EnsembleBatches

from . import checkpoint
from . import folder as folders
from .adversarial import adversarial_noise, check_tau, input_gradient
from .ensemble import Ensemble, EnsembleObjective
from .graph import StaticStep, why_not
from .logs import Log, ProgressBar, Row
from .memory import keep_memory
from .objectives import Objective
from .recipe import Recipe, read_recipe
from .schedule import Course
from .signals import StopRequest
from .start import start_from

try:
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.rank_zero import rank_zero_only
except ImportError:  # the large package holds the same under another name
    from lightning.fabric import Fabric  # type: ignore[no-redef]
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # type: ignore[no-redef]


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
                if progress and getattr(rank_zero_only, "rank", 0) == 0:
                    warnings.warn(
                        f"{self.folder} holds no checkpoint: the run starts at its beginning",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            self.recipe = folders.continued(self.folder, saved, self.recipe, fields)
        elif self.folder is not None and not overwrite and getattr(rank_zero_only, "rank", 0) == 0:
            folders.check_free(self.folder)
        self._setup(fresh=saved is None)
        if saved is not None:
            self._restore(saved)

    @classmethod
    def load(cls, folder: str | Path, *, data_dir: str | Path | None = None, **fields: Any) -> Run:
        """The run in `folder` at its last checkpoint, in this process alone, to evaluate or to use its model.

        Nothing is written to the folder. fields: may change where it is computed: accelerator, devices,
        precision. Raises FileNotFoundError if there is no checkpoint, ValueError if none is whole.
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
        self._dataset: DataSource = recipe.data.build("data", seed=recipe.seed)
        self.objective: Objective = recipe.objective.build("objective")
        if recipe.uses_validation:
            _check_validation(recipe, self._dataset, self.objective)
        self.course = Course(recipe, self.objective.metric.higher_is_better)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        if recipe.seeds > 1 and not recipe.on_one_device:
            raise ValueError(
                f"seeds={recipe.seeds} needs one device, as one process trains all of them; "
                f"got devices={recipe.devices!r}, num_nodes={recipe.num_nodes}"
            )
        if recipe.seeds > 1 and not isinstance(self._dataset, Dataset):
            raise ValueError(
                f"seeds={recipe.seeds} is for images with a label each (MNIST, CIFAR-10, Digits and the like), got "
                f"{type(self._dataset).__name__}; train one seed after another (--seed)"
            )
        seeds = range(recipe.seed, recipe.seed + recipe.seeds)
        networks: list[nn.Module] = []
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append(recipe.model.build("model"))
        if fresh and recipe.start_from is not None:
            start_from(networks, recipe.start_from, seeds)
        for method in self.objective.forward_methods:
            if not hasattr(networks[0], method):
                got = type(networks[0]).__name__
                raise TypeError(f"model must have the method {method} for this objective, got {got}")
        self.objective.check(networks[0])
        self.objective.check_data(networks[0], self._dataset, recipe.batch_labelled, recipe.batch_unlabelled)
        model = networks[0]
        if len(seeds) > 1:
            model, self.objective = Ensemble(networks), EnsembleObjective(self.objective)

        self.fabric = fabric = _make_fabric(recipe)
        fabric.launch()
        device = fabric.device
        if device.type == "cpu":
            keep_memory()
        fused = device.type in ("cpu", "cuda")
        adam = torch.optim.Adam(model.parameters(), lr=self.course.learning_rate(0), fused=fused)
        # `module` is the model as the objective calls it, wrapped where there are several processes.
        self.module, self.optimizer = fabric.setup(model, adam)
        self.model = model
        if fabric.world_size > 1:
            for method in self.objective.forward_methods:
                self.module.mark_forward_method(method)
        else:
            self.module = model  # Fabric's wrapper has nothing to add, and takes its time
        self._adam = adam
        self.objective.prepare(model)
        self.batches = self._make_batches(self._dataset)
        self._static = self._make_static()
        if fabric.global_rank:
            torch.manual_seed(recipe.seed + (fabric.global_rank << 32))  # noise of its own for each process
        self._own_noise()
        # Whatever else draws random numbers before the first step has no part in the run.
        self._random: dict[str, Tensor] | None = checkpoint.random_state(device)
        self._at_start = (self._random, copy.deepcopy(fabric.strategy.precision.state_dict()))

        self.epoch = 0  # complete ones of this stage
        self._steps_before = 0  # of the stage before
        self._best: dict[str, Any] | None = None  # the network that early stopping would go back to
        self.step_in_epoch = 0
        self.history: list[Row] = []
        self.seconds = 0.0
        self.result: dict[str, Any] | None = None
        self._terms: list[str] = []
        self._unread: list[Tensor] = []  # costs (terms,) of the steps since the last reading, on the device
        self._read: list[Tensor] = []  # costs (steps, terms) of this epoch, on the CPU
        self._clock: float | None = None
        self._epoch_seconds = 0.0
        self._timed_steps = 0

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
                read = not self._unread
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
                stopping = self._any(stop.received is not None)
                due = self._any(pace.due(self.global_step, epoch_ended=ended))
                if self.folder is not None and (stopping or due):
                    with pace.saving():
                        self._save()
                if stopping:
                    return self._stop(stop.received, bar)
            return self._finish(baseline, folder)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Figures on the test samples, with the statistics for evaluation as they are.

        For a classifier test_error in percent, test_errors, test_samples, test_cross_entropy in nats; see the
        objective's `measure`. Of several networks the means, and with _std and _by_seed behind the name the deviation
        (n - 1) and what each has.
        """
        training = self.model.training
        self.model.eval()
        with self.fabric.autocast():
            figures = self.objective.measure(self.model, self.batches)
        self.model.train(training)
        return figures

    def check_robustness(self, tau: float) -> None:
        """Raise the ValueErrors of `robustness`, before what takes long."""
        check_tau("tau", tau)
        if not hasattr(self.batches, "y_test"):
            raise ValueError(
                "robustness is measured of a classifier, and these data have no labelled test samples"
            )
        if self.recipe.seeds > 1:
            raise ValueError(f"robustness is measured of one network, this run has {self.recipe.seeds}")
        training = self.model.training
        with torch.no_grad(), self.fabric.autocast():
            logits = self.model.eval()(self.batches.x_test[:1])
        self.model.train(training)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError("robustness is measured of a classifier, and this network gives no logits")

    def robustness(self, tau: float, *, seed: int = 1) -> dict[str, Any]:
        """Test errors in percent without noise and under two kinds of noise on the input of the same power.

        test_error; adversarial_error, under tau times the sign of the gradient of the true label's cross-entropy; and
        random_sign_error, under tau times random signs, which `seed` draws. tau in the input's units (0..1 for MNIST).
        Any classifier will do. Raises ValueError for a tau that is negative, or a run of several seeds.
        """
        self.check_robustness(tau)
        training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(seed)
        x, y = self.batches.x_test, self.batches.y_test
        wrong = dict.fromkeys(("test_error", "adversarial_error", "random_sign_error"), 0)
        for part, labels in zip(x.split(500), y.split(500), strict=True):
            with self.fabric.autocast():
                adversarial = adversarial_noise(input_gradient(self.model, part, labels), "sign", tau)
            signs = torch.randn(part.shape, generator=generator).sign().to(part)
            inputs = (part, part + adversarial, part + tau * signs)
            for name, noisy in zip(wrong, inputs, strict=True):
                with torch.no_grad(), self.fabric.autocast():
                    wrong[name] += int((self.model(noisy).argmax(1) != labels).sum())
        self.model.train(training)
        return {"tau": tau, **{name: 100 * count / len(y) for name, count in wrong.items()}}

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
        if self._clock is None:
            self._clock = time.perf_counter()
        if self.step_in_epoch == 0:
            self._set_rate(self.course.learning_rate(self.epoch))

        if self._static is not None:
            costs = self._static(self.epoch, self.step_in_epoch)
        else:
            costs = self._train_on(self.batches.get(self.epoch, self.step_in_epoch))
        self.step_in_epoch += 1
        self._timed_steps += 1
        self._unread.append(costs)
        if self.global_step % self.recipe.log_every == 0:
            self._read_costs()
        return {"total": costs.sum(0), **dict(zip(self._terms, costs.unbind(), strict=True))}

    def _train_on(self, batch: Any) -> Tensor:
        """Costs, backward and update of one batch. Returns the costs, detached; `_terms` has their names."""
        self._adam.zero_grad()
        with self.fabric.autocast():
            terms = self.objective(self.module, batch)
            costs = torch.stack(tuple(terms.values()))
            total = costs.sum()
        del batch  # what the graph does not hold of it need not be there in backward
        self.fabric.backward(total)
        if self.recipe.clip_norm is not None:
            self._clip(self.recipe.clip_norm)
        self.optimizer.step()
        self.objective.after_step(self.model)
        self._terms = list(terms)
        return costs.detach()

    def _make_static(self) -> StaticStep | None:
        """The step in a form that a CUDA graph can hold, where the recipe wants one and it can be had."""
        recipe, device = self.recipe, self.fabric.device
        if recipe.graph == "off":
            return None
        reason = why_not(
            device,
            self.batches,
            processes=self.fabric.world_size,
            precision=recipe.precision,
            objective=self.objective,
        )
        if reason is not None:
            if recipe.graph == "on":
                raise ValueError(f"graph=on cannot be had: {reason}")
            return None
        rate = torch.zeros((), device=device)
        for group in self._adam.param_groups:
            group.update(lr=rate.fill_(float(group["lr"])), capturable=True)
        return StaticStep(self.batches, self._train_on, self._changing, self._undo_warm_up)

    def _changing(self) -> list[Tensor]:
        """What a training step changes in place."""
        optimizer = [
            t for state in self._adam.state.values() for t in state.values() if isinstance(t, Tensor)
        ]
        return [*self.model.parameters(), *self.model.buffers(), *optimizer]

    def _undo_warm_up(self) -> None:
        """Gradients and what the optimiser had not had before are as before the first step."""
        self._adam.zero_grad()
        for state in self._adam.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _set_rate(self, rate: float) -> None:
        for group in self._adam.param_groups:
            if isinstance(group["lr"], Tensor):  # a captured step reads it from there
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _clip(self, norm: float) -> None:
        """Scale the gradient down to this norm where it is larger, each network's its own."""
        if isinstance(self.model, Ensemble):
            self.fabric.strategy.precision.unscale_gradients(self.optimizer)
            self.model.clip_gradients(norm)
        else:  # a gradient in 16 bits that is not finite is left for the scaler to skip
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=norm, error_if_nonfinite=False)

    def _read_costs(self) -> None:
        """Bring the costs since the last reading to the CPU, and refuse any that is not finite."""
        if not self._unread:
            return
        costs = self._reduce(torch.stack(self._unread), "mean").cpu().double()
        first = self.global_step - len(self._unread) + 1
        self._unread = []
        self._read.append(costs if costs.dim() == 2 else costs.mean(-1))
        if not costs.isfinite().all():
            by_term = costs.reshape(len(costs), len(self._terms), -1)
            row = int((~by_term.isfinite().flatten(1).all(1)).nonzero()[0])
            bad = [
                f"{t} = {v}" + (f" (seed {self.recipe.seed + i})" if self.recipe.seeds > 1 else "")
                for t, values in zip(self._terms, by_term[row].tolist(), strict=True)
                for i, v in enumerate(values)
                if not math.isfinite(v)
            ]
            raise FloatingPointError(
                f"the cost is not finite at step {first + row} (epoch {self.epochs_done + 1}): {', '.join(bad)}; "
                "a lower learning_rate may help"
            )

    def _current(self) -> Row:
        """Figures of the epoch so far, as far as they have been read."""
        assert self._clock is not None
        costs = torch.cat(self._read).mean(0).tolist() if self._read else []
        seconds = self._epoch_seconds + time.perf_counter() - self._clock
        metric = self.objective.metric
        shown = [metric.validation, metric.name] if self._dataset.validation_samples else [metric.name]
        return {
            "epoch": self.epochs_done + 1,
            **({"stage": 1 + self.course.retraining} if self.recipe.retrain else {}),
            "step": self.global_step,
            "total": sum(costs),
            **dict(zip(self._terms, costs, strict=True)),
            **{name: self.history[-1][name] if self.history else None for name in shown},
            "learning_rate": float(self._adam.param_groups[0]["lr"]),
            "steps_per_second": self._timed_steps / seconds,
        }

    def _end_epoch(self, *, measure: bool) -> Row:
        """Close the epoch with a row of the history, and go to the next, or to the retraining."""
        self._read_costs()
        row = self._current()
        self._stop_clock()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._read, self._epoch_seconds, self._timed_steps = [], 0.0, 0
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

    @torch.no_grad()
    def _validate(self) -> float | None:
        """The metric on the validation samples, the same in all processes; None where it is not measured."""
        training = self.model.training
        self.model.eval()
        with self.fabric.autocast():
            figure = self.objective.validate(self.model, self.batches)
        self.model.train(training)
        if figure is None:
            return None
        if not math.isfinite(figure):
            raise FloatingPointError(
                f"{self.objective.metric.words} on the validation samples is {figure} after epoch {self.epochs_done}"
            )
        if self.fabric.world_size > 1:
            figure = float(self._reduce(torch.tensor(figure, device=self.fabric.device), "mean"))
        return float(figure)

    def _start_again(self) -> None:
        """The second stage: everything as it was before the first step, but for the samples and what `course` knows."""
        self._steps_before = self.global_step
        self.epoch = 0
        torch.manual_seed(self.recipe.seed)
        network = self.recipe.model.build("model")
        if self.recipe.start_from is not None:
            start_from([network], self.recipe.start_from, [self.recipe.seed])
        self.model.load_state_dict(network.state_dict())
        self._adam.state.clear()
        self.objective = self.recipe.objective.build("objective")
        self.objective.prepare(self.model)
        self._own_noise()
        self._random, precision = self._at_start
        self.fabric.strategy.precision.load_state_dict(copy.deepcopy(precision))
        self._begin_retraining()

    def _begin_retraining(self) -> None:
        self.course.retraining = True
        self.batches = self._make_batches(self._dataset.with_validation_in_training())
        self._static = self._make_static()

    def _steps_planned(self) -> int:
        return self._steps_before + self.course.epochs * len(self.batches)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            took = time.perf_counter() - self._clock
            self.seconds += took
            self._epoch_seconds += took
            self._clock = None

    def _finish(self, baseline: Mapping[str, Any] | None, folder: Path | None) -> dict[str, Any]:
        if self.result is None:
            self.result = {
                "recipe": self.recipe.name,
                "title": self.recipe.title,
                "seed": self.recipe.seed,
                "seeds": self.recipe.seeds,
                **self.evaluate(),
                "published": self.recipe.published,
                **({"changed": changed} if (changed := self.recipe.changed()) else {}),
                "epochs": self.epochs_done,
                **({} if self.recipe.patience is None else {"best_epoch": self.course.best}),
                **({"retrained_epochs": self.epoch} if self.course.retraining else {}),
                "steps": self.global_step,
                "seconds": round(self.seconds, 2),
                "parameters": sum(p.numel() for p in self.model.parameters()) // self.recipe.seeds,
            }
            if self.folder is not None:
                self._save()
        if folder is not None:
            from .report import write_report

            text = json.dumps(self.result, indent=2, ensure_ascii=False) + "\n"
            write_report(
                folder,
                title=self.recipe.title,
                settings=self._settings(),
                history=self.history,
                result=self.result,
                published=self.recipe.published,
                figures=self.objective.figures(self.model, self.batches),
                metric=self.objective.metric,
                baseline=None if baseline is None else dict(baseline),
            )
            checkpoint.write_atomically(folder / folders.RESULTS, lambda file: file.write(text.encode()))
        return dict(self.result)

    def _settings(self) -> dict[str, Any]:
        device = self.fabric.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return {
            **self.recipe.flat(),
            "device": f"{device.type} ({name})",
            "processes": self.fabric.world_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _own_noise(self) -> None:
        """Give this process noise of its own: a buffer called noise_state holds a seed, which all have alike so far."""
        if self.fabric.global_rank:
            for name, buffer in self.model.named_buffers():
                if name.rpartition(".")[2] == "noise_state":
                    buffer[0] += self.fabric.global_rank

    def _any(self, value: bool) -> bool:
        """Whether it is so in any of the processes."""
        if self.fabric.world_size == 1:
            return value
        flag = torch.tensor(float(value), device=self.fabric.device)
        return bool(self._reduce(flag, "sum") > 0)

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        return cast("Tensor", self.fabric.all_reduce(x, reduce_op=how))

    def _stop(self, number: int | None, bar: ProgressBar | None) -> dict[str, Any]:
        if bar is not None:
            where = f"stopped after step {self.global_step} (epoch {self.epochs_done + 1} of {self.epochs_planned})"
            bar.say(where if self.folder is None else f"{where}; saved in {self.folder}, --resume continues")
        if not self.fabric.is_global_zero:
            return {}  # a process that Fabric started must end well, or Fabric kills the first one
        if number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def _open_folder(self, folder: Path) -> Iterator[None]:
        """The folder with the resolved recipe in it, and no other process there meanwhile."""
        folder.mkdir(parents=True, exist_ok=True)
        with folders.held(folder):
            if self._overwrite:
                folders.remove_run(folder)
            elif self._fresh:
                folders.check_free(folder)  # somebody may have come first
            self._overwrite = self._fresh = False
            text = self.recipe.to_yaml()
            checkpoint.write_atomically(folder / folders.RECIPE, lambda file: file.write(text.encode()))
            yield

    def _save(self) -> None:
        self._stop_clock()
        self._read_costs()
        random = checkpoint.random_state(self.fabric.device)
        everyone = self._gather(random)
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
                "optimizer": self._optimizer_state(),
                "objective": self.objective.state_dict(),
                "best": self._best,
                "precision": self.fabric.strategy.precision.state_dict(),
                "random": everyone,
                "terms": self._terms,
                "costs": torch.cat(self._read) if self._read else None,
                "history": self.history,
                "seconds": self.seconds,
                "epoch_seconds": self._epoch_seconds,
                "timed_steps": self._timed_steps,
                "result": self.result,
            }
            checkpoint.save(self.folder, state)
        self.fabric.barrier()

    def _optimizer_state(self) -> dict[str, Any]:
        """As it is without a graph."""
        state = self._adam.state_dict()
        groups = [{**g, "lr": float(g["lr"]), "capturable": False} for g in state["param_groups"]]
        return {**state, "param_groups": groups}

    def _gather(self, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        if self.fabric.world_size == 1:
            return [state]
        world = range(self.fabric.world_size)
        gathered: dict[str, list[Tensor]] = {}
        for name, tensor in state.items():
            own = tensor.to(self.fabric.device)
            gathered[name] = [torch.empty_like(own) for _ in world]
            torch.distributed.all_gather(gathered[name], own)
        return [{name: tensors[rank].cpu() for name, tensors in gathered.items()} for rank in world]

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
        self._own_noise()
        kept = [{name: group[name] for name in ("lr", "capturable")} for group in self._adam.param_groups]
        self._adam.load_state_dict(saved["optimizer"])
        rate = self._adam.param_groups[0]["lr"]
        for group, own in zip(self._adam.param_groups, kept, strict=True):
            group.update(own)  # how this run steps, on a GPU with a graph or without, is its own affair
        self._set_rate(rate)
        self.objective.load_state_dict(saved["objective"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        if random:
            self._random = saved["random"][self.fabric.global_rank]
        self.epoch, self.step_in_epoch = saved["epoch"], saved["step_in_epoch"]
        self.history, self.result, self.seconds = saved["history"], saved["result"], saved["seconds"]
        self._epoch_seconds, self._timed_steps = saved["epoch_seconds"], saved["timed_steps"]
        self._terms = saved["terms"]
        self._read = [] if saved["costs"] is None else [saved["costs"]]


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


def _make_fabric(recipe: Recipe) -> Fabric:
    try:
        return Fabric(
            accelerator=recipe.accelerator,
            strategy=recipe.strategy,
            devices=recipe.devices,
            num_nodes=recipe.num_nodes,
            precision=recipe.precision,  # type: ignore[arg-type]  # Fabric lists the names and checks them itself
        )
    except Exception as error:  # each of its checks raises a class of its own
        wanted = ", ".join(
            f"{n}={getattr(recipe, n)!r}" for n in ("accelerator", "devices", "strategy", "precision")
        )
        raise ValueError(f"{wanted} cannot be had: {' '.join(str(error).split())}") from error

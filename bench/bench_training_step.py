"""A whole training step of mnist_100_full, `Run.step()`: both passes, decoder, costs, backward and Adam.

Beside it, in the same run: the same network on the reference backend ("plain"), that under torch.compile, and two
floors, which do the matrix products and Adam and nothing else: with torch.mm, and with the products that our networks
use, which are faster on some CPUs (ladderfast/ops/linear.py). The reference draws noise with torch.randn here, as a
user would write it: the counter's integers in plain PyTorch would make the yardsticks several times slower.

Images are random: what they show has no part in the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from measuring import DEVICES, compiled, peak_memory, sync_timer
from torch import Tensor

import ladderfast
from ladderfast.data import Dataset
from ladderfast.ops.linear import linear
from ladderfast.reference import noise
from ladderfast.training import Objective

VARIANTS = ["ladderfast", "plain", "compile", "floor", "floor of our products"]
ROWS = [64, 256, 1024, 4096, 16384]


class RandomImages(Dataset):
    """Images of MNIST's size with random pixels and labels."""

    def __init__(self, num_labels: int | None = None, samples: int = 20000, *, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(samples, 784, generator=generator)
        y = torch.arange(samples) % 10
        super().__init__(x, y, x[:10], y[:10], image_shape=(28, 28), num_labels=num_labels, seed=seed)


def make_run(device: str, rows: int, **fields) -> ladderfast.Run:
    """rows: labelled and unlabelled samples of a step together."""
    return ladderfast.Run(
        "mnist_100_full",
        folder=None,
        progress=False,
        accelerator=device,
        batch_labelled=rows // 2,
        batch_unlabelled=rows // 2,
        epochs=10**6,
        **{"data.class_path": f"{__name__}.RandomImages", "data.num_labels": 100, **fields},
    )


class Floor:
    """A step's matrix products and Adam; operands are random.

    ours: the products as our networks compute them, each into new memory; otherwise torch's, into memory that is there.
    """

    def __init__(self, run: ladderfast.Run) -> None:
        self.device, self.ours = run.fabric.device, False
        self.products: list[tuple[Tensor, Tensor, Tensor, int]] = []
        parameters = list(run.model.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.adam = torch.optim.Adam(parameters, lr=0.002, fused=True)

    def add_map(self, weight: Tensor, rows: int, *, trained: int | None = None, again: bool = False) -> None:
        """A map of so many rows and its gradients: of the weight from `trained` rows, and of what it maps.

        trained: all rows by default; 0: no gradients. again: the weight's gradient is added to the one there is.
        """
        trained = rows if trained is None else trained
        above, below = weight.shape
        self._add(self._random(rows, below), weight.detach().t())
        if trained:
            grad, x = self._random(trained, above), self._random(trained, below)
            self._add(grad.t(), x, weight.grad, again)
            self._add(grad, weight.detach())

    def drop_gradient_of_input(self) -> None:
        """The map added last is one of data, which need none."""
        del self.products[-1]

    def __call__(self) -> None:
        with torch.no_grad():
            for a, b, out, beta in self.products:
                if not self.ours:
                    torch.addmm(out, a, b, beta=beta, out=out)
                elif beta:
                    out += linear(a, b.t())
                else:
                    linear(a, b.t())
        self.adam.step()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def _add(self, a: Tensor, b: Tensor, out: Tensor | None = None, again: bool = False) -> None:
        out = self._random(a.shape[0], b.shape[1]) if out is None else out
        self.products.append((a, b, out, int(again)))


def floor(run: ladderfast.Run, rows: int) -> Floor:
    step, half = Floor(run), rows // 2
    for index, layer in enumerate(run.model.encoder):
        weight = layer.linear.weight
        step.add_map(weight, 3 * half)  # corrupted rows and the clean unlabelled ones
        if index == 0:
            step.drop_gradient_of_input()
        step.add_map(weight, half, trained=0)  # the clean labelled ones: statistics for evaluation
    for layer in run.model.decoder:
        step.add_map(layer.weight, half)
    return step


class Compiled(Objective):
    """An objective whose call is compiled."""

    def __init__(self, objective: Objective) -> None:
        self.call = compiled(objective)

    def __call__(self, model, batch) -> dict[str, Tensor]:
        return self.call(model, batch)


@contextlib.contextmanager
def stepping(
    variant: str,
    make: Callable[[], ladderfast.Run],
    make_floor: Callable[[ladderfast.Run], Floor],
) -> Iterator[Callable[[], object]]:
    """The function that does one step of this variant of a run."""

    def randn(state: Tensor, stream: int, count: int) -> Tensor:
        return torch.randn(count, device=state.device)

    plain = variant in ("plain", "compile")
    with (
        ladderfast.use_backend("reference" if plain else None),
        mock.patch.object(noise, "normal_noise", randn) if plain else contextlib.nullcontext(),
    ):
        run = make()
        if variant == "compile":
            run.objective = Compiled(run.objective)
        if variant.startswith("floor"):
            step = make_floor(run)
            step.ours = variant != "floor"
            yield step
        else:
            yield run.step


def stepping_mnist(variant: str, device: str, rows: int):
    return stepping(variant, lambda: make_run(device, rows), lambda run: floor(run, rows))


def need_time(benchmark, rows: int) -> None:
    if benchmark.disabled and rows > 256:
        pytest.skip("takes long, and says nothing unless it is measured")


def record_step(
    benchmark, variant: str, device: str, shape: str, step: Callable[[], object], phase: str
) -> None:
    benchmark.extra_info.update(table="step", op=phase, shape=shape, variant=variant, device=device)
    if device == "cpu":
        benchmark.extra_info.update(peak=peak_memory(step))
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        benchmark.extra_info.update(peak=torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [200, 8192])
@pytest.mark.parametrize("device", DEVICES)
def bench_training_step(benchmark, device, rows, variant):
    need_time(benchmark, rows)
    with stepping_mnist(variant, device, rows) as step:
        for _ in range(3):
            step()
        benchmark._timer = sync_timer
        benchmark.pedantic(step, rounds=40 if rows < 1000 else 5, warmup_rounds=5 if rows < 1000 else 1)
        # Afterwards, so that no profiler runs before what is timed.
        record_step(benchmark, variant, device, f"{rows // 2} + {rows // 2}", step, "training step")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("device", DEVICES)
def bench_growth(benchmark, device, rows):
    """Time by the number of rows; bench/table.py draws it."""
    need_time(benchmark, rows)
    with stepping_mnist("ladderfast", device, rows) as step:
        step()
        benchmark._timer = sync_timer
        benchmark.pedantic(step, rounds=max(3, min(40, 20000 // rows)), warmup_rounds=2)
        record_step(benchmark, "ladderfast", device, f"{rows // 2} + {rows // 2}", step, "growth")

"""What training asks of data: samples with and without labels, and minibatches of both in a fixed order."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shuffle import LABELLED, UNLABELLED, check_seed, draw_labels, shuffles


class DataSource(ABC):
    """What a recipe's `data` is: minibatches for training, and what an objective measures and shows.

    Attributes: image_shape, (height, width) or (channels, height, width) of a sample, for pictures.
    """

    image_shape: tuple[int, ...]

    @abstractmethod
    def batches(
        self,
        batch_labelled: int,
        batch_unlabelled: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """The minibatches of this process, number `rank` of `world_size`.

        `len()` is the number of steps in an epoch and `get(epoch, step)`, both counted from 0, a NamedTuple of tensors
        on `device` that depends on the seed, the epoch and the step alone, so that any step is reached directly.
        A source without a labelled or an unlabelled stream refuses a batch size other than 0 for it (ValueError).
        """

    @property
    def validation_samples(self) -> int:
        """How many samples are held out of training for validation; none here."""
        return 0

    def with_validation_in_training(self) -> DataSource:
        """The same data with the samples for validation among those for training; the source itself stays as it is.

        Raises ValueError where there are none.
        """
        raise ValueError(
            f"{type(self).__name__} holds no validation samples that training could have as well"
        )


class Dataset(DataSource):
    """Training and test samples, some of the training samples with their label.

    x_train: (N, *) and x_test: (M, *), y_train: (N,) and y_test: (M,) class labels; image_shape: (height, width) or
    (channels, height, width) of a sample, for pictures. `num_labels` labels are drawn by `seed`, the same number of
    each class (`None`: all of them). The labelled samples stay among the unlabelled ones.

    Raises ValueError for lengths that differ, training or test samples that are missing, labels below 0, and more
    labels than there are.

    Attributes: x_unlabelled (N, *), x_labelled (num_labels, *), y_labelled, x_test, y_test, image_shape.
    """

    def __init__(
        self,
        x_train: Tensor,
        y_train: Tensor,
        x_test: Tensor,
        y_test: Tensor,
        *,
        image_shape: tuple[int, ...],
        num_labels: int | None = None,
        seed: int = 1,
    ) -> None:
        for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            if len(x) != len(y):
                raise ValueError(f"x_{name} and y_{name} must be of one length, got {len(x)} and {len(y)}")
            if not len(x):
                raise ValueError(f"x_{name} must hold at least 1 sample, got none")
            if int(y.min()) < 0:
                raise ValueError(f"y_{name} must hold classes, numbered from 0, got {int(y.min())}")
        self.x_unlabelled = x_train
        self.x_test = x_test
        self.y_test = y_test
        self.image_shape = image_shape
        self._y_train, self._num_labels = y_train, num_labels
        self._draw(seed)

    def _draw(self, seed: int) -> None:
        chosen = draw_labels(self._y_train, self._num_labels, seed=seed)
        # With every label this is the same memory, not a second copy of the training set.
        self.x_labelled = self.x_unlabelled if self._num_labels is None else self.x_unlabelled[chosen]
        self.y_labelled = self._y_train[chosen]

    @property
    def num_classes(self) -> int:
        """How many classes there are, by the highest label."""
        return int(max(self._y_train.max(), self.y_test.max())) + 1

    def batches(self, batch_labelled: int, batch_unlabelled: int, **kind: Any) -> Batches:
        return Batches(self, batch_labelled, batch_unlabelled, **kind)

    def with_seed(self, seed: int) -> Dataset:
        """The same samples, with the labels that another seed draws; nothing is read or copied again."""
        other = copy.copy(self)
        other._draw(seed)
        return other


class Batch(NamedTuple):
    """One step's samples, on the device: x_labelled (B_l, *), y_labelled (B_l,), x_unlabelled (B_u, *)."""

    x_labelled: Tensor
    y_labelled: Tensor
    x_unlabelled: Tensor


class Batches:
    """A dataset on one device, and its minibatches by (epoch, step), both counted from 0.

    An epoch is one pass over the unlabelled samples, in an order given by (seed, epoch); samples left over
    after the last full batch are left out of that epoch. The labelled samples are a stream of their own:
    pass after pass through all of them, each pass in its own order, cut into batches wherever a batch ends.
    Batch sizes are those of one process; with several (`rank` of `world_size`) the processes share the
    epoch. Any (epoch, step) is reached directly.

    The dataset's attributes (x_unlabelled, x_labelled, y_labelled, x_test, y_test, image_shape) are here as
    well, on `device` and in `dtype`. `len()` is the number of steps in an epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_labelled: int,
        batch_unlabelled: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_seed(seed)
        if batch_labelled < 1:
            raise ValueError(f"batch_labelled must be at least 1, got {batch_labelled}")
        if not 1 <= batch_unlabelled * world_size <= len(dataset.x_unlabelled):
            raise ValueError(
                f"batch_unlabelled must be from 1 to {len(dataset.x_unlabelled) // world_size}, the "
                f"unlabelled samples of each process, got {batch_unlabelled}"
            )
        self.batch_labelled, self.batch_unlabelled = batch_labelled, batch_unlabelled
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.image_shape = dataset.image_shape
        # Bytes stay bytes: a dataset that has them makes them numbers batch by batch.
        held = dtype if dataset.x_unlabelled.is_floating_point() else dataset.x_unlabelled.dtype
        self.x_unlabelled = dataset.x_unlabelled.to(device, held)
        shared = dataset.x_labelled is dataset.x_unlabelled
        self.x_labelled = self.x_unlabelled if shared else dataset.x_labelled.to(device, held)
        self.y_labelled = dataset.y_labelled.to(device)
        self.x_test = dataset.x_test.to(device, dtype)
        self.y_test = dataset.y_test.to(device)
        self._steps = len(dataset.x_unlabelled) // (batch_unlabelled * world_size)
        self._epoch: int | None = None

    def __len__(self) -> int:
        return self._steps

    def get(self, epoch: int, step: int) -> Batch:
        """The batch of step `step` of epoch `epoch`."""
        labelled, unlabelled = self.orders(epoch)
        return self.take(labelled[step], unlabelled[step])

    @property
    def by_index(self) -> bool:
        """Whether a batch is nothing but the samples at its indices: get(e, s) is take(*(o[s] for o in orders(e)))."""
        return type(self).get is Batches.get

    def orders(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Which samples the steps of an epoch have, on the device: labelled (steps, B_l), unlabelled (steps, B_u)."""
        if epoch != self._epoch:
            labelled, unlabelled = self._order(epoch)
            device = self.x_unlabelled.device
            self._orders = (labelled.to(device), unlabelled.to(device))
            self._epoch = epoch
        return self._orders

    def take(self, labelled: Tensor, unlabelled: Tensor) -> Batch:
        """The samples at these indices, (B_l,) and (B_u,)."""
        return Batch(
            self.x_labelled.index_select(0, labelled),
            self.y_labelled.index_select(0, labelled),
            self.x_unlabelled.index_select(0, unlabelled),
        )

    def labelled_batches(self) -> list[Tensor]:
        """All labelled samples once, in order, in near-equal parts of at most `batch_labelled`."""
        parts = -(-len(self.x_labelled) // self.batch_labelled)
        return list(torch.tensor_split(self.x_labelled, parts))

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """This process's indices of a whole epoch: labelled (steps, B_l), unlabelled (steps, B_u)."""
        size = len(self.x_unlabelled)
        unlabelled = shuffles(size, seed=self.seed, stream=UNLABELLED, first=epoch)[0]

        size, taken = len(self.x_labelled), self._steps * self.world_size * self.batch_labelled
        first, offset = divmod(epoch * taken, size)
        passes = -(-(offset + taken) // size)
        labelled = shuffles(size, seed=self.seed, stream=LABELLED, first=first, count=passes).reshape(-1)

        def mine(order, batch: int) -> Tensor:
            rows = order[: self._steps * self.world_size * batch].reshape(self._steps, self.world_size, batch)
            return torch.from_numpy(rows[:, self.rank].copy())

        return mine(labelled[offset:], self.batch_labelled), mine(unlabelled, self.batch_unlabelled)


class EnsembleBatches:
    """The minibatches of several seeds, side by side: what `Batches` has for each, with an axis of seeds in front.

    datasets: one for each seed, all with the same samples (`Dataset.with_seed`), which are held once. `of(i)` is the
    `Batches` of seed number i; x_test, y_test and image_shape are theirs.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        batch_labelled: int,
        batch_unlabelled: int,
        *,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._each: list[Batches] = []
        for dataset, seed in zip(datasets, seeds, strict=True):
            if self._each:  # on the device already
                held = copy.copy(dataset)
                held.x_unlabelled, held.x_test = self._each[0].x_unlabelled, self._each[0].x_test
                if dataset.x_labelled is dataset.x_unlabelled:
                    held.x_labelled = held.x_unlabelled
                dataset = held
            self._each.append(
                dataset.batches(batch_labelled, batch_unlabelled, seed=seed, device=device, dtype=dtype)
            )
        first = self._each[0]
        self.x_test, self.y_test, self.image_shape = first.x_test, first.y_test, first.image_shape
        self.batch_labelled, self.batch_unlabelled = batch_labelled, batch_unlabelled

    def __len__(self) -> int:
        return len(self._each[0])

    def of(self, index: int) -> Batches:
        return self._each[index]

    def get(self, epoch: int, step: int) -> Batch:
        """The batches of step `step` of epoch `epoch`: x (S, B, *), y (S, B)."""
        return _side_by_side([b.get(epoch, step) for b in self._each])

    @property
    def by_index(self) -> bool:
        return all(batches.by_index for batches in self._each)

    def orders(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Those of `Batches`, with the seeds behind the steps: (steps, S, B_l) and (steps, S, B_u)."""
        labelled, unlabelled = zip(*[b.orders(epoch) for b in self._each], strict=True)
        return torch.stack(labelled, 1), torch.stack(unlabelled, 1)

    def take(self, labelled: Tensor, unlabelled: Tensor) -> Batch:
        """The samples at these indices, (S, B_l) and (S, B_u)."""
        indices = zip(self._each, labelled.unbind(), unlabelled.unbind(), strict=True)
        return _side_by_side([batches.take(*own) for batches, *own in indices])


def _side_by_side(batches: Sequence[Batch]) -> Batch:
    return Batch(*(torch.stack(parts) for parts in zip(*batches, strict=True)))

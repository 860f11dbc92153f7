"""Images whose pixels belong to objects: what perceptual grouping is trained on and measured by."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ladderfast.checks import check_whole

from .dataset import Batches, DataSource
from .shuffle import DRAW, check_seed, draw_labels, shuffles


class GroupedImages(DataSource):
    """Training and test images, the owners of the test images' pixels, and labels where there are any.

    x_train (N, D) and x_test (M, D); owner_test (M, D) integers, the object that a pixel belongs to, from 1 on, or 0
    for none, and of validation images x_valid and owner_valid the same. y_train and y_test: (N,) and (M,) classes, or
    (N, C) and (M, C) zeros and ones where an image has several. `num_labels` images are labelled (None: all, 0: none),
    drawn by `seed`, with single classes the same number of each. They stay among the unlabelled ones.

    Raises ValueError for lengths or numbers of pixels that do not agree, or more labels than there are, and TypeError
    for a num_labels that is no whole number.
    """

    def __init__(
        self,
        x_train: Tensor,
        x_test: Tensor,
        owner_test: Tensor,
        *,
        image_shape: tuple[int, ...],
        y_train: Tensor | None = None,
        y_test: Tensor | None = None,
        x_valid: Tensor | None = None,
        owner_valid: Tensor | None = None,
        num_labels: int | None = None,
        seed: int = 1,
    ) -> None:
        for names, x, y in (
            ("x_train and y_train", x_train, y_train),
            ("x_test and y_test", x_test, y_test),
        ):
            if y is not None and len(x) != len(y):
                raise ValueError(f"{names} must be of one length, got {len(x)} and {len(y)}")
        if (x_valid is None) != (owner_valid is None):
            raise ValueError("x_valid and owner_valid must both be there, or neither")
        for name, held, owner in (("test", x_test, owner_test), ("valid", x_valid, owner_valid)):
            if held is None or owner is None:
                continue
            if held.shape[1:] != x_train.shape[1:]:
                raise ValueError(
                    f"x_{name} must have as many pixels as x_train, {tuple(x_train.shape[1:])}, "
                    f"got {tuple(held.shape[1:])}"
                )
            if owner.shape != held.shape:
                raise ValueError(
                    f"owner_{name} must have the shape of x_{name}, {tuple(held.shape)}, got {tuple(owner.shape)}"
                )
        self.x_unlabelled, self.x_test, self.owner_test = x_train, x_test, owner_test
        self.x_valid, self.owner_valid, self.y_test = x_valid, owner_valid, y_test
        self.image_shape = image_shape
        self.x_labelled = self.y_labelled = None
        if y_train is not None and num_labels != 0:
            chosen = _draw(y_train, num_labels, seed)
            # With every label this is the same memory, not a second copy of the training set.
            self.x_labelled = x_train if num_labels is None else x_train[chosen]
            self.y_labelled = y_train[chosen]

    @property
    def validation_samples(self) -> int:
        return 0 if self.x_valid is None else len(self.x_valid)

    def with_validation_in_training(self) -> DataSource:
        """The same with the validation images after the training ones, without labels, and none for validation."""
        if self.x_valid is None:
            return super().with_validation_in_training()
        other = copy.copy(self)
        other.x_unlabelled = torch.cat([self.x_unlabelled, self.x_valid])
        other.x_valid = other.owner_valid = None
        return other

    def batches(self, batch_labelled: int, batch_unlabelled: int, **kind: Any) -> GroupedBatches:
        return GroupedBatches(self, batch_labelled, batch_unlabelled, **kind)


class GroupedBatches(Batches):
    """The minibatches of `GroupedImages`, in the order in which `Batches` has them; either half may be empty.

    An epoch is one pass over the unlabelled images. The labelled ones are a stream of their own, which runs on from
    epoch to epoch. Where batch_unlabelled is 0 an epoch has as many steps as a pass over the labelled images has full
    batches; what is left over of a pass comes first in the next epoch, which may so have images of two passes.
    The attributes of `GroupedImages` are here as well; there is a y_test only where there are labels.
    """

    def __init__(
        self,
        images: GroupedImages,
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
        if images.x_labelled is None and batch_labelled:
            raise ValueError(
                f"batch_labelled must be 0, as these images have no labels, got {batch_labelled}"
            )
        if min(batch_labelled, batch_unlabelled) < 0 or not batch_labelled + batch_unlabelled:
            raise ValueError(
                f"batch_labelled and batch_unlabelled must not be negative, nor both 0, got {batch_labelled} and "
                f"{batch_unlabelled}"
            )
        self.batch_labelled, self.batch_unlabelled = batch_labelled, batch_unlabelled
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.image_shape = images.image_shape
        self.x_unlabelled = images.x_unlabelled.to(device, dtype)
        if images.x_labelled is None or images.y_labelled is None:  # a batch then takes none of these
            self.x_labelled, self.y_labelled = self.x_unlabelled, torch.zeros(len(self.x_unlabelled), 0)
        else:
            shared = images.x_labelled is images.x_unlabelled
            self.x_labelled = self.x_unlabelled if shared else images.x_labelled.to(device, dtype)
            self.y_labelled = images.y_labelled
        self.y_labelled = self.y_labelled.to(device)
        self.x_test, self.owner_test = images.x_test.to(device, dtype), images.owner_test
        self.x_valid = None if images.x_valid is None else images.x_valid.to(device, dtype)
        self.owner_valid = images.owner_valid
        if images.y_test is not None:
            self.y_test = images.y_test.to(device)
        passed = (
            (self.x_unlabelled, batch_unlabelled) if batch_unlabelled else (self.x_labelled, batch_labelled)
        )
        self._steps = len(passed[0]) // (passed[1] * world_size)
        if not self._steps:
            name = "batch_unlabelled" if batch_unlabelled else "batch_labelled"
            raise ValueError(
                f"{name} must be at most {len(passed[0]) // world_size}, the images of each process, got {passed[1]}"
            )
        self._epoch = None


def split_sizes(num_train: int, num_test: int) -> tuple[int, int, int]:
    """Training, validation and test images.

    Raises TypeError unless they are whole numbers, ValueError where there would be none.
    """
    for name, number in (("num_train", num_train), ("num_test", num_test)):
        check_whole(name, number)
    if num_train < 1 or num_test < 1:
        raise ValueError(f"num_train and num_test must be at least 1, got {num_train} and {num_test}")
    return num_train, num_test, num_test


def _draw(y: Tensor, num_labels: int | None, seed: int) -> Tensor:
    if y.dim() == 1 or num_labels is None:
        return draw_labels(y, num_labels, seed=seed)
    check_seed(seed)
    check_whole("num_labels", num_labels)
    if not 1 <= num_labels <= len(y):
        raise ValueError(f"num_labels must be from 0 to {len(y)}, or None for all, got {num_labels}")
    return torch.from_numpy(shuffles(len(y), seed=seed, stream=DRAW)[0][:num_labels]).sort().values

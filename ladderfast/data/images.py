"""Images that are prepared, shifted and mirrored batch by batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .augmentation import shift_and_mirror
from .dataset import Batch, Batches, Dataset
from .shuffle import AUGMENT_LABELLED, AUGMENT_UNLABELLED
from .whitening import normalise_contrast


class ImageDataset(Dataset):
    """Images x (N, C H W), in numbers as they are, or in bytes, which become numbers batch by batch.

    Args:
        x_train, y_train, x_test, y_test, image_shape, num_labels, seed: as for `Dataset`; y_train may be shorter than
            x_train, whose other samples have no labels.
        contrast: bytes become numbers by contrast normalisation to the norm sqrt(C H W), so that the variance within an
            image is 1, instead of by division by 255.
        shift: training images are moved by up to so many pixels up or down and left or right, at random.
        mirror: training images are mirrored left to right, every other one, at random.

    The test images are prepared and never moved.
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
        contrast: bool = False,
        shift: int = 0,
        mirror: bool = False,
    ) -> None:
        height, width = image_shape[-2:]
        if not 0 <= shift <= min(height, width):
            raise ValueError(f"shift must be from 0 to {min(height, width)} pixels, got {shift}")
        self.contrast, self.shift, self.mirror = contrast, shift, mirror
        super().__init__(
            x_train if len(x_train) == len(y_train) else x_train[: len(y_train)],  # one tensor, held once
            y_train,
            self.prepare(x_test),
            y_test,
            image_shape=image_shape,
            num_labels=num_labels,
            seed=seed,
        )
        self.x_unlabelled = x_train

    def _draw(self, seed: int) -> None:
        super()._draw(seed)
        if len(self.x_labelled) > len(self.y_labelled):  # all labels, which not every sample has
            self.x_labelled = self.x_labelled[: len(self.y_labelled)]

    def batches(self, batch_labelled: int, batch_unlabelled: int, **kind: Any) -> ImageBatches:
        return ImageBatches(self, batch_labelled, batch_unlabelled, **kind)

    def prepare(self, x: Tensor) -> Tensor:
        """Bytes x (N, D) as numbers, float32; numbers as they are."""
        if x.is_floating_point():
            return x
        x = x.float()
        return normalise_contrast(x, scale=x.shape[1] ** 0.5) if self.contrast else x / 255

    def augment(self, x: Tensor, *, seed: int, stream: int, position: tuple[int, int, int]) -> Tensor:
        """x (N, D) shifted and mirrored; see `shift_and_mirror`."""
        if not (self.shift or self.mirror):
            return x
        shape = self.image_shape if len(self.image_shape) == 3 else (1, *self.image_shape)
        moved = shift_and_mirror(
            x.reshape(-1, *shape),
            shift=self.shift,
            mirror=self.mirror,
            seed=seed,
            stream=stream,
            position=position,
        )
        return moved.reshape(x.shape)


class ImageBatches(Batches):
    """The minibatches of an `ImageDataset`: prepared, shifted and mirrored anew in each step."""

    def __init__(self, dataset: ImageDataset, *sizes: int, **kind: Any) -> None:
        super().__init__(dataset, *sizes, **kind)
        self._dataset = dataset
        self._dtype = kind.get("dtype", torch.float32)

    def get(self, epoch: int, step: int) -> Batch:
        x_labelled, y_labelled, x_unlabelled = super().get(epoch, step)
        position = (epoch, step, self.rank)
        return Batch(
            self._dataset.augment(x_labelled, seed=self.seed, stream=AUGMENT_LABELLED, position=position),
            y_labelled,
            self._dataset.augment(x_unlabelled, seed=self.seed, stream=AUGMENT_UNLABELLED, position=position),
        )

    @property
    def by_index(self) -> bool:
        return not (self._dataset.shift or self._dataset.mirror)

    def take(self, labelled: Tensor, unlabelled: Tensor) -> Batch:
        x_labelled, y_labelled, x_unlabelled = super().take(labelled, unlabelled)
        return Batch(self._prepared(x_labelled), y_labelled, self._prepared(x_unlabelled))

    def labelled_batches(self) -> list[Tensor]:
        """As `Batches` has them; prepared and not moved."""
        return [self._prepared(x) for x in super().labelled_batches()]

    def _prepared(self, x: Tensor) -> Tensor:
        return self._dataset.prepare(x).to(self._dtype)

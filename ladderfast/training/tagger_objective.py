"""What a Tagger minimises, what it is judged by, and its pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderfast.checks import check_number, check_whole
from ladderfast.data import Batch, GroupedImages, MovingMNIST
from ladderfast.models import RTagger, Tagger
from ladderfast.ops.function import readable

from .metric import Metric
from .mutual_information import NORMALISERS, adjusted_mutual_information
from .objectives import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "ami": Metric("ami", "adjusted mutual information", "", higher_is_better=True),
    "test_error": Metric(),
}
SUMS = ("sum", "mean")
# What is drawn over the iterations, and the name of its axis.
CURVES = {
    "ami": "AMI",
    "clean_ami": "AMI, clean input",
    "cost": "cost, nats",
    "test_error": "error, %",
    "clean_test_error": "error, %,\nclean input",
}
SHOWN = 1000  # test images behind the curves over iterations
STATISTICS = 20  # training batches behind the statistics for evaluation
NOISE = 1  # seed of what is drawn in measurements and pictures


class TaggerObjective(Objective):
    """Greff et al. 2016: the denoising cost of every iteration, and for labelled images a class cost at the last one.

    The class cost is the cross-entropy of an image's classes under the groups' shares (`class_shares`); an image with
    two classes has the sum of both.

    Test images are corrupted as training images are, by noise that is the same every time; what the same network makes
    of the images as they are is measured beside (clean_ami, clean_test_error). A pixel's predicted group
    is the one with the largest mask; pixels of no owner are left out of the AMI, which is averaged over images.
    The classes an image is said to have are as many as it has. Of sequences, whose next frames the groups predict, each
    step's masks are held against the owners of the frame predicted, and figures are means over steps.

    Args:
        groups: K.
        iterations: T; of sequences, one less than their frames.
        over_iterations: whether costs are summed over iterations, as in the paper, or averaged, as in its code.
        over_pixels: the same over pixels. (Adam minds neither; but what class_weight means depends on both.)
        class_weight: of the class cost; 0: it is not computed.
        normaliser: of the AMI, "arithmetic" or "max".
        judged_by: "ami" or, for labelled images, "test_error", both at the last iteration (the mean, of sequences).
        test_batch: test images normalised together.

    Raises TypeError for what is no number, ValueError for arguments out of range, labels of a model or of data without
    classes, or labels that are none of the model's classes.
    """

    networks = (Tagger, RTagger)
    sources = (GroupedImages, MovingMNIST)

    def __init__(
        self,
        groups: int = 4,
        iterations: int = 3,
        over_iterations: str = "sum",
        over_pixels: str = "sum",
        class_weight: float = 0.0,
        normaliser: str = "arithmetic",
        judged_by: str = "ami",
        test_batch: int = 100,
    ) -> None:
        for name, value, allowed in (
            ("over_iterations", over_iterations, SUMS),
            ("over_pixels", over_pixels, SUMS),
            ("normaliser", normaliser, NORMALISERS),
            ("judged_by", judged_by, tuple(METRICS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, number in (("groups", groups), ("iterations", iterations), ("test_batch", test_batch)):
            check_whole(name, number)
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        check_number("class_weight", class_weight)
        if not 0 <= class_weight < math.inf:
            raise ValueError(f"class_weight must be finite and not negative, got {class_weight}")
        self.groups, self.iterations, self.test_batch = groups, iterations, test_batch
        self.over_iterations, self.over_pixels = over_iterations, over_pixels
        self.class_weight, self.normaliser = class_weight, normaliser
        self.metric = METRICS[judged_by]

    def check(self, model: Any) -> None:
        if self.class_weight and not getattr(model, "num_classes", True):
            raise ValueError(
                f"class_weight needs a model with num_classes, got {self.class_weight:g} and one without"
            )
        if self.test_batch == 1 and self._least(model) > 1:
            raise ValueError(
                f"test_batch must be at least 2 for groups=1 of a {type(model).__name__}, which has no variance in one "
                "image, got 1"
            )

    def check_data(self, model: Any, data: Any, batch_labelled: int, batch_unlabelled: int) -> None:
        name, pixels = type(data).__name__, math.prod(getattr(data, "image_shape", ()))
        if hasattr(data, "image_shape") and getattr(model, "num_pixels", pixels) != pixels:
            raise ValueError(
                f"num_pixels must be {pixels}, as many as an image of {name} has, got {model.num_pixels}"
            )
        if self.class_weight and not batch_labelled:
            raise ValueError(
                f"batch_labelled must be at least 1 for class_weight={self.class_weight:g}, the weight of a cost of "
                "labelled images, got 0"
            )
        if classes := getattr(model, "num_classes", 0):
            for labels in (getattr(data, "y_labelled", None), getattr(data, "y_test", None)):
                if labels is not None:
                    _check_labels(labels, classes)
        if self.metric.name == "test_error" and (not classes or getattr(data, "y_test", None) is None):
            what = (
                "a model with num_classes" if not classes else f"labelled test images, which {name} has not"
            )
            raise ValueError(f'judged_by="test_error" needs {what}')
        if isinstance(model, self.networks) and self.groups * (batch_labelled + batch_unlabelled) == 1:
            raise ValueError(
                "batch_labelled and batch_unlabelled must make a batch of at least 2 images for groups=1, which has no "
                f"variance in one image, got {batch_labelled} and {batch_unlabelled}"
            )
        frames = getattr(data, "frames", None)
        if frames is not None and self.iterations >= frames:
            raise ValueError(
                f"iterations must be below {name}'s {frames} frames, the last of which is predicted, got "
                f"{self.iterations}"
            )

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Terms `iteration_1` to `iteration_T`, and `class_cost`."""
        x = torch.cat([batch.x_labelled, batch.x_unlabelled])
        out = model(x, self.groups, self.iterations)
        scale = 1.0 if self.over_iterations == "sum" else 1 / self.iterations
        if self.over_pixels == "mean":
            scale /= x.shape[-1]
        terms = {f"iteration_{t}": cost * scale for t, cost in enumerate(out.cost.mean(1).unbind(), 1)}
        if self.class_weight:
            y = _k_hot(batch.y_labelled, _log_classes(out))
            cost = -(y * _log_classes(out)[-1, : len(y)]).sum(1).mean()
            terms["class_cost"] = self.class_weight * cost
        return terms

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        """AMI, cost and, where there are labels and classes, error in percent: of every iteration and as judged.

        ami, ami_1 .. ami_T, ami_normaliser; cost and cost_1 .. in nats an image; test_error, test_error_1 ..,
        test_errors and test_samples (labels). With clean_ in front AMI and error of images that are not corrupted: it
        is clean_test_error that compares with the test_error of a classifier, which sees images as they are. Batch
        statistics for evaluation, if the model has any, are computed anew from the first training batches, of either
        kind of input for its figures.
        """
        return self._measured(model, data, data.x_test, data.owner_test, getattr(data, "y_test", None))

    @property
    def validates(self) -> bool:
        return self.metric.name == "ami"  # there are no labelled validation images

    def validate(self, model: Any, data: Any) -> float | None:
        """The AMI on validation images; None where there are none, or the run is judged by its error."""
        if data.x_valid is None or not self.validates:
            return None
        self._renew_statistics(model, data)
        return float(self._figures(model, data.x_valid, data.owner_valid, None)["ami"])

    def _least(self, model: Any) -> int:
        """Images that the model needs at once in evaluation: a single group's variance in one of them is none."""
        return 2 if self.groups == 1 and getattr(model, "batch_statistics", False) else 1

    def _renew_statistics(self, model: Any, data: Any, *, corrupted: bool = True) -> None:
        """An RTagger's statistics for evaluation, from the first training batches; a Tagger has none."""
        if hasattr(model, "recompute_statistics"):
            generator = torch.Generator(data.x_test.device).manual_seed(NOISE)
            first = (data.get(0, step) for step in range(min(len(data), STATISTICS)))
            batches = (torch.cat([batch.x_labelled, batch.x_unlabelled]) for batch in first)
            model.recompute_statistics(
                batches, self.groups, self.iterations, corrupted=corrupted, generator=generator
            )

    @torch.no_grad()
    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        from .tagger_figures import group_grid, group_panels, iteration_curves, sequence_grid

        drawn: dict[str, Figure] = {}
        training = model.training
        model.eval()
        x, owner = data.x_test[: self.test_batch], data.owner_test[: self.test_batch]
        generator = torch.Generator(x.device).manual_seed(NOISE)
        corrupted = model.corrupt(x, generator=generator)
        out = model(x, self.groups, self.iterations, corrupted=corrupted, generator=generator)
        x, corrupted, owner = x.float().cpu(), corrupted.float().cpu(), owner.cpu()
        z, m = ([t.float().cpu() for t in ts] for ts in (out.z, out.m))
        if x.dim() == 3:
            drawn["A test sequence, step by step"] = sequence_grid(
                x[0], corrupted[0], owner[0], [t[0] for t in z], [t[0] for t in m], data.image_shape
            )
        else:
            drawn["Groups of test images, iteration by iteration"] = group_grid(
                x, corrupted, owner, z, m, data.image_shape
            )
            drawn["One image, group by group"] = group_panels(
                x[0], [t[0] for t in z], [t[0] for t in m], data.image_shape
            )
        labels = getattr(data, "y_test", None)
        figures = self._measured(
            model,
            data,
            data.x_test[:SHOWN],
            data.owner_test[:SHOWN],
            None if labels is None else labels[:SHOWN],
        )
        model.train(training)
        curves = {
            name: [figures[f"{key}_{t}"] for t in range(1, self.iterations + 1)]
            for key, name in CURVES.items()
            if f"{key}_1" in figures
        }
        drawn["By iteration"] = iteration_curves(curves, len(data.x_test[:SHOWN]), self.normaliser)
        return drawn

    def _measured(
        self, model: Any, data: Any, x: Tensor, owner: Tensor, labels: Tensor | None
    ) -> dict[str, Any]:
        """The figures of corrupted images, and those of clean ones that say something of them."""
        self._renew_statistics(model, data, corrupted=False)
        clean = self._figures(model, x, owner, labels, corrupted=False)
        self._renew_statistics(model, data)  # last, as these are the ones that the model is to keep
        names = [n for n in clean if n.rstrip("0123456789").rstrip("_") in ("ami", "test_error")]
        return {**self._figures(model, x, owner, labels), **{f"clean_{n}": clean[n] for n in names}}

    def _figures(
        self, model: Any, x: Tensor, owner: Tensor, labels: Tensor | None, *, corrupted: bool = True
    ) -> dict[str, Any]:
        generator = torch.Generator(x.device).manual_seed(NOISE)
        # As many as fill batches, unless that left an image by itself where it needs another.
        parts = max(1, min(-(-len(x) // self.test_batch), len(x) // self._least(model)))
        ami = torch.zeros(self.iterations, dtype=torch.float64)
        cost, wrong = torch.zeros_like(ami), torch.zeros_like(ami)
        asked = 0
        split = [torch.tensor_split(t, parts) for t in (x, owner)]
        y_split = None if labels is None else torch.tensor_split(labels, parts)
        for index, (images, owners) in enumerate(zip(*split, strict=True)):
            seen = None if corrupted else images
            out = model(images, self.groups, self.iterations, corrupted=seen, generator=generator)
            cost += out.cost.double().sum(1).cpu()
            for t, m in enumerate(out.m):
                asked_for = owners[:, t + 1] if owners.dim() == 3 else owners
                ami[t] += adjusted_mutual_information(
                    asked_for, m.argmax(1).cpu(), normaliser=self.normaliser
                ).sum()
            if y_split is not None and out.log_classes is not None:
                y = _k_hot(y_split[index], out.log_classes)
                asked += int(y.sum())
                wrong += _missed(out.log_classes, y)
        figures: dict[str, Any] = {}
        means = {"ami": ami / len(x), "cost": cost / len(x)}
        if asked:
            means["test_error"] = 100 * wrong / asked
        for name, values in means.items():
            figures[name] = float(values.mean() if x.dim() == 3 else values[-1])
            figures.update((f"{name}_{t}", float(value)) for t, value in enumerate(values, 1))
        figures["ami_normaliser"] = self.normaliser
        if asked:
            figures.update(test_errors=int(wrong[-1]), test_samples=asked)
        return figures


def _log_classes(out: Any) -> Tensor:
    if out.log_classes is None:
        raise ValueError("class_weight needs a model with num_classes, got one without")
    found: Tensor = out.log_classes
    return found


def _check_labels(y: Tensor, classes: int) -> None:
    """ValueError unless labels (N,) or (N, C) are of so many classes."""
    if y.dim() > 1 and y.shape[1] != classes:
        raise ValueError(f"the images have {y.shape[1]} classes, and the model {classes}")
    if y.dim() == 1 and len(y) and readable(y):
        least, most = (int(label) for label in y.aminmax())
        if least < 0 or most >= classes:
            raise ValueError(
                f"labels must be from 0 to {classes - 1}, as the model has {classes} classes, got {least} to {most}"
            )


def _k_hot(y: Tensor, log_classes: Tensor) -> Tensor:
    """Labels (N,) or (N, C) as zeros and ones (N, C)."""
    classes = log_classes.shape[-1]
    _check_labels(y, classes)
    return (F.one_hot(y, classes) if y.dim() == 1 else y).to(log_classes.dtype)


def _missed(log_classes: Tensor, y: Tensor) -> Tensor:
    """Labels (of N, C) that are not among the likeliest classes, as many as an image has, by iteration (T,)."""
    rank = log_classes.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    missed = (rank >= y.sum(1, keepdim=True)) & (y > 0)
    return missed.double().sum((1, 2)).cpu()

"""The cost of the Stacked What-Where Auto-encoder (Zhao et al. 2015), and its two experiments with pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderfast.data import Batch, Dataset
from ladderfast.models import SWWAE, SWWAEComparison
from ladderfast.models.swwae import WhatWhere

from .metric import Metric
from .objectives import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECONSTRUCTION = Metric("reconstruction_error", "reconstruction error |x − x̃|", "")


class SWWAEObjective(Objective):
    """L = lambda_nll L_NLL + lambda_rec |x - x~|_2 + lambda_m sum_m |x_m - x~_m|_2 + l1 |h|_1.

    The first term is the cross-entropy of the labelled samples, the others are means over the unlabelled ones (the
    last over all); see `SWWAE.training_pass`. A term of weight 0 is not computed: with both reconstruction weights 0
    the decoder is not run, with lambda_nll 0 the classes are not.

    The run is judged by the test error; without labels, by the mean of |x - x~|_2 over the test samples.

    Args:
        lambda_nll: 0 for unsupervised training.
        lambda_rec: of the reconstruction of the input.
        lambda_m: of the intermediate reconstructions.
        l1: of the sparsity penalty.
        softmax_iterations: with lambda_nll 0, iterations of L-BFGS that train the dense layers on the labelled samples'
            features after the last epoch, the encoder as it is ("unsup-sfx" in table 4); 0: they are left alone.

    Raises ValueError for a weight that is negative or not finite, if all are 0, or softmax_iterations beside
    lambda_nll; before training for a network without what the terms need, or that does not fit the data or its batches.
    """

    forward_methods = ("training_pass",)
    networks = (SWWAE,)
    sources = (Dataset,)

    def __init__(
        self,
        lambda_nll: float = 1.0,
        lambda_rec: float = 0.0,
        lambda_m: float = 0.0,
        l1: float = 0.0,
        softmax_iterations: int = 0,
    ) -> None:
        weights = {"lambda_nll": lambda_nll, "lambda_rec": lambda_rec, "lambda_m": lambda_m, "l1": l1}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {weight}")
        if not any(weights.values()):
            raise ValueError(f"one of {', '.join(weights)} must be positive, got 0 for all")
        if softmax_iterations < 0 or (softmax_iterations and lambda_nll):
            raise ValueError(
                "softmax_iterations must be 0, or positive where lambda_nll is 0; "
                f"got {softmax_iterations} beside lambda_nll={lambda_nll}"
            )
        self.lambda_nll, self.lambda_rec, self.lambda_m, self.l1 = map(float, weights.values())
        self.softmax_iterations = softmax_iterations
        self.classifies = lambda_nll > 0 or softmax_iterations > 0
        self.metric = Metric() if self.classifies else RECONSTRUCTION

    def check(self, model: Any) -> None:
        if not isinstance(model, SWWAE):
            return
        if self.classifies and not len(model.dense):
            raise ValueError(
                f"architecture must end with a dense layer, as in {model.architecture}-10fc, for the classes of "
                "lambda_nll and softmax_iterations, got one without"
            )
        for name, weight in (("lambda_rec", self.lambda_rec), ("lambda_m", self.lambda_m)):
            if weight and model.decoder is None:
                raise ValueError(f"decoder must be true for {name}={weight:g}, got false")
        if self.lambda_m and not model.has_intermediate:
            raise ValueError(
                f"lambda_m must be 0 for {model.architecture}, which has no intermediate reconstruction; "
                f"got {self.lambda_m:g}"
            )

    def check_data(self, model: Any, data: Any, batch_labelled: int, batch_unlabelled: int) -> None:
        if not isinstance(model, SWWAE):
            return
        _check_image_shape(model, data)
        if self.classifies and isinstance(data, Dataset) and model.stages[-1].shape[0] < data.num_classes:
            raise ValueError(
                f"architecture must end with a unit for each of {type(data).__name__}'s {data.num_classes} classes, "
                f"got {model.architecture}"
            )
        # What batch normalisation gets in a step: the samples of which anything is asked, at each position.
        unlabelled = bool(self.lambda_rec or self.lambda_m or self.l1)
        samples = batch_labelled * (self.lambda_nll > 0) + batch_unlabelled * unlabelled
        norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        single = any(stage.kind == "conv" and stage.shape[1:] == (1, 1) for stage in model.stages)
        if samples == 1 and norms and single:
            raise ValueError(
                "batch_labelled and batch_unlabelled must make a batch of at least 2 samples for batch_norm of maps of "
                f"1 x 1, got {batch_labelled} and {batch_unlabelled}"
            )

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        out = model.training_pass(
            batch.x_labelled,
            batch.x_unlabelled,
            classify=self.lambda_nll > 0,
            reconstruction=self.lambda_rec > 0,
            intermediate=self.lambda_m > 0,
            sparsity=self.l1 > 0,
        )
        terms = {}
        if out.logits is not None:
            terms["cross_entropy"] = self.lambda_nll * F.cross_entropy(out.logits, batch.y_labelled)
        if out.reconstruction is not None:
            terms["reconstruction"] = self.lambda_rec * out.reconstruction
        for m, cost in enumerate(out.intermediate, 1):
            terms[f"intermediate_{m}"] = self.lambda_m * cost
        if out.sparsity is not None:
            terms["sparsity"] = self.l1 * out.sparsity
        if not terms:
            raise ValueError(
                "lambda_m is the only weight, and this network has no intermediate reconstruction"
            )
        return terms

    def finish(self, model: Any, data: Any) -> None:
        """Train the classifier on the features, where that is asked for."""
        if self.softmax_iterations:
            training = model.training
            model.eval()
            with torch.no_grad():
                features = torch.cat([model.features(x) for x in data.labelled_batches()])
            train_classifier(model.dense, features, data.y_labelled, iterations=self.softmax_iterations)
            model.train(training)

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        figures: dict[str, Any] = super().measure(model, data) if self.classifies else {}
        if self.lambda_rec:
            figures[RECONSTRUCTION.name] = reconstruction_error(model, data.x_test)
        return figures

    @torch.no_grad()
    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        from .figures import picture_rows

        if not self.lambda_rec:
            return {}
        model.eval()
        x = one_of_each(data)
        rows = {"input": x.flatten(1), "reconstruction": model.reconstruct(x).flatten(1)}
        figure = picture_rows(rows, data.image_shape)
        figure.set_label(
            "Test images, one a column; below each its reconstruction from the top what and all wheres."
        )
        return {"Test images and their reconstructions": figure}


class WhereObjective(Objective):
    """Section 4.1: auto-encoders that unpool by the where beside ones that copy the what to its whole window.

    For a `SWWAEComparison`, whose networks' reconstruction costs are added; each then learns as if it were alone. The
    report has the paper's figure 2. The run is judged by the mean over the networks of |x - x~|_2 on the test samples;
    that of each is measured too.
    """

    metric = RECONSTRUCTION
    networks = (SWWAEComparison,)
    sources = (Dataset,)

    def check_data(self, model: Any, data: Any, batch_labelled: int, batch_unlabelled: int) -> None:
        for network in getattr(model, "networks", nn.ModuleDict()).values():
            _check_image_shape(network, data)

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        costs: dict[str, Tensor] = model(batch.x_unlabelled)
        return costs

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        each = {name: reconstruction_error(network, data.x_test) for name, network in model.networks.items()}
        return {
            RECONSTRUCTION.name: sum(each.values()) / len(each),
            **{f"reconstruction_error_{name}": value for name, value in each.items()},
        }

    @torch.no_grad()
    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        from .swwae_figures import necessity_of_where

        model.eval()
        x = one_of_each(data)[:5]
        pictures = {
            window: tuple(
                model.networks[f"{how}_{window}"].reconstruct(x).flatten(1) for how in ("copy", "where")
            )
            for window in model.windows
        }
        return {"With and without where": necessity_of_where(x.flatten(1), pictures, data.image_shape)}


class EquivarianceObjective(SWWAEObjective):
    """Section 4.2: what is invariant and where equivariant under translations of the digits.

    The cost is `SWWAEObjective`'s, unsupervised. The report has the paper's figures 3 and 4: what and where of one
    feature plane for translated digits over those for the digits as they are, and reconstructions.

    Measured over all planes whose what is not the same for all digits: what_correlation is the correlation of a plane's
    what of translated with that of untranslated digits, where_shift the displacement of its where along the
    translation, 1 if it moves with the digit, and where_drift that across it; all of them are means over planes.

    Args:
        lambda_rec, lambda_m: as in `SWWAEObjective`.
        shift: pixels of the translation, there and back, horizontally and vertically.
        samples: test digits in the scatter plots.

    Raises ValueError as `SWWAEObjective` does, or for a shift or samples below 1; before training for a shift that is
    not smaller than the image, and for a network whose top pooling is not soft or leaves several places.
    """

    def __init__(
        self, lambda_rec: float = 1.0, lambda_m: float = 1.0, shift: int = 3, samples: int = 200
    ) -> None:
        super().__init__(0.0, lambda_rec, lambda_m)
        for name, value in (("shift", shift), ("samples", samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.shift, self.samples = shift, samples

    @torch.no_grad()
    def check(self, model: Any) -> None:
        super().check(model)
        size = min(model.image_shape[-2:])
        if self.shift >= size:
            raise ValueError(f"shift must be below {size}, the smaller side of the images, got {self.shift}")
        training = model.training
        model.eval()
        _check_top(model.what_where(next(model.parameters()).new_zeros(1, *model.image_shape)))
        model.train(training)

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        figures = super().measure(model, data)
        still, moved = self._responses(model, data, len(data.x_test))
        alive = still[0].std(0) > 1e-3 * still[0].std(0).max()
        expected = self._expected(model)
        correlations, shifts, drifts = [], [], []
        for (axis, sign), (what, where) in moved.items():
            correlations.append(_correlation(still[0][:, alive], what[:, alive]))
            way = sign * (where - still[1])[:, alive].mean(0) / expected[axis]
            shifts.append(way[:, axis])
            drifts.append((where - still[1])[:, alive, 1 - axis].mean(0).abs() / expected[1 - axis])
        return {
            **figures,
            "what_correlation": float(torch.stack(correlations).mean()),
            "where_shift": float(torch.stack(shifts).mean()),
            "where_drift": float(torch.stack(drifts).mean()),
            "planes": int(alive.sum()),
        }

    @torch.no_grad()
    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        from .figures import picture_rows
        from .swwae_figures import responses_to_translation

        model.eval()
        still, moved = self._responses(model, data, self.samples)
        # Of all planes that which answers most differently to different digits.
        plane = int(still[0].std(0).argmax())
        drawn = {key: (what[:, plane], where[:, plane]) for key, (what, where) in moved.items()}
        scatter = responses_to_translation(
            (still[0][:, plane], still[1][:, plane]), drawn, self.shift, self._expected(model), plane
        )
        x = one_of_each(data)
        images = x.reshape(-1, *model.image_shape)
        rows = {"input": x.flatten(1), "reconstruction": model.reconstruct(x).flatten(1)}
        for sign, name in ((1, "right"), (-1, "left")):
            there = translate(images, 0, sign * self.shift)
            rows[f"{self.shift} px {name}"] = model.reconstruct(there).flatten(1)
        grid = picture_rows(rows, data.image_shape)
        grid.set_label(
            "Test digits, one a column. From top to bottom: the input, its reconstruction, and the reconstructions of "
            f"the digit moved {self.shift} pixels to the right and to the left."
        )
        return {"What and where under translation": scatter, "Reconstructions": grid}

    def _responses(self, model: Any, data: Any, samples: int) -> tuple[Any, dict[tuple[int, int], Any]]:
        """What (n, C) and where (n, C, 2) of the top pooling, of digits as they are and by (axis, sign) of the shift.

        Axis 0 is horizontal, as where's x, and its sign is positive to the right; axis 1 is vertical, positive down.
        """
        x = data.x_test[:samples].reshape(-1, *model.image_shape)
        moves = {
            (axis, sign): (sign * self.shift * axis, sign * self.shift * (1 - axis))
            for axis in (0, 1)
            for sign in (1, -1)
        }

        def responses(down: int, right: int) -> tuple[Tensor, Tensor]:
            tops = [_check_top(model.what_where(translate(part, down, right))) for part in x.split(500)]
            what = torch.cat([top.what for top in tops])
            where = torch.cat([top.where for top in tops])
            return what.flatten(1).float(), where.flatten(2).float()

        return responses(0, 0), {key: responses(*move) for key, move in moves.items()}

    def _expected(self, model: Any) -> tuple[float, float]:
        """By how much where's x and y change when what is seen moves by `shift` pixels to the right and down."""
        top = len(model.encoder) - 1
        _, height, width = [model.image_shape, *(stage.shape for stage in model.stages)][top]
        _, rows, columns = model.image_shape
        place = 2 / max(
            1, model.stages[top].size - 1
        )  # where's units from one place of the window to the next
        return self.shift * width / columns * place, self.shift * height / rows * place


def _check_image_shape(model: Any, data: Any) -> None:
    """ValueError unless a sample of the data has the values of the network's images."""
    if isinstance(data, Dataset) and data.x_unlabelled[0].numel() != math.prod(model.image_shape):
        raise ValueError(
            f"image_shape must be that of a sample of {type(data).__name__}, {tuple(data.image_shape)}, got "
            f"{model.image_shape}"
        )


def _check_top(pooled: Sequence[WhatWhere]) -> WhatWhere:
    """The top pooling's what and where, if they are one place of each feature plane."""
    if not pooled:
        raise ValueError("the network must have a pooling, whose what and where are looked at; it has none")
    what, where = pooled[-1]
    if where.dim() != 5 or what.shape[2:] != (1, 1):
        raise ValueError(
            "the top pooling must be soft and leave one place of each feature plane, whose what and where are "
            f"looked at; got what {tuple(what.shape[1:])} and where {tuple(where.shape[1:])}"
        )
    return pooled[-1]


def train_classifier(layers: nn.ModuleList, x: Tensor, y: Tensor, *, iterations: int) -> None:
    """Minimise the cross-entropy of dense layers, with ReLUs between them, on x (N, D) and classes y (N,) by L-BFGS."""
    parameters = list(layers.parameters())
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        h = x
        for i, layer in enumerate(layers):
            h = layer(F.relu(h) if i else h)
        cost = F.cross_entropy(h, y)
        gradients = torch.autograd.grad(cost, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return cost

    with torch.enable_grad():
        optimizer.step(closure)
    for parameter in parameters:
        parameter.grad = None


def reconstruction_error(model: Any, x: Tensor) -> float:
    """The mean of |x - x~|_2 over samples x (N, *)."""
    total = 0.0
    for part in x.split(500):
        difference = (part - model.reconstruct(part)).flatten(1).float()
        total += float(torch.linalg.vector_norm(difference, dim=1).sum())
    return total / len(x)


def translate(x: Tensor, down: int, right: int) -> Tensor:
    """Images (N, C, H, W) moved by so many pixels; what comes in is 0."""
    return F.pad(x, (right, -right, down, -down))


def one_of_each(data: Any) -> Tensor:
    """The first test sample of each class, at most ten of them: (n, *)."""
    labels = data.y_test
    return data.x_test[[int((labels == c).nonzero()[0]) for c in labels.unique()[:10]]]


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of columns of (n, C): (C,)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)

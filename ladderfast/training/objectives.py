"""What is minimised: an objective knows its kind of model, the training loop does not."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderfast.data import Batch, Batches, Dataset
from ladderfast.models import LadderNetwork

from .adversarial import adversarial_noise, check_kind, check_tau, input_gradient
from .metric import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COUNTS = ("test_errors", "test_samples")  # of several seeds together, where other figures are means


class Objective(ABC):
    """The cost of a batch, what a model is judged by, what is left to do around the steps, and pictures.

    `metric` is the figure that a run is judged by, one of those that `measure` returns. `forward_methods` names the
    model's methods, other than its call, that `__call__` uses: where several processes train together, their
    wrapper about the model has to know. `networks` and `sources` are those of this package that it is for, as far as it
    minds; classes of one's own may be anything that it can use.
    """

    metric = Metric()
    forward_methods: tuple[str, ...] = ()
    networks: tuple[type, ...] = ()
    sources: tuple[type, ...] = ()

    @abstractmethod
    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of the cost, by name, in nats and 0-dim; the total is their sum."""

    def check(self, model: Any) -> None:  # noqa: B027  (most objectives have nothing to do here or below)
        """Raise ValueError for a model that it cannot serve; before training, of several networks with the first."""

    def check_data(self, model: Any, data: Any, batch_labelled: int, batch_unlabelled: int) -> None:  # noqa: B027
        """Raise ValueError for data or batch sizes that do not suit the model; after `check`."""

    def prepare(self, model: Any) -> None:  # noqa: B027
        """Before the first step and before a checkpoint is read: what the objective needs of its own is made."""

    def after_step(self, model: Any) -> None:  # noqa: B027
        """After every step of the optimiser."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold of the objective."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """What `state_dict` returned."""

    def finish(self, model: Any, data: Any) -> None:  # noqa: B027
        """After the last epoch, before the last measurement."""

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        """Figures on the test samples, `metric.name` among them; the model is in evaluation mode.

        Here those of a classifier: test_error in percent, test_errors, test_samples, test_cross_entropy in nats. Of
        several networks, whose logits have their axis in front, the means and sums, and test_error_std (with n - 1)
        and test_error_by_seed as well.
        """
        x, y = data.x_test, data.y_test
        errors: Any = 0
        nats: Any = 0
        for part, labels in zip(x.split(500), y.split(500), strict=True):
            logits = model(part).float()
            wanted = labels.expand(logits.shape[:-1])
            errors += (logits.argmax(-1) != wanted).sum(-1)
            nats += F.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none").sum(-1)
        wrong = errors.reshape(-1).tolist()
        by_seed = [100 * count / len(y) for count in wrong]
        return {
            **over_seeds("test_error", by_seed),
            "test_errors": sum(wrong),
            "test_samples": len(y) * len(wrong),
            "test_cross_entropy": float(nats.mean()) / len(y),
        }

    @property
    def validates(self) -> bool:
        """Whether `validate` measures `metric`, where the data have validation samples."""
        return type(self).validate is not Objective.validate

    def validate(self, model: Any, data: Any) -> float | None:
        """`metric` on validation samples, which are no test samples; None where the data have none."""
        return None

    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        """Pictures for the report, by title."""
        return {}


def over_seeds(name: str, values: Sequence[float]) -> dict[str, Any]:
    """A figure of several seeds: its mean, and where there are several its deviation (n - 1) and each of them."""
    if len(values) == 1:
        return {name: values[0]}
    spread = {f"{name}_std": statistics.stdev(values), f"{name}_by_seed": list(values)}
    return {name: statistics.fmean(values), **spread}


class LadderObjective(Objective):
    """Rasmus et al. 2015, Algorithm 1: C = cross-entropy(corrupted labelled output) + sum_l lambda_l cost_l.

    Args:
        denoising_weights: lambda of the layers 0..L, the input first. A cost of weight 0 is not computed; with all
            of them 0 this is the objective of the baseline.
        adversarial_labelled: tau of the adversarial noise that the labelled samples get beside the Gaussian one, from
            the gradient of their cross-entropy at the clean input; 0: none.
        adversarial_unlabelled: tau of that of the unlabelled samples, with the network's own answer as their label.
        labelled_kind: of the labelled samples' noise: sign, raw, unit_norm or q_norm.
        unlabelled_kind: of the unlabelled samples'.

    Raises ValueError for a weight or tau that is negative or not finite, an unknown kind, or if the number of weights
    is not the model's.
    """

    forward_methods = ("training_pass",)
    networks = (LadderNetwork,)

    def __init__(
        self,
        denoising_weights: Sequence[float],
        adversarial_labelled: float = 0.0,
        adversarial_unlabelled: float = 0.0,
        labelled_kind: str = "sign",
        unlabelled_kind: str = "q_norm",
    ) -> None:
        weights = [float(weight) for weight in denoising_weights]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"denoising_weights must be finite and not negative, got {weights}")
        self.denoising_weights = weights
        self._wanted = [weight > 0 for weight in weights]
        for name, tau in (
            ("adversarial_labelled", adversarial_labelled),
            ("adversarial_unlabelled", adversarial_unlabelled),
        ):
            check_tau(name, tau)
        check_kind("labelled_kind", labelled_kind)
        check_kind("unlabelled_kind", unlabelled_kind)
        self._taus = (adversarial_labelled, adversarial_unlabelled)
        self._kinds = (labelled_kind, unlabelled_kind)

    def check(self, model: Any) -> None:
        if not isinstance(model, LadderNetwork):
            return
        depth = len(model.layers)
        if len(self.denoising_weights) != depth:
            raise ValueError(
                f"denoising_weights must have {depth} entries, one a layer 0..L of the model's layers "
                f"{list(model.layers)}, got {len(self.denoising_weights)}"
            )
        for index, wanted in enumerate(self._wanted):
            if wanted and model.combinator[index] == "none":
                raise ValueError(
                    f'denoising_weights[{index}] must be 0 where the layer\'s combinator is "none", got '
                    f"{self.denoising_weights[index]:g}"
                )

    def check_data(self, model: Any, data: Any, batch_labelled: int, batch_unlabelled: int) -> None:
        if not isinstance(model, LadderNetwork):
            return
        if batch_labelled < 2:
            raise ValueError(
                "batch_labelled must be at least 2, as a batch is normalised by its own statistics, which leave "
                f"nothing of a single sample, got {batch_labelled}"
            )
        if any(self._wanted) and batch_unlabelled < 2:
            raise ValueError(
                "batch_unlabelled must be at least 2 for denoising costs, whose statistics are those of a batch, got "
                f"{batch_unlabelled}"
            )
        if not isinstance(data, Dataset):
            return
        if len(data.x_labelled) < 2:
            raise ValueError(
                "num_labels must be at least 2, as the statistics for evaluation are those of the labelled samples, "
                f"got {len(data.x_labelled)}"
            )
        name, values = type(data).__name__, data.x_unlabelled[0].numel()
        if values != math.prod(model.shapes[0]):
            raise ValueError(
                f"layers must begin with the {values} values of a sample of {name}, got {model.layers[0]}"
            )
        classes, last = data.num_classes, math.prod(model.shapes[-1])
        if last < classes:
            raise ValueError(
                f"layers must end with a unit for each of {name}'s {classes} classes, got {last}"
            )

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        noise = {}
        if any(self._taus):
            bare = getattr(model, "module", model)  # no business of the wrapper that several processes have
            samples = ((batch.x_labelled, batch.y_labelled), (batch.x_unlabelled, None))
            noise["extra_noise"] = tuple(
                adversarial_noise(input_gradient(bare.clean_logits, x, y), kind, tau) if tau else None
                for (x, y), kind, tau in zip(samples, self._kinds, self._taus, strict=True)
            )
        out = model.training_pass(
            batch.x_labelled, batch.x_unlabelled, costs=self._wanted, clean_gradients=False, **noise
        )
        terms = {"cross_entropy": F.cross_entropy(out.logits, batch.y_labelled)}
        for layer, (weight, cost) in enumerate(zip(self.denoising_weights, out.denoising, strict=True)):
            if weight > 0:
                terms[f"denoising_{layer}"] = weight * cost
        return terms

    def finish(self, model: Any, data: Batches) -> None:
        """Make the evaluation statistics a plain average over one pass of the labelled samples."""
        model.recompute_statistics(data.labelled_batches())

    @torch.no_grad()
    def figures(self, model: Any, data: Batches) -> dict[str, Figure]:
        from .figures import combinator_shapes, reconstruction_grid

        figures = {}
        if self._wanted[0] and len(data.x_test) > 1:  # a single one has no statistics
            x = data.x_test[:1000]
            corrupted, reconstructed = model.reconstruct(x)
            shown = [int((data.y_test[: len(x)] == c).nonzero()[0]) for c in data.y_test[: len(x)].unique()]
            pictures = [t[shown].flatten(1).float().cpu() for t in (x, corrupted, reconstructed)]
            figures["Test images, corrupted and reconstructed"] = reconstruction_grid(
                pictures[0], pictures[1], pictures[2], data.image_shape
            )
        for layer, (combinator, wanted) in enumerate(zip(model.combinators, self._wanted, strict=True)):
            if wanted:
                figures[f"Combinator of layer {layer}"] = combinator_shapes(
                    combinator, model.shapes[layer][0]
                )
        return figures

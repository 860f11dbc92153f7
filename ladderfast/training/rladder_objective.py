"""What a recurrent Ladder is trained for on sequences with a label: its class, the next frame, a teacher's opinion."""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderfast.checks import check_whole
from ladderfast.data import OccludedMovingDigits
from ladderfast.models import RLadder

from .objectives import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 3  # sequences in the report
LOOKED_AT = 200  # test sequences, the first, of which these are taken
STATISTICS = (500, 4)  # size and number of the training batches that give the statistics for evaluation


class RLadderObjective(Objective):
    """Prémont-Schwarz et al. 2017, section 3.1: C = cross-entropy + weighted costs at the bottom and at the top.

        cross_entropy  of the class, at the last step of labelled sequences
        prediction     of the next, occluded, frame at every step of all sequences: the pixels' cross-entropy, summed
                       over a frame, averaged over steps and sequences
        consistency    at the last step of all sequences: |softmax(own logits) - softmax(teacher's)|^2, summed over
                       classes, averaged over sequences; the teacher's weights are an exponential average of the own

    Args:
        prediction_weight: of the next frame's cost, whose unit is nats per frame; 0: the task is left out.
        consistency_weight: of the consistency with the Mean Teacher, after the ramp; 0: there is no teacher.
        ramp_up_steps: over which the weight of the consistency rises, as exp(-5 (1 - step / ramp_up_steps)^2).
        ema_decay: of the teacher's weights, from the start on less, 1 - 1 / (step + 1).
        input_noise: standard deviation of Gaussian noise on the input in training, another for the teacher.
        truncate: time steps after which back-propagation is cut; null: never.
        checkpoint_every: time steps from one kept activation to the next, see `RLadder`; null: all are kept.

    Raises TypeError or ValueError for steps that are no whole numbers and numbers out of range; before training for a
    network without what the costs need, or that does not fit the data or its batches.

    Source: Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017; Tarvainen and Valpola, "Mean teachers are better
    role models", 2017, for the teacher.
    """

    networks = (RLadder,)
    sources = (OccludedMovingDigits,)

    def __init__(
        self,
        prediction_weight: float = 0.02,
        consistency_weight: float = 0.0,
        ramp_up_steps: int = 0,
        ema_decay: float = 0.999,
        input_noise: float = 0.0,
        truncate: int | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        for name, value in (
            ("prediction_weight", prediction_weight),
            ("consistency_weight", consistency_weight),
            ("ramp_up_steps", ramp_up_steps),
            ("input_noise", input_noise),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to below 1, got {ema_decay}")
        for name, steps in (("truncate", truncate), ("checkpoint_every", checkpoint_every)):
            if steps is not None:
                check_whole(name, steps)
            if steps is not None and steps < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {steps}")
        self.prediction_weight, self.consistency_weight = prediction_weight, consistency_weight
        self.ramp_up_steps, self.ema_decay, self.input_noise = ramp_up_steps, ema_decay, input_noise
        self._how = {"truncate": truncate, "checkpoint_every": checkpoint_every}
        self.steps = 0
        self.teacher: nn.Module | None = None

    def check(self, model: Any) -> None:
        if getattr(model, "classifier", None) is None:
            raise ValueError("model must have num_classes for this objective")
        if self.prediction_weight and getattr(model, "readout", None) is None:
            raise ValueError("model must have out_channels for a prediction_weight above 0")

    def check_data(self, model: Any, data: Any, batch_labelled: int, batch_unlabelled: int) -> None:
        if not isinstance(model, RLadder) or not isinstance(data, OccludedMovingDigits):
            return
        name, frame = type(data).__name__, (1, *data.image_shape)
        if model.input_shape != frame:
            raise ValueError(
                f"input_shape must be {frame}, that of a frame of {name}, got {model.input_shape}"
            )
        if self.prediction_weight and model.out_channels != frame[0]:
            raise ValueError(
                f"out_channels must be {frame[0]}, as many as a frame of {name} has, for a prediction_weight above 0, "
                f"got {model.out_channels}"
            )
        if model.num_classes is not None and model.num_classes < data.num_classes:
            raise ValueError(
                f"num_classes must be at least {data.num_classes}, the classes of {name}, got {model.num_classes}"
            )
        if batch_labelled + batch_unlabelled == 1 and (level := model.normalises_samples()) is not None:
            raise ValueError(
                f"batch_labelled and batch_unlabelled must make a batch of at least 2 samples for level {level}, which "
                f"has batch normalisation and no positions, got {batch_labelled} and {batch_unlabelled}"
            )

    def prepare(self, model: Any) -> None:
        self.steps = 0
        if self.consistency_weight:
            self.teacher = copy.deepcopy(model).requires_grad_(False)

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        x, target = batch.x_labelled, batch.next_labelled
        if len(batch.x_unlabelled):
            x = torch.cat((x, batch.x_unlabelled))
            target = torch.cat((target, batch.next_unlabelled))
        output, _ = model(self._noisy(x), **self._how)
        logits = output.logits[:, -1]
        terms = {"cross_entropy": F.cross_entropy(logits[: len(batch.y_labelled)], batch.y_labelled)}
        if self.prediction_weight:
            terms["prediction"] = self.prediction_weight * frame_cost(output.prediction, target).mean()
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher.train()
                wanted = self.teacher(self._noisy(x))[0].logits[:, -1].float().softmax(1)
            apart = (logits.float().softmax(1) - wanted).square().sum(1).mean()
            terms["consistency"] = self.consistency_weight * self.ramp() * apart
        return terms

    def _noisy(self, x: Tensor) -> Tensor:
        return x + self.input_noise * torch.randn_like(x) if self.input_noise else x

    def ramp(self) -> float:
        """The part of its weight that the consistency has at this step."""
        if self.steps >= self.ramp_up_steps:
            return 1.0
        return math.exp(-5 * (1 - self.steps / self.ramp_up_steps) ** 2)

    @torch.no_grad()
    def after_step(self, model: Any) -> None:
        self.steps += 1
        if self.teacher is not None:
            share = 1 - min(1 - 1 / (self.steps + 1), self.ema_decay)
            own = [p.detach() for p in model.parameters()]
            torch._foreach_lerp_(list(self.teacher.parameters()), own, share)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": self.steps}
        if self.teacher is not None:
            state["teacher"] = self.teacher.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])

    def measure(self, model: Any, data: Any) -> dict[str, Any]:
        """Figures on the test sequences: of the class at the last step, and of the next frame.

        test_error in percent, test_errors, test_samples, test_cross_entropy in nats; test_error_by_step, what the
        error would be after each step; next_frame_cost in nats per frame, where frames are predicted; teacher_error
        in percent, where there is a teacher. Batch statistics are computed anew, from the first training sequences.
        """
        figures = self._figures(model, data, "test")
        if self.teacher is not None:
            self.teacher.eval()
            figures["teacher_error"] = self._figures(self.teacher, data, "test")["test_error"]
        return figures

    def validate(self, model: Any, data: Any) -> float | None:
        if not len(data.rows["validation"]):
            return None
        return self._figures(model, data, "validation")["test_error"]

    def _figures(self, model: Any, data: Any, split: str) -> dict[str, Any]:
        size, count = STATISTICS
        model.recompute_statistics(x for x, _, _ in itertools.islice(data.parts("train", size), count))
        wrong: Any = 0
        nats: Any = 0
        frame: Any = 0
        samples = 0
        for x, target, y in data.parts(split):
            output, _ = model(x)
            logits = output.logits.float()
            wrong = wrong + (logits.argmax(2) != y[:, None]).sum(0)
            nats = nats + F.cross_entropy(logits[:, -1], y, reduction="sum")
            if output.prediction is not None and self.prediction_weight:
                frame = frame + frame_cost(output.prediction, target).mean(1).sum()
            samples += len(y)
        by_step = [100 * count / samples for count in wrong.tolist()]
        figures: dict[str, Any] = {
            "test_error": by_step[-1],
            "test_errors": int(wrong[-1]),
            "test_samples": samples,
            "test_cross_entropy": float(nats) / samples,
        }
        if len(by_step) > 1:
            figures["test_error_by_step"] = by_step
        if isinstance(frame, Tensor):
            figures["next_frame_cost"] = float(frame) / samples
        return figures

    @torch.no_grad()
    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        from .rladder_figures import error_by_step, sequence

        training = model.training
        model.eval()
        figures = {}
        by_step = self._figures(model, data, "test").get("test_error_by_step")
        if by_step is not None:
            figures["Test error after each time step"] = error_by_step(by_step)
            rows = torch.arange(min(LOOKED_AT, len(data.rows["test"])))
            scene, y = data.scene("test", rows)
            output, _ = model(scene.occluded[:, :-1])
            probabilities = output.logits.float().softmax(2).cpu()
            # Those whose class comes to light late are the ones to look at.
            at_first = probabilities[:, 0].gather(1, y.cpu()[:, None])[:, 0]
            gain = probabilities[:, -1].gather(1, y.cpu()[:, None])[:, 0] - at_first
            for row in gain.argsort(descending=True, stable=True)[:SHOWN].tolist():
                prediction = (
                    None if output.prediction is None or not self.prediction_weight else output.prediction
                )
                figures[f"Test sequence {row}, a {int(y[row])}"] = sequence(
                    scene.clean[row],
                    scene.occluded[row],
                    None if prediction is None else prediction[row].sigmoid(),
                    probabilities[row],
                )
        model.train(training)
        return figures


def frame_cost(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, T): nats of each frame of target (N, T, *), 0..1, under prediction (N, T, *), which is before the sigmoid."""
    cost = F.binary_cross_entropy_with_logits(prediction.float(), target.float(), reduction="none")
    return cost.flatten(2).sum(2)

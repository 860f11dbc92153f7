"""RTagger: Tagger whose groups are each a recurrent Ladder (Prémont-Schwarz et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderfast.checks import check_whole
from ladderfast.nn.recurrent_ladder import StepBatchNorm, averaged_statistics
from ladderfast.ops import bernoulli_mixture_nll, gaussian_mixture_nll

from .checks import check_num_classes
from .recurrent_ladder import Level, RLadder
from .tagger import EPS, Grouping


class RTagger(Grouping):
    """RTagger: K copies of a recurrent Ladder that share their weights, each with a state of its own.

        dz, L  = what the corrupted input tells each group, as in `Tagger`
        a, b   = RLadder([z_k, m_k, dz_k, L_k] as four channels, state_k)
        z_k    = c1 BN(a) + b1                               (binary: sigmoid of it)
        m      = softmax over k of c2 BN(b)

    The groups are folded into the batch. `x` (N, D) are images, seen in every iteration; or (N, T, D) sequences, whose
    next frame each step predicts. Cells with a state and gates have batch normalisation where an RLadder has layer
    normalisation, and so have a and b, over batch, groups and positions: with statistics for evaluation by step, so
    that in evaluation the answer to an image does not depend on what else is in the batch.

    Args:
        image_shape: (height, width); D is their product.
        levels: of the RLadder, see `Level`.
        norm_steps: iterations or time steps with statistics for evaluation of their own.
        num_classes: classes of the supervised head, which has a unit more, "no class"; 0: none.
        binary, noise, input_mean, variance_start, variance_map, density_in_residual, square_variance, scale_residual,
            feed_logits: as of `Tagger`, also where they mean something to one kind of inputs only.

    Raises TypeError or ValueError for arguments that make no RTagger.

    Source: Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, section 4.
    """

    batch_statistics = False

    def __init__(
        self,
        image_shape: Sequence[int],
        levels: Sequence[Level | Mapping[str, Any]],
        *,
        norm_steps: int = 3,
        num_classes: int = 0,
        binary: bool = False,
        noise: float = 0.2,
        input_mean: float = 0.5,
        variance_start: float = 1.0,
        variance_map: str = "exp",
        density_in_residual: bool = True,
        square_variance: bool = False,
        scale_residual: bool = False,
        feed_logits: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            binary=binary,
            noise=noise,
            input_mean=input_mean,
            variance_start=variance_start,
            variance_map=variance_map,
            density_in_residual=density_in_residual,
            square_variance=square_variance,
            scale_residual=scale_residual,
            feed_logits=feed_logits,
            device=device,
            dtype=dtype,
        )
        if not hasattr(image_shape, "__len__") or len(image_shape) != 2:
            raise ValueError(f"image_shape must be (height, width), got {image_shape!r}")
        for name, size in zip(("height", "width"), image_shape, strict=True):
            check_whole(f"{name} of image_shape", size)
        if min(image_shape) < 1:
            raise ValueError(f"image_shape must be positive, got {image_shape!r}")
        check_num_classes(num_classes)
        self.image_shape = tuple(image_shape)
        self.num_pixels, self.num_classes = self.image_shape[0] * self.image_shape[1], num_classes
        self.engine = RLadder(
            (4, *self.image_shape),
            levels,
            num_classes + 1 if num_classes else None,
            2,
            norm="batch",
            norm_steps=norm_steps,
            device=device,
            dtype=dtype,
        )
        assert self.engine.readout is not None
        self.engine.readout.map.register_parameter("bias", None)  # what it puts out is normalised
        # Statistics of the batch here beside the engine's fixed ones would scale z by what those of the batch are off.
        self.norm = StepBatchNorm(2, norm_steps, bias=False, eps=EPS, device=device, dtype=dtype)
        self.shift = nn.Parameter(
            torch.zeros(1, device=device, dtype=dtype)
        )  # the masks' would change nothing

    def recompute_statistics(
        self,
        batches: Iterable[Tensor],
        num_groups: int,
        num_iterations: int,
        *,
        corrupted: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the batch statistics for evaluation plain averages over these images or sequences.

        Those that have followed the training are of weights that are gone; see `RLadder.recompute_statistics`. They are
        of corrupted input, as in training, or with corrupted=False of input as it is, for the answers to such input.
        """
        with averaged_statistics(self):
            for x in batches:
                seen = None if corrupted else x
                self(x, num_groups, num_iterations, corrupted=seen, generator=generator)

    def _iterate(self, told: Tensor, state: Any) -> tuple[Tensor, Any, Any]:
        """As `Grouping`'s, but what it returns is normalised: the step is known here."""
        x = told.unflatten(1, (4, *self.image_shape))
        step = 0 if state is None else state.step
        out, state = self.engine.step(x.to(self.shift.dtype), state)
        assert out.prediction is not None
        maps = self.norm(out.prediction.to(self.shift.dtype), step)
        shift = F.pad(self.shift, (0, 1)).view(2, 1, 1)
        return (maps + shift).flatten(1), out.logits, state

    def _outputs(self, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, logits = pre.chunk(2, 2)
        if not self.binary:
            return z, logits, gaussian_mixture_nll(x, z, logits.softmax(1), self.variance)
        z = torch.sigmoid(z)
        return z, logits, bernoulli_mixture_nll(x, z, logits.softmax(1))

    def _unsquashed(self, pre: Tensor) -> Tensor:
        return pre[..., : self.num_pixels]

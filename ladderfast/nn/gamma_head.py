"""The Γ-model's top level as a module, for any network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ladderfast.checks import check_whole
from ladderfast.nn.ladder_decoder import LadderDecoderLayer
from ladderfast.nn.ladder_encoder import LadderEncoderLayer, follow, unbiased
from ladderfast.nn.noise import draw_seed, take_noise


class GammaOutput(NamedTuple):
    """What `GammaHead` returns for a training step."""

    logits: Tensor
    """(N, C) of the noisy pass, labelled rows first: gamma (z~ + beta)."""
    cost: Tensor
    """0-dim, the denoising cost of the unlabelled rows, unweighted."""


class GammaHead(nn.Module):
    """The top level of the Γ-model (Rasmus et al. 2015, section 3) on a network of yours.

    Takes what the network puts out before its softmax, of a noisy and of a clean pass; normalises it, adds noise, and
    has a denoising function g find the clean values again with the help of the softmax:

        z~ = BN(noisy) + noise_std * noise        logits = gamma (z~ + beta)        z_hat = g(z~, BN(softmax(logits)))
        cost = mean of (BN(clean) - (z_hat - mean(clean)) / sqrt(var(clean) + eps))^2

    Labelled and unlabelled rows are normalised apart; no gradient is stopped. `head.eval()(x)` are the logits with
    statistics for evaluation, which in training mode follow the clean rows: a batch's weight is 1/k for the k-th batch,
    never below 1/10. What noise the network sees below its top is yours to add.

    Args:
        num_features: classes (C).
        noise_std: standard deviation of the noise at this level.
        scale: whether there is a gamma.
        combinator: g, by its name in `ladderfast.nn.COMBINATORS`.

    >>> noisy = net(x + 0.3 * torch.randn_like(x))        # labelled rows first
    >>> out = head(noisy, net(x_unlabelled), num_labelled=len(y))
    >>> cost = F.cross_entropy(out.logits[: len(y)], y) + 0.5 * out.cost
    """

    def __init__(
        self,
        num_features: int,
        *,
        noise_std: float = 0.3,
        scale: bool = True,
        combinator: str = "gaussian",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = LadderEncoderLayer(
            nn.Identity(),
            num_features,
            activation="identity",
            noise_std=noise_std,
            scale=scale,
            wide=True,
            device=device,
            dtype=dtype,
        )
        self.decoder = LadderDecoderLayer(
            None, num_features, combinator=combinator, device=device, dtype=dtype
        )
        self.num_batches_tracked: Tensor
        self.noise_state: Tensor
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("noise_state", torch.zeros(2, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the start values, forget the statistics, and draw a new seed from torch's global generator."""
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()
        self.num_batches_tracked.zero_()
        draw_seed(self.noise_state)

    def forward(
        self, x: Tensor, clean: Tensor | None = None, *, num_labelled: int = 0
    ) -> GammaOutput | Tensor:
        """Logits and cost of a training step; without `clean`, the logits of x.

        Args:
            x: (N, C) of the noisy pass, first `num_labelled` labelled rows, then the unlabelled ones. Without `clean`,
                of a clean pass, for evaluation.
            clean: (N - num_labelled, C) of the clean pass over the unlabelled rows, two at least.

        Raises TypeError, ValueError: inputs of the wrong kind or shape.
        """
        self._check("x", x)
        if clean is None:
            h: Tensor = self.encoder(x, want_z=False).h if self.training else self.encoder.evaluate(x)
            return h
        self._check("clean", clean)
        check_whole("num_labelled", num_labelled)
        if len(clean) < 2 or num_labelled < 0 or len(x) != num_labelled + len(clean):
            raise ValueError(
                "x must hold num_labelled rows and then those of clean, which are at least two, got "
                f"{len(x)} rows, num_labelled={num_labelled} and {len(clean)} clean rows"
            )
        # Processes that train together have the same buffer, and streams of their own.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        stream = torch.distributed.get_rank() << 32 if distributed else 0
        state = take_noise(self.noise_state, 1)
        z, h, mean, var = self.encoder(
            torch.cat([x, clean]),
            num_labelled,
            num_clean=len(clean),
            noise_state=state,
            noise_stream=stream,
        )
        _, z_noisy, z_clean = z.split([num_labelled, len(clean), len(clean)])
        logits = h[: len(x)]
        _, cost = self.decoder(torch.softmax(logits[num_labelled:], 1), z_noisy, z_clean, mean[2], var[2])
        if self.training:
            statistics = [mean[2].detach(), *unbiased([var[2].detach()], [len(clean)])]
            follow([self.encoder], statistics, self.num_batches_tracked)
        return GammaOutput(logits, cost)

    def _check(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if x.dim() != 2 or x.shape[1] != self.encoder.num_features:
            raise ValueError(f"{name} must have shape (N, {self.encoder.num_features}), got {tuple(x.shape)}")

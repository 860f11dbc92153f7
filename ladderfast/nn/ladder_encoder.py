"""Drop-in module for a Ladder's encoder layer: a linear map, and the op that follows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderfast.nn.checks import positive
from ladderfast.nn.maps import HALF, apply_map, for_op, op_dtype
from ladderfast.ops.checks import check_not_negative
from ladderfast.ops.function import plain
from ladderfast.ops.ladder_encoder import LadderEncoderOutput, ladder_encoder
from ladderfast.reference.ladder_encoder import ACTIVATIONS, activate

MAX_COUNT = 10  # the running weight of a batch's statistics is 1 / min(batches seen, MAX_COUNT)


class LadderEncoderLayer(nn.Module):
    """A Ladder's encoder layer (Rasmus et al. 2015, Algorithm 1): linear map, normalisation, noise, activation.

        z_pre = W x        z = (z_pre - mean) / sqrt(var + eps) + noise_std * noise        h = act(gamma (z + beta))

    Args:
        linear: the map W, without bias: `nn.Linear`, `nn.Conv2d`, a pooling; any module whose output is (N, C, *).
        num_features: units or channels (C) that it puts out.
        activation: "identity", "relu" or "leaky_relu" (slope 0.1).
        noise_std: standard deviation of the noise.
        shift: whether there is a beta (C), 0 at the start.
        scale: whether there is a gamma (C), 1 at the start.
        wide: return float32 even where the map computes in 16 bits, for logits.
        eps: beneath the square root.

    `layer(x)` normalises with the batch's own statistics, whatever the mode; `layer.evaluate(x)` with the buffers
    `running_mean` and `running_var` (C), which are the caller's to set: in a Ladder they follow a clean pass over
    labelled samples.

    >>> layer = ladderfast.nn.LadderEncoderLayer(torch.nn.Linear(784, 500, bias=False), 500, noise_std=0.3)
    >>> state = torch.tensor([seed, 0])
    >>> z, h, mean, var = layer(torch.cat([x_labelled, x_unlabelled]), len(x_labelled), noise_state=state)
    """

    def __init__(
        self,
        linear: nn.Module,
        num_features: int,
        *,
        activation: str = "relu",
        noise_std: float = 0.0,
        shift: bool = True,
        scale: bool = False,
        wide: bool = False,
        eps: float = 1e-10,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        check_not_negative("noise_std", noise_std)
        check_not_negative("eps", eps)
        self.linear = linear
        self.num_features = positive("num_features", num_features)
        self.activation = activation
        self.noise_std = noise_std
        self.wide = wide
        self.eps = eps
        self.beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if shift else None
        self.gamma = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if scale else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the start values of beta, gamma and the statistics; the map's are its own."""
        if self.beta is not None:
            nn.init.zeros_(self.beta)
        if self.gamma is not None:
            nn.init.ones_(self.gamma)
        self.reset_statistics()

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget the statistics for evaluation: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(
        self,
        x: Tensor,
        num_labelled: int | None = None,
        *,
        num_clean: int = 0,
        noise_state: Tensor | None = None,
        noise_stream: int = 0,
        want_z: bool = True,
    ) -> LadderEncoderOutput:
        """z, h, mean and var, with the batch's own statistics.

        Args:
            x: (N, *) the layer's input: first the labelled samples, then the unlabelled ones, then those of a clean
                pass. These parts are normalised apart.
            num_labelled: rows of the first part; by default all but those of the clean pass.
            num_clean: rows of the last part, which gets no noise.
            noise_state, noise_stream: (2,) int64 and a number, which say what noise, as in
                `ladderfast.ops.ladder_encoder`. None: no noise.
            want_z: False where nobody needs z, which is then None.

        Raises TypeError and ValueError as the op does.
        """
        z_pre = self._project(x)
        return ladder_encoder(
            z_pre,
            len(z_pre) - num_clean if num_labelled is None else num_labelled,
            num_clean=num_clean,
            beta=None if self.beta is None else for_op(self.beta, z_pre),
            gamma=None if self.gamma is None else for_op(self.gamma, z_pre),
            noise_std=0.0 if noise_state is None else self.noise_std,
            noise_state=noise_state,
            noise_stream=noise_stream,
            activation=self.activation,
            eps=self.eps,
            want_z=want_z,
        )

    def evaluate(self, x: Tensor) -> Tensor:
        """h (N, C, *) with the statistics for evaluation."""
        z_pre = self._project(x)
        if z_pre.device.type == "cpu":  # rounding the statistics there would save nothing
            z_pre = z_pre.to(torch.promote_types(z_pre.dtype, torch.float32))
        mean, var, beta, gamma = (
            None if t is None else t.to(z_pre.dtype)
            for t in (self.running_mean, self.running_var, self.beta, self.gamma)
        )
        # gamma (z + beta) is a scale gamma and a shift gamma beta, which batch_norm applies in the same pass.
        shift = beta if beta is None or gamma is None else gamma * beta
        if shift is not None and gamma is None:
            gamma = torch.ones_like(shift)
        h = F.batch_norm(z_pre, mean, var, gamma, shift, training=False, eps=self.eps)
        return activate(h, self.activation, 0.1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, activation={self.activation}, noise_std={self.noise_std}"

    def _project(self, x: Tensor) -> Tensor:
        z_pre = apply_map(self.linear, x)
        if not z_pre.is_nested and z_pre.dim() > 1 and z_pre.shape[1] != self.num_features:
            raise ValueError(
                f"linear must put out (N, {self.num_features}, *), as num_features says, got {tuple(z_pre.shape)}"
            )
        if self.wide and z_pre.dtype in HALF:
            return z_pre.float()
        return z_pre.to(op_dtype(z_pre.dtype, z_pre.device))


def unbiased(variances: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """n / (n - 1) times each biased variance of n values; a single value keeps its 0."""
    factors = [n / max(n - 1, 1) for n in counts]
    if not plain():  # torch.func has no rules for operations on lists
        return [var * factor for var, factor in zip(variances, factors, strict=True)]
    return list(torch._foreach_mul(list(variances), factors))


def running_statistics(layers: Sequence[LadderEncoderLayer]) -> list[Tensor]:
    """The buffers of the statistics for evaluation: the means of all layers, then their variances."""
    return [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]


@torch.no_grad()
def follow(
    layers: Sequence[LadderEncoderLayer], statistics: Sequence[Tensor], num_batches_tracked: Tensor
) -> None:
    """Have the statistics for evaluation follow a batch's, which come in the order of `running_statistics`.

    The k-th batch has the weight 1/k, never below 1 / MAX_COUNT; num_batches_tracked is k - 1 before and k after.
    """
    num_batches_tracked.add_(1)
    # A tensor, so that neither a GPU is waited for nor a captured graph keeps one step's value.
    weight = num_batches_tracked.clamp(max=MAX_COUNT).to(statistics[0].dtype).reciprocal()
    running = running_statistics(layers)
    wide = running
    if running[0].dtype != weight.dtype:
        wide = [old.to(weight.dtype) for old in running]
    if plain():
        torch._foreach_lerp_(wide, list(statistics), [weight] * len(statistics))
    else:
        for old, new in zip(wide, statistics, strict=True):
            old.add_((new - old) * weight)
    if wide is not running:
        for to, old in zip(running, wide, strict=True):
            to.copy_(old)

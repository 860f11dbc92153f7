"""The Ladder network of dense layers (Rasmus et al. 2015, Algorithm 1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderfast.nn.combinator import make_combinator

EPS = 1e-10  # beneath every square root of a variance
MAX_COUNT = 10  # the running weight of a batch's statistics is 1 / min(batches seen, MAX_COUNT)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.1),
    "linear": lambda x: x,
}


class LadderOutput(NamedTuple):
    """What `LadderNetwork.training_pass` returns."""

    logits: Tensor
    """(N_l, classes) of the corrupted pass, labelled half, before the softmax: gamma (z~ + beta)."""
    clean_logits: Tensor
    """(N_l, classes) of the clean pass, labelled half."""
    denoising: tuple[Tensor | None, ...]
    """The unweighted denoising cost of each layer, 0 first, 0-dim; None where it was not computed."""


class LadderLayer(nn.Module):
    """The encoder's unit: a linear map, and what follows its normalisation.

        z_pre = W h        z = (z_pre - mean) / sqrt(var + eps) (+ noise)        h = act(gamma (z + beta))

    Args:
        linear: the map W, without bias.
        num_features: units (C) that it puts out.
        activation: a key of `ACTIVATIONS`. The top layer takes "linear" here and leaves its softmax to the
            network, which needs the logits as well.
        shift: whether there is a beta (C), 0 at the start.
        scale: whether there is a gamma (C), 1 at the start.

    The buffers `running_mean` and `running_var` (C) are the statistics for evaluation.
    """

    def __init__(
        self,
        linear: nn.Linear,
        num_features: int,
        *,
        activation: str,
        shift: bool,
        scale: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation
        self.beta = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if shift else None
        self.gamma = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if scale else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))

    def project(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """z_pre = W h of each part, all of them in one matrix product."""
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        return _project(self.linear, rows).split([len(part) for part in parts])

    def activate(self, z: Tensor) -> Tensor:
        """h = act(gamma (z + beta)): the bias first, then the scale."""
        if self.beta is not None:
            z = z + self.beta
        if self.gamma is not None:
            z = z * self.gamma
        return ACTIVATIONS[self.activation](z)

    def normalise_for_evaluation(self, z_pre: Tensor) -> Tensor:
        mean, var = self.running_mean.to(z_pre.dtype), self.running_var.to(z_pre.dtype)
        return F.batch_norm(z_pre, mean, var, training=False, eps=EPS)


class LadderNetwork(nn.Module):
    """Ladder network of dense layers: clean and corrupted encoder with shared weights, and a decoder.

    `model(x)` classifies. For a training step, `training_pass` returns the corrupted logits, for the
    cross-entropy, and the denoising costs, to be weighted with the recipe's lambdas and added.

    Args:
        layers: widths of the layers 0..L, the input first and the classes last.
        activation: of the layers 1..L-1: "relu", "leaky_relu" (slope 0.1) or "linear" (these have no beta).
            Layer L has a softmax.
        combinator: g(z~, u) of the layers 0..L, one name for all or one for each; names are the keys of
            `ladderfast.nn.COMBINATORS`. A layer with "none" has no denoising cost and, unless it is the top
            one, the decoder stops above it: "none" for all but the top is the Γ-model, for all the plain
            baseline. The parts of the decoder that are not needed do not exist.
        noise_std: standard deviation of the Gaussian noise at the layers 0..L (0: the input, in the input's
            own units), one for all or one for each.
        top_gamma: whether the softmax layer has a scale gamma.

    Statistics are those of the batch, with biased variance and eps 1e-10. The labelled and the unlabelled
    half are normalised apart, in both passes, and no gradient is stopped. `model.eval()(x)` uses
    statistics for evaluation instead, which follow the clean pass over labelled batches in training
    mode: a batch's weight is 1/k for the k-th batch, never below 1/10, its variance times n/(n-1). They
    are buffers. `recompute_statistics` replaces them after training by a plain average.

    Under autocast, and in a network moved to a 16-bit type, only the matrix products (and, in the
    latter, the combinators) are computed in 16 bits; statistics, costs and logits are float32.

    Raises:
        TypeError, ValueError: `layers`, `activation`, `combinator` or `noise_std` make no Ladder.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        activation: str = "relu",
        combinator: str | Sequence[str] = "gaussian",
        noise_std: float | Sequence[float] = 0.3,
        top_gamma: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = _check_layers(layers)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        depth = len(self.layers)
        self.activation = activation
        self.noise_std = _check_noise_std(noise_std, depth)
        self.combinator = _check_combinator(combinator, depth)

        encoder = nn.ModuleList()
        for below, width in itertools.pairwise(self.layers):
            top = len(encoder) == depth - 2
            layer = LadderLayer(
                nn.Linear(below, width, bias=False, device=device, dtype=dtype),
                width,
                activation="linear" if top else activation,
                shift=top or activation != "linear",
                scale=top and top_gamma,
                device=device,
                dtype=dtype,
            )
            encoder.append(layer)
        # Entry l of each belongs to layer l: its g, and the V of layer l + 1 that leads down to it.
        combinators, decoder = nn.ModuleList(), nn.ModuleList()
        for index, name in enumerate(self.combinator):
            width = self.layers[index]
            combinators.add_module(str(index), make_combinator(name, width, device=device, dtype=dtype))
            if index < depth - 1:
                v = nn.Linear(self.layers[index + 1], width, bias=False, device=device, dtype=dtype)
                decoder.add_module(str(index), None if name == "none" else v)
        # A ModuleList says of its entries no more than that they are modules.
        self.encoder = cast("Sequence[LadderLayer]", encoder)
        self.combinators = cast("Sequence[Any]", combinators)
        self.decoder = cast("Sequence[Any]", decoder)
        self.num_batches_tracked: Tensor
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the published start values: weights randn / sqrt(fan_in), beta 0, gamma 1, combinators' own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, LadderLayer):
                if module.beta is not None:
                    nn.init.zeros_(module.beta)
                if module.gamma is not None:
                    nn.init.ones_(module.gamma)
        for combinator in self.combinators:
            if combinator is not None:
                combinator.reset_parameters()
        self.reset_statistics()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the clean pass over x (N, layers[0]).

        In evaluation mode with the statistics for evaluation, in training mode with the batch's own,
        which then count as those of a labelled batch.

        Raises:
            TypeError, ValueError: x is no floating-point tensor of that shape, or empty in training mode.
        """
        _check_input("x", x, self.layers[0], at_least=int(self.training))
        if self.training:
            logits, statistics = self._clean_pass(x)
            self._update_statistics(statistics, len(x))
            return logits
        h = x
        for layer in self.encoder:
            (z_pre,) = layer.project(h)
            h = layer.activate(layer.normalise_for_evaluation(z_pre))
        return h

    def training_pass(
        self, x_labelled: Tensor, x_unlabelled: Tensor, *, costs: Sequence[bool] | None = None
    ) -> LadderOutput:
        """Both encoder passes and the decoder; in training mode the statistics for evaluation follow.

            cost_l = mean over batch and units of (z_l - (z_hat_l - mean_l) / sqrt(var_l + eps))^2

        of the unlabelled half, with z_l, mean_l and var_l from its clean pass; z_hat_0 is compared with
        the input as it is.

        Args:
            x_labelled: (N_l, layers[0]). A single sample is normalised to 0, as it has no variance, and
                leaves the statistics for evaluation as they are.
            x_unlabelled: (N_u, layers[0]), N_u >= 2; unused, and of any length, where no cost is computed.
            costs: for each layer 0..L whether its cost is wanted; by default wherever there is a
                combinator. What only the costs not wanted would need is not computed.

        Raises:
            TypeError, ValueError: an input of the wrong kind or shape, or a cost where no combinator is.
        """
        wanted = self._check_costs(costs)
        _check_input("x_labelled", x_labelled, self.layers[0], at_least=1)
        _check_input("x_unlabelled", x_unlabelled, self.layers[0], at_least=2 if wanted else 0)

        # Apart from the other rows: nothing flows back through it unless the caller uses its logits.
        clean_logits, statistics = self._clean_pass(x_labelled)
        if self.training:
            self._update_statistics(statistics, len(x_labelled))

        denoising: list[Tensor | None] = [None] * len(self.layers)
        if wanted:
            (logits, logits_u), laterals, targets = self._corrupted_pass(
                x_labelled, x_unlabelled, clean=x_unlabelled, clean_layers=max(wanted)
            )
            z_hat = self._decode(logits_u, laterals, lowest=min(wanted))
            for index in wanted:
                denoising[index] = _denoising_cost(targets[index], z_hat[index], normalised=index > 0)
        else:
            (logits,), _, _ = self._corrupted_pass(x_labelled)
        return LadderOutput(logits, clean_logits, tuple(denoising))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, layers[0]), N >= 2, corrupted, and its reconstruction z_hat_0 from that, for pictures.

        With the batch's own statistics; those for evaluation stay as they are.

        Raises:
            TypeError, ValueError: x is no floating-point tensor of that shape, or layer 0 has no combinator.
        """
        _check_input("x", x, self.layers[0], at_least=2)
        if self.combinators[0] is None:
            raise ValueError('reconstruct needs a combinator at layer 0, whose combinator is "none"')
        (logits,), laterals, _ = self._corrupted_pass(x)
        return laterals[0], self._decode(logits, laterals, lowest=0)[0]

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget the statistics for evaluation: mean 0, variance 1, no batch seen."""
        for layer in self.encoder:
            layer.running_mean.zero_()
            layer.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    @torch.no_grad()
    def recompute_statistics(self, batches: Iterable[Tensor]) -> None:
        """Make the statistics for evaluation the plain average of those of `batches`.

        Args:
            batches: labelled inputs (N, layers[0]), usually one pass over all of them. A batch of one
                sample has no variance and is left out.

        Raises:
            TypeError, ValueError: a batch of the wrong kind or shape, or none with two samples or more;
                the statistics are then unchanged.
        """
        collected = []
        for batch in batches:
            _check_input("batches", batch, self.layers[0], at_least=1)
            if len(batch) > 1:
                collected.append(self._clean_pass(batch)[1])
        if not collected:
            raise ValueError("batches must hold a batch of at least two samples, got none")
        for layer, statistics in zip(self.encoder, zip(*collected, strict=True), strict=True):
            layer.running_mean.copy_(torch.stack([mean for mean, _ in statistics]).mean(0))
            layer.running_var.copy_(torch.stack([var for _, var in statistics]).mean(0))

    def extra_repr(self) -> str:
        return f"layers={self.layers}, noise_std={self.noise_std}"

    def _clean_pass(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits, and each layer's mean and unbiased variance."""
        h, statistics = x, []
        for layer in self.encoder:
            (z_pre,) = layer.project(h)
            mean, var = _moments(z_pre.detach())
            statistics.append((mean, var * (len(x) / max(len(x) - 1, 1))))
            h = layer.activate(_normalise(z_pre))
        return h, statistics

    def _corrupted_pass(
        self, *halves: Tensor, clean: Tensor | None = None, clean_layers: int = 0
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The corrupted pass over `halves` and beside it the clean one over `clean`, up to `clean_layers`.

        Returns each half's logits, the last half's lateral values z~_0 .. z~_L, and of the clean pass x and
        z_pre_1 .. : the targets before their normalisation.
        """
        h = [_add_noise(x, self.noise_std[0]) for x in halves]
        laterals, targets = [h[-1]], [] if clean is None else [clean]
        for index, layer in enumerate(self.encoder, 1):
            if index > clean_layers:
                clean = None
            z_pre = layer.project(*h) if clean is None else layer.project(*h, clean)
            z = [_add_noise(_normalise(part), self.noise_std[index]) for part in z_pre[: len(h)]]
            h = [layer.activate(half) for half in z]
            laterals.append(z[-1])
            if clean is not None:
                targets.append(z_pre[-1])
                clean = layer.activate(_normalise(z_pre[-1]))
        return h, laterals, targets

    def _decode(self, logits: Tensor, laterals: Sequence[Tensor], *, lowest: int) -> list[Tensor]:
        """z_hat_l for l = lowest .. L, at their own indices."""
        u = _normalise(torch.softmax(logits, 1))
        z_hat = list(laterals)
        for index in range(len(self.layers) - 1, lowest - 1, -1):
            if index < len(self.layers) - 1:
                u = _normalise(_project(self.decoder[index], z_hat[index + 1]))
            combinator = self.combinators[index]
            dtype = next(combinator.parameters()).dtype
            z_hat[index] = _wide(combinator(laterals[index].to(dtype), u.to(dtype)))
        return z_hat

    @torch.no_grad()
    def _update_statistics(self, statistics: Sequence[tuple[Tensor, Tensor]], samples: int) -> None:
        if samples < 2:
            return
        self.num_batches_tracked += 1
        # A tensor, so that neither a GPU is waited for nor a captured graph keeps one step's value.
        count = self.num_batches_tracked.clamp(max=MAX_COUNT)
        for layer, (mean, var) in zip(self.encoder, statistics, strict=True):
            weight = count.to(mean.dtype).reciprocal()
            for running, new in ((layer.running_mean, mean), (layer.running_var, var)):
                running.copy_(torch.lerp(running.to(new.dtype), new, weight))

    def _check_costs(self, costs: Sequence[bool] | None) -> list[int]:
        """The layers whose cost is wanted, the lowest first."""
        has = [combinator is not None for combinator in self.combinators]
        if costs is None:
            costs = has
        if len(costs) != len(has):
            raise ValueError(f"costs must have {len(has)} entries, one a layer 0..L, got {len(costs)}")
        wanted = [index for index, cost in enumerate(costs) if cost]
        for index in wanted:
            if not has[index]:
                raise ValueError(f'costs[{index}] asks for the cost of a layer whose combinator is "none"')
        return wanted


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _project(linear: nn.Linear, h: Tensor) -> Tensor:
    """The matrix product in the weight's type (or autocast's), widened for the statistics that follow."""
    return _wide(linear(h.to(linear.weight.dtype)))


def _normalise(z: Tensor) -> Tensor:
    """(z - mean) / sqrt(var + eps) with the statistics of these rows; one row gives 0."""
    if len(z) == 1:
        return z - z
    return F.batch_norm(z, None, None, training=True, eps=EPS)


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the rows; in two passes, which costs half of `torch.var` on a CPU."""
    mean = z.mean(0)
    return mean, (z - mean).square().mean(0)


def _add_noise(z: Tensor, std: float) -> Tensor:
    """z plus noise of its own for every sample and unit, from torch's global generator of the device."""
    return torch.add(z, torch.randn_like(z), alpha=std) if std else z


def _denoising_cost(target: Tensor, z_hat: Tensor, *, normalised: bool) -> Tensor:
    """Mean of (z - (z_hat - mean) / s)^2, where z = (target - mean) / s: the mean cancels."""
    if not normalised:
        return F.mse_loss(z_hat, _wide(target))
    error = (target - z_hat).square().mean(0)
    return (error / (_moments(target)[1] + EPS)).mean()


def _check_input(name: str, x: Tensor, width: int, *, at_least: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{name} must have shape (N, {width}), got {tuple(x.shape)}")
    if len(x) < at_least:
        raise ValueError(f"{name} must hold at least {at_least} sample{'s'[: at_least > 1]}, got {len(x)}")


def _check_layers(layers: Sequence[int]) -> tuple[int, ...]:
    if isinstance(layers, str) or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        raise TypeError(f"layers must be a sequence of integers, got {layers!r}")
    if len(layers) < 2 or min(layers) < 1:
        raise ValueError(f"layers must have at least two widths, each at least 1, got {list(layers)}")
    return tuple(layers)


def _check_noise_std(noise_std: float | Sequence[float], depth: int) -> tuple[float, ...]:
    stds = [noise_std] * depth if isinstance(noise_std, (int, float)) else list(noise_std)
    if len(stds) != depth:
        raise ValueError(f"noise_std must be a number or {depth} of them, one a layer 0..L, got {len(stds)}")
    if not all(isinstance(std, (int, float)) for std in stds):
        raise TypeError(f"noise_std must hold numbers, got {noise_std!r}")
    if not all(math.isfinite(std) and std >= 0 for std in stds):
        raise ValueError(f"noise_std must be finite and not negative, got {noise_std!r}")
    return tuple(float(std) for std in stds)


def _check_combinator(combinator: str | Sequence[str], depth: int) -> tuple[str, ...]:
    names = [combinator] * depth if isinstance(combinator, str) else list(combinator)
    if len(names) != depth:
        raise ValueError(f"combinator must be a name or {depth} of them, one a layer 0..L, got {len(names)}")
    for below, above in itertools.pairwise(names):
        if below != "none" and above == "none":
            raise ValueError(f'combinator must not have "none" above a layer that is decoded, got {names}')
    return tuple(names)

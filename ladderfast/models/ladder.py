"""The Ladder network, dense and convolutional (Rasmus et al. 2015, Algorithm 1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ladderfast.models.layers import Convolution, Dense, downward, parse_layers, upward
from ladderfast.nn.combinator import make_combinator
from ladderfast.nn.ladder_decoder import decode
from ladderfast.nn.ladder_encoder import LadderEncoderLayer, follow, running_statistics, unbiased
from ladderfast.nn.noise import draw_seed, normal_like, take_noise

# Layer l's noise has the stream l in training and this much more in pictures, which then leave training as it is.
PICTURES = 1 << 62

# By the papers' names, the op's.
ACTIVATIONS = {"relu": "relu", "leaky_relu": "leaky_relu", "linear": "identity"}


class LadderOutput(NamedTuple):
    """What `LadderNetwork.training_pass` returns."""

    logits: Tensor
    """(N_l, classes) of the corrupted pass, labelled half, before the softmax: gamma (z~ + beta)."""
    clean_logits: Tensor
    """(N_l, classes) of the clean pass, labelled half."""
    denoising: tuple[Tensor | None, ...]
    """The unweighted denoising cost of each layer, 0 first, 0-dim; None where it was not computed."""


class LadderNetwork(nn.Module):
    """Ladder network: clean and corrupted encoder with shared weights, and a decoder.

    `model(x)` classifies. For a training step, `training_pass` returns the corrupted logits, for the
    cross-entropy, and the denoising costs, to be weighted with the recipe's lambdas and added.

    Args:
        layers: the layers 0..L, the input first and the classes last. The input is a width or
            "CHANNELSxHEIGHTxWIDTH"; a layer is a width (dense), "conv CHANNELS HEIGHTxWIDTH" with "valid" (the
            default), "full" or "same" behind it for the border, "maxpool HEIGHTxWIDTH" (windows side by side,
            those at the edge cut off there) or "meanpool" (the mean of each map): ["1x28x28", "conv 32 5x5 full",
            "maxpool 2x2", "conv 10 1x1", "meanpool", 10].
        activation: of the layers 1..L-1 that do not pool: "relu", "leaky_relu" (slope 0.1) or "linear" (these have
            no beta). Layer L has a softmax, also where it pools. Poolings are linear, and are normalised and get
            noise as other layers do.
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
    mode: a batch's weight is 1/k for the k-th batch, never below 1/10, its variance times n/(n-1), n the number of
    values averaged. They are buffers. `recompute_statistics` replaces them after training by a plain average.

    Of maps, statistics, beta, gamma and combinators are by channel, and costs are means over positions as well. The
    decoder mirrors the encoder: a full convolution undoes a valid one and a valid one a full one, max pooling is undone
    by copying to every position of the window, mean pooling by copying to every position.

    The noise is that of the buffer `noise_state`, (2,) seed and offset, drawn at the start from torch's global
    generator. Each training pass takes offsets of its own, also in evaluation mode.

    Under autocast, and in a network moved to a 16-bit type, matrix products and convolutions are computed in 16 bits,
    and lateral values kept in them (not in float16 on a CPU); everything else is computed in float32, and statistics,
    costs and logits are float32.

    Raises:
        TypeError, ValueError: `layers`, `activation`, `combinator` or `noise_std` make no Ladder.
    """

    def __init__(
        self,
        layers: Sequence[int | str],
        *,
        activation: str = "relu",
        combinator: str | Sequence[str] = "gaussian",
        noise_std: float | Sequence[float] = 0.3,
        top_gamma: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parsed = parse_layers(layers)
        self.layers = tuple(layers)
        self.shapes = tuple(layer.shape for layer in parsed)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        depth = len(parsed)
        self.activation = activation
        self.noise_std = _check_noise_std(noise_std, depth)
        self.combinator = _check_combinator(combinator, depth)

        encoder = nn.ModuleList()
        for index, (below, layer) in enumerate(itertools.pairwise(parsed), 1):
            top = index == depth - 1
            linear = top or layer.pooling or activation == "linear"
            encoder.append(
                LadderEncoderLayer(
                    upward(below, layer, device=device, dtype=dtype),
                    layer.num_features,
                    activation=ACTIVATIONS["linear" if linear else activation],
                    noise_std=self.noise_std[index],
                    shift=top or not linear,
                    scale=top and top_gamma,
                    wide=top,
                    device=device,
                    dtype=dtype,
                )
            )
        # Entry l of each belongs to layer l: its g, and the V of layer l + 1 that leads down to it.
        combinators, decoder = nn.ModuleList(), nn.ModuleList()
        for index, (name, layer) in enumerate(zip(self.combinator, parsed, strict=True)):
            g = make_combinator(name, layer.num_features, device=device, dtype=dtype)
            combinators.add_module(str(index), g)
            if index < depth - 1:
                v = None if g is None else downward(parsed[index + 1], layer, device=device, dtype=dtype)
                decoder.add_module(str(index), v)
        # A ModuleList says of its entries no more than that they are modules.
        self.encoder = cast("Sequence[LadderEncoderLayer]", encoder)
        self.combinators = cast("Sequence[Any]", combinators)
        self.decoder = cast("Sequence[Any]", decoder)
        self.num_batches_tracked: Tensor
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.noise_state: Tensor
        self.register_buffer("noise_state", torch.zeros(2, dtype=torch.long, device=device))
        # Processes that train together draw noise of their own: DistributedDataParallel leaves this buffer alone.
        self._ddp_params_and_buffers_to_ignore = ["noise_state"]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the published start values: weights randn / sqrt(fan_in), beta 0, gamma 1, combinators' own.

        The noise starts anew as well, from a seed drawn, as the weights are, from torch's global generator.
        """
        for module in self.modules():
            if isinstance(module, (Dense, Convolution, LadderEncoderLayer)):
                module.reset_parameters()
        for combinator in self.combinators:
            if combinator is not None:
                combinator.reset_parameters()
        self.num_batches_tracked.zero_()
        draw_seed(self.noise_state)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the clean pass over x (N, *), flattened or not.

        In evaluation mode with the statistics for evaluation, in training mode with the batch's own,
        which then count as those of a labelled batch.

        Raises:
            TypeError, ValueError: x is no floating-point tensor of that shape, or empty in training mode.
        """
        x = _check_input("x", x, self.shapes[0], at_least=int(self.training))
        if self.training:
            logits, statistics = self._clean_pass(x)
            self._follow(statistics, len(x))
            return logits
        h = x
        for layer in self.encoder:
            h = layer.evaluate(h)
        return h

    def training_pass(
        self,
        x_labelled: Tensor,
        x_unlabelled: Tensor,
        *,
        costs: Sequence[bool] | None = None,
        clean_gradients: bool = True,
        extra_noise: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> LadderOutput:
        """Both encoder passes and the decoder; in training mode the statistics for evaluation follow.

            cost_l = mean over batch and units of (z_l - (z_hat_l - mean_l) / sqrt(var_l + eps))^2

        of the unlabelled half, with z_l, mean_l and var_l from its clean pass; z_hat_0 is compared with
        the input as it is.

        Args:
            x_labelled: (N_l, *), flattened or not. A single sample is normalised to 0, as it has no variance, and
                leaves the statistics for evaluation as they are.
            x_unlabelled: (N_u, *), N_u >= 2; unused, and of any length, where no cost is computed.
            costs: for each layer 0..L whether its cost is wanted; by default wherever there is a
                combinator. What only the costs not wanted would need is not computed.
            clean_gradients: whether clean_logits can be differentiated. Without, less is kept for backward.
            extra_noise: for the labelled and the unlabelled samples, in their shape, what the corrupted pass adds to
                its input beside the Gaussian noise; the clean passes and the target of layer 0 stay without.

        Raises:
            TypeError, ValueError: an input of the wrong kind or shape, or a cost where no combinator is.
        """
        wanted = self._check_costs(costs)
        x_labelled = _check_input("x_labelled", x_labelled, self.shapes[0], at_least=1)
        x_unlabelled = _check_input("x_unlabelled", x_unlabelled, self.shapes[0], at_least=2 if wanted else 0)

        extra_noise = self._check_extra_noise(extra_noise, (len(x_labelled), len(x_unlabelled)))

        # Apart from the other rows: nothing flows back through it unless the caller uses its logits.
        with torch.set_grad_enabled(clean_gradients and torch.is_grad_enabled()):
            clean_logits, statistics = self._clean_pass(x_labelled)
        if self.training:
            self._follow(statistics, len(x_labelled))

        state = take_noise(self.noise_state, len(self.layers))
        denoising: list[Tensor | None] = [None] * len(self.layers)
        if not wanted:
            (logits,), _, _ = self._encode([x_labelled], len(self.layers), state, extra=extra_noise[:1])
            return LadderOutput(logits, clean_logits, tuple(denoising))
        lowest, highest = min(wanted), max(wanted)
        (logits, logits_u), laterals, targets = self._encode(
            [x_labelled, x_unlabelled], lowest, state, clean_layers=highest, extra=extra_noise
        )
        targets = [target if index in wanted else () for index, target in enumerate(targets)]
        for index, _, cost in self._decode(logits_u, laterals, targets, lowest):
            denoising[index] = cost
        return LadderOutput(logits, clean_logits, tuple(denoising))

    def clean_logits(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the clean pass over x (N, *) with the batch's own statistics, in either mode.

        The statistics for evaluation and the noise stay as they are.

        Raises TypeError and ValueError as the call does.
        """
        return self._clean_pass(_check_input("x", x, self.shapes[0], at_least=1))[0]

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, *), N >= 2, corrupted, and its reconstruction z_hat_0 from that, for pictures.

        With the batch's own statistics; those for evaluation stay as they are, and so does `noise_state`: the noise is
        the same until the next training pass, and none that training has.

        Raises:
            TypeError, ValueError: x is no floating-point tensor of that shape, or layer 0 has no combinator.
        """
        rows = _check_input("x", x, self.shapes[0], at_least=2)
        if self.combinators[0] is None:
            raise ValueError('reconstruct needs a combinator at layer 0, whose combinator is "none"')
        (logits,), laterals, _ = self._encode([rows], 0, self.noise_state, PICTURES)
        *_, (_, z_hat, _) = self._decode(logits, laterals, [()] * len(self.layers), 0)
        return laterals[0].reshape(x.shape), z_hat.reshape(x.shape)

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget the statistics for evaluation: mean 0, variance 1, no batch seen."""
        for layer in self.encoder:
            layer.reset_statistics()
        self.num_batches_tracked.zero_()

    @torch.no_grad()
    def recompute_statistics(self, batches: Iterable[Tensor]) -> None:
        """Make the statistics for evaluation the plain average of those of `batches`.

        Args:
            batches: labelled inputs (N, *), usually one pass over all of them. A batch of one
                sample has no variance and is left out.

        Raises:
            TypeError, ValueError: a batch of the wrong kind or shape, or none with two samples or more;
                the statistics are then unchanged.
        """
        collected = []
        for batch in batches:
            batch = _check_input("batches", batch, self.shapes[0], at_least=1)
            if len(batch) > 1:
                collected.append(self._clean_pass(batch)[1])
        if not collected:
            raise ValueError("batches must hold a batch of at least two samples, got none")
        means = [torch.stack(values).mean(0) for values in zip(*collected, strict=True)]
        torch._foreach_copy_(running_statistics(self.encoder), means)

    def extra_repr(self) -> str:
        return f"layers={self.layers}, noise_std={self.noise_std}"

    def _clean_pass(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the layers' means and then their unbiased variances, detached."""
        h, means, variances, counts = x, [], [], []
        for layer in self.encoder:
            _, h, mean, var = layer(h, want_z=False)
            means.append(mean[0].detach())
            variances.append(var[0].detach())
            counts.append(h.numel() // h.shape[1])
        return h, [*means, *unbiased(variances, counts)]

    def _encode(
        self,
        halves: list[Tensor],
        lowest: int,
        state: Tensor,
        stream: int = 0,
        *,
        clean_layers: int = -1,
        extra: Sequence[Tensor | None] = (),
    ) -> tuple[tuple[Tensor, ...], list[Any], list[Any]]:
        """The corrupted pass over one or both halves, and beside it the clean pass over the last of them.

        Every layer has one linear map for the rows of all three, in this order. Lateral values and targets are of
        the layers from `lowest` on, and the clean pass goes up to layer `clean_layers`. The noise of layer l is that of
        `state` and `stream` + l.

        Returns the logits of each half; the last half's lateral values z~_l; and its clean pass's targets, (x,) of
        layer 0 and (z_l, mean_l, var_l) of the others.
        """
        depth = len(self.layers)
        laterals: list[Any] = [None] * depth
        targets: list[Any] = [()] * depth
        labelled = len(halves[0])
        noisy = sum(map(len, halves))
        sizes = [len(half) for half in halves]
        clean = len(halves[-1]) if clean_layers > 0 else 0
        h = torch.cat([*halves, halves[-1]] if clean else halves)
        _add_noise(h[:noisy], self.noise_std[0], state, stream)
        for first, size, noise in zip((0, labelled), sizes, extra, strict=False):
            if noise is not None:
                h[first : first + size].add_(noise)
        if lowest == 0:
            # The clean pass's copy of its input, so that the caller's own need not be kept.
            laterals[0], targets[0] = h[noisy - sizes[-1] : noisy], (h[noisy:] if clean else halves[-1],)
        for index, layer in enumerate(self.encoder, 1):
            if clean and index > clean_layers:
                h, clean = h[:noisy], 0
            z, h, mean, var = layer(
                h, labelled, num_clean=clean, noise_state=state, noise_stream=stream + index
            )
            if index >= lowest:
                # One split for both: backward makes one gradient of z out of its parts, in one pass.
                parts = z.split([*sizes, clean] if clean else sizes)
                laterals[index] = parts[len(halves) - 1]
                if clean:
                    targets[index] = (parts[-1], mean[2], var[2])
        return h[:noisy].split(sizes), laterals, targets

    def _decode(
        self, logits: Tensor, laterals: list[Any], targets: list[Any], lowest: int
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Layer, z_hat and cost from the top to `lowest`; a cost where the layer has a target."""
        x = torch.softmax(logits, 1)
        for index in range(len(self.layers) - 1, lowest - 1, -1):
            linear = self.decoder[index] if index < len(self.layers) - 1 else None
            x, cost = decode(self.combinators[index], linear, x, laterals[index], *targets[index])
            yield index, x, cost

    def _follow(self, statistics: list[Tensor], samples: int) -> None:
        if samples > 1:  # a single one has no variance
            follow(self.encoder, statistics, self.num_batches_tracked)

    def _check_extra_noise(self, extra: Any, rows: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        if not isinstance(extra, (tuple, list)) or len(extra) != 2:
            raise TypeError(f"extra_noise must be a pair of tensors or None, got {extra!r}")
        checked: list[Tensor | None] = [None, None]
        for index, noise in enumerate(extra):
            if noise is None:
                continue
            name = f"extra_noise[{index}]"
            checked[index] = _check_input(name, noise, self.shapes[0], at_least=0)
            if len(noise) != rows[index]:
                raise ValueError(
                    f"{name} must hold {rows[index]} samples, as the input does, got {len(noise)}"
                )
        return checked[0], checked[1]

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


def _add_noise(x: Tensor, std: float, state: Tensor, stream: int) -> None:
    """Add noise of its own to every element of x, in place."""
    if std and len(x):
        x.add_(normal_like(x, std, state, stream))


def _check_input(name: str, x: Tensor, shape: tuple[int, ...], *, at_least: int) -> Tensor:
    """x as (N, *shape); a map may come flattened."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    flat = math.prod(shape)
    if x.dim() < 2 or (x.shape[1:] != shape and x.shape[1:] != (flat,)):
        shapes = f"(N, {', '.join(map(str, shape))})" + (f" or (N, {flat})" if len(shape) > 1 else "")
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(x.shape)}")
    if len(x) < at_least:
        raise ValueError(f"{name} must hold at least {at_least} sample{'s'[: at_least > 1]}, got {len(x)}")
    return x if x.dim() == len(shape) + 1 else x.unflatten(1, shape)


def _check_noise_std(noise_std: float | Sequence[float], depth: int) -> tuple[float, ...]:
    if not isinstance(noise_std, (int, float)) and (
        isinstance(noise_std, str) or not isinstance(noise_std, Sequence)
    ):
        raise TypeError(f"noise_std must be a number or a sequence of them, got {noise_std!r}")
    stds = [noise_std] * depth if isinstance(noise_std, (int, float)) else list(noise_std)
    if len(stds) != depth:
        raise ValueError(f"noise_std must be a number or {depth} of them, one a layer 0..L, got {len(stds)}")
    if not all(isinstance(std, (int, float)) and not isinstance(std, bool) for std in stds):
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

"""Tagger: perceptual grouping by iterated inference in several groups (Greff et al. 2016)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderfast.checks import check_number, check_whole
from ladderfast.models.checks import check_floating, check_input, check_like, check_num_classes
from ladderfast.models.layers import Dense
from ladderfast.nn import GaussianCombinator
from ladderfast.nn.ladder_decoder import LadderDecoderLayer
from ladderfast.nn.ladder_encoder import LadderEncoderLayer
from ladderfast.ops import (
    bernoulli_step_inputs,
    bernoulli_step_outputs,
    gaussian_step_inputs,
    gaussian_step_outputs,
)
from ladderfast.ops.function import plain

EPS = 1e-10  # beneath the square root of every normalisation, as in the Ladder

# The published code's form where it is not the paper's: Tagger(400, [500, 250], **PUBLISHED_BINARY).
PUBLISHED_BINARY: dict[str, Any] = {"scale_residual": True, "feed_logits": True}
PUBLISHED_CONTINUOUS: dict[str, Any] = {
    "density_in_residual": False,
    "square_variance": True,
    "variance_start": math.exp(math.asinh(1.0)),
    "variance_map": "exp_asinh",
}
# What means something to binary, or to continuous inputs alone, and its value where nothing is said.
_BINARY_ONLY = {"scale_residual": False, "feed_logits": False}
_CONTINUOUS_ONLY = {
    "variance_start": 1.0,
    "variance_map": "exp",
    "density_in_residual": True,
    "square_variance": False,
}


class TaggerOutput(NamedTuple):
    """What a `Tagger` returns. Entry or row t belongs to iteration t + 1."""

    z: tuple[Tensor, ...]
    """Reconstructions of the groups, (N, K, D) each; in the binary case probabilities of a one."""
    m: tuple[Tensor, ...]
    """Masks of the groups, (N, K, D) each, which sum to 1 over K."""
    cost: Tensor
    """(T, N): -log of the mixture's likelihood of the clean input, in nats, summed over pixels."""
    log_classes: Tensor | None
    """(T, N, classes): log of the classes' share, `class_shares`; None without classes."""


class LadderMapping(nn.Module):
    """A dense Ladder network as a map from its input to its reconstruction of it, (N, H) -> (N, H).

    Without noise and denoising costs, with a softmax on top, and without normalising its reconstruction. Statistics
    are those of the batch in either mode.

    Args:
        widths: of the layers 0..L; H is the first.
        squash_v: whether v of the Gaussian combinators goes through a sigmoid, as for continuous inputs.

    At first g(z, u) = z / 2 with and without the sigmoid: a10 starts at 1/2 without it, not at 0 as in a Ladder. A
    reconstruction that is 0 everywhere would meet a normalisation that divides by sqrt(eps), and Adam would remember
    the size of those gradients for thousands of steps.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, appendix A.6.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        squash_v: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(
                "layers must hold H and at least one width of the Ladder, or [H] with an inner network, "
                f"got {list(widths)}"
            )
        self.widths, self.squash_v = tuple(widths), squash_v
        combinator = "gaussian_squashed" if squash_v else "gaussian"
        top = len(widths) - 1
        encoder, decoder = nn.ModuleList(), nn.ModuleList()
        for layer, (below, width) in enumerate(itertools.pairwise(widths), 1):
            encoder.append(
                LadderEncoderLayer(
                    Dense((below,), (width,), device=device, dtype=dtype),
                    width,
                    activation="identity" if layer == top else "relu",
                    scale=layer == top,
                    wide=layer == top,
                    device=device,
                    dtype=dtype,
                )
            )
        for layer, width in enumerate(widths):
            above = None
            if layer < top:
                above = Dense((widths[layer + 1],), (width,), device=device, dtype=dtype)
            decoder.append(
                LadderDecoderLayer(above, width, combinator=combinator, device=device, dtype=dtype)
            )
        self.encoder = cast("Sequence[LadderEncoderLayer]", encoder)
        self.decoder = cast("Sequence[LadderDecoderLayer]", decoder)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the start values: a Ladder's, and a10 as said."""
        for module in self.modules():
            if isinstance(module, (Dense, LadderEncoderLayer, LadderDecoderLayer)):
                module.reset_parameters()
            if isinstance(module, GaussianCombinator) and not self.squash_v:
                module.weight[9] = 0.5

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction (N, H) of h (N, H), and the logits (N, widths[-1]) of the top."""
        laterals = [h]
        for layer in self.encoder:
            z, h, _, _ = layer(h)
            laterals.append(z)
        logits = h
        h = torch.softmax(logits, 1)
        for decode, z in zip(reversed(self.decoder), reversed(laterals), strict=True):
            h = decode(h, z).z_hat
        return h, logits


class Grouping(nn.Module):
    """What a `Tagger` and an `RTagger` share: corruption, what groups are told, the cost, and the iterations.

    A subclass has `num_pixels` and `num_classes`, and an `_iterate`; `batch_statistics` says whether it normalises with
    the statistics of the batch at hand in evaluation too.
    """

    num_pixels: int
    num_classes: int
    batch_statistics: bool

    def __init__(
        self,
        *,
        binary: bool,
        noise: float,
        input_mean: float,
        variance_start: float,
        variance_map: str,
        density_in_residual: bool,
        square_variance: bool,
        scale_residual: bool,
        feed_logits: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        given = {
            "variance_start": variance_start,
            "variance_map": variance_map,
            "density_in_residual": density_in_residual,
            "square_variance": square_variance,
            "scale_residual": scale_residual,
            "feed_logits": feed_logits,
        }
        inputs, other = ("binary", _CONTINUOUS_ONLY) if binary else ("continuous", _BINARY_ONLY)
        for name, default in other.items():
            if given[name] != default:
                raise ValueError(
                    f"{name} means nothing to {inputs} inputs (binary={binary}), got {given[name]!r}"
                )
        numbers = {"noise": noise, "input_mean": input_mean, "variance_start": variance_start}
        for name, number in numbers.items():
            check_number(name, number)
        if not math.isfinite(input_mean):
            raise ValueError(f"input_mean must be finite, got {input_mean}")
        if not 0 <= noise < math.inf or (binary and noise > 0.5):
            wanted = "from 0 to 0.5" if binary else "finite and not negative"
            raise ValueError(f"noise must be {wanted}, got {noise}")
        if not 0 < variance_start < math.inf:
            raise ValueError(f"variance_start must be positive and finite, got {variance_start}")
        if variance_map not in ("exp", "exp_asinh"):
            raise ValueError(f"variance_map must be exp or exp_asinh, got {variance_map!r}")
        self.binary, self.noise, self.input_mean = binary, noise, input_mean
        self.variance_start, self.variance_map = variance_start, variance_map
        self.density_in_residual, self.square_variance = density_in_residual, square_variance
        self.scale_residual, self.feed_logits = scale_residual, feed_logits
        start = math.log(variance_start)
        start = math.sinh(start) if variance_map == "exp_asinh" else start
        self.log_variance = (
            None if binary else nn.Parameter(torch.full((), start, device=device, dtype=dtype))
        )

    @property
    def variance(self) -> Tensor:
        """The learned variance v of the continuous case, 0-dim."""
        if self.log_variance is None:
            raise TypeError("a binary Tagger has no variance")
        w = self.log_variance.float() if self.log_variance.dtype.itemsize < 4 else self.log_variance
        return torch.exp(torch.asinh(w) if self.variance_map == "exp_asinh" else w)

    def corrupt(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """x with bit flips of probability `noise`, or Gaussian noise of that standard deviation."""
        if self.binary:
            flips = torch.rand(x.shape, generator=generator, device=x.device) < self.noise
            return torch.where(flips, 1 - x, x)
        return x + self.noise * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    def forward(
        self,
        x: Tensor,
        num_groups: int,
        num_iterations: int,
        *,
        corrupted: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TaggerOutput:
        """T iterations with K groups.

        Args:
            x: (N, D) the clean inputs; or (N, at least T + 1, D) sequences: iteration t then sees frame t, and is asked
                for frame t + 1.
            num_groups: K.
            num_iterations: T.
            corrupted: what the network sees, in the shape of x; by default `corrupt(x)`.
            mask: (N, K, D) the first masks, which sum to 1 over K; drawn by default.
            generator: what is drawn comes from it; by default from torch's global generator.

        Raises TypeError or ValueError for inputs of the wrong kind or shape.
        """
        sequences = isinstance(x, Tensor) and x.dim() == 3
        _check("x", x, (None, None, self.num_pixels) if sequences else (None, self.num_pixels))
        check_input("x", x, self, half=True)
        # On a GPU a look would wait for it.
        if self.binary and x.device.type == "cpu" and plain() and not bool(((x == 0) | (x == 1)).all()):
            raise ValueError("x must hold zeros and ones only for binary=True, got other values")
        for name, number in (("num_groups", num_groups), ("num_iterations", num_iterations)):
            check_whole(name, number)
        if num_groups < 1 or num_iterations < 1:
            raise ValueError(
                f"num_groups and num_iterations must be at least 1, got {num_groups} and {num_iterations}"
            )
        if sequences and x.shape[1] <= num_iterations:
            raise ValueError(
                f"x must hold at least {num_iterations + 1} frames for {num_iterations} iterations, got {x.shape[1]}"
            )
        if len(x) == 0:
            raise ValueError("x must hold at least one sample, got 0")
        if len(x) * num_groups < 2 and (self.training or self.batch_statistics):
            raise ValueError(
                f"x must hold at least two samples for a single group, as there is no variance in one, got {len(x)}"
            )
        shape = (len(x), num_groups, self.num_pixels)
        if corrupted is None:
            corrupted = self.corrupt(x, generator=generator)
        _check("corrupted", corrupted, tuple(x.shape))
        check_like("corrupted", corrupted, x)
        if mask is None:
            mask_logits = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        else:
            _check("mask", mask, shape)
            check_like("mask", mask, x)
            mask_logits = mask.clamp(min=torch.finfo(mask.dtype).tiny).log()
        z = torch.full(shape, self.input_mean, device=x.device, dtype=x.dtype)
        unsquashed: Tensor | None = None
        state: Any = None
        zs, masks, costs, classes = [], [], [], []
        for t in range(num_iterations):
            shown, wanted = (corrupted[:, t], x[:, t + 1]) if sequences else (corrupted, x)
            told = self._told(shown, z, mask_logits, unsquashed)
            pre, logits, state = self._iterate(told, state)
            pre = pre.to(x.dtype).unflatten(0, shape[:2])
            z, mask_logits, nll = self._outputs(wanted, pre)
            if self.feed_logits and self.binary:
                unsquashed = self._unsquashed(pre)
            if self.num_classes:
                classes.append(class_shares(logits.unflatten(0, shape[:2])))
            zs.append(z)
            masks.append(mask_logits.softmax(1))
            costs.append(nll.sum(1))
        log_classes = torch.stack(classes) if classes else None
        return TaggerOutput(tuple(zs), tuple(masks), torch.stack(costs), log_classes)

    def _iterate(self, told: Tensor, state: Any) -> tuple[Tensor, Any, Any]:
        """What z, m, dz and L of the groups, which share the network, lead to: told is (N K, 4 D).

        Returns (N K, 2 D), z and then the masks' logits before normalisation; logits (N K, classes + 1) or None; and
        the state for the next iteration.
        """
        raise NotImplementedError

    def _outputs(self, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z and the masks' logits (N, K, D), and the cost (N, D), of what `_iterate` returns, (N, K, 2 D)."""
        raise NotImplementedError

    def _unsquashed(self, pre: Tensor) -> Tensor:
        """The binary z (N, K, D) before its sigmoid."""
        raise NotImplementedError

    def _told(self, corrupted: Tensor, z: Tensor, mask_logits: Tensor, unsquashed: Tensor | None) -> Tensor:
        """What the network reads, (N K, 4 D): z, or where there is one the unsquashed z; m, dz and L."""
        if self.binary:
            told = bernoulli_step_inputs(corrupted, z, mask_logits, self.noise)
        else:
            v = self.variance
            told = gaussian_step_inputs(
                corrupted, z, mask_logits, (v * v if self.square_variance else v) + self.noise**2
            )
        # What the published code puts in the place of the paper's.
        scaled, residual = self.binary and self.scale_residual, not (self.binary or self.density_in_residual)
        if not scaled and not residual and unsquashed is None:
            return told
        parts = list(told.unflatten(1, (4, self.num_pixels)).unbind(1))
        if unsquashed is not None:
            parts[0] = unsquashed.flatten(0, 1)
        if scaled:
            parts[2] = parts[2] * (1 - 2 * self.noise)
        if residual:
            parts[2] = (corrupted.unsqueeze(1) - z).flatten(0, 1) * parts[1]
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        kind = "binary" if self.binary else "continuous"
        return f"num_pixels={self.num_pixels}, {kind}, noise={self.noise}"


class Tagger(Grouping):
    """Tagger: K groups that share one network explain an input together, over T iterations.

        dz, L = what the corrupted input tells each group          (the ops `gaussian_step_inputs`, `bernoulli_...`)
        h_k   = relu(BN(W_h [z_k, m_k, dz_k, L_k]))
        y_k   = inner(h_k)                                         (below: the ops `gaussian_step_outputs`, ...)
        z_k   = c1 BN(W_z y_k) + b1                                (binary: sigmoid of it)
        m     = softmax over k of c2 BN(W_m y_k)

    The first masks are a softmax over k of N(0, 1), the first z_k `input_mean`. Normalisation is over batch and
    groups together, with the statistics of the batch at hand in either mode, so that what the network answers depends
    on what else is in the batch.

    Args:
        num_pixels: D, the values of an input.
        layers: H, and with the Ladder network inside the widths of its layers 1..L: [2000, 1000, 500].
        inner: a network of your own from (N K, H) to (N K, H) instead of the Ladder; `layers` then is [H]. With
            `num_classes` it returns a pair, the second being logits (N K, num_classes + 1).
        binary: whether inputs are zeros and ones, corrupted by bit flips; otherwise real, corrupted by Gaussian noise.
        noise: probability of a flip (beta), or the noise's standard deviation (sigma).
        input_mean: mean of the data.
        num_classes: classes of the supervised head; 0: none. The top of the Ladder has a unit more, "no class".
        variance_start: continuous only: learned variance v at first, in the square of the input's unit.
        variance_map: continuous only: v as a function of the parameter w: "exp", or "exp_asinh" for exp(asinh(w)) **.
        density_in_residual: continuous only: whether dz_k = (x - z_k) m_k z~_k, as in equation 24; otherwise
            (x - z_k) m_k **.
        square_variance: continuous only: whether z~ has the variance sigma^2 + v^2 ** instead of sigma^2 + v.
        scale_residual: binary only: whether dz is multiplied by 1 - 2 beta **.
        feed_logits: binary only: whether the projection sees z before the sigmoid, from the second iteration on **.

    ** The published code's form; the paper's is the default. `PUBLISHED_BINARY` and `PUBLISHED_CONTINUOUS` have all of
    them.

    The Ladder inside is a `LadderMapping`; for continuous inputs v of its combinators goes through a sigmoid (A.6).

    Raises TypeError or ValueError for arguments that make no Tagger, and for one of the other kind of inputs.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, appendix A, algorithms 2 and 3. (The
    Gaussian mixture in the cost of algorithm 3 is a slip: this is the Bernoulli one.)
    """

    batch_statistics = True

    def __init__(
        self,
        num_pixels: int,
        layers: Sequence[int],
        *,
        inner: nn.Module | None = None,
        binary: bool = True,
        noise: float = 0.2,
        input_mean: float = 0.5,
        num_classes: int = 0,
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
        widths = list(layers)
        if not all(isinstance(size, int) for size in (num_pixels, *widths)):
            raise TypeError(f"num_pixels and layers must be whole numbers, got {num_pixels!r} and {layers!r}")
        if num_pixels < 1 or not widths or min(widths) < 1:
            raise ValueError(f"num_pixels and layers must be positive, got {num_pixels} and {widths}")
        if inner is not None and len(widths) > 1:
            raise ValueError(f"layers must be [H] for an inner network of one's own, got {widths}")
        check_num_classes(num_classes)
        if num_classes and inner is None and widths[-1] != num_classes + 1:
            raise ValueError(
                f"layers must end with num_classes + 1 = {num_classes + 1} units, the last for no class, "
                f"got {widths}"
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_pixels, self.num_classes = num_pixels, num_classes
        self.project = LadderEncoderLayer(
            Dense((4 * num_pixels,), (widths[0],), **kind), widths[0], shift=False, eps=EPS, **kind
        )
        if inner is None:
            inner = LadderMapping(widths, squash_v=not binary, **kind)
        self.inner = inner
        # Rows of z, then rows of m.
        self.read = Dense((widths[0],), (2 * num_pixels,), **kind)
        self.z_scale = nn.Parameter(torch.ones(num_pixels, **kind))
        self.z_shift = nn.Parameter(torch.zeros(num_pixels, **kind))
        self.m_scale = nn.Parameter(torch.ones((), **kind))
        # randn / sqrt(fan_in), as everywhere in a Ladder.
        for module in (self.project.linear, self.read):
            cast("Dense", module).reset_parameters()

    def _iterate(self, told: Tensor, state: Any) -> tuple[Tensor, Any, Any]:
        h = self.project(told, want_z=False).h
        y, logits = self._parted(self.inner(h))
        if y.shape != h.shape:
            raise ValueError(f"inner must return {tuple(h.shape)}, what it is given, got {tuple(y.shape)}")
        if self.num_classes and logits.shape != (len(h), self.num_classes + 1):
            wanted = (len(h), self.num_classes + 1)
            raise ValueError(f"inner must return logits {wanted} for num_classes, got {tuple(logits.shape)}")
        return self.read(y.to(self.read.weight.dtype)), logits, None

    def _parted(self, found: Any) -> tuple[Tensor, Any]:
        """What the inner network returned, as (N K, H) and the classes' logits, which only `num_classes` needs."""
        pair = isinstance(found, tuple) and len(found) == 2
        y, logits = found if pair else (found, None)
        if not isinstance(y, Tensor) or (self.num_classes and not isinstance(logits, Tensor)):
            wanted = "a pair of tensors, (N K, H) and the classes' logits, for num_classes"
            if not self.num_classes:
                wanted = "a tensor (N K, H), or a pair of it and logits"
            got = type(found).__name__
            if isinstance(found, tuple):
                got = f"a tuple of ({', '.join(type(part).__name__ for part in found)})"
            raise TypeError(f"inner must return {wanted}, got {got}")
        return y, logits

    def _outputs(self, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_pre, mask_pre = pre.chunk(2, 2)
        c1, b1, c2 = (t.to(x.dtype) for t in (self.z_scale, self.z_shift, self.m_scale))
        if self.binary:
            return bernoulli_step_outputs(x, z_pre, mask_pre, c1, b1, c2, eps=EPS)
        return gaussian_step_outputs(x, z_pre, mask_pre, c1, b1, c2, self.variance, eps=EPS)

    def _unsquashed(self, pre: Tensor) -> Tensor:
        z = pre[..., : self.num_pixels].flatten(0, 1)
        z = F.batch_norm(z, None, None, self.z_scale, self.z_shift, training=True, eps=EPS)
        return z.unflatten(0, pre.shape[:2])


def _check(name: str, t: Tensor, shape: tuple[int | None, ...]) -> None:
    check_floating(name, t)
    if t.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, t.shape, strict=True)):
        wanted = ", ".join(name if n is None else str(n) for name, n in zip("NTD", shape, strict=False))
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(t.shape)}")


def class_shares(logits: Tensor) -> Tensor:
    """Log of each class's share in an input, (N, C), from the groups' logits (N, K, C + 1).

    The softmax of each group, less its last unit ("no class"), is normalised over groups and classes together, and
    summed over groups.
    """
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    log_p = torch.log_softmax(wide, 2)[..., :-1]
    return torch.logsumexp(log_p, 1) - torch.logsumexp(log_p, (1, 2)).unsqueeze(1)

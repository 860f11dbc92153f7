"""The parts of a recurrent Ladder that are not LSTMs: norms, the way down, the decoder's gates, a GRU cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladderfast.nn.checks import (
    cell_inputs,
    check_dtype_of,
    check_step,
    check_tensor,
    odd,
    one_or_pair,
    positive,
    sample_shape,
)
from ladderfast.nn.combinator import GaussianCombinator
from ladderfast.nn.maps import HALF, for_op
from ladderfast.ops import gaussian_combinator
from ladderfast.ops.checks import check_dense, check_not_negative

NORMS = ("layer", "batch", "none")
GATES = ("g1", "convg1", "convg2", "convg3")
UPSAMPLING = ("nearest", "transposed")
_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


class ChannelLayerNorm(nn.Module):
    """Layer normalisation over all channels and positions of a sample, with a gain and a bias for each channel.

    x (N, C, *) and `step`, which is not used -> (N, C, *).
    """

    def __init__(
        self,
        num_features: int,
        *,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("num_features", num_features)
        check_not_negative("eps", eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        check_step(step)
        return F.group_norm(x, 1, self.weight, self.bias, self.eps)


class StepBatchNorm(nn.Module):
    """Batch normalisation for a recurrent network: each of the first time steps has statistics of its own.

    In training each call normalises with the statistics of its batch at its time step. For evaluation there is a
    running average for each of the steps 0 .. steps - 1, as activations of a network that starts from a zero state are
    distributed otherwise at first than later; steps after these share the last. A step that no training has come to,
    whose averages are as they began, is evaluated with those of the last step before it that one has come to. Gain and
    bias are of all steps.

    Args:
        num_features: units or channels (C).
        steps: time steps with statistics of their own.
        bias: whether there is a bias.
        momentum: weight of a new batch in the running averages.

    Shape:
        x (N, C, *), step -> (N, C, *). Buffers running_mean, running_var (steps, C). While `updating` is False the
        averages stay as they are: where a checkpointed step is computed again. With `counts` (steps) zeros, until it is
        None again, they become plain averages of the batches that follow.

    Source: Cooijmans et al., "Recurrent Batch Normalization", 2017, section 3, for statistics by time step.
    """

    def __init__(
        self,
        num_features: int,
        steps: int = 1,
        *,
        bias: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("num_features", num_features)
        positive("steps", steps)
        check_not_negative("momentum", momentum)
        check_not_negative("eps", eps)
        self.steps, self.momentum, self.eps = steps, momentum, eps
        self.updating = True
        self.counts: list[int] | None = None  # batches seen by step, while their plain average is taken
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(steps, num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(steps, num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        check_step(step)
        row = min(step, self.steps - 1)
        mean, var = (self.running_mean[row], self.running_var[row]) if self.training else self._trained(row)
        if self.training and not self.updating:
            mean, var = mean.clone(), var.clone()  # a checkpoint must save as many tensors as the first time
        momentum = self.momentum
        if self.counts is not None:
            self.counts[row] += 1
            momentum = 1 / self.counts[row]
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum, self.eps)

    def _trained(self, row: int) -> tuple[Tensor, Tensor]:
        """The averages of the last row up to this one that are not as they began; of row 0 if there is none."""
        if row == 0:
            return self.running_mean[0], self.running_var[0]
        mean, var = self.running_mean[: row + 1], self.running_var[: row + 1]
        trained = ((mean != 0) | (var != 1)).any(1)
        # By index, as a tensor: a GPU is not waited for.
        last = (trained * torch.arange(row + 1, device=trained.device)).amax(0, keepdim=True)
        return mean.index_select(0, last)[0], var.index_select(0, last)[0]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, steps={self.steps}"


@contextmanager
def averaged_statistics(module: nn.Module) -> Iterator[None]:
    """While it lasts, the running statistics of all `StepBatchNorm` in `module` become plain averages over its calls.

    The module is in training mode meanwhile, and gradients are not recorded.
    """
    norms = [m for m in module.modules() if isinstance(m, StepBatchNorm)]
    training = module.training
    module.train()
    for norm in norms:
        norm.counts = [0] * norm.steps
    try:
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.counts = None
        module.train(training)


def make_norm(
    norm: str,
    num_features: int,
    steps: int,
    *,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ChannelLayerNorm | StepBatchNorm | None:
    """The normalisation of that name, which is one of `NORMS`; None for "none"."""
    one_of("norm", norm, NORMS)
    positive("steps", steps)
    if norm == "layer":
        return ChannelLayerNorm(num_features, bias=bias, device=device, dtype=dtype)
    if norm == "batch":
        return StepBatchNorm(num_features, steps, bias=bias, device=device, dtype=dtype)
    return None


class TopDown(nn.Module):
    """The linear map of the signal from above to the shape of the level below.

        dense -> dense          a matrix
        dense -> positions      a matrix to all channels and positions, or, with `broadcast`, to the channels, the same
                                at every position
        positions -> as many    a convolution
        positions -> more       nearest neighbours, then a convolution; or a transposed convolution

    Args:
        in_shape, out_shape: (C, *) of a sample; dense is (C,).
        kernel_size: of the convolution, odd.
        upsample: "nearest" or "transposed".

    Shape:
        v (N, *in_shape) -> (N, *out_shape); with `broadcast` (N, C, 1, ...), which fits by broadcasting.

    Raises:
        ValueError: shapes that cannot be brought together.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        kernel_size: int = 3,
        *,
        broadcast: bool = False,
        upsample: str = "nearest",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("upsample", upsample, UPSAMPLING)
        self.in_shape = sample_shape("in_shape", in_shape)
        self.out_shape = sample_shape("out_shape", out_shape)
        (channels, *above), (features, *below) = self.in_shape, self.out_shape
        if above and len(above) != len(below):
            raise ValueError(
                f"a signal of shape {self.in_shape} cannot go down to a level of shape {self.out_shape}"
            )
        odd("kernel_size", kernel_size)
        self.size: tuple[int, ...] | None = None  # to upsample to
        self.view: tuple[int, ...] | None = None
        kind: dict = {"bias": bias, "device": device, "dtype": dtype}
        self.map: nn.Module
        if not above:
            spread = math.prod(below) if below and not broadcast else 1
            self.map = nn.Linear(channels, features * spread, **kind)
            if below:
                self.view = (features, *([1] * len(below) if broadcast else below))
            return
        padding = kernel_size // 2
        if upsample == "transposed" and above != below:
            ratios = [-(-b // a) for a, b in zip(above, below, strict=True)]
            extra = [
                b - ((a - 1) * r - 2 * padding + kernel_size)
                for a, b, r in zip(above, below, ratios, strict=True)
            ]
            if any(r < 1 or not 0 <= e < max(r, 2) for r, e in zip(ratios, extra, strict=True)):
                raise ValueError(
                    f"a transposed convolution with kernel_size {kernel_size} cannot bring {tuple(above)} positions "
                    f"to {tuple(below)}; upsample must be nearest"
                )
            self.map = _TRANSPOSED[len(below)](
                channels, features, kernel_size, tuple(ratios), padding, tuple(extra), **kind
            )
            return
        self.size = None if above == below else tuple(below)
        self.map = _CONVOLUTIONS[len(below)](channels, features, kernel_size, padding=padding, **kind)

    def forward(self, v: Tensor) -> Tensor:
        if self.size is not None:
            v = F.interpolate(v, size=self.size)
        v = self.map(v)
        return v if self.view is None else v.reshape(len(v), *self.view)


class DecoderGate(nn.Module):
    """A decoder cell of the recurrent Ladder: d = g(e, v), stateless, e from the encoder and v from above.

        f(u, w) = w0 sigmoid(w1 u + w2) + w3 u + w4             parameters per unit or channel
        g1, convg1   u = norm(W v);              d = (e - f(u, w_mu)) f(u, w_v) + f(u, w_mu)
        convg2       u, r = norm(W [v, e]);      d = (e - f(u, w_mu)) sigmoid(r) + f(u, w_mu)
        convg3       r, c = norm(W [v, e]);      d = sigmoid(r) e + (1 - sigmoid(r)) c

    W is a convolution where the level has positions, else a matrix (g1 is of dense levels only). f starts with mu = u
    and v = sigmoid(u), for which every signal has a gradient; the Ladder's own start, d = 0, lets nothing pass through
    a stack of gates.

    Args:
        kind: "g1", "convg1", "convg2" or "convg3".
        shape: (C, *) of e and d.
        top_shape: (C', *) of v.
        kernel_size: of the convolutions, odd.
        norm: "layer", "batch" or "none"; by default what the paper has: "batch" for g1, "layer" for the others.
        steps: time steps that have statistics of their own in batch normalisation.
        lateral: False: e is taken for zeros.
        broadcast, upsample: as in `TopDown`.

    Shape:
        e (N, *shape), v (N, *top_shape), step -> d (N, *shape).

    Raises:
        ValueError: an unknown kind or norm, shapes that do not fit.

    Source: Prémont-Schwarz et al., "Recurrent Ladder Networks", 2017, appendix A; the formulas of convg2 and convg3,
    which are lost there, are ours.
    """

    def __init__(
        self,
        kind: str,
        shape: Sequence[int],
        top_shape: Sequence[int],
        kernel_size: int = 3,
        *,
        norm: str | None = None,
        steps: int = 1,
        lateral: bool = True,
        broadcast: bool = False,
        upsample: str = "nearest",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.has_lateral = one_of("kind", kind, GATES), lateral
        self.shape, self.top_shape = sample_shape("shape", shape), sample_shape("top_shape", top_shape)
        channels, *positions = self.shape
        if kind == "g1" and positions:
            raise ValueError(f"g1 is for dense levels, this one has shape {self.shape}; use convg1")
        if norm is None:
            norm = "batch" if kind == "g1" else "layer"
        factory: dict = {"device": device, "dtype": dtype}
        both = kind in ("convg2", "convg3")
        features = 2 * channels if both else channels
        self.top = TopDown(
            self.top_shape,
            (features, *positions),
            kernel_size,
            broadcast=broadcast,
            upsample=upsample,
            bias=norm == "none",
            **factory,
        )
        self.lateral: nn.Module | None = None
        if both and lateral:
            self.lateral = TopDown(self.shape, (features, *positions), kernel_size, **factory)
        self.norm = make_norm(norm, features, steps, **factory)
        self.combinator: GaussianCombinator | None = None
        self.mu: nn.Parameter | None = None
        mu, v = (0.0, 1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0, 0.0)
        if kind in ("g1", "convg1"):
            self.combinator = GaussianCombinator(channels, **factory)
            with torch.no_grad():
                self.combinator.weight.copy_(_columns((*mu, *v), self.combinator.weight))
        if kind == "convg2":
            self.mu = nn.Parameter(torch.empty(5, channels, **factory))
            with torch.no_grad():
                self.mu.copy_(_columns(mu, self.mu))

    def forward(self, e: Tensor, v: Tensor, step: int = 0) -> Tensor:
        for name, t, shape in (("e", e, self.shape), ("v", v, self.top_shape)):
            check_tensor(name, t)
            check_dense(name, t)
            if t.shape[1:] != shape:
                sizes = ", ".join(map(str, shape))
                raise ValueError(f"{name} must have shape (N, {sizes}), got {tuple(t.shape)}")
        if len(v) != len(e):
            raise ValueError(f"v must have the {len(e)} samples of e, got {len(v)}")
        if not self.has_lateral:
            e = torch.zeros_like(e)
        a = self.top(v)
        if self.lateral is not None:
            a = a + self.lateral(e)
        if a.shape[2:] != e.shape[2:]:
            a = a.expand(*a.shape[:2], *e.shape[2:])
        if self.norm is not None:
            a = self.norm(a, step)
        given = torch.promote_types(a.dtype, e.dtype)
        # float32 is the least that the CPU's kernel takes; the next level's weights are as given.
        dtype = torch.float32 if given in HALF and a.device.type == "cpu" else given
        return self._combined(e.to(dtype), a.to(dtype)).to(given)

    def _combined(self, e: Tensor, a: Tensor) -> Tensor:
        """d of e and of what is normalised of v, and of both."""
        if self.combinator is not None:
            return gaussian_combinator(e, a, for_op(self.combinator.weight, a))
        first, second = a.chunk(2, 1)
        if self.mu is None:
            return torch.lerp(second, e, first.sigmoid())
        # With v = 0 the combinator is mu, whatever its z.
        mu = for_op(self.mu, a)
        mean = gaussian_combinator(e, first, torch.cat((mu, torch.zeros_like(mu))))
        return torch.lerp(mean, e, second.sigmoid())

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.shape}" + ("" if self.has_lateral else ", lateral=False")


def _columns(start: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(start).unsqueeze(1).expand_as(like)


class LayerNormGRUCell(nn.Module):
    """One step of a GRU, dense or convolutional, whose input gates are layer-normalised, the recurrent ones not.

        a = LN_x(W_x x) + LN_d(W_d d) + b            r, z, n = split(a)
        q = W_h h + b_h                              q_r, q_z, q_n = split(q)
        h' = (1 - s(z + q_z)) tanh(n + s(r + q_r) q_n) + s(z + q_z) h

    With norm "none" and a dense cell this is torch.nn.GRUCell, in its order of gates. In plain PyTorch.

    Args:
        in_channels: channels of x; a pair for two inputs, of which the second has the size of the state.
        hidden_channels: C.
        kernel_size: of all convolutions, odd; not used where `spatial` is 0.
        stride: of the convolution of x.
        norm: "layer", "batch" (with statistics by time step, see `StepBatchNorm`) or "none".
        steps: of the batch normalisation.
        spatial: 0, 1 or 2, the number of spatial axes.

    Shape:
        x (N, in_channels, *), or a pair whose second may be None for zeros; h (N, C, *) or None for zeros; step -> h'.

    Raises:
        ValueError: sizes or shapes that do not fit.
        TypeError: a size that is no whole number; what is no tensor, or of another dtype than the weights.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014; Prémont-Schwarz et al.,
    "Recurrent Ladder Networks", 2017.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        hidden_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        norm: str = "layer",
        steps: int = 1,
        spatial: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = one_or_pair("in_channels", in_channels)
        if spatial not in (0, 1, 2):
            raise ValueError(f"spatial must be 0, 1 or 2, got {spatial}")
        if spatial:
            odd("kernel_size", kernel_size)
        positive("hidden_channels", hidden_channels)
        positive("stride", stride)
        self.in_channels, self.hidden_channels, self.spatial = channels, hidden_channels, spatial
        gates = 3 * hidden_channels
        factory: dict = {"device": device, "dtype": dtype}

        def linear(count: int, stride: int, bias: bool) -> nn.Module:
            if not spatial:
                return nn.Linear(count, gates, bias=bias, **factory)
            return _CONVOLUTIONS[spatial](
                count, gates, kernel_size, stride, kernel_size // 2, bias=bias, **factory
            )

        self.inputs = nn.ModuleList(
            linear(count, stride if k == 0 else 1, bias=False) for k, count in enumerate(channels)
        )
        self.recurrent = linear(hidden_channels, 1, bias=True)
        norms = [make_norm(norm, gates, steps, bias=False, **factory) for _ in channels]
        self.norms = nn.ModuleList(n for n in norms if n is not None)
        self.bias = nn.Parameter(torch.zeros(gates, **factory))

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor | None], h: Tensor | None = None, step: int = 0
    ) -> Tensor:
        weight = self.recurrent.weight
        assert isinstance(weight, Tensor)
        inputs = cell_inputs(x, len(self.in_channels), weight)
        a: Tensor | None = None
        for k, (t, channels) in enumerate(zip(inputs, self.in_channels, strict=True)):
            if t is None:
                continue
            if t.dim() != 2 + self.spatial or t.shape[1] != channels:
                axes = ("", ", L", ", H, W")[self.spatial]
                raise ValueError(f"an input must have shape (N, {channels}{axes}), got {tuple(t.shape)}")
            own = self.inputs[k](t)
            own = self.norms[k](own, step) if len(self.norms) else own
            a = own if a is None else a + own
        assert a is not None  # the first is there
        over = (-1, *[1] * self.spatial)
        a = a + self.bias.reshape(over)
        if h is None:
            h = a.new_zeros((len(a), self.hidden_channels, *a.shape[2:]))
            bias = self.recurrent.bias
            assert isinstance(bias, Tensor)
            q = bias.reshape(over).expand_as(a)  # of zeros the convolution leaves the bias
        else:
            expected = (len(a), self.hidden_channels, *a.shape[2:])
            check_dtype_of(weight, "h", h)
            if h.shape != expected:
                raise ValueError(f"h must have shape {expected}, got {tuple(h.shape)}")
            q = self.recurrent(h)
        cut = 2 * self.hidden_channels
        reset, update = torch.sigmoid(a[:, :cut] + q[:, :cut]).chunk(2, 1)
        new = torch.tanh(a[:, cut:] + reset * q[:, cut:])
        return torch.lerp(new, h.to(new.dtype), update)

    def extra_repr(self) -> str:
        channels = self.in_channels[0] if len(self.in_channels) == 1 else self.in_channels
        return f"{channels}, {self.hidden_channels}"

"""The Stacked What-Where Auto-encoder (Zhao et al. 2015, arXiv:1506.02351)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderfast.models.swwae_layers import check_image_shape, parse_architecture
from ladderfast.nn.noise import draw_seed, dropout, dropout_bound
from ladderfast.nn.what_where import SoftPool2d, SoftUnpool2d, WhereMaxPool2d, WhereMaxUnpool2d
from ladderfast.ops.what_where import sharpness
from ladderfast.reference.tagger import widened


class SWWAEOutput(NamedTuple):
    """What `SWWAE.training_pass` returns; what was not asked for is None or empty."""

    logits: Tensor | None
    """(N_l, classes) of the labelled samples, before the softmax."""
    reconstruction: Tensor | None
    """|x - x~|_2 of the unlabelled samples, their mean, 0-dim."""
    intermediate: tuple[Tensor, ...]
    """|x_m - x~_m|_2 of the unlabelled samples, their mean, 0-dim; of each pooling but the top, the lowest first."""
    sparsity: Tensor | None
    """|h|_1 of all hidden feature maps and units of a sample, the mean of all samples that were encoded, 0-dim."""


class WhatWhere(NamedTuple):
    """What a pooling layer puts out: what (N, C, h, w), and where, of one layout for each kind of pooling.

    Soft: (N, C, 2, h, w), x and y. Hard: (N, C, h, w), the maximum's number in its window, row by row, torch.uint8.
    """

    what: Tensor
    where: Tensor


class SWWAE(nn.Module):
    """Convolutional network whose poolings hand their "where" to a mirrored decoder.

    `model(x)` gives logits. For a training step, `training_pass` returns the labelled samples' logits and the terms of

        L = L_NLL + lambda_rec |x - x~|_2 + lambda_M sum_m |x_m - x~_m|_2        (equations 1 and 2)

    unweighted; what is not asked for is not computed. The norm is that of a sample, not squared, as equation 2 prints
    it (the text says "L2 loss" of it), and the terms are its means over samples.

    The encoder is convolution, batch normalisation (with `batch_norm`), ReLU; dense layers have a ReLU but the last,
    whose units are the classes. The decoder starts from the feature maps below the first dense layer and mirrors what
    led there: unpooling puts the what at the encoder's where, a convolution of the same kernel leads back to the maps
    below, with batch normalisation and ReLU except at the input. x_m is the what of the m-th pooling and x~_m what the
    decoder has at its place; where nothing lies between the two, they are the same and there is no term. No gradient is
    stopped.

    With dropout, what is dropped is decided by the buffer `noise_state`, (2,) seed and offset, drawn at the start from
    torch's global generator; each pass in training mode moves the offset on.

    Args:
        architecture: "(64)5c-2p-(64)3c-2p-(64)3c-2p-10fc": see `parse_architecture`. Without a dense layer there are
            no classes, and `model(x)` is the top feature map.
        image_shape: (H, W) or (C, H, W).
        pooling: "hard" (maximum and its place) or "soft" (equations 3 and 4).
        beta: of soft pooling, from 0 to 1e6.
        unpooling: "where", or "copy": the what at every position of its window (section 4.1).
        batch_norm: after every convolution of the encoder and, but for the last, the decoder, by channel.
        dropout_dense: probability to drop an input of a dense layer.
        dropout_conv: probability to drop a value of the feature maps that leave a convolution's ReLU.
        decoder: false leaves the decoder out, for networks trained without reconstruction terms.

    Raises:
        TypeError, ValueError: an architecture that cannot be read (with the position), or an argument out of range.
    """

    def __init__(
        self,
        architecture: str,
        image_shape: Sequence[int] = (32, 32),
        *,
        pooling: str = "hard",
        beta: float = 100.0,
        unpooling: str = "where",
        batch_norm: bool = False,
        dropout_dense: float = 0.0,
        dropout_conv: float = 0.0,
        decoder: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("pooling", pooling, ("hard", "soft")),
            ("unpooling", unpooling, ("where", "copy")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, p in (("dropout_dense", dropout_dense), ("dropout_conv", dropout_conv)):
            if not isinstance(p, (int, float)):
                raise TypeError(f"{name} must be a number, got {p!r}")
            if not 0 <= p < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {p}")
        beta = sharpness("SWWAE", beta)
        self.architecture = architecture
        self.image_shape = check_image_shape(image_shape)
        self.stages = parse_architecture(architecture, image_shape)
        self.dropout_dense, self.dropout_conv = float(dropout_dense), float(dropout_conv)
        self._bounds = {p: dropout_bound(p) for p in (self.dropout_dense, self.dropout_conv)}
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        encoder: list[nn.Module] = []
        dense: list[nn.Module] = []
        below: tuple[int, ...] = self.image_shape
        for stage in self.stages:
            if stage.kind == "conv":
                encoder.append(_Convolution(below[0], stage.shape[0], stage.size, batch_norm, True, **made))
            elif stage.kind == "pool":
                soft = pooling == "soft"
                hard = WhereMaxPool2d(stage.size, positions=False)
                encoder.append(SoftPool2d(stage.size, beta) if soft else hard)
            else:
                dense.append(nn.Linear(math.prod(below), stage.shape[0], **made))
            below = stage.shape
        self.encoder = nn.ModuleList(encoder)
        self.dense = nn.ModuleList(dense)
        # Entry i undoes the encoder's entry i, so that the decoder goes through it backwards.
        self.decoder: nn.ModuleList | None = None
        if decoder:
            mirrored: list[nn.Module] = []
            first = next((i for i, stage in enumerate(self.stages) if stage.kind == "conv"), -1)
            below = self.image_shape
            for i, stage in enumerate(self.stages[: len(encoder)]):
                if stage.kind == "pool":
                    unpool = {"soft": SoftUnpool2d, "hard": WhereMaxUnpool2d}[pooling]
                    mirrored.append(_Copy(stage.size) if unpooling == "copy" else unpool(stage.size))
                else:
                    inner = i > first
                    mirrored.append(
                        _Convolution(
                            stage.shape[0], below[0], stage.size, batch_norm and inner, inner, **made
                        )
                    )
                below = stage.shape
            self.decoder = nn.ModuleList(mirrored)
        drops = bool(dropout_dense or dropout_conv)
        self.noise_state: Tensor | None
        self.register_buffer(
            "noise_state", torch.zeros(2, dtype=torch.long, device=device) if drops else None
        )
        if drops:
            # Processes that train together drop values of their own: DistributedDataParallel leaves this buffer alone.
            self._ddp_params_and_buffers_to_ignore = ["noise_state"]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal of variance 2 / fan_in before a ReLU and 1 / fan_in elsewhere, biases 0; dropout anew."""
        for module in self.modules():
            if isinstance(module, _Convolution):
                module.reset_parameters()
        for i, linear in enumerate(self.dense):
            assert isinstance(linear, nn.Linear)
            hidden = i < len(self.dense) - 1
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu" if hidden else "linear")
            nn.init.zeros_(linear.bias)
        if self.noise_state is not None:
            draw_seed(self.noise_state)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of x (N, *), flattened or not; the top feature map (N, C, h, w) without dense layers.

        Raises:
            TypeError, ValueError: x is no floating-point tensor of that shape.
        """
        top, _, _ = self._encode(self._images("x", x))
        return self._classify(top)[0] if len(self.dense) else top

    def training_pass(
        self,
        x_labelled: Tensor,
        x_unlabelled: Tensor,
        *,
        classify: bool = True,
        reconstruction: bool = True,
        intermediate: bool = True,
        sparsity: bool = False,
    ) -> SWWAEOutput:
        """The terms of the cost: logits of the labelled samples, reconstruction terms of the unlabelled ones.

        Both go through the encoder as one batch, and share the statistics of batch normalisation. Samples of which
        nothing is asked are not encoded, and layers that no term needs are not run.

        Args:
            x_labelled: (N_l, *), flattened or not; unused unless `classify`.
            x_unlabelled: (N_u, *); unused unless one of the other terms is asked for.
            classify, reconstruction, intermediate, sparsity: which terms.

        Raises:
            TypeError, ValueError: an input of the wrong kind or shape, a term that this network does not have, or none.
        """
        decode = reconstruction or intermediate
        if classify and not len(self.dense):
            raise ValueError(f"classify needs a dense layer, which {self.architecture} does not have")
        if decode and self.decoder is None:
            raise ValueError("reconstruction terms need a decoder, which was left out (decoder=False)")
        parts = []
        if classify:
            parts.append(self._images("x_labelled", x_labelled))
        if decode or sparsity:
            parts.append(self._images("x_unlabelled", x_unlabelled))
            if not len(x_unlabelled):
                raise ValueError(
                    "x_unlabelled must hold at least 1 sample, of whose terms the means are; got 0"
                )
        if not parts:
            raise ValueError("training_pass must be asked for at least one term, got none")
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        labelled = len(parts[0]) if classify else 0

        top, pooled, hidden = self._encode(x, record=sparsity)
        logits = None
        if classify:
            logits, units = self._classify(top[:labelled])
            hidden += units if sparsity else []
        rec, middle = None, []
        if decode:
            pooled = [p if p is None else WhatWhere(p.what[labelled:], p.where[labelled:]) for p in pooled]
            lowest = 0 if reconstruction else self._lowest_pair()
            for i, v in self._decode(top[labelled:], pooled, lowest):
                if i == 0 and reconstruction:
                    rec = _distance(x[labelled:], v)
                elif i and intermediate and (below := pooled[i - 1]) is not None:
                    middle.append(_distance(below.what, v))
        total = None
        if sparsity:
            # Dense layers have seen labelled samples alone, so that each tensor has its own mean.
            total = torch.stack([h.abs().sum() / max(1, len(h)) for h in widened(*hidden)]).sum()
        return SWWAEOutput(logits, rec, tuple(reversed(middle)), total)

    def reconstruct(self, x: Tensor) -> Tensor:
        """x~ of x (N, *), in its shape. Raises ValueError without a decoder, and as the call does."""
        if self.decoder is None:
            raise ValueError("reconstruct needs a decoder, which was left out (decoder=False)")
        top, pooled, _ = self._encode(self._images("x", x))
        *_, (_, v) = self._decode(top, pooled, 0)
        return v.reshape(x.shape)

    def features(self, x: Tensor) -> Tensor:
        """The feature maps of x (N, *) below the first dense layer, flattened: (N, D)."""
        return self._encode(self._images("x", x))[0].flatten(1)

    def what_where(self, x: Tensor) -> tuple[WhatWhere, ...]:
        """What and where of every pooling layer, the lowest first, of x (N, *)."""
        return tuple(p for p in self._encode(self._images("x", x))[1] if p is not None)

    def extra_repr(self) -> str:
        return f"{self.architecture!r}, image_shape={self.image_shape}"

    def _images(self, name: str, x: Tensor) -> Tensor:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if x.dim() < 2 or math.prod(x.shape[1:]) != math.prod(self.image_shape):
            raise ValueError(f"{name} must have shape (N, *) of {self.image_shape}, got {tuple(x.shape)}")
        own = next(self.parameters(), x)
        if x.dtype != own.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must be {own.dtype} as the network is, got {x.dtype}")
        return x.reshape(-1, *self.image_shape)

    def _encode(
        self, x: Tensor, *, record: bool = False
    ) -> tuple[Tensor, list[WhatWhere | None], list[Tensor]]:
        """The top feature map, what and where of each layer (None: a convolution), and the hidden maps on record."""
        pooled: list[WhatWhere | None] = []
        hidden = []
        for layer in self.encoder:
            if isinstance(layer, _Convolution):
                x = layer(x)
                if record:
                    hidden.append(x)
                x = self._drop(x, self.dropout_conv)
                pooled.append(None)
            else:
                x, where = layer(x)
                pooled.append(WhatWhere(x, where))
        return x, pooled, hidden

    def _classify(self, top: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the hidden units on the way."""
        x, hidden = top.flatten(1), []
        for i, linear in enumerate(self.dense):
            if i:
                x = F.relu(x)
                hidden.append(x)
            x = linear(self._drop(x, self.dropout_dense))
        return x, hidden

    def _drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout with probability p, in training mode."""
        if not (p and self.training):
            return x
        assert self.noise_state is not None
        return dropout(x, p, self.noise_state, self._bounds[p])

    def _decode(self, v: Tensor, pooled: Sequence[WhatWhere | None], lowest: int) -> Any:
        """Yields (i, what the decoder puts at the place of the encoder's layer i's input), from the top to `lowest`."""
        assert self.decoder is not None
        shapes = [self.image_shape, *(stage.shape for stage in self.stages)]
        for i in reversed(range(lowest, len(self.encoder))):
            layer, below = self.decoder[i], pooled[i]
            v = layer(v) if below is None else layer(v, below.where, shapes[i][1:])
            yield i, v

    @property
    def has_intermediate(self) -> bool:
        """Whether there is an intermediate reconstruction: a pooling below another layer of the encoder."""
        return self._lowest_pair() < len(self.encoder)

    def _lowest_pair(self) -> int:
        """The lowest layer whose input is compared when the image itself is not."""
        pairs = [i for i in range(1, len(self.encoder)) if self.stages[i - 1].kind == "pool"]
        return min(pairs, default=len(self.encoder))


class _Convolution(nn.Module):
    """A convolution that keeps the size, batch normalisation, ReLU."""

    def __init__(
        self, below: int, above: int, kernel: int, batch_norm: bool, relu: bool, **made: Any
    ) -> None:
        super().__init__()
        # What a bias adds, normalisation takes away again.
        self.conv = nn.Conv2d(below, above, kernel, padding="same", bias=not batch_norm, **made)
        self.norm = nn.BatchNorm2d(above, **made) if batch_norm else None
        self.relu = relu

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu" if self.relu else "linear")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu(x) if self.relu else x


class _Copy(nn.Module):
    """Unpooling that knows no where: the what at every position of its window, 0 where no window was."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, what: Tensor, where: Tensor, output_size: Sequence[int]) -> Tensor:
        v = F.interpolate(what, scale_factor=self.kernel_size, mode="nearest")
        return F.pad(v, (0, output_size[1] - v.shape[3], 0, output_size[0] - v.shape[2]))


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|_2 of each sample, the mean of them, in float32 or wider; the gradient of a norm of 0 is 0."""
    difference = (x - y).flatten(1)
    (wide,) = widened(difference)
    return torch.linalg.vector_norm(wide, dim=1).mean()


class SWWAEComparison(nn.Module):
    """Auto-encoders that differ in their window and in their unpooling, trained on the same images (section 4.1).

    `networks` has those that unpool by the where as where_2, where_4, ..., and those that copy as copy_2, copy_4, ...

    Args:
        architecture: with X for the window, "(16)5c-(32)3c-Xp".
        windows: what X is.
        image_shape: (H, W) or (C, H, W).

    Raises ValueError for an architecture without X, no window, or as `SWWAE` does.
    """

    def __init__(
        self,
        architecture: str = "(16)5c-(32)3c-Xp",
        windows: Sequence[int] = (2, 4, 8, 16),
        image_shape: Sequence[int] = (32, 32),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if "X" not in architecture or not windows:
            raise ValueError(
                f"architecture must have an X, got {architecture!r}, for each of windows, got {windows}"
            )
        self.windows = tuple(windows)
        self.networks = nn.ModuleDict(
            {
                f"{how}_{window}": SWWAE(
                    architecture.replace("X", str(window)),
                    image_shape,
                    unpooling=how,
                    device=device,
                    dtype=dtype,
                )
                for window in windows
                for how in ("copy", "where")
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """|x - x~|_2 of each network by its name, the mean of samples x (N, *), 0-dim."""
        costs = {}
        for name, network in self.networks.items():
            assert isinstance(network, SWWAE)
            out = network.training_pass(x, x, classify=False, intermediate=False)
            assert out.reconstruction is not None
            costs[name] = out.reconstruction
        return costs

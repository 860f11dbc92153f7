"""Drop-in modules for the combinators g(z~, u) of the Ladder network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ladderfast.nn.checks import positive
from ladderfast.nn.maps import for_op
from ladderfast.ops import gaussian_combinator, ladder_decoder
from ladderfast.ops.checks import check_bool, check_dtype
from ladderfast.ops.ladder_decoder import LadderDecoderOutput, prepare
from ladderfast.reference.ladder_decoder import denoising_cost
from ladderfast.reference.ladder_encoder import moments, normalise


class GaussianCombinator(nn.Module):
    """g(z, u) = (z - mu(u)) v(u) + mu(u), with mu and v of Rasmus et al. 2015, section 3.

        mu(u) = a1 sigmoid(a2 u + a3) + a4 u + a5
        v(u)  = a6 sigmoid(a7 u + a8) + a9 u + a10

    Args:
        num_features: units of a dense layer, channels of a convolutional one (C).
        squash_v: pass v through a sigmoid (Tagger's continuous case).

    Shape:
        z, u (N, C, *) -> (N, C, *). The parameter `weight` is (10, C), rows a1 .. a10; a2 and a7
        start at 1, the others at 0, so that the output is 0 at first (0.5 z with `squash_v`).
    """

    def __init__(
        self,
        num_features: int,
        *,
        squash_v: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = positive("num_features", num_features)
        check_bool("squash_v", squash_v)
        self.squash_v = squash_v
        self.weight = nn.Parameter(torch.empty(10, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the published start values."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[1] = 1
            self.weight[6] = 1

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return gaussian_combinator(z, u, self.weight, squash_v=self.squash_v)

    def decode(
        self,
        u: Tensor,
        z: Tensor,
        clean_z: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        *,
        eps: float = 1e-10,
    ) -> LadderDecoderOutput:
        """g(z, u normalised) and the denoising cost, as `ladderfast.ops.ladder_decoder`."""
        check_dtype("ladder_decoder", "u", u)
        weight = for_op(self.weight, u)
        return ladder_decoder(u, z, weight, clean_z, mean, var, squash_v=self.squash_v, eps=eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}" + (", squash_v=True" if self.squash_v else "")


class _UnitwiseCombinator(nn.Module):
    """A combinator whose parameters are the rows of `weight` (rows, C), one column a unit or channel."""

    start: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = positive("num_features", num_features)
        self.weight = nn.Parameter(torch.empty(len(self.start), num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the published start values."""
        with torch.no_grad():
            self.weight.copy_(self.weight.new_tensor(self.start).unsqueeze(1).expand_as(self.weight))

    @abstractmethod
    def combine(self, z: Tensor, u: Tensor, *rows: Tensor) -> Tensor:
        """The formula; `rows` are those of `weight`, shaped to broadcast over z."""

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        for name, t in (("z", z), ("u", u)):
            check_dtype(type(self).__name__, name, t)
        if z.dim() < 2 or z.shape[1] != self.num_features:
            raise ValueError(f"z must have shape (N, {self.num_features}, *), got {tuple(z.shape)}")
        if u.shape != z.shape:
            raise ValueError(f"u must have the shape of z, {tuple(z.shape)}, got {tuple(u.shape)}")
        dtype = z.dtype
        weight: Tensor = self.weight
        if dtype in (torch.bfloat16, torch.float16):  # one rounding, at the end
            z, u, weight = z.float(), u.float(), weight.float()
        rows = weight.reshape(*weight.shape, *[1] * (z.dim() - 2)).unbind()
        return self.combine(z, u, *rows).to(dtype)

    def decode(
        self,
        u: Tensor,
        z: Tensor,
        clean_z: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        *,
        eps: float = 1e-10,
    ) -> LadderDecoderOutput:
        """g(z, u normalised) and the denoising cost; arguments, and errors, as those of
        `ladderfast.ops.ladder_decoder`."""
        check_dtype("ladder_decoder", "u", u)
        weight = for_op(self.weight, u)
        u, z, clean_z = prepare(len(self.start), u, z, weight, clean_z, mean, var, eps)
        dtype = u.dtype
        if dtype in (torch.bfloat16, torch.float16):
            u, z, clean_z = u.float(), z.float(), None if clean_z is None else clean_z.float()
        z_hat = self(z, normalise(u, *moments(u), eps))
        cost = None if clean_z is None else denoising_cost(z_hat, clean_z, mean, var, eps)
        return LadderDecoderOutput(z_hat.to(dtype), cost)

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class SigmoidCombinator(_UnitwiseCombinator):
    """The first preprint's combinator (Rasmus et al. 2015, arXiv:1507.02672v1).

        g(z, u) = a1 + a2 z + a3 u + a4 z u + b1 sigmoid(c1 + c2 z + c3 u + c4 z u)

    Args:
        num_features: units of a dense layer, channels of a convolutional one (C).

    Shape:
        z, u (N, C, *) -> (N, C, *). The parameter `weight` is (9, C), rows a1 .. a4, b1, c1 .. c4;
        a2, b1 and c2 start at 1, the others at 0.
    """

    start = (0, 1, 0, 0, 1, 0, 1, 0, 0)

    def combine(self, z: Tensor, u: Tensor, *rows: Tensor) -> Tensor:
        a1, a2, a3, a4, b1, c1, c2, c3, c4 = rows
        zu = z * u
        return a1 + a2 * z + a3 * u + a4 * zu + b1 * torch.sigmoid(c1 + c2 * z + c3 * u + c4 * zu)


class SigmoidNoProductCombinator(_UnitwiseCombinator):
    """`SigmoidCombinator` without its two terms in z u.

        g(z, u) = a1 + a2 z + a3 u + b1 sigmoid(c1 + c2 z + c3 u)

    Args:
        num_features: units of a dense layer, channels of a convolutional one (C).

    Shape:
        z, u (N, C, *) -> (N, C, *). The parameter `weight` is (7, C), rows a1 .. a3, b1, c1 .. c3;
        a2, b1 and c2 start at 1, the others at 0.
    """

    start = (0, 1, 0, 1, 0, 1, 0)

    def combine(self, z: Tensor, u: Tensor, *rows: Tensor) -> Tensor:
        a1, a2, a3, b1, c1, c2, c3 = rows
        return a1 + a2 * z + a3 * u + b1 * torch.sigmoid(c1 + c2 * z + c3 * u)


class BilinearCombinator(_UnitwiseCombinator):
    """`SigmoidCombinator` without its sigmoid.

        g(z, u) = a1 + a2 z + a3 u + a4 z u

    Args:
        num_features: units of a dense layer, channels of a convolutional one (C).

    Shape:
        z, u (N, C, *) -> (N, C, *). The parameter `weight` is (4, C), rows a1 .. a4; a2 starts at 1,
        the others at 0, so that the output is z at first.
    """

    start = (0, 1, 0, 0)

    def combine(self, z: Tensor, u: Tensor, *rows: Tensor) -> Tensor:
        a1, a2, a3, a4 = rows
        return a1 + a2 * z + a3 * u + a4 * (z * u)


class AdditiveCombinator(_UnitwiseCombinator):
    """Two functions of one argument each, added.

        g(z, u) = n_z(z) + n_u(u)
        n(x) = w2 sigmoid(b1 + w1 x) + w3 x + b2, with one b1 for both

    Args:
        num_features: units of a dense layer, channels of a convolutional one (C).

    Shape:
        z, u (N, C, *) -> (N, C, *). The parameter `weight` is (9, C), rows b1, then w1, w2, w3, b2 of z,
        then those of u; every w1 and w2 starts at 1, the others at 0.
    """

    start = (0, 1, 1, 0, 0, 1, 1, 0, 0)

    def combine(self, z: Tensor, u: Tensor, *rows: Tensor) -> Tensor:
        b1, w1z, w2z, w3z, b2z, w1u, w2u, w3u, b2u = rows
        of_z = w2z * torch.sigmoid(b1 + w1z * z) + w3z * z + b2z
        of_u = w2u * torch.sigmoid(b1 + w1u * u) + w3u * u + b2u
        return of_z + of_u


# None: the layer has no combinator, hence no denoising cost.
COMBINATORS: dict[str, Callable[..., nn.Module] | None] = {
    "gaussian": GaussianCombinator,
    "gaussian_squashed": partial(GaussianCombinator, squash_v=True),  # as Tagger has it for continuous inputs
    "sigmoid": SigmoidCombinator,
    "sigmoid_no_product": SigmoidNoProductCombinator,
    "bilinear": BilinearCombinator,
    "additive": AdditiveCombinator,
    "none": None,
}


def make_combinator(
    name: str,
    num_features: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """The combinator called `name` for `num_features` units or channels; None for "none".

    Raises:
        ValueError: an unknown name; the message lists those of `COMBINATORS`.
    """
    if name not in COMBINATORS:
        raise ValueError(f"combinator must be one of {', '.join(COMBINATORS)}, got {name!r}")
    make = COMBINATORS[name]
    return None if make is None else make(num_features, device=device, dtype=dtype)

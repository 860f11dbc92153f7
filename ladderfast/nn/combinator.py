"""Drop-in modules for the combinators g(z~, u) of the Ladder network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ladderfast.ops import gaussian_combinator


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
        self.num_features = num_features
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

    def extra_repr(self) -> str:
        return f"{self.num_features}" + (", squash_v=True" if self.squash_v else "")

"""Drop-in module for a Ladder's decoder layer: a linear map, and the op that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ladderfast.nn.combinator import make_combinator
from ladderfast.nn.maps import apply_map, op_dtype
from ladderfast.ops.ladder_decoder import LadderDecoderOutput, check_dtypes


class LadderDecoderLayer(nn.Module):
    """A Ladder's decoder layer (Rasmus et al. 2015, Algorithm 1): linear map, normalisation, combinator, cost.

        u = BN(V x)        z_hat = g(z, u)        cost = mean of (clean_z - (z_hat - mean) / sqrt(var + eps))^2

    Args:
        linear: the map V, without bias: any module from the layer above's z_hat to (N, C, *). None: the input is u
            before its normalisation, as at the top, where it is the softmax's output.
        num_features: units or channels (C) of this layer.
        combinator: g, by its name in `ladderfast.nn.COMBINATORS`.

    >>> layer = ladderfast.nn.LadderDecoderLayer(torch.nn.Linear(250, 500, bias=False), 500)
    >>> z_hat, cost = layer(z_hat_above, z, clean_z, mean, var)
    """

    def __init__(
        self,
        linear: nn.Module | None,
        num_features: int,
        *,
        combinator: str = "gaussian",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made = make_combinator(combinator, num_features, device=device, dtype=dtype)
        if made is None:
            raise ValueError(f"combinator must be the name of a function g; got {combinator!r}")
        self.linear = linear
        self.combinator: Any = made

    def reset_parameters(self) -> None:
        """Set the combinator's start values; the map's are its own."""
        self.combinator.reset_parameters()

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        clean_z: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
    ) -> LadderDecoderOutput:
        """z_hat (N, C, *) and the cost, 0-dim.

        Args:
            x: z_hat of the layer above.
            z: (N, C, *) lateral values, corrupted.
            clean_z: (N, C, *) what z_hat is compared with; None: no cost is wanted.
            mean, var: (C,) of the clean pass; None at layer 0, where z_hat is compared as it is.

        Raises TypeError and ValueError as `ladderfast.ops.ladder_decoder` does.
        """
        return decode(self.combinator, self.linear, x, z, clean_z, mean, var)


def decode(
    combinator: Any,
    linear: nn.Module | None,
    x: Tensor,
    z: Tensor,
    clean_z: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> LadderDecoderOutput:
    """`LadderDecoderLayer.forward` with these two modules."""
    u = x if linear is None else apply_map(linear, x)
    check_dtypes(u=u, z=z, clean_z=clean_z)  # before they are converted
    dtype = op_dtype(torch.promote_types(u.dtype, z.dtype), u.device)
    u, z = u.to(dtype), z.to(dtype)
    if clean_z is not None:
        clean_z = clean_z.to(dtype)
    return combinator.decode(u, z, clean_z, mean, var)

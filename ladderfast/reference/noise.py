"""Gaussian noise by counter in plain PyTorch: the yardstick for what kernels draw inside themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 bits for each counter of four words, under a key of two.

    Words are int64 tensors with values below 2^32, which broadcast. Source: Salmon et al., "Parallel random numbers:
    as easy as 1, 2, 3", 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 wraps around, and the low 64 bits of the product are right all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def noise_words(state: Tensor, stream: int, count: int) -> Tensor:
    """The words of elements 0 .. count - 1, int64 (count,): element e has word e % 4 of counter e // 4.

    state: (2,) int64, seed and offset. The key is the seed's low and high word; the counter is those of e // 4 and then
    those of offset + stream.
    """
    quads = torch.arange(-(-count // 4), device=state.device)
    seed, offset = state[0], state[1] + stream
    counter = (quads & _MASK, quads >> 32, offset & _MASK, offset >> 32 & _MASK)
    words = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack([word.expand(quads.shape) for word in words], -1).reshape(-1)[:count]


def normal_noise(state: Tensor, stream: int, count: int) -> Tensor:
    """Standard normal values of elements 0 .. count - 1, float32 (count,).

    Box-Muller on the words of elements 2 i and 2 i + 1: with U = (word >> 9 + 1/2) / 2^23 of the first and V of the
    second, they are sqrt(-2 ln U) cos(2 pi V) and sqrt(-2 ln U) sin(2 pi V). Computed in float64, rounded once.
    """
    words = noise_words(state, stream, count + count % 2)
    uniform = ((words >> 9).double() + 0.5) * 2.0**-23
    u, v = uniform[0::2], uniform[1::2]
    radius, angle = (-2 * u.log()).sqrt(), (2 * math.pi) * v
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).reshape(-1)[:count].float()


def noise_like(x: Tensor, state: Tensor, stream: int) -> Tensor:
    """Noise for x (N, C, *), float32: an element's number is its place in x's memory where x is contiguous or
    channels-last, and its place in contiguous order otherwise."""
    flat = normal_noise(state, stream, x.numel())
    if x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return flat.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
    return flat.reshape(x.shape)

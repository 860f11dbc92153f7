"""Noise by counter: Philox's known answers, the normals of every backend, and that they look like normals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ladderfast.ops import ladder_encoder
from ladderfast.reference.noise import noise_like, noise_words, normal_noise, philox4x32

ONES = 0xFFFFFFFF
COUNT = 2**19  # of the statistical tests; their bounds are five standard deviations of what they look at


def state(seed: int, offset: int, device: str = "cpu") -> Tensor:
    return torch.tensor([seed, offset], device=device)


def drawn(shape: tuple[int, ...], noise_state: Tensor, stream: int, dtype=torch.float32) -> Tensor:
    """The noise that the backend in use draws: a layer's z of constants, which normalise to 0."""
    z_pre = torch.zeros(shape, dtype=dtype, device=noise_state.device)
    return ladder_encoder(z_pre, 1, noise_std=1.0, noise_state=noise_state, noise_stream=stream).z


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    out = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    return [int(word) for word in out]


def test_known_answers():
    """Of Philox4x32-10, published with Salmon et al., 2011."""
    assert words((0,) * 4, (0,) * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ONES,) * 4, (ONES,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_elements_and_counters():
    """Element e has word e % 4 of the counter (e / 4, offset + stream) under the seed as key."""
    seed, offset, stream = 0x0123456789ABCDEF, 2**32 - 1, 3
    found = noise_words(state(seed, offset), stream, 11)
    for e in range(11):
        counter = (e // 4, 0, 2, 1)  # 2^32 - 1 + 3 = 2^32 + 2
        assert found[e] == words(counter, (0x89ABCDEF, 0x01234567))[e % 4]


def test_box_muller_by_hand():
    first, second = (int(word) for word in noise_words(state(7, 0), 0, 2))
    u, v = ((word >> 9) + 0.5 for word in (first, second))
    radius = math.sqrt(-2 * math.log(u / 2**23))
    expected = [radius * math.cos(2 * math.pi * v / 2**23), radius * math.sin(2 * math.pi * v / 2**23)]
    assert normal_noise(state(7, 0), 0, 2).tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("seed", "offset", "stream"),
    [(0, 0, 0), (1, 2, 3), (-1, -1, 1), (2**62 + 5, 2**32 - 2, 7), (-(2**63), 2**63 - 1, 0)],
)
@pytest.mark.parametrize("shape", [(6, 5), (3, 1031), (9, 7, 3), (3, 2, 67)], ids=str)
def test_normals_of_every_backend(target, shape, seed, offset, stream):
    """Within a few units in the last place of the reference, which rounds once."""
    for dtype in target.dtypes[:2] if target.backend != "triton" else target.dtypes[:1]:
        if dtype in (torch.bfloat16, torch.float16):
            continue
        noise_state = state(seed, offset, target.device)
        ours = drawn(shape, noise_state, stream, dtype).double()
        exact = noise_like(torch.zeros(shape, device=target.device), noise_state, stream).double()
        ulps = ((ours - exact) / exact).abs() / torch.finfo(torch.float32).eps
        assert ulps.max() <= 4, f"{ulps.max():.1f} units in the last place"


def test_integers_of_every_backend(target):
    """Taken back from the normals: the angle's word bit for bit, the radius' within one of 2^23."""
    noise_state = state(3, 4, target.device)
    pairs = drawn((4, 1000), noise_state, 1).double().reshape(-1, 2)
    expected = (noise_words(noise_state, 1, 4000) >> 9).reshape(-1, 2)
    angle = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) % 1
    assert torch.equal((angle * 2**23 - 0.5).round().long(), expected[:, 1])
    uniform = (-0.5 * pairs.square().sum(1)).exp()
    assert ((uniform * 2**23 - 0.5).round().long() - expected[:, 0]).abs().max() <= 1


def test_noise_does_not_depend_on_the_cut(target):
    """The same elements whatever the shape that they are drawn for."""
    noise_state = state(11, 12, target.device)
    flat = drawn((2, 1800), noise_state, 0).flatten()
    for shape in [(600, 6), (8, 450), (5, 720), (3, 3, 400), (30, 10, 12)]:
        assert torch.equal(drawn(shape, noise_state, 0).flatten(), flat)


def sample(target, seed: int = 1, offset: int = 0, stream: int = 0) -> Tensor:
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter is slow; its normals are those of the reference")
    return drawn((512, COUNT // 512), state(seed, offset, target.device), stream).double().flatten().cpu()


def test_moments(target):
    x = sample(target)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 5 * math.sqrt(variance / COUNT)


def test_distribution_and_tails(target):
    """Kolmogorov's distance, how often 1 to 4.5 standard deviations are passed, and the largest value there can be."""
    x = sample(target).sort().values
    steps = torch.arange(COUNT, dtype=torch.float64) / COUNT
    distance = (torch.special.ndtr(x) - steps).abs().max()
    assert distance < 2 / math.sqrt(COUNT)  # passed once in 1,500 by a sample that is normal
    for side in (x, -x):
        for sigmas in (1.0, 2.0, 3.0, 4.0, 4.5):
            share = 0.5 * math.erfc(sigmas / math.sqrt(2))
            found = int((side > sigmas).sum())
            assert abs(found - COUNT * share) < 5 * math.sqrt(COUNT * share) + 1
    assert x.abs().max() <= math.sqrt(2 * 24 * math.log(2)) + 1e-5


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = (t - t.mean() for t in (a, b))
    return abs(float((a * b).mean() / (a.std() * b.std())))


def test_independence(target):
    """Of streams, offsets, seeds and neighbours; of values, squares and absolute values."""
    x = sample(target)
    others = {
        "stream": sample(target, stream=1),
        "far stream": sample(target, stream=1000),
        "offset": sample(target, offset=2**33),
        "seed": sample(target, seed=2),
        "high word of the seed": sample(target, seed=1 + 2**32),
    }
    for lag in (1, 2, 3, 4, 512):
        others[f"{lag} further"] = x.roll(lag)
    for name, y in others.items():
        for function in (lambda t: t, torch.square, torch.abs):
            assert correlation(function(x), function(y)) < 5 / math.sqrt(COUNT), name
        assert not torch.equal(x, y)


def test_offset_and_stream_are_one_number(target):
    """A step that moves the offset by the number of streams draws anew in each."""
    a = drawn((3, 5), state(1, 40, target.device), 2)
    assert torch.equal(a, drawn((3, 5), state(1, 42, target.device), 0))
    assert not torch.equal(a, drawn((3, 5), state(1, 41, target.device), 0))

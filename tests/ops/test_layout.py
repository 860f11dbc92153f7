"""Copies between contiguous and channels-last images against torch's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from ladderfast import _extension
from ladderfast.ops.layout import channels_last, stack_contiguous, with_gradient_channels_last

# A single tile and less, no multiple of a tile, several items, single channels and positions, nothing.
SHAPES = [
    (2, 16, 4, 4),
    (1, 3, 2, 5),
    (3, 33, 17, 18),
    (2, 1, 5, 7),
    (2, 5, 1, 1),
    (1, 300, 17, 16),
    (0, 3, 4, 4),
    (2, 0, 4, 4),
]


def is_channels_last(t):
    return t.movedim(1, -1).is_contiguous() and (t.shape[1] == 0 or t.stride(1) == 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned", "two_threads")
def test_there_and_back(shape):
    x = torch.randn(shape)
    last = channels_last(x)
    assert is_channels_last(last)
    assert torch.equal(last, x)
    for dim in (0, 1):
        stacked = stack_contiguous([[last, x, last + 1]], dim)
        assert stacked.is_contiguous()
        assert torch.equal(stacked, torch.stack([x, x, x + 1], dim))
        parts = stack_contiguous([[last, x + 1], [last[:1] + 2, x[:1] + 3]], dim)
        assert parts.is_contiguous()
        assert torch.equal(
            parts,
            torch.cat(
                [
                    torch.stack([x, x + 1], dim),
                    torch.stack([x + 2, x + 3], dim)[(slice(None),) * (1 - dim) + (slice(0, 1),)],
                ],
                1 - dim,
            ),
        )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    code = (
        "from tests.ops.test_layout import *\n"
        "for shape in SHAPES:\n"
        "    x = torch.randn(shape)\n"
        "    assert torch.equal(channels_last(x), x)\n"
        "    assert torch.equal(stack_contiguous([[channels_last(x)]], 0)[0], x)\n"
    )
    env = {**os.environ, "LADDERFAST_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_dtypes(dtype):
    x = torch.randint(0, 9, (2, 3, 4, 5)).to(dtype)
    assert torch.equal(channels_last(x), x)
    assert is_channels_last(channels_last(x))


def test_any_strides():
    x = torch.randn(3, 18, 2, 20, 16)
    for t in (x[:, :, 0], x[:, :, 1, ::2], x[:1, :1, 0].expand(4, 17, 20, 16), channels_last(x[:, :, 0])):
        assert is_channels_last(channels_last(t))
        assert torch.equal(channels_last(t), t)
        assert torch.equal(stack_contiguous([[t]], 1)[:, 0], t)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_nothing_beside_is_written():
    x = torch.randn(3, 18, 20, 16)
    out = torch.zeros(5, 18, 20, 16)
    torch.ops.ladderfast.lay_out(out[1:4], channels_last(x))
    assert torch.equal(out[1:4], x)
    assert not out[0].any()
    assert not out[4].any()


def test_gradients():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def call(x):
        steps = [with_gradient_channels_last(channels_last(x).square()), x]
        return stack_contiguous([steps, [t[:1] for t in reversed(steps)]], 1)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))
    seen = []
    y = channels_last(torch.randn(2, 3, 4, 5)).requires_grad_()
    y.register_hook(lambda grad: seen.append(grad))
    with_gradient_channels_last(y).backward(torch.randn(2, 3, 4, 5))
    assert is_channels_last(seen[0])


def test_tangents():
    x = torch.randn(2, 3, 4, 5)
    with forward_ad.dual_level(), torch.no_grad():
        copy = channels_last(forward_ad.make_dual(x, x + 1))
        assert torch.equal(forward_ad.unpack_dual(copy).tangent, x + 1)


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_opcheck():
    x = torch.randn(2, 3, 4, 5)
    torch.library.opcheck(torch.ops.ladderfast.channels_last.default, (x,))
    torch.library.opcheck(torch.ops.ladderfast.lay_out.default, (torch.empty(2, 3, 4, 5), channels_last(x)))
    with pytest.raises(RuntimeError, match=r"t must be \(N, C, H, W\)"):
        torch.ops.ladderfast.channels_last(x[0])

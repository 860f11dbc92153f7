"""Convolutions under torch.func.vmap: each network's own, and the values and gradients of torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ladderfast
from ladderfast.ops import convolution as module
from ladderfast.ops.convolution import conv2d

S, N, C, O = 3, 2, 2, 4
DIMS = [(0, 0, 0), (0, 0, None), (0, None, None), (None, 0, 0), (1, 2, 1), (0, None, 0)]


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the convolutions that are made."""
    made = []
    plain = F.conv2d

    def counted(x, *args, **kwargs):
        made.append(tuple(x.shape))
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(module.F, "conv2d", counted)
    return made


def tensors():
    generator = torch.Generator().manual_seed(1)
    shapes = (S, N, C, 6, 5), (S, O, C, 3, 3), (S, O)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def given_and_own(in_dims):
    """Arguments of vmap, and what each network has of them."""
    full = tensors()
    given = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(full, in_dims, strict=True)]
    own = [t[:1].expand_as(t) if dim is None else t for t, dim in zip(full, in_dims, strict=True)]
    return given, list(zip(*own, strict=True))


@pytest.mark.parametrize("in_dims", DIMS)
@pytest.mark.parametrize("padding", [0, (2, 1), "same"])
def test_each_network_has_its_own(in_dims, padding, calls):
    given, own = given_and_own(in_dims)
    y = torch.func.vmap(lambda *t: conv2d(*t, padding=padding), in_dims)(*given)
    if in_dims[1] is None and in_dims[2] is None:
        assert calls == [(S * N, C, 6, 5)]  # one network on all samples
    else:
        assert calls == [(N, C, 6, 5)] * S
    expected = torch.stack([F.conv2d(*t, padding=padding) for t in own])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_gradients_outside_vmap(calls):
    given = [t.requires_grad_() for t in tensors()]
    y = torch.func.vmap(lambda *t: conv2d(*t, padding="same"))(*given)
    grads = torch.autograd.grad((y**3).sum(), given)
    assert len(calls) == S
    expected = torch.stack([F.conv2d(*t, padding="same") for t in zip(*given, strict=True)])
    for ours, theirs in zip(grads, torch.autograd.grad((expected**3).sum(), given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_dims", DIMS)
def test_gradients_within_vmap(in_dims):
    given, own = given_and_own(in_dims)

    def cost(function, *t):
        return (function(*t, padding=(1, 0)) ** 3).sum()

    def first(function):
        return torch.func.grad(lambda *t: cost(function, *t), (0, 1, 2))

    def second(function):
        def dot(*t):
            return sum((g**2).sum() for g in first(function)(*t))

        return torch.func.grad(dot, (0, 1, 2))

    for order in (first, second):
        ours = torch.func.vmap(order(conv2d), in_dims)(*given)
        each = [order(F.conv2d)(*t) for t in own]
        for a, b in zip(ours, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b), rtol=1e-9, atol=1e-9)


def test_the_gradient_within_vmap_is_each_networks_own(calls):
    given = tensors()
    torch.func.vmap(torch.func.grad(lambda *t: conv2d(*t).sum(), (0, 1)))(*given)
    assert calls == [(N, C, 6, 5)] * (2 * S)


def test_under_autocast():
    given = [t.float().requires_grad_() for t in tensors()]

    def both(*t):
        return conv2d(*t), torch.func.grad(lambda *t: conv2d(*t).sum(), 1)(*t)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, inner = torch.func.vmap(both)(*given)
        expected = torch.stack([F.conv2d(*t) for t in zip(*given, strict=True)])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert inner.dtype == torch.float32
    exact = torch.func.vmap(torch.func.grad(lambda *t: F.conv2d(*t).sum(), 1))(*given)
    torch.testing.assert_close(inner, exact, rtol=0.05, atol=0.05)


def test_what_stays_with_torch(calls):
    x, weight, bias = tensors()
    conv2d(x[0], weight[0], bias[0])
    assert calls == [(N, C, 6, 5)]
    with ladderfast.use_backend("reference"):
        y = torch.func.vmap(conv2d)(x, weight, bias)
    assert len(calls) == 2
    batched = torch.compile(torch.func.vmap(conv2d), fullgraph=True, backend="eager")
    torch.testing.assert_close(batched(x, weight, bias), y)

"""Matrix products through oneDNN, on any processor: what decides that one needs them is replaced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ladderfast
from ladderfast.ops import linear as module
from ladderfast.ops.linear import linear

ONE_DNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
pytestmark = pytest.mark.skipif(
    ONE_DNN is None or not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)

N, K, M = 96, 130, 70


@pytest.fixture
def calls(monkeypatch):
    """As on a processor that needs oneDNN; counts the products that went there."""
    made = []

    def counted(*args):
        made.append(args[0].shape)
        return ONE_DNN(*args)

    monkeypatch.setattr(module, "one_dnn", lambda: counted)
    return made


def tensors(*shapes, **kwargs):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, **kwargs) for shape in shapes]


def same(a, b):
    torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)


def forms(x):
    """The same values, laid out in memory in other ways."""
    wide = torch.zeros(x.shape[0], x.shape[1] + 3)
    wide[:, :-3] = x
    every_other = torch.zeros(2 * x.shape[0], x.shape[1])
    every_other[::2] = x
    return [x, x.t().contiguous().t(), wide[:, :-3], every_other[::2]]


def test_value_and_gradients(calls):
    x, weight, grad = tensors((N, K), (M, K), (N, M))
    for a in forms(x):
        for w in forms(weight):
            for g in forms(grad):
                a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
                y = linear(a, w)
                same(y, x.double() @ weight.double().t())
                grad_a, grad_w = torch.autograd.grad(y, (a, w), g)
                same(grad_a, grad.double() @ weight.double())
                same(grad_w, grad.double().t() @ x.double())
    assert len(calls) == 3 * 4**3


def test_a_gradient_that_is_one_number_everywhere(calls):
    x, weight = tensors((N, K), (M, K))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, weight).sum(), x)
    same(grad, weight.double().sum(0).expand(N, K))
    assert len(calls) == 2  # none for the weight, which needs no gradient


def test_gradients_of_gradients(calls):
    x, weight, a, b = tensors((N, K), (M, K), (N, K), (M, K))
    x.requires_grad_()
    weight.requires_grad_()

    def second(function, *inputs):
        x, weight = inputs
        y = function(x, weight).sigmoid().sum()
        grads = torch.autograd.grad(y, inputs, create_graph=True)
        dot = (grads[0] * a.to(x.dtype)).sum() + (grads[1] * b.to(x.dtype)).sum()
        return torch.autograd.grad(dot, inputs)

    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    for ours, theirs in zip(second(linear, x, weight), second(F.linear, *exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)
    assert calls


def test_more_axes(calls):
    x, weight = tensors((4, 24, K), (M, K))
    y = linear(x, weight)
    assert y.shape == (4, 24, M)
    same(y, x.double() @ weight.double().t())
    assert calls == [(N, K)]


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 2)])
def test_vmap(calls, in_dims):
    x, weight = tensors((3, N, K), (3, M, K))
    given = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((x, weight), in_dims, strict=True)]
    own = [t[:1].expand_as(t) if dim is None else t for t, dim in zip((x, weight), in_dims, strict=True)]
    y = torch.func.vmap(linear, in_dims)(*given)
    same(y, own[0].double() @ own[1].double().mT)
    assert len(calls) == (1 if in_dims[1] is None else 3)

    def total(x, weight):
        return (linear(x, weight) ** 2).sum()

    grads = torch.func.vmap(torch.func.grad(total, (0, 1)), in_dims)(*given)
    for grad, exact in zip(
        grads,
        torch.func.vmap(torch.func.grad(lambda x, w: ((x @ w.t()) ** 2).sum(), (0, 1)))(
            *(t.double() for t in own)
        ),
        strict=True,
    ):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-2)


def test_what_stays_with_torch(calls):
    x, weight = tensors((N, K), (M, K))
    small, narrow = tensors((2, K), (2, K))
    with ladderfast.use_backend("reference"):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(small, narrow).shape == (2, 2)
    assert linear(x[:0], weight).shape == (0, M)
    same(torch.compile(linear, fullgraph=True)(x, weight), x.double() @ weight.double().t())
    assert not calls


def test_wrong_shapes_are_reported_as_by_torch(calls):
    x, weight = tensors((N, K), (M, K + 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight)


def test_without_oneDNN_it_is_torch(monkeypatch):
    x, weight = tensors((N, K), (M, K))
    monkeypatch.setattr(module, "one_dnn", lambda: None)
    assert torch.equal(linear(x, weight), F.linear(x, weight))

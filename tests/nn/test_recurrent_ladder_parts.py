"""The parts of a recurrent Ladder against their formulas, written out with torch's own operations in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ladderfast.nn import (
    ChannelLayerNorm,
    DecoderGate,
    LayerNormConvLSTMCell,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    StepBatchNorm,
    TopDown,
)

F64 = {"dtype": torch.float64}
N, C, ABOVE = 3, 4, 5
PLACES = {"dense": (), "pitch": (7,), "image": (6, 8)}


def f(u, w):
    """The paper's equation (6); w (5, C)."""
    w = w.reshape(*w.shape, *[1] * (u.dim() - 2))
    return w[0] * torch.sigmoid(w[1] * u + w[2]) + w[3] * u + w[4]


def shaken(module):
    """Start values are special; these are not."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.7)
    return module


def linear(map_, x):
    convolve = (F.linear, F.conv1d, F.conv2d)[x.dim() - 2]
    weight, kind = map_.weight, {} if x.dim() == 2 else {"padding": map_.weight.shape[-1] // 2}
    return convolve(x, weight, map_.bias, **kind)


def layer_norm(a, norm):
    over = (-1, *[1] * (a.dim() - 2))
    dims = tuple(range(1, a.dim()))
    var, mean = torch.var_mean(a, dims, correction=0, keepdim=True)
    return (a - mean) / (var + norm.eps).sqrt() * norm.weight.reshape(over) + norm.bias.reshape(over)


def batch_norm(a, norm):
    over = (-1, *[1] * (a.dim() - 2))
    dims = (0, *range(2, a.dim()))
    var, mean = torch.var_mean(a, dims, correction=0, keepdim=True)
    return (a - mean) / (var + norm.eps).sqrt() * norm.weight.reshape(over) + norm.bias.reshape(over)


NORMS = {"layer": layer_norm, "batch": batch_norm}


def signals(place):
    torch.manual_seed(0)
    e = torch.randn(N, C, *PLACES[place], **F64).requires_grad_()
    v = torch.randn(N, ABOVE, *PLACES[place], **F64).requires_grad_()
    return e, v


def same_with_gradients(gate, plain, e, v):
    wanted = [e, v, *gate.parameters()]
    out, expected = gate(e, v), plain()
    weight = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad((out * weight).sum(), wanted)
    for grad, other in zip(grads, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize(("kind", "place"), [("g1", "dense"), ("convg1", "pitch"), ("convg1", "image")])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_g1_is_its_formula(kind, place, norm):
    e, v = signals(place)
    gate = shaken(DecoderGate(kind, e.shape[1:], v.shape[1:], norm=norm, **F64))
    w = gate.combinator.weight

    def plain():
        u = NORMS[norm](linear(gate.top.map, v), gate.norm)
        mu = f(u, w[:5])
        return (e - mu) * f(u, w[5:]) + mu

    same_with_gradients(gate, plain, e, v)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("kind", ["convg2", "convg3"])
def test_the_gates_of_both_inputs_are_their_formulas(kind, place, norm):
    e, v = signals(place)
    gate = shaken(DecoderGate(kind, e.shape[1:], v.shape[1:], norm=norm, **F64))
    weight = torch.cat((gate.top.map.weight, gate.lateral.map.weight), 1)  # over [v, e]

    def plain():
        convolve = (F.linear, F.conv1d, F.conv2d)[e.dim() - 2]
        a = convolve(torch.cat((v, e), 1), weight, None, **({"padding": 1} if e.dim() > 2 else {}))
        first, second = NORMS[norm](a, gate.norm).chunk(2, 1)
        if kind == "convg3":
            r = first.sigmoid()
            return r * e + (1 - r) * second
        mu = f(first, gate.mu)
        return (e - mu) * second.sigmoid() + mu

    same_with_gradients(gate, plain, e, v)


def test_the_papers_norms_are_the_default():
    assert isinstance(DecoderGate("g1", (C,), (ABOVE,)).norm, StepBatchNorm)
    assert not isinstance(DecoderGate("convg1", (C, 5, 5), (ABOVE, 5, 5)).norm, StepBatchNorm)


@pytest.mark.parametrize("kind", ["g1", "convg1", "convg2", "convg3"])
def test_at_first_every_signal_passes_a_gate(kind):
    e, v = signals("dense")
    gate = DecoderGate(kind, e.shape[1:], v.shape[1:], **F64)
    gate(e, v).square().sum().backward()
    assert e.grad.abs().min() > 0
    assert v.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in gate.parameters())


@pytest.mark.parametrize(
    ("above", "below", "options"),
    [
        ((5, 4, 3), (2, 8, 6), {}),
        ((5, 4, 3), (2, 8, 6), {"upsample": "transposed"}),
        ((5, 4, 3), (2, 7, 6), {}),  # a stride of 2 from an odd size
        ((5, 4, 3), (2, 7, 5), {"upsample": "transposed"}),
        ((5, 11), (2, 88), {"upsample": "transposed", "kernel_size": 9}),
        ((5,), (2, 8, 6), {}),
    ],
)
def test_signals_from_above_come_to_the_shape_below(above, below, options):
    down = TopDown(above, below, **options)
    assert down(torch.randn(N, *above)).shape == (N, *below)


def test_a_mean_over_positions_comes_back_to_all_of_them():
    e, v = torch.randn(N, C, 6, 6), torch.randn(N, ABOVE)
    for kind in ("convg1", "convg2"):
        gate = DecoderGate(kind, (C, 6, 6), (ABOVE,), broadcast=True)
        full = DecoderGate(kind, (C, 6, 6), (ABOVE, 6, 6), kernel_size=1)
        state = gate.state_dict()
        state["top.map.weight"] = state["top.map.weight"][..., None, None]
        if gate.lateral is not None:
            full.lateral = gate.lateral
        full.load_state_dict(state)
        torch.testing.assert_close(gate(e, v), full(e, v[..., None, None].expand(-1, -1, 6, 6)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("g2", (4,), (4,)), "kind must be one of g1, convg1, convg2, convg3; got 'g2'"),
        (("g1", (4, 5), (4, 5)), "g1 is for dense levels"),
        (("convg1", (4,), (4, 5)), r"shape \(4, 5\) cannot go down to a level of shape \(4,\)"),
        (("convg1", (4, 5), (4, 5), 4), "kernel_size must be odd and positive, got 4"),
        (("convg2", (4, 0, 6), (4, 3, 3)), "each size in shape must be at least 1, got 0"),
        (("convg2", (4, 6, 6), (4, 3, -3)), "each size in top_shape must be at least 1, got -3"),
    ],
)
def test_gates_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DecoderGate(*arguments)


def test_what_a_gate_refuses_to_read():
    gate, e, v = (
        DecoderGate("convg2", (C, 6, 6), (ABOVE, 3, 3)),
        torch.zeros(N, C, 6, 6),
        torch.zeros(N, ABOVE, 3, 3),
    )
    with pytest.raises(ValueError, match="v must have the 3 samples of e, got 1"):
        gate(e, v[:1])
    with pytest.raises(ValueError, match=r"e must have shape \(N, 4, 6, 6\), got \(3, 4, 1, 6\)"):
        gate(e[:, :, :1], v)
    with pytest.raises(ValueError, match=r"v must have shape \(N, 5, 3, 3\), got \(3, 5, 3\)"):
        gate(e, v[..., 0])
    with pytest.raises(TypeError, match="v must be a tensor, got list"):
        gate(e, v.tolist())


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (-1, ValueError, "step must not be negative, got -1"),
        ("x", TypeError, "step must be a whole number, got 'x'"),
        (0.5, TypeError, "step must be a whole number, got 0.5"),
    ],
)
def test_a_step_is_a_number_from_0(norm, step, error, message):
    x = torch.randn(N, C)
    gate, gru = (
        DecoderGate("g1", (C,), (C,), norm=norm, steps=2),
        LayerNormGRUCell(C, C, norm=norm, spatial=0),
    )
    for call in (lambda: gate(x, x, step), lambda: gru(x, None, step)):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TopDown((), (4,)),
            TypeError,
            r"in_shape must be a sequence \(C, \*\) of whole numbers, got \(\)",
        ),
        (
            lambda: TopDown((4,), 4),
            TypeError,
            r"out_shape must be a sequence \(C, \*\) of whole numbers, got 4",
        ),
        (lambda: TopDown((4, 3), (4, 3), "3"), TypeError, "kernel_size must be a whole number, got '3'"),
        (lambda: StepBatchNorm(0), ValueError, "num_features must be at least 1, got 0"),
        (lambda: StepBatchNorm(3, 2.5), TypeError, "steps must be a whole number, got 2.5"),
        (
            lambda: StepBatchNorm(3, momentum=-1),
            ValueError,
            "momentum must be finite and not negative; got -1",
        ),
        (lambda: ChannelLayerNorm(-1), ValueError, "num_features must be at least 1, got -1"),
        (lambda: ChannelLayerNorm(3, eps="x"), TypeError, "eps must be a number; got 'x'"),
        (lambda: LayerNormGRUCell(3, 0), ValueError, "hidden_channels must be at least 1, got 0"),
        (lambda: LayerNormGRUCell(3, -1), ValueError, "hidden_channels must be at least 1, got -1"),
        (lambda: LayerNormGRUCell("ab", 4), TypeError, "in_channels must be a whole number, got 'ab'"),
        (lambda: LayerNormGRUCell((3, 2, 1), 4), ValueError, "in_channels must be one number or a pair"),
        (lambda: LayerNormGRUCell(3, 4, "3"), TypeError, "kernel_size must be a whole number, got '3'"),
        (lambda: LayerNormGRUCell(3, 4, 3, 0), ValueError, "stride must be at least 1, got 0"),
        (lambda: LayerNormGRUCell(3, 4, steps=0), ValueError, "steps must be at least 1, got 0"),
    ],
)
def test_sizes_that_are_none(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_a_gru_refuses_to_read():
    cell, x, h = LayerNormGRUCell(3, 4, spatial=0), torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(TypeError, match="x must be a tensor or a pair of tensors, got NoneType"):
        cell(None)
    with pytest.raises(
        TypeError, match=r"an input must have the dtype of the weights, torch.float32, got torch.float64"
    ):
        cell(x.double())
    with pytest.raises(TypeError, match="h must be a tensor, got list"):
        cell(x, h.tolist())
    with pytest.raises(
        TypeError, match=r"h must have the dtype of the weights, torch.float32, got torch.float64"
    ):
        cell(x, h.double())


def test_a_transposed_convolution_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="upsample must be nearest"):
        TopDown((4, 6), (4, 7), 5, upsample="transposed")


def test_without_norm_a_dense_gru_is_torchs():
    torch.manual_seed(0)
    theirs = nn.GRUCell(5, 4, **F64)
    ours = LayerNormGRUCell(5, 4, norm="none", spatial=0, **F64)
    with torch.no_grad():
        ours.inputs[0].weight.copy_(theirs.weight_ih)
        ours.bias.copy_(theirs.bias_ih)
        ours.recurrent.weight.copy_(theirs.weight_hh)
        ours.recurrent.bias.copy_(theirs.bias_hh)
    x, h = torch.randn(N, 5, **F64), torch.randn(N, 4, **F64)
    torch.testing.assert_close(ours(x, h), theirs(x, h))
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_convolutional_gru_normalises_its_inputs_apart():
    torch.manual_seed(0)
    cell = shaken(LayerNormGRUCell((2, 4), 4, 3, 2, spatial=1, **F64))
    x, d, h = (torch.randn(N, c, size, **F64) for c, size in ((2, 10), (4, 5), (4, 5)))

    def normalised(a, k):
        var, mean = torch.var_mean(a, (1, 2), correction=0, keepdim=True)
        return (a - mean) / (var + 1e-5).sqrt() * cell.norms[k].weight[:, None]

    a = normalised(F.conv1d(x, cell.inputs[0].weight, None, 2, 1), 0) + cell.bias[:, None]
    a = a + normalised(F.conv1d(d, cell.inputs[1].weight, None, 1, 1), 1)
    q = F.conv1d(h, cell.recurrent.weight, cell.recurrent.bias, 1, 1)
    (ar, az, an), (qr, qz, qn) = a.chunk(3, 1), q.chunk(3, 1)
    z = (az + qz).sigmoid()
    new = (an + (ar + qr).sigmoid() * qn).tanh()
    torch.testing.assert_close(cell((x, d), h), (1 - z) * new + z * h)


def test_a_dense_lstm_cell_is_the_sequences():
    torch.manual_seed(0)
    whole = LayerNormLSTM(5, 4, **F64)
    cell = LayerNormLSTMCell(5, 4, **F64)
    own = whole.cell.state_dict()
    own["weight_ih.0"] = own.pop("weight_ih")
    cell.load_state_dict(own)
    x = torch.randn(2, N, 5, **F64)
    out, _ = whole(x)
    state = None
    for t in range(2):
        state = cell(x[t], state)
        torch.testing.assert_close(state[0], out[t])


@pytest.mark.parametrize("dense", [True, False])
def test_a_second_input_of_none_is_one_of_zeros(dense):
    torch.manual_seed(0)
    if dense:
        cell, x, d = LayerNormLSTMCell((5, 4), 4), torch.randn(N, 5), torch.zeros(N, 4)
    else:
        cell, x, d = LayerNormConvLSTMCell((5, 4), 4, 3), torch.randn(N, 5, 6, 6), torch.zeros(N, 4, 6, 6)
    for one, other in zip(cell((x, None)), cell((x, d)), strict=True):
        assert one.equal(other)
    with pytest.raises(ValueError, match="takes 2 inputs, got 1"):
        cell(x)
    with pytest.raises(TypeError, match="first input must be a tensor"):
        cell((None, d))
    with pytest.raises(ValueError, match="an input must have shape"):
        cell((x, d[:, 1:]))


def test_each_of_the_first_steps_has_statistics_of_its_own():
    norm = StepBatchNorm(2, steps=2, momentum=1.0)
    shifts = (0.0, 10.0, 20.0)
    x = torch.randn(50, 2)
    for step, shift in enumerate(shifts):
        norm(x + shift, step)
    means = norm.running_mean.mean(1)
    assert abs(means[0]) < 1
    assert abs(means[1] - 20) < 1  # of the second step and all after it
    norm.eval()
    torch.testing.assert_close(norm(x, 0).mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    before = norm.running_mean.clone()
    norm.train().updating = False
    norm(x + 5, 0)
    assert norm.running_mean.equal(before)


def test_a_step_that_was_not_trained_is_evaluated_as_the_last_one_before_it():
    norm, x = StepBatchNorm(2, steps=4), 3 * torch.randn(50, 2) + 7
    assert norm.eval()(x, 3).allclose(x, atol=1e-4)  # nothing is known yet
    norm.train()
    for step in (0, 1):
        norm(x + step, step)
    norm.eval()
    for step in (2, 3, 9):
        assert norm(x, step).equal(norm(x, 1))
    assert not norm(x, 1).allclose(norm(x, 0), atol=1e-3)
    norm.train()(x + 3, 3)
    assert not norm.eval()(x, 3).allclose(norm(x, 1), atol=1e-3)
    assert norm(x, 2).equal(norm(x, 1))

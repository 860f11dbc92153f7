"""The layer-normalised LSTMs against plain networks written here, torch.nn.LSTM, and each other."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

import ladderfast
from ladderfast import _extension
from ladderfast.nn import LayerNormConvLSTM, LayerNormConvLSTMCell, LayerNormLSTM, LayerNormLSTMCell

OPTIONS = [
    {},
    {"stride": 2},
    {"padding": 0},
    {"dilation": 2, "padding": 3},
    {"groups": 2, "bias": False},
    {"stride": (2, 1), "padding": (0, 2), "kernel_size": (1, 5)},
]


def double(module):
    """Start values drawn anew, so that every parameter counts."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def plain_cell(cell, x, state, *, stride=1, padding=None, dilation=1, groups=1):
    """One step, written with torch's functions alone; the window is 3 where the test says nothing else."""

    def convolve(*args):
        y = {1: F.conv1d, 2: F.conv2d}[x.dim() - 2](*args)
        return y.unflatten(1, (groups, 4, -1)).transpose(1, 2).flatten(1, 3)

    kernel = cell.weight_hh.shape[2:]
    same = [dilation * (k - 1) // 2 for k in kernel]
    a = convolve(x, cell.weight_ih[0], None, stride, same if padding is None else padding, dilation, groups)
    if cell.norm == "layer":
        a = F.layer_norm(a, a.shape[1:], eps=cell.eps)
        a = a * cell.norm_weight[0].view(-1, *[1] * (x.dim() - 2))
    if cell.bias is not None:
        a = a + cell.bias.view(-1, *[1] * (x.dim() - 2))
    if state is None:
        c = a.new_zeros(a.shape[0], a.shape[1] // 4, *a.shape[2:])
    else:
        c = state[1]
        a = a + convolve(state[0], cell.weight_hh, None, 1, same, dilation, groups)
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def plain_sequence(module, x, state=None, **options):
    outputs = []
    for step in x:
        state = plain_cell(module.cell, step, state, **options)
        outputs.append(state[0])
    return torch.stack(outputs), state


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sequence_is_the_plain_network(options, norm):
    for axes in [2] if "kernel_size" in options else [1, 2]:
        arguments = {"kernel_size": 3, **options}
        module = double(LayerNormConvLSTM(4, 6, norm=norm, spatial=axes, **arguments))
        x = torch.randn(3, 2, 4, *(7, 8)[:axes], dtype=torch.float64, requires_grad=True)
        plain = {k: v for k, v in options.items() if k not in ("bias", "kernel_size")}
        expected, (h, c) = plain_sequence(module, x, **plain)
        output, state = module(x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(state, (h[None], c[None]))
        wanted = [x, *module.parameters()]
        weights = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(output, wanted, weights), torch.autograd.grad(expected, wanted, weights)
        )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_without_norm_is_torch_lstm(bias, batch_first):
    theirs = torch.nn.LSTM(5, 7, bias=bias, batch_first=batch_first)
    ours = LayerNormLSTM(5, 7, bias=bias, batch_first=batch_first, norm="none")
    with torch.no_grad():
        ours.cell.weight_ih.copy_(theirs.weight_ih_l0)
        ours.cell.weight_hh.copy_(theirs.weight_hh_l0)
        if bias:
            ours.cell.bias.copy_(theirs.bias_ih_l0 + theirs.bias_hh_l0)
    x = torch.randn(3, 4, 5)
    state = tuple(torch.randn(1, 3 if batch_first else 4, 7) for _ in range(2))
    for given in (None, state):
        torch.testing.assert_close(ours(x, given), theirs(x, given))
    a, b = ours(x, state)[0].square().sum(), theirs(x, state)[0].square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(a, [ours.cell.weight_ih, ours.cell.weight_hh]),
        torch.autograd.grad(b, [theirs.weight_ih_l0, theirs.weight_hh_l0]),
    )


def test_dense_with_norm():
    module = double(LayerNormLSTM(3, 4))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    cell = module.cell
    h = c = x.new_zeros(2, 4)
    for step, found in zip(x, module(x)[0], strict=True):
        a = (
            F.layer_norm(step @ cell.weight_ih.t(), (16,), cell.norm_weight[0], cell.bias)
            + h @ cell.weight_hh.t()
        )
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        torch.testing.assert_close(found, h)


@pytest.mark.parametrize("norm", ["layer", "batch", None])
def test_a_normalised_cell(norm):
    """tanh of the cell's layer norm; in evaluation as in training, and the cell state stays as it is."""
    cell = double(LayerNormConvLSTMCell(3, 4, 3, norm=norm, normalise_cell=True))
    x = torch.randn(5, 3, 6, 4, dtype=torch.float64)
    state = tuple(torch.randn(5, 4, 6, 4, dtype=torch.float64) for _ in range(2))
    for training in (True, False):
        h, c = cell.train(training)(x, state)
        plain = copy.deepcopy(cell)
        plain.cell_weight = plain.cell_bias = None
        raw, same = plain(x, state)
        torch.testing.assert_close(c, same)
        n = F.layer_norm(c, c.shape[1:], eps=cell.eps) * cell.cell_weight.view(4, 1, 1)
        torch.testing.assert_close(h, raw / c.tanh() * (n + cell.cell_bias.view(4, 1, 1)).tanh())
    assert {"cell_weight", "cell_bias"} <= dict(cell.named_parameters()).keys()
    cell.reset_parameters()
    assert (cell.cell_weight == 1).all()
    assert (cell.cell_bias == 0).all()


def test_batch_norm_of_single_values_is_refused():
    with pytest.raises(ValueError, match="more than 1 value for each channel in training, got 1"):
        LayerNormLSTM(2, 3, norm="batch")(torch.randn(4, 1, 2))


@pytest.mark.parametrize("spatial", [1, 2])
def test_a_sequence_in_two_halves(spatial):
    module = LayerNormConvLSTM(2, 3, 3, spatial=spatial)
    x = torch.randn(6, 2, 2, *(5, 4)[:spatial])
    whole, end = module(x)
    first, state = module(x[:2])
    second, state = module(x[2:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(state, end)


def test_batch_first_is_the_same_transposed():
    module = LayerNormConvLSTM(2, 3, 3)
    first = LayerNormConvLSTM(2, 3, 3, batch_first=True)
    first.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 2, 5, 5)
    mask = torch.rand(4, 2) < 0.7
    output, state = module(x, mask=mask)
    by_batch, by_batch_state = first(x.transpose(0, 1), mask=mask.t())
    torch.testing.assert_close(by_batch, output.transpose(0, 1))
    torch.testing.assert_close(by_batch_state, state)


@pytest.mark.parametrize("dense", [False, True])
def test_mask_is_each_sequence_alone(dense):
    """Lengths 5, 2 and 0 in one batch: outputs are 0 after the end, the state is that at the end."""
    module = LayerNormLSTM(2, 3) if dense else LayerNormConvLSTM(2, 3, 3, spatial=1)
    x = torch.randn(5, 3, 2) if dense else torch.randn(5, 3, 2, 4)
    state = tuple(torch.randn(1, 3, 3, *x.shape[3:]) for _ in range(2))
    lengths = torch.tensor([5, 2, 0])
    mask = torch.arange(5)[:, None] < lengths
    for given in (state, None):
        output, end = module(x, given, mask)
        for n, length in enumerate(lengths.tolist()):
            one = None if given is None else tuple(t[:, n : n + 1] for t in given)
            if length == 0:
                expected = [torch.zeros_like(t[:, n]) for t in end] if one is None else [t[:, 0] for t in one]
                torch.testing.assert_close([t[:, n] for t in end], expected)
            else:
                alone, alone_end = module(x[:length, n : n + 1], one)
                torch.testing.assert_close(output[:length, n : n + 1], alone)
                torch.testing.assert_close([t[:, n : n + 1] for t in end], list(alone_end))
            assert not output[length:, n].any()
    x.requires_grad_()
    module(x, state, mask)[0].square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[2:, 1].any()


@pytest.mark.parametrize("dense", [False, True])
def test_two_inputs_have_batch_norms_of_their_own(dense):
    cell = (
        LayerNormLSTMCell((3, 5), 4, norm="batch")
        if dense
        else LayerNormConvLSTMCell((3, 5), 4, 3, norm="batch")
    )
    cell = double(cell)
    size = () if dense else (4, 4)
    x, d = torch.randn(6, 3, *size).double(), torch.randn(6, 5, *size).double()
    gates = cell.project((x, d))
    a = sum(
        F.batch_norm(g, None, None, m.weight, None, True) for g, m in zip(gates, cell.batch_norm, strict=True)
    )
    i, _, g, o = (a + cell.bias.view(-1, *[1] * len(size))).chunk(4, 1)
    c = i.sigmoid() * g.tanh()
    torch.testing.assert_close(cell((x, d)), (o.sigmoid() * c.tanh(), c))
    for g, module in zip(gates, cell.batch_norm, strict=True):
        torch.testing.assert_close(module.running_mean, 0.1 * g.mean((0, *range(2, g.dim()))))


def test_groups_are_cells_of_their_own():
    """Without a norm, which would connect them."""
    both = double(LayerNormConvLSTMCell((4, 2), 6, 3, groups=2, norm=None))
    x, feedback = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 2, 5, 5).double()
    state = tuple(torch.randn(2, 6, 5, 5).double() for _ in range(2))
    found = both((x, feedback), state)
    for group in range(2):
        one = LayerNormConvLSTMCell((2, 1), 3, 3, norm=None).double()
        with torch.no_grad():
            for mine, theirs in zip(one.weight_ih, both.weight_ih, strict=True):
                mine.copy_(theirs.chunk(2)[group])
            one.weight_hh.copy_(both.weight_hh.chunk(2)[group])
            one.bias.copy_(both.bias.view(4, 2, 3)[:, group].flatten())
        inputs = (x.chunk(2, 1)[group], feedback.chunk(2, 1)[group])
        alone = one(inputs, tuple(t.chunk(2, 1)[group] for t in state))
        torch.testing.assert_close([t.chunk(2, 1)[group] for t in found], list(alone))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("norm", ["layer", "batch", None])
def test_a_second_input_that_is_not_there_adds_nothing(norm, dense):
    if dense:
        cell, x, d = LayerNormLSTMCell((3, 5), 4, norm=norm), torch.randn(6, 3), torch.randn(6, 5)
    else:
        cell = LayerNormConvLSTMCell((3, 5), 4, 3, norm=norm)
        x, d = torch.randn(6, 3, 4, 4), torch.randn(6, 5, 4, 4)
    for _ in range(3):
        cell((x + 2, d - 3))  # running statistics that are not those of zeros
    if norm == "batch":
        before = cell.batch_norm[1].running_mean.clone()
        cell((x, None))
        assert torch.equal(cell.batch_norm[1].running_mean, before)
    found = cell.eval()((x, None))
    one = LayerNormLSTMCell(3, 4, norm=norm) if dense else LayerNormConvLSTMCell(3, 4, 3, norm=norm)
    own = {k: v for k, v in cell.state_dict().items() if ".1" not in k}
    one.load_state_dict(own)
    torch.testing.assert_close(found, one.eval()(x))


@pytest.mark.parametrize("dense", [False, True])
def test_batch_norm_leaves_out_what_is_masked(dense):
    module = (
        LayerNormLSTM(2, 3, norm="batch") if dense else LayerNormConvLSTM(2, 3, 3, norm="batch", spatial=1)
    )
    x = torch.randn(5, 4, 2) if dense else torch.randn(5, 4, 2, 4)
    mask = torch.arange(5)[:, None] < torch.tensor([5, 4, 3, 0])
    other = torch.where(mask.view(5, 4, *[1] * (x.dim() - 2)), x, 100.0)
    a, b = copy.deepcopy(module), copy.deepcopy(module)
    torch.testing.assert_close(a(x, None, mask), b(other, None, mask))
    torch.testing.assert_close(a.state_dict(), b.state_dict())
    first = copy.deepcopy(module)
    three = first(x[:3, :3])[0]  # the steps at which none of the first three is masked
    torch.testing.assert_close(a(x, None, mask)[0][:3, :3], three)
    updates = int(module.cell.batch_norm[0].num_batches_tracked)
    module(x, None, mask)
    # The last step has one sample: in the dense network a single value, which has no statistics.
    assert module.cell.batch_norm[0].num_batches_tracked == updates + (4 if dense else 5)


def test_two_inputs():
    cell = double(LayerNormConvLSTMCell((3, 5), 4, 3, stride=2, padding=1))
    x, feedback = torch.randn(2, 3, 8, 6).double(), torch.randn(2, 5, 4, 3).double()
    state = tuple(torch.randn(2, 4, 4, 3).double() for _ in range(2))
    a = F.group_norm(F.conv2d(x, cell.weight_ih[0], None, 2, 1), 1, cell.norm_weight[0], cell.bias)
    a = a + F.group_norm(F.conv2d(feedback, cell.weight_ih[1], None, 1, 1), 1, cell.norm_weight[1])
    a = a + F.conv2d(state[0], cell.weight_hh, None, 1, 1)
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    torch.testing.assert_close(cell((x, feedback), state), (o.sigmoid() * c.tanh(), c))


@pytest.mark.parametrize("spatial", [0, 1, 2])
def test_batch_norm_in_the_place_of_layer_norm(spatial):
    if spatial:
        module = LayerNormConvLSTM(2, 3, 3, norm="batch", spatial=spatial)
        x = torch.randn(1, 6, 2, *(5, 4)[:spatial])
    else:
        module, x = LayerNormLSTM(2, 3, norm="batch"), torch.randn(1, 6, 2)
    module = double(module)
    x = x.double()
    gates = module.cell.project((x[0],))[0]
    weight = module.cell.batch_norm[0].weight

    def shaped(vector):
        return vector.view(-1, *[1] * spatial)

    def activated(a):
        i, _, g, o = a.chunk(4, 1)
        return o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()

    axes = (0, *range(2, gates.dim()))
    trained = module(x)[0][0]
    torch.testing.assert_close(
        trained, activated(F.batch_norm(gates, None, None, weight, module.cell.bias, True))
    )
    running = module.cell.batch_norm[0]
    torch.testing.assert_close(running.running_mean, 0.1 * gates.mean(axes))
    torch.testing.assert_close(running.running_var, 0.9 + 0.1 * gates.var(axes))
    assert running.num_batches_tracked == 1
    found = module.eval()(x)[0][0]
    a = (gates - shaped(running.running_mean)) / (shaped(running.running_var) + 1e-5).sqrt()
    torch.testing.assert_close(found, activated(a * shaped(weight) + shaped(module.cell.bias)))


def test_start_values():
    module = LayerNormConvLSTM(8, 4, 3, forget_bias=2.0)
    cell = module.cell
    assert cell.bias.tolist() == [0.0] * 4 + [2.0] * 4 + [0.0] * 8
    assert (cell.norm_weight[0] == 1).all()
    bound = (8 * 9) ** -0.5
    assert 0.9 * bound < cell.weight_ih[0].abs().max() <= bound
    dense = LayerNormLSTM(8, 4).cell
    assert 0.9 * 4**-0.5 < dense.weight_ih.abs().max() <= 4**-0.5
    assert dense.bias[4:8].eq(1).all()


def test_channels_last_in_and_out():
    module = LayerNormConvLSTMCell(3, 4, 3)
    x = torch.randn(2, 3, 6, 5)
    expected = module(x)
    h, c = copy.deepcopy(module).to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close((h, c), expected)
    assert h.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def every_size_is_large(monkeypatch):
    monkeypatch.setattr("ladderfast.nn.ln_convlstm._LARGE", 0)


needs_kernels = pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))


@pytest.fixture
def two_samples_at_once(monkeypatch):
    monkeypatch.setattr("ladderfast.nn.ln_convlstm._AT_ONCE", 2 * 4 * 5 * 6 * 7)
    monkeypatch.setattr("ladderfast.nn.ln_convlstm._WEIGHT_PART", 1)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("every_size_is_large", "two_samples_at_once")
def test_the_layout_within_a_sequence_does_not_show(given, masked, channels, norm):
    """In float32 a sequence runs with the channels last and two samples at once; in float64, with which it is compared,
    as it comes."""
    module = LayerNormConvLSTM(channels, 5, 3, norm=norm, batch_first=True)
    assert module.cell.samples_at_once(torch.empty(4, 3, channels, 6, 7)) == (3 if norm == "batch" else 2)
    x = torch.randn(3, 4, channels, 6, 7, requires_grad=True)
    state = tuple(torch.randn(1, 3, 5, 6, 7, requires_grad=True) for _ in range(2)) if given else None
    mask = torch.rand(3, 4) < 0.7 if masked else None
    assert module.cell.prefers_channels_last(x.transpose(0, 1))
    grads = torch.randn(3, 4, 5, 6, 7), torch.randn(1, 3, 5, 6, 7), torch.randn(1, 3, 5, 6, 7)

    def run(module, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *(state or ()))]
        output, new = module(inputs[0], tuple(inputs[1:]) or None, mask)
        wanted = [*inputs, *module.parameters()]
        of_all = torch.autograd.grad((output, *new), wanted, [g.to(dtype) for g in grads], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in of_all), wanted)
        return output, *new, *of_all, *second

    found, expected = run(module, torch.float32), run(copy.deepcopy(module).double(), torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()))
    assert all(t.is_contiguous() for t in found[:3])
    with torch.no_grad():
        torch.testing.assert_close(module(x, state, mask)[0], found[0].detach())


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "wanted", [("x",), ("h",), ("c",), ("weight_ih", "bias"), ("x", "h", "c", "weight_hh", "norm")]
)
@pytest.mark.usefixtures("every_size_is_large", "two_samples_at_once")
@needs_kernels
def test_one_node_makes_the_gradients_that_are_wanted(norm, bias, wanted):
    module = LayerNormConvLSTM(3, 5, (3, 5), stride=(1, 2), padding=(1, 1), norm=norm, bias=bias)
    cell = module.cell
    x, h, c = torch.randn(4, 5, 3, 6, 7), torch.randn(1, 5, 5, 6, 3), torch.randn(1, 5, 5, 6, 3)
    tensors = {"x": x, "h": h, "c": c, "weight_ih": cell.weight_ih[0], "weight_hh": cell.weight_hh}
    if norm == "layer":
        tensors["norm"] = cell.norm_weight[0]
    if bias:
        tensors["bias"] = cell.bias
    module.requires_grad_(False)
    of = [tensors[name].requires_grad_() for name in wanted if name in tensors]
    assert cell.is_one_node(x, (h, c))

    def run(dtype):
        copied = copy.deepcopy(module).to(dtype)
        own = [p for p in copied.parameters() if p.requires_grad]
        inputs = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (x, h, c)]
        output, last = copied(inputs[0], (inputs[1], inputs[2]))
        own = [t for t in inputs if t.requires_grad] + own
        # Only one of the states: the other has no gradient that comes in.
        return torch.autograd.grad(output.square().sum() + last[1 - bias].square().sum(), own)

    assert len(of) > 0
    for a, b in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.usefixtures("every_size_is_large")
@needs_kernels
def test_one_node_within_a_checkpoint():
    module, x = LayerNormConvLSTM(3, 5, 3), torch.randn(2, 3, 3, 6, 7)
    assert module.cell.is_one_node(x, None)
    wanted = list(module.parameters())
    output = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    found = torch.autograd.grad(output.square().sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(module(x)[0].square().sum(), wanted))


@pytest.mark.usefixtures("every_size_is_large")
def test_what_is_not_one_node():
    x = torch.zeros(2, 3, 3, 6, 7)
    with torch.no_grad():
        assert not LayerNormConvLSTM(3, 5, 3).cell.is_one_node(x, None)
    assert not LayerNormConvLSTM(3, 5, 3).requires_grad_(False).cell.is_one_node(x, None)
    assert not LayerNormConvLSTM(3, 5, 3, norm="batch").cell.is_one_node(x, None)
    assert not LayerNormConvLSTM(3, 5, 3, normalise_cell=True).cell.is_one_node(x, None)
    with ladderfast.use_backend("reference"):
        assert not LayerNormConvLSTM(3, 5, 3).cell.is_one_node(x, None)


@pytest.mark.usefixtures("every_size_is_large")
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_one_channel_strided_to_a_single_column(norm):
    """oneDNN's convolution with the channels last is wrong there."""
    module = LayerNormConvLSTM(1, 16, 3, (1, 2), 0, norm=norm)
    x = torch.randn(2, 20, 1, 30, 3)
    expected = copy.deepcopy(module).double()(x.double())[0]
    torch.testing.assert_close(module(x)[0].double(), expected, rtol=1e-4, atol=1e-5)
    for size, stride in (((30, 5), (1, 2)), ((3, 30), (2, 1))):
        cell = LayerNormConvLSTM(1, 16, 3, stride, 0).cell
        assert cell.prefers_channels_last(torch.empty(2, 20, 1, *size))


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize(
    ("make", "size"), [(LayerNormLSTM, ()), (lambda *a, **k: LayerNormConvLSTM(*a, 3, **k), (5, 6))]
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_what_a_mask_leaves_out_may_be_anything(make, size, norm, batch_first):
    module = make(3, 4, norm=norm, batch_first=batch_first)
    x, mask = torch.randn(3, 4, 3, *size), torch.rand(3, 4) < 0.6
    found = []
    for value in (0.0, math.nan, math.inf):
        padded = x.clone()
        padded[~mask] = value
        padded.requires_grad_()
        same = copy.deepcopy(module)
        output, state = same(padded, mask=mask)
        loss = output.square().sum() + sum(t.sum() for t in state)
        found.append((output, *torch.autograd.grad(loss, [padded, *same.parameters()])))
        assert output.is_contiguous()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_few_gates_stay_as_they_are():
    cell = LayerNormConvLSTM(3, 32, 3).cell
    assert cell.prefers_channels_last(torch.empty(10, 16, 3, 32, 32))
    assert not cell.prefers_channels_last(torch.empty(10, 8, 3, 32, 32))
    assert not LayerNormConvLSTM(3, 32, 3, stride=2).cell.prefers_channels_last(torch.empty(1, 16, 3, 32, 32))


@pytest.mark.parametrize(
    ("inputs", "hidden", "samples", "size", "at_once"),
    [(3, 32, 16, 32, 8), (3, 32, 64, 32, 8), (3, 32, 16, 128, 1), (3, 64, 16, 32, 16), (64, 32, 16, 32, 16)],
)
def test_samples_are_taken_at_once_by_the_size_of_their_gates(inputs, hidden, samples, size, at_once):
    cell = LayerNormConvLSTM(inputs, hidden, 3).cell
    assert cell.samples_at_once(torch.empty(2, samples, inputs, size, size, device="meta")) == at_once
    assert LayerNormConvLSTM(3, 32, 3, norm="batch").cell.samples_at_once(torch.empty(2, 16, 3, 32, 32)) == 16


@pytest.mark.usefixtures("every_size_is_large", "two_samples_at_once")
@pytest.mark.parametrize("stride", [1, 2])
def test_a_state_is_checked_before_it_is_cut(stride):
    module = LayerNormConvLSTM(3, 5, 3, stride=stride)
    x = torch.randn(2, 5, 3, 6, 7)
    h = torch.zeros(1, 3, 5, 6, 7)
    size = (6, 7) if stride == 1 else (3, 4)
    with pytest.raises(
        ValueError, match=re.escape(f"h must have shape {(1, 5, 5, *size)}, got (1, 3, 5, 6, 7)")
    ):
        module(x, (h, h))
    with pytest.raises(TypeError, match="state must be a pair"):
        module(x, h)


def test_a_sequence_that_comes_channels_last_is_the_same(every_size_is_large):
    module = LayerNormConvLSTM(3, 4, 3)
    x = torch.randn(2, 2, 3, 6, 5)
    output, state = module(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        other = copy.deepcopy(module).to(memory_format=memory_format)
        laid = torch.stack([t.contiguous(memory_format=torch.channels_last) for t in x])
        assert not other.cell.prefers_channels_last(laid)
        torch.testing.assert_close(other(laid), (output, state))


@pytest.mark.usefixtures("every_size_is_large")
def test_a_sequence_with_the_wrong_number_of_channels():
    module = LayerNormConvLSTM(3, 5, 3)
    with pytest.raises(ValueError, match=re.escape("shape (N, 3, H, W), got (2, 4, 6, 7)")):
        module(torch.randn(2, 2, 4, 6, 7))


@needs_kernels
@pytest.mark.usefixtures("every_size_is_large")
def test_inputs_of_one_node_that_depend_on_each_other():
    """With hooks, and a weight that is two of the inputs: gradients that are themselves differentiable are the same as
    without a graph, and as those of the steps in float64, which are no node."""
    module = LayerNormConvLSTM(3, 3, 3)
    module.cell.weight_hh = module.cell.weight_ih[0]
    exact = copy.deepcopy(module).double()
    x = torch.randn(2, 2, 3, 6, 5, requires_grad=True)

    def gradients(module, x, graph):
        start = (x[0] * 0.5).tanh()[None]
        assert module.cell.prefers_channels_last(x) == (x.dtype == torch.float32)
        weight = module.cell.weight_hh
        hooks = [t.register_hook(lambda g: g * 3) for t in (x, start, weight)]
        loss = module(x, (start, start * 2))[0].square().sum()
        first = torch.autograd.grad(loss, [x, weight], create_graph=graph)
        second = torch.autograd.grad(first[0].square().sum(), [weight, x]) if graph else ()
        for hook in hooks:
            hook.remove()
        return first, second

    expected = gradients(exact, x.detach().double().requires_grad_(), True)
    found = gradients(module, x, True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, tuple(t.float() for t in b), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(module, x, False)[0], found[0])


@needs_kernels
@pytest.mark.usefixtures("every_size_is_large")
def test_differentiable_gradients_of_one_node_under_autocast():
    module, x = LayerNormConvLSTM(3, 5, 3), torch.randn(2, 3, 3, 6, 7)
    loss = module(x)[0].square().sum()
    wanted = list(module.parameters())
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(loss, wanted, create_graph=True), expected)


def test_many_gradients_of_a_sequence_at_once(every_size_is_large):
    module = LayerNormConvLSTM(3, 4, 3)
    x = torch.randn(2, 2, 3, 6, 5, requires_grad=True)
    assert module.cell.prefers_channels_last(x)
    output = module(x)[0]
    grads = torch.randn(3, *output.shape)
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad(output, wanted, grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        torch.testing.assert_close(
            [g[k] for g in found], list(torch.autograd.grad(output, wanted, grad, retain_graph=True))
        )


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_tangents_of_a_sequences_gradients_are_not_dropped(every_size_is_large):
    """They are refused, as everywhere in the ops."""
    module = LayerNormConvLSTM(3, 4, 3)
    x = torch.randn(5, 2, 3, 6, 5, requires_grad=True)
    output = module(x)[0]
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.autograd.grad(output, x, grad)


def test_compile_fullgraph():
    module = LayerNormConvLSTM(2, 3, 3)
    x = torch.randn(2, 2, 2, 5, 5)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    wanted = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(compiled(x)[0].sum(), wanted),
        torch.autograd.grad(module(x)[0].sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_autocast_runs_and_stays_near():
    module = LayerNormConvLSTM(2, 3, 3)
    x = torch.randn(3, 2, 2, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)[0]
    torch.testing.assert_close(output.float(), module(x)[0], rtol=0.05, atol=0.05)


def test_gradcheck():
    module = double(LayerNormConvLSTM(1, 2, 3, spatial=1))
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))[0]

    x = torch.randn(3, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerNormConvLSTM(3, 4, 2), r"kernel_size \(2, 2\).*must be even"),
        (lambda: LayerNormConvLSTM(3, 4, (3, 3, 3)), "kernel_size must be one number or 2"),
        (
            lambda: LayerNormConvLSTM(3, 4, 3, stride=0),
            "stride must be one number or 2, each at least 1; got 0",
        ),
        (
            lambda: LayerNormConvLSTM(3, 4, 3, groups=2),
            "in_channels must be a positive multiple of groups, 2; got 3",
        ),
        (
            lambda: LayerNormConvLSTM(3, 4, 3, norm="group"),
            "norm must be one of layer, batch, none, got 'group'",
        ),
        (lambda: LayerNormConvLSTM(3, 4, 3, spatial=3), "spatial must be 1 or 2, got 3"),
        (lambda: LayerNormConvLSTM(3, 0, 3), "hidden size must be at least 1, got 0"),
        (lambda: LayerNormLSTM(0, 3), "input_size must be at least 1, got 0"),
        (lambda: LayerNormConvLSTMCell((1, 2, 3), 4, 3), "in_channels must be one number or a pair"),
        (lambda: LayerNormLSTMCell((1, 2, 3), 4), "input_size must be one number or a pair"),
        (lambda: LayerNormLSTM(3, 4, eps=-1.0), "eps must be finite and not negative; got -1.0"),
        (lambda: LayerNormLSTM(3, 4, forget_bias=10**400), "forget_bias must be finite; got 10000"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerNormConvLSTM(3, 4, 3.0), "kernel_size must be one whole number or 2 of them, got 3.0"),
        (lambda: LayerNormConvLSTM(3, 4, "3"), "kernel_size must be one whole number or 2 of them, got '3'"),
        (lambda: LayerNormConvLSTM(3, None, 3), "hidden size must be a whole number, got None"),
        (lambda: LayerNormConvLSTM("3", 4, 3), "in_channels must be a whole number, got '3'"),
        (lambda: LayerNormLSTM(3.0, 4), "input_size must be a whole number, got 3.0"),
        (lambda: LayerNormLSTMCell(3.0, 4), "input_size must be a whole number, got 3.0"),
        (lambda: LayerNormConvLSTM((3, 2), 4, 3), r"in_channels must be a whole number, got \(3, 2\)"),
        (lambda: LayerNormConvLSTM(3, 4, 3, stride=True), "stride must be one whole number or 2 of them"),
        (lambda: LayerNormLSTM(3, 4, 2), "bias must be a bool; got int"),  # no number of layers
        (lambda: LayerNormLSTM(3, 4, batch_first="no"), "batch_first must be a bool; got str"),
        (lambda: LayerNormLSTM(3, 4, normalise_cell=1), "normalise_cell must be a bool; got int"),
        (lambda: LayerNormLSTM(3, 4, forget_bias="1"), "forget_bias must be a number; got '1'"),
        (lambda: LayerNormLSTM(3, 4)(None), r"x must be a tensor \(T, N, C, \*\), got NoneType"),
        (
            lambda: LayerNormLSTM(3, 4)(torch.zeros(2, 2, 3, dtype=torch.float64)),
            "x must have the dtype of the weights, torch.float32, got torch.float64",
        ),
        (
            lambda: LayerNormLSTM(3, 4)(torch.zeros(2, 2, 3), (torch.zeros(1, 2, 4).double(),) * 2),
            "h must have the dtype of the weights, torch.float32, got torch.float64",
        ),
        (lambda: LayerNormLSTM(3, 4)(torch.zeros(2, 2, 3), (None, None)), "h must be a tensor, got NoneType"),
        (
            lambda: LayerNormLSTM(3, 4)(torch.zeros(2, 2, 3), None, [[True]]),
            "mask must be a tensor, got list",
        ),
    ],
)
def test_wrong_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.usefixtures("every_size_is_large")
def test_a_kernel_wider_than_the_image_is_the_convolutions_to_refuse():
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        LayerNormConvLSTM(1, 4, 3, padding=0)(torch.zeros(2, 3, 1, 2, 9))


@pytest.mark.parametrize("cell", [LayerNormConvLSTMCell(3, 4, 3), LayerNormLSTMCell(3, 4)])
def test_wrong_inputs_of_a_cell(cell):
    x = torch.zeros(2, 3, *[5] * cell.spatial)
    for other in (None, 3, "x"):
        got = type(other).__name__
        with pytest.raises(TypeError, match=f"x must be a tensor or a pair of tensors, got {got}"):
            cell(other)
    with pytest.raises(TypeError, match="an input must be a tensor, got list"):
        cell((x.tolist(),))
    with pytest.raises(
        TypeError, match=r"an input must be a dense tensor; got one with layout torch.sparse_coo"
    ):
        cell(x.to_sparse())
    with pytest.raises(
        TypeError, match=r"an input must have the dtype of the weights, torch.float32, got torch.float64"
    ):
        cell(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cell(x.bfloat16())


def test_wrong_inputs():
    module, cell = LayerNormConvLSTM(3, 4, 3), LayerNormConvLSTMCell(3, 4, 3)
    x = torch.zeros(2, 2, 3, 5, 5)
    with pytest.raises(ValueError, match=r"x must have 5 axes, \(T, N, C, \*\); got shape \(2, 3, 5, 5\)"):
        module(x[0])
    with pytest.raises(ValueError, match="at least one time step"):
        module(x[:0])
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(2, 2\); got torch.float32 \(2, 2\)"):
        module(x, mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"an input must have shape \(N, 3, H, W\), got \(2, 2, 5, 5\)"):
        module(x[:, :, :2])
    with pytest.raises(ValueError, match=r"h must have shape \(1, 2, 4, 5, 5\), got \(2, 4, 5, 5\)"):
        module(x, (torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 5, 5)))
    with pytest.raises(ValueError, match=r"c must have shape \(2, 4, 5, 5\), got \(2, 3, 5, 5\)"):
        cell(x[0], (torch.zeros(2, 4, 5, 5), torch.zeros(2, 3, 5, 5)))
    with pytest.raises(TypeError, match=r"state must be a pair \(h, c\), got Tensor"):
        cell(x[0], torch.zeros(2, 4, 5, 5))
    with pytest.raises(ValueError, match="the cell takes 1 inputs, got 2"):
        cell((x[0], x[0]))


def test_state_dict_and_repr():
    module, other = LayerNormConvLSTM(3, 4, 3), LayerNormConvLSTM(3, 4, 3)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 2, 3, 5, 5)
    torch.testing.assert_close(other(x), module(x))
    assert "3, 4, kernel_size=(3, 3)" in repr(module)
    assert "5, 6, norm=layer" in repr(LayerNormLSTM(5, 6))

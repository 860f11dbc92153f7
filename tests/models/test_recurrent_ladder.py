"""The recurrent Ladder: its connections, its state, its sequences."""

import copy

import pytest
import torch

from ladderfast.models import Level, RLadder, RLadderState

N, T = 3, 4
IMAGE = [
    {"encoder": "input", "decoder": "convg1"},
    {"encoder": "conv", "channels": 3, "decoder": "convg3", "feedback": True},
    {"encoder": "convlstm", "channels": 4, "stride": 2, "decoder": "convg2"},
    {"encoder": "convgru", "channels": 5, "stride": 2, "decoder": "convg2", "upsample": "transposed"},
    {"encoder": "pool", "decoder": "g1"},
    {"encoder": "lstm", "channels": 6},
]
PITCH = [
    {"encoder": "convlstm", "channels": 3, "kernel_size": 5, "decoder": "convg2"},
    {"encoder": "conv", "channels": 4, "stride": 2, "norm": "layer"},
    {"encoder": "lstm", "channels": 5, "decoder": "convg3"},
    {"encoder": "gru", "channels": 4},
]
DENSE = [
    {"encoder": "input", "decoder": "g1"},
    {"encoder": "lstm", "channels": 6, "decoder": "g1"},
    {"encoder": "gru", "channels": 4, "decoder": "convg2"},
    {"encoder": "linear", "channels": 3, "activation": "tanh"},
]
NETWORKS = {"image": ((1, 8, 8), IMAGE), "pitch": ((1, 12), PITCH), "dense": ((5,), DENSE)}


def make(name="image", **options):
    torch.manual_seed(0)
    shape, levels = NETWORKS[name]
    options = {"out_channels": shape[0], "dtype": torch.float64, **options}
    if name != "pitch":
        options.setdefault("num_classes", 3)
    return RLadder(shape, levels, **options)


def sequence(name="image", steps=T):
    torch.manual_seed(1)
    return torch.randn(N, steps, *NETWORKS[name][0], dtype=torch.float64)


def walk(model, x, state=None):
    outputs = []
    for t in range(x.shape[1]):
        output, state = model.step(x[:, t], state)
        outputs.append(output)
    return outputs, state


def tensors(state):
    return [t for cell in state.cells for t in cell] + [d for d in state.feedback if d is not None]


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sequence_is_its_steps(name, norm):
    model, x = make(name, norm=norm, norm_steps=2), sequence(name)
    whole, after = model(x)
    steps, state = walk(model, x)
    for t, output in enumerate(steps):
        for one, all_ in zip(output, whole, strict=True):
            assert one is None if all_ is None else one.equal(all_[:, t])
    assert state.step == after.step == T
    assert all(a.equal(b) for a, b in zip(tensors(state), tensors(after), strict=True))
    assert whole.prediction.shape == x.shape


def test_a_sequence_goes_on_from_its_state():
    model, x = make().eval(), sequence()
    whole, _ = model(x)
    first, state = model(x[:, :2])
    second, _ = model(x[:, 2:], state)
    assert torch.cat((first.prediction, second.prediction), 1).equal(whole.prediction)
    assert not model(x[:, 2:])[0].prediction.equal(second.prediction)  # the state matters


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_part(name):
    model = make(name)
    output, _ = model(sequence(name))
    cost = output.prediction.square().sum() + output.top.square().sum()
    if output.logits is not None:
        cost = cost + output.logits.square().sum()
    cost.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def gradient(of, to):
    grads = torch.autograd.grad(of.square().sum(), to, allow_unused=True, retain_graph=True)
    return [g is not None and bool(g.any()) for g in grads]


LEVELS = [
    {"encoder": "convlstm", "channels": 4, "decoder": "convg2"},
    {"encoder": "conv", "channels": 5, "stride": 2, "decoder": "convg2"},
    {"encoder": "pool"},
    {"encoder": "lstm", "channels": 6},
]


def two_steps(**options):
    """The outputs of two steps and the state between them, whose tensors are leaves of the second step."""
    torch.manual_seed(0)
    model = RLadder((1, 8, 8), LEVELS, num_classes=3, out_channels=1, dtype=torch.float64, **options)
    x = torch.randn(N, 2, 1, 8, 8, dtype=torch.float64).requires_grad_()
    first, state = model.step(x[:, 0])
    second, _ = model.step(x[:, 1], state)
    return model, x, first, state, second


def test_all_three_connections_are_there_by_default():
    model, _, first, state, second = two_steps()
    assert state.feedback[1] is None  # a cell without a state takes none unless it is told to
    between = [*state.cells[0], *state.cells[3], state.feedback[0]]
    assert gradient(second.logits, between) == [True] * 5
    assert gradient(first.prediction, [model.gates["0"].lateral.map.weight]) == [True]
    assert gradient(second.logits, [model.gates["0"].top.map.weight]) == [True]


def test_without_feedback_nothing_of_the_decoder_comes_back():
    model, _, _, state, second = two_steps(feedback=False)
    assert state.feedback == (None,) * 4
    assert gradient(second.logits, list(model.gates.parameters())) == [False] * len(
        list(model.gates.parameters())
    )
    assert gradient(second.prediction, [*state.cells[0], *state.cells[3]]) == [True] * 4


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_feedback_starts_as_loud_as_it_is_told_to(name, norm):
    x = sequence(name)
    heard = {}
    for gain in (1, 0.01):
        model = make(name, norm=norm, feedback_gain=gain)
        _, state = model.step(x[:, 0])
        for level, d in enumerate(state.feedback):
            if d is not None:
                other = list(state.feedback)
                other[level] = d.flip(0)
                tops = [model.step(x[:, 1], s)[0].top for s in (state, state._replace(feedback=tuple(other)))]
                heard[level, gain] = (tops[0] - tops[1]).detach().norm()
    levels = [level for level, takes in enumerate(model.takes_feedback) if takes]
    assert sorted(heard) == [(level, gain) for level in levels for gain in (0.01, 1)]
    for level in levels:  # a hundredth, but for what is not linear behind it
        assert 0 < heard[level, 0.01] < 0.25 * heard[level, 1]


def test_the_prediction_starts_where_it_is_told_to():
    x = sequence()[:, 0]
    plain, other = (make(out_bias=b).step(x)[0].prediction for b in (0.0, 4.5))
    torch.testing.assert_close(other, plain + 4.5)


def test_without_lateral_connections_the_decoder_sees_the_top_alone():
    model, x, first, _, _ = two_steps(lateral=False)
    ours = model.encoder[0].cell.weight_ih[0]
    assert gradient(first.prediction, [ours, x]) == [True, True]  # through the top
    top = first.top
    (along,) = torch.autograd.grad(first.prediction.square().sum(), top, retain_graph=True)
    (through_top,) = torch.autograd.grad(top, ours, along, retain_graph=True)
    (whole,) = torch.autograd.grad(first.prediction.square().sum(), ours, retain_graph=True)
    torch.testing.assert_close(through_top, whole)


def test_without_recurrence_a_step_knows_the_past_by_feedback_alone():
    _, _, _, state, second = two_steps(recurrent=False)
    assert state.cells == ((),) * 4
    assert gradient(second.logits, [state.feedback[0]]) == [True]
    both_cut = two_steps(recurrent=False, feedback=False)
    (grad,) = torch.autograd.grad(both_cut[-1].logits.sum(), both_cut[1])
    assert not grad[:, 0].any()
    assert grad[:, 1].any()


def test_without_decoder_it_is_a_hierarchical_rnn():
    model = RLadder((1, 8, 8), LEVELS, num_classes=3, decoder=False)
    assert not model.gates
    output, state = model(torch.randn(N, T, 1, 8, 8))
    assert output.prediction is None
    assert state.feedback == (None,) * 4
    assert output.logits.shape == (N, T, 3)


def test_back_propagation_is_cut_where_it_was_said():
    model, x = make(norm="layer"), sequence(steps=5).requires_grad_()
    whole, _ = model(x)
    cut, _ = model(x, truncate=2)
    assert cut.logits.equal(whole.logits)

    def of(output, t):
        (grad,) = torch.autograd.grad(output.logits[:, t].sum(), x, retain_graph=True)
        return [bool(grad[:, s].any()) for s in range(5)]

    # Batch norm in cells without a state is within a step.
    assert of(whole, 4) == [True] * 5
    assert of(cut, 4) == [False, False, False, False, True]
    assert of(cut, 3) == [False, False, True, True, False]
    assert of(cut, 1) == [True, True, False, False, False]


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_checkpointed_gradients_are_the_same(norm):
    x = sequence()
    grads, means = [], []
    for every in (None, 1, 3):
        model = make(norm=norm, norm_steps=3)
        output, _ = model(x, truncate=3, checkpoint_every=every)
        (output.logits.square().sum() + output.prediction.square().sum()).backward()
        grads.append([p.grad for p in model.parameters()])
        means.append([b for key, b in model.named_buffers() if key.endswith("running_mean")])
    for other in (1, 2):
        for a, b in zip(grads[0], grads[other], strict=True):
            torch.testing.assert_close(a, b)
        assert all(a.equal(b) for a, b in zip(means[0], means[other], strict=True))  # counted once


def test_checkpointing_keeps_less():
    def kept(every):
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        model = make(norm="layer")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(sequence(steps=6), checkpoint_every=every)
        return total

    assert kept(3) < 0.5 * kept(None)


def test_a_masked_step_has_no_part_in_anything():
    x = sequence()
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    model = make(norm="batch", norm_steps=1)
    noise = torch.where(mask[..., None, None, None], x, torch.full_like(x, 1e3))
    one, after = model(x, mask=mask)
    means = [b.clone() for b in model.buffers()]
    model = make(norm="batch", norm_steps=1)
    other, _ = model(noise, mask=mask)
    assert one.prediction.equal(other.prediction)
    assert all(a.equal(b) for a, b in zip(means, model.buffers(), strict=True))
    assert not one.prediction[~mask].any()
    model.eval()
    alone, state = model(x[2:, :2])
    both, after = model(x, mask=mask)
    torch.testing.assert_close(both.logits[2:, :2], alone.logits)
    for a, b in zip(tensors(state), tensors(after), strict=True):
        torch.testing.assert_close(a, b[2:])


def test_a_state_can_be_folded_with_the_batch():
    model, x = make(norm="layer").eval(), sequence()
    _, state = model(x[:, :2])
    folded = state.map(lambda t: t.repeat_interleave(2, 0))
    both, _ = model.step(x[:, 2].repeat_interleave(2, 0), folded)
    alone, _ = model.step(x[:, 2], state)
    torch.testing.assert_close(both.prediction[::2], alone.prediction)
    assert not any(t.requires_grad for t in tensors(state.detach()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_16_bits(name, norm, training):
    """Beside the same network in float64, of the same values; all that passes between layers is of 16 bits."""
    model = make(name, norm=norm, dtype=torch.bfloat16).train(training)
    wide = copy.deepcopy(model).double()
    x = torch.randn(32, T, *NETWORKS[name][0]).bfloat16()  # statistics of a few would magnify what is rounded
    output, state = model(x)
    expected, _ = wide(x.double())
    results = [t for t in output if t is not None]
    assert {t.dtype for t in (*results, *tensors(state))} == {torch.bfloat16}
    for found, right in zip(results, (t for t in expected if t is not None), strict=True):
        away = (found.double() - right).abs().mean() / right.abs().mean()
        assert away < 0.04
    sum(t.float().sum() for t in results).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_it_computes_in_16_bits_under_autocast():
    model, x = make(dtype=torch.float32), sequence().float()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model(x)
        cost = output.logits.float().sum() + output.prediction.float().sum()
    cost.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("levels", "options", "message"),
    [
        ([], {}, "at least one level"),
        ([{"encoder": "rnn"}], {}, "level 0: encoder must be one of convlstm, .*got 'rnn'"),
        ([{"channels": 3}], {}, "level 0: encoder is missing"),
        ([{"encoder": "conv", "channel": 3}], {}, "level 0: unknown field channel"),
        ([{"encoder": "conv"}], {}, "level 0: encoder conv needs channels"),
        ([{"encoder": "pool", "channels": 3}], {}, "level 0: encoder pool has no channels of its own"),
        ([{"encoder": "conv", "channels": 3, "kernel_size": 2}], {}, "kernel_size must be odd, got 2"),
        (
            [{"encoder": "lstm", "channels": 3, "kernel_size": 5}],
            {},
            "encoder lstm has no use for kernel_size",
        ),
        ([{"encoder": "lstm", "channels": 3, "activation": "tanh"}], {}, "lstm has no use for activation"),
        ([{"encoder": "pool", "stride": 2}], {}, "pool has no use for stride, got 2"),
        ([{"encoder": "pool", "norm": "layer"}], {}, "pool has no use for norm, got 'layer'"),
        ([{"encoder": "conv", "channels": 3, "gate_norm": "batch"}], {}, "no use for gate_norm"),
        ([{"encoder": "conv", "channels": 3, "upsample": "transposed"}], {}, "no use for upsample"),
        (
            [{"encoder": "lstm", "channels": 3, "decoder": "g1", "gate_kernel_size": 5}],
            {},
            "encoder lstm with g1 has no use for gate_kernel_size, got 5",
        ),
        (
            [{"encoder": "conv", "channels": 3}, {"encoder": "input"}],
            {},
            "level 1: encoder input is for the lowest",
        ),
        (
            [{"encoder": "pool"}, {"encoder": "conv", "channels": 3}],
            {},
            "level 1: encoder conv needs positions",
        ),
        ([{"encoder": "lstm", "channels": 3, "stride": 2}], {}, "level 0: stride is for positions"),
        ([{"encoder": "conv", "channels": 3, "decoder": "convg2"}], {}, "highest level has no decoder"),
        ([{"encoder": "conv", "channels": 3, "feedback": True}], {}, "feedback needs a decoder"),
        ([{"encoder": "conv", "channels": 3}], {"num_classes": 3}, "num_classes needs a dense highest level"),
        (LEVELS, {"feedback": False}, "the decoder has no effect"),
        (LEVELS, {"feedback_gain": -1.0}, "feedback_gain must be finite and not negative, got -1.0"),
        (LEVELS, {"out_bias": float("nan"), "out_channels": 1}, "out_bias must be finite, got nan"),
        (LEVELS, {"out_bias": 1.0}, "out_bias has no effect without out_channels and must be 0; got 1.0"),
        (
            LEVELS,
            {"feedback_gain": 0.5, "feedback": False, "out_channels": 1},
            "feedback_gain has no effect where no level takes feedback and must be 1; got 0.5",
        ),
        (LEVELS, {"norm": "weight"}, "norm must be one of layer, batch, none; got 'weight'"),
    ],
)
def test_levels_that_do_not_fit_are_refused(levels, options, message):
    with pytest.raises(ValueError, match=message):
        RLadder((1, 8, 8), levels, **options)


def test_inputs_that_do_not_fit_are_refused():
    model, x = make(), sequence()
    with pytest.raises(ValueError, match=r"x must have shape \(N, T, 1, 8, 8\)"):
        model(x[:, 0])
    with pytest.raises(ValueError, match=r"x must have shape \(N, 1, 8, 8\)"):
        model.step(x[:, 0, :, :4])
    _, state = model.step(x[:, 0])
    with pytest.raises(ValueError, match="feedback of level 1 must have shape"):
        model.step(x[:2, 0], state)
    with pytest.raises(TypeError, match="state must be an RLadderState or None, got tuple"):
        model.step(x[:, 0], (None,))
    with pytest.raises(ValueError, match="state must have 6 levels, got 1"):
        model.step(x[:, 0], RLadderState(1, ((),), (None,)))
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        model(x, mask=torch.ones(N, T))
    with pytest.raises(ValueError, match="truncate must be at least 1"):
        model(x, truncate=0)
    for given, got in (
        (x.long(), "x must be a floating-point tensor, got torch.int64"),
        ([0.0], "x must be a floating-point tensor, got list"),
        (x.float(), "x must be torch.float64, as the network's parameters are, got torch.float32"),
    ):
        for call in (model, model.step):
            with pytest.raises(TypeError, match=got):
                call(given)


def test_a_state_that_is_none_of_the_network_is_refused():
    model, x = make(), sequence()
    _, state = model(x)
    lowest = state.cells[2]
    for cells, feedback, error, message in (
        ((lowest[0],), state.feedback[2], ValueError, "state of level 2 must hold 2 tensors, got 1"),
        ((*lowest, lowest[0]), state.feedback[2], ValueError, "state of level 2 must hold 2 tensors, got 3"),
        (
            [t.float() for t in lowest],
            None,
            TypeError,
            "state of level 2 must be torch.float64 on cpu, as x is",
        ),
        ([None, None], None, TypeError, "state of level 2 must be a floating-point tensor, got NoneType"),
        (lowest, x[:, 0], ValueError, "feedback of level 2 must have shape"),
    ):
        given = state._replace(
            cells=(*state.cells[:2], tuple(cells), *state.cells[3:]),
            feedback=(*state.feedback[:2], feedback, *state.feedback[3:]),
        )
        with pytest.raises(error, match=message):
            model(x, given)
    without = make(feedback=False)
    with pytest.raises(ValueError, match="feedback of level 1 must hold 0 tensors, got 1"):
        without(x, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": "abc"}, r"input_shape must be \(C, H, W\), \(C, L\) or \(features,\), got 'abc'"),
        ({"input_shape": (1, 8.0, 8)}, "an entry of input_shape must be a whole number, got 8.0"),
        ({"num_classes": 2.5}, "num_classes must be a whole number, got 2.5"),
        ({"out_channels": "1"}, "out_channels must be a whole number, got '1'"),
    ],
)
def test_sizes_that_are_none_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        RLadder(**{"input_shape": (4,), "levels": [{"encoder": "lstm", "channels": 3}], **arguments})


@pytest.mark.parametrize("arguments", [{"truncate": 1.5}, {"checkpoint_every": "2"}])
def test_steps_that_are_no_whole_numbers_are_refused(arguments):
    with pytest.raises(TypeError, match=f"{next(iter(arguments))} must be a whole number, got"):
        make()(sequence(), **arguments)


def test_levels_can_be_made_before():
    levels = [Level(encoder="lstm", channels=4, decoder="g1"), Level(encoder="linear", channels=2)]
    output, _ = RLadder((5,), levels, out_channels=5)(torch.randn(N, T, 5))
    assert output.prediction.shape == (N, T, 5)

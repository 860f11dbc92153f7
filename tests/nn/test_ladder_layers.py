"""The modules of an encoder and a decoder layer: against the formulas, and their manners."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ladderfast.nn import COMBINATORS, LadderDecoderLayer, LadderEncoderLayer
from ladderfast.nn.ladder_encoder import follow, unbiased
from ladderfast.ops import ladder_encoder

EPS = 1e-10
ACTIVATIONS = {"identity": lambda x: x, "relu": torch.relu, "leaky_relu": lambda x: F.leaky_relu(x, 0.1)}


def away_from_start(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def encoder_layer(kind="dense", dtype=torch.float64, **kwargs):
    linear = {
        "dense": lambda: nn.Linear(6, 4, bias=False, dtype=dtype),
        "conv": lambda: nn.Conv2d(6, 4, 2, bias=False, dtype=dtype),
    }[kind]()
    return away_from_start(LadderEncoderLayer(linear, 4, dtype=dtype, **kwargs))


def inputs(kind, n=10, dtype=torch.float64):
    return torch.randn(n, *{"dense": (6,), "conv": (6, 3, 4)}[kind], dtype=dtype)


def normalised(x):
    axes = [0, *range(2, x.dim())]
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (var + EPS).sqrt(), mean.flatten(), var.flatten()


def channels(v, x):
    return v.reshape(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shift", "scale"), [(True, True), (True, False), (False, True), (False, False)])
def test_encoder_layer_is_its_formula(kind, activation, shift, scale):
    layer = encoder_layer(kind, activation=activation, shift=shift, scale=scale, noise_std=0.3)
    x, state = inputs(kind), torch.tensor([5, 7])
    out = layer(x, 3, num_clean=4, noise_state=state, noise_stream=2)
    z_pre = layer.linear(x)
    parts = [normalised(part) for part in z_pre.split([3, 3, 4])]
    noise = ladder_encoder(
        torch.zeros_like(z_pre), 3, num_clean=4, noise_std=0.3, noise_state=state, noise_stream=2
    ).z
    z = torch.cat([part for part, _, _ in parts]) + noise
    h = z
    if shift:
        h = h + channels(layer.beta, h)
    if scale:
        h = h * channels(layer.gamma, h)
    torch.testing.assert_close(out.z, z)
    torch.testing.assert_close(out.h, ACTIVATIONS[activation](h))
    torch.testing.assert_close(out.mean, torch.stack([mean for _, mean, _ in parts]))
    torch.testing.assert_close(out.var, torch.stack([var for _, _, var in parts]))
    wanted = tuple(layer.parameters())
    weights = torch.randn_like(z)
    for grad, expected in zip(
        torch.autograd.grad((out.h * weights).sum(), wanted),
        torch.autograd.grad((ACTIVATIONS[activation](h) * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def test_without_a_state_there_is_no_noise_and_without_numbers_one_part():
    layer = encoder_layer(noise_std=0.3)
    x = inputs("dense")
    z, mean, var = normalised(layer.linear(x))
    out = layer(x)
    torch.testing.assert_close(out.z, z)
    torch.testing.assert_close(out.mean[0], mean)
    torch.testing.assert_close(out.var[0], var)
    silent = layer(x, want_z=False)
    assert silent.z is None
    assert torch.equal(silent.h, out.h)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize(("shift", "scale"), [(True, True), (True, False), (False, True), (False, False)])
def test_evaluation_with_the_running_statistics(kind, shift, scale):
    layer = encoder_layer(kind, activation="leaky_relu", shift=shift, scale=scale)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(layer.state_dict())
    x = inputs(kind)
    z_pre = layer.linear(x)
    h = (z_pre - channels(layer.running_mean, z_pre)) / channels((layer.running_var + EPS).sqrt(), z_pre)
    if shift:
        h = h + channels(layer.beta, h)
    if scale:
        h = h * channels(layer.gamma, h)
    torch.testing.assert_close(layer.evaluate(x), F.leaky_relu(h, 0.1))
    layer(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_of_many_layers_follow_in_one_call(dtype):
    layers = [LadderEncoderLayer(nn.Identity(), size, dtype=dtype) for size in (2, 5)]
    count = torch.zeros((), dtype=torch.long)
    wide = torch.promote_types(dtype, torch.float32)
    expected = [torch.zeros(size, dtype=wide) for size in (2, 5, 2, 5)]
    for step in range(1, 13):
        new = [torch.rand(size, dtype=wide) for size in (2, 5, 2, 5)]
        follow(layers, new, count)
        weight = 1 / min(step, 10)
        expected = [weight * n + (1 - weight) * old for n, old in zip(new, expected, strict=True)]
    assert count == 12
    got = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.to(wide), theirs, **tolerance)


def test_unbiased_variances():
    one, two = unbiased([torch.tensor([3.0]), torch.tensor([0.0])], [4, 1])
    assert (one.item(), two.item()) == (4.0, 0.0)


@pytest.mark.parametrize("wide", [False, True])
def test_half_precision(wide):
    """z and h are in the map's dtype, or with `wide` in float32; evaluation is in float32 on a CPU."""
    dtype = torch.float32 if wide else torch.bfloat16
    layer = encoder_layer(dtype=torch.bfloat16, wide=wide, scale=True)
    out = layer(inputs("dense", dtype=torch.bfloat16), 3)
    assert out.h.dtype == out.z.dtype == dtype
    assert layer.evaluate(inputs("dense", dtype=torch.bfloat16)).dtype == torch.float32
    plain = encoder_layer(dtype=torch.float32, wide=wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(inputs("dense", dtype=torch.float32), 3).h.dtype == dtype
    half = encoder_layer(dtype=torch.float16)(inputs("dense", dtype=torch.float16), 3)
    assert half.h.dtype == torch.float32  # a type that the CPU's kernels do not take


@pytest.mark.parametrize("combinator", [name for name in COMBINATORS if name != "none"])
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 2, 3)])
def test_decoder_layer_is_its_formula(combinator, shape):
    linear = nn.Linear(5, 4, bias=False) if len(shape) == 2 else nn.Conv2d(5, 4, 1, bias=False)
    layer = away_from_start(
        LadderDecoderLayer(linear.double(), 4, combinator=combinator, dtype=torch.float64)
    )
    x = torch.randn(shape[0], 5, *shape[2:], dtype=torch.float64)
    z, clean = torch.randn(2, *shape, dtype=torch.float64)
    mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    z_hat, cost = layer(x, z, clean, mean, var)
    expected = layer.combinator(z, normalised(layer.linear(x))[0])
    torch.testing.assert_close(z_hat, expected)
    back = (expected - channels(mean, z)) / channels((var + EPS).sqrt(), z)
    torch.testing.assert_close(cost, (clean - back).square().mean())
    torch.testing.assert_close(layer(x, z, clean).cost, (clean - expected).square().mean())
    assert layer(x, z).cost is None
    cost.backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_the_top_has_no_map():
    layer = away_from_start(LadderDecoderLayer(None, 4))
    u, z = torch.randn(2, 6, 4)
    torch.testing.assert_close(layer(u, z).z_hat, layer.combinator(z, normalised(u)[0]))
    layer.reset_parameters()
    assert not layer(u, z).z_hat.any()


@pytest.mark.parametrize("combinator", ["gaussian", "additive"])
def test_decoder_layer_in_half_precision(combinator):
    torch.manual_seed(0)
    layer = away_from_start(LadderDecoderLayer(nn.Linear(5, 4, bias=False), 4, combinator=combinator))
    half = copy.deepcopy(layer).bfloat16()
    x, z = torch.randn(30, 5), torch.randn(30, 4)
    z_hat, cost = half(x.bfloat16(), z.bfloat16(), z.bfloat16())
    assert cost.dtype == torch.float32
    expected = copy.deepcopy(half).float()(x.bfloat16().float(), z.bfloat16().float(), z.bfloat16().float())
    # But for the map's output, which is rounded to 8 bits, all is computed in float32.
    assert (z_hat.float() - expected.z_hat).square().mean() < 1e-3 * expected.z_hat.square().mean()
    torch.testing.assert_close(cost, expected.cost, rtol=0.05, atol=0)


BAD = [
    ({"u": None}, TypeError, "u must be a tensor; got NoneType"),
    ({"z": torch.ones(6, 4, dtype=torch.int64)}, TypeError, r"z must be float32.*got torch.int64"),
    ({"z": torch.ones(1, 4)}, ValueError, r"z must have shape \(6, 4\).*got \(1, 4\)"),
    ({"clean_z": torch.ones(1, 4)}, ValueError, r"clean_z must have shape \(6, 4\).*got \(1, 4\)"),
    ({"clean_z": torch.ones(7, 6, 4)}, ValueError, r"clean_z must have shape \(6, 4\).*got \(7, 6, 4\)"),
    ({"clean_z": None}, ValueError, "mean and var must be given together, and only with clean_z"),
    ({"mean": None}, ValueError, "mean and var must be given together, and only with clean_z"),
    ({"var": None}, ValueError, "mean and var must be given together, and only with clean_z"),
    ({"mean": torch.ones(1)}, ValueError, r"mean must have shape \(4,\).*got \(1,\)"),
    ({"mean": torch.ones(4).double()}, TypeError, r"mean must be torch.float32.*got torch.float64"),
    ({"var": -torch.ones(4)}, ValueError, "var must not be negative; got -1.0"),
    ({"u": torch.ones(6)}, ValueError, r"u must have shape \(N, C, \*\); got \(6,\)"),
    (
        dict.fromkeys(("u", "z", "clean_z"), torch.ones(6, 5)),
        ValueError,
        r"params must have shape \(\d+, 5\)",
    ),
]


@pytest.mark.parametrize("combinator", [name for name in COMBINATORS if name != "none"])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_every_combinator_refuses_what_the_op_refuses(combinator, change, error, message):
    layer = LadderDecoderLayer(None, 4, combinator=combinator)
    x = torch.randn(6, 4)
    given = {"u": x, "z": x, "clean_z": x, "mean": torch.zeros(4), "var": torch.ones(4)}
    for call in (layer.combinator.decode, lambda u, *rest: layer(u, *rest)):
        call(*given.values())
        with pytest.raises(error, match="ladder_decoder: " + message):
            call(*{**given, **change}.values())
    with pytest.raises(ValueError, match="eps must be finite and not negative; got -1"):
        layer.combinator.decode(*given.values(), eps=-1.0)


def test_a_sparse_input_is_the_maps():
    layer, x = LadderEncoderLayer(nn.Linear(5, 3), 3), torch.randn(4, 5)
    torch.testing.assert_close(layer(x.to_sparse_csr()).h, layer(x).h)


def test_a_map_that_puts_out_other_channels():
    for shift in (False, True):
        layer = LadderEncoderLayer(nn.Linear(5, 4), 3, shift=shift)
        for call in (layer, layer.evaluate):
            with pytest.raises(ValueError, match=r"linear must put out \(N, 3, \*\).*got \(2, 4\)"):
                call(torch.zeros(2, 5))
            with pytest.raises(TypeError, match="x must be a tensor, got list"):
                call([[0.0] * 5])


def test_wrong_arguments():
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"num_features must be at least 1, got {number}"):
            LadderEncoderLayer(nn.Identity(), number)
    with pytest.raises(TypeError, match=r"num_features must be a whole number, got 3\.0"):
        LadderEncoderLayer(nn.Identity(), 3.0)
    for name in ("noise_std", "eps"):
        with pytest.raises(ValueError, match=f"{name} must be finite and not negative; got -1.0"):
            LadderEncoderLayer(nn.Identity(), 3, **{name: -1.0})
        with pytest.raises(TypeError, match=f"{name} must be a number; got 'x'"):
            LadderEncoderLayer(nn.Identity(), 3, **{name: "x"})
    with pytest.raises(ValueError, match="activation must be one of identity, relu, leaky_relu; got 'tanh'"):
        LadderEncoderLayer(nn.Identity(), 3, activation="tanh")
    with pytest.raises(ValueError, match="combinator must be one of gaussian"):
        LadderDecoderLayer(None, 3, combinator="gauss")
    with pytest.raises(ValueError, match="combinator must be the name of a function g; got 'none'"):
        LadderDecoderLayer(None, 3, combinator="none")


def test_under_autocast_a_map_gets_what_the_op_put_out():
    """Not in the weight's dtype first, which autocast would have to round again."""
    layer, seen = encoder_layer(dtype=torch.float32), []
    layer.linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x = inputs("dense", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.bfloat16(), 3)
    layer(x.bfloat16(), 3)
    layer(x, 3)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]

"""Convolutional Ladders: against Algorithm 1 written out with sums over windows, and the notation of layers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ladderfast.models import LadderNetwork
from ladderfast.models.layers import parse_layers
from ladderfast.ops import ladder_encoder

EPS = 1e-10
EVERYTHING = ["2x5x6", "conv 3 3x2 full", "maxpool 2x2", "conv 4 2x2", "conv 3 3x3 same", "meanpool", 4]


# Algorithm 1, with every map as a sum over the offsets of its window


def valid(x, w):
    height, width = x.shape[2] - w.shape[2] + 1, x.shape[3] - w.shape[3] + 1
    offsets = itertools.product(range(w.shape[2]), range(w.shape[3]))
    return sum(
        torch.einsum("nchw,oc->nohw", x[:, :, i : i + height, j : j + width], w[:, :, i, j])
        for i, j in offsets
    )


def full(x, w):
    h, v = w.shape[2] - 1, w.shape[3] - 1
    return valid(F.pad(x, (v, v, h, h)), w)


def same(x, w):
    return valid(F.pad(x, (w.shape[3] // 2,) * 2 + (w.shape[2] // 2,) * 2), w)


def windows(size, step):
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def max_pool(x, h, w):
    rows = [
        torch.stack([x[:, :, r, c].amax((2, 3)) for c in windows(x.shape[3], w)], -1)
        for r in windows(x.shape[2], h)
    ]
    return torch.stack(rows, -2)


def copied(x, h, w, shape):
    y = x.new_zeros(len(x), *shape)
    for i, r in enumerate(windows(shape[1], h)):
        for j, c in enumerate(windows(shape[2], w)):
            y[:, :, r, c] = x[:, :, i : i + 1, j : j + 1]
    return y


def statistics(x):
    axes = [0, *range(2, x.dim())]
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


def normalised(x, mean, var):
    return (x - mean) / (var + EPS).sqrt()


def shaped(v, x):
    return v.reshape(-1, *[1] * (x.dim() - 2))


def gaussian(z, u, a):
    a = [shaped(row, z) for row in a]
    mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
    v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
    return (z - mu) * v + mu


class Everything:
    """The network of EVERYTHING, by hand: its maps upwards and downwards."""

    shapes = ((2, 5, 6), (3, 7, 7), (3, 4, 4), (4, 3, 3), (3, 3, 3), (3,), (4,))
    pools = (2, 5)

    @staticmethod
    def up(level, h, p):
        w = p.get(f"encoder.{level - 1}.linear.weight")
        return {
            1: lambda: full(h, w),
            2: lambda: max_pool(h, 2, 2),
            3: lambda: valid(h, w),
            4: lambda: same(h, w),
            5: lambda: h.mean((2, 3)) * 3 * math.sqrt(3),
            6: lambda: h @ w.T,
        }[level]()

    @staticmethod
    def down(level, z, p):
        """From layer `level` + 1."""
        w = p.get(f"decoder.{level}.weight")
        return {
            0: lambda: valid(z, w),
            1: lambda: copied(z, 2, 2, (3, 7, 7)),
            2: lambda: full(z, w),
            3: lambda: same(z, w),
            4: lambda: z[:, :, None, None].expand(-1, -1, 3, 3),
            5: lambda: z @ w.T,
        }[level]()


class DenseOnMaps:
    """A dense layer above a map, and one above that."""

    layers = ("1x4x5", "conv 3 3x3", 6, 3)
    shapes = ((1, 4, 5), (3, 2, 3), (6,), (3,))
    pools = ()

    @staticmethod
    def up(level, h, p):
        w = p[f"encoder.{level - 1}.linear.weight"]
        return valid(h, w) if level == 1 else h.reshape(len(h), -1) @ w.T

    @staticmethod
    def down(level, z, p):
        w = p[f"decoder.{level}.weight"]
        return full(z, w) if level == 0 else (z @ w.T).reshape(len(z), *DenseOnMaps.shapes[level])


class PooledTop:
    """Conv-FC's end: the classes are a mean pooling's output."""

    layers = ("1x4x4", "conv 3 3x3", "meanpool")
    shapes = ((1, 4, 4), (3, 2, 2), (3,))
    pools = ()  # the one there is has the softmax, and therefore beta and gamma

    @staticmethod
    def up(level, h, p):
        return valid(h, p["encoder.0.linear.weight"]) if level == 1 else h.mean((2, 3)) * 2 * math.sqrt(3)

    @staticmethod
    def down(level, z, p):
        return full(z, p["decoder.0.weight"]) if level == 0 else z[:, :, None, None].expand(-1, -1, 2, 2)


def encode(net, p, x, noise, slope):
    top = len(net.shapes) - 1
    z, means, variances = [x if noise is None else x + noise[0]], [None], [None]
    h = z[0]
    for level in range(1, top + 1):
        z_pre = net.up(level, h, p)
        mean, var = statistics(z_pre)
        z.append(normalised(z_pre, mean, var) + (0 if noise is None else noise[level]))
        means.append(mean)
        variances.append(var)
        h = z[-1]
        if level not in net.pools:
            h = h + shaped(p[f"encoder.{level - 1}.beta"], h)
            if level < top:
                h = torch.where(h > 0, h, slope * h)
            elif f"encoder.{level - 1}.gamma" in p:
                h = h * p[f"encoder.{level - 1}.gamma"]
    return z, means, variances, h


def naive(net, p, x_l, x_u, noise_l, noise_u, slope):
    _, _, _, logits = encode(net, p, x_l, noise_l, slope)
    z_tilde, _, _, logits_u = encode(net, p, x_u, noise_u, slope)
    z, means, variances, _ = encode(net, p, x_u, None, slope)
    top = len(net.shapes) - 1
    costs = [None] * (top + 1)
    z_hat = torch.softmax(logits_u, 1)
    for level in range(top, -1, -1):
        u = z_hat if level == top else net.down(level, z_hat, p)
        z_hat = gaussian(z_tilde[level], normalised(u, *statistics(u)), p[f"combinators.{level}.weight"])
        back = z_hat if level == 0 else normalised(z_hat, means[level], variances[level])
        costs[level] = (z[level] - back).square().mean()
    return logits, costs


Everything.layers = EVERYTHING


def make(layers, **kwargs):
    torch.manual_seed(0)
    model = LadderNetwork(layers, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beta" in name or "combinators" in name:
                parameter.normal_()
            elif "gamma" in name:
                parameter.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("net", [Everything, DenseOnMaps, PooledTop])
@pytest.mark.parametrize(
    ("activation", "slope", "top_gamma"), [("relu", 0, True), ("leaky_relu", 0.1, False)]
)
def test_values_and_gradients_are_those_of_algorithm_1(net, activation, slope, top_gamma):
    std = [0.3 - 0.02 * level for level in range(len(net.shapes))]
    model = make(net.layers, activation=activation, top_gamma=top_gamma, noise_std=std)
    assert model.shapes == net.shapes
    x = torch.rand(10, *net.shapes[0], dtype=torch.float64)
    x_l, x_u = x[:4], x[4:]
    noise = []
    for level, (s, shape) in enumerate(zip(std, net.shapes, strict=True)):
        zeros = torch.zeros(10, *shape, dtype=torch.float64)
        options = {"noise_std": 1.0, "noise_state": model.noise_state.clone(), "noise_stream": level}
        noise.append(s * ladder_encoder(zeros, 10, **options).z)
    output = model.training_pass(x_l, x_u.flatten(1))

    p = {name: q.detach().clone().requires_grad_() for name, q in model.named_parameters()}
    assert {name for name in p if "beta" in name} == {
        f"encoder.{level - 1}.beta" for level in range(1, len(net.shapes)) if level not in net.pools
    }
    logits, costs = naive(net, p, x_l, x_u, [n[:4] for n in noise], [n[4:] for n in noise], slope)
    torch.testing.assert_close(output.logits, logits)
    weights = torch.rand(len(costs), dtype=torch.float64)
    for cost, expected in zip(output.denoising, costs, strict=True):
        torch.testing.assert_close(cost, expected)

    def total(logits, costs):
        return logits.square().sum() + sum(w * c for w, c in zip(weights, costs, strict=True))

    grads = torch.autograd.grad(total(output.logits, output.denoising), tuple(model.parameters()))
    wanted = torch.autograd.grad(total(logits, costs), tuple(p.values()))
    for name, grad, expected in zip(p, grads, wanted, strict=True):
        torch.testing.assert_close(
            grad, expected, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_evaluation_uses_statistics_by_channel():
    model = make(EVERYTHING)
    x = torch.rand(6, 2, 5, 6, dtype=torch.float64)
    logits = model(x)
    z_pre = full(x, model.encoder[0].linear.weight.detach())
    torch.testing.assert_close(model.encoder[0].running_mean, z_pre.mean((0, 2, 3)))
    torch.testing.assert_close(
        model.encoder[0].running_var, z_pre.var((0, 2, 3))
    )  # n / (n - 1), n over positions
    for layer, shape in zip(model.encoder, model.shapes[1:], strict=True):
        n = 6 * math.prod(shape[1:])
        layer.running_var *= (
            n - 1
        ) / n  # with the biased variance, evaluation is the batch's own normalisation
    torch.testing.assert_close(model.eval()(x), logits)


@pytest.mark.parametrize("combinator", ["sigmoid", "additive"])
def test_other_combinators_on_maps(combinator):
    model = make(EVERYTHING, combinator=combinator)
    output = model.training_pass(*torch.rand(2, 4, 60, dtype=torch.float64))
    (output.logits.square().mean() + sum(output.denoising)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_gamma_model_has_and_computes_what_it_needs(monkeypatch):
    model = make(EVERYTHING, combinator=["none"] * 6 + ["gaussian"])
    assert all(module is None for module in model.decoder)
    rows = [[] for _ in model.encoder]
    for layer, seen in zip(model.encoder, rows, strict=True):
        layer.linear.register_forward_hook(lambda m, inputs, out, seen=seen: seen.append(len(inputs[0])))
    output = model.training_pass(*torch.rand(2, 4, 60, dtype=torch.float64))
    assert rows == [[4, 12]] * 6
    assert [cost is None for cost in output.denoising] == [True] * 6 + [False]
    output.denoising[-1].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "gamma" not in name)


def test_start_values():
    torch.manual_seed(0)
    model = LadderNetwork(["4x8x8", "conv 50 5x5", "maxpool 3x3", "conv 40 2x2", 30])
    for weight, fan_in in (
        (model.encoder[0].linear.weight, 100),
        (model.encoder[2].linear.weight, 200),
        (model.decoder[0].weight, 50 * 25),
        (model.decoder[2].weight, 160),
    ):
        bound = math.sqrt(3 / fan_in)
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.99 * bound
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.03)
    assert model.encoder[3].linear.weight.std().item() == pytest.approx(40**-0.5, rel=0.05)
    assert model.decoder[3].weight.std().item() == pytest.approx(30**-0.5, rel=0.05)


def test_reconstructions_have_the_shape_of_what_came():
    model = make(EVERYTHING)
    x = torch.rand(3, 60, dtype=torch.float64)
    flat, maps = model.reconstruct(x), model.reconstruct(x.reshape(3, 2, 5, 6))
    for one, other in zip(flat, maps, strict=True):
        assert one.shape == (3, 60)
        assert torch.equal(one, other.flatten(1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_learns(memory_format):
    """Where a bar stands tells the class in no pixel alone."""
    torch.manual_seed(0)
    x = 0.3 * torch.rand(100, 1, 8, 8)
    y = torch.arange(100) % 2
    for image, label in zip(x, y, strict=True):
        place = int(torch.randint(8, ()))
        image[0, (place if label else slice(None)), (slice(None) if label else place)] += 1
    model = LadderNetwork(
        ["1x8x8", "conv 6 3x3 full", "maxpool 2x2", "conv 8 3x3", "meanpool", 2], noise_std=0.1
    )
    model, x = model.to(memory_format=memory_format), x.to(memory_format=memory_format)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        output = model.training_pass(x[:20], x)
        cost = F.cross_entropy(output.logits, y[:20]) + sum(output.denoising)
        optimiser.zero_grad()
        cost.backward()
        optimiser.step()
    model.recompute_statistics([x[:20]])
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


# The notation


@pytest.mark.parametrize(
    ("layers", "shapes"),
    [
        (["1x28x28", "conv 1000 26x26 valid", "meanpool"], [(1000, 3, 3), (1000,)]),
        (
            ["3x32x32", "conv 96 3x3", "conv 96 3x3 full", "conv 96 3x3 same", 2],
            [(96, 30, 30), (96, 32, 32), (96, 32, 32), (2,)],
        ),
        (["3x15x9", "maxpool 2x3", "  conv  7 1x3   full", 4], [(3, 8, 3), (7, 8, 5), (4,)]),
        (["3x15x9", "conv 2 2x4 same", 4], [(2, 15, 9), (4,)]),
    ],
)
def test_shapes(layers, shapes):
    assert [layer.shape for layer in parse_layers(layers)[1:]] == shapes
    model = LadderNetwork(layers)
    x = torch.rand(3, *model.shapes[0])
    for layer, shape in zip(model.encoder, shapes, strict=True):
        x = layer.linear(x)
        assert x.shape == (3, *shape)
    for index in range(len(shapes) - 1, -1, -1):
        x = model.decoder[index](x)
        assert x.shape == (3, *model.shapes[index])


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            ["28x28", 10],
            ValueError,
            r'layers\[0\]: the input must be an integer or "CHANNELSxHEIGHTxWIDTH", got',
        ),
        (["1x0x28", 10], ValueError, r"layers\[0\]: the input must be"),
        (["1x8x8", "conv 3", 10], ValueError, r"layers\[1\]: a layer must be an integer .*, got 'conv 3'"),
        (["1x8x8", "conv 3 3x3 half", 10], ValueError, r"layers\[1\]: a layer must be"),
        (["1x8x8", "conv 0 3x3", 10], ValueError, r"layers\[1\]: a layer must be"),
        (["1x8x8", "", 10], ValueError, r"layers\[1\]: a layer must be"),
        (["1x8x8", "dense 3", 10], ValueError, r"layers\[1\]: a layer must be"),
        (
            ["1x8x8", "conv 3 9x3", 10],
            ValueError,
            r"layers\[1\]: 'conv 3 9x3' does not fit into a map of 8 x 8",
        ),
        (
            ["1x8x8", 5, "maxpool 2x2", 10],
            ValueError,
            r"layers\[2\]: 'maxpool 2x2' needs a map .* below it, got \(5,\)",
        ),
        ([64, "meanpool"], ValueError, r"layers\[1\]: 'meanpool' needs a map"),
        (["1x8x8", "meanpool 2"], ValueError, r"layers\[1\]: a layer must be"),
        (["1x8x8", "conv 10 1x1"], ValueError, r"layers\[1\]: the last layer must be dense or meanpool"),
        (["1x8x8", None, 10], TypeError, "layers must be a sequence of integers .* and texts"),
        (["1x8x8", -3], ValueError, "each at least 1"),
    ],
)
def test_wrong_layers(layers, error, message):
    with pytest.raises(error, match=message):
        LadderNetwork(layers)


def test_wrong_inputs():
    model = LadderNetwork(["2x5x6", "conv 3 3x2", 4])
    with pytest.raises(
        ValueError, match=r"x must have shape \(N, 2, 5, 6\) or \(N, 60\), got \(4, 2, 6, 5\)"
    ):
        model(torch.rand(4, 2, 6, 5))
    with pytest.raises(
        ValueError, match=r"x_unlabelled must have shape \(N, 2, 5, 6\) or \(N, 60\), got \(4, 59\)"
    ):
        model.training_pass(torch.rand(4, 60), torch.rand(4, 59))

"""The SWWAE: its notation, its terms against the equations written out, and that a weight of 0 costs nothing."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ladderfast.models import SWWAE, SWWAEComparison
from ladderfast.models.swwae_layers import parse_architecture
from ladderfast.nn.noise import dropout

SMALL = "(3)3c-2p-(4)3c-2p-(5)3c-2p-7fc-4fc"

# Notation


def kinds(text, shape=(32, 32)):
    return [(stage.kind, stage.shape, stage.size) for stage in parse_architecture(text, shape)]


def test_the_papers_networks():
    assert kinds("(64)5c-2p-(64)3c-2p-(64)3c-2p-10fc") == [
        ("conv", (64, 32, 32), 5),
        ("pool", (64, 16, 16), 2),
        ("conv", (64, 16, 16), 3),
        ("pool", (64, 8, 8), 2),
        ("conv", (64, 8, 8), 3),
        ("pool", (64, 4, 4), 2),
        ("dense", (10,), 1),
    ]
    stl = kinds("(64)3c-4p-(64)3c-3p-(128)3c-(128)3c-2p-(256)3c x 3-(512)3c x 3-2p-10fc", (3, 96, 96))
    assert [shape for kind, shape, _ in stl if kind == "pool"] == [
        (64, 24, 24),
        (64, 8, 8),
        (128, 4, 4),
        (512, 2, 2),
    ]
    assert [shape[0] for kind, shape, _ in stl if kind == "conv"] == [
        64,
        64,
        128,
        128,
        *[256] * 3,
        *[512] * 3,
    ]
    assert kinds("(32)5c-(32)3c-2p-(32)3c-16p")[-1] == ("pool", (32, 1, 1), 16)


def test_spaces_are_free():
    assert kinds(" ( 6 ) 3 c × 2 - 2 p-10 fc ") == kinds("(6)3c-(6)3c-2p-10fc")


def test_rows_that_fill_no_window_are_left_out():
    assert kinds("(2)3c-3p", (3, 11, 7))[-1] == ("pool", (2, 3, 2), 3)


@pytest.mark.parametrize(
    ("text", "position", "expected", "got"),
    [
        ("", 1, "a layer: (64)3c, 2p or 10fc", "the end"),
        ("(64)3c-", 8, "a layer: (64)3c, 2p or 10fc", "the end behind '(64)3c-'"),
        ("(64", 4, "a closing parenthesis", "the end behind '(64'"),
        ("(64)c", 5, "the kernel's size", "'c' behind '(64)'"),
        ("(64)3k-2p", 6, "the letter c", "'k-2p' behind '(64)3'"),
        ("(0)3c", 2, "the number of feature maps, at least 1", "'0)3c' behind '('"),
        ("(4)3c x-2p", 8, "how many times the convolution is repeated", "'-2p' behind '(4)3c x'"),
        ("(4)3c-2c", 8, "p for pooling or fc for a dense layer", "'c' behind '(4)3c-2'"),
        ("(4)3c 2p", 7, "a hyphen before the next layer, or the end", "'2p' behind '(4)3c '"),
        ("(4)3c-2p-9p", 10, "a window of at most 16 that fits into maps of 8 x 8", "'9p' behind"),
        ("(4)3c-17p", 7, "a window of at most 16", "'17p'"),
        ("(4)3c-10fc-2p", 12, "no pooling above a dense layer", "'2p' behind"),
        ("(4)3c-10fc-(4)3c", 12, "no convolution above a dense layer", "'(4)3c' behind"),
        ("10fc", 1, "a convolution or pooling as the first layer", "'10fc'"),
    ],
)
def test_an_error_points_at_the_place(text, position, expected, got):
    with pytest.raises(ValueError, match=f"architecture, position {position}: expected ") as caught:
        SWWAE(text, (16, 16))
    assert expected in str(caught.value)
    assert f"got {got}" in str(caught.value)
    assert "\n" not in str(caught.value)


# The terms


def pool(z, k):
    """Maxima of k x k windows and their places, (row, column), one window after the other."""
    n, c, h, w = z.shape
    what = torch.zeros(n, c, h // k, w // k)
    where = {}
    for i in itertools.product(range(n), range(c), range(h // k), range(w // k)):
        s, m, row, column = i
        window = z[s, m, row * k : row * k + k, column * k : column * k + k]
        at = int(window.flatten().argmax())
        what[i] = window.flatten()[at]
        where[i] = (row * k + at // k, column * k + at % k)
    return what, where


def unpool(v, where, shape):
    out = torch.zeros(shape)
    for (s, m, row, column), (r, q) in where.items():
        out[s, m, r, q] = v[s, m, row, column]
    return out


def test_the_terms_by_hand():
    """Of a network with a dense layer, whose image leaves a row and columns over in pooling."""
    net = SWWAE("(3)3c-2p-(4)3c-2p-4fc", (9, 11))
    x, labelled = torch.rand(2, 99), torch.rand(3, 99)
    out = net.training_pass(labelled, x, sparsity=True)

    def conv(layer, v, relu=True):
        v = F.conv2d(v, layer.conv.weight, layer.conv.bias, padding=1)
        return v.relu() if relu else v

    def up(images):
        h1 = conv(net.encoder[0], images)
        what1, where1 = pool(h1, 2)
        h2 = conv(net.encoder[2], what1)
        what2, where2 = pool(h2, 2)
        return h1, what1, where1, h2, what2, where2

    images = x.reshape(2, 1, 9, 11)
    h1, what1, where1, h2, what2, where2 = up(images)
    below = conv(net.decoder[2], unpool(what2, where2, h2.shape))
    x_hat = conv(net.decoder[0], unpool(below, where1, h1.shape), relu=False)
    torch.testing.assert_close(out.reconstruction, (images - x_hat).flatten(1).norm(dim=1).mean())
    (middle,) = out.intermediate
    torch.testing.assert_close(middle, (what1 - below).flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(net.reconstruct(x), x_hat.reshape(2, 99))
    g1, _, _, g2, top, _ = up(labelled.reshape(3, 1, 9, 11))
    torch.testing.assert_close(out.logits, top.flatten(1) @ net.dense[0].weight.T + net.dense[0].bias)
    torch.testing.assert_close(net(labelled), out.logits)
    total = sum(h.detach().abs().sum() for h in (h1, h2, g1, g2)) / 5
    torch.testing.assert_close(out.sparsity, total)


def test_each_pooling_but_the_top_has_a_term():
    net = SWWAE(SMALL, (16, 16))
    x = torch.rand(2, 256)
    for layer in net.decoder:  # what a decoder of zeros leaves are the norms of the whats, the lowest first
        if hasattr(layer, "conv"):
            nn.init.zeros_(layer.conv.weight)
    whats = [pooled.what.flatten(1).norm(dim=1).mean() for pooled in net.what_where(x)]
    torch.testing.assert_close(net.training_pass(x, x).intermediate, tuple(whats[:2]))
    under = SWWAE(
        "(3)3c-2p-(4)3c", (16, 16)
    )  # a convolution above the top pooling: its what has a counterpart
    assert len(under.training_pass(x, x, classify=False).intermediate) == 1
    only = SWWAE("(3)3c-(4)3c-4p", (16, 16))
    assert only.training_pass(x, x, classify=False).intermediate == ()


def test_the_norm_has_a_gradient_of_0_where_the_reconstruction_is_perfect():
    net = SWWAE("(3)3c-2p", (4, 4))
    nn.init.zeros_(net.decoder[0].conv.weight)
    x = torch.zeros(2, 16)
    net.training_pass(x, x, classify=False).reconstruction.backward()
    assert float(net.decoder[0].conv.bias.grad.abs().sum()) == 0


@pytest.mark.parametrize("pooling", ["hard", "soft"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_parameter_is_trained_by_the_whole_cost(pooling, batch_norm):
    net = SWWAE(SMALL, (2, 17, 16), pooling=pooling, batch_norm=batch_norm)
    x = torch.rand(6, 2, 17, 16)
    out = net.training_pass(x, x)
    (F.cross_entropy(out.logits, torch.arange(6) % 4) + out.reconstruction + sum(out.intermediate)).backward()
    assert {
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    } == set()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert norms == (5 if batch_norm else 0)  # all convolutions but that to the input


def test_soft_pooling_of_large_beta_is_hard_pooling():
    hard = SWWAE("(3)3c-2p-(4)3c-2p-4fc", (8, 8))
    for i in (0, 2):  # no window of zeros, whose place is the first or the middle
        nn.init.constant_(hard.encoder[i].conv.bias, 10.0)
    soft = SWWAE("(3)3c-2p-(4)3c-2p-4fc", (8, 8), pooling="soft", beta=1e5)
    soft.load_state_dict(hard.state_dict())
    x = torch.rand(3, 64)
    torch.testing.assert_close(soft(x), hard(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(soft.reconstruct(x), hard.reconstruct(x), rtol=1e-2, atol=1e-2)
    mild = SWWAE("(3)3c-2p-(4)3c-2p-4fc", (8, 8), pooling="soft", beta=1.0)
    mild.load_state_dict(hard.state_dict())
    assert (mild(x) - hard(x)).abs().max() > 1e-3


def test_a_copied_what_fills_its_window():
    net = SWWAE("(1)1c-3p", (7, 6), unpooling="copy")
    for layer in (net.encoder[0], net.decoder[0]):
        nn.init.ones_(layer.conv.weight)
    x = torch.rand(1, 7, 6)
    what = F.max_pool2d(x, 3)
    expected = torch.zeros(1, 7, 6)
    expected[:, :6] = what.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(net.reconstruct(x), expected)


# A weight of 0 costs nothing


def counted(net, **asked):
    """Samples that each convolution, dense layer and unpooling has seen, by name."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, len(args[0])))
        for name, module in net.named_modules()
        if name.rpartition(".")[0] in ("encoder", "decoder", "dense")
    ]
    net.training_pass(torch.rand(3, 256), torch.rand(5, 256), **asked)
    for hook in hooks:
        hook.remove()
    return seen


def test_what_is_not_asked_for_is_not_computed():
    net = SWWAE(SMALL, (16, 16))
    encoder, decoder, dense = (
        [f"{part}.{i}" for i in range(len(getattr(net, part)))] for part in ("encoder", "decoder", "dense")
    )
    assert counted(net, reconstruction=False, intermediate=False) == dict.fromkeys(encoder + dense, 3)
    unsupervised = counted(net, classify=False)
    assert unsupervised == dict.fromkeys(encoder + decoder, 5)
    whole = {**dict.fromkeys(encoder, 8), **dict.fromkeys(decoder, 5), **dict.fromkeys(dense, 3)}
    assert counted(net) == whole
    assert counted(net, intermediate=False) == whole
    no_input = counted(net, reconstruction=False)  # the decoder ends at the lowest what
    assert no_input == {k: v for k, v in whole.items() if k not in ("decoder.0", "decoder.1")}
    assert counted(net, reconstruction=False, intermediate=False, sparsity=True) == {
        **dict.fromkeys(encoder, 8),
        **dict.fromkeys(dense, 3),
    }


def test_terms_that_are_not_asked_for_are_not_returned():
    net = SWWAE(SMALL, (16, 16))
    x = torch.rand(2, 256)
    out = net.training_pass(x, x, classify=False, intermediate=False)
    assert out.logits is None
    assert out.intermediate == ()
    assert out.sparsity is None
    assert net.training_pass(x, x, reconstruction=False).reconstruction is None


def test_a_network_without_decoder_has_none():
    net = SWWAE(SMALL, (16, 16), decoder=False)
    assert not any(name.startswith("decoder") for name, _ in net.named_parameters())
    x = torch.rand(2, 256)
    assert net.training_pass(x, x, reconstruction=False, intermediate=False).logits.shape == (2, 4)
    with pytest.raises(ValueError, match="need a decoder"):
        net.training_pass(x, x)
    with pytest.raises(ValueError, match="needs a decoder"):
        net.reconstruct(x)


# Dropout, batch normalisation, shapes


def test_dropout_where_it_is_asked_for_and_in_training_alone():
    x = torch.rand(4, 256)
    for asked in ({"dropout_dense": 0.5}, {"dropout_conv": 0.5}):
        net = SWWAE(SMALL, (16, 16), **asked)
        assert not torch.equal(net(x), net(x))
        features = [net.features(x) for _ in range(2)]
        assert torch.equal(*features) == ("dropout_dense" in asked)
        net.eval()
        assert torch.equal(net(x), net(x))


def test_a_dropped_value_is_scaled():
    net = SWWAE("(400)1c-4p-4fc", (4, 4), dropout_conv=0.25)
    nn.init.ones_(net.encoder[0].conv.weight)
    zeros_and_others = net.features(torch.ones(1, 16)).detach().unique()
    assert float(zeros_and_others[-1]) == pytest.approx(1 / 0.75)


def test_dropout_compiles_without_a_graph_break():
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(SWWAE(SMALL, (8, 8), dropout_dense=0.3, dropout_conv=0.2))
    x = torch.rand(6, 1, 8, 8)
    compiled = torch.compile(networks[1].training_pass, backend="eager", fullgraph=True)
    for got, want in zip(compiled(x[:2], x[2:]), networks[0].training_pass(x[:2], x[2:]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@torch.no_grad()
def test_the_sparsity_of_a_float64_network_is_in_float64():
    net = SWWAE("(3)3c", (8, 8)).double()
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    found = net.training_pass(
        x, x, classify=False, reconstruction=False, intermediate=False, sparsity=True
    ).sparsity
    torch.testing.assert_close(found, net(x).abs().sum() / 5, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_drops_with_its_probability_and_passes_gradients_of_what_it_keeps(dtype):
    x = torch.ones(50, 7, 300, dtype=dtype, requires_grad=True)
    state = torch.tensor([5, 0])
    for p in (0.1, 0.5, 0.8):
        y = dropout(x, p, state)
        dropped = float((y == 0).double().mean())
        assert dropped == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))
        assert y.dtype == dtype
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, y.detach())
    assert state.tolist() == [5, 3]
    first, again = (dropout(x, 0.5, torch.tensor([5, 1])) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, dropout(x, 0.5, torch.tensor([6, 1])))
    assert dropout(x[:0], 0.5, state).shape == (0, 7, 300)


def test_what_is_dropped_is_no_affair_of_torchs_generator():
    net = SWWAE(SMALL, (16, 16), dropout_dense=0.5, dropout_conv=0.2)
    x = torch.rand(4, 256)
    before = net.noise_state.clone()
    first = net(x)
    torch.rand(3)
    second = net(x)
    net.noise_state.copy_(before)
    assert torch.equal(net(x), first)
    assert torch.equal(net(x), second)
    assert SWWAE(SMALL, (16, 16)).noise_state is None


def test_batch_normalisation_uses_its_running_statistics_in_evaluation():
    net = SWWAE("(3)3c-2p-4fc", (8, 8), batch_norm=True)
    x = torch.rand(20, 64)
    net.encoder[0].norm.momentum = 0.5
    for _ in range(20):
        net(x)
    trained = net(x)
    net.eval()
    torch.testing.assert_close(net(x), trained, rtol=0.1, atol=0.1)
    torch.testing.assert_close(net(x[:1]), net(x)[:1])


def test_without_dense_layers_the_top_map_is_the_output():
    net = SWWAE("(3)3c-2p", (8, 8))
    x = torch.rand(2, 64)
    assert net(x).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"needs a dense layer, which .* does not have"):
        net.training_pass(x, x)


def test_what_and_where_of_every_pooling():
    net = SWWAE("(3)3c-2p-(4)3c-4p", (16, 16), pooling="soft")
    first, top = net.what_where(torch.rand(2, 256))
    assert first.what.shape == (2, 3, 8, 8)
    assert top.where.shape == (2, 4, 2, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pooling": "mean"}, ValueError, "pooling must be one of hard, soft, got 'mean'"),
        ({"unpooling": "none"}, ValueError, "unpooling must be one of where, copy, got 'none'"),
        ({"dropout_dense": 1.0}, ValueError, "dropout_dense must be from 0 to below 1, got 1.0"),
        ({"dropout_conv": -0.1}, ValueError, "dropout_conv must be from 0 to below 1, got -0.1"),
        ({"image_shape": (1, 2, 3, 4)}, ValueError, r"image_shape must be \(H, W\) or \(C, H, W\)"),
        ({"architecture": 3}, TypeError, "architecture must be text such as"),
        ({"pooling": "soft", "beta": -1.0}, ValueError, "beta"),
        ({"pooling": "hard", "beta": -1.0}, ValueError, "beta"),
        ({"dropout_dense": "x"}, TypeError, "dropout_dense must be a number, got 'x'"),
        ({"image_shape": 8}, TypeError, r"image_shape must be \(H, W\) or \(C, H, W\), got 8"),
        ({"image_shape": None}, TypeError, r"image_shape must be \(H, W\) or \(C, H, W\), got None"),
    ],
)
def test_arguments_that_make_no_network(arguments, error, message):
    with pytest.raises(error, match=message):
        SWWAE(**{"architecture": SMALL, "image_shape": (16, 16), **arguments})


def test_inputs_that_do_not_fit():
    net = SWWAE(SMALL, (16, 16))
    with pytest.raises(ValueError, match=r"x must have shape \(N, \*\) of \(1, 16, 16\), got \(2, 255\)"):
        net(torch.rand(2, 255))
    with pytest.raises(TypeError, match=r"x must be torch.float32 as the network is, got torch.float64"):
        net(torch.rand(2, 256).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.rand(2, 256).bfloat16()).shape == (2, 4)
    assert SWWAE("2p", (4, 4))(torch.rand(1, 16).double()).dtype == torch.float64
    with pytest.raises(ValueError, match="x_unlabelled must hold at least 1 sample"):
        net.training_pass(torch.rand(2, 256), torch.rand(0, 256))
    assert (
        net.training_pass(torch.rand(2, 256), torch.rand(0, 256), reconstruction=False, intermediate=False)
        .logits.isfinite()
        .all()
    )
    with pytest.raises(TypeError, match=r"x_labelled must be a floating-point tensor, got torch.int64"):
        net.training_pass(torch.zeros(2, 256, dtype=torch.long), torch.rand(2, 256))
    with pytest.raises(ValueError, match="must be asked for at least one term, got none"):
        net.training_pass(
            torch.rand(2, 256), torch.rand(2, 256), classify=False, reconstruction=False, intermediate=False
        )


def test_start_values_keep_the_scale():
    torch.manual_seed(1)
    net = SWWAE("(64)5c-(64)3c-2p-10fc", (16, 16))
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            gain = 1 if module is net.decoder[0].conv or isinstance(module, nn.Linear) else 2
            assert float(module.weight.std()) == pytest.approx(math.sqrt(gain / fan_in), rel=0.1)
            assert float(module.bias.abs().sum()) == 0


def test_a_comparison_trains_each_network_as_if_alone():
    both = SWWAEComparison("(2)3c-Xp", (2, 4), (8, 8))
    assert list(both.networks) == ["copy_2", "where_2", "copy_4", "where_4"]
    x = torch.rand(3, 64)
    costs = both(x)
    sum(costs.values()).backward()
    found = both.networks["where_4"].decoder[0].conv.weight.grad.clone()
    both.zero_grad()
    alone = both.networks["where_4"].training_pass(x, x, classify=False)
    alone.reconstruction.backward()
    torch.testing.assert_close(costs["where_4"], alone.reconstruction)
    torch.testing.assert_close(both.networks["where_4"].decoder[0].conv.weight.grad, found)
    with pytest.raises(ValueError, match="architecture must have an X, got"):
        SWWAEComparison("(2)3c-2p")

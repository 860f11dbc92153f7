"""The dense Ladder network: against Algorithm 1 written out naively, against numbers by hand, and its manners."""

import copy
import importlib
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ladderfast.models import LadderNetwork, LadderOutput
from ladderfast.ops import ladder_encoder
from ladderfast.reference.noise import normal_noise

ladder_encoder_module = importlib.import_module("ladderfast.nn.ladder_encoder")
combinator_module = importlib.import_module("ladderfast.nn.combinator")

LAYERS = (6, 5, 4, 3)
SEPARATE = {"relu": torch.relu, "leaky_relu": lambda x: torch.where(x > 0, x, 0.1 * x), "linear": lambda x: x}


# Algorithm 1, one sample at a time


def statistics(rows):
    mean = sum(rows) / len(rows)
    return mean, sum((row - mean) ** 2 for row in rows) / len(rows)


def batchnorm(rows):
    mean, var = statistics(rows)
    return [(row - mean) / torch.sqrt(var + 1e-10) for row in rows]


def gaussian(z, u, a):
    mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
    v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
    return (z - mu) * v + mu


def encode(p, layers, x, noise, activation):
    """One half of the batch through the encoder; noise[level][n] is added to sample n at layer level, None: clean."""
    top = len(layers) - 1
    z = [[row if noise is None else row + noise[0][n] for n, row in enumerate(x)]]
    h, means, variances = z[0], [None], [None]
    for level in range(1, top + 1):
        z_pre = [p[f"encoder.{level - 1}.linear.weight"] @ row for row in h]
        mean, var = statistics(z_pre)
        rows = batchnorm(z_pre)
        if noise is not None:
            rows = [row + noise[level][n] for n, row in enumerate(rows)]
        z.append(rows)
        means.append(mean)
        variances.append(var)
        beta = p.get(f"encoder.{level - 1}.beta", 0)
        if level < top:
            h = [SEPARATE[activation](row + beta) for row in rows]
        else:
            h = [p.get(f"encoder.{level - 1}.gamma", 1) * (row + beta) for row in rows]
    return z, means, variances, h


def naive(p, layers, x_l, x_u, noise_l, noise_u, activation="relu"):
    """Corrupted and clean logits of the labelled half, and the cost of every layer."""
    top = len(layers) - 1
    _, _, _, logits = encode(p, layers, x_l, noise_l, activation)
    _, _, _, clean_logits = encode(p, layers, x_l, None, activation)
    z_tilde, _, _, logits_u = encode(p, layers, x_u, noise_u, activation)
    z, means, variances, _ = encode(p, layers, x_u, None, activation)
    costs, z_hat = [None] * (top + 1), []
    for level in range(top, -1, -1):
        if level == top:
            u = batchnorm([torch.softmax(row, 0) for row in logits_u])
        else:
            u = batchnorm([p[f"decoder.{level}.weight"] @ row for row in z_hat])
        z_hat = [gaussian(z_tilde[level][n], u[n], p[f"combinators.{level}.weight"]) for n in range(len(x_u))]
        total = 0
        for n in range(len(x_u)):
            back = (
                z_hat[n] if level == 0 else (z_hat[n] - means[level]) / torch.sqrt(variances[level] + 1e-10)
            )
            total = total + ((z[level][n] - back) ** 2).sum()
        costs[level] = total / (len(x_u) * layers[level])
    return torch.stack(logits), torch.stack(clean_logits), costs


# Helpers


def make(layers=LAYERS, seed=0, dtype=torch.float64, **kwargs):
    """A network with every parameter away from its start value, so that nothing is hidden by a 0 or a 1."""
    torch.manual_seed(seed)
    model = LadderNetwork(layers, dtype=dtype, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beta" in name or "combinators" in name:
                parameter.normal_()
            elif "gamma" in name:
                parameter.uniform_(0.5, 2)
    return model


def halves(n_l=4, n_u=6, width=LAYERS[0], seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(n_l, width, generator=generator, dtype=dtype),
        torch.rand(n_u, width, generator=generator, dtype=dtype) * 2 - 0.7,
    )


def noise_of(state, std, n_l, n_u, layers, stream=0):
    """Each half's noise in the pass that finds the model's `noise_state` so; 0 where std is 0.

    A layer's noise is numbered over the rows of both halves, the labelled first. It is the op's, which differs from
    the reference's in the last bits.
    """
    noise_l, noise_u = [], []
    for level, (width, scale) in enumerate(zip(layers, std, strict=True)):
        zeros = torch.zeros(n_l + n_u, width, dtype=torch.float64)
        options = {"noise_std": 1.0, "noise_state": state, "noise_stream": stream + level}
        noise = scale * ladder_encoder(zeros, len(zeros), **options).z
        noise_l.append(noise[:n_l])
        noise_u.append(noise[n_l:])
    return noise_l, noise_u


def total_cost(logits, costs, weights, target):
    return F.cross_entropy(logits, target) + sum(w * c for w, c in zip(weights, costs, strict=True) if w)


# Values and gradients


@pytest.mark.parametrize(
    ("n_l", "n_u", "activation", "std", "top_gamma"),
    [
        (4, 6, "relu", [0.3] * 4, True),
        (6, 4, "leaky_relu", [0.3, 0.0, 0.5, 0.1], True),
        (5, 5, "linear", [0.2, 0.3, 0.4, 0.0], False),  # equal halves; hidden layers without beta
        (2, 2, "relu", [0.0, 0.2, 0.0, 0.3], False),
    ],
)
def test_values_and_gradients_are_those_of_algorithm_1(n_l, n_u, activation, std, top_gamma):
    model = make(activation=activation, noise_std=std, top_gamma=top_gamma)
    x_l, x_u = halves(n_l, n_u)
    target, weights = torch.arange(n_l) % 3, [10.0, 2.0, 0.5, 3.0]
    noise_l, noise_u = noise_of(model.noise_state.clone(), std, n_l, n_u, LAYERS)

    output = model.training_pass(x_l, x_u)
    grads = torch.autograd.grad(
        total_cost(output.logits, output.denoising, weights, target), tuple(model.parameters())
    )

    p = {name: q.detach().clone().requires_grad_() for name, q in model.named_parameters()}
    logits, clean_logits, costs = naive(p, LAYERS, x_l, x_u, noise_l, noise_u, activation)
    expected = torch.autograd.grad(total_cost(logits, costs, weights, target), tuple(p.values()))

    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.clean_logits, clean_logits)
    for cost, naive_cost in zip(output.denoising, costs, strict=True):
        torch.testing.assert_close(cost, naive_cost)
        assert cost.shape == ()
    for name, grad, naive_grad in zip(p, grads, expected, strict=True):
        torch.testing.assert_close(
            grad, naive_grad, rtol=1e-6, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert grad.abs().max() > 0, name


def test_variance_and_eps_where_they_matter():
    """Inputs of variance about eps: 1e-5 instead of 1e-10, or a variance over n - 1, would show at once."""
    model = make(noise_std=0.0)
    x_l, x_u = halves()
    x_l, x_u = x_l * 1e-5, x_u * 1e-5
    output = model.training_pass(x_l, x_u)
    noise = noise_of(model.noise_state, [0.0] * 4, 4, 6, LAYERS)
    logits, _, costs = naive(dict(model.named_parameters()), LAYERS, x_l, x_u, *noise)
    torch.testing.assert_close(output.logits, logits, rtol=1e-6, atol=1e-9)
    for cost, naive_cost in zip(output.denoising, costs, strict=True):
        torch.testing.assert_close(cost, naive_cost, rtol=1e-6, atol=1e-9)


def test_a_case_computed_by_hand():
    """One input, two classes, no noise, a decoder that still puts out 0.

    labelled x = -1, 1; W = (2, -1): z_pre = (-2, 2) and (1, -1), z = (-1, 1) and (1, -1),
        logits gamma (z + beta) = 2 (z + 1/2) = (-1, 3) and 3 z = (3, -3)
    unlabelled x = 0, 2: z_pre = (0, 4) and (0, -2), mean 2 and -1, variance 4 and 1, z = (-1, 1) and (1, -1);
        z_hat = 0 is -1 and 1 when normalised, so the squared errors are 0, 4 and 0, 4: their mean is 2
        layer 0: (0 + 4) / 2 = 2
    """
    model = LadderNetwork([1, 2], noise_std=0.0, dtype=torch.float64)
    with torch.no_grad():
        model.encoder[0].linear.weight.copy_(torch.tensor([[2.0], [-1.0]]))
        model.encoder[0].beta.copy_(torch.tensor([0.5, 0.0]))
        model.encoder[0].gamma.copy_(torch.tensor([2.0, 3.0]))
    output = model.training_pass(
        torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    )
    expected = torch.tensor([[-1.0, 3.0], [3.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.clean_logits, expected)
    assert [cost.item() for cost in output.denoising] == [pytest.approx(2), pytest.approx(2)]


def test_gradcheck():
    layers = (3, 4, 2)
    model = make(layers, activation="leaky_relu", noise_std=[0.3, 0.2, 0.1])
    model.eval()  # so that the calls do not move the statistics
    x_l, x_u = halves(3, 4, width=3)
    names = [name for name, _ in model.named_parameters()]
    state = model.noise_state.clone()

    class Pass(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            self.model.noise_state.copy_(state)
            output = self.model.training_pass(x_l, x_u)
            return output.logits, output.clean_logits, *output.denoising

    def call(*parameters):
        values = {f"model.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Pass(), values, ())

    assert torch.autograd.gradcheck(call, tuple(model.parameters()))


def test_noise_is_drawn_for_every_sample_and_has_its_deviation():
    model = LadderNetwork([400, 3], noise_std=[0.25, 0.0])
    x = torch.rand(50, 400)
    state = model.noise_state.clone()
    corrupted, _ = model.reconstruct(x)
    noise = corrupted - x
    assert noise.std() == pytest.approx(0.25, rel=0.03)
    assert noise.std(0).min() > 0.1  # not one sample of noise for the whole batch
    assert abs(noise.mean()) < 0.01
    torch.testing.assert_close(corrupted, x + 0.25 * normal_noise(state, 1 << 62, 50 * 400).reshape(50, 400))


def test_every_pass_draws_noise_that_no_other_draws():
    """Seed and offset + layer say what the noise is: no two passes share one, nor has any layer another's."""
    model = make()
    first = model.noise_state.clone()
    taken = []
    for step in range(3):  # in evaluation mode as well
        taken.append(model.noise_state.tolist())
        model.training_pass(*halves())
        model.train(step == 1)
    assert [seed for seed, _ in taken] == [first[0].item()] * 3
    offsets = [offset + layer for _, offset in taken for layer in range(4)]
    assert len(set(offsets)) == 12
    model(halves()[0])  # there is no noise in a clean pass, and that of pictures is other noise
    model.reconstruct(halves()[1])
    assert model.noise_state.tolist() == [taken[0][0], taken[2][1] + 4]


def test_backward_after_another_pass_is_still_that_of_its_own_noise():
    model = make()
    twin = copy.deepcopy(model)
    earlier, _ = model.training_pass(*halves()), model.training_pass(*halves(seed=2))
    alone = twin.training_pass(*halves())
    for output in (earlier, alone):
        total_cost(output.logits, output.denoising, [10.0, 2.0, 0.5, 3.0], torch.arange(4) % 3).backward()
    for (name, ours), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_networks_made_one_after_the_other_have_noise_of_their_own():
    torch.manual_seed(0)
    first, second = LadderNetwork(LAYERS), LadderNetwork(LAYERS)
    assert first.noise_state[0] != second.noise_state[0]
    torch.manual_seed(0)
    assert torch.equal(LadderNetwork(LAYERS).noise_state, first.noise_state)
    first.training_pass(*halves(dtype=torch.float32))
    first.reset_parameters()
    assert first.noise_state[1] == 0


@pytest.mark.parametrize(
    "combinator",
    [
        "sigmoid",
        "sigmoid_no_product",
        "bilinear",
        "additive",
        ["gaussian", "bilinear", "sigmoid", "gaussian_squashed"],  # each layer its own
    ],
    ids=str,
)
def test_other_combinators_train(combinator):
    model = make(combinator=combinator)
    output = model.training_pass(*halves())
    (output.logits.square().mean() + sum(output.denoising)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Start values


def test_start_values():
    torch.manual_seed(0)
    model = LadderNetwork([400, 900, 100])
    for linear, fan_in in (
        (model.encoder[0].linear, 400),
        (model.encoder[1].linear, 900),
        (model.decoder[0], 900),
        (model.decoder[1], 100),
    ):
        assert linear.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert linear.weight.abs().max() > 3 * fan_in**-0.5  # normal, not uniform
    assert not model.encoder[0].beta.any()
    assert not model.encoder[1].beta.any()
    assert (model.encoder[1].gamma == 1).all()
    _, z_hat = model.reconstruct(torch.rand(8, 400))
    assert not z_hat.any()


def test_reset_parameters_starts_again():
    model = make(dtype=torch.float32)
    model(torch.rand(5, 6))
    torch.manual_seed(7)
    model.reset_parameters()
    first = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    fresh = LadderNetwork(LAYERS)
    fresh.reset_parameters()
    assert model.num_batches_tracked == 0
    torch.manual_seed(7)
    model.reset_parameters()
    for name, value in model.state_dict().items():
        assert torch.equal(value, first[name])
        if "weight" not in name and name != "noise_state":  # these are drawn
            assert torch.equal(value, fresh.state_dict()[name])


def test_gamma_only_on_the_softmax_layer_and_beta_only_where_it_is_nonlinear():
    def parameters(**kwargs):
        return {name for name, _ in LadderNetwork([3, 4, 2], combinator="none", **kwargs).named_parameters()}

    weights = {"encoder.0.linear.weight", "encoder.1.linear.weight"}
    assert parameters() == weights | {"encoder.0.beta", "encoder.1.beta", "encoder.1.gamma"}
    assert parameters(top_gamma=False) == weights | {"encoder.0.beta", "encoder.1.beta"}
    assert parameters(activation="linear") == weights | {"encoder.1.beta", "encoder.1.gamma"}


# Statistics for evaluation


def unbiased(x, model):
    z_pre = x @ model.encoder[0].linear.weight.detach().T
    return z_pre.mean(0), z_pre.var(0)


def test_running_statistics_follow_the_rule(monkeypatch):
    model = make()
    mean, var = 0, 0
    for step in range(1, 15):
        x_l, x_u = halves(n_l=3 + step % 2, seed=step)
        model.training_pass(x_l, x_u) if step % 3 else model(x_l)
        weight = 1 / min(step, 10)
        new_mean, new_var = unbiased(x_l, model)  # of the labelled half, clean; n / (n - 1)
        mean, var = weight * new_mean + (1 - weight) * mean, weight * new_var + (1 - weight) * var
        torch.testing.assert_close(model.encoder[0].running_mean, mean)
        torch.testing.assert_close(model.encoder[0].running_var, var)
    assert model.num_batches_tracked == 14


def test_statistics_of_the_upper_layers_are_those_of_the_clean_pass():
    model = make()
    x_l, x_u = halves()
    model.training_pass(x_l, x_u)
    p = dict(model.named_parameters())
    _, means, variances, _ = encode(p, LAYERS, x_l, None, "relu")
    for layer, mean, var in zip(model.encoder, means[1:], variances[1:], strict=True):
        torch.testing.assert_close(layer.running_mean, mean.detach())
        torch.testing.assert_close(layer.running_var, var.detach() * 4 / 3)


def test_recompute_is_a_plain_average():
    model = make()
    model(halves(seed=9)[0])
    batches = [halves(n_l=3 + i, seed=i)[0] for i in range(3)]
    model.recompute_statistics(iter(batches))
    moments = [unbiased(batch, model) for batch in batches]
    torch.testing.assert_close(model.encoder[0].running_mean, sum(mean for mean, _ in moments) / 3)
    torch.testing.assert_close(model.encoder[0].running_var, sum(var for _, var in moments) / 3)
    # One batch: in the top layer as well the statistics are exactly that batch's.
    model.recompute_statistics([batches[0]])
    _, means, variances, _ = encode(dict(model.named_parameters()), LAYERS, batches[0], None, "relu")
    torch.testing.assert_close(model.encoder[-1].running_mean, means[-1].detach())
    torch.testing.assert_close(model.encoder[-1].running_var, variances[-1].detach() * 3 / 2)


def test_evaluation_uses_the_statistics_and_changes_nothing():
    model = make()
    for step in range(3):
        model.training_pass(*halves(seed=step))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    x = halves(n_l=7, seed=20)[0]
    h = x
    for layer in model.encoder:
        z = (layer.linear(h) - layer.running_mean) / torch.sqrt(layer.running_var + 1e-10)
        h = z + layer.beta
        h = torch.relu(h) if layer is not model.encoder[-1] else layer.gamma * h
    torch.testing.assert_close(model(x), h)
    torch.testing.assert_close(model(x[:1]), h[:1])  # a sample's logits do not depend on its neighbours
    assert model(x[:0]).shape == (0, 3)
    model.training_pass(*halves())
    model.reconstruct(x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "noise_state"), name


def test_training_mode_forward_uses_the_batch():
    model = make()
    x_l, x_u = halves()
    torch.testing.assert_close(model(x_l), model.training_pass(x_l, x_u).clean_logits)


def test_reset_statistics():
    model = make()
    model(halves()[0])
    model.reset_statistics()
    assert model.num_batches_tracked == 0
    for layer in model.encoder:
        assert not layer.running_mean.any()
        assert (layer.running_var == 1).all()
    model(halves(seed=3)[0])  # and the memory is clear: the next batch counts fully
    torch.testing.assert_close(model.encoder[0].running_mean, unbiased(halves(seed=3)[0], model)[0])


def test_one_labelled_sample_is_finite_and_leaves_the_statistics():
    model = make(noise_std=0.0)
    model(halves()[0])
    before = copy.deepcopy(model.state_dict())
    output = model.training_pass(halves(n_l=1)[0], halves()[1])
    (output.logits.sum() + sum(output.denoising)).backward()
    top = model.encoder[-1]
    torch.testing.assert_close(output.logits, (top.gamma * top.beta).unsqueeze(0))  # z = 0
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "noise_state"), name


# Only what is needed is computed


def rows_seen(model, **kwargs):
    """The rows of every matrix product of a training pass over 4 + 6 samples, by module name."""
    rows, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: rows.setdefault(name, []).append(len(inputs[0]))
                )
            )
    output = model.training_pass(*halves(), **kwargs)
    for handle in handles:
        handle.remove()
    return output, rows


def test_labelled_and_unlabelled_rows_share_a_matrix_product():
    output, rows = rows_seen(make())
    for index in range(3):
        assert rows[f"encoder.{index}.linear"] == [
            4,
            4 + 6 + 6,
        ]  # clean labelled; both halves corrupted, clean
        assert rows[f"decoder.{index}"] == [6]  # the decoder runs on the unlabelled half alone
    assert all(cost is not None for cost in output.denoising)


def test_a_layer_is_one_call_of_its_op(monkeypatch):
    calls = []

    def counted(module, name):
        op = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kwargs: (calls.append(name), op(*args, **kwargs))[1]
        )

    counted(ladder_encoder_module, "ladder_encoder")
    counted(combinator_module, "ladder_decoder")
    make().training_pass(*halves())
    assert (
        calls.count("ladder_encoder") == 3 + 3
    )  # every row of a layer at once; beside them, the clean labelled
    assert calls.count("ladder_decoder") == 4


def test_clean_logits_without_gradients():
    model = make()
    twin = copy.deepcopy(model)
    output, expected = model.training_pass(*halves(), clean_gradients=False), twin.training_pass(*halves())
    assert not output.clean_logits.requires_grad
    assert torch.equal(output.clean_logits, expected.clean_logits)
    assert torch.equal(output.logits, expected.logits)
    assert output.logits.requires_grad


def test_bottom_cost_alone_needs_no_clean_pass_over_the_unlabelled_half():
    output, rows = rows_seen(make(), costs=[True, False, False, False])
    assert all(rows[f"encoder.{index}.linear"] == [4, 4 + 6] for index in range(3))
    assert all(rows[f"decoder.{index}"] == [6] for index in range(3))
    assert [cost is None for cost in output.denoising] == [False, True, True, True]


def test_nothing_is_decoded_below_the_lowest_wanted_cost():
    output, rows = rows_seen(make(), costs=[False, False, True, False])
    assert set(rows) == {"encoder.0.linear", "encoder.1.linear", "encoder.2.linear", "decoder.2"}
    assert rows["encoder.1.linear"] == [4, 16]
    assert rows["encoder.2.linear"] == [4, 10]  # the clean pass stops at the highest wanted cost
    assert [cost is None for cost in output.denoising] == [True, True, False, True]


def test_unwanted_costs_do_not_change_the_others():
    model = make()
    state = model.noise_state.clone()
    full = model.training_pass(*halves())
    for index in range(4):
        model.noise_state.copy_(state)
        output = model.training_pass(*halves(), costs=[i == index for i in range(4)])
        torch.testing.assert_close(output.denoising[index], full.denoising[index])
        torch.testing.assert_close(output.logits, full.logits)


def test_gamma_model_has_and_computes_the_top_of_the_decoder_alone():
    model = make(combinator=["none", "none", "none", "gaussian"])
    assert {n for n, _ in model.named_parameters() if not n.startswith("encoder")} == {"combinators.3.weight"}
    assert [combinator is None for combinator in model.combinators] == [True, True, True, False]
    output, rows = rows_seen(model)
    assert set(rows) == {"encoder.0.linear", "encoder.1.linear", "encoder.2.linear"}
    assert [cost is None for cost in output.denoising] == [True, True, True, False]
    total_cost(output.logits, output.denoising, [0, 0, 0, 1.0], torch.arange(4) % 3).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())

    full = make()
    full.load_state_dict(model.state_dict(), strict=False)
    expected = full.training_pass(*halves())
    torch.testing.assert_close(model.training_pass(*halves()).denoising[3], expected.denoising[3])


def test_baseline_sees_the_labelled_half_alone():
    model = make(combinator="none")
    assert all(name.startswith("encoder") for name, _ in model.named_parameters())
    output, rows = rows_seen(model)
    assert all(products == [4, 4] for products in rows.values())
    assert output.denoising == (None,) * 4
    F.cross_entropy(output.logits, torch.arange(4) % 3).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.training_pass(halves()[0], torch.empty(0, 6)).logits.shape == (4, 3)


def test_images_get_no_gradient_unless_asked_for():
    x_l, x_u = halves()
    output = make().training_pass(x_l, x_u)
    (output.logits.sum() + sum(output.denoising)).backward()
    assert x_l.grad is None
    assert x_u.grad is None
    x_l.requires_grad_()
    make().training_pass(x_l, x_u).logits.square().sum().backward()
    assert x_l.grad.abs().max() > 0


# Manners of a module


def test_state_dict_round_trip_without_executing_code():
    model = make()
    for step in range(3):
        model.training_pass(*halves(seed=step))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make(seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = halves()[0]
    assert torch.equal(other.eval()(x), model.eval()(x))
    model.train()(x), other.train()(x)  # the count of batches came along
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_deepcopy_is_independent():
    model = make()
    model(halves()[0])
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(halves()[0]), model.eval()(halves()[0]))
    before = copy.deepcopy(model.state_dict())
    twin.train().training_pass(*halves(seed=8))
    with torch.no_grad():
        twin.encoder[0].linear.weight.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype):
    model = make(dtype=torch.float32).to(dtype)
    assert all(t.dtype == dtype for t in model.state_dict().values() if t.is_floating_point())
    made = LadderNetwork(LAYERS, dtype=dtype)
    assert {k: v.dtype for k, v in made.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }
    x_l, x_u = halves(dtype=dtype)
    output = model.training_pass(x_l, x_u)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(t.dtype == wide for t in (output.logits, output.clean_logits, *output.denoising))
    (output.logits.sum() + sum(output.denoising)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(x_l).dtype == wide


def test_meta_device():
    model = LadderNetwork(LAYERS, device="meta")
    assert all(t.is_meta for t in model.state_dict().values())
    assert not any(t.is_meta for t in model.to_empty(device="cpu").state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_statistics_and_costs_in_float32(dtype):
    torch.manual_seed(0)
    model = make(dtype=torch.float32)
    x_l, x_u = halves(n_l=300, n_u=200, dtype=torch.float32)
    x_l = x_l + 5  # sums that a 16-bit accumulator loses
    expected = copy.deepcopy(model).training_pass(x_l, x_u)  # with the same noise
    with torch.autocast("cpu", dtype):
        output = model.training_pass(x_l, x_u)
        z_pre = F.linear(x_l, model.encoder[0].linear.weight)
        evaluated = model.eval()(x_l)
    assert z_pre.dtype == dtype
    torch.testing.assert_close(model.encoder[0].running_mean, z_pre.float().mean(0))
    torch.testing.assert_close(model.encoder[0].running_var, z_pre.float().var(0))
    for value, wide in zip(output.denoising, expected.denoising, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wide, rtol=0.1, atol=0.2)
    assert output.logits.dtype == torch.float32
    # Next to 5 bfloat16 has steps of a tenth of the inputs' deviation.
    assert (output.logits - expected.logits).square().mean() < 0.01 * expected.logits.var()
    assert evaluated.dtype == torch.float32


def test_compiles_without_a_graph_break():
    model = make(dtype=torch.float32)
    x_l, x_u = halves(dtype=torch.float32)
    expected = copy.deepcopy(model).training_pass(x_l, x_u)
    output = torch.compile(model.training_pass, backend="eager", fullgraph=True)(x_l, x_u)
    assert isinstance(output, LadderOutput)
    torch.testing.assert_close(output.denoising, expected.denoising)
    torch.testing.assert_close(output.logits, expected.logits)


def test_many_networks_at_once_are_each_what_they_are_alone():
    """vmap over a leading axis of seeds: parameters, statistics and noise of their own."""
    networks = [make(seed=seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(networks)
    x_l, x_u = torch.rand(3, 4, 6, dtype=torch.float64), torch.rand(3, 5, 6, dtype=torch.float64)

    class Pass(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = networks[0]

        def forward(self, x_l, x_u):
            output = self.model.training_pass(x_l, x_u)
            return output.logits.square().mean() + sum(output.denoising)

    def cost(parameters, buffers, x_l, x_u):
        state = {f"model.{name}": value for name, value in (*parameters.items(), *buffers.items())}
        return torch.func.functional_call(Pass(), state, (x_l, x_u))

    together = torch.func.vmap(cost)(parameters, buffers, x_l, x_u)
    together.sum().backward()
    for index, network in enumerate(networks):
        output = network.training_pass(x_l[index], x_u[index])
        alone = output.logits.square().mean() + sum(output.denoising)
        torch.testing.assert_close(together[index], alone)
        alone.backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameters[name].grad[index], parameter.grad)
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(buffers[name][index], buffer)


def test_reconstruct_is_the_decoder_of_the_training_pass():
    model = make()
    _, x = halves()
    before = model.noise_state.clone()
    _, noise = noise_of(before, [0.3] * 4, 0, len(x), LAYERS, stream=1 << 62)
    corrupted, z_hat = model.reconstruct(x)
    _, _, costs = naive(dict(model.named_parameters()), LAYERS, x, x, noise, noise)
    torch.testing.assert_close(corrupted, x + noise[0])
    torch.testing.assert_close((z_hat - x).square().mean(), costs[0].detach())
    assert not z_hat.requires_grad
    assert torch.equal(model.noise_state, before)  # a picture in the middle of training does not change it
    assert torch.equal(model.reconstruct(x)[0], corrupted)
    model.training_pass(x, x)
    assert not torch.equal(model.reconstruct(x)[0], corrupted)


def test_it_learns():
    """Two blobs, one label each: the decoder's cost falls and the network tells them apart."""
    torch.manual_seed(0)
    centres = torch.tensor([[2.0, 0.0, 0.0, 1.0], [0.0, 2.0, 1.0, 0.0]])
    y = torch.arange(200) % 2
    x = centres[y] + 0.3 * torch.randn(200, 4)
    model = LadderNetwork([4, 8, 2], noise_std=0.2)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    first = None
    for _ in range(100):
        output = model.training_pass(x[:4], x)
        cost = total_cost(output.logits, output.denoising, [1.0, 0.1, 0.1], y[:4])
        first = first or output.denoising[0].item()
        optimiser.zero_grad()
        cost.backward()
        optimiser.step()
    model.recompute_statistics([x])
    assert output.denoising[0] < 0.2 * first
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.98


# Errors


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"layers": [5]}, ValueError, "layers must have at least two widths"),
        ({"layers": [5, 0, 2]}, ValueError, "each at least 1"),
        ({"layers": [5, 2.5]}, TypeError, "layers must be a sequence of integers"),
        ({"layers": "784-10"}, TypeError, "layers must be a sequence of integers"),
        (
            {"activation": "tanh"},
            ValueError,
            "activation must be one of relu, leaky_relu, linear, got 'tanh'",
        ),
        ({"combinator": "gauss"}, ValueError, "combinator must be one of gaussian"),
        ({"combinator": ["gaussian"] * 2}, ValueError, "combinator must be a name or 4 of them.*got 2"),
        ({"combinator": ["gaussian", "none", "gaussian", "gaussian"]}, ValueError, '"none" above a layer'),
        ({"noise_std": [0.3] * 5}, ValueError, "noise_std must be a number or 4 of them.*got 5"),
        ({"noise_std": -0.1}, ValueError, "noise_std must be finite and not negative"),
        ({"noise_std": math.nan}, ValueError, "noise_std must be finite and not negative"),
        ({"noise_std": ["0.3"] * 4}, TypeError, "noise_std must hold numbers"),
        ({"noise_std": True}, TypeError, "noise_std must hold numbers, got True"),
        ({"noise_std": "0.3"}, TypeError, "noise_std must be a number or a sequence of them, got '0.3'"),
        ({"layers": None}, TypeError, "layers must be a sequence of integers.*got None"),
    ],
)
def test_wrong_networks(kwargs, error, message):
    with pytest.raises(error, match=message):
        LadderNetwork(**{"layers": LAYERS, **kwargs})


def test_wrong_inputs():
    model = make()
    x_l, x_u = halves()
    with pytest.raises(ValueError, match=r"x must have shape \(N, 6\), got \(4, 5\)"):
        model(x_l[:, :5])
    with pytest.raises(ValueError, match=r"x_unlabelled must have shape \(N, 6\), got \(2, 3, 6\)"):
        model.training_pass(x_l, x_u.view(2, 3, 6))
    with pytest.raises(TypeError, match=r"x_labelled must be a floating-point tensor, got torch.uint8"):
        model.training_pass(x_l.to(torch.uint8), x_u)
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got list"):
        model([[0.0] * 6])
    with pytest.raises(ValueError, match="x_labelled must hold at least 1 sample, got 0"):
        model.training_pass(x_l[:0], x_u)
    with pytest.raises(ValueError, match="x must hold at least 1 sample, got 0"):
        model(x_l[:0])
    with pytest.raises(ValueError, match="x_unlabelled must hold at least 2 samples, got 1"):
        model.training_pass(x_l, x_u[:1])
    with pytest.raises(ValueError, match=r"costs must have 4 entries, one a layer 0\.\.L, got 3"):
        model.training_pass(x_l, x_u, costs=[True] * 3)
    assert model.num_batches_tracked == 0  # a refused call leaves no trace


def test_costs_and_reconstructions_that_the_network_does_not_have():
    model = make(combinator=["none", "none", "gaussian", "gaussian"])
    with pytest.raises(ValueError, match=r"costs\[1\] asks for the cost of a layer whose combinator is"):
        model.training_pass(*halves(), costs=[False, True, True, True])
    with pytest.raises(ValueError, match="reconstruct needs a combinator at layer 0"):
        model.reconstruct(halves()[1])


def test_recompute_refuses_and_leaves_the_statistics():
    model = make()
    x = halves()[0]
    model(x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="batches must hold a batch of at least two samples"):
        model.recompute_statistics([])
    with pytest.raises(ValueError, match="batches must hold a batch of at least two samples"):
        model.recompute_statistics([x[:1]])
    with pytest.raises(ValueError, match=r"batches must have shape \(N, 6\)"):
        model.recompute_statistics([x, x[:, :5]])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_every_accepted_combinator_list_is_a_tail():
    for names in itertools.product(["gaussian", "none"], repeat=3):
        tail = list(names) == sorted(names, reverse=True)  # "none" first
        if tail:
            LadderNetwork([2, 2, 2], combinator=names).training_pass(torch.rand(3, 2), torch.rand(3, 2))
        else:
            with pytest.raises(ValueError, match="none"):
                LadderNetwork([2, 2, 2], combinator=names)

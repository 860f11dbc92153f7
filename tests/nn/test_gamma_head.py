"""The Γ-model's top level on a network of the user's: against the formula, the Ladder network, and its manners."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from ladderfast.models import LadderNetwork
from ladderfast.nn import GammaHead
from ladderfast.ops import ladder_encoder


def make(num_features=3, dtype=torch.float64, **kwargs):
    """A head with every parameter away from its start value."""
    head = GammaHead(num_features, dtype=dtype, **kwargs)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def normalised(x):
    mean = x.mean(0)
    var = (x - mean).square().mean(0)
    return (x - mean) / (var + 1e-10).sqrt(), mean, var


def written_out(head, x, clean, num_labelled, noise):
    p = dict(head.named_parameters())
    parts = [normalised(part)[0] for part in (x[:num_labelled], x[num_labelled:]) if len(part)]
    z_noisy = torch.cat(parts) + noise
    logits = z_noisy + p["encoder.beta"]
    if "encoder.gamma" in p:
        logits = logits * p["encoder.gamma"]
    u = normalised(torch.softmax(logits[num_labelled:], 1))[0]
    a = p["decoder.combinator.weight"]
    mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
    v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
    z_hat = (z_noisy[num_labelled:] - mu) * v + mu
    z, mean, var = normalised(clean)
    return logits, (z - (z_hat - mean) / (var + 1e-10).sqrt()).square().mean()


@pytest.mark.parametrize(
    ("num_labelled", "scale", "noise_std"), [(4, True, 0.3), (0, False, 0.2), (1, True, 0.0)]
)
def test_values_and_gradients_are_those_of_the_formula(num_labelled, scale, noise_std):
    head = make(scale=scale, noise_std=noise_std)
    x = torch.randn(num_labelled + 6, 3, dtype=torch.float64, requires_grad=True)
    clean = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(len(x), 3, dtype=torch.float64)
    noise = ladder_encoder(zeros, len(x), noise_std=1.0, noise_state=head.noise_state.clone()).z * noise_std
    out = head(x, clean, num_labelled=num_labelled)
    logits, cost = written_out(head, x, clean, num_labelled, noise)
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.cost, cost)
    inputs = (x, clean, *head.parameters())
    weights = torch.randn_like(logits)
    grads = torch.autograd.grad((out.logits * weights).sum() + out.cost, inputs)
    expected = torch.autograd.grad((logits * weights).sum() + cost, inputs)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-9)


def test_it_is_the_top_of_a_gamma_model():
    """A Γ-model of one layer, without noise, is a linear network with this head."""
    model = LadderNetwork([5, 3], combinator=["none", "gaussian"], noise_std=0.0, dtype=torch.float64)
    head = make(noise_std=0.0)
    with torch.no_grad():
        for ours, theirs in (
            (model.encoder[0].beta, head.encoder.beta),
            (model.encoder[0].gamma, head.encoder.gamma),
            (model.combinators[1].weight, head.decoder.combinator.weight),
        ):
            ours.copy_(theirs)
    x_l, x_u = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = model.training_pass(x_l, x_u)
    net = model.encoder[0].linear
    out = head(net(torch.cat([x_l, x_u])), net(x_u), num_labelled=6)
    torch.testing.assert_close(out.logits[:6], expected.logits)
    torch.testing.assert_close(out.cost, expected.denoising[1])


def test_statistics_for_evaluation_follow_the_clean_rows():
    head = make()
    mean = var = 0
    for step in range(1, 13):
        clean = torch.randn(7, 3, dtype=torch.float64) * step
        head(torch.randn(7, 3, dtype=torch.float64), clean)
        weight = 1 / min(step, 10)
        mean, var = weight * clean.mean(0) + (1 - weight) * mean, weight * clean.var(0) + (1 - weight) * var
    torch.testing.assert_close(head.encoder.running_mean, mean)
    torch.testing.assert_close(head.encoder.running_var, var)
    before = copy.deepcopy(head.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    z = (x - mean) / (var + 1e-10).sqrt()
    torch.testing.assert_close(head.eval()(x), head.encoder.gamma * (z + head.encoder.beta))
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Without clean rows, in training mode: the batch's own statistics, which are not kept.
    torch.testing.assert_close(head.train()(x), head.encoder.gamma * (normalised(x)[0] + head.encoder.beta))
    assert torch.equal(head.encoder.running_mean, before["encoder.running_mean"])


def test_every_step_has_noise_of_its_own():
    head = make()
    x = torch.randn(2000, 3, dtype=torch.float64)
    head.encoder.gamma.data.fill_(1)
    head.encoder.beta.data.zero_()
    noises = [head(x, x).logits - normalised(x)[0] for _ in range(2)]
    assert noises[0].std().item() == pytest.approx(0.3, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in noises]))[0, 1]) < 0.05
    assert make().noise_state[0] != make().noise_state[0]


def test_processes_that_share_the_buffer_have_noise_of_their_own(monkeypatch):
    head = make()
    x = torch.randn(6, 3, dtype=torch.float64)
    state = head.noise_state.clone()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    logits = []
    for rank in (0, 1, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        head.noise_state.copy_(state)
        logits.append(head(x, x).logits)
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])


def test_start_values():
    torch.manual_seed(0)
    head = GammaHead(4)
    x = torch.randn(6, 4)
    assert (head.encoder.gamma == 1).all()
    assert not head.encoder.beta.any()
    assert set(head.state_dict()) == {
        "num_batches_tracked",
        "noise_state",
        "encoder.beta",
        "encoder.gamma",
        "encoder.running_mean",
        "encoder.running_var",
        "decoder.combinator.weight",
    }
    head(x, x)
    torch.manual_seed(0)
    head.reset_parameters()
    torch.manual_seed(0)
    for name, value in GammaHead(4).state_dict().items():
        assert torch.equal(head.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs(dtype):
    head = make(dtype=torch.float32, noise_std=0.0)
    x, clean = torch.randn(9, 3), torch.randn(6, 3)
    expected = head(x.to(dtype).float(), clean.to(dtype).float(), num_labelled=3)
    with torch.autocast("cpu", dtype):
        out = head(x.to(dtype), clean.to(dtype), num_labelled=3)
    assert out.logits.dtype == out.cost.dtype == torch.float32
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.cost, expected.cost)


def test_compiles_without_a_graph_break():
    head = make(dtype=torch.float32)
    x, clean = torch.randn(9, 3), torch.randn(6, 3)
    expected = copy.deepcopy(head)(x, clean, num_labelled=3)
    out = torch.compile(head, backend="eager", fullgraph=True)(x, clean, num_labelled=3)
    torch.testing.assert_close(out.cost, expected.cost)


def test_a_network_of_ones_own_learns():
    """Two moons of points with three labels each: the cost falls, and the moons are told apart."""
    torch.manual_seed(0)
    angle = torch.rand(400) * math.pi
    y = torch.arange(400) % 2
    x = torch.stack([angle.cos() + y - 0.5, angle.sin() * (1 - 2 * y) + 0.25 * y], 1) + 0.03 * torch.randn(
        400, 2
    )
    labelled = torch.tensor([int((y == c).nonzero()[i]) for c in (0, 1) for i in range(3)])
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 30), torch.nn.BatchNorm1d(30), torch.nn.ReLU(), torch.nn.Linear(30, 2, bias=False)
    )
    head = GammaHead(2, noise_std=0.3)
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.01)
    costs = []
    for _ in range(150):
        inputs = torch.cat([x[labelled], x])
        out = head(net(inputs + 0.1 * torch.randn_like(inputs)), net(x), num_labelled=len(labelled))
        cost = F.cross_entropy(out.logits[: len(labelled)], y[labelled]) + out.cost
        optimiser.zero_grad()
        cost.backward()
        optimiser.step()
        costs.append(out.cost.item())
    assert sum(costs[-10:]) < 0.4 * sum(costs[:10])
    net.eval(), head.eval()
    assert (head(net(x)).argmax(1) == y).float().mean() > 0.85


def test_wrong_inputs():
    head = GammaHead(3)
    x = torch.rand(6, 3)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3\), got \(6, 2\)"):
        head(x[:, :2])
    with pytest.raises(ValueError, match=r"clean must have shape \(N, 3\), got \(3,\)"):
        head(x, x[0])
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
        head(x.long())
    with pytest.raises(TypeError, match="clean must be a floating-point tensor, got list"):
        head(x, [1.0])
    for rows, labelled in ((5, 0), (6, 1), (4, -2), (1, 5)):
        with pytest.raises(ValueError, match="x must hold num_labelled rows and then those of clean"):
            head(x, torch.rand(rows, 3), num_labelled=labelled)
    with pytest.raises(ValueError, match="combinator must be the name of a function g; got 'none'"):
        GammaHead(3, combinator="none")
    assert head.num_batches_tracked == 0

import copy
import math

import pytest
import torch

from ladderfast.data import Batch
from ladderfast.models import RTagger
from ladderfast.training import TaggerObjective

N, K, SIDE = 4, 3, 6
D = SIDE * SIDE
LEVELS = [
    {"encoder": "convlstm", "channels": 4, "decoder": "convg2"},
    {"encoder": "conv", "channels": 5, "stride": 2},
    {"encoder": "pool"},
    {"encoder": "lstm", "channels": 6},
]


def make(binary=False, **options):
    model = RTagger((SIDE, SIDE), LEVELS, binary=binary, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def data(*shape, binary=False):
    x = torch.rand(*shape, D, dtype=torch.float64)
    return x.round() if binary else x


def masks():
    return torch.rand(N, K, D, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize(
    ("sequences", "options"),
    [(False, {}), (True, {}), (False, {"binary": True}), (False, {"binary": True, "feed_logits": True})],
)
def test_iterations_written_out(sequences, options):
    """The RLadder is fed group by group where it can be: it sees four channels, and keeps its state."""
    model = make(num_classes=2, **options)
    x = data(N, 3, binary=model.binary) if sequences else data(N, binary=model.binary)
    corrupted, m = model.corrupt(x), masks()
    out = model(x, K, 2, corrupted=corrupted, mask=m)

    def density(z, x, variance):
        if model.binary:
            return x[:, None] * z + (1 - x[:, None]) * (1 - z)
        return torch.exp(-((x[:, None] - z) ** 2) / (2 * variance)) / torch.sqrt(2 * math.pi * variance)

    v = None if model.binary else torch.exp(model.log_variance)
    z, state = torch.full_like(m, 0.5), None
    fed = z
    for t in range(2):
        seen, wanted = (corrupted[:, t], x[:, t + 1]) if sequences else (corrupted, x)
        if model.binary:
            xi = z * (1 - 2 * model.noise) + model.noise
            like = density(xi, seen, None)
            dz = m / ((xi * m).sum(1) - 1 + seen)[:, None]
        else:
            like = density(z, seen, v + model.noise**2)
            dz = (seen[:, None] - z) * m * like
        told = torch.stack([fed, m, dz, like / like.sum(1, keepdim=True)], 2)
        step, state = model.engine.step(told.reshape(N * K, 4, SIDE, SIDE), state)
        p = step.prediction
        mean, var = p.mean((0, 2, 3), keepdim=True), p.var((0, 2, 3), correction=0, keepdim=True)
        p = ((p - mean) / torch.sqrt(var + 1e-10)).reshape(N, K, 2, D)
        unsquashed = model.norm.weight[0] * p[:, :, 0] + model.shift
        z = torch.sigmoid(unsquashed) if model.binary else unsquashed
        fed = unsquashed if model.feed_logits else z
        m = torch.softmax(model.norm.weight[1] * p[:, :, 1], 1)
        torch.testing.assert_close(out.z[t], z)
        torch.testing.assert_close(out.m[t], m)
        torch.testing.assert_close(out.cost[t], -(m * density(z, wanted, v)).sum(1).log().sum(1))
        share = torch.softmax(step.logits.reshape(N, K, 3), 2)[..., :2]
        share = share.sum(1) / share.sum((1, 2))[:, None]
        torch.testing.assert_close(out.log_classes[t], share.log())
    assert state.step == 2


def test_groups_are_interchangeable_and_have_a_state_each():
    model, x, m = make(), data(N), masks()
    corrupted, order = model.corrupt(x), [2, 0, 1]
    out = model(x, K, 3, corrupted=corrupted, mask=m)
    turned = model(x, K, 3, corrupted=corrupted, mask=m[:, order])
    for t in range(3):
        torch.testing.assert_close(turned.m[t], out.m[t][:, order])
        torch.testing.assert_close(turned.z[t], out.z[t][:, order])
    torch.testing.assert_close(turned.cost, out.cost)


@pytest.mark.parametrize("binary", [False, True])
def test_every_parameter_learns(binary):
    model = make(binary, num_classes=2)
    out = model(data(N, binary=binary), K, 2)
    (out.cost.sum() - out.log_classes[-1, :, 0].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


def test_groups_and_steps_are_chosen_at_the_call():
    model, x = make(), data(N, 4)
    assert model(x, 2, 3).m[2].shape == (N, 2, D)
    assert len(model(x, 4, 1).m) == 1
    with pytest.raises(ValueError, match="x must hold at least 5 frames for 4 iterations, got 4"):
        model(x, 2, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(N, T, 36\), got \(4, 4, 35\)"):
        model(x[..., 1:], 2, 3)
    with pytest.raises(ValueError, match=r"image_shape must be \(height, width\), got 28"):
        RTagger(28, LEVELS)
    with pytest.raises(ValueError, match=r"image_shape must be \(height, width\), got \(1, 6, 6\)"):
        RTagger((1, 6, 6), LEVELS)
    with pytest.raises(TypeError, match=r"width of image_shape must be a whole number, got 6\.0"):
        RTagger((6, 6.0), LEVELS)
    with pytest.raises(ValueError, match=r"image_shape must be positive, got \(0, 6\)"):
        RTagger((0, 6), LEVELS)


def test_statistics_for_evaluation_are_computed_anew():
    model, x = make(), data(32)

    def drawn():
        return {"generator": torch.Generator().manual_seed(5)}

    expected = model(x, K, 2, **drawn())
    stale = model.eval()(x, K, 2, **drawn())
    assert not torch.allclose(stale.z[-1], expected.z[-1], atol=0.3)
    model.recompute_statistics([x], K, 2, **drawn())
    assert not model.training
    # The variance of the statistics is the unbiased one, which is all that differs.
    torch.testing.assert_close(model(x, K, 2, **drawn()).z[-1], expected.z[-1], atol=0.1, rtol=0)


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch():
    model = make(num_classes=2)
    x, m = data(N), masks()
    model.recompute_statistics([data(N) for _ in range(3)], K, 2)
    model.eval()
    whole, alone = (model(x[:n], K, 2, corrupted=x[:n], mask=m[:n]) for n in (N, 1))
    for name in ("z", "m"):
        for t in range(2):
            torch.testing.assert_close(getattr(whole, name)[t][:1], getattr(alone, name)[t])
    torch.testing.assert_close(whole.cost[:, :1], alone.cost)
    torch.testing.assert_close(whole.log_classes[:, :1], alone.log_classes)


def test_one_image_in_one_group_is_evaluated():
    model, x = make(), data(N)
    model.recompute_statistics([data(N)], 1, 2)
    model.eval()
    whole, alone = (model(x[:n], 1, 2, corrupted=x[:n]) for n in (N, 1))
    torch.testing.assert_close(whole.z[1][:1], alone.z[1])
    with pytest.raises(ValueError, match=r"at least two samples for a single group, .* got 1"):
        model.train()(x[:1], 1, 2)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_weights_of_16_bits(kind, binary):
    model = RTagger((SIDE, SIDE), LEVELS, num_classes=2, binary=binary, dtype=torch.bfloat16)
    wide = copy.deepcopy(model).double()
    x, m = data(N, binary=binary).to(kind), masks().to(kind)
    out, right = (
        net(x.to(t), K, 2, corrupted=x.to(t), mask=m.to(t))
        for net, t in ((model, kind), (wide, torch.float64))
    )
    assert out.z[0].dtype == out.cost.dtype == kind
    torch.testing.assert_close(out.m[0].double(), right.m[0], atol=0.1, rtol=0)
    torch.testing.assert_close(out.cost[0].double(), right.cost[0], atol=0, rtol=0.1)
    out.cost.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_clean_input_has_statistics_of_its_own():
    """With them, evaluation says of clean input what training says of it, but for the unbiased variance."""
    model, x = make(noise=1.0), data(32)

    class Images:
        x_test, owner_test = x, torch.randint(3, (32, D))

        def __len__(self):
            return 1

        def get(self, epoch, step):
            return Batch(x[:0], torch.zeros(0, 0), x)

    def drawn():
        return {"generator": torch.Generator().manual_seed(1)}

    expected = model(x, K, 2, corrupted=x, **drawn()).z[-1].detach()
    apart = []
    for corrupted in (False, True):
        model.recompute_statistics([x], K, 2, corrupted=corrupted, **drawn())
        found = model.eval()(x, K, 2, corrupted=x, **drawn()).z[-1].detach()
        apart.append(float((found - expected).abs().max()))
    assert apart[0] < 0.1 < 0.3 < apart[1]
    objective = TaggerObjective(groups=K, iterations=2, test_batch=32)
    with torch.no_grad():
        figures = objective.measure(model, Images())
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.recompute_statistics([x], K, 2, corrupted=False, **drawn())
        assert (
            figures["clean_ami"]
            == objective._figures(model, x, Images.owner_test, None, corrupted=False)["ami"]
        )
        model.recompute_statistics([x], K, 2, **drawn())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, kept[name]), name


def test_a_measurement_forgets_the_running_averages():
    x = data(12)

    class Images:
        x_test, owner_test = x, torch.randint(3, (12, D))

        def __len__(self):
            return 2

        def get(self, epoch, step):
            return Batch(x[:0], torch.zeros(0, 0), x[6 * step : 6 * step + 6])

    model, objective = make().eval(), TaggerObjective(groups=K, iterations=2, test_batch=6)
    with torch.no_grad():
        first = objective.measure(model, Images())
        for buffer in model.buffers():
            buffer.mul_(3)
        assert objective.measure(model, Images()) == first

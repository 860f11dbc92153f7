import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ladderfast.models import Tagger
from ladderfast.models.tagger import PUBLISHED_BINARY, PUBLISHED_CONTINUOUS, LadderMapping, class_shares

N, K, D = 6, 3, 5


def make(binary=True, layers=(7, 6, 4), **options):
    """A Tagger in float64 whose parameters are all away from their start values."""
    model = Tagger(D, list(layers), binary=binary, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def data(binary=True):
    x = torch.rand(N, D, dtype=torch.float64)
    return x.round() if binary else x


def normalised(t):
    return (t - t.mean(0)) / torch.sqrt(t.var(0, correction=0) + 1e-10)


def ladder(mapping, h):
    """The Ladder inside, layer by layer, as Rasmus et al.'s algorithm 1 without noise and costs."""
    laterals = [h]
    for layer in mapping.encoder:
        z = normalised(h @ layer.linear.weight.T)
        laterals.append(z)
        h = z + layer.beta
        h = torch.relu(h) if layer.gamma is None else layer.gamma * h
    logits = h
    y = torch.softmax(h, 1)
    for layer, z in zip(reversed(mapping.decoder), reversed(laterals), strict=True):
        u = normalised(y if layer.linear is None else y @ layer.linear.weight.T)
        a = layer.combinator.weight
        mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
        v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
        v = torch.sigmoid(v) if mapping.squash_v else v
        y = (z - mu) * v + mu
    return y, logits


def by_hand(model, x, corrupted, m, iterations, **options):
    """Algorithms 2 and 3 of the supplement, one group at a time, with likelihoods as they are written."""
    on = {
        **dict.fromkeys({**PUBLISHED_BINARY, **PUBLISHED_CONTINUOUS}, False),
        "density_in_residual": True,
        **options,
    }
    groups = m.shape[1]
    z = torch.full_like(m, model.input_mean)
    seen = z
    found = []
    for _ in range(iterations):
        if model.binary:
            b = model.noise
            xi = [z[:, k] * (1 - 2 * b) + b for k in range(groups)]
            like = [corrupted * p + (1 - corrupted) * (1 - p) for p in xi]
            total = sum(p * m[:, k] for k, p in enumerate(xi))
            dz = [m[:, k] / (total - 1 + corrupted) for k in range(groups)]
            if on["scale_residual"]:
                dz = [d * (1 - 2 * b) for d in dz]
        else:
            w = model.log_variance
            v = torch.exp(torch.asinh(w) if on["variance_map"] == "exp_asinh" else w)
            wide = (v**2 if on["square_variance"] else v) + model.noise**2
            like = [
                torch.exp(-((corrupted - z[:, k]) ** 2) / (2 * wide)) / torch.sqrt(2 * math.pi * wide)
                for k in range(groups)
            ]
            dz = [(corrupted - z[:, k]) * m[:, k] for k in range(groups)]
            if on["density_in_residual"]:
                dz = [d * p for d, p in zip(dz, like, strict=True)]
        ratio = [p / sum(like) for p in like]
        rows = torch.stack([torch.cat([seen[:, k], m[:, k], dz[k], ratio[k]], 1) for k in range(groups)], 1)
        h = torch.relu(normalised(rows.flatten(0, 1) @ model.project.linear.weight.T))
        y, _ = ladder(model.inner, h)
        w_z, w_m = model.read.weight.split(D)
        z_pre = model.z_scale * normalised(y @ w_z.T) + model.z_shift
        m = torch.softmax((model.m_scale * normalised(y @ w_m.T)).unflatten(0, (-1, groups)), 1)
        z_pre = z_pre.unflatten(0, (-1, groups))
        z = torch.sigmoid(z_pre) if model.binary else z_pre
        seen = z_pre if on["feed_logits"] else z
        if model.binary:
            p = (m * z).sum(1)
            cost = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1)
        else:
            density = torch.exp(-((x[:, None] - z) ** 2) / (2 * v)) / torch.sqrt(2 * math.pi * v)
            cost = -(m * density).sum(1).log().sum(1)
        found.append((z, m, cost))
    return found


BINARY = [{}, {"scale_residual": True}, {"feed_logits": True}, PUBLISHED_BINARY]
CONTINUOUS = [
    {},
    PUBLISHED_CONTINUOUS,
    {"density_in_residual": False},
    {"square_variance": True},
    {"variance_map": "exp_asinh"},
]


@pytest.mark.parametrize(
    ("binary", "options"), [(True, o) for o in BINARY] + [(False, o) for o in CONTINUOUS]
)
def test_iterations_written_out(binary, options):
    model = make(binary, **options)
    x = data(binary)
    corrupted = model.corrupt(x)
    m = torch.rand(N, K, D, dtype=torch.float64).softmax(1)
    out = model(x, K, 2, corrupted=corrupted, mask=m)
    written_out = by_hand(model, x, corrupted, m, 2, **options)
    for t, (z, mask, cost) in enumerate(written_out):
        torch.testing.assert_close(out.z[t], z)
        torch.testing.assert_close(out.m[t], mask)
        torch.testing.assert_close(out.cost[t], cost)
    grads = [
        torch.autograd.grad(cost, list(model.parameters()), allow_unused=True)
        for cost in (out.cost.sum(), torch.stack([cost for *_, cost in written_out]).sum())
    ]
    for (name, _), found, expected in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
    assert len(out.z) == len(out.m) == len(out.cost) == 2
    assert out.log_classes is None


@pytest.mark.parametrize(
    ("binary", "options"), [(True, o) for o in BINARY[1:]] + [(False, o) for o in CONTINUOUS[1:]]
)
def test_an_option_changes_the_result(binary, options):
    """So that the comparison above is one of the option."""
    model, x = make(binary, **options), data(binary)
    corrupted, m = model.corrupt(x), torch.rand(N, K, D, dtype=torch.float64).softmax(1)
    with torch.no_grad():
        cost = model(x, K, 2, corrupted=corrupted, mask=m).cost[-1]
        assert (cost - by_hand(model, x, corrupted, m, 2)[-1][2]).abs().max() > 1e-6


def test_the_start_values_are_the_published_ones():
    model = Tagger(D, [4], inner=nn.Identity(), binary=False, **PUBLISHED_CONTINUOUS)
    assert model.variance.item() == pytest.approx(2.41421356)
    assert model.log_variance.item() == pytest.approx(1.0)
    assert Tagger(D, [4, 2], binary=False, variance_start=0.3).variance.item() == pytest.approx(0.3)
    assert model.z_scale.eq(1).all()
    assert model.z_shift.eq(0).all()
    assert model.m_scale.eq(1).all()
    wide = Tagger(300, [900, 2])
    assert wide.project.linear.weight.std().item() == pytest.approx(1200**-0.5, rel=0.02)
    assert wide.read.weight.std().item() == pytest.approx(900**-0.5, rel=0.02)


@pytest.mark.parametrize("squash_v", [False, True])
def test_the_ladder_inside_passes_half_its_input_at_first(squash_v):
    """At 0, as a Ladder starts, the projections of y would be normalised by a variance of 0."""
    h = torch.randn(9, 8)
    y, logits = LadderMapping([8, 6, 5], squash_v=squash_v)(h)
    torch.testing.assert_close(y, h / 2)
    assert logits.shape == (9, 5)


def test_groups_are_interchangeable():
    model, x = make(num_classes=3), data()
    corrupted, m = model.corrupt(x), torch.rand(N, K, D, dtype=torch.float64).softmax(1)
    order = [2, 0, 1]
    out = model(x, K, 3, corrupted=corrupted, mask=m)
    turned = model(x, K, 3, corrupted=corrupted, mask=m[:, order])
    for t in range(3):
        torch.testing.assert_close(turned.z[t], out.z[t][:, order])
        torch.testing.assert_close(turned.m[t], out.m[t][:, order])
    torch.testing.assert_close(turned.cost, out.cost)
    torch.testing.assert_close(turned.log_classes, out.log_classes)


def test_groups_and_iterations_are_chosen_at_the_call():
    model, x = make(), data()
    for groups in (1, 2, 5):
        out = model(x, groups, 1)
        assert out.m[0].shape == (N, groups, D)
        torch.testing.assert_close(out.m[0].sum(1), torch.ones(N, D, dtype=torch.float64))
    short, long = (model(x, K, t, generator=torch.Generator().manual_seed(3)) for t in (2, 4))
    assert torch.equal(long.cost[:2], short.cost)
    assert torch.equal(long.m[1], short.m[1])
    assert not torch.equal(long.m[3], long.m[1])


@pytest.mark.parametrize("binary", [True, False])
def test_every_parameter_learns(binary):
    model, x = make(binary, num_classes=3), data(binary)
    out = model(x, K, 2)
    (out.cost.sum() - out.log_classes[-1, :, 0].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


def test_training_and_evaluation_are_alike():
    model, x = make(), data()
    costs = [
        m(x, K, 2, generator=torch.Generator().manual_seed(1)).cost for m in (model.train(), model.eval())
    ]
    assert torch.equal(*costs)


def test_class_shares():
    """Three groups: one sees class 0, one class 1, and one none."""
    p = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.005, 0.005, 0.99]], dtype=torch.float64)
    shares = class_shares((p.log() + torch.tensor([[0.5], [2.0], [-1.0]]))[None]).exp()[0]
    total = 0.9 + 0.7 + 0.01
    torch.testing.assert_close(
        shares, torch.tensor([(0.8 + 0.1 + 0.005) / total, (0.1 + 0.6 + 0.005) / total], dtype=torch.float64)
    )
    far = class_shares(torch.tensor([[[0.0, 0.0, 1e4], [0.0, -1e4, 1e4]]]))
    torch.testing.assert_close(far.exp(), torch.tensor([[2 / 3, 1 / 3]]), rtol=2e-3, atol=0)


def test_the_corruption():
    torch.manual_seed(1)
    x = torch.ones(400, 250)
    flipped = Tagger(250, [4, 2], noise=0.2).corrupt(x)
    assert set(flipped.unique().tolist()) == {0, 1}
    assert float(flipped.mean()) == pytest.approx(0.8, abs=0.005)
    noisy = Tagger(250, [4, 2], binary=False, noise=0.3).corrupt(x) - x
    assert float(noisy.std()) == pytest.approx(0.3, rel=0.01)
    model = Tagger(250, [4, 2])
    same = [model.corrupt(x, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("binary", "options"),
    [
        (True, {"noise": 0.0}),
        (True, {"noise": 0.5}),
        (False, {"noise": 0.0, "variance_start": 1e-8}),
        (False, {"variance_start": 1e8}),
    ],
)
def test_extremes_stay_finite(binary, options):
    model, x = Tagger(D, [7, 6, 4], binary=binary, **options), data(binary).float()
    m = F.one_hot(torch.randint(K, (N, D)), K).movedim(2, 1).float()
    out = model(x, K, 3, mask=m)
    out.cost.sum().backward()
    assert out.cost.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Own(nn.Module):
    def __init__(self, classes=None):
        super().__init__()
        self.map = nn.Linear(6, 6)
        self.classes = None if classes is None else nn.Linear(6, classes)

    def forward(self, h):
        y = torch.tanh(self.map(h))
        return y if self.classes is None else (y, self.classes(h))


def test_an_inner_network_of_ones_own():
    x = data().float()
    assert Tagger(D, [6], inner=Own())(x, K, 2).cost.shape == (2, N)
    assert Tagger(D, [6], inner=Own(4), num_classes=3)(x, K, 2).log_classes.shape == (2, N, 3)
    assert Tagger(D, [6], inner=Own(4))(x, K, 2).log_classes is None
    assert Tagger(D, [6], inner=Returns(lambda h: (h, None)))(x, K, 1).cost.shape == (1, N)
    with pytest.raises(ValueError, match=r"layers must be \[H\]"):
        Tagger(D, [6, 4], inner=Own())
    with pytest.raises(ValueError, match=r"inner must return \(18, 6\), what it is given, got \(18, 4\)"):
        Tagger(D, [6], inner=nn.Linear(6, 4))(x, K, 1)
    with pytest.raises(
        ValueError, match=r"inner must return logits \(18, 4\) for num_classes, got \(18, 3\)"
    ):
        Tagger(D, [6], inner=Own(3), num_classes=3)(x, K, 1)


class Returns(nn.Module):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, h):
        return self.found(h)


PAIR = "a pair of tensors, \\(N K, H\\) and the classes' logits, for num_classes"
TENSOR = "a tensor \\(N K, H\\), or a pair of it and logits"


@pytest.mark.parametrize(
    ("found", "classes", "wanted", "got"),
    [
        (lambda h: None, 0, TENSOR, "NoneType"),
        (lambda h: [h, h], 0, TENSOR, "list"),
        (lambda h: (h,), 0, TENSOR, r"a tuple of \(Tensor\)"),
        (lambda h: (h, h, h), 0, TENSOR, r"a tuple of \(Tensor, Tensor, Tensor\)"),
        (lambda h: (None, h), 0, TENSOR, r"a tuple of \(NoneType, Tensor\)"),
        (lambda h: h, 3, PAIR, "Tensor"),
        (lambda h: None, 3, PAIR, "NoneType"),
        (lambda h: (h, None), 3, PAIR, r"a tuple of \(Tensor, NoneType\)"),
    ],
)
def test_an_inner_network_that_returns_something_else(found, classes, wanted, got):
    model = Tagger(D, [6], inner=Returns(found), num_classes=classes)
    with pytest.raises(TypeError, match=f"^inner must return {wanted}, got {got}$"):
        model(data().float(), K, 1)


@pytest.mark.parametrize(("binary", "compiler"), [(True, "aot_eager"), (False, "inductor")])
def test_compiled_in_one_piece(binary, compiler):
    model, x = make(binary), data(binary)
    given = {"corrupted": data(binary), "mask": torch.randn(N, K, D, dtype=x.dtype).softmax(1)}

    def gradients(function):
        return torch.autograd.grad(function(x, K, 2, **given).cost.sum(), list(model.parameters()))

    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    torch.testing.assert_close(gradients(compiled), gradients(model))


def test_under_autocast():
    model, x = Tagger(D, [16, 8, 4], num_classes=3), data().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, K, 2)
        m = torch.rand(N, K, D).softmax(1)
        assert model(x, K, 1, corrupted=x.bfloat16(), mask=m.bfloat16()).cost.isfinite().all()
        with pytest.raises(TypeError, match=r"mask must be torch.float32 on cpu, as x is, got torch.float64"):
            model(x, K, 1, mask=m.double())
    assert out.cost.dtype == out.z[0].dtype == out.log_classes.dtype == torch.float32
    out.cost.sum().backward()
    assert model.read.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pixels": 0}, "num_pixels and layers must be positive"),
        ({"layers": []}, "num_pixels and layers must be positive"),
        ({"layers": [5]}, "at least one width of the Ladder"),
        ({"noise": 0.6}, "noise must be from 0 to 0.5, got 0.6"),
        ({"noise": -1.0, "binary": False}, "noise must be finite and not negative"),
        ({"variance_start": 0.0, "binary": False}, "variance_start must be positive"),
        ({"variance_map": "square", "binary": False}, "variance_map must be exp or exp_asinh"),
        (
            {"variance_start": 0.5},
            r"^variance_start means nothing to binary inputs \(binary=True\), got 0\.5$",
        ),
        ({"variance_map": "exp_asinh"}, "variance_map means nothing to binary inputs"),
        ({"density_in_residual": False}, "density_in_residual means nothing to binary inputs"),
        ({"square_variance": True}, "square_variance means nothing to binary inputs"),
        (
            {"scale_residual": True, "binary": False},
            r"^scale_residual means nothing to continuous inputs \(binary=False\), got True$",
        ),
        ({"feed_logits": True, "binary": False}, "feed_logits means nothing to continuous inputs"),
        ({"num_classes": 4}, r"layers must end with num_classes \+ 1 = 5 units"),
        ({"num_classes": -1}, "num_classes must be 0 or positive, got -1"),
        ({"noise": math.nan}, "noise must be from 0 to 0.5, got nan"),
        ({"input_mean": math.nan}, "input_mean must be finite, got nan"),
        ({"input_mean": -math.inf, "binary": False}, "input_mean must be finite, got -inf"),
    ],
)
def test_arguments_that_make_no_tagger(options, message):
    with pytest.raises(ValueError, match=message):
        Tagger(**{"num_pixels": D, "layers": [6, 4], **options})


@pytest.mark.parametrize(
    "options", [{"noise": None}, {"input_mean": "a"}, {"variance_start": "x", "binary": False}]
)
def test_arguments_that_are_no_numbers(options):
    name, value = next(iter(options.items()))
    with pytest.raises(TypeError, match=f"^{name} must be a number, got {value!r}$"):
        Tagger(D, [6, 4], **options)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "meta"])
def test_a_corruption_or_masks_of_another_kind(kind, binary):
    model, x, m = Tagger(D, [6, 4], binary=binary), data(binary).float(), torch.rand(N, K, D).softmax(1)
    got = "torch.float32 on meta" if kind == "meta" else f"{kind} on cpu"
    for name, t in (("corrupted", x), ("mask", m)):
        message = f"^{name} must be torch.float32 on cpu, as x is, got {got}$"
        with pytest.raises(TypeError, match=message):
            model(x, K, 1, **{name: t.to(kind)})


def test_inputs_that_do_not_fit():
    model, x = Tagger(D, [6, 4]), data().float()
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
        model(x.long(), K, 1)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 5\), got \(6, 4\)"):
        model(x[:, :4], K, 1)
    with pytest.raises(ValueError, match=r"mask must have shape \(6, 3, 5\), got \(6, 2, 5\)"):
        model(x, 3, 1, mask=torch.rand(6, 2, 5))
    with pytest.raises(ValueError, match=r"corrupted must have shape \(6, 5\)"):
        model(x, 3, 1, corrupted=x[:2])
    with pytest.raises(ValueError, match="num_groups and num_iterations must be at least 1, got 0 and 1"):
        model(x, 0, 1)
    with pytest.raises(ValueError, match="at least two samples for a single group"):
        model(x[:1], 1, 1)
    with pytest.raises(ValueError, match="x must hold at least one sample, got 0"):
        model(x[:0], K, 1)
    with pytest.raises(TypeError, match=r"num_classes must be a whole number, got 2\.5"):
        Tagger(D, [6, 4], num_classes=2.5)
    for groups in ("2", 2.5):
        with pytest.raises(TypeError, match=f"num_groups must be a whole number, got {groups!r}"):
            model(x, groups, 1)
    with pytest.raises(ValueError, match="x must hold zeros and ones only for binary=True"):
        model(x / 2, K, 1)
    for binary in (True, False):
        with pytest.raises(TypeError, match=r"x must be torch.float32, as the network's parameters are, got"):
            Tagger(D, [6, 4], binary=binary)(x.double(), K, 1)
    with pytest.raises(TypeError, match="no variance"):
        model.variance  # noqa: B018

"""The SWWAE's objective, recipes and pictures, and that runs of it resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ladderfast.data import ImageDataset
from ladderfast.models import SWWAE, SWWAEComparison
from ladderfast.training import (
    EquivarianceObjective,
    Run,
    SWWAEObjective,
    WhereObjective,
    read_recipe,
    recipe_names,
)
from ladderfast.training.swwae_objective import train_classifier, translate

NET = "(4)3c-2p-(5)3c-2p-10fc"
RECIPE = {
    "title": "An SWWAE in a second",
    "model": {
        "class_path": "ladderfast.models.SWWAE",
        "init_args": {"architecture": NET, "image_shape": [8, 8], "batch_norm": True, "dropout_dense": 0.2},
    },
    "data": {"class_path": "ladderfast.data.Digits", "init_args": {"num_labels": 40}},
    "objective": {
        "class_path": "ladderfast.training.SWWAEObjective",
        "init_args": {"lambda_rec": 0.1, "lambda_m": 0.1},
    },
    "epochs": 2,
    "batch_labelled": 20,
    "batch_unlabelled": 260,
    "learning_rate": 0.01,
    "accelerator": "cpu",
    "threads": 1,
    "name": "small",
}


@pytest.fixture
def small():
    return copy.deepcopy(RECIPE)


def a_batch(shape=(8, 8), size=12):
    x = torch.rand(size, *shape).flatten(1)
    y = torch.arange(size) % 4
    data = ImageDataset(x, y, x, y, image_shape=shape)
    return data.batches(size, size, seed=1)


# The cost


def test_the_cost_is_the_weighted_sum():
    net, batches = SWWAE(NET, (8, 8)), a_batch()
    batch = batches.get(0, 0)
    terms = SWWAEObjective(0.5, 0.25, 0.125, 1e-3)(net, batch)
    out = net.training_pass(batch.x_labelled, batch.x_unlabelled, sparsity=True)
    expected = {
        "cross_entropy": 0.5 * F.cross_entropy(out.logits, batch.y_labelled),
        "reconstruction": 0.25 * out.reconstruction,
        "intermediate_1": 0.125 * out.intermediate[0],
        "sparsity": 1e-3 * out.sparsity,
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


@pytest.mark.parametrize(
    ("weights", "terms", "decoded"),
    [
        ({}, {"cross_entropy"}, False),
        ({"lambda_rec": 1.0}, {"cross_entropy", "reconstruction"}, True),
        ({"lambda_m": 1.0}, {"cross_entropy", "intermediate_1"}, True),
        ({"lambda_nll": 0.0, "lambda_rec": 1.0, "lambda_m": 1.0}, {"reconstruction", "intermediate_1"}, True),
        ({"l1": 1.0}, {"cross_entropy", "sparsity"}, False),
    ],
)
def test_the_modes_are_weights(weights, terms, decoded):
    net = SWWAE(NET, (8, 8))
    ran = []
    for name, module in net.named_modules():
        if name.startswith("decoder."):
            module.register_forward_hook(lambda *_: ran.append(1))
    objective = SWWAEObjective(**weights)
    assert set(objective(net, a_batch().get(0, 0))) == terms
    assert bool(ran) == decoded
    classifies = weights.get("lambda_nll", 1) > 0
    assert objective.metric.name == ("test_error" if classifies else "reconstruction_error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambda_nll": 0.0}, "one of lambda_nll, lambda_rec, lambda_m, l1 must be positive"),
        ({"lambda_rec": -1.0}, "lambda_rec must be finite and not negative, got -1.0"),
        ({"lambda_m": float("nan")}, "lambda_m must be finite and not negative, got nan"),
        ({"softmax_iterations": 3}, "softmax_iterations must be 0, or positive where lambda_nll is 0; got 3"),
    ],
)
def test_weights_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        SWWAEObjective(**arguments)


@torch.no_grad()
def test_without_labels_a_run_is_judged_by_the_reconstruction():
    net, batches = SWWAE(NET, (8, 8)), a_batch()
    x = batches.x_test
    error = float((x - net.reconstruct(x)).norm(dim=1).mean())
    unsupervised = SWWAEObjective(0.0, 1.0).measure(net, batches)
    assert unsupervised == {"reconstruction_error": pytest.approx(error, rel=1e-5)}
    assert set(SWWAEObjective(1.0, 1.0).measure(net, batches)) > {"test_error", "reconstruction_error"}


def test_intermediate_terms_alone_need_some():
    with pytest.raises(ValueError, match="no intermediate reconstruction"):
        SWWAEObjective(0.0, 0.0, 1.0)(SWWAE("(3)3c-2p", (8, 8)), a_batch().get(0, 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model.architecture": "(2)3c-2p-(2)3c-2p-5fc"},
            "a unit for each of Digits's 10 classes, got .*-5fc",
        ),
        (
            {"model.architecture": "(2)3c-2p-(2)3c-2p"},
            "must end with a dense layer, as in .*-2p-10fc, for the",
        ),
        (
            {"model.image_shape": [9, 9]},
            r"image_shape must be that of a sample of Digits, \(8, 8\), got \(1, 9, 9\)",
        ),
        ({"model.decoder": False}, "decoder must be true for lambda_rec=0.1, got false"),
        (
            {"model.decoder": False, "objective.lambda_rec": 0},
            "decoder must be true for lambda_m=0.1, got false",
        ),
        (
            {
                "model.architecture": "(2)3c-8p-(2)3c-10fc",
                "objective": {"lambda_rec": 0, "lambda_m": 0},
                "batch_labelled": 1,
            },
            "at least 2 samples for batch_norm of maps of 1 x 1, got 1 and 260",
        ),
        (
            {
                "model.class_path": "ladderfast.models.SWWAEComparison",
                "objective.class_path": "ladderfast.training.WhereObjective",
            },
            r"image_shape must be that of a sample of Digits, \(8, 8\), got \(1, 32, 32\)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(small, fields, message):
    with pytest.raises(ValueError, match=message):
        Run(small, folder=None, progress=False, **fields)


# Runs


def test_a_run_learns_reports_and_resumes_to_the_same_bits(small, tmp_path):
    small["data"] = {
        "class_path": f"{__name__}.Shifted",
        "init_args": {"num_labels": 40, "shift": 1, "mirror": True},
    }
    whole = Run(small, folder=tmp_path / "whole", progress=False)
    start = whole.evaluate()["reconstruction_error"]
    result = whole.fit()
    assert result["reconstruction_error"] < 0.9 * start
    assert 0 < result["test_error"] < 100
    assert "Test images and their reconstructions" in (tmp_path / "whole" / "report.html").read_text()
    first = Run(small, folder=tmp_path / "run", progress=False)
    for _ in range(7):
        first.step()
    with first._open_folder(first.folder):
        first._save()
    second = Run(small, folder=tmp_path / "run", resume=True, progress=False)
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


class Shifted(ImageDataset):
    """scikit-learn's digits, moved and mirrored."""

    def __init__(self, num_labels: int, shift: int, mirror: bool, *, seed: int = 1) -> None:
        from ladderfast.data import Digits

        digits = Digits(seed=seed)
        parts = digits.x_unlabelled, digits.y_labelled, digits.x_test, digits.y_test
        super().__init__(
            *parts, image_shape=(8, 8), num_labels=num_labels, seed=seed, shift=shift, mirror=mirror
        )


@pytest.mark.parametrize("in_turn", [True, False])
def test_two_seeds_side_by_side_are_what_each_is_alone(small, in_turn):
    small["model"]["init_args"].update(dropout_conv=0.3)
    small["precision"] = "64-true"
    both = Run(small, folder=None, progress=False, seeds=2)
    assert both.model.in_turn_on_cpu
    both.model.in_turn_on_cpu = in_turn
    both.fit()
    for i in range(2):
        alone = Run(small, folder=None, progress=False, seed=1 + i)
        alone.fit()
        for (name, a), b in zip(
            both.network(i).state_dict().items(), alone.model.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_errors_of_several_seeds_are_counted_together(small):
    small["epochs"] = 1
    result = Run(small, folder=None, progress=False, seeds=2).fit()
    assert (type(result["test_errors"]), result["test_samples"]) == (int, 2 * 497)
    assert result["test_errors"] == round(sum(result["test_error_by_seed"]) * 497 / 100)
    assert "test_errors_std" not in result


def test_seeds_are_one_batched_program(small):
    """Nothing in a step, as on a GPU, falls back to going through the networks one by one."""
    run = Run(small, folder=None, progress=False, seeds=2)
    run.model.in_turn_on_cpu = False
    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        run.step()
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(enabled)


def test_a_softmax_on_the_frozen_encoder(small):
    small["model"]["init_args"].update(batch_norm=False, dropout_dense=0.0)
    small["objective"]["init_args"] = {"lambda_nll": 0.0, "lambda_rec": 1.0, "softmax_iterations": 30}
    run = Run(small, folder=None, progress=False)
    for _ in range(9):
        run.step()
    before = copy.deepcopy(run.model.state_dict())
    untrained = run.evaluate()["test_error"]
    run.objective.finish(run.model, run.batches)
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"dense.0.weight", "dense.0.bias"}
    assert run.evaluate()["test_error"] < untrained - 20
    assert run.model.training
    assert all(p.grad is None for p in run.model.dense.parameters())


def test_the_classifier_is_trained_through_its_hidden_layers():
    x = torch.rand(40, 6)
    y = ((x[:, 0] > 0.5) ^ (x[:, 1] > 0.5)).long()  # no plane parts these
    layers = nn.ModuleList([nn.Linear(6, 30), nn.Linear(30, 2)])
    train_classifier(layers, x, y, iterations=100)
    assert torch.equal(layers[1](layers[0](x).relu()).argmax(1), y)


# Pictures


def test_translation():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    expected = torch.zeros(1, 1, 3, 4)
    expected[..., 1:, :-2] = x[..., :-1, 2:]
    assert torch.equal(translate(x, 1, -2), expected)


def test_the_necessity_of_where(tmp_path):
    net, batches = SWWAEComparison("(2)3c-Xp", (2, 4), (8, 8)), a_batch()
    objective = WhereObjective()
    assert list(objective(net, batches.get(0, 0))) == ["copy_2", "where_2", "copy_4", "where_4"]
    figures = objective.measure(net, batches)
    each = [figures[f"reconstruction_error_{name}"] for name in net.networks]
    assert figures["reconstruction_error"] == pytest.approx(sum(each) / 4)
    x = batches.x_test
    by_hand = (x - net.networks["copy_4"].reconstruct(x)).norm(dim=1).mean()
    assert figures["reconstruction_error_copy_4"] == pytest.approx(float(by_hand.detach()), rel=1e-5)
    (figure,) = objective.figures(net, batches).values()
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["input", "2 × 2", "4 × 4"]
    figure.savefig(tmp_path / "figure.svg")


class Follower(nn.Module):
    """A network that knows where the brightest pixel is: what its value, where its place in a window of the image."""

    image_shape = (1, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.net = SWWAE("(1)1c-16p", (16, 16), pooling="soft", beta=1e4)
        nn.init.ones_(self.net.encoder[0].conv.weight)
        self.stages, self.encoder = self.net.stages, self.net.encoder
        self.what_where, self.reconstruct = self.net.what_where, self.net.reconstruct


def test_where_moves_with_the_image_and_what_does_not(tmp_path):
    x = torch.zeros(20, 16, 16)
    for i in range(20):
        x[i, 5 + i % 4, 6 + i % 3] = 0.5 + i / 40
    y = torch.arange(20) % 4
    batches = ImageDataset(x.flatten(1), y, x.flatten(1), y, image_shape=(16, 16)).batches(4, 4, seed=1)
    objective, net = EquivarianceObjective(1.0, 0.0, shift=2), Follower()
    with torch.no_grad():
        figures = objective.measure(net, batches)
    assert figures["what_correlation"] == pytest.approx(1, abs=1e-4)
    assert figures["where_shift"] == pytest.approx(1, abs=1e-3)
    assert figures["where_drift"] == pytest.approx(0, abs=1e-3)
    assert figures["planes"] == 1
    drawn = objective.figures(net, batches)
    assert list(drawn) == ["What and where under translation", "Reconstructions"]
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.svg")
        assert figure.get_label()
    hard = SWWAE("(1)1c-16p", (16, 16))
    with pytest.raises(ValueError, match="the top pooling must be soft and leave one place"):
        objective.figures(hard, batches)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"pooling": "hard"}, {}, "the top pooling must be soft and leave one place"),
        ({"pooling": "soft", "architecture": "(2)1c-2p-(2)1c-2p"}, {}, "the top pooling must be soft"),
        ({"pooling": "soft"}, {"shift": 8}, "shift must be below 8, the smaller side of the images, got 8"),
        (
            {"pooling": "soft", "architecture": "(2)1c-8p"},
            {"lambda_m": 0.5},
            "lambda_m must be 0 for .* got 0.5",
        ),
        ({"pooling": "soft", "architecture": "(2)1c"}, {"lambda_m": 0.0}, "must have a pooling"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(small, arguments, options, message):
    small["model"]["init_args"] = {"architecture": "(2)1c-2p-(2)1c-4p", "image_shape": [8, 8], **arguments}
    path = "ladderfast.training.EquivarianceObjective"
    small["objective"] = {"class_path": path, "init_args": {"shift": 1, **options}}
    with pytest.raises(ValueError, match=message):
        Run(small, folder=None, progress=False)


# Recipes

MNIST = "(64)5c-2p-(64)3c-2p-(64)3c-2p-10fc"
# Published errors by row, for 100, 600, 1000 and 3000 labels; weights that are 0, and dropout.
ROWS = {
    "": (("9.17", "4.16", "3.39", "2.50"), {"l1"}, ()),
    "_dropout": (("8.71", "3.31", "2.83", "2.10"), {"l1"}, ("dropout_dense",)),
    "_supervised": (("22.98", "7.86", "6.45", "3.35"), {"lambda_rec", "lambda_m", "l1"}, ()),
    "_no_l2m": (("12.41", "4.63", "3.15", "2.08"), {"lambda_m", "l1"}, ("dropout_dense",)),
    "_unsup_softmax": (("17.81", "8.41", "6.40", "4.76"), {"lambda_nll", "l1"}, ()),
    "_conv_dropout": (
        ("14.23", "4.70", "3.37", "2.08"),
        {"lambda_rec", "lambda_m", "l1"},
        ("dropout_dense", "dropout_conv"),
    ),
    "_l1": (("10.91", "4.61", "3.55", "2.67"), {"lambda_rec", "lambda_m"}, ("dropout_dense",)),
}
WEIGHTS = ("lambda_nll", "lambda_rec", "lambda_m", "l1")


@pytest.mark.parametrize("row", ROWS)
def test_the_rows_of_mnist(row):
    published, absent, dropouts = ROWS[row]
    for labels, error in zip((100, 600, 1000, 3000), published, strict=True):
        recipe = read_recipe(f"swwae_mnist_{labels}{row}")
        flat = recipe.flat()
        assert recipe.published is not None
        assert recipe.published.startswith(error)
        assert f"N = {labels}" in recipe.row
        assert (flat["data.num_labels"], flat["data.padding"]) == (labels, 2)
        assert flat["model.architecture"] == MNIST
        assert {name for name in WEIGHTS if not flat[f"objective.{name}"]} == absent
        assert tuple(n for n in ("dropout_dense", "dropout_conv") if flat[f"model.{n}"]) == dropouts
        assert flat["model.decoder"] == bool({"lambda_rec", "lambda_m"} - absent)
        assert bool(flat["objective.softmax_iterations"]) == (row == "_unsup_softmax")


PRETRAINED = {
    "swwae_mnist_600_unsup_pretr": "9.80",
    "swwae_mnist_1000_unsup_pretr": "6.135",
    "swwae_mnist_3000_unsup_pretr": "4.41",
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_rows_that_start_from_another(name):
    recipe, before = read_recipe(name), read_recipe(name.replace("unsup_pretr", "unsup_softmax"))
    assert recipe.published is not None
    assert recipe.published.startswith(PRETRAINED[name])
    assert recipe.start_from == f"runs/{before.name}-seed{{seed}}"
    assert recipe.data == before.data
    assert {weight for weight in WEIGHTS if recipe.objective.init_args.get(weight)} == {"lambda_nll"}
    own, given = (
        {k: v.shape for k, v in one.model.build("model").state_dict().items()} for one in (recipe, before)
    )
    assert own.items() - given.items() == {("noise_state", (2,))}  # nothing but its dropout starts anew


# Published error, lambda_rec and lambda_m where the paper prints them, classes and side of the top map.
OTHERS = {
    "swwae_mnist_all": ("0.71", None, None, 10, 4),
    "swwae_mnist_all_supervised": ("0.76", 0, 0, 10, 4),
    "swwae_svhn_1000": ("27.83", 0.8, 0.8, 10, 4),
    "swwae_svhn_1000_dropout": ("23.56", 0.4, 0.4, 10, 4),
    "swwae_svhn_all": ("4.94", None, None, 10, 4),
    "swwae_svhn_all_supervised": ("5.89", 0, 0, 10, 4),
    "swwae_stl10": ("25.67", None, None, 10, 2),
    "swwae_stl10_supervised": ("42.55", 0, 0, 10, 2),
    "swwae_cifar10": ("7.77", 1, 0.2, 10, 2),
    "swwae_cifar10_supervised": ("8.67", 0, 0, 10, 2),
    "swwae_cifar100": ("30.88", 1, 0.2, 100, 2),
    "swwae_cifar100_supervised": ("32.50", 0, 0, 100, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_rows(name):
    error, rec, middle, classes, side = OTHERS[name]
    recipe = read_recipe(name)
    flat = recipe.flat()
    assert recipe.published == f"{error} %"
    assert rec is None or (flat["objective.lambda_rec"], flat["objective.lambda_m"]) == (rec, middle)
    with torch.device("meta"):
        model = recipe.model.build("model")
    assert model.stages[-1].shape == (classes,)
    assert [stage.shape for stage in model.stages if stage.kind == "pool"][-1][1:] == (side, side)
    assert model.image_shape == {"mnist": (1, 32, 32), "stl10": (3, 96, 96)}.get(
        name.split("_")[1], (3, 32, 32)
    )
    assert flat["model.batch_norm"] == (name.split("_")[1] in ("stl10", "cifar10", "cifar100"))
    assert flat.get("data.shift", 0) == (4 if "cifar" in name else 0)


def test_every_recipe_of_the_paper_is_a_row_or_a_picture():
    rows = {f"swwae_mnist_{n}{row}" for n in (100, 600, 1000, 3000) for row in ROWS}
    rows |= {*OTHERS, *PRETRAINED}
    pictures = {"swwae_where", "swwae_equivariance"}
    assert {name for name in recipe_names() if name.startswith("swwae")} == rows | pictures
    where, equivariance = (read_recipe(name).flat() for name in sorted(pictures, reverse=True))
    assert (where["model.architecture"], where["model.windows"]) == ("(16)5c-(32)3c-Xp", [2, 4, 8, 16])
    assert equivariance["model.architecture"] == "(32)5c-(32)3c-2p-(32)3c-16p"
    assert (equivariance["model.pooling"], equivariance["model.beta"]) == ("soft", 100)
    assert (equivariance["objective.shift"], equivariance["data.shift"]) == (3, 3)

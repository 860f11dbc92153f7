import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from ladderfast.training import Recipe, read_recipe, recipe_names
from ladderfast.training.recipe import changed_text, describe_fields
from ladderfast.training.schedule import Course


class Untyped(nn.Module):
    """A user's own model, without types.

    Args:
        width: of its one layer.
    """

    def __init__(self, width, depth=2):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.width, self.depth = width, depth


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 7, "model.noise_std": 0.2},
        {"epochs": 7, "model.init_args.noise_std": 0.2},
        {"epochs": 7, "model": {"noise_std": 0.2}},
        {"epochs": 7, "model": {"init_args": {"noise_std": 0.2}}},
        {"epochs": "7", "model.noise_std": "0.2"},  # as from a command line
        {"epochs": "7", "model.noise_std": "2e-1"},
    ],
)
def test_a_field_is_given_in_any_of_its_forms(small, fields):
    recipe = read_recipe(small, fields)
    assert recipe.epochs == 7
    assert recipe.model.init_args["noise_std"] == 0.2
    assert recipe.model.init_args["layers"] == [64, 12, 10]  # the others stay


@pytest.mark.parametrize(
    ("field", "given", "wanted"),
    [
        ("learning_rate", np.float64(0.25), 0.25),
        ("checkpoint_minutes", np.float32(0.5), 0.5),
        ("epochs", np.int64(3), 3),
        ("retrain", np.bool_(False), False),
        ("title", np.str_("a title"), "a title"),
        ("start_from", Path("there"), "there"),
        ("objective.denoising_weights", np.ones(3), [1.0, 1.0, 1.0]),
        ("objective.denoising_weights", (np.float64(1), 2, 3.5), [1.0, 2.0, 3.5]),
        ("model.layers", np.array([64, 10]), [64, 10]),
        ("model", {"layers": (64, np.int32(10))}, [64, 10]),
    ],
)
def test_numpys_numbers_and_arrays_become_plain_ones(small, field, given, wanted):
    recipe = read_recipe(small, {field: given})
    found = recipe.flat()["model.layers" if field == "model" else field]
    assert found == wanted
    assert type(found) is type(wanted)
    assert not isinstance(found, list) or all(type(entry) in (int, float) for entry in found)
    assert read_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_what_no_file_could_say_is_refused_by_name(small):
    """A field without a type would take it, and the run could not be saved."""
    small["model"] = {"class_path": f"{__name__}.Untyped", "init_args": {"width": 3}}
    assert read_recipe(small, {"model.depth": np.float64(2)}).flat()["model.depth"] == 2
    for strange in (torch.tensor(2), {1, 2}, np.array([None])):
        for given in (strange, [1, strange], {"a": strange}):
            with pytest.raises(
                TypeError, match=r"^small: model\.depth must be numbers, text, lists and mappings"
            ):
                read_recipe(small, {"model.depth": given})


def test_text_is_read_as_the_type_of_its_field(small):
    recipe = read_recipe(
        small,
        {
            "model.layers": "[64, 5, 10]",
            "model.combinator": "[none, none, gaussian]",
            "model.top_gamma": "false",
            "data.num_labels": "null",
            "devices": "auto",
            "title": "12",
        },
    )
    assert recipe.model.init_args["layers"] == [64, 5, 10]
    assert recipe.model.init_args["combinator"] == ["none", "none", "gaussian"]
    assert recipe.model.init_args["top_gamma"] is False
    assert recipe.data.init_args["num_labels"] is None
    assert recipe.devices == "auto"
    assert recipe.title == "12"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3}, "unknown field epoch; did you mean epochs?"),
        ({"model.noise": 0.2}, "unknown field model.noise; did you mean model.noise_std?"),
        ({"model": {"init_args": {"qqq": 1}}}, "unknown field model.qqq"),
        ({"data.data_dir": "/x"}, "unknown field data.data_dir"),  # Digits reads no files
        ({"data.seed": 3}, "unknown field data.seed"),  # the run's
        ({"model.device": "cpu"}, "unknown field model.device"),  # Fabric's
    ],
)
def test_an_unknown_field_is_refused_by_name(small, fields, message):
    with pytest.raises(ValueError, match=r"^small: unknown field") as caught:
        read_recipe(small, fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": "three"}, "epochs must be int, got 'three'"),
        ({"epochs": 2.5}, "epochs must be int, got 2.5"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"epochs": None}, "epochs must be int, got None"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"model.noise_std": "abc"}, "model.noise_std must be float | Sequence[float], got 'abc'"),
        ({"model.layers": 3}, "model.layers must be Sequence[int | str], got 3"),
        ({"model.layers": [[7], 10]}, "model.layers must be Sequence[int | str], got [[7], 10]"),
        ({"model.top_gamma": "perhaps"}, "model.top_gamma must be bool, got 'perhaps'"),
        (
            {"objective.denoising_weights": "x"},
            "objective.denoising_weights must be Sequence[float], got 'x'",
        ),
        ({"model": 3}, "model must be a mapping with class_path and init_args, got 3"),
        ({"seeds": None}, "small: seeds must be int, got None"),
        ({"learning_rate": None}, "learning_rate must be float, got None"),
        ({"epochs": "null"}, "epochs must be int, got"),
        ({"model.top_gamma": None}, "model.top_gamma must be bool, got None"),
        ({"model": {"init_args": 3}}, "model.init_args must be a mapping, got 3"),
    ],
)
def test_an_ill_typed_field_is_refused_by_name(small, fields, message):
    with pytest.raises(TypeError) as caught:
        read_recipe(small, fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_labelled": -1}, "batch_labelled must not be negative"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1 or null"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite"),
        ({"decay_from": 1.5}, "decay_from must be from 0 to 1"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(small, fields, message):
    with pytest.raises(ValueError, match=r"^small: ") as caught:
        read_recipe(small, fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["title", "epochs"])
def test_a_missing_field_is_named(small, field):
    del small[field]
    with pytest.raises(ValueError, match=f"small: {field} is missing"):
        read_recipe(small)


def test_missing_parts_and_arguments_are_named(small):
    del small["model"]["init_args"]["layers"]
    with pytest.raises(ValueError, match=r"small: model\.layers is missing"):
        read_recipe(small)
    del small["model"]
    with pytest.raises(ValueError, match=r"small: model\.class_path is missing"):
        read_recipe(small)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere.Model", ValueError, "model.class_path: 'nowhere.Model' cannot be imported"),
        ("torch.nn.Nothing", ValueError, "model.class_path: 'torch.nn.Nothing' cannot be imported"),
        ("Model", ValueError, "model.class_path: 'Model' cannot be imported"),
        (3, ValueError, "model.class_path: 3 cannot be imported"),
        ("os.path.join", TypeError, "model.class_path must be a subclass of torch.nn"),
        ("ladderfast.data.Digits", TypeError, "model.class_path must be a subclass of torch.nn"),
    ],
)
def test_a_class_that_cannot_serve_is_refused(small, path, error, message):
    with pytest.raises(error) as caught:
        read_recipe(small, {"model.class_path": path})
    assert message in str(caught.value)


def test_another_class_brings_its_own_arguments(small):
    recipe = read_recipe(
        small, {"model.class_path": "torch.nn.Linear", "model.in_features": 64, "model.out_features": 10}
    )
    assert recipe.model.init_args["in_features"] == 64
    assert "layers" not in recipe.model.init_args
    assert recipe.model.build("model").weight.shape == (10, 64)


def test_a_model_without_types(small):
    recipe = read_recipe(small, {"model.class_path": f"{__name__}.Untyped", "model.width": 3})
    assert recipe.model.build("model").width == 3
    assert "of its one layer. (Any)" in describe_fields(recipe)
    assert "(Any)" in describe_fields(recipe).partition("--model.depth")[2]
    with pytest.raises(TypeError, match=r"^small: model\.width must be Any, got None"):
        read_recipe(small, {"model.class_path": f"{__name__}.Untyped", "model.width": None})


def test_what_a_class_refuses_is_said_with_the_part(small):
    recipe = read_recipe(small, {"model.layers": [64]})
    with pytest.raises(ValueError, match=r"^model: layers must have at least two widths"):
        recipe.model.build("model")


def test_a_resolved_recipe_is_a_recipe(small, tmp_path):
    recipe = read_recipe(small, {"seed": 5})
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert read_recipe(path) == recipe
    assert read_recipe(str(path)) == recipe
    assert read_recipe(recipe.to_dict()) == recipe


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "bad.yaml"
    with pytest.raises(FileNotFoundError, match=r"there is no recipe file .*bad\.yaml"):
        read_recipe(path)
    for content in (b"a: [1", b"\xff\xfe\x00", b"- 1\n- 2\n", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.yaml") as caught:
            read_recipe(path)
        assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    for content in ("title: x\nepochs: 3\nepochs: 4\n", "model:\n  init_args: {epochs: 1,\n    epochs: 2}\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"twice\.yaml .*: epochs stands there twice, in lines 2 and 3$"):
            read_recipe(path)


def test_a_field_in_two_forms_is_refused(small):
    small["model.layers"] = [2, 3]
    with pytest.raises(
        ValueError, match=r": model\.layers is given twice, as model: init_args: layers and as model\.layers$"
    ):
        read_recipe(small)
    del small["model.layers"]
    for fields in (
        {"model.noise_std": 0.1, "model.init_args.noise_std": 0.2},
        {"model": {"init_args": {"noise_std": 0.1}}, "model.noise_std": 0.2},
        {"model": {"noise_std": 0.1, "init_args": {"noise_std": 0.2}}},
    ):
        with pytest.raises(ValueError, match=r"the fields given: model\.noise_std is given twice, as model"):
            read_recipe(small, fields)
    assert read_recipe(small, {"model.noise_std": 0.1}).model.init_args["noise_std"] == 0.1


def test_an_unknown_name_has_a_hint():
    with pytest.raises(ValueError, match=r"there is no recipe 'digit'; did you mean digits\?"):
        read_recipe("digit")
    with pytest.raises(ValueError, match=r"`ladderfast recipes` lists them"):
        read_recipe("zzz")


def test_the_file_names_the_recipe(small, tmp_path):
    del small["name"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(small))
    assert read_recipe(path).name == "mine"


def rates(recipe: Recipe) -> list[float]:
    return [Course(recipe).learning_rate(epoch) for epoch in range(recipe.epochs)]


def test_the_learning_rate_falls_from_epoch_101_of_150(small):
    found = rates(read_recipe(small, {"epochs": 150, "decay_from": 0.667, "learning_rate": 0.002}))
    assert found[:100] == [0.002] * 100
    assert found[100] == pytest.approx(0.002 * 50 / 51)
    assert found[149] == pytest.approx(0.002 / 51)
    steps = [a - b for a, b in zip(found[99:], [*found[100:], 0.0], strict=True)]
    assert steps == pytest.approx([0.002 / 51] * 51)  # a straight line that would be 0 in epoch 151


@pytest.mark.parametrize("decay_from", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_no_epoch_has_the_rate_0(small, epochs, decay_from):
    found = rates(read_recipe(small, {"epochs": epochs, "decay_from": decay_from}))
    full = round(decay_from * epochs)
    assert found[:full] == [0.002] * full
    assert found == sorted(found, reverse=True)
    assert len(set(found[full:])) == epochs - full
    assert min(found) > 0


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_reads_and_builds(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    if recipe.objective.class_path == LADDER:
        weights = recipe.objective.init_args["denoising_weights"]
        combinator = recipe.model.init_args["combinator"]
        assert len(weights) == len(recipe.model.init_args["layers"])
        for layer, weight in enumerate(weights):
            one = combinator if isinstance(combinator, str) else combinator[layer]
            assert weight == 0 or one != "none"
    # Millions of start values.
    large = name.startswith(("swwae", "shapes", "freq20", "textured"))
    with torch.device("meta") if large else contextlib.nullcontext():
        recipe.model.build("model")
    recipe.objective.build("objective")
    assert read_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


LADDER = "ladderfast.training.LadderObjective"
FULL = [784, 1000, 500, 250, 250, 250, 10]

# The specification's table: lambda of layer 0, 1 and above; noise of the layers; the published error.
MNIST = {
    "mnist_50_full": (50, 2000, 20, 0.1, 0.3, "1.62"),
    "mnist_100_full": (100, 1000, 10, 0.1, 0.3, "1.06"),
    "mnist_1000_full": (1000, 2000, 20, 0.1, 0.2, "0.84"),
    "mnist_all_full": (None, 1000, 1, 0.01, 0.3, "0.57"),
    "mnist_100_bottom": (100, 5000, 0, 0, 0.3, "1.09"),
    "mnist_1000_bottom": (1000, 2000, 0, 0, 0.3, "0.90"),
    "mnist_all_bottom": (None, 2000, 0, 0, 0.3, "0.59"),
    "mnist_100_baseline": (100, 0, 0, 0, 0.5, "21.74"),
    "mnist_1000_baseline": (1000, 0, 0, 0, 0.5, "5.70"),
    "mnist_all_baseline": (None, 0, 0, 0, 0.5, "0.80"),
}


@pytest.mark.parametrize("name", MNIST)
def test_the_rows_of_mnist(name):
    labels, bottom, second, rest, noise, published = MNIST[name]
    recipe = read_recipe(name)
    check_mnist(recipe, labels, published)
    assert recipe.objective.init_args["denoising_weights"] == [bottom, second, *[rest] * 5]
    stds = recipe.model.init_args["noise_std"]
    assert (stds if isinstance(stds, list) else [stds] * 7) == [0.3, *[noise] * 6]
    baseline = "baseline" in name
    assert recipe.model.init_args["combinator"] == ("none" if baseline else "gaussian")


@pytest.mark.parametrize(
    ("name", "labels", "weight", "published"),
    [
        ("mnist_100_gamma", 100, 0.5, "3.06"),
        ("mnist_1000_gamma", 1000, 10, "1.53"),
        ("mnist_all_gamma", None, 2, "0.78"),
    ],
)
def test_the_rows_of_mnist_with_the_gamma_model(name, labels, weight, published):
    recipe = read_recipe(name)
    check_mnist(recipe, labels, published)
    assert recipe.objective.init_args["denoising_weights"] == [0] * 6 + [weight]
    assert recipe.model.init_args["combinator"] == ["none"] * 6 + ["gaussian"]
    assert recipe.model.init_args["noise_std"] == 0.3


def check_mnist(recipe: Recipe, labels: int | None, published: str) -> None:
    assert recipe.model.init_args["layers"] == FULL
    assert recipe.model.init_args["activation"] == "relu"
    assert recipe.model.init_args["top_gamma"] is True
    assert recipe.data.class_path == "ladderfast.data.MNIST"
    assert recipe.data.init_args["num_labels"] == labels
    assert (recipe.epochs, recipe.batch_labelled, recipe.batch_unlabelled) == (150, 100, 100)
    assert recipe.learning_rate == 0.002
    assert round(recipe.decay_from * 150) == 100
    assert recipe.published is not None
    assert recipe.published.startswith(published)
    assert recipe.paper
    assert recipe.row


SMALL = [(32, 32), (32, 16), (64, 14), (64, 16), (64, 8), (128, 6), (10, 6), (10,), (10,)]
LARGE = [
    (96, 30),
    (96, 32),
    (96, 34),
    (96, 17),
    (192, 15),
    (192, 17),
    (192, 15),
    (192, 8),
    (192, 6),
    (192, 6),
]
LARGE += [(10, 6), (10,)]

# Channels and side of each layer's maps; lambda of the top, None: of all; noise of the layers; epochs; decay from;
# labels; the published error.
CONVOLUTIONAL = {
    "mnist_100_conv_fc": (
        [(1000, 3), (500, 3), *[(250, 3)] * 3, (10, 3), (10,)],
        None,
        0.3,
        150,
        100,
        100,
        "0.99",
    ),
    "mnist_100_conv_small_gamma": (SMALL, 1, 0.3, 150, 100, 100, "0.89"),
    "mnist_100_conv_small_baseline": (SMALL, 0, 0.45, 20, 10, 100, "6.43"),
    "cifar10_4000_conv_large_gamma": (LARGE, 4.0, 0.3, 70, 60, 4000, "20.40"),
    "cifar10_4000_conv_large_baseline": (LARGE, 0, 0.3, 20, 10, 4000, "23.33"),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_convolutional_rows(name):
    maps, weight, noise, epochs, full, labels, published = CONVOLUTIONAL[name]
    recipe = read_recipe(name)
    args, cifar = recipe.model.init_args, name.startswith("cifar")
    model = recipe.model.build("model")
    assert model.shapes[0] == ((3, 32, 32) if cifar else (1, 28, 28))
    assert list(model.shapes[1:]) == [(c, *side * 2) for c, *side in maps]
    assert recipe.objective.init_args["denoising_weights"] == (
        [1000, 10, *[0.1] * 6] if weight is None else [0] * len(maps) + [weight]
    )
    top = ["none"] * len(maps) + ["gaussian"]
    assert args["combinator"] == {None: "gaussian", 0: "none"}.get(weight, top)
    assert model.noise_std == (0.3, *[noise] * len(maps))
    assert args["activation"] == ("leaky_relu" if cifar else "relu")
    assert args["top_gamma"] is not cifar
    assert recipe.data.class_path == f"ladderfast.data.{'CIFAR10' if cifar else 'MNIST'}"
    assert recipe.data.init_args["num_labels"] == labels
    assert (recipe.epochs, recipe.batch_labelled, recipe.batch_unlabelled) == (epochs, 100, 100)
    assert recipe.learning_rate == 0.002
    assert round(recipe.decay_from * epochs) == full
    assert recipe.published is not None
    assert recipe.published.startswith(published)
    assert recipe.row


# Recipe -> the one it is but for the noise, tau of the labelled and of the unlabelled samples, the published error.
ADVERSARIAL = {
    "mnist_all_full_adversarial": ("mnist_all_full", 4.5e-4, 0.0, "0.557 ± 0.041 %"),
    "mnist_all_full_virtual_adversarial": ("mnist_all_full", 4.5e-4, 4.5e-8, "0.560 ± 0.047 %"),
    "mnist_100_full_adversarial": ("mnist_100_full", 4.5e-2, 4.5e-4, "1.084 ± 0.406 %"),
    "mnist_1000_full_adversarial": ("mnist_1000_full", 4.5e-5, 4.5e-5, "0.932 ± 0.070 %"),
    "mnist_100_conv_small_gamma_adversarial": (
        "mnist_100_conv_small_gamma",
        4.5e-4,
        4.5e-7,
        "0.796 ± 0.461 %",
    ),
    "cifar10_4000_conv_large_gamma_adversarial": (
        "cifar10_4000_conv_large_gamma",
        4.5e-4,
        4.5e-7,
        "20.02 ± 0.65 %",
    ),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_rows_with_adversarial_noise(name):
    base, labelled, unlabelled, published = ADVERSARIAL[name]
    recipe, plain = read_recipe(name), read_recipe(base)
    assert recipe.published == published
    changed = {k for k, v in recipe.flat().items() if plain.flat()[k] != v}
    taus = {"objective.adversarial_labelled": labelled, "objective.adversarial_unlabelled": unlabelled}
    assert changed == {"title", "paper", "row", "published", "name", *(k for k, v in taus.items() if v)}
    assert {k: recipe.flat()[k] for k in taus} == taus


def test_every_recipe_of_a_paper_is_a_row():
    rows = {*MNIST, *CONVOLUTIONAL, *ADVERSARIAL, "mnist_100_gamma", "mnist_1000_gamma", "mnist_all_gamma"}
    ladders = {n for n in recipe_names() if read_recipe(n).objective.class_path == LADDER}
    assert {name for name in ladders if not name.startswith(("digits", "textured_mnist"))} == rows


def test_what_makes_it_another_experiment():
    assert read_recipe("digits").changed() == {}
    changed = read_recipe("digits", {"epochs": 2, "model.noise_std": 0.25, "seed": 4, "threads": 1}).changed()
    assert changed == {"epochs": 2, "model.noise_std": 0.25}
    assert changed_text(changed) == "model.noise_std=0.25, epochs=2"
    assert read_recipe({**read_recipe("digits").to_dict(), "name": "mine", "epochs": 2}).changed() == {}

"""A Tagger's objective, its measurement and pictures, its recipes, and a run of it."""

from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_rgb

import ladderfast
from ladderfast.cli import _others
from ladderfast.data import Batch, GroupedImages
from ladderfast.models import RTagger, Tagger, TaggerOutput
from ladderfast.training import Run, TaggerObjective, read_recipe, start
from ladderfast.training.figures import PALETTE
from ladderfast.training.mutual_information import adjusted_mutual_information
from ladderfast.training.tagger_figures import group_grid
from ladderfast.training.tagger_objective import METRICS, _missed

RECIPES = Path(ladderfast.__file__).parent / "recipes"


class Blobs(GroupedImages):
    """20 images of two bars on 4 x 4 pixels, with two classes each."""

    def __init__(self, classes: bool = True, valid: bool = True, *, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(60, 16, generator=generator).round()
        owner = torch.arange(16).div(6, rounding_mode="floor").expand(60, 16)
        y = torch.eye(3)[torch.randint(3, (60,), generator=generator)]
        y[:, 1] = 1
        labels = {"y_train": y[:20], "y_test": y[20:40]} if classes else {}
        held = {"x_valid": x[40:], "owner_valid": owner[40:]} if valid else {}
        super().__init__(x[:20], x[20:40], owner[20:40], image_shape=(4, 4), seed=seed, **labels, **held)


RECIPE = {
    "title": "A Tagger in a second",
    "model": {
        "class_path": "ladderfast.models.Tagger",
        "init_args": {"num_pixels": 16, "layers": [8, 6, 4], "num_classes": 3},
    },
    "data": {"class_path": f"{__name__}.Blobs"},
    "objective": {
        "class_path": "ladderfast.training.TaggerObjective",
        "init_args": {"groups": 3, "iterations": 2, "class_weight": 0.5, "test_batch": 8},
    },
    "epochs": 2,
    "batch_labelled": 4,
    "batch_unlabelled": 6,
    "accelerator": "cpu",
    "threads": 1,
    "name": "tiny",
}


class Stub:
    """Answers with fixed costs and classes, and notes what it was asked."""

    def __init__(self, log_classes=None):
        self.log_classes = log_classes

    def __call__(self, x, groups, iterations, **kind):
        self.asked = (len(x), groups, iterations)
        cost = torch.tensor([[3.0, 5.0, 7.0], [1.0, 2.0, 3.0]])
        return TaggerOutput((), (), cost, self.log_classes)


def batch(y=None):
    y = torch.zeros(0, 0) if y is None else y
    return Batch(torch.zeros(len(y), 10), y, torch.zeros(3 - len(y), 10))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ({}, [5.0, 2.0]),
        ({"over_iterations": "mean"}, [2.5, 1.0]),
        ({"over_pixels": "mean"}, [0.5, 0.2]),
        ({"over_iterations": "mean", "over_pixels": "mean"}, [0.25, 0.1]),
    ],
)
def test_the_cost_of_every_iteration(kind, wanted):
    model = Stub()
    terms = TaggerObjective(4, 2, **kind)(model, batch())
    assert list(terms) == ["iteration_1", "iteration_2"]
    assert [float(t) for t in terms.values()] == pytest.approx(wanted)
    assert model.asked == (3, 4, 2)


@pytest.mark.parametrize("k_hot", [False, True])
def test_the_class_cost_is_of_the_labelled_images_at_the_last_iteration(k_hot):
    log_p = torch.full((2, 3, 4), torch.nan)
    log_p[1, :2] = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]])
    y = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]) if k_hot else torch.tensor([2, 0])
    terms = TaggerObjective(4, 2, class_weight=0.5)(Stub(log_p), batch(y))
    assert float(terms["class_cost"]) == pytest.approx(0.5 * ((2 + 3 if k_hot else 3) + 5) / 2)
    with pytest.raises(ValueError, match="class_weight needs a model with num_classes"):
        TaggerObjective(4, 2, class_weight=0.5)(Stub(), batch(y))
    with pytest.raises(ValueError, match="the images have 2 classes, and the model 4"):
        TaggerObjective(4, 2, class_weight=0.5)(Stub(log_p), batch(torch.ones(2, 2)))


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_that_are_none_of_the_models_classes(label):
    y, log_p = torch.tensor([2, label]), torch.zeros(2, 3, 4)
    objective = TaggerObjective(4, 2, class_weight=0.5)
    message = "labels must be from 0 to 3, as the model has 4 classes, got "
    with pytest.raises(ValueError, match=f"^{message}{min(2, label)} to {max(2, label)}$"):
        objective(Stub(log_p), batch(y))
    x = torch.zeros(2, 16)
    data = GroupedImages(x, x, x.long(), image_shape=(4, 4), y_train=torch.tensor([0, 1]), y_test=y)
    with pytest.raises(ValueError, match=message):
        objective.check_data(Tagger(16, [8, 5], num_classes=4), data, 1, 1)


def test_a_class_cost_needs_labelled_images():
    with pytest.raises(
        ValueError, match=r"batch_labelled must be at least 1 for class_weight=0\.5, .*, got 0"
    ):
        Run(RECIPE, folder=None, batch_labelled=0)


def test_a_single_group_needs_two_images_of_a_tagger(monkeypatch):
    torch.manual_seed(0)
    x, owner = torch.rand(5, 16).round(), torch.randint(3, (5, 16))
    model, rtagger = (
        Tagger(16, [8, 6]),
        RTagger((4, 4), [{"encoder": "convlstm", "channels": 3}], binary=True).eval(),
    )
    alone, pair = (TaggerObjective(groups=1, iterations=2, test_batch=n) for n in (1, 2))
    with pytest.raises(ValueError, match=r"test_batch must be at least 2 for groups=1 of a Tagger, .* got 1"):
        alone.check(model)
    TaggerObjective(groups=2, test_batch=1).check(model)
    pair.check(model)
    alone.check(rtagger)
    sizes = []
    for network in (model, rtagger):
        forward = network.forward
        monkeypatch.setattr(
            network, "forward", lambda x, *a, _run=forward, **k: sizes.append(len(x)) or _run(x, *a, **k)
        )
    with torch.no_grad():
        figures = [
            objective._figures(network, x, owner, None)
            for objective, network in ((pair, model), (pair, rtagger), (alone, rtagger))
        ]
    assert sizes == [3, 2, *[2, 2, 1], *[1] * 5]
    assert figures[1]["ami"] == figures[2]["ami"] == 0  # of one group


def test_labels_that_are_not_among_the_likeliest():
    log_p = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]])
    assert _missed(log_p, torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 0, 1]])).tolist() == [2.0]


def test_what_is_measured_is_what_the_model_says(monkeypatch):
    objective, model = (
        TaggerObjective(3, 2, test_batch=8, normaliser="max"),
        Tagger(16, [8, 6, 4], num_classes=3),
    )
    data = Blobs().batches(4, 6, seed=1)
    with torch.no_grad():
        figures = objective.measure(model, data)
        assert objective.measure(model, data) == figures
        generator = torch.Generator().manual_seed(1)
        parts = torch.tensor_split(data.x_test, 3)
        outs = [model(x, 3, 2, generator=generator) for x in parts]
    assert figures["cost_1"] == pytest.approx(float(torch.cat([o.cost[0] for o in outs]).mean()))
    assert figures["cost"] == figures["cost_2"]
    masks = torch.cat([o.m[1].argmax(1) for o in outs])
    ami = adjusted_mutual_information(data.owner_test, masks, normaliser="max")
    assert figures["ami"] == figures["ami_2"] == pytest.approx(float(ami.mean()))
    assert figures["ami_normaliser"] == "max"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        outs = [model(x, 3, 2, corrupted=x, generator=generator) for x in parts]
    clean = adjusted_mutual_information(
        data.owner_test, torch.cat([o.m[0].argmax(1) for o in outs]), normaliser="max"
    )
    assert figures["clean_ami_1"] == pytest.approx(clean.mean().item())
    assert {k for k in figures if k.startswith("clean")} == {
        f"clean_{name}{t}" for name in ("ami", "test_error") for t in ("", "_1", "_2")
    }
    assert figures["test_samples"] == int(data.y_test.sum())
    assert figures["test_error"] == figures["test_error_2"]
    assert figures["test_error"] == pytest.approx(100 * figures["test_errors"] / figures["test_samples"])
    with torch.no_grad():
        validation = objective.validate(model, data)
        assert validation == pytest.approx(
            objective._figures(model, data.x_valid, data.owner_valid, None)["ami"]
        )
        assert objective.validate(model, Blobs(valid=False).batches(4, 6, seed=1)) is None
        assert TaggerObjective(3, 2, judged_by="test_error").validate(model, data) is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"over_iterations": "max"}, "over_iterations must be one of sum, mean, got 'max'"),
        ({"normaliser": "min"}, "normaliser must be one of arithmetic, max"),
        ({"judged_by": "cost"}, "judged_by must be one of ami, test_error"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"class_weight": -1.0}, "class_weight must be finite and not negative"),
    ],
)
def test_arguments_that_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        TaggerObjective(**kind)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("groups", 1.5, "a whole number"),
        ("iterations", 2.5, "a whole number"),
        ("test_batch", 2.5, "a whole number"),
        ("class_weight", "x", "a number"),
    ],
)
def test_arguments_that_are_no_numbers(name, value, wanted):
    with pytest.raises(TypeError, match=f"^{name} must be {wanted}, got {value!r}$"):
        TaggerObjective(**{name: value})


def test_evaluate_says_by_what_the_ami_is_normalised():
    figures = {"ami": 0.5, "ami_1": 0.25, "ami_normaliser": "arithmetic", "by_seed": [1.0]}
    assert _others(figures, METRICS["ami"]) == "ami_1 0.25, ami_normaliser arithmetic"


def test_a_run_leaves_pictures_and_resumes_to_the_same_bits(tmp_path):
    whole = Run(RECIPE, folder=tmp_path / "whole", progress=False)
    result = whole.fit()
    assert [row["ami"] for row in whole.history][-1] == result["ami"]
    page = (tmp_path / "whole" / "report.html").read_text()
    for words in (
        "Groups of test images",
        "group by group",
        "By iteration",
        "normalised by the mean entropy",
    ):
        assert words in page
    first = Run(RECIPE, folder=tmp_path / "part", progress=False)
    for _ in range(4):  # an epoch is three steps
        first.step()
    first.evaluate()
    with first._open_folder(first.folder):
        first._save()
    second = Run(RECIPE, folder=tmp_path / "part", resume=True, progress=False).fit()
    assert {k: second[k] for k in second if k != "seconds"} == {
        k: result[k] for k in result if k != "seconds"
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"objective.judged_by": "test_error", "data.classes": False, "batch_labelled": 0},
            'judged_by="test_error" needs labelled test images, which Blobs has not',
        ),
        (
            {"objective.judged_by": "test_error", "model.num_classes": 0},
            'judged_by="test_error" needs a model with num_classes',
        ),
        (
            {"objective.groups": 1, "batch_labelled": 0, "batch_unlabelled": 1},
            "a batch of at least 2 images for groups=1, which has no variance in one image, got 0 and 1",
        ),
    ],
)
def test_what_cannot_be_measured_or_normalised_is_refused_before_training(fields, message):
    fields = {"objective.class_weight": 0.0, **fields}
    with pytest.raises(ValueError, match=message):
        Run(RECIPE, folder=None, progress=False, **fields)


@pytest.mark.parametrize("fields", [{"patience": 2}, {"schedule": "halve"}])
def test_test_images_have_no_say_in_the_training(fields):
    with pytest.raises(ValueError, match=r"and TaggerObjective measures none there of .*, the test error;"):
        Run(RECIPE, folder=None, **{"objective.judged_by": "test_error"}, **fields)


def test_a_run_stops_early_and_trains_anew(tmp_path):
    run = Run(
        RECIPE, folder=tmp_path, progress=False, epochs=20, patience=2, retrain=True, learning_rate=0.05
    )
    steps = len(run.batches)
    result = run.fit()
    stages = [[row for row in run.history if row["stage"] == stage] for stage in (1, 2)]
    figures = [row["validation_ami"] for row in stages[0]]
    best = max(figures)
    assert figures.index(best) == len(figures) - 3  # two epochs that were no better
    assert result["retrained_epochs"] == len(stages[1]) == figures.index(best) + 1
    # 20 images, six a step; then 40.
    assert (steps, len(run.batches)) == (3, 6)


def test_a_run_starts_from_another_whose_layers_it_keeps(tmp_path):
    first = Run(
        RECIPE,
        folder=tmp_path / "first",
        progress=False,
        **{"model.num_classes": 0, "model.layers": [8, 6], "objective.class_weight": 0.0},
    )
    first.fit()
    grown = {"start_from": str(tmp_path / "first"), "seed": 2}
    with pytest.warns(RuntimeWarning, match="has seed 1 and this network 2"):
        second = Run(RECIPE, folder=None, progress=False, **grown)
    plain = Run(RECIPE, folder=None, progress=False, seed=2)
    before, now, new = (run.model.state_dict() for run in (first, second, plain))
    kept = [k for k in now if k in before]
    assert {"project.linear.weight", "read.weight", "z_scale", "inner.decoder.1.combinator.weight"} <= set(
        kept
    )
    assert all(torch.equal(now[k], before[k]) for k in kept)
    assert all(torch.equal(now[k], new[k]) for k in now if k not in before)
    assert any(not torch.equal(new[k], before[k]) for k in kept)
    with pytest.raises(FileNotFoundError, match=r"start_from: .* holds no checkpoint of a run"):
        Run(RECIPE, folder=None, start_from=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="shares no parameter with this one"):
        Run("digits", folder=None, start_from=str(tmp_path / "first"))
    with pytest.warns(
        RuntimeWarning, match=r"have another shape .* start anew, among them project\.\S+: \(8.*\(9"
    ):
        Run(RECIPE, folder=None, **{**grown, "seed": 1, "model.layers": [9, 6, 4]})


def test_networks_of_two_kinds_have_no_more_than_a_variance_in_common():
    tagger = Tagger(8, [6, 4], binary=False)
    with pytest.raises(ValueError, match="shares no parameter with this one but log_variance"):
        start._take(tagger, {"log_variance": torch.zeros(()), "other": torch.zeros(6)}, Path("first"))


def test_sequences_are_measured_on_the_frames_that_are_predicted():
    x = torch.rand(6, 4, 16).round()
    owner = torch.randint(0, 3, (6, 4, 16))

    class Sequences:
        x_test, owner_test, image_shape = x, owner, (4, 4)

        def __len__(self) -> int:
            return 1

        def get(self, epoch: int, step: int) -> Batch:
            return Batch(x[:0], torch.zeros(0, 0), x)

    data = Sequences()
    model = RTagger((4, 4), [{"encoder": "convlstm", "channels": 3}], binary=True).eval()
    objective = TaggerObjective(2, 3, test_batch=6)
    with torch.no_grad():
        figures = objective.measure(model, data)
        out = model(x, 2, 3, generator=torch.Generator().manual_seed(1))
        pictures = objective.figures(model, data)
    wanted = [adjusted_mutual_information(owner[:, t + 1], m.argmax(1)).mean() for t, m in enumerate(out.m)]
    assert [figures[f"ami_{t}"] for t in (1, 2, 3)] == pytest.approx([float(a) for a in wanted])
    assert figures["ami"] == pytest.approx(float(sum(wanted)) / 3)
    assert figures["cost"] == pytest.approx(float(out.cost.mean()))
    assert list(pictures) == ["A test sequence, step by step", "By iteration"]
    assert (
        pictures["A test sequence, step by step"].get_label().startswith("Steps 1, 2, 3 of a test sequence")
    )
    terms = []
    for over_pixels in ("mean", "sum"):
        torch.manual_seed(0)
        cost = TaggerObjective(2, 3, over_pixels=over_pixels)(model, Batch(x[:0], torch.zeros(0, 0), x))
        terms.append(cost["iteration_1"].item())
    assert terms[0] == pytest.approx(terms[1] / 16)


def test_a_grid_shows_groups_in_their_colours():
    x = torch.zeros(2, 16)
    m = torch.zeros(2, 3, 16)
    m[:, 1] = 1
    figure = group_grid(x, x, torch.zeros(2, 16).long(), [m], [m], (4, 4))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "input",
        "corrupted",
        "owners",
        "masks 1",
        "groups 1",
    ]
    image = figure.axes[0].get_images()[0].get_array()
    assert image[15, 0, :3].tolist() == pytest.approx(to_rgb(PALETTE[1]))  # the first masks


# Recipe -> layers, noise, K, T, rate, epochs, class weight, labels.
ROWS = {
    "shapes": ([2000, 1000, 500], 0.2, 4, 3, 0.0004, 100, 0.0, None),
    "freq20_stage1": ([3000, 2000, 1000], 0.2, 4, 3, 0.001, 150, 0.0, 0),
    "freq20_stage2": ([3000, 2000, 1000, 500, 250, 11], 0.18, 4, 4, 0.0002, 50, 0.1, 1000),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_published_runs(name):
    layers, noise, groups, iterations, rate, epochs, weight, labels = ROWS[name]
    recipe = read_recipe(name)
    model, objective = recipe.model.init_args, recipe.objective.init_args
    assert (model["layers"], model["noise"], model["binary"]) == (layers, noise, name == "shapes")
    assert model["input_mean"] == (0.26 if name == "shapes" else 0.5)
    assert (objective["groups"], objective["iterations"], objective["class_weight"]) == (
        groups,
        iterations,
        weight,
    )
    assert (recipe.learning_rate, recipe.epochs, recipe.decay_from) == (rate, epochs, 1.0)
    assert recipe.batch_labelled + recipe.batch_unlabelled == 100
    assert recipe.data.init_args.get("num_labels") == labels
    assert (recipe.start_from == "runs/freq20_stage1-seed{seed}") is (name == "freq20_stage2")
    if name.startswith("freq20"):  # the weight of the class cost is one beside means
        assert (objective["over_iterations"], objective["over_pixels"]) == ("mean", "mean")
    if weight:
        built = TaggerObjective(**objective)
        assert built.metric.name == "test_error"


def test_the_small_recipes_of_textured_mnist_are_comparable():
    tagger, rtagger = (read_recipe(f"textured_small_{kind}") for kind in ("tagger", "rtagger"))
    assert tagger.data == rtagger.data
    assert tagger.objective == rtagger.objective
    shared = ("noise", "input_mean", "variance_start", "num_classes")
    assert len({tuple(r.model.init_args[key] for key in shared) for r in (tagger, rtagger)}) == 1
    # Each iteration has statistics for evaluation of its own.
    assert rtagger.model.init_args["norm_steps"] == rtagger.objective.init_args["iterations"]


@pytest.mark.parametrize("labels", ["all", "1000"])
def test_the_rows_of_textured_mnist(labels):
    tagger, rtagger, baseline = (
        read_recipe(f"textured_mnist_{labels}_{kind}") for kind in ("tagger", "rtagger", "baseline")
    )
    assert tagger.data == rtagger.data == baseline.data
    weights = [r.objective.init_args["class_weight"] for r in (tagger, rtagger)]
    assert weights[0] == weights[1]
    assert rtagger.learning_rate == 0.0004
    assert rtagger.batch_labelled + rtagger.batch_unlabelled == 16
    for recipe, kind in ((tagger, "tagger"), (rtagger, "rtagger"), (baseline, "baseline")):
        images = recipe.batch_unlabelled or recipe.batch_labelled
        updates = recipe.epochs * (60_000 // images)
        assert updates == pytest.approx(160_000, rel=0.04)
        text = (RECIPES / f"textured_mnist_{labels}_{kind}.yaml").read_text()
        assert f"# {updates:,} updates" in text
        assert "--data.textures FOLDER" in text
        assert recipe.data.init_args.get("textures") is None
    assert tagger.data.init_args["num_labels"] == (None if labels == "all" else 1000)
    for recipe in (tagger, rtagger):
        assert (recipe.objective.init_args["groups"], recipe.objective.init_args["iterations"]) == (3, 3)
    assert tagger.objective.init_args["judged_by"] == "test_error"
    assert tagger.objective.init_args["class_weight"] > 0
    assert baseline.model.build("model").shapes[-1] == (10,)
    assert (baseline.learning_rate, baseline.batch_labelled) == (0.0004, 16)


def test_a_network_and_data_that_do_not_fit_are_refused_before_training():
    few = {"data.num_train": 20, "data.num_test": 10, "batch_unlabelled": 5}
    with pytest.raises(
        ValueError, match="num_pixels must be 400, as many as an image of Shapes has, got 300"
    ):
        Run("shapes_small", folder=None, **few, **{"model.num_pixels": 300})
    with pytest.raises(
        ValueError, match=r"class_weight needs a model with num_classes, got 0\.1 and one without"
    ):
        Run("shapes_small", folder=None, **few, **{"objective.class_weight": 0.1})

    class Sequences:
        image_shape, frames = (2, 2), 4

    objective = TaggerObjective(iterations=4)
    with pytest.raises(ValueError, match=r"iterations must be below Sequences's 4 frames, .* got 4"):
        objective.check_data(object(), Sequences(), 0, 2)

"""Training of the recurrent Ladder: its costs, its teacher, its runs, its pictures and its recipes."""

import math

import pytest
import torch
import torch.nn.functional as F

from ladderfast.data import OccludedMovingDigits, SequenceBatch
from ladderfast.models import RLadder
from ladderfast.training import RLadderObjective, Run, read_recipe, recipe_names
from ladderfast.training.rladder_figures import sequence
from ladderfast.training.rladder_objective import frame_cost

LEVELS = [
    {"encoder": "conv", "channels": 2, "stride": 4},
    {"encoder": "convlstm", "channels": 3, "stride": 2, "decoder": "convg2"},
    {"encoder": "pool"},
    {"encoder": "lstm", "channels": 6},
]
RECIPE = {
    "title": "An RLadder in seconds",
    "model": {
        "class_path": "ladderfast.models.RLadder",
        "init_args": {
            "input_shape": [1, 32, 32],
            "levels": LEVELS,
            "num_classes": 10,
            "out_channels": 1,
            "norm_steps": 2,
        },
    },
    "data": {
        "class_path": "ladderfast.data.OccludedMovingDigits",
        "init_args": {"num_labels": 20, "num_validation": 1150, "frames": 2},
    },
    "objective": {
        "class_path": "ladderfast.training.RLadderObjective",
        "init_args": {"consistency_weight": 10, "ramp_up_steps": 4, "input_noise": 0.1, "ema_decay": 0.9},
    },
    "epochs": 2,
    "batch_labelled": 10,
    "batch_unlabelled": 50,  # three steps an epoch
    "accelerator": "cpu",
    "threads": 1,
    "name": "small",
}


def small():
    torch.manual_seed(0)
    model = RLadder((1, 32, 32), LEVELS, num_classes=10, out_channels=1)
    torch.manual_seed(1)
    x = torch.rand(5, 3, 1, 32, 32)
    return model, SequenceBatch(x[:2, :2], x[:2, 1:], torch.tensor([3, 7]), x[2:, :2], x[2:, 1:])


def test_the_costs_are_the_documented_ones():
    model, batch = small()
    objective = RLadderObjective(prediction_weight=0.5, consistency_weight=3.0, ramp_up_steps=10)
    objective.prepare(model)
    with torch.no_grad():  # a teacher of its own opinion
        for p in objective.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    objective.steps = 4
    terms = objective(model, batch)
    x = torch.cat((batch.x_labelled, batch.x_unlabelled))
    target = torch.cat((batch.next_labelled, batch.next_unlabelled))
    output, _ = model(x)
    last = output.logits[:, -1]
    assert list(terms) == ["cross_entropy", "prediction", "consistency"]
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(last[:2], batch.y_labelled))
    p = output.prediction.sigmoid()
    nats = -(target * p.log() + (1 - target) * (1 - p).log()).flatten(2).sum(2)
    torch.testing.assert_close(frame_cost(output.prediction, target), nats)
    torch.testing.assert_close(terms["prediction"], 0.5 * nats.mean())
    theirs = objective.teacher(x)[0].logits[:, -1].softmax(1)
    apart = (last.softmax(1) - theirs).square().sum(1).mean()
    assert apart > 0
    torch.testing.assert_close(terms["consistency"], 3 * math.exp(-5 * 0.6**2) * apart)


def test_the_teacher_is_an_exponential_average():
    model, _ = small()
    objective = RLadderObjective(consistency_weight=1.0, ema_decay=0.6)
    objective.prepare(model)
    average = model.classifier.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.classifier.weight.add_(step)
        objective.after_step(model)
        decay = min(1 - 1 / (step + 1), 0.6)
        average = decay * average + (1 - decay) * model.classifier.weight
        torch.testing.assert_close(objective.teacher.classifier.weight, average)
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_the_ramp_rises_to_one():
    objective = RLadderObjective(consistency_weight=1.0, ramp_up_steps=100)
    seen = []
    for objective.steps in (0, 50, 99, 100, 1000):
        seen.append(objective.ramp())
    assert seen == sorted(seen)
    assert seen[0] == pytest.approx(math.exp(-5))
    assert seen[-2:] == [1, 1]
    assert RLadderObjective().ramp() == 1


def test_a_run_is_measured_and_has_its_pictures(tmp_path):
    run = Run(RECIPE, folder=tmp_path / "run", progress=False)
    result = run.fit()
    assert result["test_samples"] == 497
    assert result["test_error_by_step"][-1] == result["test_error"]
    assert 0 < result["next_frame_cost"] < 1024
    assert 0 <= result["teacher_error"] <= 100
    assert {"cross_entropy", "prediction", "consistency"} <= set(run.history[0])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Test error after each time step" in page
    assert page.count("the frame that it expects to come next") >= 3


def test_a_run_is_resumed_to_the_same_bits(tmp_path):
    whole = Run(RECIPE, folder=None, progress=False)
    expected = [whole.step()["total"] for _ in range(5)]
    first = Run({**RECIPE, "checkpoint_steps": 1}, folder=tmp_path / "run", progress=False)
    got = [first.step()["total"] for _ in range(2)]
    with first._open_folder(first.folder):
        first._save()
    second = Run({**RECIPE, "checkpoint_steps": 1}, folder=tmp_path / "run", resume=True, progress=False)
    got += [second.step()["total"] for _ in range(3)]
    assert torch.stack(got).equal(torch.stack(expected))


def test_the_learning_rate_follows_the_validation_error_and_all_is_trained_again():
    fields = {"schedule": "halve", "min_learning_rate": 0.0001, "retrain": True, "epochs": 1}
    run = Run(RECIPE, folder=None, progress=False, **fields)
    with torch.no_grad():
        assert run.objective.validate(run.model, run.batches) is not None
    run.fit()
    assert not len(run.batches.rows["validation"])
    assert run.objective.validate(run.model, run.batches) is None


def test_measuring_takes_statistics_anew_and_leaves_the_training_mode():
    run = Run(RECIPE, folder=None, progress=False)
    one = run.evaluate()
    for buffer in run.model.buffers():
        buffer.fill_(3.0)
    assert run.evaluate() == one
    assert run.model.training


def test_the_recipes_of_the_table_differ_where_they_should():
    names = [name for name in recipe_names() if name.startswith("occluded_mnist_")]
    assert len(names) == 7
    models = {}
    for name in names:
        recipe = read_recipe(name)
        objective = recipe.objective.build("objective")
        models[name.removeprefix("occluded_mnist_")] = model = recipe.model.build("model")
        objective.prepare(model)
        assert recipe.schedule == "halve"
        assert recipe.retrain
    full = models["rladder"]
    assert len(full.gates) == 3
    assert sum(full.takes_feedback) == 3
    assert not any(models["no_feedback"].takes_feedback)
    assert models["no_feedback"].readout is not None
    assert sum(models["no_prediction"].takes_feedback) == 3
    assert models["no_prediction"].readout is None
    for name in ("hierarchical_rnn", "temporal_baseline", "optimal"):
        assert not models[name].gates
    states = {n: sum(cell.has_state for cell in m.encoder) for n, m in models.items()}
    assert (states["hierarchical_rnn"], states["temporal_baseline"], states["optimal"]) == (4, 1, 0)


@pytest.mark.parametrize("group", ["occluded_mnist_", "occluded_small_", "occluded_small_1000_"])
def test_what_is_compared_differs_in_nothing_else(group):
    full = read_recipe(f"{group}rladder").flat()
    without = {
        "no_feedback": {"model.feedback": False, "model.feedback_gain": 1.0},
        "no_prediction": {
            "model.out_channels": None,
            "model.out_bias": 0.0,
            "objective.prediction_weight": 0.0,
        },
    }
    without["hierarchical_rnn"] = {
        **without["no_prediction"],
        "model.decoder": False,
        "model.feedback_gain": 1.0,
    }
    words = ("name", "title", "row", "published")
    for name, expected in without.items():
        if group + name not in recipe_names():
            assert group == "occluded_small_1000_"
            continue
        fields = read_recipe(group + name).flat()
        changed = {k: v for k, v in fields.items() if k not in words and v != full[k]}
        assert changed == expected


@pytest.mark.parametrize("group", ["occluded_mnist_", "occluded_small_"])
def test_the_gold_standard_is_the_encoder_without_states(group):
    full, gold = read_recipe(f"{group}rladder"), read_recipe(f"{group}optimal")
    stateless = {"convlstm": "conv", "lstm": "linear"}
    expected = [
        {**level, "encoder": stateless.get(level["encoder"], level["encoder"]), "decoder": None}
        for level in full.model.init_args["levels"]
    ]
    assert gold.model.init_args["levels"] == expected
    assert gold.data.init_args == {**full.data.init_args, "optimal": True}
    words = ("name", "title", "row", "published", "data.optimal", "objective.prediction_weight")
    changed = {k for k, v in gold.flat().items() if k not in words and v != full.flat()[k]}
    assert all(k.startswith("model.") for k in changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_weight": -1}, "prediction_weight must be finite and not negative, got -1"),
        ({"ema_decay": 1}, "ema_decay must be from 0 to below 1, got 1"),
        ({"truncate": 0}, "truncate must be at least 1 or null, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RLadderObjective(**fields)


def test_steps_that_are_no_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="truncate must be a whole number"):
        RLadderObjective(truncate=1.5)


def test_networks_that_cannot_be_trained_so_are_refused():
    with pytest.raises(ValueError, match="model must have num_classes"):
        RLadderObjective().check(RLadder((1, 32, 32), LEVELS, out_channels=1))
    with pytest.raises(ValueError, match="model must have out_channels"):
        RLadderObjective().check(RLadder((1, 32, 32), LEVELS, num_classes=10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model.num_classes": 5},
            "num_classes must be at least 10, the classes of OccludedMovingDigits, got 5",
        ),
        (
            {"model.input_shape": [1, 28, 28]},
            r"input_shape must be \(1, 32, 32\), that of a frame of .*, got \(1, 28",
        ),
        (
            {"model.input_shape": [1, 32]},
            r"input_shape must be \(1, 32, 32\), that of a frame of .*, got \(1, 32\)",
        ),
        (
            {"model.out_channels": 2},
            "out_channels must be 1, as many as a frame of OccludedMovingDigits has, .* got 2",
        ),
        (
            {
                "batch_labelled": 1,
                "batch_unlabelled": 0,
                "model.levels": [*LEVELS[:3], {"encoder": "linear", "channels": 6}],
            },
            "must make a batch of at least 2 samples for level 3, which has batch normalisation .*, got 1 and 0",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_training(fields, message):
    with pytest.raises(ValueError, match=message):
        Run(RECIPE, folder=None, progress=False, **fields)


def test_a_single_sequence_is_enough_for_batch_normalisation_at_positions():
    Run(RECIPE, folder=None, progress=False, batch_labelled=1, batch_unlabelled=0).step()


def test_a_picture_wants_frames_that_agree():
    scene, _ = OccludedMovingDigits(frames=2).batches(1, 0, seed=1).scene("test", torch.arange(1))
    chances = torch.full((2, 10), 0.1)
    figure = sequence(scene.clean[0], scene.occluded[0], None, chances)
    assert "expects" not in figure.get_label()
    with pytest.raises(ValueError, match="expected 2 frames"):
        sequence(scene.clean[0], scene.occluded[0], scene.clean[0][:1], chances)

"""Piano rolls from batch to figure: padding has no part in anything, parts are the whole, a run resumes."""

import copy
import math

import numpy as np
import pytest
import torch

from ladderfast.data import piano_rolls
from ladderfast.data.piano_rolls import Rolls
from ladderfast.models import PlainLSTM, RLadder, RLadderState
from ladderfast.training import PianoRollObjective, Run, checkpoint, read_recipe, recipe_names
from ladderfast.training.music_figures import piano_roll

LENGTHS = {"train": (30, 4, 17, 9, 26, 5), "valid": (6, 21), "test": (7, 1, 30)}
LEVELS = [
    {"encoder": "conv", "channels": 3, "stride": 4},
    {"encoder": "convlstm", "channels": 4, "stride": 2, "decoder": "convg2"},
    {"encoder": "lstm", "channels": 6},
]


def lstm(dtype=torch.float64):
    return PlainLSTM([88], 7, num_layers=2, dtype=dtype)


def rladder(dtype=torch.float64):
    return RLadder([1, 88], LEVELS, out_channels=1, dtype=dtype)


MODELS = [lstm, rladder]


def rolls(split="train"):
    rng = np.random.default_rng(0)
    return [(rng.random((steps, 88)) < 0.2).astype(np.uint8) for steps in LENGTHS[split]]


class Data:
    """Test and validation sequences, and three training batches, of which the second continues the first."""

    def __init__(self):
        self.test = self.valid = Rolls(rolls("test"), dtype=torch.float64)
        self.train = Rolls(rolls(), dtype=torch.float64)

    def __len__(self):
        return 3

    def get(self, epoch, step):
        members, first = ((np.array([0, 4]), 0), (np.array([0, 4]), 8), (np.array([1, 3, 5]), 0))[step]
        return self.train.batch(members, first, 8)


def everything(batch, model, objective=None):
    objective = objective or PianoRollObjective()
    model.zero_grad()
    cost = objective(model, batch)["notes"]
    cost.backward()
    return cost.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("make", MODELS)
def test_padding_has_no_part_in_cost_and_gradient(make):
    model = make()
    batch = Rolls(rolls(), dtype=torch.float64).batch(np.array([0, 1, 3]), 0, 40)
    assert not batch.mask.all()
    cost, gradients = everything(batch, model)
    padding = ~batch.mask.unsqueeze(2)
    changed = batch._replace(
        notes=batch.notes.masked_fill(padding, 1.0), previous=batch.previous.masked_fill(padding, 9.0)
    )
    other, others = everything(changed, model)
    assert torch.equal(cost, other)
    for got, want in zip(others, gradients, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize("make", MODELS)
def test_the_figure_is_that_of_each_sequence_alone(make):
    """Computed sequence by sequence and step by step from the model's own probabilities."""
    model = make().eval().requires_grad_(False)
    data = Data()
    figures = PianoRollObjective().measure(model, data)
    nats, steps = [], 0
    for roll in rolls("test"):
        x = torch.from_numpy(roll).double()
        seen = torch.cat((torch.zeros(1, 88, dtype=torch.float64), x[:-1]))
        output, _ = model(seen.reshape(1, len(x), *model.input_shape))
        p = output.prediction.reshape(len(x), 88).sigmoid()
        nats.append(-float((x * p.log() + (1 - x) * (1 - p).log()).sum().detach()))
        steps += len(x)
    assert figures["nll"] == pytest.approx(sum(nats) / steps, rel=1e-6)
    by_hand = sum(n / len(r) for n, r in zip(nats, rolls("test"), strict=True)) / 3
    assert figures["nll_of_sequences"] == pytest.approx(by_hand, rel=1e-6)
    assert (figures["test_sequences"], figures["test_steps"]) == (3, 38)
    assert PianoRollObjective().validate(model, data) == figures["nll"]


@pytest.mark.parametrize("make", MODELS)
def test_parts_of_sequences_are_measured_as_the_whole(make, monkeypatch):
    model = make().eval().requires_grad_(False)
    data = Data()
    whole = PianoRollObjective().measure(model, data)
    for sequences, steps in ((32, 4), (2, 7)):
        monkeypatch.setattr(Rolls.parts, "__defaults__", (sequences, steps))
        for name, value in PianoRollObjective().measure(model, data).items():
            assert value == pytest.approx(whole[name], rel=1e-12), (name, sequences, steps)


def test_a_measurement_forgets_the_running_averages():
    """What is measured depends on the weights and the beginnings of training sequences, less their padding."""
    model, data, objective = rladder().eval().requires_grad_(False), Data(), PianoRollObjective()
    first = objective.measure(model, data)
    norm = model.encoder[0].norm
    by_step = []
    for step in (0, 2):
        batch = data.get(0, step)
        x = batch.previous.reshape(*batch.mask.shape, 1, 88)
        assert batch.mask.all() == (step == 0)
        for t in range(x.shape[1]):
            by_step.append(model.encoder[0].map(x[batch.mask[:, t], t]).mean((0, 2)))
    torch.testing.assert_close(norm.running_mean[0], torch.stack(by_step).mean(0))
    for measured in (objective.measure, objective.validate):
        for buffer in model.buffers():
            buffer.mul_(3)
        assert measured(model, data) == (first if measured == objective.measure else first["nll"])
    assert not model.training


def test_the_state_goes_on_and_no_gradient_flows_back():
    model = lstm().requires_grad_()
    held = Rolls(rolls(), dtype=torch.float64)
    members = np.array([0, 4])
    objective = PianoRollObjective()
    first, second = held.batch(members, 0, 10), held.batch(members, 10, 10)
    everything(first, model, objective)
    cost, gradients = everything(second, model, objective)
    _, state = model(first.previous)
    detached, _ = model(second.previous, state.detach())
    logits = detached.prediction
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, second.notes, reduction="sum") / 20
    torch.testing.assert_close(cost, wanted.detach())
    model.zero_grad()
    wanted.backward()
    for got, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)
    fresh, _ = everything(second._replace(continues=torch.tensor(False)), model)
    assert not torch.isclose(fresh, cost)


def test_of_two_recurrences_one_is_torchs():
    model = lstm()
    x = torch.randn(3, 5, 88, dtype=torch.float64)
    torch.testing.assert_close(model(x)[0].prediction, model.readout(model.lstm(x)[0]))
    _, state = model(x[:, :2])
    torch.testing.assert_close(model(x[:, 2:], state)[0].prediction, model(x)[0].prediction[:, 2:])
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    assert not model(x, None, mask)[0].prediction[1, 3:].any()


# A run


@pytest.fixture
def made(monkeypatch):
    """Small sets in the place of JSB chorales."""
    sizes = tuple((len(lengths), sum(lengths)) for lengths in LENGTHS.values())
    monkeypatch.setitem(piano_rolls.SETS, "jsb_chorales", ("JSB_Chorales.mat", sizes))
    monkeypatch.setattr(piano_rolls, "read_mat", lambda path: tuple(rolls(split) for split in LENGTHS))


RECIPE = {
    "title": "Music",
    "name": "music",
    "epochs": 3,
    "batch_labelled": 0,
    "batch_unlabelled": 2,
    "learning_rate": 0.01,
    "schedule": "constant",
    "patience": 2,
    "retrain": True,
    "accelerator": "cpu",
    "threads": 1,
    "model": {
        "class_path": "ladderfast.models.RLadder",
        "init_args": {"input_shape": [1, 88], "levels": LEVELS, "out_channels": 1},
    },
    "data": {
        "class_path": "ladderfast.data.PianoRolls",
        "init_args": {"name": "jsb_chorales", "truncate": 8},
    },
    "objective": {
        "class_path": "ladderfast.training.PianoRollObjective",
        "init_args": {"checkpoint_every": 3},
    },
}


class Stopped(Exception):
    pass


def test_a_run_learns_and_stopped_within_a_sequence_ends_with_the_same_bits(made, tmp_path):
    whole = Run(copy.deepcopy(RECIPE), folder=tmp_path / "whole", progress=False)
    before = whole.evaluate()["nll"]
    assert before == pytest.approx(88 * math.log(2), rel=0.2)
    result = whole.fit()
    assert result["nll"] < 0.8 * before
    assert result["retrained_epochs"] == result["best_epoch"]
    assert whole.history[0]["validation_nll"] > 0
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Test sequence 1" in page
    assert "probability, one step ahead" in page
    parts = Run(copy.deepcopy(RECIPE), folder=tmp_path / "parts", progress=False, checkpoint_steps=1)
    continued = [step for step in range(len(parts.batches)) if parts.batches.get(0, step).continues]
    inner = parts._train_step

    def train_step():
        if parts.global_step == continued[0]:
            raise Stopped
        return inner()

    parts._train_step = train_step
    with pytest.raises(Stopped):
        parts.fit()
    run = Run(copy.deepcopy(RECIPE), folder=tmp_path / "parts", progress=False, resume=True)
    assert run.global_step == continued[0]
    run.fit()
    states = [checkpoint.load(tmp_path / name) for name in ("whole", "parts")]
    for name, value in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], value), name
    assert states[0]["course"] == states[1]["course"]


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="checkpoint_every has no effect with PlainLSTM, got 4"):
        PianoRollObjective(4).prepare(lstm())
    with pytest.raises(ValueError, match=r"input_shape of 88 notes for this objective, got \(4,\)"):
        PianoRollObjective().prepare(PlainLSTM([4], 3))
    with pytest.raises(ValueError, match="model must have out_channels"):
        PianoRollObjective().prepare(RLadder([88], [{"encoder": "lstm", "channels": 3}]))
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1"):
        PianoRollObjective(0)
    with pytest.raises(TypeError, match="hidden_size must be a whole number"):
        PlainLSTM([88], 2.5)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        PlainLSTM([88], 0)
    with pytest.raises(ValueError, match=r"x must have shape \(N, T, 88\) with .*, got \(2, 3, 87\)"):
        lstm()(torch.zeros(2, 3, 87, dtype=torch.float64))
    x = torch.zeros(2, 3, 88, dtype=torch.float64)
    for given, error, message in (
        ((x, None, torch.ones(2, 3)), ValueError, r"mask must be bool of shape \(2, 3\); got torch.float32"),
        ((x, None, torch.ones(2, 2) > 0), ValueError, r"mask must be bool of shape \(2, 3\); .* \(2, 2\)"),
        ((x[:, :0],), ValueError, "with at least one time step"),
        ((x, (torch.zeros(2, 2, 7),) * 2), TypeError, "state must be an RLadderState or None, got tuple"),
        ((x, RLadderState(0, (), ())), ValueError, "state must have 2 layers, got 0"),
        ((x, lstm()(x[:1])[1]), ValueError, r"state of layer 0 must have shape \(2, 7\), got \(1, 7\)"),
        (
            (x.float(),),
            TypeError,
            "x must be torch.float64, as the network's parameters are, got torch.float32",
        ),
        (([0.0],), TypeError, "x must be a floating-point tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            lstm()(*given)
    with pytest.raises(ValueError, match="notes and probabilities must have one shape"):
        piano_roll(torch.zeros(3, 88), torch.zeros(4, 88))


@pytest.mark.parametrize("name", sorted(piano_rolls.SETS))
def test_the_recipes_of_a_set_have_networks_of_one_size(name):
    assert {f"{name}_rladder", f"{name}_lstm"} <= set(recipe_names())
    recipes = [read_recipe(f"{name}_{kind}") for kind in ("rladder", "lstm")]
    models = [recipe.model.build("model") for recipe in recipes]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    kinds = [level.encoder for level in models[0].levels]
    assert (kinds.count("convlstm"), kinds.count("lstm")) == (5, 1)
    assert len(kinds) + len(models[0].gates) + 1 == 18
    assert recipes[0].data == recipes[1].data
    for recipe, model in zip(recipes, models, strict=True):
        recipe.objective.build("objective").prepare(model)
        assert recipe.retrain

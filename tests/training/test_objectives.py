from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ladderfast.data import Batch, Batches, Digits
from ladderfast.models import LadderNetwork, LadderOutput
from ladderfast.training import LadderObjective


class Stub:
    """Answers with fixed costs, and notes what it was asked."""

    def __init__(self, costs):
        self.costs = costs

    def training_pass(self, x_labelled, x_unlabelled, *, costs, clean_gradients):
        assert not clean_gradients  # nobody uses them
        self.asked = (x_labelled, x_unlabelled, list(costs))
        denoising = tuple(c if wanted else None for c, wanted in zip(self.costs, costs, strict=True))
        return LadderOutput(x_labelled, torch.full_like(x_labelled, torch.nan), denoising)


def batch():
    return Batch(torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), torch.randn(5, 4))


def test_the_cost_is_the_papers():
    model = Stub([torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)])
    given = batch()
    terms = LadderObjective([1000, 10, 0.1])(model, given)
    assert list(terms) == ["cross_entropy", "denoising_0", "denoising_1", "denoising_2"]
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(given.x_labelled, given.y_labelled))
    assert [float(terms[f"denoising_{i}"]) for i in range(3)] == pytest.approx([2000, 30, 0.5])
    assert model.asked[0] is given.x_labelled
    assert model.asked[1] is given.x_unlabelled


def test_a_cost_of_weight_0_is_neither_asked_for_nor_a_term():
    model = Stub([torch.tensor(torch.nan), torch.tensor(torch.nan), torch.tensor(5.0)])
    terms = LadderObjective([0, 0, 2])(model, batch())
    assert model.asked[2] == [False, False, True]
    assert list(terms) == ["cross_entropy", "denoising_2"]


def test_the_baseline_has_the_cross_entropy_alone():
    model = LadderNetwork([4, 3, 4], combinator="none")
    assert list(LadderObjective([0, 0, 0])(model, batch())) == ["cross_entropy"]


@pytest.mark.parametrize("weights", [[-1, 0], [float("nan"), 0], [float("inf"), 0]])
def test_weights_that_make_no_cost_are_refused(weights):
    with pytest.raises(ValueError, match="denoising_weights must be finite and not negative"):
        LadderObjective(weights)


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, 1, 1]])
def test_a_number_of_weights_that_is_not_the_models_is_refused(weights):
    with pytest.raises(ValueError, match="must have 3 entries"):
        LadderObjective(weights)(LadderNetwork([4, 3, 4]), batch())


def test_finish_averages_over_the_labelled_samples():
    data = Batches(Digits(50), 20, 100, seed=1)
    seen = []
    model = SimpleNamespace(recompute_statistics=lambda batches: seen.extend(batches))
    LadderObjective([1, 1]).finish(model, data)
    assert [len(x) for x in seen] == [17, 17, 16]
    assert torch.equal(torch.cat(seen), data.x_labelled)


@pytest.mark.parametrize("layers", [[64, 5, 10], ["1x8x8", "conv 3 4x4", 10]])
@pytest.mark.parametrize(
    ("weights", "combinator", "expected"),
    [
        ([1, 0, 1], "gaussian", ["Test images", "Combinator of layer 0", "Combinator of layer 2"]),
        ([0, 0, 1], ["none", "none", "gaussian"], ["Combinator of layer 2"]),
        ([0, 0, 0], "none", []),
    ],
)
def test_pictures_of_what_the_objective_trains(layers, weights, combinator, expected):
    data = Batches(Digits(50), 20, 100, seed=1)
    model = LadderNetwork(layers, combinator=combinator)
    figures = LadderObjective(weights).figures(model, data)
    assert len(figures) == len(expected)
    for title, start in zip(figures, expected, strict=True):
        assert title.startswith(start)


def test_a_single_test_image_has_no_reconstruction_to_show():
    data = Batches(Digits(50), 20, 100, seed=1)
    data.x_test, data.y_test = data.x_test[:1], data.y_test[:1]
    assert list(LadderObjective([1, 0]).figures(LadderNetwork([64, 10]), data)) == ["Combinator of layer 0"]

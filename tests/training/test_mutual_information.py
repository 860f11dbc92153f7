import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from ladderfast.training import mutual_information
from ladderfast.training.mutual_information import adjusted_mutual_information


def theirs(truth, predicted, normaliser):
    return [
        adjusted_mutual_info_score(t[t > 0], p[t > 0], average_method=normaliser)
        for t, p in zip(truth.numpy(), predicted.numpy(), strict=True)
    ]


@pytest.mark.parametrize("normaliser", ["arithmetic", "max"])
@pytest.mark.parametrize("pixels", [1, 2, 7, 90])
@pytest.mark.parametrize(("owners", "groups"), [(1, 1), (1, 3), (3, 1), (3, 4), (6, 9)])
def test_as_scikit_learn(pixels, owners, groups, normaliser):
    truth = torch.randint(0, owners + 1, (12, pixels))
    predicted = torch.randint(0, groups, (12, pixels))
    # From no relation at all to agreement.
    agree = torch.rand(12, pixels) < torch.linspace(0, 1, 12)[:, None]
    predicted = torch.where(agree, truth % groups, predicted)
    truth[3] = 0
    found = adjusted_mutual_information(truth, predicted, normaliser=normaliser)
    np.testing.assert_allclose(found, theirs(truth, predicted, normaliser), rtol=0, atol=1e-12)


def test_in_parts(monkeypatch):
    truth, predicted = torch.randint(0, 4, (20, 60)), torch.randint(0, 3, (20, 60))
    whole = adjusted_mutual_information(truth, predicted)
    for terms in (1, 100):
        monkeypatch.setattr(mutual_information, "TERMS", terms)
        assert torch.equal(adjusted_mutual_information(truth, predicted), whole)


@pytest.mark.parametrize("normaliser", ["arithmetic", "max"])
def test_large_labels_are_as_good_as_small_ones(normaliser):
    """Whatever the labels are: they are 0, which is none, and otherwise only told apart."""
    large = torch.tensor([0, 1, 63, 64, 10**10, 2**62, 2**63 - 1])
    small_truth, small = torch.randint(0, 7, (15, 40)), torch.randint(0, 7, (15, 40))
    small_truth[3] = small_truth[3].clamp(min=2)  # an image all of whose pixels have owners
    small = torch.where(torch.rand(15, 40) < 0.5, small_truth, small)
    found = adjusted_mutual_information(large[small_truth], large[small], normaliser=normaliser)
    np.testing.assert_allclose(found, theirs(small_truth, small, normaliser), rtol=0, atol=1e-12)
    for truth, predicted in ((large[small_truth], small), (small_truth, large[small])):
        torch.testing.assert_close(
            adjusted_mutual_information(truth, predicted, normaliser=normaliser), found, rtol=0, atol=1e-12
        )
    agree = adjusted_mutual_information(torch.tensor([[1, 2, 10**10]]), torch.tensor([[0, 1, 2]]))
    assert agree.eq(1).all()


def test_names_of_groups_do_not_matter_and_chance_is_zero():
    truth = torch.randint(1, 4, (500, 60))
    assert adjusted_mutual_information(truth, (truth + 1) % 4).eq(1).all()
    chance = adjusted_mutual_information(truth, torch.randint(0, 4, (500, 60)))
    assert abs(float(chance.mean())) < 0.01


def test_nothing_to_measure():
    assert adjusted_mutual_information(torch.zeros(0, 5).long(), torch.zeros(0, 5).long()).shape == (0,)
    assert adjusted_mutual_information(torch.zeros(2, 0).long(), torch.zeros(2, 0).long()).eq(1).all()


def test_what_is_refused():
    t = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="must have one shape"):
        adjusted_mutual_information(t, t[:, :2])
    with pytest.raises(ValueError, match="normaliser must be one of arithmetic, max"):
        adjusted_mutual_information(t, t, normaliser="min")
    with pytest.raises(ValueError, match="must not be negative"):
        adjusted_mutual_information(t, -t)
    with pytest.raises(TypeError, match=r"truth must be a tensor of integers, got torch.float32"):
        adjusted_mutual_information(t.float(), t)
    with pytest.raises(TypeError, match="predicted must be a tensor of integers, got list"):
        adjusted_mutual_information(t, t.tolist())

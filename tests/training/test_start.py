"""start_from: each network starts as the one of its own seed, from whatever runs there are."""

import warnings

import pytest
import torch

from ladderfast.training import Run


@pytest.fixture
def plain(small):
    """Without anything that moves a network apart from training."""
    return {**small, "epochs": 1, "learning_rate": 0.01}


def train(recipe, folder, **fields):
    run = Run(recipe, folder=folder, progress=False, **fields)
    run.fit()
    return run


def started(recipe, where, **fields):
    return Run(recipe, folder=None, progress=False, start_from=str(where), **fields)


def assert_starts_as(network, source):
    state = source.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]) == (name != "noise_state"), name


def test_the_seed_stands_for_that_of_each_network(plain, tmp_path):
    """In a single run, in several side by side, from folders of one seed and from one of several."""
    alone = {seed: train(plain, tmp_path / f"a-{seed}", seed=seed) for seed in (4, 5)}
    together = train(plain, tmp_path / "b-4-5", seed=4, seeds=2)
    mixed = train(plain, tmp_path / "a-6-7", seed=6, seeds=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (4, 5):
            single = started(plain, tmp_path / "a-{seed}", seed=seed)
            assert_starts_as(single.model, alone[seed].model)
            single = started(plain, tmp_path / "b-{seed}", seed=seed)
            assert_starts_as(single.model, together.network(seed - 4))
            single = started(plain, tmp_path / "b-4-5", seed=seed)
            assert_starts_as(single.model, together.network(seed - 4))
        pair = started(plain, tmp_path / "b-{seed}", seed=4, seeds=2)
        three = started(plain, tmp_path / "a-{seed}", seed=4, seeds=3)
    for i in range(2):
        assert_starts_as(pair.network(i), together.network(i))
        assert_starts_as(three.network(i), alone[4 + i].model)
    assert_starts_as(three.network(2), mixed.network(0))


def test_what_is_missing_is_said(plain, tmp_path):
    train(plain, tmp_path / "a-1")
    train(plain, tmp_path / "a-2-3", seed=2, seeds=2)
    (tmp_path / "a-4").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint .* \{seed\} = 4, 5, .*a-FIRST-LAST, that has them"
    ):
        started(plain, tmp_path / "a-{seed}", seeds=5)
    with pytest.raises(ValueError, match="has seeds 2 to 3, and not 1"):
        started(plain, tmp_path / "a-2-3")


def test_another_seeds_labels_are_warned_of(plain, tmp_path):
    train(plain, tmp_path / "run")
    with pytest.warns(RuntimeWarning, match=r"has seed 1 and this network 2.* \{seed\} in start_from"):
        run = started(plain, tmp_path / "run", seed=2)
    assert run.recipe.seed == 2


def test_a_run_that_is_not_finished_is_warned_of(plain, tmp_path):
    run = Run(plain, folder=tmp_path, progress=False, epochs=3)
    for _ in range(len(run.batches)):
        run.step()
    run._save()
    with pytest.warns(RuntimeWarning, match="is not finished: 1 of 3 epochs are done"):
        started(plain, tmp_path)

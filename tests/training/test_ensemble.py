"""Several seeds side by side: each network gets what it would get alone, to rounding."""

import statistics

import pytest
import torch
from torch import nn

import ladderfast
from ladderfast.data import Digits, EnsembleBatches
from ladderfast.data.dataset import Batches
from ladderfast.models import LadderNetwork
from ladderfast.training import Run
from ladderfast.training.ensemble import Ensemble

SEEDS = (3, 4, 5)


def make(recipe, **fields):
    return Run(recipe, **{"progress": False, "folder": None, **fields})


def double(recipe):
    """The recipe in float64, where what differs for other reasons than rounding shows."""
    return {**recipe, "precision": "64-true"}


@pytest.mark.parametrize("backend", ["reference", None])
def test_each_network_is_the_one_that_its_seed_trains_alone(small, backend):
    with ladderfast.use_backend(backend):
        together = make(double(small), seed=SEEDS[0], seeds=len(SEEDS))
        costs = [together.step() for _ in range(10)]
        assert costs[0]["total"].shape == (len(SEEDS),)
        for i, seed in enumerate(SEEDS):
            alone = make(double(small), seed=seed)
            for step in costs:
                for name, cost in alone.step().items():
                    torch.testing.assert_close(step[name][i], cost, rtol=1e-8, atol=1e-10)
            state = together.network(i).state_dict()
            for name, value in alone.model.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-8)
            by_seed = together.evaluate()["test_error_by_seed"]
            assert by_seed[i] == pytest.approx(alone.evaluate()["test_error"])


def test_networks_with_convolutions_take_turns_on_a_cpu(small, monkeypatch):
    small["model"]["init_args"]["layers"] = ["1x8x8", "conv 3 3x3", "maxpool 2x2", "conv 10 1x1", "meanpool"]
    small["objective"]["init_args"]["denoising_weights"] = [10, 1, 0.1, 0.1, 0.1]
    vmap = torch.func.vmap
    calls = []
    monkeypatch.setattr(
        torch.func, "vmap", lambda *args, **kwargs: calls.append(args) or vmap(*args, **kwargs)
    )
    together = make(double(small), seed=SEEDS[0], seeds=len(SEEDS))
    costs = [together.step() for _ in range(10)]  # two epochs
    assert not calls
    for i, seed in enumerate(SEEDS):
        alone = make(double(small), seed=seed)
        for step in costs:
            for name, cost in alone.step().items():
                torch.testing.assert_close(step[name][i], cost, rtol=1e-10, atol=1e-12)
        state = together.network(i).state_dict()
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-10)
        errors = together.evaluate()["test_error_by_seed"]
        assert errors[i] == alone.evaluate()["test_error"]
    assert not calls
    small["model"]["init_args"]["layers"] = [64, 12, 10]
    small["objective"]["init_args"]["denoising_weights"] = [10, 1, 0.1]
    make(small, seeds=2).step()
    assert calls


def test_seeds_differ_in_labels_start_values_order_and_noise(small):
    run = make(small, seeds=2)
    first, second = run.network(0), run.network(1)
    assert not torch.equal(first.encoder[0].linear.weight, second.encoder[0].linear.weight)
    assert first.noise_state[0] != second.noise_state[0]
    batch = run.batches.get(0, 0)
    assert batch.x_labelled.shape == (2, 20, 64)
    assert batch.y_labelled.shape == (2, 20)
    assert not torch.equal(batch.x_unlabelled[0], batch.x_unlabelled[1])
    assert not torch.equal(run.batches.of(0).x_labelled, run.batches.of(1).x_labelled)


def test_batches_hold_the_samples_once_and_are_those_of_each_seed():
    data = Digits(num_labels=40, seed=1)
    batches = EnsembleBatches([data.with_seed(s) for s in (1, 2)], 20, 50, seeds=(1, 2))
    assert batches.of(0).x_unlabelled.data_ptr() == batches.of(1).x_unlabelled.data_ptr()
    for i, seed in enumerate((1, 2)):
        alone = Batches(Digits(num_labels=40, seed=seed), 20, 50, seed=seed)
        for position in ((0, 0), (3, 2)):
            for part, own in zip(batches.get(*position), alone.get(*position), strict=True):
                assert torch.equal(part[i], own)


def test_figures_are_means_over_the_seeds(small, tmp_path):
    run = make(small, seeds=3, folder=tmp_path / "run")
    result = run.fit()
    by_seed = result["test_error_by_seed"]
    assert len(by_seed) == 3
    assert result["test_error"] == pytest.approx(statistics.fmean(by_seed))
    assert result["test_error_std"] == pytest.approx(statistics.stdev(by_seed))
    assert result["test_errors"] == round(sum(by_seed) * 497 / 100)
    assert result["parameters"] == sum(p.numel() for p in LadderNetwork([64, 12, 10]).parameters())
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"{result['test_error']:.2f} ± {result['test_error_std']:.2f} %" in report
    assert Run.load(tmp_path / "run").evaluate()["test_error_by_seed"] == by_seed


def test_at_the_end_statistics_are_each_seeds_own_average(small):
    run = make(double(small), seeds=2, seed=3)
    alone = make(double(small), seed=4)
    run.fit()
    alone.fit()
    own = run.network(1)
    torch.testing.assert_close(own.encoder[0].running_var, alone.model.encoder[0].running_var)


def test_a_resumed_ensemble_has_the_same_bits(small, tmp_path):
    whole = make(small, seeds=2)
    for _ in range(10):
        whole.step()
    first = make(small, seeds=2, folder=tmp_path)
    first.folder.mkdir(exist_ok=True)
    for _ in range(4):
        first.step()
    first._save()
    second = make(small, seeds=2, folder=tmp_path, resume=True)
    assert second.global_step == 4
    for _ in range(6):
        second.step()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_cost_that_is_not_finite_names_the_seed(small):
    run = make(small, seeds=2, seed=7, log_every=1)
    with torch.no_grad():
        run.model.stacked.encoder[0].linear.weight[1].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1 .*cross_entropy = nan \(seed 8\)"):
        run.step()


def test_an_ensemble_takes_any_module_and_gives_its_networks_back():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    ensemble = Ensemble(networks)
    x = torch.randn(5, 3)
    ensemble.eval()
    out = ensemble(x)
    for i, network in enumerate(networks):
        torch.testing.assert_close(out[i], network.eval()(x))
        torch.testing.assert_close(ensemble.extract(i).state_dict(), network.state_dict())
    ensemble.absorb(0, networks[2])
    torch.testing.assert_close(ensemble(x)[0], out[2])
    assert [p.shape[0] for p in ensemble.parameters()] == [3] * 4
    with pytest.raises(ValueError, match="same names and shapes"):
        Ensemble([nn.Linear(3, 4), nn.Linear(4, 4)])


def test_an_ensemble_is_trained_by_one_process(small):
    with pytest.raises(ValueError, match=r"seeds=2 needs one device.*devices=2"):
        make(small, seeds=2, devices=2)
    with pytest.raises(IndexError, match="index must be from 0 to 0, got 1"):
        make(small).network(1)


class Tied(nn.Module):
    """Its two maps have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.down(self.up(x))


def test_a_parameter_that_modules_share_stays_one():
    networks = [Tied(), Tied()]
    together = Ensemble(networks)
    assert len(list(together.parameters())) == 1
    x = torch.randn(4, 3)
    out = together(x)
    out.sum().backward()
    for i, network in enumerate(networks):
        torch.testing.assert_close(out[i], network(x))
        network(x).sum().backward()
        torch.testing.assert_close(next(together.parameters()).grad[i], network.up.weight.grad)
        alone = together.extract(i)
        assert alone.up.weight is alone.down.weight


def test_one_device_may_be_any(small):
    assert make(small, seeds=2, devices=1).step()["total"].shape == (2,)
    with pytest.raises(ValueError, match="needs one device"):
        make(small, seeds=2, devices=2)

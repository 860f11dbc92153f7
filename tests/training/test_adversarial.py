"""Adversarial noise: its four kinds by hand, its gradient, where it goes in a Ladder, robustness, the command line."""

import math

import pytest
import torch
from torch import nn

from ladderfast import cli
from ladderfast.data import Digits
from ladderfast.models import SWWAE, LadderNetwork, Tagger
from ladderfast.training import LadderObjective, Run
from ladderfast.training.adversarial import KINDS, adversarial_noise, input_gradient
from ladderfast.training.robustness import check_robustness

G = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1e-30]])


def test_the_four_kinds_by_hand():
    """|g| = 5 in the first sample, k = 4; a zero gradient gives no noise, a tiny one is not lost."""
    expected = {
        "sign": [[0.1, -0.1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.1]],
        "raw": [[0.3, -0.4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1e-31]],
        "unit_norm": [[0.06, -0.08, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.1]],
        "q_norm": [[0.12, -0.16, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.2]],
    }
    assert set(expected) == set(KINDS)
    for kind, wanted in expected.items():
        torch.testing.assert_close(
            adversarial_noise(G, kind, 0.1), torch.tensor(wanted), rtol=1e-6, atol=1e-33
        )


@pytest.mark.parametrize("kind", KINDS)
def test_noise_keeps_the_shape_and_q_norm_the_power_of_sign(kind):
    g = torch.randn(5, 2, 7, 7, dtype=torch.float64)
    noise = adversarial_noise(g, kind, 0.3)
    assert noise.shape == g.shape
    power = noise.flatten(1).square().sum(1)
    if kind in ("sign", "q_norm"):
        torch.testing.assert_close(power, torch.full_like(power, 0.09 * 98))
    if kind == "unit_norm":
        torch.testing.assert_close(power, torch.full_like(power, 0.09))


def test_what_is_refused():
    with pytest.raises(ValueError, match="kind must be one of sign, raw, unit_norm, q_norm, got 'l2'"):
        adversarial_noise(G, "l2", 0.1)
    with pytest.raises(ValueError, match="tau must be finite and not negative, got -1"):
        adversarial_noise(G, "sign", -1)
    with pytest.raises(
        ValueError, match=r"adversarial_unlabelled must be finite and not negative, got -0\.1"
    ):
        LadderObjective([1, 1], adversarial_unlabelled=-0.1)
    with pytest.raises(ValueError, match="labelled_kind must be one of sign"):
        LadderObjective([1, 1], labelled_kind="signs")


def test_gradient_of_the_mean_cross_entropy():
    """Against autograd; without labels, that of the largest logit."""
    network = nn.Linear(6, 4).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    for labels in (y, None):
        inputs = x.clone().requires_grad_()
        target = y if labels is not None else network(x).argmax(1)
        wanted = torch.autograd.grad(nn.functional.cross_entropy(network(inputs), target), inputs)[0]
        found = input_gradient(network, x, labels)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)  # in float64 all the way
        assert not found.requires_grad


@pytest.fixture
def recorded(monkeypatch):
    """The extra noise of each training pass."""
    passes = []
    original = LadderNetwork.training_pass

    def record(self, *args, extra_noise=(None, None), **options):
        passes.append(extra_noise)
        return original(self, *args, extra_noise=extra_noise, **options)

    monkeypatch.setattr(LadderNetwork, "training_pass", record)
    return passes


def adversarial(recipe, **arguments):
    recipe["objective"]["init_args"].update(arguments)
    return recipe


def test_the_halves_get_their_own_noise(small, recorded):
    """Labelled: the sign for the true label; unlabelled: the q-norm for the network's own; at the clean input."""
    run = Run(
        adversarial(small, adversarial_labelled=0.2, adversarial_unlabelled=0.1), progress=False, folder=None
    )
    batch = run.batches.get(0, 0)
    run.model.train()
    wanted = (
        adversarial_noise(
            input_gradient(run.model.clean_logits, batch.x_labelled, batch.y_labelled), "sign", 0.2
        ),
        adversarial_noise(input_gradient(run.model.clean_logits, batch.x_unlabelled), "q_norm", 0.1),
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.clean_logits(batch.x_labelled)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    run.step()
    for found, expected in zip(recorded[0], wanted, strict=True):
        assert torch.equal(found, expected)
        assert found.abs().max() > 0


def test_either_may_be_left_out(small, recorded):
    Run(adversarial(small, adversarial_labelled=0.2), progress=False, folder=None).step()
    assert recorded[0][0] is not None
    assert recorded[0][1] is None


def test_extra_noise_is_on_the_corrupted_input_alone():
    """Noise that undoes a shift of the input: the corrupted pass sees the unshifted one, the target stays shifted."""
    torch.manual_seed(0)
    model = LadderNetwork([4, 3], noise_std=0.0).double()
    x, u = torch.randn(6, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    shift = torch.randn(8, 4, dtype=torch.float64)
    plain = model.training_pass(x, u)
    noisy = model.training_pass(x, u + shift, extra_noise=(None, -shift))
    torch.testing.assert_close(plain.logits, noisy.logits)
    z_hat, lateral = model.reconstruct(u)[1], u
    torch.testing.assert_close(model.reconstruct(u)[0], lateral)
    torch.testing.assert_close(noisy.denoising[0], (u + shift - z_hat).square().mean())
    other = model.training_pass(x, u, extra_noise=(torch.ones_like(x) * torch.arange(6)[:, None], None))
    assert not torch.allclose(other.logits, plain.logits)
    torch.testing.assert_close(other.clean_logits, plain.clean_logits)


def test_several_seeds_side_by_side_have_the_noise_that_each_has_alone(small):
    recipe = {
        **adversarial(small, adversarial_labelled=0.2, adversarial_unlabelled=0.1),
        "precision": "64-true",
    }
    together = Run(recipe, seeds=2, seed=3, progress=False, folder=None)
    alone = Run(recipe, seed=4, progress=False, folder=None)
    for _ in range(3):
        costs, own = together.step(), alone.step()
    torch.testing.assert_close(costs["total"][1], own["total"], rtol=1e-8, atol=1e-10)


def test_robustness_of_a_classifier(small):
    run = Run(small, progress=False, folder=None)
    for _ in range(10):
        run.step()
    figures = run.robustness(0.5)
    assert figures == run.robustness(0.5)
    assert figures["test_error"] == run.evaluate()["test_error"]
    assert figures["test_error"] < figures["random_sign_error"] < figures["adversarial_error"]
    still = run.robustness(0.0)
    assert still["adversarial_error"] == still["random_sign_error"] == still["test_error"]
    with pytest.raises(ValueError, match="this run has 2"):
        Run(small, seeds=2, progress=False, folder=None).robustness(0.1)


def test_a_network_without_logits_has_no_robustness():
    """A Tagger is called with groups and iterations, and a network without classes gives maps."""
    data = Digits(50).batches(10, 10, seed=1)
    for model in (Tagger(64, [8, 6, 11], num_classes=10), SWWAE("(2)3c-2p", (8, 8))):
        with (
            pytest.raises(ValueError, match="of a classifier, and this network gives no logits"),
            torch.no_grad(),
        ):
            check_robustness(model.eval(), data, 0.1, 1)


def test_evaluate_prints_the_three_figures(small, tmp_path, capsys):
    run = Run(small, progress=False, folder=tmp_path / "run")
    run.fit()
    capsys.readouterr()
    cli.main(["evaluate", str(tmp_path / "run"), "--adversarial", "0.25"])
    line = capsys.readouterr().out.splitlines()[-1]
    figures = run.robustness(0.25)
    assert line == (
        f"test error without noise {figures['test_error']:.2f} %, with 0.25 times random signs "
        f"{figures['random_sign_error']:.2f} %, times the gradient's signs {figures['adversarial_error']:.2f} %"
    )
    assert math.isfinite(figures["adversarial_error"])
    assert cli.main(["evaluate", str(tmp_path / "run"), "--adversarial", "-1"]) == 2
    assert "tau must be finite and not negative, got -1.0" in capsys.readouterr().err


def test_a_zero_gradient_gives_no_noise_in_16_bits_either():
    for dtype in (torch.float16, torch.bfloat16):
        for kind in KINDS:
            assert adversarial_noise(torch.zeros(1, 3, dtype=dtype), kind, 1.0).abs().max() == 0


def test_extra_noise_is_checked_and_may_need_gradients():
    model = LadderNetwork([4, 3])
    x, u = torch.randn(6, 4), torch.randn(8, 4)
    noise = torch.randn(6, 4, requires_grad=True)
    out = model.training_pass(x.clone().requires_grad_(), u, extra_noise=(noise, None))
    assert torch.autograd.grad(out.logits.square().sum(), noise)[0].abs().max() > 0
    for bad, error, message in (
        (None, TypeError, "extra_noise must be a pair"),
        ((0.5, None), TypeError, r"extra_noise\[0\] must be a floating-point tensor, got float"),
        ((None, noise), ValueError, r"extra_noise\[1\] must hold 8 samples, as the input does, got 6"),
        ((noise.t(), None), ValueError, r"extra_noise\[0\] must have shape \(N, 4\), got \(4, 6\)"),
    ):
        with pytest.raises(error, match=message):
            model.training_pass(x, u, extra_noise=bad)

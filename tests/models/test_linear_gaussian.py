"""The linear-Gaussian models of Prémont-Schwarz et al. 2017, appendices B and C: an RLadder whose weights are those of
their message passing, run to convergence, against linear algebra and against the variational cost itself."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ladderfast.models import RLadder
from tests.from_path import load

ITERATIONS = 300


def linear_ladder(inputs, channels, outputs):
    """An RLadder without nonlinearities: e_l = W e_{l-1} + W_d d_l(t-1) + b, d_l = U d_{l+1} + V e_l; all are zeros."""
    *below, top = channels
    plain = {"encoder": "linear", "activation": "identity", "norm": "none"}
    gated = {**plain, "decoder": "convg3", "gate_norm": "none", "feedback": True}
    levels = [*({**gated, "channels": count} for count in below), {**plain, "channels": top}]
    model = RLadder([inputs], levels, out_channels=outputs, dtype=torch.float64).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for gate in model.gates.values():  # sigmoid(r) = 0: d = c, the linear part
        gate.top.map.bias[: len(gate.top.map.bias) // 2] = -math.inf
    return model


def fill(linear, rows):
    """Set a matrix, or the lower half of a gate's, which has r above c."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    linear.weight[len(linear.weight) - len(rows) :] = rows


def converged(model: RLadder, x: Tensor) -> Tensor:
    state, last = None, None
    for _ in range(ITERATIONS):
        output, state = model.step(x, state)
        if last is not None and torch.equal(last, output.prediction):
            break
        last = output.prediction
    torch.testing.assert_close(output.prediction, last, rtol=1e-13, atol=1e-13)
    return output.prediction


# Appendix B: z ~ N(m0, sz), y ~ N(wy z, sy), x ~ N(wx y, sx), seen is x~ ~ N(x, s); all s are variances.

STATIC = [
    {"m0": 0.7, "sz": 1.3, "wy": 1.4, "sy": 0.6, "wx": -0.8, "sx": 0.4, "s": 0.9},
    {"m0": -2.0, "sz": 0.2, "wy": 0.5, "sy": 3.0, "wx": 2.0, "sx": 0.05, "s": 0.5},
    {"m0": 0.0, "sz": 5.0, "wy": -1.0, "sy": 0.5, "wx": 1.0, "sx": 0.5, "s": 4.0},
]


def static_ladder(m0, sz, wy, sy, wx, sx, s):
    """The updates (17) to (19) of q(x) q(y) q(z), bottom up and top down.

    Level x: e = (m_x, part of it that x~ brings), d = (w_x m_y, m_x). Level y: e = (m_y, what x says of y),
    d = (m_y, w_y m_z). Level z: m_z.
    """
    vx, vy, vz = 1 / (1 / s + 1 / sx), 1 / (wx**2 / sx + 1 / sy), 1 / (wy**2 / sy + 1 / sz)
    model = linear_ladder(1, (2, 2, 1), 1)
    x, y, z = model.encoder
    fill(x.map, [[vx / s], [vx / s]])
    fill(x.feedback, [[vx / sx, 0], [0, 0]])
    fill(y.map, [[vy * wx / sx, 0], [wx / sx, 0]])
    fill(y.feedback, [[0, vy / sy], [0, 0]])
    fill(z.map, [[vz * wy / sy, 0]])
    z.map.bias.fill_(vz * m0 / sz)
    down_y, down_x = model.gates["1"], model.gates["0"]
    fill(down_y.top.map, [[vy * wy / sy], [wy]])
    fill(down_y.lateral.map, [[0, vy], [0, 0]])
    fill(down_x.top.map, [[wx, 0], [vx * wx / sx, 0]])
    fill(down_x.lateral.map, [[0, 0], [0, 1]])
    fill(model.readout.map, [[0, 1]])
    return model


@pytest.mark.parametrize("p", STATIC)
def test_appendix_b_gives_the_exact_posterior_mean(p):
    """E[x | x~] by conditioning the joint Gaussian of x and x~, whose moments follow from the model forwards."""
    mean = p["wx"] * p["wy"] * p["m0"]
    var = p["wx"] ** 2 * (p["wy"] ** 2 * p["sz"] + p["sy"]) + p["sx"]
    seen = torch.linspace(-4, 4, 9, dtype=torch.float64).unsqueeze(1)
    exact = mean + var / (var + p["s"]) * (seen - mean)
    torch.testing.assert_close(converged(static_ladder(**p), seen), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", STATIC)
def test_appendix_b_gives_the_exact_means_of_all_variables(p):
    """(x, y, z) given x~ from their precision matrix: what the three levels hold after the last iteration."""
    model = static_ladder(**p)
    precision = torch.tensor(
        [
            [1 / p["s"] + 1 / p["sx"], -p["wx"] / p["sx"], 0],
            [-p["wx"] / p["sx"], p["wx"] ** 2 / p["sx"] + 1 / p["sy"], -p["wy"] / p["sy"]],
            [0, -p["wy"] / p["sy"], p["wy"] ** 2 / p["sy"] + 1 / p["sz"]],
        ],
        dtype=torch.float64,
    )
    seen = torch.tensor([[1.7]], dtype=torch.float64)
    right = torch.tensor([1.7 / p["s"], 0, p["m0"] / p["sz"]], dtype=torch.float64)
    exact = torch.linalg.solve(precision, right)
    state = None
    for _ in range(ITERATIONS):
        output, state = model.step(seen, state)
    found = torch.stack((output.prediction[0, 0], state.feedback[1][0, 0], output.top[0, 0]))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_one_iteration_is_not_enough():
    p = STATIC[0]
    seen = torch.tensor([[1.7]], dtype=torch.float64)
    once = static_ladder(**p).step(seen)[0].prediction
    assert (once - converged(static_ladder(**p), seen)).abs() > 1e-2


# Appendix C: z_t ~ N(wz z_{t-1}, sz), y_t ~ N(wy y_{t-1} + wyz z_t, sy), x_t ~ N(wx y_t, sx).

TEMPORAL = [
    {"wz": 0.9, "sz": 0.3, "wy": 0.7, "wyz": 0.8, "sy": 0.2, "wx": 1.5, "sx": 0.5},
    {"wz": -0.5, "sz": 2.0, "wy": 0.95, "wyz": -1.2, "sy": 0.4, "wx": 0.3, "sx": 0.1},
]


def temporal_ladder(wz, sz, wy, wyz, sy, wx, sx):
    """The updates of appendix C at one time step, with the past's means as inputs that stay: (x, m_y, m_z before).

    Level y: e = (m_y, x, past m_y, past m_z), d = (m_y, m_z, 0, 0). Level z: m_z.
    """
    vy, vz = 1 / (wx**2 / sx + 1 / sy), 1 / (wyz**2 / sy + 1 / sz)
    model = linear_ladder(3, (4, 1), 2)
    y, z = model.encoder
    fill(y.map, [[vy * wx / sx, vy * wy / sy, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    fill(y.feedback, [[0, vy * wyz / sy, 0, 0], *[[0] * 4] * 3])
    fill(z.map, [[vz * wyz / sy, 0, -vz * wyz * wy / sy, vz * wz / sz]])
    down = model.gates["0"]
    fill(down.top.map, [[vy * wyz / sy], [1], [0], [0]])
    fill(down.lateral.map, [[0, vy * wx / sx, vy * wy / sy, 0], *[[0] * 4] * 3])
    fill(model.readout.map, [[1, 0, 0, 0], [0, 1, 0, 0]])
    return model


def cost(means, variances, past, x, wz, sz, wy, wyz, sy, wx, sx):
    """C_VB at time t of q(y_t) q(z_t), the past's q kept fixed, less what does not depend on q: nats."""
    (my, mz), (vy, vz) = means, variances
    (py, pz), (qy, qz) = past
    seen = ((x - wx * my) ** 2 + wx**2 * vy) / (2 * sx)
    middle = ((my - wy * py - wyz * mz) ** 2 + vy + wy**2 * qy + wyz**2 * vz) / (2 * sy)
    top = ((mz - wz * pz) ** 2 + vz + wz**2 * qz) / (2 * sz)
    return seen + middle + top - (vy.log() + vz.log()) / 2


@pytest.mark.parametrize("p", TEMPORAL)
def test_appendix_c_minimises_its_variational_cost_at_every_time_step(p):
    """The minimum is found from the cost alone: Newton's method on its automatic derivatives."""
    generator = torch.Generator().manual_seed(0)
    model = temporal_ladder(**p)
    past = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    for x in torch.randn(4, generator=generator, dtype=torch.float64) * 2:
        q = torch.zeros(4, dtype=torch.float64)  # means, logarithms of variances

        def of(q, x=x, past=past):
            return cost(q[:2], q[2:].exp(), past, x, **p)

        while (gradient := torch.func.grad(of)(q)).abs().max() > 1e-11:
            q = q - torch.linalg.solve(torch.func.hessian(of)(q), gradient)
        assert torch.linalg.eigvalsh(torch.func.hessian(of)(q)).min() > 0
        found = converged(model, torch.cat((x.reshape(1), past[0])).unsqueeze(0))[0]
        torch.testing.assert_close(found, q[:2], rtol=1e-9, atol=1e-9)
        past = (q[:2], q[2:].exp())


# The example


@pytest.fixture(scope="module")
def example():
    return load(Path(__file__).parents[2] / "docs" / "examples" / "linear_gaussian.py")


def test_the_examples_answer_is_that_of_conditioning(example):
    _, seen, s = (t.double() for t in example.draw(50, torch.Generator().manual_seed(1)))
    var = example.WX**2 * (example.WY**2 + example.SY) + example.SX
    torch.testing.assert_close(example.exact(seen, s), var / (var + s) * seen)


def test_an_rladder_is_trained_to_the_answer(example):
    """A part of the example's training: E[x | x~] is near, and nearer after more iterations."""
    distances = example.distances(example.train(steps=200, batch=64), 2000)
    assert distances[-1] < 0.03
    assert distances[-1] < distances[0]

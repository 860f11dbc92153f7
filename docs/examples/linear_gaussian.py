"""A recurrent Ladder learns the inference of a small hierarchical model, from denoising alone.

The model of Prémont-Schwarz et al. 2017, appendix B:

    z ~ N(0, 1),  y ~ N(1.4 z, 0.6),  x ~ N(-0.8 y, 0.4),  seen is x~ ~ N(x, s)        (second numbers are variances)

with an s that differs from sample to sample and is given to the network. It sees (x~, log s) again and again and puts
out a guess of the clean x after each iteration; the cost is the squared error. Nobody shows it y, z or the model. The
best possible guess is E[x | x~], which linear algebra knows; the distance to it is what is printed. Takes less than a
minute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladderfast.models import RLadder

WY, SY, WX, SX = 1.4, 0.6, -0.8, 0.4
ITERATIONS = 5
LEVELS = [
    {"encoder": "lstm", "channels": 16, "decoder": "g1", "gate_norm": "none"},
    {"encoder": "lstm", "channels": 16, "decoder": "g1", "gate_norm": "none"},
    {"encoder": "lstm", "channels": 16},
]


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clean x, corrupted x~ and the variance s of the corruption, each (count, 1)."""
    z, y, x, noise = torch.randn(4, count, 1, generator=generator)
    y = WY * z + SY**0.5 * y
    x = WX * y + SX**0.5 * x
    s = torch.exp(torch.rand(count, 1, generator=generator) * 4.6 - 2.3)  # from 0.1 to 10
    return x, x + s.sqrt() * noise, s


def exact(seen: Tensor, s: Tensor) -> Tensor:
    """E[x | x~]: the posterior precision of (x, y, z) is tridiagonal; solve it for every sample."""
    s = s.double().squeeze(1)
    precision = torch.zeros(len(s), 3, 3, dtype=torch.float64)
    precision[:, 0, 0] = 1 / s + 1 / SX
    precision[:, 0, 1] = precision[:, 1, 0] = -WX / SX
    precision[:, 1, 1] = WX**2 / SX + 1 / SY
    precision[:, 1, 2] = precision[:, 2, 1] = -WY / SY
    precision[:, 2, 2] = WY**2 / SY + 1
    evidence = torch.zeros(len(s), 3, 1, dtype=torch.float64)
    evidence[:, 0, 0] = seen.double().squeeze(1) / s
    return torch.linalg.solve(precision, evidence)[:, 0].to(seen.dtype)


def guesses(model: RLadder, seen: Tensor, s: Tensor) -> Tensor:
    """(count, iterations, 1)"""
    x = torch.cat((seen, s.log()), 1).unsqueeze(1).expand(-1, ITERATIONS, -1)
    return model(x)[0].prediction


def train(steps: int = 1500, batch: int = 256, seed: int = 1) -> RLadder:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = RLadder([2], LEVELS, out_channels=1, norm="none")
    adam = torch.optim.Adam(model.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, steps)
    for _ in range(steps):
        x, seen, s = draw(batch, generator)
        adam.zero_grad()
        (guesses(model, seen, s) - x.unsqueeze(1)).square().mean().backward()
        adam.step()
        schedule.step()
    return model


@torch.no_grad()
def distances(model: RLadder, count: int = 20000) -> list[float]:
    """Mean square of guess - E[x | x~] after each iteration, as a part of the variance of E[x | x~]."""
    _, seen, s = draw(count, torch.Generator().manual_seed(0))
    best = exact(seen, s)
    apart = (guesses(model, seen, s) - best.unsqueeze(1)).square().mean((0, 2))
    return (apart / best.var()).tolist()


@torch.no_grad()
def costs(model: RLadder, count: int = 20000) -> dict[str, float]:
    """The squared error of several ways to guess x."""
    x, seen, s = draw(count, torch.Generator().manual_seed(0))
    ways = {"x~ itself": seen, "the network": guesses(model, seen, s)[:, -1], "E[x | x~]": exact(seen, s)}
    return {name: float((guess - x).square().mean()) for name, guess in ways.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    network = train()
    for name, cost in costs(network).items():
        print(f"squared error of {name}: {cost:.4f}")
    for iteration, part in enumerate(distances(network), 1):
        print(f"distance to E[x | x~] after iteration {iteration}: {100 * part:.2f} % of its variance")

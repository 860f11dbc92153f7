"""Do the true masks help a Tagger? Whether there is anything for its groups to find, at a width and in a time.

Three networks of the same size learn to denoise the same images: with one group; with a group for each part of an
image (digit and background; of Freq20-style images two digits and background), whose first masks are drawn as usual;
and with as many, whose first masks are the true ones, 0.9 for the owner of a pixel, in training and in the test. Where
the last has the lowest cost, groups that follow the parts are worth finding. Where it has not, a network of that size
has a better use for its groups, and will not find the parts from random masks.

    python docs/examples/true_masks.py mnist --textured           # some minutes each
    python docs/examples/true_masks.py mnist --layers 800 400

Prints cost (nats an image) and AMI by iteration. Training and test images are the first 9000 and the last 1000 test
images of the data, whose owners are known.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ladderfast.data import FrequencyMNIST, TexturedMNIST
from ladderfast.models import Tagger
from ladderfast.training.memory import keep_memory
from ladderfast.training.mutual_information import adjusted_mutual_information

ITERATIONS, BATCH, HELD_OUT = 3, 100, 1000


def true_masks(owner: Tensor, groups: int) -> Tensor:
    """(N, groups, D) of owners (N, D) from 1 on; 0, a pixel without one, gives all groups the same."""
    rest = 0.1 / (groups - 1)
    mask = torch.full((len(owner), groups, owner.shape[1]), rest)
    mask.scatter_(1, (owner.long() - 1).clamp(min=0).unsqueeze(1), 0.9)
    return torch.where((owner == 0).unsqueeze(1), 1 / groups, mask)


def train(
    x: Tensor, owner: Tensor, *, groups: int, told: bool, layers: list[int], steps: int, rate: float = 0.001
) -> Tagger:
    """A Tagger of x (N, D), trained by Adam, whose rate falls to 0 over the last 40 % of the steps."""
    torch.manual_seed(1)
    net = Tagger(x.shape[1], layers, binary=False, noise=0.2, variance_start=0.05)
    adam = torch.optim.Adam(net.parameters())
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * min(1.0, (steps - step) / (0.4 * steps))
        chosen = torch.randint(len(x), (BATCH,))
        mask = true_masks(owner[chosen], groups) if told else None
        adam.zero_grad()
        net(x[chosen], groups, ITERATIONS, mask=mask).cost.mean(1).sum().backward()
        adam.step()
    return net


@torch.no_grad()
def measure(net: Tagger, x: Tensor, owner: Tensor, *, groups: int, told: bool) -> tuple[Tensor, Tensor]:
    """Cost in nats an image, and AMI, of each iteration."""
    net.eval()
    generator = torch.Generator().manual_seed(1)
    cost = torch.zeros(ITERATIONS, dtype=torch.float64)
    ami = torch.zeros_like(cost)
    for images, owners in zip(x.split(BATCH), owner.split(BATCH), strict=True):
        mask = true_masks(owners, groups) if told else None
        out = net(images, groups, ITERATIONS, mask=mask, generator=generator)
        cost += out.cost.double().sum(1)
        ami += torch.stack([adjusted_mutual_information(owners, m.argmax(1)).sum() for m in out.m])
    return cost / len(x), ami / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", help="folder of MNIST's four files")
    parser.add_argument("--textured", action="store_true", help="textured digits; without: Freq20-style ones")
    parser.add_argument("--textures", help="folder of textures; without: generated ones")
    parser.add_argument("--layers", type=int, nargs="+", default=[800, 400])
    parser.add_argument("--steps", type=int, default=3000)
    chosen = parser.parse_args()
    keep_memory()
    if chosen.textured:
        data = TexturedMNIST(chosen.data_dir, chosen.textures, num_train=1)
    else:
        data = FrequencyMNIST(chosen.data_dir, num_train=1)
    x, owner = data.x_test.float(), data.owner_test
    parts = int(owner.max())
    for name, groups, told in (("one group", 1, False), ("drawn", parts, False), ("true", parts, True)):
        net = train(
            x[:-HELD_OUT],
            owner[:-HELD_OUT],
            groups=groups,
            told=told,
            layers=chosen.layers,
            steps=chosen.steps,
        )
        cost, ami = measure(net, x[-HELD_OUT:], owner[-HELD_OUT:], groups=groups, told=told)
        print(
            f"{name:10} cost {' '.join(f'{value:6.0f}' for value in cost)}   "
            f"AMI {' '.join(f'{value:6.3f}' for value in ami)}",
            flush=True,
        )


if __name__ == "__main__":
    main()

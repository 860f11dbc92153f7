"""The processes that train together, on Lightning Fabric: what they have in common, and what each has of its own."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .recipe import Recipe

try:
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.rank_zero import rank_zero_only
except ImportError:  # the large package holds the same under another name
    from lightning.fabric import Fabric  # type: ignore[no-redef]
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # type: ignore[no-redef]


def make_fabric(recipe: Recipe) -> Fabric:
    """The Fabric that a recipe asks for. Raises ValueError where it cannot be had."""
    try:
        return Fabric(
            accelerator=recipe.accelerator,
            strategy=recipe.strategy,
            devices=recipe.devices,
            num_nodes=recipe.num_nodes,
            precision=recipe.precision,  # type: ignore[arg-type]  # Fabric lists the names and checks them itself
        )
    except Exception as error:  # each of its checks raises a class of its own
        wanted = ", ".join(
            f"{n}={getattr(recipe, n)!r}" for n in ("accelerator", "devices", "strategy", "precision")
        )
        raise ValueError(f"{wanted} cannot be had: {' '.join(str(error).split())}") from error


def is_first() -> bool:
    """Whether this process is the first, as far as is known before Fabric has started the others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def reduce(fabric: Fabric, x: Tensor, how: str) -> Tensor:
    """The "mean" or "sum" over all processes."""
    return cast("Tensor", fabric.all_reduce(x, reduce_op=how))


def in_any(fabric: Fabric, value: bool) -> bool:
    """Whether it is so in any of the processes."""
    if fabric.world_size == 1:
        return value
    return bool(reduce(fabric, torch.tensor(float(value), device=fabric.device), "sum") > 0)


def gather(fabric: Fabric, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every process's tensors, of equal shapes, on the CPU."""
    if fabric.world_size == 1:
        return [state]
    world = range(fabric.world_size)
    gathered: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        own = tensor.to(fabric.device)
        gathered[name] = [torch.empty_like(own) for _ in world]
        torch.distributed.all_gather(gathered[name], own)
    return [{name: tensors[rank].cpu() for name, tensors in gathered.items()} for rank in world]


def own_noise(fabric: Fabric, model: nn.Module) -> None:
    """Give this process noise of its own: a buffer called noise_state holds a seed, which all have alike so far."""
    if fabric.global_rank:
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] == "noise_state":
                buffer[0] += fabric.global_rank

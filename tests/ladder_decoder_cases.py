"""Inputs of the Ladder decoder for the tests of its GPU kernels, and the yardstick of their results.

Tensors have the layout of the kernels: u (seeds, rows, channels, inner), params (seeds, 10, channels), mean (seeds,
channels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ladderfast.reference.ladder_decoder import ladder_decoder
from ladderfast.reference.ladder_encoder import moments

HALF = (torch.bfloat16, torch.float16)
Sizes = tuple[int, int, int, int]
Results = dict[str, Tensor]


@dataclass
class Case:
    u: Tensor
    z: Tensor
    params: Tensor
    clean_z: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    grad_z_hat: Tensor | None
    grad_cost: Tensor | None
    squash: bool = False
    eps: float = 1e-10

    @classmethod
    def draw(
        cls,
        shape: Sizes,
        dtype: torch.dtype = torch.float32,
        params_dtype: torch.dtype | None = None,
        mode: str = "cost",
        squash: bool = False,
    ) -> Case:
        wide = torch.float32 if dtype in HALF else dtype
        seeds, _, channels, _ = shape
        clean, u, z, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
        params = torch.randn(seeds, 10, channels, dtype=torch.float64)
        mean = torch.randn(seeds, channels, dtype=torch.float64)
        var = torch.rand(seeds, channels, dtype=torch.float64) + 0.5
        # Of the size that makes both ways into z_hat count.
        grad_cost = torch.rand(seeds, dtype=torch.float64) * shape[1] * channels * shape[3]
        return cls(
            u=(2 * u + 3).to(dtype),
            z=(2 * z).to(dtype),
            params=params.to(params_dtype or dtype),
            clean_z=None if mode == "no-cost" else clean.to(dtype),
            mean=mean.to(wide) if mode == "cost" else None,
            var=var.to(wide) if mode == "cost" else None,
            grad_z_hat=grad.to(dtype),
            grad_cost=None if mode == "no-cost" else grad_cost.to(wide),
            squash=squash,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        return replace(self, **{name: function(t) for name, t in self.tensors.items()})


def reference(case: Case, dtype: torch.dtype) -> Results:
    """The op and its gradients by autograd in `dtype`, seed by seed."""
    case = case.map(lambda t: t.to(dtype))
    seeds: list[Results] = []
    for s in range(len(case.u)):
        names = [n for n in ("u", "z", "clean_z", "params", "mean", "var") if n in case.tensors]
        leaves = {n: case.tensors[n][s].detach().requires_grad_() for n in names}
        z_hat, cost = ladder_decoder(**leaves, squash_v=case.squash, eps=case.eps)
        mean, var = moments(leaves["u"].detach())
        results = {"z_hat": z_hat.detach(), "u_mean": mean, "u_var": var}
        total = z_hat.new_zeros(())
        if case.grad_z_hat is not None:
            total = total + (z_hat * case.grad_z_hat[s]).sum()
        if cost is not None:
            results["cost"] = cost.detach()
            if case.grad_cost is not None:
                total = total + cost * case.grad_cost[s]
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        seeds.append(results | {f"grad_{n}": g for n, g in zip(names, grads, strict=True)})
    return {n: torch.stack([r[n] for r in seeds]) for n in seeds[0]}


def magnitudes(case: Case) -> Results:
    """The formulas on absolute values with every minus turned into a plus: sizes of their terms."""
    case = case.map(lambda t: t.double())
    n = case.u[0, :, 0].numel()
    mean_u = case.u.mean((1, 3))
    var_u = case.u.var((1, 3), correction=0)
    rstd_u = (var_u + case.eps).rsqrt()[:, None, :, None]
    case = case.map(Tensor.abs)
    wide_mean = mean_u.abs()[:, None, :, None]
    v = ((case.u + wide_mean) * rstd_u).requires_grad_()
    z, params = case.z.clone().requires_grad_(), case.params.clone().requires_grad_()
    a = [row[:, None, :, None] for row in params.unbind(1)]
    mu = a[0] * torch.sigmoid(a[1] * v + a[2]) + a[3] * v + a[4]
    w = a[5] * torch.sigmoid(a[6] * v + a[7]) + a[8] * v + a[9]
    z_hat = (z + mu) * (torch.sigmoid(w) if case.squash else w) + mu
    sizes = {"z_hat": z_hat.detach(), "u_mean": mean_u.abs() + var_u.sqrt(), "u_var": var_u}
    sizes |= {"grad_mean": torch.zeros(()), "grad_var": torch.zeros(())}
    grad = torch.zeros_like(z_hat) if case.grad_z_hat is None else case.grad_z_hat.clone()
    if case.clean_z is not None:
        rstd = torch.ones_like(rstd_u)
        normal = z_hat.detach()
        if case.mean is not None and case.var is not None:
            rstd = (case.var + case.eps).rsqrt()[:, None, :, None]
            normal = (normal + case.mean[:, None, :, None]) * rstd
        error = case.clean_z + normal
        sizes["cost"] = error.square().mean((1, 2, 3))
        if case.grad_cost is not None:
            error = error * (2 * case.grad_cost / z_hat[0].numel())[:, None, None, None]
            grad = grad + error * rstd
            sizes["grad_clean_z"] = error
            sizes["grad_mean"] = (error * rstd).sum((1, 3))
            sizes["grad_var"] = (error * normal * rstd**2).sum((1, 3)) / 2
    grad_z, grad_v, sizes["grad_params"] = torch.autograd.grad(z_hat, (z, v, params), grad)
    sizes["grad_z"] = grad_z
    v = v.detach()
    means = [t.sum((1, 3), keepdim=True) / n for t in (grad_v, grad_v * v)]
    sizes["grad_u"] = rstd_u * (grad_v + means[0] + v * means[1])
    return sizes


def check(actual: Results, case: Case) -> None:
    """Error at most twice that of plain PyTorch in the type of computation, and one rounding to the type of storage.

    The yardsticks are those of test_combinator_cuda.py: as plain arithmetic may be right by luck, one rounding of the
    largest term is allowed as well (four in float64, whose yardstick is rounded itself), and twice all that where the
    16-bit grade of the sigmoid computes.
    """
    half = case.u.dtype in HALF
    compute = torch.float64 if case.u.dtype == torch.float64 else torch.float32
    exact, plain, terms = reference(case, torch.float64), reference(case, compute), magnitudes(case)
    for name, out in actual.items():
        assert out.shape == exact[name].shape, name
        if out.numel() == 0:
            continue
        roundings = 4 if compute == torch.float64 else 1
        allowed = 2 * (plain[name].double() - exact[name]).abs().max()
        allowed = allowed + roundings * torch.finfo(compute).eps * terms[name].max()
        error = (out.double() - exact[name]).abs()
        if half and out.dtype != torch.float32:
            # Near the middle between two values of the storage type the other one may be taken.
            error = error - (exact[name].to(out.dtype).double() - exact[name]).abs()
        allowed = 4 * allowed if half else allowed
        assert error.max() <= allowed, f"{name}: error {error.max():.3g}, allowed {allowed:.3g}"

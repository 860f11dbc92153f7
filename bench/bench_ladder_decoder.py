"""ladder_decoder: forward, backward and both, beside the plain formula and torch.compile of it.

Bytes: forward reads u, z and clean_z and writes z_hat, and reads u once more for its statistics; backward reads the
gradient, u, z and clean_z and writes three gradients, and then reads u and reads and writes its gradient. Parameters
and statistics are too small to count.
"""

from __future__ import annotations

import pytest
import torch
from measuring import DEVICES, bytes_kept, compiled, record, time_it
from torch.nn import functional as F

import ladderfast
from ladderfast.ops import backend, ladder_decoder
from ladderfast.reference.combinator import gaussian_combinator

SHAPES = {
    "cpu": [(100, 1000), (4096, 1000), (100, 32, 28, 28)],
    "cuda": [(100, 1000), (16384, 1024), (64, 96, 64, 64)],
}
CASES = [
    pytest.param(
        device, shape, dtype, id=f"{device}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}", marks=marks
    )
    for device, marks in (("cpu", []), ("cuda", DEVICES[1].marks))
    for shape in SHAPES[device]
    for dtype in ([torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16])
]
VARIANTS = ["ladderfast", "ladderfast-triton", "plain", "compile"]
PHASES = {"forward": 5, "backward": 10, "both": 15}  # elements moved for each element of u


def plain(u, z, params, clean_z, mean, var):
    """What a user would write."""
    u = F.batch_norm(u, None, None, training=True, eps=1e-10)
    z_hat = gaussian_combinator(z, u, params)
    ones = [1] * (u.dim() - 2)
    normal = (z_hat - mean.reshape(-1, *ones)) * torch.rsqrt(var.reshape(-1, *ones) + 1e-10)
    return z_hat, F.mse_loss(normal, clean_z.to(normal.dtype))


def function_of(variant: str):
    if variant == "compile":
        return compiled(plain)
    return plain if variant == "plain" else ladder_decoder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype"), CASES)
def bench_ladder_decoder(benchmark, device, shape, dtype, phase, variant):
    if variant == "ladderfast-triton" and (reason := backend.unavailable("triton", device, dtype)):
        pytest.skip(reason)
    torch.manual_seed(0)
    u, z, clean_z, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    params = torch.randn(10, shape[1], device=device)
    mean, var = torch.randn(shape[1], device=device), torch.rand(shape[1], device=device) + 0.5
    inputs = [t.requires_grad_() for t in (u, z, params, clean_z, mean, var)]
    grads = [grad, torch.ones((), device=device)]
    function = function_of(variant)

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        return torch.autograd.grad(function(*inputs), inputs, grads)

    with ladderfast.use_backend("triton" if variant == "ladderfast-triton" else None):
        out = function(*inputs)

        def backward():
            return torch.autograd.grad(out, inputs, grads, retain_graph=True)

        record(
            benchmark,
            op="ladder_decoder",
            shape=f"{shape} {str(dtype)[6:]}",
            phase=phase,
            variant=variant,
            device=device,
            moved=PHASES[phase] * u.numel() * u.element_size(),
            kept=bytes_kept(function, inputs),
        )
        run = {"forward": forward, "backward": backward, "both": both}[phase]
        time_it(benchmark, run)

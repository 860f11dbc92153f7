"""ladder_encoder: forward, backward and both, beside what a user would write and torch.compile of that.

The yardsticks take their noise from torch.randn_like, the fastest that plain PyTorch has. Bytes: forward reads z_pre
and writes z and h (the second reading, for the statistics, is the kernel's own affair); backward reads the gradients of
z and h and z_pre and writes one gradient; what is kept for each channel is too small to count.
"""

from __future__ import annotations

import pytest
import torch
from measuring import DEVICES, bytes_kept, compiled, record, time_it

import ladderfast
from ladderfast.ops import backend, ladder_encoder

# shape, rows of the labelled part and of the clean part
SHAPES = {
    "cpu": [((300, 1000), 100, 100), ((8192, 1000), 4096, 0), ((100, 32, 28, 28), 50, 0)],
    "cuda": [((300, 1000), 100, 100), ((16384, 1024), 8192, 0), ((128, 96, 32, 32), 64, 0)],
}
CASES = [
    pytest.param(
        device,
        *case,
        dtype,
        id=f"{device}-{'x'.join(map(str, case[0]))}-{str(dtype)[6:]}",
        marks=marks,
    )
    for device, marks in (("cpu", []), ("cuda", DEVICES[1].marks))
    for case in SHAPES[device]
    for dtype in ([torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16])
]
VARIANTS = ["ladderfast", "ladderfast-triton", "plain", "compile"]
PHASES = {"forward": 3, "backward": 4, "both": 7}  # elements moved for each element of z_pre
STD = 0.3


def plain(z_pre, beta, num_labelled, num_clean):
    """A Ladder layer in plain PyTorch, with ReLU."""
    axes, shape = [0, *range(2, z_pre.dim())], (-1, *[1] * (z_pre.dim() - 2))
    sizes = [num_labelled, len(z_pre) - num_labelled - num_clean, *[num_clean] * (num_clean > 0)]
    parts = []
    for part in z_pre.split(sizes):
        var, mean = torch.var_mean(part, axes, correction=0, keepdim=True)
        parts.append((part - mean) * torch.rsqrt(var + 1e-10))
    noisy = torch.cat(parts[:2])
    noisy = noisy + STD * torch.randn_like(noisy)
    z = torch.cat([noisy, parts[2]]) if num_clean else noisy
    return z, torch.relu(z + beta.reshape(shape))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "num_labelled", "num_clean", "dtype"), CASES)
def bench_ladder_encoder(benchmark, device, shape, num_labelled, num_clean, dtype, phase, variant):
    if variant == "ladderfast-triton" and (reason := backend.unavailable("triton", device, dtype)):
        pytest.skip(reason)
    with ladderfast.use_backend("triton" if variant == "ladderfast-triton" else None):
        measure_layer(benchmark, device, shape, num_labelled, num_clean, dtype, phase, variant)


def measure_layer(benchmark, device, shape, num_labelled, num_clean, dtype, phase, variant):
    torch.manual_seed(0)
    z_pre, grad_z, grad_h = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    beta = torch.randn(shape[1], device=device, dtype=dtype)
    inputs = [t.requires_grad_() for t in (z_pre, beta)]
    state = torch.tensor([1, 2], device=device)
    layer = compiled(plain) if variant == "compile" else plain

    def function(z_pre, beta):
        if variant in ("plain", "compile"):
            return layer(z_pre, beta, num_labelled, num_clean)
        return ladder_encoder(
            z_pre,
            num_labelled,
            num_clean=num_clean,
            beta=beta,
            noise_std=STD,
            noise_state=state,
            activation="relu",
        )[:2]

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        return torch.autograd.grad(function(*inputs), inputs, (grad_z, grad_h))

    out = function(*inputs)

    def backward():
        return torch.autograd.grad(out, inputs, (grad_z, grad_h), retain_graph=True)

    record(
        benchmark,
        op="ladder_encoder",
        shape=f"{shape} {str(dtype)[6:]}",
        phase=phase,
        variant=variant,
        device=device,
        moved=PHASES[phase] * z_pre.numel() * z_pre.element_size(),
        kept=bytes_kept(function, inputs),
    )
    run = {"forward": forward, "backward": backward, "both": both}[phase]
    time_it(benchmark, run)

"""gaussian_combinator: forward, backward and both, beside the plain formula and torch.compile of it.

The yardsticks compute ladderfast.reference.combinator in the same run. Bytes: forward reads z and u and writes z_hat;
backward reads grad, z and u and writes two gradients; the parameters are too small to count.
"""

from __future__ import annotations

import pytest
import torch
from measuring import DEVICES, bytes_kept, compiled, record, time_it

import ladderfast
from ladderfast.ops import backend, gaussian_combinator
from ladderfast.reference import combinator as reference

SHAPES = {
    "cpu": [(4096, 1000), (200, 1000), (32, 96, 32, 32)],
    "cuda": [(16384, 1024), (64, 96, 64, 64), (65536, 1000)],
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
PHASES = {"forward": 3, "backward": 5, "both": 8}  # elements moved for each element of z


def function_of(variant: str):
    if variant == "compile":
        return compiled(reference.gaussian_combinator)
    return reference.gaussian_combinator if variant == "plain" else gaussian_combinator


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype"), CASES)
def bench_combinator(benchmark, device, shape, dtype, phase, variant):
    if variant == "ladderfast-triton" and (reason := backend.unavailable("triton", device, dtype)):
        pytest.skip(reason)
    torch.manual_seed(0)
    z, u, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    params = torch.randn(10, shape[1], device=device)
    inputs = [t.requires_grad_() for t in (z, u, params)]
    function = function_of(variant)

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        return torch.autograd.grad(function(*inputs), inputs, grad)

    with ladderfast.use_backend("triton" if variant == "ladderfast-triton" else None):
        out = function(*inputs)

        def backward():
            return torch.autograd.grad(out, inputs, grad, retain_graph=True)

        record(
            benchmark,
            op="gaussian_combinator",
            shape=f"{shape} {str(dtype)[6:]}",
            phase=phase,
            variant=variant,
            device=device,
            moved=PHASES[phase] * z.numel() * z.element_size(),
            kept=bytes_kept(function, inputs),
        )
        run = {"forward": forward, "backward": backward, "both": both}[phase]
        time_it(benchmark, run)

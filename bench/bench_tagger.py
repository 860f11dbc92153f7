"""Tagger's group inputs and mixture costs: forward, backward and both, beside the reference and torch.compile of it.

The yardsticks compute ladderfast.reference.tagger in the same run. Bytes, in elements for each of z: forward reads z
and m, and the inputs write two of the size; backward reads z, m and two such gradients (the cost has a smaller one),
and writes two. What has the size of x counts as 1 / K.
"""

from __future__ import annotations

import pytest
import torch
from measuring import DEVICES, bytes_kept, compiled, record, time_it

import ladderfast
from ladderfast import ops
from ladderfast.ops import backend
from ladderfast.reference import tagger as reference

NAMES = ["gaussian_group_inputs", "bernoulli_group_inputs", "gaussian_mixture_nll", "bernoulli_mixture_nll"]
SHAPES = {"cpu": [(100, 4, 784), (100, 4, 400)], "cuda": [(16384, 4, 784), (8192, 3, 4096)]}
CASES = [
    pytest.param(
        device, shape, dtype, id=f"{device}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}", marks=marks
    )
    for device, marks in (("cpu", []), ("cuda", DEVICES[1].marks))
    for shape in SHAPES[device]
    for dtype in ([torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16])
]
VARIANTS = ["ladderfast", "ladderfast-triton", "plain", "compile"]
PHASES = ["forward", "backward", "both"]


def elements_moved(name: str, shape: tuple[int, int, int], phase: str) -> int:
    large, small = shape[0] * shape[1] * shape[2], shape[0] * shape[2]
    forward = 4 * large + small if "inputs" in name else 2 * large + 2 * small
    backward = 6 * large + 2 * small if "inputs" in name else 4 * large + 3 * small
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def function_of(name: str, variant: str):
    if variant == "compile":
        return compiled(getattr(reference, name))
    return getattr(reference if variant == "plain" else ops, name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype"), CASES)
@pytest.mark.parametrize("name", NAMES)
def bench_tagger(benchmark, name, device, shape, dtype, phase, variant):
    if variant == "ladderfast-triton" and (reason := backend.unavailable("triton", device, dtype)):
        pytest.skip(reason)
    torch.manual_seed(0)
    n, _, d = shape
    z = torch.rand(shape, device=device).to(dtype)
    m = torch.softmax(torch.randn(shape, device=device), 1).to(dtype)
    x = torch.randint(2, (n, d), device=device).to(dtype)
    # What a network trains: reconstructions and masks, and the variance where there is one. x is data.
    trained = [z.requires_grad_(), m.requires_grad_()]
    inputs = [x, *trained]
    if name.startswith("gaussian"):
        trained.append(torch.tensor(0.3, device=device, requires_grad=True))
        inputs.append(trained[-1])
    elif name == "bernoulli_group_inputs":
        inputs.append(torch.tensor(0.2, device=device))
    function = function_of(name, variant)

    def forward():
        with torch.no_grad():
            return function(*inputs)

    with ladderfast.use_backend("triton" if variant == "ladderfast-triton" else None):
        out = function(*inputs)
        grads = [torch.randn_like(t) for t in (out if isinstance(out, tuple) else (out,))]

        def backward():
            return torch.autograd.grad(out, trained, grads, retain_graph=True)

        def both():
            return torch.autograd.grad(function(*inputs), trained, grads)

        record(
            benchmark,
            op=name,
            shape=f"{shape} {str(dtype)[6:]}",
            phase=phase,
            variant=variant,
            device=device,
            moved=elements_moved(name, shape, phase) * z.element_size(),
            kept=bytes_kept(function, inputs),
        )
        run = {"forward": forward, "backward": backward, "both": both}[phase]
        time_it(benchmark, run)

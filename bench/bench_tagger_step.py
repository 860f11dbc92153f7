"""The ops around the network of a Tagger iteration, one before it and one after it: forward, backward and both, beside
the reference and torch.compile of it.

The yardsticks compute ladderfast.reference.tagger_step in the same run. Bytes, in elements for each of z: the inputs
read two and write four forward, read six and write two backward; the outputs read two and write two, and read four and
write two. What has the size of x counts as 1 / K. A whole training step is in bench_tagger_training_step.py.
"""

from __future__ import annotations

import pytest
import torch
from bench_tagger import CASES, PHASES, VARIANTS
from measuring import bytes_kept, compiled, record, time_it

import ladderfast
from ladderfast import ops
from ladderfast.ops import backend
from ladderfast.reference import tagger_step as reference

NAMES = [f"{kind}_step_{what}" for what in ("inputs", "outputs") for kind in ("gaussian", "bernoulli")]


def elements_moved(name: str, shape: tuple[int, int, int], phase: str) -> int:
    large, small = shape[0] * shape[1] * shape[2], shape[0] * shape[2]
    if "inputs" in name:
        forward, backward = 6 * large + small, 8 * large + 2 * small
    else:
        forward, backward = 4 * large + 2 * small, 6 * large + 3 * small
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def function_of(name: str, variant: str):
    function = getattr(reference if variant in ("plain", "compile") else ops, name)
    return compiled(function) if variant == "compile" else function


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype"), CASES)
@pytest.mark.parametrize("name", NAMES)
def bench_tagger_step(benchmark, name, device, shape, dtype, phase, variant):
    if variant == "ladderfast-triton" and (reason := backend.unavailable("triton", device, dtype)):
        pytest.skip(reason)
    torch.manual_seed(0)
    n, _, d = shape
    gaussian = name.startswith("gaussian")
    # What a network trains: reconstructions, masks, parameters. x is data.
    x = torch.randint(2, (n, d), device=device).to(dtype)
    trained = [torch.rand(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype)]
    if "outputs" in name:
        trained += [torch.ones(d, device=device, dtype=dtype), torch.zeros(d, device=device, dtype=dtype)]
        trained.append(torch.ones((), device=device, dtype=dtype))
    if gaussian:
        trained.append(torch.tensor(0.3, device=device, dtype=dtype))
    for t in trained:
        t.requires_grad_()
    inputs = [x, *trained]
    if name == "bernoulli_step_inputs":
        inputs.append(torch.tensor(0.2, device=device, dtype=dtype))
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
            moved=elements_moved(name, shape, phase) * x.element_size(),
            kept=bytes_kept(function, inputs),
        )
        run = {"forward": forward, "backward": backward, "both": both}[phase]
        time_it(benchmark, run)

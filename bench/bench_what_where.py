"""Pooling that keeps the where and its unpooling, soft and hard: forward, backward and both, beside the plain formula
and torch.compile of it.

The yardsticks of the soft ops compute ladderfast.reference.what_where in the same run, those of the hard ones are
torch's max_pool2d and max_unpool2d. Bytes, with P the tensor before pooling: soft pooling reads P and writes what and
where forward, reads P and both gradients and writes the gradient of P backward; soft unpooling reads what and where and
writes P forward, and reads P, what and where and writes two gradients backward (of large windows it skips most of P).
Hard, with where in bytes: pooling reads P and writes what and where, and the other way back; unpooling reads what and
where and writes P, and the other way back.
"""

from __future__ import annotations

import pytest
import torch
from measuring import DEVICES, bytes_kept, compiled, record, time_it
from torch.nn import functional

import ladderfast
from ladderfast.ops import backend, soft_pool2d, soft_unpool2d, where_max_pool2d, where_max_unpool2d
from ladderfast.reference import what_where as reference

BETA = 100.0
SHAPES = {"cpu": [(32, 64, 32, 32)], "cuda": [(128, 128, 64, 64)]}
WINDOWS = [2, 4, 16]
CASES = [
    pytest.param(
        device, shape, dtype, k, id=f"{device}-{'x'.join(map(str, shape))}-{k}-{str(dtype)[6:]}", marks=marks
    )
    for device, marks in (("cpu", []), ("cuda", DEVICES[1].marks))
    for shape in SHAPES[device]
    for dtype in ([torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16])
    for k in WINDOWS
]
VARIANTS = ["ladderfast", "ladderfast-triton", "plain", "compile"]
PHASES = ["forward", "backward", "both"]


def pool_of(variant: str, k: int):
    function = soft_pool2d if variant.startswith("ladderfast") else reference.soft_pool2d
    return lambda z: function(z, (k, k), BETA)


def unpool_of(variant: str, k: int):
    function = soft_unpool2d if variant.startswith("ladderfast") else reference.soft_unpool2d
    return lambda what, where: function(what, where, (k, k))


def max_pool_of(variant: str, k: int):
    if variant.startswith("ladderfast"):
        return lambda z: where_max_pool2d(z, k)
    return lambda z: functional.max_pool2d(z, k, return_indices=True)


def max_unpool_of(variant: str, z, k: int):
    """To where the largest elements of z are."""
    _, where = max_pool_of(variant, k)(z)
    size = tuple(z.shape[2:])
    if variant.startswith("ladderfast"):
        return lambda what: where_max_unpool2d(what, where, k, size)
    return lambda what: functional.max_unpool2d(what, where, k, output_size=size)


def differentiable(out):
    """out, less what has no gradient."""
    return [t for t in out if t.requires_grad] if isinstance(out, tuple) else out


def bench(benchmark, op, function, inputs, grads, moved, shape, device, dtype, k, phase, variant) -> None:
    if variant == "ladderfast-triton" and (reason := backend.unavailable("triton", device, dtype)):
        pytest.skip(reason)
    if variant == "compile":
        function = compiled(function)

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        return torch.autograd.grad(differentiable(function(*inputs)), inputs, grads)

    with ladderfast.use_backend("triton" if variant == "ladderfast-triton" else None):
        out = differentiable(function(*inputs))

        def backward():
            return torch.autograd.grad(out, inputs, grads, retain_graph=True)

        record(
            benchmark,
            op=op,
            shape=f"{shape} {k} x {k} {str(dtype)[6:]}",
            phase=phase,
            variant=variant,
            device=device,
            moved=moved[phase],
            kept=bytes_kept(function, inputs),
        )
        run = {"forward": forward, "backward": backward, "both": both}[phase]
        time_it(benchmark, run)


def draw(shape, k, device, dtype):
    """A tensor before pooling, what and where."""
    torch.manual_seed(0)
    n, c, height, width = shape
    small = (n, c, height // k, width // k)
    z, what = (torch.randn(s, device=device, dtype=dtype) for s in (shape, small))
    return z, what, torch.rand((n, c, 2, *small[2:]), device=device, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype", "k"), CASES)
def bench_soft_pool2d(benchmark, device, shape, dtype, k, phase, variant):
    z, *grads = draw(shape, k, device, dtype)
    pooled = sum(t.nbytes for t in grads)
    moved = {"forward": z.nbytes + pooled, "backward": 2 * z.nbytes + pooled}
    moved["both"] = sum(moved.values())
    inputs = [z.requires_grad_()]
    function = pool_of(variant, k)
    bench(benchmark, "soft_pool2d", function, inputs, grads, moved, shape, device, dtype, k, phase, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype", "k"), CASES)
def bench_soft_unpool2d(benchmark, device, shape, dtype, k, phase, variant):
    grad, *pooled = draw(shape, k, device, dtype)
    small = sum(t.nbytes for t in pooled)
    moved = {"forward": grad.nbytes + small, "backward": grad.nbytes + 2 * small}
    moved["both"] = sum(moved.values())
    inputs = [t.requires_grad_() for t in pooled]
    function = unpool_of(variant, k)
    bench(benchmark, "soft_unpool2d", function, inputs, grad, moved, shape, device, dtype, k, phase, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype", "k"), CASES)
def bench_where_max_pool2d(benchmark, device, shape, dtype, k, phase, variant):
    z, grad, _ = draw(shape, k, device, dtype)
    moved = dict.fromkeys(("forward", "backward"), z.nbytes + grad.nbytes + grad.numel())
    moved["both"] = sum(moved.values())
    function, inputs = max_pool_of(variant, k), [z.requires_grad_()]
    bench(
        benchmark,
        "where_max_pool2d",
        function,
        inputs,
        [grad],
        moved,
        shape,
        device,
        dtype,
        k,
        phase,
        variant,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape", "dtype", "k"), CASES)
def bench_where_max_unpool2d(benchmark, device, shape, dtype, k, phase, variant):
    grad, what, _ = draw(shape, k, device, dtype)
    moved = dict.fromkeys(("forward", "backward"), grad.nbytes + what.nbytes + what.numel())
    moved["both"] = sum(moved.values())
    function, inputs = max_unpool_of(variant, grad, k), [what.requires_grad_()]
    bench(
        benchmark,
        "where_max_unpool2d",
        function,
        inputs,
        grad,
        moved,
        shape,
        device,
        dtype,
        k,
        phase,
        variant,
    )

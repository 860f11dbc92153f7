"""Shared by all benchmarks: devices, a timer that waits for the GPU, the copy bandwidth, what a result records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ladderfast.training.memory import keep_memory

keep_memory()  # as training does: whether a page fault falls on one variant or the other is not what is measured

GPU = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=[] if GPU else pytest.mark.skip(reason="needs an NVIDIA GPU"))]


def sync_timer() -> float:
    """Seconds, with the GPU's queue empty."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(function: Callable[[], object], rounds: int = 20) -> float:
    """Median seconds of one call."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        start = sync_timer()
        function()
        times.append(sync_timer() - start)
    return statistics.median(times)


def time_it(benchmark, run: Callable[[], object]) -> None:
    """40 rounds, of short cases so many that they take 0.3 s: then a shared machine's bad moment is not the median."""
    benchmark._timer = sync_timer
    rounds = 40 if benchmark.disabled else max(40, min(2000, int(0.3 / measure(run, 5))))
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=5)


_copies: dict[tuple[int, str], float] = {}


def copy_seconds(moved: int, device: str) -> float:
    """Median seconds in which torch copies so many bytes that `moved` bytes are read and written in all."""
    key = (moved, device)
    if key not in _copies:
        source = torch.ones(max(moved // 8, 1), dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        _copies[key] = measure(lambda: target.copy_(source))
    return _copies[key]


_calls: dict[tuple[str, str], float] = {}


def call_seconds(phase: str, device: str) -> float:
    """Median seconds that a pass takes torch where there is next to nothing to compute: the product of two numbers."""
    key = (phase, device)
    if key not in _calls:
        x, y = (torch.ones((), device=device, requires_grad=True) for _ in range(2))
        out = x * y

        def forward():
            with torch.no_grad():
                return x * y

        def backward():
            return torch.autograd.grad(out, (x, y), retain_graph=True)

        def both():
            return torch.autograd.grad(x * y, (x, y))

        _calls[key] = measure({"forward": forward, "backward": backward, "both": both}[phase], 300)
    return _calls[key]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it for the shapes of one case: by itself it is for any shape from the second case on."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that one call holds on the CPU beyond what was there before it, workspaces of kernels included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def bytes_kept(function: Callable[..., object], inputs: Sequence[torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward."""
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function(*inputs)
    del result  # alive until here: memory must not be freed and taken again in between
    return sum(kept.values())


def record(
    benchmark,
    *,
    op: str,
    shape: str,
    phase: str,
    variant: str,
    device: str,
    moved: int,
    kept: int,
    peak: int | None = None,
) -> None:
    """What bench/table.py needs beside the times; `peak` is the memory of a whole pass."""
    benchmark.extra_info.update(
        op=op,
        shape=shape,
        phase=phase,
        variant=variant,
        device=device,
        bytes_moved=moved,
        bytes_kept=kept,
        bytes_peak=peak,
        copy_seconds=copy_seconds(moved, device),
        call_seconds=call_seconds(phase, device),
    )

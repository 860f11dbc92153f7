"""ln_convlstm_step after its convolutions, and a whole LayerNormConvLSTM, beside plain PyTorch and torch.compile of it.

The step's yardsticks compute ladderfast.reference.ln_convlstm in the same run. The sequence's are the same network with
that formula (`plain`), torch.compile of it, and its convolutions alone. Bytes, in numbers for each cell with one input:
forward reads 9 and writes 2; backward reads 11, with a normalised cell 12, and writes 9. Peak memory is that of one
forward and backward pass in a fresh process, above what it held before.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measuring import DEVICES, bytes_kept, compiled, record, sync_timer, time_it
from torch import nn

import ladderfast
from ladderfast.nn import LayerNormConvLSTM, LayerNormLSTM
from ladderfast.ops import backend, ln_convlstm_step
from ladderfast.reference.ln_convlstm import ln_convlstm_step as reference

SHAPES = {  # of the cells
    "cpu": [(16, 32, 32, 32), (16, 64, 16, 16), (64, 512)],
    "cuda": [(64, 64, 64, 64), (256, 64, 32, 32), (1024, 1024)],
}
PHASES = {"forward": 11, "both": 31}  # numbers moved for each cell
NORM_SHAPES = {"cpu": [(16, 32, 32, 32)], "cuda": [(64, 64, 64, 64)]}
VARIANTS = ["ladderfast", "ladderfast-triton", "plain", "compile"]


def devices_of(cases):
    return [
        pytest.param(device, case, id=f"{device}-{'x'.join(map(str, case))}", marks=marks)
        for device, marks in (("cpu", []), ("cuda", DEVICES[1].marks))
        for case in (cases[device] if isinstance(cases, dict) else cases)
    ]


def step(benchmark, device, shape, phase, variant, norm="layer"):
    """norm "cell": layer norm, and a normalised cell."""
    if variant == "ladderfast-triton" and (reason := backend.unavailable("triton", device, torch.float32)):
        pytest.skip(reason)
    torch.manual_seed(0)
    cell = norm == "cell"
    gates = (shape[0], 4 * shape[1], *shape[2:])
    x, rec = (torch.randn(gates, device=device) for _ in range(2))
    c, grad_h, grad_c = (torch.randn(shape, device=device) for _ in range(3))
    vectors = [torch.randn(size, device=device) for size in (gates[1], gates[1], shape[1], shape[1])]
    inputs = [t.requires_grad_() for t in (x, rec, c, *vectors[: 4 if cell else 2])]
    chosen = reference if variant == "plain" else ln_convlstm_step
    if variant == "compile":
        chosen = compiled(reference)

    def function(x, rec, c, weight, bias, cell_weight=None, cell_bias=None):
        options = {"norm": "batch" if norm == "batch" else "layer"}
        return chosen(x, rec, c, weight, bias, cell_weight=cell_weight, cell_bias=cell_bias, **options)[:2]

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        return torch.autograd.grad(function(*inputs), inputs, (grad_h, grad_c))

    with ladderfast.use_backend("triton" if variant == "ladderfast-triton" else None):
        record(
            benchmark,
            op="ln_convlstm_step" if norm == "layer" else f"ln_convlstm_step, {norm} norm",
            shape=f"{shape} float32",
            phase=phase,
            variant=variant,
            device=device,
            moved=(PHASES[phase] + (cell and phase == "both")) * c.numel() * c.element_size(),
            kept=bytes_kept(function, inputs),
        )
        time_it(benchmark, forward if phase == "forward" else both)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("device", "shape"), devices_of(SHAPES))
def bench_step(benchmark, device, shape, phase, variant):
    step(benchmark, device, shape, phase, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("norm", ["batch", "cell"])
@pytest.mark.parametrize(("device", "shape"), devices_of(NORM_SHAPES))
def bench_norm(benchmark, device, shape, norm, phase, variant):
    step(benchmark, device, shape, phase, variant, norm)


class Plain(nn.Module):
    """The same network in plain PyTorch: the reference between the convolutions."""

    def __init__(self, ours: LayerNormConvLSTM) -> None:
        super().__init__()
        self.cell = ours.cell

    def forward(self, x):
        cell = self.cell
        c = x.new_zeros(x.shape[1], cell.hidden, *x.shape[3:])
        h, outputs = c, []
        for step in x.unbind():
            gates = cell.project((step,))[0]
            h, c = reference(gates, cell.project_state(h), c, cell.norm_weight[0], cell.bias)
            outputs.append(h)
        return torch.stack(outputs)


class Convolutions(nn.Module):
    """The convolutions of the same sequence and nothing else; they have gradients as in the network."""

    def __init__(self, ours: LayerNormConvLSTM) -> None:
        super().__init__()
        self.cell = ours.cell

    def forward(self, x, states):
        gates = [self.cell.project((step,))[0] for step in x.unbind()]
        # The first state is zero and needs no convolution.
        return gates + [self.cell.project_state(h) for h in states[1:]]


SEQUENCE = (10, 16, 32, 32, 32)  # T, N, channels, H, W
SEQUENCE_VARIANTS = [
    "ladderfast",
    "convolutions",
    "plain",
    "compile",
]  # what is compared closest, side by side


def sequence(variant: str, shape: tuple[int, ...], device: str):
    """A function that runs one forward and backward pass, and the network and its arguments."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    ours = LayerNormConvLSTM(shape[2], shape[2], 3, device=device)
    if variant == "convolutions":
        module = Convolutions(ours)
        states = [torch.randn(shape[1:], device=device, requires_grad=True) for _ in range(shape[0])]
        args = (x, states)
        gates = torch.randn(shape[1], 4 * shape[2], *shape[3:], device=device)
        wanted = [*ours.cell.weight_ih, ours.cell.weight_hh, *states[1:]]
        grads = [gates] * (2 * shape[0] - 1)
    else:
        module = ours if variant == "ladderfast" else Plain(ours)
        module = compiled(module) if variant == "compile" else module
        args, wanted, grads = (x,), list(ours.parameters()), torch.randn(shape, device=device)

    def run():
        out = module(*args)
        out = out[0] if variant == "ladderfast" else out
        return torch.autograd.grad(out, wanted, grads)

    return run, module, args


def peak(variant: str, device: str) -> int:
    """Bytes at the height of one pass, above those held before it."""
    if device == "cuda":
        run = sequence(variant, SEQUENCE, device)[0]
        run()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - held
    done = subprocess.run(
        [sys.executable, __file__, variant],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    return int(done.stdout.split()[-1])


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("variant", SEQUENCE_VARIANTS)
@pytest.mark.parametrize(("device", "shape"), devices_of([SEQUENCE]))
def bench_sequence(benchmark, device, shape, variant):
    run, module, args = sequence(variant, shape, device)
    measured = variant in ("ladderfast", "plain") and (device == "cuda" or sys.platform == "linux")
    record(
        benchmark,
        op="LayerNormConvLSTM 3x3",
        shape=f"{shape} float32",
        phase="both",
        variant=variant,
        device=device,
        moved=31 * torch.Size(shape).numel() * 4,
        kept=bytes_kept(module, args),
        peak=peak(variant, device) if measured else None,
    )
    benchmark._timer = sync_timer
    benchmark.pedantic(run, rounds=1 if benchmark.disabled else 31, warmup_rounds=2)


@pytest.mark.parametrize("variant", ["ladderfast", "plain", "compile", "torch.nn.LSTM"])
@pytest.mark.parametrize(("device", "shape"), devices_of([(10, 64, 512)]))
def bench_dense_sequence(benchmark, device, shape, variant):
    """Without normalisation, against torch.nn.LSTM with the same weights: shown as it is."""
    torch.manual_seed(0)
    x, grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
    ours = LayerNormLSTM(shape[2], shape[2], norm="none", device=device)
    theirs = nn.LSTM(shape[2], shape[2], device=device)

    def plain(x):
        cell = ours.cell
        c = x.new_zeros(x.shape[1], cell.hidden)
        h, outputs = c, []
        for gates in cell.project_all(x).unbind():
            h, c = reference(gates, cell.project_state(h), c, None, cell.bias)
            outputs.append(h)
        return (torch.stack(outputs),)

    function = {"ladderfast": ours, "torch.nn.LSTM": theirs, "plain": plain}.get(variant) or compiled(plain)
    wanted = list((theirs if variant == "torch.nn.LSTM" else ours).parameters())

    def run():
        return torch.autograd.grad(function(x)[0], wanted, grad)

    record(
        benchmark,
        op="LayerNormLSTM, norm none",
        shape=f"{shape} float32",
        phase="both",
        variant=variant,
        device=device,
        moved=31 * x.numel() * 4,
        kept=bytes_kept(function, (x,)),
    )
    benchmark._timer = sync_timer
    benchmark.pedantic(run, rounds=11, warmup_rounds=2)


if __name__ == "__main__":  # `peak` in a process of its own
    # Small first, so that what a first pass loads is there before.
    sequence(sys.argv[1], (2, 1, 4, 8, 8), "cpu")[0]()
    run = sequence(sys.argv[1], SEQUENCE, "cpu")[0]
    before = resident("VmRSS")
    run()
    print(resident("VmHWM") - before)

"""ln_convlstm_step with batch normalisation and with a normalised cell; what holds without them is tested in
test_ln_convlstm.py."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend, ln_convlstm_step
from ladderfast.reference import ln_convlstm as reference
from tests.ops.test_ln_convlstm import Case

# (inputs, batch, normalised cell)
KINDS = [(0, False, True), (1, False, True), (1, True, False), (2, True, True)]
SHAPES = [
    (1, 1),  # batch norm of one value: x_hat is 0
    (5, 3),
    (70, 20),  # more rows than a tile of the statistics, more channels than a vector
    (3, 2, 7),  # few positions
    (3, 5, 7, 11),
]
LARGE = [
    (1, 20, 29, 30),  # a sample that is cut into chunks
    (9, 17, 33),  # whole samples, several items
]
EMPTY = [(0, 3), (3, 0), (2, 3, 0)]


@dataclass
class Normed(Case):
    """A case with the vectors of the cell, none or two, and the norm of the inputs."""

    cell: list[Tensor] = field(default_factory=list)
    batch: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], kind: tuple[int, bool, bool], seeds: int = 0, **options) -> Normed:
        inputs, batch, cell = kind
        case = Case.draw(shape, inputs, seeds=seeds, **options)
        lead = (seeds,) if seeds else ()
        vectors = [torch.randn(*lead, shape[1]).to(case.c.device, case.c.dtype) for _ in range(2 * cell)]
        return cls(**vars(case), cell=vectors, batch=batch)

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, *self.cell]

    def to(self, dtype: torch.dtype) -> Normed:
        return Normed(
            **{
                k: [t.to(dtype) for t in v] if isinstance(v, list) else v if k == "batch" else v.to(dtype)
                for k, v in vars(self).items()
            }
        )

    def call(self, function, *tensors: Tensor, **options):
        """(h, c) of the function."""
        own, cell = tensors[: len(tensors) - len(self.cell)], tensors[len(tensors) - len(self.cell) :]
        options |= dict(zip(("cell_weight", "cell_bias"), cell, strict=False))
        if self.batch:
            options["norm"] = "batch"
        return super().call(function, *own, **options)[:2]

    def one(self, seed: int) -> Normed:
        return Normed(
            **{
                k: [t[seed] for t in v] if isinstance(v, list) else v if k == "batch" else v[seed]
                for k, v in vars(self).items()
            }
        )


def run(function, case: Normed, **options) -> list[Tensor]:
    """h, c and the gradients with respect to case.tensors."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in case.tensors]
    outputs = case.call(function, *inputs, **options)
    return [
        *(t.detach() for t in outputs),
        *torch.autograd.grad(outputs, inputs, [case.grad_h, case.grad_c]),
    ]


def plain_step(gates_in, rec, c, weight, bias, *, norm="layer", cell_weight=None, cell_bias=None):
    """The formula as a user would write it, without an axis of seeds, in the dtype of its inputs."""
    several = reference.several
    a = rec
    for k, x in enumerate(several(gates_in)):
        if weight is not None:
            gain = several(weight)[k]
            if norm == "layer":
                x = F.group_norm(x, 1, gain)
            elif x[:, 0].numel() > 1:
                x = F.batch_norm(x, None, None, gain, training=True)
            else:  # which torch refuses
                x = x * 0 * gain.view(-1, *[1] * (c.dim() - 2))
        a = a + x
    for b in several(bias):
        a = a + b.view(-1, *[1] * (c.dim() - 2))
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    n = c
    if cell_weight is not None:
        gain, shift = (v.view(-1, *[1] * (c.dim() - 2)) for v in (cell_weight, cell_bias))
        n = F.layer_norm(c, c.shape[1:]) * gain + shift
    return o.sigmoid() * n.tanh(), c


def assert_as_good_as_torch(ours: list[Tensor], case: Normed) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    The plain formula may be right by luck where there are few elements: a few roundings of the largest element, and of
    the terms that are summed on the way, are allowed as well.
    """
    exact = run(reference.ln_convlstm_step, case.to(torch.float64))
    plain = run(plain_step, case) if case.rec.numel() > 0 else ours
    for index, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == b.dtype
        if case.rec.numel() == 0:
            assert (a == 0).all()
            continue
        assert a.isfinite().all()
        terms = max(1.0, case.grad_h.abs().max().item()) * max(1, case.c[:, 0].numel()) ** 0.5
        if case.c[0].numel() == 1 or case.c[:, 0].numel() == 1:
            terms *= 1e-5**-0.5  # 1 / std of a single value
        rounding = torch.finfo(a.dtype).eps * (c.abs().max() + terms) * 4
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(target, shape, kind):
    for dtype in target.dtypes:
        case = Normed.of(shape, kind, dtype=dtype, device=target.device)
        assert_as_good_as_torch(run(ln_convlstm_step, case), case)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_large_samples(target, shape, channels_last):
    kind = (2, True, True) if channels_last else (2, False, True)
    case = Normed.of(shape, kind, dtype=torch.float32, device=target.device, channels_last=channels_last)
    assert_as_good_as_torch(run(ln_convlstm_step, case), case)
    if target.backend != "triton":  # the interpreter is slow
        case.batch = not case.batch
        assert_as_good_as_torch(run(ln_convlstm_step, case), case)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_batch_norm_larger_than_the_caches(channels_last):
    if backend.unavailable("cpu", "cpu", torch.float32):
        pytest.skip("a way of the CPU's kernels")
    case = Normed.of((16, 32, 32, 32), (1, True, False), dtype=torch.float32, channels_last=channels_last)
    with ladderfast.use_backend("cpu"):
        ours = run(ln_convlstm_step, case)
    for a, b in zip(ours, run(reference.ln_convlstm_step, case.to(torch.float64)), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("shape", [(3, 20, 5, 4), (2, 3, 7), (3, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", [(1, False, True), (2, True, True)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_channels_last(target, shape, kind):
    case = Normed.of(shape, kind, dtype=torch.float32, device=target.device, channels_last=True)
    results = run(ln_convlstm_step, case)
    assert_as_good_as_torch(results, case)
    for t in results[:2]:
        assert t.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_axis_of_seeds(target, channels_last):
    for shape in ((6, 5), (2, 3, 4, 5)):
        case = Normed.of(
            shape, (2, True, True), 3, dtype=torch.float32, device=target.device, channels_last=channels_last
        )
        together = run(ln_convlstm_step, case)
        for seed in range(3):
            for every, alone in zip(together, run(ln_convlstm_step, case.one(seed)), strict=True):
                torch.testing.assert_close(every[seed], alone)


@pytest.mark.parametrize("seeds", [0, 2])
def test_statistics_of_the_batch(target, seeds):
    """Those that come back, against torch's; a large mean costs no digits; no gradient goes through them."""
    case = Normed.of((6, 3, 5), (2, True, False), seeds, dtype=torch.float32, device=target.device)
    case.xs[0] = (case.xs[0] + 1e4).requires_grad_()
    pair = (tuple(case.xs), case.rec, case.c, tuple(case.weights), tuple(case.biases))
    _, _, mean, var = ln_convlstm_step(*pair, norm="batch")
    for k, x in enumerate(case.xs):
        wide = x.detach().double().movedim(-2, -3).flatten(-2)
        torch.testing.assert_close(mean.select(-2, k).double(), wide.mean(-1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.select(-2, k).double(), wide.var(-1, correction=0), rtol=1e-5, atol=0)
    assert not mean.requires_grad
    assert mean.shape == (*([seeds] if seeds else []), 2, 12)


def test_hand_computed_cell(target):
    """Two cells 0.6 and -0.2 before their normalisation: mean 0.2, variance 0.16."""
    c = torch.tensor([[1.2, -0.4]], device=target.device)
    zero = torch.zeros(1, 8, device=target.device)
    weight, bias = (torch.tensor(v, device=target.device) for v in ([1.0, 2.0], [0.25, 0.0]))
    h, c_new = ln_convlstm_step(zero, zero, c, None, None, eps=0.09, cell_weight=weight, cell_bias=bias)
    torch.testing.assert_close(c_new, c / 2)
    expected = torch.tensor([[0.8 + 0.25, 2 * -0.8]], device=target.device).tanh() / 2
    torch.testing.assert_close(h, expected)


def test_gradcheck_and_gradgradcheck():
    for shape, kind in (
        ((3, 2), (2, True, True)),
        ((2, 2, 3), (1, False, True)),
        ((2, 1, 17), (0, False, True)),
    ):
        case = Normed.of(shape, kind)
        tensors = [t.requires_grad_() for t in case.tensors]

        def function(*tensors, case=case):
            return case.call(ln_convlstm_step, *tensors)

        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_backward_of_the_reference_is_its_gradient():
    for kind in KINDS:
        case = Normed.of((3, 2, 5), kind)
        by_hand = reference.ln_convlstm_step_backward(
            case.grad_h,
            case.grad_c,
            case.xs,
            case.rec,
            case.c,
            case.weights,
            sum(case.biases),
            case.cell,
            norm="batch" if case.batch else "layer",
        )
        expected = run(reference.ln_convlstm_step, case)[2:]
        if kind[0] == 2:
            del expected[
                len(case.xs) + 2 + len(case.weights)
            ]  # the second bias has the gradient of the first
        torch.testing.assert_close(list(by_hand), expected)


def test_backward_keeps_inputs_the_cell_and_statistics(target):
    if target.backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    kept: dict[int, Tensor] = {}
    case = Normed.of((8, 3, 4), (1, True, True), dtype=torch.float32, device=target.device)
    tensors = [t.requires_grad_() for t in case.tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        _, c = case.call(ln_convlstm_step, *tensors)
    large = {t.data_ptr() for t in (case.xs[0], case.rec, case.c, c)}
    assert large <= set(kept)
    rest = sum(t.numel() for pointer, t in kept.items() if pointer not in large)
    assert rest <= 12 * 3 + 8 * 2 + 12 * 2 + 3 * 2  # statistics of channels and cells, vectors


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_same_bits(target, channels_last):
    """From run to run and for one and two threads."""
    if target.backend == "reference" or (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("a promise of the kernels; the interpreter has one thread and is slow")
    for shape in ((16, 8, 24, 24), (1, 24, 30, 30)):
        options = {"dtype": torch.float32, "device": target.device, "channels_last": channels_last}
        case = Normed.of(shape, (1, True, True), **options)
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(run(ln_convlstm_step, case))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_vmap(target):
    vmap, grad = torch.func.vmap, torch.func.grad
    for kind in ((1, True, True), (0, False, True)):
        case = Normed.of((3, 2, 4), kind, 3, dtype=torch.float32, device=target.device)

        def loss(function, case=case):
            return lambda *tensors: sum(t.square().sum() for t in case.call(function, *tensors))

        every = tuple(range(len(case.tensors)))
        for dims in ([0] * len(every), [None if t.dim() == 2 else 0 for t in case.tensors]):
            args = [t if d == 0 else t[0] for t, d in zip(case.tensors, dims, strict=True)]
            ours, exact = (
                vmap(grad(loss(f), every), tuple(dims))(*args)
                for f in (ln_convlstm_step, reference.ln_convlstm_step)
            )
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_compile_fullgraph(target):
    if (target.backend, target.device) == ("triton", "cpu"):
        pytest.skip("Inductor compiles Triton kernels for GPUs only")
    case = Normed.of((2, 3, 4, 5), (1, True, True), dtype=torch.float32, device=target.device)
    compiled = torch.compile(ln_convlstm_step, fullgraph=True)
    torch.testing.assert_close(run(compiled, case), run(ln_convlstm_step, case))


@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_opcheck():
    ops = torch.ops.ladderfast
    for kind, seeds in (((2, True, True), 2), ((1, False, True), 0)):
        case = Normed.of((2, 3, 4), kind, seeds, dtype=torch.float32)
        x, y = (*case.xs, None)[:2]
        args = (x, y, case.rec, case.c, *(*case.weights, None)[:2], case.biases[0], *case.cell)
        torch.library.opcheck(ops.ln_convlstm.default, (*args, case.batch, 1e-5))
        _, c, *stats = ops.ln_convlstm(*args, case.batch, 1e-5)
        torch.library.opcheck(
            ops.ln_convlstm_backward.default, (case.grad_h, case.grad_c, *args, c, *stats, case.batch)
        )


def test_half_is_the_reference_rounded_once():
    case = Normed.of((3, 4, 6), (2, True, True), dtype=torch.bfloat16)
    exact = run(reference.ln_convlstm_step, case.to(torch.float32))
    for a, b in zip(run(ln_convlstm_step, case), exact, strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=0.02, atol=0.02)


BAD = [
    ({"norm": "group"}, ValueError, r"norm must be 'layer' or 'batch'; got 'group'"),
    ({"norm": "batch", "weight": None}, ValueError, r"weight must be given with norm 'batch'; got None"),
    ({"cell_bias": torch.zeros(3)}, ValueError, r"cell_bias needs cell_weight; got None"),
    ({"cell_weight": torch.zeros(12)}, ValueError, r"cell_weight must have shape \(3,\).*got \(12,\)"),
    (
        {"cell_weight": torch.zeros(3).double()},
        TypeError,
        r"cell_weight must be torch.float32.*torch.float64",
    ),
    ({"cell_weight": 3}, TypeError, r"cell_weight must be a tensor; got int"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_errors_name_the_argument(options, error, message):
    case = Case.draw((4, 3), dtype=torch.float32)
    options = {"weight": case.weights[0], "bias": case.biases[0], **options}
    for name in ("reference", "cpu"):
        if name == "reference" or _extension.module is not None:
            with ladderfast.use_backend(name), pytest.raises(error, match="ln_convlstm_step: " + message):
                ln_convlstm_step(case.xs[0], case.rec, case.c, **options)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.skipif(_extension.module is None, reason=str(_extension.reason))
def test_every_instruction_set(isa):
    code = (
        "from tests.ops.test_ln_convlstm_norms import *\n"
        "torch.manual_seed(0)\n"
        "for shape in SHAPES + LARGE:\n"
        "    for kind in KINDS:\n"
        "        case = Normed.of(shape, kind, dtype=torch.float32)\n"
        "        assert_as_good_as_torch(run(ln_convlstm_step, case), case)\n"
    )
    env = {**os.environ, "LADDERFAST_ISA": isa, "LADDERFAST_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

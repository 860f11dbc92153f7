"""The autograd nodes in C++ compute what the Python functions compute; what they do not take, those do."""

from __future__ import annotations

import importlib
import threading
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ladderfast import _extension, info, ops, use_backend
from ladderfast.ops import combinator, function, tagger, tagger_step

pytestmark = pytest.mark.skipif(_extension.nodes is None, reason=f"no nodes: {_extension.nodes_reason}")


def _arguments(op: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, float | bool]]:
    """Tensors that `op` takes, of which all but a flip_prob want a gradient, and what it takes by name."""
    make = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()

    if op == "gaussian_combinator":
        return [uniform(5, 7), uniform(5, 7), uniform(10, 7)], {"squash_v": True}
    tensors = [uniform(5, 7), uniform(5, 3, 7), uniform(5, 3, 7)]
    if op.endswith("outputs"):
        tensors += [uniform(7), uniform(7), uniform()]
    if op.startswith("gaussian"):
        tensors.append(uniform())
    elif op.endswith("inputs"):
        tensors.append(torch.tensor(0.2, dtype=dtype))
    return tensors, {"eps": 1e-4} if op.endswith("outputs") else {}


OPS = tuple(op for op in info.OPS if op.startswith(("gaussian", "bernoulli")))


def _outputs(op: str, tensors: list[Tensor], options: dict[str, float | bool]) -> tuple[Tensor, ...]:
    out = getattr(ops, op)(*tensors, **options)
    return (out,) if isinstance(out, Tensor) else out


def _loss(outputs: tuple[Tensor, ...]) -> Tensor:
    """Their sum with weights, so that no gradient is of ones alone."""
    weighed = [t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs]
    return torch.stack([t.sum() for t in weighed]).sum()


def _in_cpp(t: Tensor) -> bool:
    return type(t.grad_fn).__name__ == "CppFunction"


@pytest.fixture
def without_nodes(monkeypatch):
    def switch() -> None:
        for module in (combinator, tagger, tagger_step):
            monkeypatch.setattr(module, "direct", lambda: False)

    return switch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_the_bits_of_the_python_function(op, dtype, without_nodes):
    tensors, options = _arguments(op, dtype)
    wanted = [t for t in tensors if t.requires_grad]
    ours = _outputs(op, tensors, options)
    assert all(_in_cpp(t) for t in ours)
    grads = torch.autograd.grad(_loss(ours), wanted)
    without_nodes()
    python = _outputs(op, tensors, options)
    assert not any(_in_cpp(t) for t in python)
    for a, b in zip((*ours, *grads), (*python, *torch.autograd.grad(_loss(python), wanted)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_each_tensor_alone_gets_its_gradient(op, without_nodes):
    tensors, options = _arguments(op)
    wanted = [k for k, t in enumerate(tensors) if t.requires_grad]
    every = torch.autograd.grad(_loss(_outputs(op, tensors, options)), [tensors[k] for k in wanted])
    for k, grad in zip(wanted, every, strict=True):
        alone = [t.detach().requires_grad_(j == k) for j, t in enumerate(tensors)]
        out = _outputs(op, alone, options)
        assert all(_in_cpp(t) for t in out)
        assert torch.equal(torch.autograd.grad(_loss(out), alone[k])[0], grad)
    without = _outputs(op, [t.detach() for t in tensors], options)
    assert not any(t.requires_grad for t in without)
    with torch.no_grad():
        assert not any(t.requires_grad for t in _outputs(op, tensors, options))
    with torch.inference_mode():
        assert all(t.is_inference() for t in _outputs(op, tensors, options))


class Calls(TorchDispatchMode):
    """The registered ops that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.name(), args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS[1:])
@pytest.mark.parametrize("want_x", [False, True])
def test_backward_is_one_op_that_spares_a_gradient_of_x(op, want_x):
    tensors, options = _arguments(op)
    tensors[0] = tensors[0].detach().requires_grad_(want_x)
    out = _outputs(op, tensors, options)
    grads = [torch.ones_like(t) for t in out]
    with Calls() as calls:
        torch.autograd.grad(out, [t for t in tensors if t.requires_grad], grads)
    ours = [(name, args[-1]) for name, args in calls.seen if name.startswith("ladderfast")]
    assert ours == [(f"ladderfast::{op}_backward", want_x)]


@pytest.mark.parametrize("op", [op for op in OPS if "nll" not in op and "combinator" not in op])
def test_results_that_are_not_used(op, without_nodes):
    tensors, options = _arguments(op)
    wanted = [t for t in tensors if t.requires_grad]
    count = len(_outputs(op, tensors, options))

    def gradients() -> list[tuple[Tensor | None, ...]]:
        return [
            torch.autograd.grad(_loss(_outputs(op, tensors, options)[k : k + 1]), wanted, allow_unused=True)
            for k in range(count)
        ]

    ours = gradients()
    without_nodes()
    for a, b in zip(ours, gradients(), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x is not None
            assert y is not None
            assert torch.equal(x, y)


@pytest.mark.parametrize("op", ["gaussian_combinator", "bernoulli_group_inputs", "gaussian_step_outputs"])
def test_compiled_autograd(op):
    tensors, options = _arguments(op)
    wanted = [t for t in tensors if t.requires_grad]

    def gradients(compiled: bool) -> list[Tensor]:
        loss = _loss(_outputs(op, tensors, options)[:1])  # of the others torch makes zeros
        with compiled_autograd._enable(torch.compile(backend="eager")) if compiled else nullcontext():
            loss.backward()
        found = [t.grad for t in wanted]
        for t in wanted:
            t.grad = None
        return found

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients(op, without_nodes):
    tensors, options = _arguments(op, torch.float64)
    wanted = [t for t in tensors if t.requires_grad]

    def second() -> tuple[Tensor, ...]:
        out = _outputs(op, tensors, options)
        grads = torch.autograd.grad(_loss(out), wanted, create_graph=True)
        return *grads, *torch.autograd.grad(_loss(grads), wanted, allow_unused=True, materialize_grads=True)

    ours = second()
    without_nodes()
    for a, b in zip(ours, second(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_a_batch_of_gradients(op, without_nodes):
    tensors, options = _arguments(op)
    wanted = [t for t in tensors if t.requires_grad]
    out = _outputs(op, tensors, options)
    grads = tuple(torch.randn(4, *t.shape) for t in out)
    one_by_one = [
        torch.autograd.grad(out, wanted, [g[k] for g in grads], retain_graph=True) for k in range(4)
    ]
    batched = torch.autograd.grad(out, wanted, grads, is_grads_batched=True, retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a loop over the batch, where the Python function has one call
        mapped = torch.func.vmap(lambda *g: torch.autograd.grad(out, wanted, g, retain_graph=True))(*grads)
    for found in (batched, mapped):
        for t, *each in zip(found, *one_by_one, strict=True):
            torch.testing.assert_close(t, torch.stack(each))


def test_what_saves_tensors_and_what_hooks_are_told():
    z, u, params = _arguments("gaussian_combinator")[0]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or len(packed) - 1, lambda k: packed[k]
    ):
        out = ops.gaussian_combinator(z, u, params)
    assert _in_cpp(out)
    assert [t.data_ptr() for t in packed] == [t.data_ptr() for t in (z, u, params)]
    seen = []
    out.register_hook(lambda g: seen.append(g.shape))
    out.grad_fn.register_hook(lambda grads, _: seen.append(len(grads)))
    first = torch.autograd.grad(out.sum(), (z, u, params))
    assert seen == [out.shape, 3]
    again = checkpoint(ops.gaussian_combinator, z, u, params, use_reentrant=False)
    for a, b in zip(first, torch.autograd.grad(again.sum(), (z, u, params)), strict=True):
        assert torch.equal(a, b)


def test_what_torch_says_of_misuse():
    z, u, params = _arguments("gaussian_combinator")[0]
    out = ops.gaussian_combinator(z, u, params)
    assert out.grad_fn.name() == "ladderfast::combinator_backward"  # anomaly mode says it
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()
    lateral = z * 1
    out = ops.gaussian_combinator(lateral, u, params)
    lateral.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

    class Failing(Exception):
        pass

    def fail(_):
        raise Failing

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fail):
        out = ops.gaussian_combinator(z, u, params)
    with pytest.raises(Failing):
        out.sum().backward()


def test_an_error_in_what_is_differentiable(monkeypatch):
    def fail(*args):
        raise ValueError("from Python")

    asked = function.node(
        "combinator",
        [function.Argument("N C *"), function.Argument("N C *"), function.Argument("10 C")],
        "g0 s0 s1 s2 c0",
        fail,
    )
    z, u, params = _arguments("gaussian_combinator")[0]
    with pytest.raises(ValueError, match="from Python"):
        torch.autograd.grad(asked(z, u, params, False).sum(), z, create_graph=True)


@pytest.mark.parametrize("op", OPS)
def test_tangents_are_refused_and_not_dropped(op):
    """Forward-mode derivatives outside torch.func: no op has a rule for them."""
    tensors, options = _arguments(op)
    for needs in (False, True):
        with forward_ad.dual_level():
            dual = [t.detach().requires_grad_(needs and t.requires_grad) for t in tensors]
            dual[1] = forward_ad.make_dual(dual[1], torch.ones_like(dual[1]))
            for grad_mode in (True, False):
                with torch.set_grad_enabled(grad_mode), pytest.raises(NotImplementedError, match="jvp"):
                    _outputs(op, dual, options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_tangents_of_gradients_are_refused_and_not_dropped(op, create_graph, without_nodes):
    without_nodes()
    tensors, options = _arguments(op)
    out = _outputs(op, tensors, options)
    with forward_ad.dual_level():
        grads = [forward_ad.make_dual(torch.ones_like(t), torch.ones_like(t)) for t in out]
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.autograd.grad(out, tensors[1], grads, create_graph=create_graph)


def test_backward_in_another_thread():
    z, u, params = _arguments("gaussian_combinator")[0]
    expected = torch.autograd.grad(ops.gaussian_combinator(z, u, params).sum(), z)[0]
    out = ops.gaussian_combinator(z, u, params).sum()
    thread = threading.Thread(target=out.backward)
    thread.start()
    thread.join()
    assert torch.equal(z.grad, expected)


class Subclass(Tensor):
    pass


def test_what_no_node_takes():
    """Where the answer is None the Python function is asked: with its kernels, its messages and its transforms."""
    z, u, params = _arguments("gaussian_combinator")[0]
    ask = combinator._node
    assert ask(z, u, params, True) is not None
    for arguments in (
        (z, u, params),
        (z, u, params, 1),
        (z, u, params, None),
        (z, u, None, True),
        (z, u.double(), params, True),
        (z.half(), u.half(), params.half(), True),
        (z.bfloat16(), u.bfloat16(), params.bfloat16(), True),
        (z.long(), u.long(), params.long(), True),
        (z[:, :3], u, params, True),
        (z, u[:3], params, True),
        (z, u, params[:9], True),
        (z, u, params[:, :3], True),
        (z[0], u[0], params, True),
        (z[:, 0], u[:, 0], params, True),
        (z[..., None], u, params, True),
        (z.t()[:5, :5], u.t()[:5, :5], params[:, :5], True),  # neither contiguous nor with channels last
        (z.to_sparse(), u, params, True),
        (z.to("meta"), u.to("meta"), params.to("meta"), True),
        (z.detach().as_subclass(Subclass), u, params, True),
        (z.expand(2, 5, 7), u.expand(2, 5, 7), params.expand(2, 10, 7), True),
    ):
        assert ask(*arguments) is None
    with torch._subclasses.FakeTensorMode():
        assert ask(z, u, params, True) is None
    taken = []
    torch.func.vmap(lambda z: taken.append(ask(z, u, params, True)) or z)(z.detach().expand(2, 5, 7))
    torch.func.grad(lambda z: taken.append(ask(z, u, params, True)) or z.sum())(z.detach())
    torch.func.functionalize(lambda z: taken.append(ask(z, u, params, True)) or z)(z.detach())
    torch.fx.experimental.proxy_tensor.make_fx(lambda z: taken.append(ask(z, u, params, True)) or z)(
        z.detach()
    )
    assert taken == [None] * 4
    for shape in ((2, 4, 3), (2, 4, 5, 3), (2, 4, 5, 6, 3), (2, 1, 5, 3), (2, 0, 3)):
        last = torch.rand(shape).movedim(-1, 1)
        assert ask(last, last, torch.rand(10, 3), False).movedim(1, -1).is_contiguous()


def test_scalars_of_tagger():
    x, z, m, variance = _arguments("gaussian_group_inputs")[0]
    ask = tagger._gaussian_inputs_node
    for value in (variance, 0.3, variance.detach()):
        assert ask(x, z, m, value) is not None
    for value in (
        0.0,
        1e39,
        -1.0,
        float("inf"),
        float("nan"),
        1,
        True,
        "1",
        variance * 0,
        variance[None],
        variance.double(),
    ):
        assert ask(x, z, m, value) is None
    assert ask(x, z[:, :0], m[:, :0], variance) is None  # no group
    with pytest.raises(ValueError, match=r"variance must be a number that torch.float32 holds; got 1e\+39"):
        ops.gaussian_group_inputs(x, z, m, 1e39)
    assert ask(x.double(), z.double(), m.double(), 1e39) is not None
    number = ops.gaussian_group_inputs(x, z, m, 0.3)
    for a, b in zip(number, ops.gaussian_group_inputs(x, z, m, torch.tensor(0.3)), strict=True):
        assert _in_cpp(a)
        assert torch.equal(a, b)

    x, z, m, flip_prob = _arguments("bernoulli_group_inputs")[0]
    ask = tagger._bernoulli_inputs_node
    for value in (flip_prob, 0.0, 1.0, flip_prob * 0, flip_prob * 5):
        assert ask(x, z, m, value) is not None
    for value in (-0.1, 1.1, float("nan"), flip_prob * 6, flip_prob.clone().requires_grad_()):
        assert ask(x, z, m, value) is None

    many = torch.rand(2, tagger_step.GROUPS + 1, 3)
    assert tagger_step._bernoulli_inputs_node(torch.rand(2, 3), many[:, 1:], many[:, 1:], 0.2) is not None
    assert tagger_step._bernoulli_inputs_node(torch.rand(2, 3), many, many, 0.2) is None
    tensors = _arguments("bernoulli_step_outputs")[0]
    for eps, taken in ((1e-5, True), (0.0, False), (-1.0, False), (1, False)):
        assert (tagger_step._bernoulli_outputs_node(*tensors, eps) is not None) == taken


def test_where_the_reference_is_wanted():
    tensors, options = _arguments("gaussian_combinator")
    with use_backend("cpu"):
        assert _in_cpp(_outputs("gaussian_combinator", tensors, options)[0])
    with use_backend("reference"):
        assert not _in_cpp(_outputs("gaussian_combinator", tensors, options)[0])


def test_autocast_leaves_float32_as_it_is():
    tensors, options = _arguments("gaussian_combinator")
    plain = _outputs("gaussian_combinator", tensors, options)[0]
    with torch.autocast("cpu", torch.bfloat16):
        under = _outputs("gaussian_combinator", tensors, options)[0]
    assert _in_cpp(under)
    assert torch.equal(plain, under)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (types.SimpleNamespace(torch_version="1.0"), "built against torch 1.0, and this is"),
        (ImportError("undefined symbol: x"), "they do not load: undefined symbol: x"),
        (ModuleNotFoundError("no"), "they were not built"),
    ],
    ids=["another torch", "does not load", "not built"],
)
def test_without_nodes(found, why, monkeypatch):
    def load(name):
        assert name == "ladderfast._autograd"
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(importlib, "import_module", load)
    nodes, reason = _extension._load_nodes()
    monkeypatch.undo()
    assert nodes is None
    assert why in reason
    monkeypatch.setattr(_extension, "nodes", nodes)
    monkeypatch.setattr(_extension, "nodes_reason", reason)
    assert f"autograd nodes    Python only; none in C++: {reason}" in info.text()
    asked = function.node("combinator", [], "", lambda *args: ())
    assert asked(*_arguments("gaussian_combinator")[0], True) is None


def test_nodes_of_other_sources_are_none(monkeypatch):
    def define(*arguments):
        raise TypeError("define(): incompatible function arguments")

    monkeypatch.setattr(_extension, "nodes", types.SimpleNamespace(define=define))
    monkeypatch.setattr(_extension, "nodes_reason", None)
    asked = function.node("combinator", [], "", lambda *args: ())
    assert asked(*_arguments("gaussian_combinator")[0], True) is None
    assert "built from other sources, build them again: define(): incompatible" in info.text()


@pytest.mark.parametrize(
    ("tensors", "takes", "returned", "why"),
    [
        (0, "g0 s0 s1 s2 c0", 1, "combinator: has not so many tensors"),
        (2, "g0 s0 s1 s2 c0", 1, "combinator: takes another kind of params"),
        (4, "g0 s0 s1 s2 c0", 1, "combinator: takes another kind of squash_v"),
        (3, "g0 s0 s1 s2", 1, "combinator: its backward takes another number of arguments"),
        (3, "g1 s0 s1 s2 c0", 1, "combinator: its backward takes another grad_z_hat"),
        (3, "g0 s0 s1 s3 c0", 1, "combinator: its backward takes another params"),
        (3, "g0 s0 s1 n0 c0", 1, "combinator: its backward takes another params"),
        (3, "g0 s0 s1 s2 s2", 1, "combinator: its backward takes another squash_v"),
        (3, "g0 s0 s1 s2 x0", 1, "combinator: its backward takes another squash_v"),
        (3, "g0 s0 s1 s2 c1", 1, "combinator: its backward takes another squash_v"),
        (3, "g0 s0 s1 s2 c0", 0, "combinator: has not so many results"),
        (3, "g0 s0 s1 s2 c0", 2, "combinator: has not so many results"),
    ],
)
def test_a_node_that_does_not_fit_its_op(tensors, takes, returned, why):
    arguments = [function.Argument("N C *")] * tensors
    with pytest.raises(ValueError, match=why):
        _extension.nodes.define(
            "combinator", "combinator_backward", arguments, {}, returned, takes, lambda *args: ()
        )

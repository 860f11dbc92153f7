"""What surrounds the network in one of Tagger's iterations, one op before it and one after it: checks, registration,
autograd and backend choice."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import (
    WIDE,
    autocast_float32,
    check_dtype,
    check_number,
    finite,
    shape_text,
    shaped,
)
from ladderfast.ops.function import (
    Argument,
    apply,
    apply_in_backward,
    batch_first,
    direct,
    known_signature,
    node,
)
from ladderfast.ops.tagger import (
    FLIP_PROB,
    VARIANCE,
    contiguous,
    prepare,
    prepare_flip_prob,
    prepare_variance,
)
from ladderfast.reference import tagger_step as reference

GROUPS = 64  # at most, of the kernels

_NAMES = tuple(f"{kind}_step_{what}" for kind in ("gaussian", "bernoulli") for what in ("inputs", "outputs"))
_kernels: dict[str, Any] = {}

# What has rows comes first: so many tensors of inputs and of outputs.
_WITH_ROWS = 3


_NOTHING: dict[str, str] = {}


def _lacking(groups: int) -> dict[str, str]:
    """Backends that do not take so many groups, and why."""
    return (
        _NOTHING if groups <= GROUPS else {"cpu": f"its kernel takes at most {GROUPS} groups, not {groups}"}
    )


def _inputs_like(z: Tensor) -> Tensor:
    return z.new_empty((z.shape[0] * z.shape[1], 4 * z.shape[2]))


def _same(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


def _gradients_like(inputs: tuple[Tensor, ...], want_x: bool) -> tuple[Tensor, ...]:
    """One for each input, of which x is the first."""
    x = inputs[0]
    return x.new_empty(x.shape if want_x else (0,)), *_same(*inputs[1:])


def _outputs_like(x: Tensor, z: Tensor, mask_weight: Tensor) -> tuple[Tensor, ...]:
    wide = torch.promote_types(z.dtype, torch.float32)
    stats = z.new_empty((mask_weight.numel(), 4, z.shape[2]), dtype=wide)
    return *_same(z, z), z.new_empty(x.shape), stats


if _extension.module is not None:
    for _name in _NAMES:
        for _op in (_name, _name + "_backward"):
            _kernels[_op] = getattr(torch.ops.ladderfast, _op).default

    @_extension.register_fake("gaussian_step_inputs")
    def _gaussian_inputs_fake(x: Tensor, z: Tensor, mask_logits: Tensor, variance: Tensor) -> Tensor:
        return _inputs_like(z)

    @_extension.register_fake("bernoulli_step_inputs")
    def _bernoulli_inputs_fake(x: Tensor, z: Tensor, mask_logits: Tensor, flip_prob: Tensor) -> Tensor:
        return _inputs_like(z)

    @_extension.register_fake("gaussian_step_inputs_backward")
    def _gaussian_inputs_backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return _gradients_like(inputs[:-1], inputs[-1])

    @_extension.register_fake("bernoulli_step_inputs_backward")
    def _bernoulli_inputs_backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return _gradients_like(inputs[:_WITH_ROWS], inputs[-1])

    @_extension.register_fake("gaussian_step_outputs")
    def _gaussian_outputs_fake(
        x: Tensor,
        z_pre: Tensor,
        mask_pre: Tensor,
        z_weight: Tensor,
        z_bias: Tensor,
        mask_weight: Tensor,
        variance: Tensor,
        eps: float,
    ) -> tuple[Tensor, ...]:
        return _outputs_like(x, z_pre, mask_weight)

    @_extension.register_fake("bernoulli_step_outputs")
    def _bernoulli_outputs_fake(
        x: Tensor,
        z_pre: Tensor,
        mask_pre: Tensor,
        z_weight: Tensor,
        z_bias: Tensor,
        mask_weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, ...]:
        return _outputs_like(x, z_pre, mask_weight)

    def _outputs_backward_fake(
        grad_z: Tensor, grad_logits: Tensor, grad_nll: Tensor, *inputs: Any
    ) -> tuple[Tensor, ...]:
        return _gradients_like(inputs[:-2], inputs[-1])

    for _name in _NAMES[1::2]:
        _extension.register_fake(f"{_name}_backward")(_outputs_backward_fake)


def _run(op: str, name: str, arguments: list[Any]) -> Any:
    if name == "triton":
        from ladderfast.triton import tagger_step

        return getattr(tagger_step, op + "_triton")(*arguments)
    return _kernels[op](*arguments)


def _run_backward(op: str, name: str, tensors: list[Tensor], want_x: bool) -> Any:
    """The gradients; without want_x those but x's, which the kernels then neither compute nor write."""
    op += "_backward"
    found = _run(op, name, tensors) if name == "triton" else _kernels[op](*tensors, want_x)
    return found if want_x else found[1:]


# vmap's batch becomes part of the axis of rows, and scalars and vectors get an axis of seeds. (N K, 4 D), which only
# the gradient of the inputs has, goes with the rows as well.
def _merged(size: int, in_dims: Any, tensors: Any, with_rows: int) -> list[Tensor | None]:
    """Tensors of which the first `with_rows` have rows and the last one that is there is a scalar."""
    given = [k for k, t in enumerate(tensors) if t is not None]
    moved = batch_first(size, tuple(in_dims[k] for k in given), tuple(tensors[k] for k in given))
    nested = moved[-1].dim() == 2
    merged: list[Tensor | None] = [None] * len(tensors)
    for k, t in zip(given, moved, strict=True):
        merged[k] = t.flatten(0, 1) if k < with_rows or nested else t
    return merged


def _split(size: int, t: Tensor) -> Tensor:
    return t.reshape(size, t.shape[0] // size, *t.shape[1:])


# One pair of autograd functions serves all four ops, named by `op`. The parameters p are the scalar of the inputs, or
# z_weight, z_bias, mask_weight and the variance of the outputs; what an op has not is None. eps is None for the inputs,
# which have one result, where the outputs have three and the statistics.
_TENSORS = 7


@known_signature
class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        z: Tensor,
        m: Tensor,
        p1: Tensor,
        p2: Tensor | None,
        p3: Tensor | None,
        p4: Tensor | None,
        op: str,
        eps: float | None,
        name: str,
    ) -> Any:
        given: list[Any] = [t for t in (x, z, m, p1, p2, p3, p4, eps) if t is not None]
        return _run(op, name, given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, ctx.eps, ctx.name = inputs[_TENSORS:]
        stats = None if ctx.eps is None else output[3]
        ctx.save_for_backward(*inputs[:_TENSORS], stats)
        if stats is not None:
            ctx.mark_non_differentiable(stats)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, grad_m: Tensor | None = None, grad_nll: Tensor | None = None, _: Any = None
    ) -> tuple[Tensor | None, ...]:
        want_x = ctx.needs_input_grad[0]
        out = apply_in_backward(
            _StepBackward, grad, grad_m, grad_nll, *ctx.saved_tensors, ctx.op, ctx.eps, ctx.name, want_x
        )
        if not want_x:
            out = (None, *out)
        return *out, *(None,) * (_TENSORS + 3 - len(out))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        size = info.batch_size
        merged = _merged(size, in_dims[:_TENSORS], inputs[:_TENSORS], _WITH_ROWS)
        out = _Step.apply(*merged, *inputs[_TENSORS:])
        if isinstance(out, Tensor):
            return _split(size, out), 0
        return tuple(_split(size, t) for t in out), (0,) * len(out)


@known_signature
class _StepBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad: Tensor,
        grad_m: Tensor | None,
        grad_nll: Tensor | None,
        x: Tensor,
        z: Tensor,
        m: Tensor,
        p1: Tensor,
        p2: Tensor | None,
        p3: Tensor | None,
        p4: Tensor | None,
        stats: Tensor | None,
        op: str,
        eps: float | None,
        name: str,
        want_x: bool,
    ) -> tuple[Tensor, ...]:
        given = [t for t in (grad, grad_m, grad_nll, x, z, m, p1, p2, p3, p4, stats) if t is not None]
        return _run_backward(op, name, given, want_x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[: 3 + _TENSORS])
        ctx.op, ctx.eps = inputs[-4:-2]
        ctx.skipped = 0 if inputs[-1] else 1

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference's backward pass, which is differentiable any number of times.
        saved = ctx.saved_tensors
        given = [k for k, t in enumerate(saved) if t is not None]
        grads = sum(k < 3 for k in given)
        function = getattr(reference, ctx.op)
        if ctx.eps is not None:
            function = partial(function, eps=ctx.eps)

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            return reference.backward(function, tensors[grads:], tensors[:grads])[ctx.skipped :][: len(outer)]

        pullback = torch.func.vjp(formula, *(saved[k] for k in given))[1]
        found = dict(zip(given, pullback(outer), strict=True))
        return *(found.get(k) for k in range(3 + _TENSORS)), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        size, tensors = info.batch_size, 3 + _TENSORS
        merged = _merged(size, in_dims[:tensors], inputs[:tensors], 3 + _WITH_ROWS)
        stats = inputs[tensors]
        if stats is not None:  # which have an axis of seeds always
            stats = batch_first(size, in_dims[tensors : tensors + 1], (stats,))[0].flatten(0, 1)
        scalar = max(k for k in range(tensors) if inputs[k] is not None)
        nested = inputs[scalar].dim() - (in_dims[scalar] is not None) == 1
        out = _StepBackward.apply(*merged, stats, *inputs[tensors + 1 :])
        with_rows = _WITH_ROWS if inputs[-1] else _WITH_ROWS - 1
        split = tuple(_split(size, t) if k < with_rows or nested else t for k, t in enumerate(out))
        return split, (0,) * len(out)


def _differentiable(op: str) -> Any:
    def gradients(grads: Any, kept: Any, numbers: Any, needed: Any) -> tuple[Tensor | None, ...]:
        inputs, stats = (kept[:-1], kept[-1]) if numbers else (kept, None)
        seven = (*inputs, *(None,) * _TENSORS)[:_TENSORS]
        eps = numbers[0] if numbers else None
        found = _StepBackward.apply(*(*grads, None, None)[:3], *seven, stats, op, eps, "cpu", needed[0])
        return found if needed[0] else (None, *found)

    return gradients


def _node(op: str, *parameters: Argument) -> Any:
    arguments = [Argument("N D"), Argument("N K D"), Argument("N K D"), *parameters]
    outputs = op.endswith("outputs")
    kept = " ".join(f"s{k}" for k in range(len(arguments) + outputs))
    takes = f"{'g0 g1 g2' if outputs else 'g0'} {kept} n0"
    returned = 3 if outputs else 1
    return node(op, arguments, takes, _differentiable(op), returned=returned, sizes={"K": (1, GROUPS)})


_AFFINE = Argument("D"), Argument("D"), Argument("")
_gaussian_inputs_node = _node("gaussian_step_inputs", VARIANCE)
_bernoulli_inputs_node = _node("bernoulli_step_inputs", FLIP_PROB)
_gaussian_outputs_node = _node("gaussian_step_outputs", *_AFFINE, VARIANCE)
_bernoulli_outputs_node = _node("bernoulli_step_outputs", *_AFFINE)


def _inputs(op: str, x: Tensor, z: Tensor, mask_logits: Tensor, scalar: Tensor) -> Tensor:
    name = backend.choose(op, z.device.type, z.dtype, _lacking(z.shape[1]))
    if name == "reference":
        return getattr(reference, op)(x, z, mask_logits, scalar)
    return cast(Tensor, apply(_Step, x, z, mask_logits, scalar, None, None, None, op, None, name))


def gaussian_step_inputs(x: Tensor, z: Tensor, mask_logits: Tensor, variance: Tensor | float) -> Tensor:
    """What Tagger's network reads in one iteration, for a continuous input, as its projection takes it.

        m = softmax(mask_logits) over groups
        [z_k, m_k, dz_k, likelihood_k]      with dz and likelihood of `gaussian_group_inputs`

    Args:
        x: (N, D) the corrupted input.
        z: (N, K, D) reconstructions of the K groups.
        mask_logits: (N, K, D) logarithms of the masks, up to a constant for each pixel.
        variance: tensor without axes, or a number: the network's variance plus that of the noise, in the square of
            the unit of x. float32 is allowed beside 16-bit z.

    Returns:
        (N K, 4 D), contiguous, of the dtype of z, every element written once; `[:, D:2 * D]` are the masks.
        Differentiable any number of times in x, z, mask_logits and variance; only these are kept for backward.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32. On a CPU more than 64 groups take the reference's plain PyTorch.

    Raises:
        ValueError: shapes or devices that do not fit; a variance that is not above 0 (numbers and CPU tensors).
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, appendix A, equations 15 and 24.
    """
    if direct() and (found := _gaussian_inputs_node(x, z, mask_logits, variance)) is not None:
        return cast(Tensor, found)
    op = "gaussian_step_inputs"
    x, z, mask_logits = prepare(op, x, z, mask_logits, m_name="mask_logits")
    return _inputs(op, x, z, mask_logits, prepare_variance(op, variance, z))


def bernoulli_step_inputs(x: Tensor, z: Tensor, mask_logits: Tensor, flip_prob: Tensor | float) -> Tensor:
    """What Tagger's network reads in one iteration, for a binary input, as its projection takes it.

        m = softmax(mask_logits) over groups
        [z_k, m_k, dz_k, likelihood_k]      with dz and likelihood of `bernoulli_group_inputs`

    Args:
        x: (N, D) the corrupted input, zeros and ones.
        z: (N, K, D) reconstructions of the K groups, probabilities of a one.
        mask_logits: (N, K, D) logarithms of the masks, up to a constant for each pixel.
        flip_prob: probability that the corruption flipped a pixel: a number, or a tensor without axes. A constant: no
            gradient is made for it. float32 is allowed beside 16-bit z.

    Returns:
        (N K, 4 D), contiguous, of the dtype of z, every element written once; `[:, D:2 * D]` are the masks.
        Differentiable any number of times in x, z and mask_logits; only the inputs are kept for backward. What is
        limited for the sake of finite numbers is so as in `bernoulli_group_inputs`.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32. On a CPU more than 64 groups take the reference's plain PyTorch.

    Raises:
        ValueError: shapes or devices that do not fit; a flip_prob outside [0, 1] (numbers and CPU tensors) or one that
            requires a gradient.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, appendix A, equations 12 and 13 and
    the binary case of A.5.
    """
    if direct() and (found := _bernoulli_inputs_node(x, z, mask_logits, flip_prob)) is not None:
        return cast(Tensor, found)
    op = "bernoulli_step_inputs"
    x, z, mask_logits = prepare(op, x, z, mask_logits, m_name="mask_logits")
    return _inputs(op, x, z, mask_logits, prepare_flip_prob(op, flip_prob, z))


def _parameters_fit(z_pre: Tensor, z_weight: Tensor, z_bias: Tensor, mask_weight: Tensor) -> bool:
    """Whether they are as they must be, of a wide dtype: the common case, found in little time."""
    if not shaped(z_weight, z_bias, mask_weight):
        return False
    dtype, device = z_pre.dtype, z_pre.device
    return (
        z_weight.shape == (z_pre.shape[2],) == z_bias.shape
        and mask_weight.dim() == 0
        and dtype in WIDE
        and z_weight.dtype == dtype == z_bias.dtype
        and mask_weight.dtype == dtype
        and z_weight.device == device == z_bias.device
        and mask_weight.device == device
        and z_weight.layout is z_bias.layout is mask_weight.layout is torch.strided
    )


def _prepared_parameters(
    op: str, z_pre: Tensor, z_weight: Tensor, z_bias: Tensor, mask_weight: Tensor
) -> list[Tensor]:
    """Them, checked and under autocast widened."""
    vectors = [("z_weight", z_weight, z_pre.shape[2:]), ("z_bias", z_bias, z_pre.shape[2:])]
    parameters = []
    for name, t, shape in (*vectors, ("mask_weight", mask_weight, torch.Size([]))):
        check_dtype(op, name, t)
        (t,) = autocast_float32(t)
        if t.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}; got {shape_text(t)}")
        if t.dtype != z_pre.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of z_pre, {z_pre.dtype}; got {t.dtype}")
        if t.device != z_pre.device:
            raise ValueError(f"{op}: {name} must be on the device of z_pre, {z_pre.device}; got {t.device}")
        parameters.append(t)
    return parameters


def _outputs(
    op: str,
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    eps: float,
    *variance: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, z_pre, mask_pre = prepare(op, x, z_pre, mask_pre, "z_pre", "mask_pre")
    parameters = [z_weight, z_bias, mask_weight]
    if not _parameters_fit(z_pre, *parameters):
        parameters = _prepared_parameters(op, z_pre, *parameters)
    parameters += [prepare_variance(op, v, z_pre) for v in variance]
    check_number(f"{op}: eps", eps)
    if not (finite(eps) and eps > 0):
        raise ValueError(f"{op}: eps must be above 0 and finite; got {eps}")
    name = backend.choose(op, z_pre.device.type, z_pre.dtype, _lacking(z_pre.shape[1]))
    if name == "reference":
        found = getattr(reference, op)(x, z_pre, mask_pre, *parameters, eps=eps)
        return cast(tuple[Tensor, Tensor, Tensor], contiguous(found))
    four = (*parameters, None)[:4]
    return apply(_Step, x, z_pre, mask_pre, *four, op, float(eps), name)[:3]


def gaussian_step_outputs(
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    variance: Tensor | float,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """What Tagger makes of its network's output in one iteration, for a continuous input, and what that costs.

        z      = z_weight BN(z_pre) + z_bias                BN over rows and groups, of the batch at hand always
        logits = mask_weight BN(mask_pre)
        nll    = -log sum_k softmax(logits)_k Normal(x; z_k, variance)

    Args:
        x: (N, D) the clean input.
        z_pre, mask_pre: (N, K, D) projections of the network's output for the K groups.
        z_weight, z_bias: (D,) c1 and b1 of each pixel.
        mask_weight: tensor without axes, c2.
        variance: tensor without axes, or a number: the variance that the network has learned, in the square of the unit
            of x.
        eps: added to the variances of the normalisation, which are those of the population.

    Returns:
        z and the logits of the masks (N, K, D), and the cost (N, D) in nats, contiguous, of the dtype of z_pre; the
        next iteration's `gaussian_step_inputs` takes the first two as they are. Differentiable any number of times in
        every tensor; kept for backward are these and four numbers for each pixel. Computed in log space.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32. On a CPU more than 64 groups take the reference's plain PyTorch.

    Raises:
        ValueError: shapes or devices that do not fit; a variance or eps that is not above 0 and finite (numbers
            and CPU tensors).
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, section 2.
    """
    found = None
    if direct():
        found = _gaussian_outputs_node(x, z_pre, mask_pre, z_weight, z_bias, mask_weight, variance, eps)
    if found is not None:
        return cast(tuple[Tensor, Tensor, Tensor], found)
    op = "gaussian_step_outputs"
    return _outputs(op, x, z_pre, mask_pre, z_weight, z_bias, mask_weight, eps, variance)


def bernoulli_step_outputs(
    x: Tensor,
    z_pre: Tensor,
    mask_pre: Tensor,
    z_weight: Tensor,
    z_bias: Tensor,
    mask_weight: Tensor,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """What Tagger makes of its network's output in one iteration, for a binary input, and what that costs.

        z      = sigmoid(z_weight BN(z_pre) + z_bias)       BN over rows and groups, of the batch at hand always
        logits = mask_weight BN(mask_pre)
        nll    = the cross-entropy of x under p = sum_k softmax(logits)_k z_k, as `bernoulli_mixture_nll`

    Args:
        x: (N, D) the clean input, in [0, 1].
        z_pre, mask_pre: (N, K, D) projections of the network's output for the K groups.
        z_weight, z_bias: (D,) c1 and b1 of each pixel.
        mask_weight: tensor without axes, c2.
        eps: added to the variances of the normalisation, which are those of the population.

    Returns:
        z and the logits of the masks (N, K, D), and the cost (N, D) in nats, contiguous, of the dtype of z_pre; the
        next iteration's `bernoulli_step_inputs` takes the first two as they are. Differentiable any number of times in
        every tensor; kept for backward are these and four numbers for each pixel.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32. On a CPU more than 64 groups take the reference's plain PyTorch.

    Raises:
        ValueError: shapes or devices that do not fit, or an eps that is not above 0 and finite.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, section 2 (with the
    Bernoulli mixture in the binary case).
    """
    found = None
    if direct():
        found = _bernoulli_outputs_node(x, z_pre, mask_pre, z_weight, z_bias, mask_weight, eps)
    if found is not None:
        return cast(tuple[Tensor, Tensor, Tensor], found)
    op = "bernoulli_step_outputs"
    return _outputs(op, x, z_pre, mask_pre, z_weight, z_bias, mask_weight, eps)

"""Tagger's inputs to each group and its mixture costs: checks, registration, autograd and backend choice."""

from __future__ import annotations

import math
import sys
from typing import Any, cast

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import WIDE, autocast_float32, check_dtype, shape_text, shaped
from ladderfast.ops.function import (
    Argument,
    apply,
    apply_in_backward,
    batch_first,
    direct,
    known_signature,
    node,
    readable,
)
from ladderfast.reference import tagger as reference

_NAMES = ("gaussian_group_inputs", "bernoulli_group_inputs", "gaussian_mixture_nll", "bernoulli_mixture_nll")
_kernels: dict[str, Any] = {}


def _like_groups(z: Tensor) -> Tensor:
    return z.new_empty(z.shape)


def _gradients_like(x: Tensor, z: Tensor, want_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(x.shape if want_x else (0,)), z.new_empty(z.shape), z.new_empty(z.shape)


if _extension.module is not None:
    for _name in _NAMES:
        for _op in (_name, _name + "_backward"):
            _kernels[_op] = getattr(torch.ops.ladderfast, _op).default

    @_extension.register_fake("gaussian_group_inputs")
    def _gaussian_inputs_fake(x: Tensor, z: Tensor, m: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return _like_groups(z), _like_groups(z)

    @_extension.register_fake("bernoulli_group_inputs")
    def _bernoulli_inputs_fake(x: Tensor, z: Tensor, m: Tensor, flip_prob: Tensor) -> tuple[Tensor, Tensor]:
        return _like_groups(z), _like_groups(z)

    @_extension.register_fake("gaussian_mixture_nll")
    def _gaussian_nll_fake(x: Tensor, z: Tensor, m: Tensor, variance: Tensor) -> Tensor:
        return z.new_empty(x.shape)

    @_extension.register_fake("bernoulli_mixture_nll")
    def _bernoulli_nll_fake(x: Tensor, z: Tensor, m: Tensor) -> Tensor:
        return z.new_empty(x.shape)

    @_extension.register_fake("gaussian_group_inputs_backward")
    def _gaussian_inputs_backward_fake(
        grad_dz: Tensor,
        grad_likelihood: Tensor,
        x: Tensor,
        z: Tensor,
        m: Tensor,
        variance: Tensor,
        want_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *_gradients_like(x, z, want_x), variance.new_empty(variance.shape)

    @_extension.register_fake("bernoulli_group_inputs_backward")
    def _bernoulli_inputs_backward_fake(
        grad_dz: Tensor,
        grad_likelihood: Tensor,
        x: Tensor,
        z: Tensor,
        m: Tensor,
        flip_prob: Tensor,
        want_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients_like(x, z, want_x)

    @_extension.register_fake("gaussian_mixture_nll_backward")
    def _gaussian_nll_backward_fake(
        grad: Tensor, x: Tensor, z: Tensor, m: Tensor, variance: Tensor, want_x: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *_gradients_like(x, z, want_x), variance.new_empty(variance.shape)

    @_extension.register_fake("bernoulli_mixture_nll_backward")
    def _bernoulli_nll_backward_fake(
        grad: Tensor, x: Tensor, z: Tensor, m: Tensor, want_x: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients_like(x, z, want_x)


def _run(op: str, name: str, tensors: list[Tensor]) -> Any:
    if name == "triton":
        from ladderfast.triton import tagger

        return getattr(tagger, op + "_triton")(*tensors)
    return _kernels[op](*tensors)


def _run_backward(op: str, name: str, tensors: list[Tensor], want_x: bool) -> Any:
    """The gradients; without want_x those but x's, which the kernels then neither compute nor write."""
    op += "_backward"
    found = _run(op, name, tensors) if name == "triton" else _kernels[op](*tensors, want_x)
    return found if want_x else found[1:]


# vmap's batch becomes part of the axis of rows, and the scalar gets an axis of seeds, (S,).
def _merged(size: int, in_dims: Any, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Tensors whose last one is the scalar; None where an op has no such argument."""
    merged: list[Tensor | None] = []
    for k, (t, dim) in enumerate(zip(tensors, in_dims, strict=True)):
        if t is not None:
            (t,) = batch_first(size, (dim,), (t,))
            t = t.flatten() if k == len(tensors) - 1 else t.flatten(0, 1)
        merged.append(t)
    return merged


def _split(size: int, t: Tensor) -> Tensor:
    return t.reshape(size, t.shape[0] // size, *t.shape[1:])


# One pair of autograd functions serves all four ops, named by `op`. An op with one output has no grad_b, the Bernoulli
# cost no scalar: they are None.
@known_signature
class _Tagger(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, z: Tensor, m: Tensor, scalar: Tensor | None, op: str, name: str) -> Any:
        return _run(op, name, [x, z, m] if scalar is None else [x, z, m, scalar])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.op, ctx.name = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor | None = None) -> tuple[Tensor | None, ...]:
        want_x = ctx.needs_input_grad[0]
        grads = apply_in_backward(
            _TaggerBackward, grad_a, grad_b, *ctx.saved_tensors, ctx.op, ctx.name, want_x
        )
        if not want_x:
            grads = (None, *grads)
        return (*grads, None, None) if len(grads) == 4 else (*grads, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        size = info.batch_size
        out = _Tagger.apply(*_merged(size, in_dims[:4], inputs[:4]), *inputs[4:])
        if isinstance(out, Tensor):
            return _split(size, out), 0
        return tuple(_split(size, t) for t in out), (0,) * len(out)


@known_signature
class _TaggerBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_a: Tensor,
        grad_b: Tensor | None,
        x: Tensor,
        z: Tensor,
        m: Tensor,
        scalar: Tensor | None,
        op: str,
        name: str,
        want_x: bool,
    ) -> Any:
        given = [t for t in (grad_a, grad_b, x, z, m, scalar) if t is not None]
        return _run_backward(op, name, given, want_x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.op, ctx.skipped = inputs[6], 0 if inputs[8] else 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference's backward pass, which is differentiable any number of times.
        saved = ctx.saved_tensors
        given = [k for k, t in enumerate(saved) if t is not None]

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            return getattr(reference, ctx.op + "_backward")(*tensors)[ctx.skipped :]

        pullback = torch.func.vjp(formula, *(saved[k] for k in given))[1]
        found = dict(zip(given, pullback(grads), strict=True))
        return *(found.get(k) for k in range(6)), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        size, scalar = info.batch_size, inputs[5]
        out = list(_TaggerBackward.apply(*_merged(size, in_dims[:6], inputs[:6]), *inputs[6:]))
        with_rows = 3 if inputs[8] else 2
        for k, t in enumerate(out):
            if k < with_rows or scalar.dim() - (in_dims[5] is not None) > 0:
                out[k] = _split(size, t)
        return tuple(out), (0,) * len(out)


VARIANCE = Argument("", limits=(0.0, math.inf, True))
FLIP_PROB = Argument("", constant=True, limits=(0.0, 1.0, False))


def _differentiable(op: str) -> Any:
    def gradients(grads: Any, kept: Any, numbers: Any, needed: Any) -> tuple[Tensor | None, ...]:
        given = *(*grads, None)[:2], *(*kept, None)[:4]
        found = _TaggerBackward.apply(*given, op, "cpu", needed[0])
        return found if needed[0] else (None, *found)

    return gradients


def _node(op: str, grads: str, *scalar: Argument) -> Any:
    arguments = [Argument("N D"), Argument("N K D"), Argument("N K D"), *scalar]
    kept = " ".join(f"s{k}" for k in range(len(arguments)))
    returned = len(grads.split())
    return node(
        op,
        arguments,
        f"{grads} {kept} n0",
        _differentiable(op),
        returned=returned,
        sizes={"K": (1, sys.maxsize)},
    )


_gaussian_inputs_node = _node("gaussian_group_inputs", "g0 g1", VARIANCE)
_bernoulli_inputs_node = _node("bernoulli_group_inputs", "g0 g1", FLIP_PROB)
_gaussian_nll_node = _node("gaussian_mixture_nll", "g0", VARIANCE)
_bernoulli_nll_node = _node("bernoulli_mixture_nll", "g0")


def _fits(x: Tensor, z: Tensor, m: Tensor) -> bool:
    """Whether x, z and m are as they must be, of a wide dtype: the common case, found in a fifth of the time that
    _check takes."""
    if not shaped(x, z, m):
        return False
    shape, dtype, device = z.shape, z.dtype, z.device
    return (
        m.shape == shape
        and len(shape) == 3
        and shape[1] > 0
        and x.shape == (shape[0], shape[2])
        and dtype in WIDE
        and x.dtype == dtype == m.dtype
        and x.device == device == m.device
        and z.layout is x.layout is m.layout is torch.strided
    )


def _check(op: str, x: Tensor, z: Tensor, m: Tensor, z_name: str, m_name: str) -> None:
    if z.dim() != 3 or z.shape[1] == 0:
        raise ValueError(
            f"{op}: {z_name} must have shape (N, K, D) with at least one group; got {shape_text(z)}"
        )
    if m.shape != z.shape:
        raise ValueError(
            f"{op}: {m_name} must have the shape of {z_name}, {shape_text(z)}; got {shape_text(m)}"
        )
    wanted = (z.shape[0], z.shape[2])
    if x.shape != wanted:
        raise ValueError(
            f"{op}: x must have shape {wanted} for {z_name} of shape {shape_text(z)}; got {shape_text(x)}"
        )
    for name, t in (("x", x), (m_name, m)):
        if t.dtype != z.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {z_name}, {z.dtype}; got {t.dtype}")
        if t.device != z.device:
            raise ValueError(f"{op}: {name} must be on the device of {z_name}, {z.device}; got {t.device}")


def prepare(
    op: str, x: Tensor, z: Tensor, m: Tensor, z_name: str = "z", m_name: str = "m"
) -> tuple[Tensor, ...]:
    """x, z and m, checked and under autocast widened; the names are those of the op's arguments."""
    if not _fits(x, z, m):
        for name, t in (("x", x), (z_name, z), (m_name, m)):
            check_dtype(op, name, t)
        x, z, m = autocast_float32(x, z, m)
        _check(op, x, z, m, z_name, m_name)
    return x, z, m


def _known_value(scalar: Tensor | float) -> float | None:
    """The value of a number, or of a tensor where looking costs nothing."""
    if not isinstance(scalar, Tensor):
        return scalar
    return scalar.item() if readable(scalar) else None


def _prepare_scalar(op: str, name: str, scalar: Tensor | float, z: Tensor) -> Tensor:
    """The scalar as a tensor without axes."""
    if (
        isinstance(scalar, Tensor)
        and not scalar.is_nested
        and scalar.dim() == 0
        and scalar.dtype == z.dtype
        and z.dtype in WIDE
        and scalar.device == z.device
        and scalar.layout is torch.strided
    ):
        return scalar
    half = z.dtype in (torch.bfloat16, torch.float16)
    if not isinstance(scalar, Tensor):
        if isinstance(scalar, bool) or not isinstance(scalar, (int, float)):
            raise TypeError(f"{op}: {name} must be a number or a tensor; got {type(scalar).__name__}")
        dtype = torch.float32 if half else z.dtype
        if torch.finfo(dtype).max < abs(scalar) < math.inf:
            raise ValueError(f"{op}: {name} must be a number that {dtype} holds; got {scalar}")
        return torch.full((), scalar, dtype=dtype, device=z.device)
    check_dtype(op, name, scalar)
    (scalar,) = autocast_float32(scalar)
    if scalar.dtype == z.dtype and scalar.dim() == 0 and scalar.device == z.device:
        return scalar
    if scalar.dim() != 0:
        raise ValueError(f"{op}: {name} must have no axes, shape (); got {shape_text(scalar)}")
    if scalar.dtype != z.dtype and not (half and scalar.dtype == torch.float32):
        wanted = f"{z.dtype} or torch.float32" if half else f"{z.dtype}"
        raise TypeError(f"{op}: {name} must be {wanted} for z of {z.dtype}; got {scalar.dtype}")
    if scalar.device != z.device:
        raise ValueError(f"{op}: {name} must be on the device of z, {z.device}; got {scalar.device}")
    return scalar


def prepare_variance(op: str, variance: Tensor | float, z: Tensor) -> Tensor:
    """The variance as a tensor without axes, checked."""
    scalar = _prepare_scalar(op, "variance", variance, z)
    value = given = _known_value(variance)
    if not isinstance(variance, Tensor) and not torch.compiler.is_compiling():
        value = torch.tensor(given, dtype=scalar.dtype).item()  # 1e-46 is 0 in float32
    if value is not None and not 0 < value < math.inf:
        held = f" as {scalar.dtype}" if given is not None and 0 < given < math.inf else ""
        raise ValueError(f"{op}: variance must be above 0 and finite{held}; got {given}")
    return scalar


def prepare_flip_prob(op: str, flip_prob: Tensor | float, z: Tensor) -> Tensor:
    """The probability as a tensor without axes, checked."""
    scalar = _prepare_scalar(op, "flip_prob", flip_prob, z)
    if scalar.requires_grad:
        raise ValueError(f"{op}: flip_prob is a constant; got a tensor that requires a gradient")
    value = _known_value(flip_prob)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{op}: flip_prob must lie in [0, 1]; got {value}")
    return scalar


def contiguous(found: Any) -> Any:
    """What the reference found, as the kernels lay it out: it takes over strides of its inputs."""
    return found.contiguous() if isinstance(found, Tensor) else tuple(t.contiguous() for t in found)


def gaussian_group_inputs(x: Tensor, z: Tensor, m: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor]:
    """What Tagger tells each group about a continuous input.

        density_k    = Normal(x; z_k, variance)
        dz_k         = (x - z_k) m_k density_k
        likelihood_k = density_k / sum_h density_h

    Args:
        x: (N, D) the corrupted input.
        z: (N, K, D) reconstructions of the K groups.
        m: (N, K, D) masks of the groups; zero is allowed.
        variance: tensor without axes, or a number: the network's variance plus that of the noise, in the square of
            the unit of x. float32 is allowed beside 16-bit z.

    Returns:
        dz and likelihood, (N, K, D) each, contiguous, of the dtype of z. Differentiable any number of times in x, z, m
        and variance; only these are kept for backward. The likelihood is a softmax of log-densities: it holds where
        every density underflows; one below 2^-94 may come out as 0.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32.

    Raises:
        ValueError: shapes or devices that do not fit; a variance that is not above 0 (numbers and CPU tensors).
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, appendix A, equations 15 and 24.
    """
    if direct() and (found := _gaussian_inputs_node(x, z, m, variance)) is not None:
        return cast(tuple[Tensor, Tensor], found)
    op = "gaussian_group_inputs"
    x, z, m = prepare(op, x, z, m)
    variance = prepare_variance(op, variance, z)
    name = backend.choose(op, z.device.type, z.dtype)
    if name == "reference":
        return cast(tuple[Tensor, Tensor], contiguous(reference.gaussian_group_inputs(x, z, m, variance)))
    return cast(tuple[Tensor, Tensor], apply(_Tagger, x, z, m, variance, op, name))


def bernoulli_group_inputs(
    x: Tensor, z: Tensor, m: Tensor, flip_prob: Tensor | float
) -> tuple[Tensor, Tensor]:
    """What Tagger tells each group about a binary input.

        xi_k         = z_k (1 - 2 flip_prob) + flip_prob
        density_k    = x xi_k + (1 - x) (1 - xi_k)
        dz_k         = m_k / (sum_h xi_h m_h - 1 + x)
        likelihood_k = density_k / sum_h density_h

    Args:
        x: (N, D) the corrupted input, zeros and ones.
        z: (N, K, D) reconstructions of the K groups, probabilities of a one.
        m: (N, K, D) masks of the groups, which sum to 1 over K; zero is allowed.
        flip_prob: probability that the corruption flipped a pixel: a number, or a tensor without axes. A constant: no
            gradient is made for it. float32 is allowed beside 16-bit z.

    Returns:
        dz and likelihood, (N, K, D) each, contiguous, of the dtype of z. Differentiable any number of times in x, z and
        m; only the inputs are kept for backward. Both are finite: the sum over groups is kept within [1e-4, 1 - 1e-4],
        and where an x between 0 and 1 puts the denominator nearer to 0 than 5e-5, that is taken; a density counts as
        1e-30 at least. There the gradient is zero.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32.

    Raises:
        ValueError: shapes or devices that do not fit; a flip_prob outside [0, 1] (numbers and CPU tensors) or one that
            requires a gradient.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, appendix A, equations 12 and 13 and the
    binary case of A.5; the limit of 1e-4 is that of its published code.
    """
    if direct() and (found := _bernoulli_inputs_node(x, z, m, flip_prob)) is not None:
        return cast(tuple[Tensor, Tensor], found)
    op = "bernoulli_group_inputs"
    x, z, m = prepare(op, x, z, m)
    scalar = prepare_flip_prob(op, flip_prob, z)
    name = backend.choose(op, z.device.type, z.dtype)
    if name == "reference":
        return cast(tuple[Tensor, Tensor], contiguous(reference.bernoulli_group_inputs(x, z, m, scalar)))
    return cast(tuple[Tensor, Tensor], apply(_Tagger, x, z, m, scalar, op, name))


def gaussian_mixture_nll(x: Tensor, z: Tensor, m: Tensor, variance: Tensor | float) -> Tensor:
    """Tagger's cost of a continuous pixel, in nats: -log sum_k m_k Normal(x; z_k, variance).

    Args:
        x: (N, D) the clean input.
        z: (N, K, D) reconstructions of the K groups.
        m: (N, K, D) masks of the groups, which sum to 1 over K; zero is allowed.
        variance: tensor without axes, or a number: the variance that the network has learned, in the square of the unit
            of x. float32 is allowed beside 16-bit z.

    Returns:
        (N, D), contiguous, of the dtype of z. Differentiable any number of times in x, z, m and variance; only these
        are kept for backward. Computed in log space. The gradient of a mask of zero, whose group may fit by any factor
        better than those that explain the pixel, is held within a quarter of the largest number; on the backend
        "reference" before the gradient of the result multiplies it, which may make it infinite.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32.

    Raises:
        ValueError: shapes or devices that do not fit; a variance that is not above 0 (numbers and CPU tensors).
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, section 2 (the training cost).
    """
    if direct() and (found := _gaussian_nll_node(x, z, m, variance)) is not None:
        return cast(Tensor, found)
    op = "gaussian_mixture_nll"
    x, z, m = prepare(op, x, z, m)
    variance = prepare_variance(op, variance, z)
    name = backend.choose(op, z.device.type, z.dtype)
    if name == "reference":
        return cast(Tensor, contiguous(reference.gaussian_mixture_nll(x, z, m, variance)))
    return cast(Tensor, apply(_Tagger, x, z, m, variance, op, name))


def bernoulli_mixture_nll(x: Tensor, z: Tensor, m: Tensor) -> Tensor:
    """Tagger's cost of a binary pixel, in nats: the cross-entropy of x under p = sum_k m_k z_k.

        -x log p - (1 - x) log(1 - p)        with p kept within [1e-4, 1 - 1e-4], its gradient zero beyond

    Args:
        x: (N, D) the clean input, in [0, 1].
        z: (N, K, D) reconstructions of the K groups, probabilities of a one.
        m: (N, K, D) masks of the groups, which sum to 1 over K; zero is allowed.

    Returns:
        (N, D), contiguous, of the dtype of z. Differentiable any number of times in x, z and m; only these are kept for
        backward.

    float32 and float64; bfloat16 and float16 are computed in float32 and rounded once. Under autocast the op computes
    and returns float32.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Greff et al., "Tagger: Deep Unsupervised Perceptual Grouping", 2016, section 2 (the training cost, with the
    Bernoulli mixture in the binary case); the limit of 1e-4 is that of its published code.
    """
    if direct() and (found := _bernoulli_nll_node(x, z, m)) is not None:
        return cast(Tensor, found)
    op = "bernoulli_mixture_nll"
    x, z, m = prepare(op, x, z, m)
    name = backend.choose(op, z.device.type, z.dtype)
    if name == "reference":
        return cast(Tensor, contiguous(reference.bernoulli_mixture_nll(x, z, m)))
    return cast(Tensor, apply(_Tagger, x, z, m, None, op, name))

"""A Ladder encoder layer after its linear map: checks, registration, autograd and backend choice."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.checks import check_bool, check_dense, check_dtype, check_not_negative, shape_text
from ladderfast.ops.function import apply, apply_in_backward, batch_first, known_signature, packed
from ladderfast.reference import ladder_encoder as reference
from ladderfast.reference.ladder_encoder import ACTIVATIONS

# num_labelled, num_clean, noise_std, noise_stream, activation as its index, negative_slope, eps
Options = tuple[int, int, float, int, int, float, float]

if _extension.module is not None:

    @_extension.register_fake("ladder_encoder")
    def _ladder_encoder_fake(
        z_pre: Tensor,
        beta: Tensor | None,
        gamma: Tensor | None,
        noise_state: Tensor | None,
        num_labelled: int,
        num_clean: int,
        noise_std: float,
        noise_stream: int,
        activation: int,
        negative_slope: float,
        eps: float,
        want_z: bool,
        want_h: bool,
        seeds: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axis = 2 if seeds else 1
        parts = 3 if num_clean > 0 else 2
        shape = (*z_pre.shape[: axis - 1], parts, z_pre.shape[axis])
        wide = torch.float64 if z_pre.dtype == torch.float64 else torch.float32
        return (
            torch.empty_like(z_pre) if want_z else z_pre.new_empty(0),
            torch.empty_like(z_pre) if want_h else z_pre.new_empty(0),
            z_pre.new_empty(shape, dtype=wide),
            z_pre.new_empty(shape, dtype=wide),
        )

    @_extension.register_fake("ladder_encoder_backward")
    def _ladder_encoder_backward_fake(
        grad_z: Tensor | None,
        grad_h: Tensor | None,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
        z_pre: Tensor,
        mean: Tensor,
        var: Tensor,
        beta: Tensor | None,
        gamma: Tensor | None,
        *options: Any,
        **named: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty_like(z_pre),
            z_pre.new_empty(0) if beta is None else beta.new_empty(beta.shape),
            z_pre.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape),
        )


def _seeds_first(
    size: int, seeds: bool, in_dims: Any, tensors: tuple[Tensor | None, ...], z_pre: int
) -> list[Any]:
    """The batch axis of vmap in front, merged with the axis of seeds if there is one already; None stays None.
    z_pre is at that index."""
    moved = [
        None if t is None else batch_first(size, (dim,), (t,))[0]
        for t, dim in zip(tensors, in_dims, strict=True)
    ]
    if not seeds:
        return moved
    moved[z_pre] = packed(cast(Tensor, moved[z_pre]), 3)  # before it is merged, which may copy it otherwise
    return [None if t is None else t.flatten(0, 1) for t in moved]


def _forward(
    z_pre: Tensor,
    beta: Tensor | None,
    gamma: Tensor | None,
    state: Tensor | None,
    options: Options,
    want_z: bool,
    want_h: bool,
    seeds: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_pre = packed(z_pre, 2 if seeds else 1)
    if name == "triton":
        from ladderfast.triton.ladder_encoder import ladder_encoder_triton

        return ladder_encoder_triton(
            z_pre, beta, gamma, state, *options, int(want_z), int(want_h), int(seeds)
        )
    return torch.ops.ladderfast.ladder_encoder(z_pre, beta, gamma, state, *options, want_z, want_h, seeds)


def _backward(
    grad_z: Tensor | None,
    grad_h: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    z_pre: Tensor,
    mean: Tensor,
    var: Tensor,
    beta: Tensor | None,
    gamma: Tensor | None,
    state: Tensor | None,
    options: Options,
    seeds: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    z_pre = packed(z_pre, 2 if seeds else 1)
    tensors = (grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, beta, gamma, state)
    if name == "triton":
        from ladderfast.triton.ladder_encoder import ladder_encoder_backward_triton

        return ladder_encoder_backward_triton(*tensors, *options, int(seeds))
    return torch.ops.ladderfast.ladder_encoder_backward(*tensors, *options, seeds)


@known_signature
class _LadderEncoder(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output[2:])
        ctx.options, ctx.want_z, ctx.want_h, ctx.seeds, ctx.name = inputs[4:]

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_h: Tensor | None, *of_statistics: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        z_pre, beta, gamma, state, mean, var = ctx.saved_tensors
        # Under torch.compile all gradients are there: that of an empty output is as empty, and no gradient of z.
        grads = (grad_z if ctx.want_z else None, grad_h if ctx.want_h else None, *of_statistics)
        tensors = (*grads, z_pre, mean, var, beta, gamma, state)
        grad_z_pre, grad_beta, grad_gamma = apply_in_backward(
            _LadderEncoderBackward, *tensors, ctx.options, ctx.seeds, ctx.name
        )
        if beta is None:
            grad_beta = None
        if gamma is None:
            grad_gamma = None
        return grad_z_pre, grad_beta, grad_gamma, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        options, want_z, want_h, seeds, name = inputs[4:]
        tensors = _seeds_first(info.batch_size, seeds, in_dims[:4], inputs[:4], 0)
        out = _LadderEncoder.apply(*tensors, options, want_z, want_h, True, name)
        dims = (0 if want_z else None, 0 if want_h else None, 0, 0)
        if seeds:
            out = tuple(
                t if dim is None else t.unflatten(0, (info.batch_size, -1))
                for t, dim in zip(out, dims, strict=True)
            )
        return out, dims


@known_signature
class _LadderEncoderBackward(torch.autograd.Function):
    forward = staticmethod(_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5], *inputs[7:10])
        ctx.options, ctx.seeds = inputs[10:12]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of gradients come from the reference. mean and var are functions of z_pre there, so that what
        # reaches them is part of what reaches z_pre.
        *upstream, z_pre, beta, gamma, state = ctx.saved_tensors
        outputs = [i for i, grad in enumerate(upstream) if grad is not None]
        parameters = [t for t in (beta, gamma) if t is not None]
        function = _reference_of(z_pre, beta, gamma, state, ctx.options, ctx.seeds)

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            given, inputs = tensors[: len(outputs)], tensors[len(outputs) :]

            def chosen(*inputs: Tensor) -> tuple[Tensor, ...]:
                out = function(*inputs)
                return tuple(out[i] for i in outputs)

            return torch.func.vjp(chosen, *inputs)[1](given)

        wanted = (grads[0], *[g for g, t in zip(grads[1:], (beta, gamma), strict=True) if t is not None])
        given = [upstream[i] for i in outputs]
        results = list(torch.func.vjp(formula, *given, z_pre, *parameters)[1](wanted))
        into: list[Tensor | None] = [results.pop(0) if grad is not None else None for grad in upstream]
        into += [results.pop(0), None, None]
        into += [None if t is None else results.pop(0) for t in (beta, gamma)]
        return *into, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        options, seeds, name = inputs[10:]
        tensors = _seeds_first(info.batch_size, seeds, in_dims[:10], inputs[:10], 4)
        out = apply_in_backward(_LadderEncoderBackward, *tensors, options, True, name)
        dims = (0, None if inputs[7] is None else 0, None if inputs[8] is None else 0)
        if seeds:
            out = tuple(
                t if dim is None else t.unflatten(0, (info.batch_size, -1))
                for t, dim in zip(out, dims, strict=True)
            )
        return out, dims


def _reference_of(
    z_pre: Tensor,
    beta: Tensor | None,
    gamma: Tensor | None,
    state: Tensor | None,
    options: Options,
    seeds: bool,
) -> Any:
    """The reference as a function of z_pre and of those of beta and gamma that are given, over seeds if need be."""
    num_labelled, num_clean, std, stream, activation, negative_slope, eps = options
    half = z_pre.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if half else z_pre.dtype
    z_pre = packed(z_pre, 2 if seeds else 1)

    noise: Tensor | None
    if seeds and state is not None and std > 0:
        each = [
            reference.scaled_noise(x, s, stream, std, num_clean, dtype)
            for x, s in zip(z_pre, state, strict=True)
        ]
        noise = torch.stack([n for n in each if n is not None])
    else:
        noise = reference.scaled_noise(z_pre, state, stream, std, num_clean, dtype)

    def one(noise: Tensor | None, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        left = list(parameters)
        shift = None if beta is None else left.pop(0)
        scale = None if gamma is None else left.pop(0)
        z, h, mean, var = reference.encode(
            x.to(dtype),
            noise,
            shift,
            scale,
            num_labelled,
            num_clean,
            ACTIVATIONS[activation],
            negative_slope,
            eps,
        )
        return z.to(x.dtype), h.to(x.dtype), mean, var

    function = one
    if seeds:
        given = 1 + (beta is not None) + (gamma is not None)
        function = torch.func.vmap(one, (None if noise is None else 0, *[0] * given))
    return lambda *inputs: function(noise, *inputs)


class LadderEncoderOutput(NamedTuple):
    """What `ladder_encoder` returns."""

    z: Tensor | None
    """(N, C, *) normalised values, with noise: the lateral values and, in a clean part, their targets. None where it
    was not wanted."""
    h: Tensor
    """(N, C, *) act(gamma (z + beta))."""
    mean: Tensor
    """(P, C) of each part: labelled, unlabelled and, with `num_clean`, clean. float32 or wider."""
    var: Tensor
    """(P, C) biased variances."""


def ladder_encoder(
    z_pre: Tensor,
    num_labelled: int,
    *,
    num_clean: int = 0,
    beta: Tensor | None = None,
    gamma: Tensor | None = None,
    noise_std: float = 0.0,
    noise_state: Tensor | None = None,
    noise_stream: int = 0,
    activation: str = "identity",
    negative_slope: float = 0.1,
    eps: float = 1e-10,
    want_z: bool = True,
) -> LadderEncoderOutput:
    """What follows the linear map of a Ladder's encoder layer, in one op.

        z = (z_pre - mean) / sqrt(var + eps) + noise_std * noise        mean and biased var of each part and channel
        h = act(gamma (z + beta))

    Args:
        z_pre: (N, C, *) the linear map's output. Its rows are first the labelled samples, then the unlabelled ones,
            and last, if `num_clean` is given, those of a clean pass. These parts are normalised apart.
        num_labelled: rows of the first part.
        num_clean: rows of the last part, which gets no noise.
        beta: (C,) shift, or None.
        gamma: (C,) scale, or None.
        noise_std: standard deviation of the noise; 0 is the clean pass.
        noise_state: (2,) int64 on the device of z_pre: seed and offset, whose noise this is. Needed where noise_std
            is not 0.
        noise_stream: added to the offset: calls that share a state need different ones for different noise. From 0
            to 2**63 - 1.
        activation: "identity", "relu" or "leaky_relu".
        negative_slope: of the leaky ReLU.
        eps: beneath the square root.
        want_z: whether z is needed: False leaves it out, and the time to write it.

    Returns:
        z, h, mean and var. z and h have the dtype and memory format of z_pre, and are one tensor where they are equal
        (no beta, no gamma, no activation). mean and var are (2, C), or (3, C) with a clean part; a part of no rows has
        mean and variance 0. Differentiable any number of times in z_pre, beta and gamma, also through mean and var.
        Backward keeps z_pre, beta, gamma, the state and the statistics, and draws the noise again.

    The noise comes from Philox4x32-10, counted by seed, offset and element, and is float32 on every backend. An
    element's number is its place in memory (contiguous or channels-last), else its place in contiguous order.
    float32 and float64; bfloat16 and float16 are computed in float32, and beta and gamma may then be float32.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: a forced backend that cannot serve the call.

    Source: Rasmus et al., "Semi-Supervised Learning with Ladder Networks", 2015, Algorithm 1.
    """
    _check(
        z_pre,
        num_labelled,
        num_clean,
        beta,
        gamma,
        noise_std,
        noise_state,
        noise_stream,
        activation,
        negative_slope,
        eps,
        want_z,
    )
    name = backend.choose("ladder_encoder", z_pre.device.type, z_pre.dtype)
    same = beta is None and gamma is None and activation == "identity"  # h is z then
    if name == "reference":
        z, h, mean, var = reference.ladder_encoder(
            z_pre,
            num_labelled,
            num_clean=num_clean,
            beta=beta,
            gamma=gamma,
            noise_std=noise_std,
            noise_state=noise_state,
            noise_stream=noise_stream,
            activation=activation,
            negative_slope=negative_slope,
            eps=eps,
        )
    else:
        options = (
            num_labelled,
            num_clean,
            float(noise_std),
            noise_stream,
            ACTIVATIONS.index(activation),
            float(negative_slope),
            float(eps),
        )
        state = noise_state if noise_std else None
        if name == "cpu" and z_pre.dtype == torch.bfloat16:  # its parameters are float32
            beta = None if beta is None else beta.float()
            gamma = None if gamma is None else gamma.float()
        z, h, mean, var = apply(
            _LadderEncoder, z_pre, beta, gamma, state, options, want_z or same, not same, False, name
        )
    return LadderEncoderOutput(z if want_z else None, z if same else h, mean, var)


def _check(
    z_pre: Tensor,
    num_labelled: int,
    num_clean: int,
    beta: Tensor | None,
    gamma: Tensor | None,
    noise_std: float,
    noise_state: Tensor | None,
    noise_stream: int,
    activation: str,
    negative_slope: float,
    eps: float,
    want_z: bool,
) -> None:
    op = "ladder_encoder"
    check_dtype(op, "z_pre", z_pre)
    if z_pre.dim() < 2:
        raise ValueError(f"{op}: z_pre must have shape (N, C, *); got {shape_text(z_pre)}")
    for name, number in (
        ("num_labelled", num_labelled),
        ("num_clean", num_clean),
        ("noise_stream", noise_stream),
    ):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{op}: {name} must be an integer; got {number!r}")
        if number < 0:
            raise ValueError(f"{op}: {name} must not be negative; got {number}")
    if noise_stream >= 2**63:
        raise ValueError(f"{op}: noise_stream must be less than 2**63; got {noise_stream}")
    if num_labelled + num_clean > len(z_pre):
        raise ValueError(
            f"{op}: num_labelled + num_clean must be at most the {len(z_pre)} rows of z_pre; "
            f"got {num_labelled} + {num_clean}"
        )
    half = z_pre.dtype in (torch.bfloat16, torch.float16)
    for name, t in (("beta", beta), ("gamma", gamma)):
        if t is None:
            continue
        check_dtype(op, name, t)
        if t.shape != z_pre.shape[1:2]:
            raise ValueError(
                f"{op}: {name} must have shape ({z_pre.shape[1]},) for z_pre of shape {shape_text(z_pre)}; "
                f"got {shape_text(t)}"
            )
        if t.dtype != z_pre.dtype and not (half and t.dtype == torch.float32):
            wanted = f"{z_pre.dtype} or torch.float32" if half else f"{z_pre.dtype}"
            raise TypeError(f"{op}: {name} must be {wanted} for z_pre of {z_pre.dtype}; got {t.dtype}")
        if t.device != z_pre.device:
            raise ValueError(f"{op}: {name} must be on the device of z_pre, {z_pre.device}; got {t.device}")
    for name, value in (("noise_std", noise_std), ("negative_slope", negative_slope), ("eps", eps)):
        check_not_negative(f"{op}: {name}", value)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    check_bool(f"{op}: want_z", want_z)
    if noise_state is None:
        if noise_std:
            raise ValueError(f"{op}: noise_state must be given for noise_std {noise_std}; got None")
        return
    if not isinstance(noise_state, Tensor) or noise_state.dtype != torch.int64:
        got = noise_state.dtype if isinstance(noise_state, Tensor) else type(noise_state).__name__
        raise TypeError(f"{op}: noise_state must be an int64 tensor of seed and offset; got {got}")
    check_dense(f"{op}: noise_state", noise_state)
    if noise_state.shape != (2,):
        raise ValueError(
            f"{op}: noise_state must have shape (2,), seed and offset; got {shape_text(noise_state)}"
        )
    if noise_state.device != z_pre.device:
        raise ValueError(
            f"{op}: noise_state must be on the device of z_pre, {z_pre.device}; got {noise_state.device}"
        )

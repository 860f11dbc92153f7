"""Which implementation of an op serves a call: `reference`, `cpu`, `triton` or `cuda`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from types import TracebackType

import torch

from ladderfast import _extension

NAMES = ("reference", "cpu", "triton", "cuda")

# Fastest first. Triton on CPU tensors is its interpreter, which nobody gets without asking.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# What the CPU's kernels take beside float32 and float64.
_ON_CPU = {"ladder_encoder": (torch.bfloat16,), "ladder_decoder": (torch.bfloat16,)}

_NOTHING: Mapping[str, str] = {}

_forced: str | None = os.environ.get("LADDERFAST_BACKEND") or None


class BackendError(RuntimeError):
    """A forced backend cannot serve a call."""


def _check_name(name: str | None, source: str) -> None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{source}: there is no backend {name!r}; choose one of {', '.join(NAMES)}")


class use_backend:
    """Force one backend for every op: `reference`, `cpu`, `triton` or `cuda`; None goes back to choosing.

    Takes effect at once and for the whole process; in a `with` statement until its end. A call that the forced
    backend cannot serve raises a RuntimeError with the reason. The environment variable LADDERFAST_BACKEND sets
    what is forced at the start.

    >>> with ladderfast.use_backend("reference"):
    ...     z_hat = ladderfast.ops.gaussian_combinator(z, u, params)
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        _check_name(name, "use_backend")
        self._previous = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._previous


def forced() -> str | None:
    """The backend that is forced, or None."""
    return _forced


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 before Triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


_TRITON_FOUND = importlib.util.find_spec("triton") is not None
_INTERPRETED = triton_interpreted()


def _reference(device: str, dtype: torch.dtype, op: str) -> str | None:
    return None


def _cpu(device: str, dtype: torch.dtype, op: str) -> str | None:
    if _extension.reason is not None:
        return _extension.reason
    if device != "cpu":
        return f"it takes CPU tensors, not {device} tensors"
    more = _ON_CPU.get(op, ())
    if dtype not in (torch.float32, torch.float64, *more):
        taken = "float32, float64 and bfloat16" if more else "float32 and float64"
        return f"it takes {taken}, not {_name(dtype)}"
    return None


def _cuda(device: str, dtype: torch.dtype, op: str) -> str | None:
    if _extension.module is None:
        return _extension.reason
    if not _extension.module.cuda:
        return "the extension was built without CUDA"
    if device != "cuda":
        return f"it takes CUDA tensors, not {device} tensors"
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it takes float32, float64, bfloat16 and float16, not {_name(dtype)}"
    return None


def _triton(device: str, dtype: torch.dtype, op: str) -> str | None:
    if not _TRITON_FOUND:
        return "triton is not installed"
    if device == "cpu" and not _INTERPRETED:
        return "on CPU tensors it runs only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"it takes CUDA tensors, not {device} tensors"
    if device == "cpu" and dtype != torch.float32:
        return f"Triton's interpreter is right in float32 only, not {_name(dtype)}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {_name(dtype)}"
    return None


_REASONS: dict[str, Callable[[str, torch.dtype, str], str | None]] = {
    "reference": _reference,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unavailable(name: str, device: str, dtype: torch.dtype, op: str = "") -> str | None:
    """Why backend `name` cannot serve tensors of this device type and dtype, in `op` or any op; None if it can."""
    return _REASONS[name](device, dtype, op)


def choose(op: str, device: str, dtype: torch.dtype, lacking: Mapping[str, str] = _NOTHING) -> str:
    """The backend for a call of `op`: the forced one, or the fastest that can serve it.

    `lacking` gives the reason for each backend that has a kernel of the op, but none for such a call.

    Raises:
        RuntimeError: the forced backend cannot serve the call.
        ValueError: LADDERFAST_BACKEND names no backend.
    """
    if _forced is None:
        for name in _PREFERENCE.get(device, ("reference",)):
            if name not in lacking and unavailable(name, device, dtype, op) is None:
                return name
        return "reference"
    _check_name(_forced, "LADDERFAST_BACKEND")
    reason = lacking.get(_forced) or unavailable(_forced, device, dtype, op)
    if reason is not None:
        raise BackendError(f"{op}: the forced backend {_forced!r} cannot serve this call: {reason}")
    return _forced

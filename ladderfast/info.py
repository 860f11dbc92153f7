"""What is installed and what would run: `python -m ladderfast.info`, `ladderfast info`."""

from __future__ import annotations

import os
import platform
import sys

import torch

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
OPS = (
    "gaussian_combinator",
    "ladder_encoder",
    "ladder_decoder",
    "soft_pool2d",
    "soft_unpool2d",
    "gaussian_group_inputs",
    "bernoulli_group_inputs",
    "gaussian_mixture_nll",
    "bernoulli_mixture_nll",
    "gaussian_step_inputs",
    "bernoulli_step_inputs",
    "gaussian_step_outputs",
    "bernoulli_step_outputs",
    "ln_convlstm_step",
)
_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "not installed"


def _extension_lines() -> list[str]:
    built = _extension.module
    if built is None:
        return [f"extension         none: {_extension.reason}"]
    cuda = f"for {built.cuda_architectures}, CUDA {built.cuda_version}" if built.cuda else "not built"
    asked = os.environ.get("LADDERFAST_ISA")
    unknown = f"; LADDERFAST_ISA={asked!r} is none of them" if asked not in (None, *INSTRUCTION_SETS) else ""
    return [
        f"extension         built against torch {built.torch_version} with {built.compiler}",
        f"CPU kernels       in use: {built.instruction_set()}, of {', '.join(INSTRUCTION_SETS)}{unknown}",
        f"CUDA kernels      {cuda}",
    ]


def _device_lines() -> list[str]:
    lines = [f"CPU               {platform.machine()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(
                f"GPU {i}             {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
            )
    else:
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch sees none"
        lines.append(f"GPU               none: {why}")
    return lines


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backend_lines() -> list[str]:
    lines = ["", f"backends          forced: {backend._forced}" if backend._forced else "backends"]
    for op in OPS:
        for device, dtypes in _DTYPES.items():
            if device == "cuda" and not torch.cuda.is_available():
                built = (
                    ""
                    if _extension.module is None or _extension.module.cuda
                    else ", and no CUDA kernels were built"
                )
                lines.append(f"  {op} on cuda: no GPU here{built}")
                continue
            for dtype in dtypes:
                try:
                    chosen = backend.choose(op, device, dtype)
                except (RuntimeError, ValueError) as error:
                    lines.append(f"  {error}")
                    continue
                lines.append(f"  {op} on {device}, {_short(dtype)}: {chosen}")
                for name in backend.NAMES:
                    reason = backend.unavailable(name, device, dtype)
                    if name != chosen:
                        lines.append(f"      not {name}: {reason or 'it would serve, but slower'}")
    return lines


def text() -> str:
    """The report as text."""
    return "\n".join(
        [
            f"ladderfast        {ladderfast.__version__}",
            f"Python            {platform.python_version()}",
            f"torch             {torch.__version__}",
            f"triton            {_version('triton')}",
            *_extension_lines(),
            *_device_lines(),
            *_backend_lines(),
        ]
    )


def main() -> None:
    """Print the report."""
    sys.stdout.write(text() + "\n")


if __name__ == "__main__":
    main()

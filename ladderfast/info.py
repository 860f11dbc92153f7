"""What is installed and what would run: `python -m ladderfast.info`, `ladderfast info`."""

from __future__ import annotations

import os
import platform
import sys
import textwrap

import torch

import ladderfast
from ladderfast import _extension
from ladderfast.ops import backend
from ladderfast.ops.linear import one_dnn

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
OPS = (
    "gaussian_combinator",
    "ladder_encoder",
    "ladder_decoder",
    "soft_pool2d",
    "soft_unpool2d",
    "where_max_pool2d",
    "where_max_unpool2d",
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
    nodes = "C++" if _extension.nodes else f"Python only; none in C++: {_extension.nodes_reason}"
    return [
        f"extension         built against torch {built.torch_version} with {built.compiler}",
        f"CPU kernels       in use: {built.instruction_set()}, of {', '.join(INSTRUCTION_SETS)}{unknown}",
        f"autograd nodes    {nodes}",
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


def _choice_lines(op: str, device: str, dtype: torch.dtype) -> list[str]:
    try:
        chosen = backend.choose(op, device, dtype)
    except (RuntimeError, ValueError) as error:
        return [str(error).removeprefix(f"{op}: ")]
    lines = [chosen]
    for name in backend.NAMES:
        if name != chosen:
            reason = backend.unavailable(name, device, dtype, op)
            lines.append(f"      not {name}: {reason or 'it would serve, but slower'}")
    return lines


def _backend_lines() -> list[str]:
    """By device and dtype what each op takes and why not the rest; ops that fare alike stand together."""
    lines = ["", f"backends          forced: {backend.forced()}" if backend.forced() else "backends"]
    for device, dtypes in _DTYPES.items():
        if device == "cuda" and not torch.cuda.is_available():
            without = _extension.module is not None and not _extension.module.cuda
            lines.append(f"  on cuda: no GPU here{', and no CUDA kernels were built' if without else ''}")
            continue
        for dtype in dtypes:
            alike: dict[tuple[str, ...], list[str]] = {}
            for op in OPS:
                alike.setdefault(tuple(_choice_lines(op, device, dtype)), []).append(op)
            for (chosen, *others), ops in alike.items():
                lines.append(f"  on {device}, {_short(dtype)}: {chosen}")
                if len(ops) < len(OPS):
                    names = ", ".join(ops)
                    lines += textwrap.wrap(names, 100, initial_indent=" " * 4, subsequent_indent=" " * 4)
                lines += others
    lines.append(f"  matrix products in float32 on cpu: {'oneDNN' if one_dnn() else 'as torch has them'}")
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

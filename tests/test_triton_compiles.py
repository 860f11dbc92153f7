"""Every Triton kernel is compiled ahead of time for sm_80 and sm_90, without a GPU and without spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Kernel -> its argument types and, for each variant that is launched, the constants. In a process of its own, since the
# interpreter that the other tests use replaces the compiler.
COMPILE = r"""
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

arch = int(sys.argv[1])

def compile(kernel, pointers, constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    folder = tempfile.mkdtemp()
    ptx, cubin = os.path.join(folder, "k.ptx"), os.path.join(folder, "k.cubin")
    open(ptx, "w").write(compiled.asm["ptx"])
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={target}", ptx, "-o", cubin]
    report = subprocess.run(command, capture_output=True, text=True).stderr
    if "Unsupported .version" in report:  # a Triton that writes newer PTX than its own ptxas reads
        open(cubin, "wb").write(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        report = subprocess.run(command, capture_output=True, text=True).stdout
    print(kernel.fn.__name__, constants, report.replace("\n", " "))

"""

COMBINATOR = r"""
from ladderfast.triton import combinator as c

for element in ("*fp32", "*bf16"):
    tensors = {n: element for n in ("z_ptr", "u_ptr", "z_hat_ptr", "grad_ptr", "grad_z_ptr", "grad_u_ptr")}
    tensors |= {"params_ptr": "*fp32", "partial_ptr": "*fp32", "grad_params_ptr": "*fp32"}
    for per_column, rows, columns in ((1, 4, 128), (1, 8, 64), (1, 16, 32), (1, 16, 16), (0, 4, 128)):
        for squash in (0, 1):
            constants = {"SQUASH": squash, "PER_COLUMN": per_column, "ROWS": rows, "COLUMNS": columns}
            if per_column:  # arguments equal to 1 become constants
                constants |= {"inner": 1, "segment": 1, "segments": 1}
            compile(c._forward_kernel, tensors, constants)
            compile(c._backward_kernel, tensors, constants)
compile(c._sum_kernel, tensors, {"SLOTS": c.SUM_TILE, "COLUMNS": 128})
"""

LN_CONVLSTM = r"""
from ladderfast.triton import ln_convlstm as c

for element in ("*fp32", "*bf16"):
    names = ("x", "y", "rec", "c", "h", "c_new", "grad_h", "grad_c_new", "grad_c", "grad_rec", "grad_x", "grad_y")
    tensors = {f"{n}_ptr": element for n in names}
    tensors |= {f"{n}_ptr": "*fp32" for n in ("weight", "weight_y", "bias", "stats", "partial", "means", "sums", "out")}
    tensors["eps"] = "fp32"
    for inputs in (0, 1, 2) if element == "*fp32" else (2,):
        for last in (0, 1):
            constants = {"INPUTS": inputs, "LAST": last, "BLOCK": c.CELLS}
            compile(c._forward_kernel, tensors, constants)
            compile(c._backward_kernel, tensors, constants)
            for rows, columns in ((4, 128), (16, 16)):
                constants = {"INPUTS": inputs, "LAST": last, "ROWS": rows, "COLUMNS": columns}
                compile(c._finish_kernel, tensors, constants)
    compile(c._moments_kernel, tensors, {"BLOCK": c.MOMENTS})
compile(c._merge_moments_kernel, tensors, {"BLOCK": c.MOMENTS, "CHUNKS": c.CHUNKS})
compile(c._merge_projections_kernel, tensors, {"WIDTH": 4, "CHUNKS": c.CHUNKS})
compile(c._sum_kernel, tensors, {"SLOTS": c.SLOTS, "COLUMNS": 128})
"""


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("code", "kernels"), [(COMBINATOR, 41), (LN_CONVLSTM, 37)], ids=["combinator", "ln_convlstm"]
)
def test_triton_compiles_ahead_of_time(code: str, kernels: int, arch: int, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    script = tmp_path / "compile.py"  # Triton reads a kernel's source from its file
    script.write_text(COMPILE + code)
    done = subprocess.run(
        [sys.executable, str(script), str(arch)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = done.stdout.strip().splitlines()
    assert len(reports) == kernels
    for report in reports:
        # ptxas counts spills; cuobjdump only the stack frame, which holds them.
        spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
        spills += re.findall(r"(?:STACK|LOCAL):(\d+)", report)
        assert spills, report
        assert not any(map(int, spills)), report

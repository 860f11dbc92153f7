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
CODE = r"""
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ladderfast.triton import combinator as c
from ladderfast.triton import ladder_encoder as e

arch = int(sys.argv[1])

def compile(kernel, types, constants, warps=4):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
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

def compile_encoder(element, variants):
    like_x = ("x", "z", "h", "grad_x", "grad_z", "grad_h")
    others = ("mean", "var", "grad_mean", "grad_var", "partial", "finish", "beta", "gamma", "grad_beta", "grad_gamma")
    types = {f"{n}_ptr": element for n in like_x} | {f"{n}_ptr": "*fp32" for n in others}
    types |= {"state_ptr": "*i64", "std": "fp32", "slope": "fp32", "eps": "fp32"}
    given = {f"HAS_{n}": 1 for n in ("Z", "H", "MEAN", "VAR", "BETA", "GAMMA")} | {"WANT_Z": 1, "WANT_H": 1, "NOISE": 1}

    def variant(kernels, warps, **constants):
        for kernel in kernels:
            its = {n: v for n, v in (given | constants).items() if n in kernel.arg_names}
            compile(kernel, types, its, warps)

    # The largest tiles that are launched: of columns and of a run, aligned to the noise's fours and not.
    chunk = (e._statistics_kernel, e._forward_apply_kernel, e._backward_sums_kernel, e._backward_apply_kernel)
    held = (e._forward_held_kernel, e._backward_held_kernel)
    for per_column, aligned in variants:
        both = {"ACTIVATION": 2, "ALIGNED": aligned, "PER_COLUMN": per_column} | ({"inner": 1} if per_column else {})
        variant(chunk, 4, ROWS=4, COLUMNS=128, **both)
        variant(held, 8, ROWS=128, COLUMNS=16, **both)
    variant((e._merge_statistics_kernel, e._merge_backward_kernel), 4, SLOTS=e.SLOTS, COLUMNS=e.MERGE)

compile_encoder("*fp32", ((0, 0), (0, 1), (1, 0), (1, 1)))
compile_encoder("*bf16", ((1, 1),))
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_ahead_of_time(arch: int, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    script = tmp_path / "compile.py"  # Triton reads a kernel's source from its file
    script.write_text(CODE)
    done = subprocess.run(
        [sys.executable, str(script), str(arch)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = done.stdout.strip().splitlines()
    assert len(reports) == 41 + 5 * 6 + 2 * 2
    for report in reports:
        # ptxas counts spills; cuobjdump only the stack frame, which holds them.
        spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
        spills += re.findall(r"(?:STACK|LOCAL):(\d+)", report)
        assert spills, report
        assert not any(map(int, spills)), report

"""Every Triton kernel is compiled ahead of time for sm_80 and sm_90, without a GPU and without spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# In a process of its own, since the interpreter that the other tests use replaces the compiler.
PRELUDE = r"""
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ladderfast.triton import combinator as c
from ladderfast.triton import ladder_decoder as d

arch = int(sys.argv[1])

def compile(kernel, types, constants, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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

TILES = ((1, 4, 128), (1, 8, 64), (1, 16, 32), (1, 16, 16), (0, 4, 128))

def tile_constants(per_column, rows, columns):
    constants = {"PER_COLUMN": per_column, "ROWS": rows, "COLUMNS": columns}
    # Arguments equal to 1 become constants.
    return constants | ({"inner": 1, "segment": 1, "segments": 1} if per_column else {})
"""

# Kernel -> its argument types and, for each variant that is launched, the constants.
COMBINATOR = r"""
for element in ("*fp32", "*bf16"):
    tensors = {n: element for n in ("z_ptr", "u_ptr", "z_hat_ptr", "grad_ptr", "grad_z_ptr", "grad_u_ptr")}
    tensors |= {"params_ptr": "*fp32", "partial_ptr": "*fp32", "grad_params_ptr": "*fp32"}
    for tile in TILES:
        for squash in (0, 1):
            constants = {"SQUASH": squash} | tile_constants(*tile)
            compile(c._forward_kernel, tensors, constants)
            compile(c._backward_kernel, tensors, constants)
compile(c._sum_kernel, tensors, {"SLOTS": c.SUM_TILE, "COLUMNS": 128})
"""
LADDER_DECODER = r"""
EVERYTHING = {"SQUASH": 1, "COST": 1, "NORMAL": 1}, {"GRAD": 1, "WANT_Z": 1, "WANT_CLEAN": 1}
LITTLE = {"SQUASH": 0, "COST": 0, "NORMAL": 0}, {"GRAD": 1, "WANT_Z": 0, "WANT_CLEAN": 0}
for element, (flags, wanted), tiles, held_rows in (
    ("*fp32", EVERYTHING, TILES, (16, 256)),
    ("*bf16", EVERYTHING, TILES, (16, 256)),
    ("*fp32", LITTLE, TILES[:1], (128,)),
):
    arguments = {n: "*fp32" for k in vars(d).values() if hasattr(k, "arg_names") for n in k.arg_names if "_ptr" in n}
    arguments |= {n: element for n in ("u_ptr", "z_ptr", "clean_ptr", "z_hat_ptr", "grad_ptr")}
    arguments |= {n: element for n in ("grad_u_ptr", "grad_z_ptr", "grad_clean_ptr")}
    arguments |= {n: "fp32" for n in ("eps", "count", "per_element")}
    for rows in held_rows:
        columns = 16 if element == "*bf16" else 8
        held, warps = {"ROWS": rows, "COLUMNS": columns}, max(1, rows * columns // 256)
        compile(d._held_forward_kernel, arguments, flags | held, num_warps=warps)
        compile(d._held_backward_kernel, arguments, flags | wanted | held, num_warps=warps)
    for tile in tiles:
        constants = tile_constants(*tile)
        compile(d._forward_kernel, arguments, flags | constants)
        compile(d._backward_kernel, arguments, flags | wanted | constants | {"SUMS": 0})
        if not tile[0]:
            constants["ROWS"] = d.SUMMED_RUN_ROWS
        compile(d._backward_kernel, arguments, flags | wanted | constants | {"SUMS": 1})
for tile in TILES:
    compile(d._moments_kernel, arguments, tile_constants(*tile))
compile(d._merge_kernel, arguments, d.FINISH_TILE)
compile(d._finish_kernel, arguments, d.FINISH_TILE | {"NORMAL": 1})
"""
CODE = {"combinator": (COMBINATOR, 41), "ladder_decoder": (LADDER_DECODER, 2 * 19 + 5 + 7)}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("stem", CODE)
def test_triton_compiles_ahead_of_time(stem: str, arch: int, tmp_path: Path) -> None:
    code, kernels = CODE[stem]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    script = tmp_path / "compile.py"  # Triton reads a kernel's source from its file
    script.write_text(PRELUDE + code)
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

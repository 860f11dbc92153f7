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
from ladderfast.triton import combinator as c

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
from ladderfast.triton import ladder_decoder as d

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
LADDER_ENCODER = r"""
from ladderfast.triton import ladder_encoder as e

def compile_encoder(element, variants):
    like_x = ("x", "z", "h", "grad_x", "grad_z", "grad_h")
    others = ("mean", "var", "grad_mean", "grad_var", "partial", "finish", "beta", "gamma", "grad_beta", "grad_gamma")
    types = {f"{n}_ptr": element for n in like_x} | {f"{n}_ptr": "*fp32" for n in others}
    types |= {"state_ptr": "*i64", "std": "fp32", "slope": "fp32", "eps": "fp32"}
    given = {f"HAS_{n}": 1 for n in ("Z", "H", "MEAN", "VAR", "BETA", "GAMMA")} | {"WANT_Z": 1, "WANT_H": 1, "NOISE": 1}

    def variant(kernels, warps, **constants):
        for kernel in kernels:
            its = {n: v for n, v in (given | constants).items() if n in kernel.arg_names}
            compile(kernel, types, its, num_warps=warps)

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
WHAT_WHERE = r"""
from ladderfast.triton import what_where as ww

for element in ("*fp32", "*bf16"):
    names = ("z_ptr", "what_ptr", "where_ptr", "grad_z_ptr", "grad_what_ptr", "grad_where_ptr")
    types = {n: element for n in names} | {"scale": "fp32", "beta": "fp32"}
    for size in ((2, 2), (16, 16)):
        constants = ww.constants(*size) | {"inner": 1}  # arguments equal to 1 become constants
        for kernel in (ww._pool_kernel, ww._pool_backward_kernel, ww._unpool_kernel):
            compile(kernel, types, constants)
    del constants["TAPS"]
    compile(ww._unpool_backward_kernel, types, constants | {"BLOCK": ww.BACKWARD_BLOCK})
    compile(ww._pool_backward_kernel, types, ww.constants(2, 2))
    for positions, size in ((0, (2, 2)), (1, (16, 16))):
        types["where_ptr"] = "*i64" if positions else "*u8"
        constants = ww.constants(*size) | {"POSITIONS": positions}
        for kernel in (ww._max_pool_kernel, ww._max_unpool_kernel):
            compile(kernel, types, constants)
            compile(kernel, types, constants | {"inner": 1})
        del constants["TAPS"]
        compile(ww._max_unpool_backward_kernel, types, constants | {"BLOCK": ww.BACKWARD_BLOCK})
"""
LN_CONVLSTM = r"""
from ladderfast.triton import ln_convlstm as c

wide = ("weight", "weight_y", "bias", "stats", "partial", "means", "sums", "out", "grad_n", "grad_after")
for element in ("*fp32", "*bf16"):
    names = ("x", "y", "rec", "c", "h", "c_new", "grad_h", "grad_c_new", "grad_c", "grad_rec", "grad_x", "grad_y")
    tensors = {f"{n}_ptr": element for n in names}
    tensors |= {f"{n}_ptr": "*fp32" for n in (*wide, "cell_weight", "cell_bias", "cell_stats")}
    tensors |= {"eps": "fp32", "share": "fp32", "count": "fp32"}
    tiles = ((4, 128), (16, 16))
    for inputs, batch, cell in ((0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 1, 1)) if element == "*fp32" else ((2, 1, 1),):
        for last in (0, 1):
            constants = {"INPUTS": inputs, "BATCH": batch, "LAST": last}
            cells = constants | {"BLOCK": c.CELLS}
            compile(c._forward_kernel, tensors, cells | {"CELL": cell})
            compile(c._backward_kernel, tensors, cells | {"CELL": cell})
            if cell:
                compile(c._cell_forward_kernel, tensors, cells)
                compile(c._cell_backward_kernel, tensors, cells)
            for rows, columns in tiles[:1] if cell else tiles:
                tile = {"LAST": last, "ROWS": rows, "COLUMNS": columns}
                for finish in (1, 2) if batch else (0,):
                    compile(c._finish_kernel, tensors, constants | tile | {"BATCH": finish})
                if batch:
                    compile(c._batch_moments_kernel, tensors, tile)
    compile(c._moments_kernel, tensors, {"BLOCK": c.MOMENTS})
compile(c._merge_moments_kernel, tensors, {"BLOCK": c.MOMENTS, "CHUNKS": c.CHUNKS})
compile(c._merge_batch_kernel, tensors, {"SLOTS": c.SLOTS, "COLUMNS": 128})
compile(c._merge_projections_kernel, tensors, {"WIDTH": 4, "CHUNKS": c.CHUNKS})
compile(c._sum_kernel, tensors, {"SLOTS": c.SLOTS, "COLUMNS": 128})
"""
TAGGER = r"""
from ladderfast.triton import tagger

for element in ("*fp32", "*bf16"):
    for name in ("gaussian_inputs", "bernoulli_inputs", "gaussian_nll", "bernoulli_nll"):
        for kernel in (getattr(tagger, f"_{name}_kernel"), getattr(tagger, f"_{name}_backward_kernel")):
            tensors = {n: element for n in kernel.arg_names if n.endswith("_ptr")}
            tensors |= {"scalar_ptr": "*fp32", "partial_ptr": "*fp32"}
            compile(kernel, tensors, {"BLOCK": 512})
tensors = {n: "*fp32" for n in ("partial_ptr", "variance_ptr", "grad_variance_ptr")}
compile(tagger._sum_kernel, tensors, {"BLOCK": tagger.SUM_BLOCK})
"""
TAGGER_STEP = r"""
from ladderfast.triton import tagger_step as t

wide = ("scalar", "partial", "variance", "stats", "means", "of_variance", "of_c2")
for element in ("*fp32", "*bf16"):
    tensors = {n: element for k in vars(t).values() if hasattr(k, "arg_names") for n in k.arg_names if "_ptr" in n}
    tensors |= {f"{n}_ptr": "*fp32" for n in wide} | {"eps": "fp32"}
    for gaussian in (0, 1):
        compile(t._inputs_kernel, tensors, {"GAUSSIAN": gaussian, "BLOCK": 512})
        compile(t._outputs_kernel, tensors, {"GAUSSIAN": gaussian, "BLOCK": t.COLUMNS})
        for finish in (0, 1):
            constants = {"GAUSSIAN": gaussian, "FINISH": finish, "BLOCK": t.COLUMNS}
            compile(t._outputs_backward_kernel, tensors, constants | ({"chunk_rows": 1} if finish else {}))
    compile(t._gaussian_inputs_backward_kernel, tensors, {"BLOCK": 512})
    compile(t._bernoulli_inputs_backward_kernel, tensors, {"BLOCK": 512})
    for kernel in (t._moments_kernel, t._merge_moments_kernel, t._merge_sums_kernel):
        compile(kernel, tensors, {"BLOCK": t.COLUMNS})
"""
CODE = {
    "combinator": (COMBINATOR, 41),
    "ladder_decoder": (LADDER_DECODER, 2 * 19 + 5 + 7),
    "ladder_encoder": (LADDER_ENCODER, 5 * 6 + 2 * 2),
    "what_where": (WHAT_WHERE, 2 * (8 + 10)),
    "ln_convlstm": (LN_CONVLSTM, 58),
    "tagger": (TAGGER, 17),
    "tagger_step": (TAGGER_STEP, 2 * 13),
}


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

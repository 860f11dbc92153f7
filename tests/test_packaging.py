"""The sdist builds, the wheel holds what it should, and a build that cannot succeed says why in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IN_SOURCE = (ROOT / "setup.py").exists()
pytestmark = pytest.mark.skipif(not IN_SOURCE, reason="needs the source folder")


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist: what PyPI would have."""
    folder = tmp_path_factory.mktemp("sdist")
    # Of a clean copy: setuptools also takes what an older egg-info lists, and would hide a line missing in MANIFEST.in.
    clean = tmp_path_factory.mktemp("clean") / "ladderfast"
    built = ("build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", ".*")
    shutil.copytree(ROOT, clean, ignore=shutil.ignore_patterns(*built))
    code = "import sys, _build_backend as b; print(b.build_sdist(sys.argv[1]))"
    made = run(sys.executable, "-c", code, str(folder), cwd=clean)
    assert made.returncode == 0, made.stderr[-2000:]
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(p for p in folder.iterdir() if p.is_dir())


# An editable install of the same package would fill in what the wheel lacks.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"


def pip(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--no-build-isolation",
        "--no-deps",
        "--no-cache-dir",
        cwd=cwd,
        **env,
    )


def test_sdist_holds_what_a_build_needs(source: Path):
    wanted = (
        "setup.py",
        "_build_backend.py",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "csrc/ops.cpp",
        "csrc/math/combinator.h",
        "csrc/cpu/vec.h",
        "csrc/cuda/combinator.cu",
        "tests/conftest.py",
        "bench/table.py",
        "ladderfast/recipes/digits.yaml",
    )
    for name in wanted:
        assert (source / name).exists(), name


def assert_data(names: list[str]) -> None:
    """A wheel has the type marker and every recipe."""
    assert "ladderfast/py.typed" in names
    recipes = {f"ladderfast/recipes/{path.name}" for path in (ROOT / "ladderfast" / "recipes").glob("*.yaml")}
    assert recipes
    assert recipes <= set(names)


def test_a_wheel_without_the_extension(source: Path, tmp_path: Path):
    built = pip("wheel", ".", "-w", str(tmp_path), cwd=source, LADDERFAST_CPP="0")
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t.split("-")[0] for t in tops} == {"ladderfast"}
    assert_data(names)
    assert not [n for n in names if n.endswith((".so", ".cpp", ".cu", ".h"))]

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = ALONE + (
        "import torch, ladderfast\n"
        "from ladderfast.ops import backend\n"
        "c = ladderfast.nn.GaussianCombinator(3)\n"
        "c(torch.randn(4, 3), torch.randn(4, 3)).sum().backward()\n"
        "print(ladderfast.__file__, backend.choose('op', 'cpu', torch.float32))\n"
        # Everything: every op by itself, a network in training, and what info says.
        "from ladderfast import info, ops\n"
        "print({backend.choose(op, 'cpu', torch.float32) for op in info.OPS} == {'reference'})\n"
        "x, z, m = torch.rand(2, 5), torch.rand(2, 3, 5), torch.full((2, 3, 5), 1 / 3)\n"
        "ops.gaussian_group_inputs(x, z, m, 0.5); ops.bernoulli_mixture_nll(x, z, m)\n"
        "ops.soft_pool2d(torch.rand(1, 2, 4, 4), 2, 1.0)\n"
        "run = ladderfast.Run('digits', folder=None, progress=False, epochs=1)\n"
        "print('test_error' in run.fit(), 'extension         none: ' in info.text())\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    assert words == [str(site / "ladderfast" / "__init__.py"), "reference", "True", "True", "True"]


def test_a_wheel_with_the_extension(source: Path, tmp_path: Path):
    # Unoptimised: what is tested is what the wheel holds, and that takes a third of the time.
    built = pip("wheel", ".", "-w", str(tmp_path), cwd=source, LADDERFAST_CUDA="0", LADDERFAST_CXXFLAGS="-O0")
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for extension in ("_C", "_autograd"):
        assert [n for n in names if n.startswith(f"ladderfast/{extension}.") and n.endswith(".so")]
    assert_data(names)
    assert not [n for n in names if n.startswith(("csrc", "tests", "bench"))]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        ALONE + "from ladderfast import _extension as e\n"
        "print(e.module.__file__, e.module.instruction_set(), e.nodes_reason)"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site), LADDERFAST_ISA="baseline")
    assert done.stdout.startswith(str(site)), done.stderr[-2000:]
    assert done.stdout.split()[1:] == ["baseline", "None"]


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found (looked for no-such-compiler)"),
        ({"LADDERFAST_CUDA": "yes"}, "LADDERFAST_CUDA is 'yes'; it must be one of auto, 0, 1."),
        ({"LADDERFAST_CPP": "maybe"}, "LADDERFAST_CPP is 'maybe'; it must be one of 0, 1."),
        ({"LADDERFAST_CXXFLAGS": "'"}, """LADDERFAST_CXXFLAGS is "'", which is no list of options"""),
    ],
    ids=["no compiler", "CUDA", "CPP", "CXXFLAGS"],
)
def test_a_build_that_cannot_succeed_says_why(
    source: Path, tmp_path: Path, env: dict[str, str], sentence: str
):
    done = run(sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path), cwd=source, **env)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_pip_shows_the_sentence_too(source: Path, tmp_path: Path):
    done = pip("wheel", ".", "-w", str(tmp_path), cwd=source, CXX="no-such-compiler")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "no C++ compiler was found (looked for no-such-compiler)" in said
    assert "Traceback" not in said


def test_cuda_asked_for_in_vain(source: Path, tmp_path: Path):
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    done = run(
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path),
        cwd=source,
        LADDERFAST_CUDA="1",
    )
    assert done.returncode != 0
    assert "LADDERFAST_CUDA=1, but the installed torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_torch_is_asked_for_only_where_there_is_none():
    """What pip would install for the build: no torch here, torch where the environment has none."""
    code = "import _build_backend as b; print(b.get_requires_for_build_wheel())"
    assert "torch" not in run(sys.executable, "-c", code, cwd=ROOT).stdout
    hidden = (
        "import sys, importlib.util as u\n"
        "u.find_spec = lambda name: None\n"
        "sys.executable = '/bin/true'\n"  # an interpreter that finds no torch either
    )
    assert "torch>=2.10" in run(sys.executable, "-c", hidden + code, cwd=ROOT).stdout
    assert "torch" not in run(sys.executable, "-c", hidden + code, cwd=ROOT, LADDERFAST_CPP="0").stdout


def test_the_torch_that_is_there_is_found_from_pips_isolation(tmp_path: Path):
    """pip hides the environment's packages from the build by a sitecustomize of its own on PYTHONPATH."""
    import setuptools

    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "sitecustomize.py").write_text(
        "import sys\nsys.path = [p for p in sys.path if not p.endswith(('site-packages', 'dist-packages'))]\n"
    )
    site = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "pkg_resources", "_distutils_hack"):
        if (site / name).exists():
            (overlay / name).symlink_to(site / name)
    code = (
        "import importlib.util as u\n"
        "before = u.find_spec('torch')\n"
        "import _build_backend as b\n"
        "wanted = b.get_requires_for_build_wheel()\n"
        "print('found', before, wanted, u.find_spec('torch') is not None)\n"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(overlay), PYTHONNOUSERSITE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "found None [] True"

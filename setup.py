"""Builds the extension `ladderfast._C`, and beside it `ladderfast._autograd`.

Environment:
    LADDERFAST_CPP=0           install without the extension; everything runs on the reference
    LADDERFAST_CUDA=auto|0|1   CUDA kernels: where torch has CUDA and nvcc is found (auto), never, or else fail
    TORCH_CUDA_ARCH_LIST       architectures, as for every torch extension; "8.0;9.0+PTX" where no GPU is seen
    LADDERFAST_CXXFLAGS        further options for the C++ compiler, which win over ours: -g, -O0 (CXXFLAGS come first)
    MAX_JOBS                   compilers at once
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from typing import NoReturn

from setuptools import setup


def stop(message: str) -> NoReturn:
    sys.exit(f"\nladderfast: {message}\n")


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        stop(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
    return value


def options(name: str) -> list[str]:
    value = os.environ.get(name, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        stop(f"{name} is {value!r}, which is no list of options: {error}.")


def nvcc_version(cuda_home: str | None) -> str | None:
    """Release of nvcc, such as "13.0", or None where there is none."""
    nvcc = os.path.join(cuda_home, "bin", "nvcc") if cuda_home else shutil.which("nvcc")
    if nvcc is None or not os.path.exists(nvcc):
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return text.split("release ")[1].split(",")[0] if "release " in text else None


def cuda_wanted(torch) -> bool:
    from torch.utils import cpp_extension

    asked = choice("LADDERFAST_CUDA", "auto", ("auto", "0", "1"))
    if asked == "0":
        return False
    reason = None
    if torch.version.cuda is None:
        reason = f"the installed torch {torch.__version__} has no CUDA"
    elif (found := nvcc_version(cpp_extension.CUDA_HOME)) is None:
        reason = "nvcc was not found (set CUDA_HOME)"
    elif found.split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"nvcc is of CUDA {found} and torch {torch.__version__} of CUDA {torch.version.cuda}"
    if reason and asked == "1":
        stop(f"LADDERFAST_CUDA=1, but {reason}.")
    return reason is None


def extensions():
    try:
        import torch
    except ImportError:
        stop(
            "building the extension needs torch >= 2.10. Install torch first (and pass --no-build-isolation to tools "
            "that build in an environment of their own), or set LADDERFAST_CPP=0 to install without the extension."
        )
    from torch.utils import cpp_extension

    names = os.environ["CXX"].split()[:1] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        stop(
            f"no C++ compiler was found (looked for {', '.join(names)}). Install one, for example with "
            "'apt install g++', or set LADDERFAST_CPP=0 to install without the extension."
        )
    os.environ.setdefault("CXX", found)  # torch would look for c++ alone

    sources = ["csrc/ops.cpp", "csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    version = f'-DLADDERFAST_TORCH_VERSION="{torch.__version__}"'
    # Python's own options often ask for debugging information, which takes longer and fills the wheel.
    last = ["-g0", *options("LADDERFAST_CXXFLAGS")]
    cxx = [
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wall",
        "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        version,
        *last,
    ]
    include_dirs = ["csrc"]
    if importlib.util.find_spec("pybind11") is not None:  # torch carries pybind11's headers too
        import pybind11

        include_dirs.append(pybind11.get_include())
    arguments = {"include_dirs": include_dirs}
    autograd = cpp_extension.CppExtension(
        "ladderfast._autograd",
        ["csrc/autograd.cpp"],
        extra_compile_args={"cxx": ["-O2", "-std=c++20", "-fvisibility=hidden", "-Wall", version, *last]},
        **arguments,
    )
    if not cuda_wanted(torch):
        kernels = cpp_extension.CppExtension(
            "ladderfast._C", sources, extra_compile_args={"cxx": cxx}, **arguments
        )
        return [kernels, autograd]

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")
    else:
        devices = range(torch.cuda.device_count())
        architectures = ";".join(
            sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in devices})
        )
        architectures += "+PTX"  # so that it runs on later GPUs too
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    cxx += [
        "-DUSE_CUDA",
        "-DLADDERFAST_WITH_CUDA",
        f'-DLADDERFAST_CUDA_ARCHITECTURES="{architectures}"',
        f'-DLADDERFAST_CUDA_VERSION="{torch.version.cuda}"',
    ]
    kernels = cpp_extension.CUDAExtension(
        "ladderfast._C",
        sources + sorted(glob("csrc/cuda/*.cu")),
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++17"]},
        **arguments,
    )
    return [kernels, autograd]


def main() -> None:
    if choice("LADDERFAST_CPP", "1", ("0", "1")) == "0":
        setup()
        return
    building = any(
        command.startswith(("build", "bdist", "editable", "develop", "install")) for command in sys.argv[1:]
    )
    if not building:  # metadata and sdist need neither torch nor a compiler
        setup()
        return
    modules = extensions()
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """All must be built but the nodes of autograd, which a later torch's headers may refuse: Python's then do."""

        def build_extension(self, ext):
            if ext.name != "ladderfast._autograd":
                return super().build_extension(ext)
            try:
                return super().build_extension(ext)
            except Exception as error:
                ext.optional = True  # nothing to copy; nor is what an earlier build left to be taken for it
                built = self.get_ext_fullpath(ext.name)
                for path in (built, os.path.join("ladderfast", os.path.basename(built))):
                    if os.path.exists(path):
                        os.remove(path)
                print(
                    f"\nladderfast: goes without its autograd nodes in C++, which were not built: {error}\n"
                )

    setup(ext_modules=modules, cmdclass={"build_ext": Build})


main()

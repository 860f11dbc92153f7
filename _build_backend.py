"""In-tree PEP 517 backend: setuptools, building against the torch that is already installed.

pip builds in an isolated environment. Were torch a build requirement, pip would download the newest one and the
extension would be built against that instead of the user's. So the environment that pip runs in is made visible, and
torch is asked for only where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)


def _torch_importable() -> bool:
    if importlib.util.find_spec("torch") is not None:
        return True
    # The interpreter without what pip isolates the build by: its own packages, the system's and the user's.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, check=False
    )
    folder = found.stdout.strip()
    if folder:
        sys.path.append(os.path.dirname(folder))
    return bool(folder)


_FOUND = _torch_importable()


def _torch_requirement() -> list[str]:
    wanted = os.environ.get("LADDERFAST_CPP", "1") != "0"
    return ["torch>=2.10"] if wanted and not _FOUND else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()

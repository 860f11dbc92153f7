"""In-tree PEP 517 backend: setuptools, building against the torch that is already installed.

pip builds in an isolated environment. Were torch a build requirement, pip would download the newest one and the
extension would be built against that instead of the user's. So the environment that pip runs in is made visible, and
torch is asked for only where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)


def _torch_importable() -> bool:
    if importlib.util.find_spec("torch") is not None:
        return True
    for name in ("purelib", "platlib"):
        path = sysconfig.get_paths()[name]
        if path not in sys.path and os.path.isdir(os.path.join(path, "torch")):
            sys.path.append(path)
            return True
    return False


_FOUND = _torch_importable()


def _torch_requirement() -> list[str]:
    wanted = os.environ.get("LADDERFAST_CPP", "1") != "0"
    return ["torch>=2.10"] if wanted and not _FOUND else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()

"""The compiled extension, if there is one. Importing it registers torch.ops.ladderfast.*. Beside it are the autograd
nodes of ops on the CPU, which hold for one version of torch alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])

module: ModuleType | None = None
reason: str | None = None  # why there is none

try:
    import torch  # its libraries must be loaded first

    module = importlib.import_module("ladderfast._C")
except ModuleNotFoundError:
    reason = "the extension was not built (LADDERFAST_CPP=0, or the package is used from its source folder)"
except (ImportError, OSError) as error:
    reason = f"the extension does not load: {error}"


def _load_nodes() -> tuple[ModuleType | None, str | None]:
    """The autograd nodes, or why there are none."""
    if module is None:
        return None, reason
    try:
        found = importlib.import_module("ladderfast._autograd")
    except ModuleNotFoundError:
        return None, "they were not built"
    except (ImportError, OSError) as error:
        return None, f"they do not load: {error}"
    version = getattr(found, "torch_version", "?")
    if version != torch.__version__:
        return None, f"they were built against torch {version}, and this is {torch.__version__}"
    return found, None


nodes, nodes_reason = _load_nodes()


def register_fake(name: str) -> Callable[[F], F]:
    """torch.library.register_fake for an op of the extension. One that lacks the op was built from other sources: it is
    then as if there were none, so that importing the package does not fail."""

    def register(function: F) -> F:
        global module, reason
        if module is not None and not hasattr(torch.ops.ladderfast, name):
            module, reason = (
                None,
                f"the extension was built from other sources: it lacks {name}; build it again",
            )
        if module is not None:
            torch.library.register_fake(f"ladderfast::{name}")(function)
        return function

    return register

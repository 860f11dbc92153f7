"""The compiled extension, if there is one. Importing it registers torch.ops.ladderfast.*."""

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

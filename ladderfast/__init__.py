"""ladderfast: Ladder-family networks for PyTorch on hand-written kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ladderfast import models, nn, ops
from ladderfast.ops.backend import use_backend

if TYPE_CHECKING:
    from ladderfast import data as data
    from ladderfast import training as training
    from ladderfast.training import Run as Run

__version__ = "0.1.0"

__all__ = ["__version__", "models", "nn", "ops", "use_backend"]


def __getattr__(name: str) -> Any:
    # Training and data need more packages than the modules and ops do: they are imported with the first use.
    if name == "Run":
        from ladderfast.training import Run

        return Run
    if name in ("data", "training"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

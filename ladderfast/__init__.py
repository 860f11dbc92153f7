"""ladderfast: Ladder-family networks for PyTorch on hand-written kernels."""

from __future__ import annotations

from ladderfast import models, nn, ops
from ladderfast.ops.backend import use_backend

__version__ = "0.1.0"

__all__ = ["__version__", "models", "nn", "ops", "use_backend"]

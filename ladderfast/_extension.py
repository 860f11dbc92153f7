"""The compiled extension, if there is one. Importing it registers torch.ops.ladderfast.*."""

from __future__ import annotations

import importlib
from types import ModuleType

module: ModuleType | None = None
reason: str | None = None  # why there is none

try:
    import torch  # noqa: F401  (its libraries must be loaded first)

    module = importlib.import_module("ladderfast._C")
except ModuleNotFoundError:
    reason = "the extension was not built (LADDERFAST_CPP=0, or the package is used from its source folder)"
except (ImportError, OSError) as error:
    reason = f"the extension does not load: {error}"

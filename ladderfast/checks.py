"""What modules, networks, data and objectives check alike of a number they are given."""

from __future__ import annotations

import math
import operator
from typing import Any


def check_whole(name: str, value: Any) -> None:
    """TypeError unless value is a whole number, Python's or another library's; True and False are none."""
    try:
        whole = not isinstance(value, bool) and operator.index(value) is not None
    except TypeError:
        whole = False
    if not whole:
        raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """TypeError unless value is a number, finite or not."""
    try:
        math.isfinite(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None

"""What a run is judged by: the one figure that is measured after every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """The figure that a run is judged by.

    Args:
        name: its key in results and in the history.
        words: its name for readers.
        unit: "%", "nats" or none.
        higher_is_better: False for errors and costs.
    """

    name: str = "test_error"
    words: str = "test error"
    unit: str = "%"
    higher_is_better: bool = False

    @property
    def validation(self) -> str:
        """The key of the same figure on validation samples."""
        return f"validation_{self.name.removeprefix('test_')}"

    def text(self, figures: Mapping[str, Any], *, unit: bool = True) -> str:
        """The figure as people write it, with the deviation over the seeds where there are several."""
        spread = figures.get(f"{self.name}_std")
        more = "" if spread is None else f" ± {self._number(spread)}"
        return f"{self._number(figures[self.name])}{more}{self._unit() if unit else ''}"

    def published(self, text: str) -> str:
        """A published figure with its unit."""
        return text if not self.unit or self.unit in text else f"{text}{self._unit()}"

    def better(self, a: float, b: float) -> bool:
        """Whether a is a better figure than b."""
        return a > b if self.higher_is_better else a < b

    def _number(self, value: float) -> str:
        return f"{value:.2f}" if self.unit else f"{value:.3f}"

    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""

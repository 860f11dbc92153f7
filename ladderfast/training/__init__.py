"""Training: recipes, objectives, the loop, checkpoints, logs and reports.

It needs the packages of the extra `train`; the modules and ops do not.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Run as Run

_NEEDED = ("jsonargparse", "lightning_fabric", "matplotlib", "rich", "sklearn", "tensorboard", "yaml")
_INSTEAD = {"lightning_fabric": "lightning"}  # the larger package has it as well


def _check_installed() -> None:
    missing = [
        name
        for name in _NEEDED
        if find_spec(name) is None and not (name in _INSTEAD and find_spec(_INSTEAD[name]) is not None)
    ]
    if missing:
        raise ImportError(f'training needs {", ".join(missing)}: pip install "ladderfast[train]"')


_check_installed()

# Only now: these import what was looked for.
from .metric import Metric  # noqa: E402
from .music_objective import PianoRollObjective  # noqa: E402
from .objectives import LadderObjective, Objective  # noqa: E402
from .recipe import Recipe, read_recipe, recipe_names  # noqa: E402
from .rladder_objective import RLadderObjective  # noqa: E402
from .swwae_objective import EquivarianceObjective, SWWAEObjective, WhereObjective  # noqa: E402
from .tagger_objective import TaggerObjective  # noqa: E402

__all__ = [
    "EquivarianceObjective",
    "LadderObjective",
    "Metric",
    "Objective",
    "PianoRollObjective",
    "RLadderObjective",
    "Recipe",
    "Run",
    "SWWAEObjective",
    "TaggerObjective",
    "WhereObjective",
    "read_recipe",
    "recipe_names",
]


def __getattr__(name: str) -> Any:
    # With Run comes Lightning Fabric, a second's import, which a list of recipes does without.
    if name == "Run":
        from .run import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

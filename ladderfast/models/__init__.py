"""The networks."""

from ladderfast.models.ladder import LadderNetwork, LadderOutput
from ladderfast.models.swwae import SWWAE, SWWAEComparison, SWWAEOutput

__all__ = ["SWWAE", "LadderNetwork", "LadderOutput", "SWWAEComparison", "SWWAEOutput"]

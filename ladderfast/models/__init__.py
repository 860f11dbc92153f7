"""The networks."""

from ladderfast.models.ladder import LadderNetwork, LadderOutput

__all__ = ["LadderNetwork", "LadderOutput"]

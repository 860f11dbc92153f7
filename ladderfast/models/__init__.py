"""The networks."""

from ladderfast.models.ladder import LadderNetwork, LadderOutput
from ladderfast.models.tagger import Tagger, TaggerOutput

__all__ = ["LadderNetwork", "LadderOutput", "Tagger", "TaggerOutput"]

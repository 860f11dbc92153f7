"""The networks."""

from ladderfast.models.ladder import LadderNetwork, LadderOutput
from ladderfast.models.recurrent_ladder import Level, RLadder, RLadderOutput, RLadderState

__all__ = ["LadderNetwork", "LadderOutput", "Level", "RLadder", "RLadderOutput", "RLadderState"]

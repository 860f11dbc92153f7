"""The networks."""

from ladderfast.models.baselines import PlainLSTM
from ladderfast.models.ladder import LadderNetwork, LadderOutput
from ladderfast.models.recurrent_ladder import Level, RLadder, RLadderOutput, RLadderState

__all__ = ["LadderNetwork", "LadderOutput", "Level", "PlainLSTM", "RLadder", "RLadderOutput", "RLadderState"]

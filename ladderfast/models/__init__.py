"""The networks."""

from ladderfast.models.baselines import PlainLSTM
from ladderfast.models.ladder import LadderNetwork, LadderOutput
from ladderfast.models.recurrent_ladder import Level, RLadder, RLadderOutput, RLadderState
from ladderfast.models.rtagger import RTagger
from ladderfast.models.swwae import SWWAE, SWWAEComparison, SWWAEOutput
from ladderfast.models.tagger import PUBLISHED_BINARY, PUBLISHED_CONTINUOUS, Tagger, TaggerOutput

__all__ = [
    "PUBLISHED_BINARY",
    "PUBLISHED_CONTINUOUS",
    "SWWAE",
    "LadderNetwork",
    "LadderOutput",
    "Level",
    "PlainLSTM",
    "RLadder",
    "RLadderOutput",
    "RLadderState",
    "RTagger",
    "SWWAEComparison",
    "SWWAEOutput",
    "Tagger",
    "TaggerOutput",
]

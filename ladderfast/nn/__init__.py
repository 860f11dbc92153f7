"""Drop-in modules: parameters, published start values, and the ops beneath them."""

from ladderfast.nn.combinator import (
    COMBINATORS,
    AdditiveCombinator,
    BilinearCombinator,
    GaussianCombinator,
    SigmoidCombinator,
    SigmoidNoProductCombinator,
    make_combinator,
)
from ladderfast.nn.gamma_head import GammaHead, GammaOutput
from ladderfast.nn.ladder_decoder import LadderDecoderLayer
from ladderfast.nn.ladder_encoder import LadderEncoderLayer
from ladderfast.nn.ln_convlstm import (
    LayerNormConvLSTM,
    LayerNormConvLSTMCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
)
from ladderfast.nn.recurrent_ladder import (
    ChannelLayerNorm,
    DecoderGate,
    LayerNormGRUCell,
    StepBatchNorm,
    TopDown,
)
from ladderfast.nn.what_where import SoftPool2d, SoftUnpool2d, WhereMaxPool2d, WhereMaxUnpool2d

__all__ = [
    "COMBINATORS",
    "AdditiveCombinator",
    "BilinearCombinator",
    "ChannelLayerNorm",
    "DecoderGate",
    "GammaHead",
    "GammaOutput",
    "GaussianCombinator",
    "LadderDecoderLayer",
    "LadderEncoderLayer",
    "LayerNormConvLSTM",
    "LayerNormConvLSTMCell",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "SigmoidCombinator",
    "SigmoidNoProductCombinator",
    "SoftPool2d",
    "SoftUnpool2d",
    "StepBatchNorm",
    "TopDown",
    "WhereMaxPool2d",
    "WhereMaxUnpool2d",
    "make_combinator",
]

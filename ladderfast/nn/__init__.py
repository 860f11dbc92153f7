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

__all__ = [
    "COMBINATORS",
    "AdditiveCombinator",
    "BilinearCombinator",
    "GammaHead",
    "GammaOutput",
    "GaussianCombinator",
    "LadderDecoderLayer",
    "LadderEncoderLayer",
    "SigmoidCombinator",
    "SigmoidNoProductCombinator",
    "make_combinator",
]

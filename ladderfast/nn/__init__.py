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
from ladderfast.nn.ln_convlstm import LayerNormConvLSTM, LayerNormConvLSTMCell, LayerNormLSTM

__all__ = [
    "COMBINATORS",
    "AdditiveCombinator",
    "BilinearCombinator",
    "GaussianCombinator",
    "LayerNormConvLSTM",
    "LayerNormConvLSTMCell",
    "LayerNormLSTM",
    "SigmoidCombinator",
    "SigmoidNoProductCombinator",
    "make_combinator",
]

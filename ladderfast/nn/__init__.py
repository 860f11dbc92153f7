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

__all__ = [
    "COMBINATORS",
    "AdditiveCombinator",
    "BilinearCombinator",
    "GaussianCombinator",
    "SigmoidCombinator",
    "SigmoidNoProductCombinator",
    "make_combinator",
]

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
from ladderfast.nn.what_where import SoftPool2d, SoftUnpool2d, WhereMaxPool2d, WhereMaxUnpool2d

__all__ = [
    "COMBINATORS",
    "AdditiveCombinator",
    "BilinearCombinator",
    "GaussianCombinator",
    "SigmoidCombinator",
    "SigmoidNoProductCombinator",
    "SoftPool2d",
    "SoftUnpool2d",
    "WhereMaxPool2d",
    "WhereMaxUnpool2d",
    "make_combinator",
]

"""The ops as functions on tensors. Each has the same formula in ladderfast.reference."""

from ladderfast.ops.combinator import gaussian_combinator

__all__ = ["gaussian_combinator"]

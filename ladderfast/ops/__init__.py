"""The ops as functions on tensors. Each has the same formula in ladderfast.reference."""

from ladderfast.ops.combinator import gaussian_combinator
from ladderfast.ops.what_where import soft_pool2d, soft_unpool2d

__all__ = ["gaussian_combinator", "soft_pool2d", "soft_unpool2d"]

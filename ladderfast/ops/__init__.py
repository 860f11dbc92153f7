"""The ops as functions on tensors. Each has the same formula in ladderfast.reference."""

from ladderfast.ops.combinator import gaussian_combinator
from ladderfast.ops.ln_convlstm import ln_convlstm_step

__all__ = ["gaussian_combinator", "ln_convlstm_step"]

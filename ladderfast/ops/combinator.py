"""gaussian_combinator (temporary: reference only while the kernels are being written)."""
from ladderfast.reference.combinator import gaussian_combinator

__all__ = ["gaussian_combinator"]

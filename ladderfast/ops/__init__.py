from ladderfast.ops.combinator import gaussian_combinator

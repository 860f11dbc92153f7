from ladderfast.nn.combinator import GaussianCombinator

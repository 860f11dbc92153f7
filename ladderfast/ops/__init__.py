"""The ops as functions on tensors. Each has the same formula in ladderfast.reference."""

from ladderfast.ops.combinator import gaussian_combinator
from ladderfast.ops.ladder_decoder import ladder_decoder
from ladderfast.ops.ladder_encoder import ladder_encoder
from ladderfast.ops.ln_convlstm import ln_convlstm_step
from ladderfast.ops.tagger import (
    bernoulli_group_inputs,
    bernoulli_mixture_nll,
    gaussian_group_inputs,
    gaussian_mixture_nll,
)
from ladderfast.ops.tagger_step import (
    bernoulli_step_inputs,
    bernoulli_step_outputs,
    gaussian_step_inputs,
    gaussian_step_outputs,
)
from ladderfast.ops.what_where import soft_pool2d, soft_unpool2d, where_max_pool2d, where_max_unpool2d

__all__ = [
    "bernoulli_group_inputs",
    "bernoulli_mixture_nll",
    "bernoulli_step_inputs",
    "bernoulli_step_outputs",
    "gaussian_combinator",
    "gaussian_group_inputs",
    "gaussian_mixture_nll",
    "gaussian_step_inputs",
    "gaussian_step_outputs",
    "ladder_decoder",
    "ladder_encoder",
    "ln_convlstm_step",
    "soft_pool2d",
    "soft_unpool2d",
    "where_max_pool2d",
    "where_max_unpool2d",
]

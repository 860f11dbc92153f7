"""What the public functions of all ops refuse alike."""

from __future__ import annotations

import re

import pytest
import torch

import ladderfast
from ladderfast import info, ops
from ladderfast.ops import backend

Z, C, IMAGE = torch.ones(4, 3), torch.ones(3), torch.ones(2, 3, 4, 6)
X, GROUPS, UNIT = torch.ones(2, 5), torch.ones(2, 3, 5), torch.ones(())
STEP = {"x": X, "z_pre": GROUPS, "mask_pre": GROUPS, "z_weight": X[0], "z_bias": X[0], "mask_weight": UNIT}
ARGUMENTS = {
    "gaussian_combinator": {"z": Z, "u": Z, "params": torch.ones(10, 3)},
    "ladder_decoder": {"u": Z, "z": Z, "params": torch.ones(10, 3), "clean_z": Z, "mean": C, "var": C},
    "ladder_encoder": {"z_pre": Z, "beta": C, "gamma": C, "noise_state": torch.tensor([3, 0])},
    "ln_convlstm_step": {
        "gates_in": torch.ones(4, 12),
        "gates_rec": torch.ones(4, 12),
        "c": Z,
        "weight": torch.ones(12),
        "bias": torch.ones(12),
        "cell_weight": C,
        "cell_bias": C,
    },
    "gaussian_group_inputs": {"x": X, "z": GROUPS, "m": GROUPS, "variance": UNIT},
    "bernoulli_group_inputs": {"x": X, "z": GROUPS, "m": GROUPS, "flip_prob": UNIT},
    "gaussian_mixture_nll": {"x": X, "z": GROUPS, "m": GROUPS, "variance": UNIT},
    "bernoulli_mixture_nll": {"x": X, "z": GROUPS, "m": GROUPS},
    "gaussian_step_inputs": {"x": X, "z": GROUPS, "mask_logits": GROUPS, "variance": UNIT},
    "bernoulli_step_inputs": {"x": X, "z": GROUPS, "mask_logits": GROUPS, "flip_prob": UNIT},
    "gaussian_step_outputs": {**STEP, "variance": UNIT},
    "bernoulli_step_outputs": STEP,
    "soft_pool2d": {"z": IMAGE},
    "soft_unpool2d": {"what": IMAGE, "where": torch.ones(2, 3, 2, 4, 6)},
    "where_max_pool2d": {"z": IMAGE},
    "where_max_unpool2d": {"what": IMAGE, "where": torch.zeros(IMAGE.shape, dtype=torch.int64)},
}
MORE = {
    "ladder_encoder": {"num_labelled": 2, "noise_std": 0.3},
    "soft_pool2d": {"kernel_size": 2, "beta": 1.0},
    "soft_unpool2d": {"kernel_size": 2},
    "where_max_pool2d": {"kernel_size": 2},
    "where_max_unpool2d": {"kernel_size": 2},
}


def test_every_op_is_here():
    assert set(ARGUMENTS) == set(info.OPS)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_what_is_not_dense_is_refused(op, which):
    if (reason := backend.unavailable(which, "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    with ladderfast.use_backend(which):
        getattr(ops, op)(**ARGUMENTS[op], **MORE.get(op, {}))
        for name, t in ARGUMENTS[op].items():
            for other in (t.to_sparse(), torch.nested.nested_tensor([t, t])):
                with pytest.raises(TypeError, match=re.escape(f"{op}: {name} must be a dense tensor; got ")):
                    getattr(ops, op)(**{**ARGUMENTS[op], name: other}, **MORE.get(op, {}))

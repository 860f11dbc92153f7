"""What is checked alike everywhere of a number that is given."""

from __future__ import annotations

import numpy as np
import pytest

from ladderfast.checks import check_whole
from ladderfast.nn import GaussianCombinator
from ladderfast.nn.checks import odd, positive


@pytest.mark.parametrize("value", [3, -2, np.int64(3), np.uint8(7)])
def test_a_whole_number_may_be_numpys(value):
    check_whole("n", value)


@pytest.mark.parametrize("value", [True, False, np.True_, 3.0, np.float64(3), "3", None, [3]])
def test_what_is_no_whole_number(value):
    with pytest.raises(TypeError, match=r"^n must be a whole number, got "):
        check_whole("n", value)


def test_sizes_become_pythons():
    assert type(positive("n", np.int32(2))) is int
    assert type(odd("n", np.int32(3))) is int
    with pytest.raises(ValueError, match="n must be odd and positive, got 4"):
        odd("n", np.int32(4))
    assert GaussianCombinator(np.int64(5)).num_features == 5

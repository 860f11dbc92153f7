import copy

import pytest
from small_recipe import RECIPE


@pytest.fixture
def small():
    """A recipe that trains in well under a second: five steps an epoch, two epochs."""
    return copy.deepcopy(RECIPE)

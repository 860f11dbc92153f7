"""The README's examples run, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def examples() -> list[str]:
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    return [block for block in blocks if "ladderfast.Run(" not in block]  # those take minutes


@pytest.mark.skipif(not README.exists(), reason="the package was installed without its README")
def test_examples() -> None:
    names: dict[str, object] = {}
    for block in examples():
        exec(compile(block, "README.md", "exec"), names)
    assert "GammaHead(10)" in "".join(examples())
    logits, cost = names["logits"], names["cost"]
    assert isinstance(logits, torch.Tensor)
    assert isinstance(cost, torch.Tensor)
    assert logits.shape == (100, 10)
    assert cost.isfinite()

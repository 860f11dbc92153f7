"""What a run shows while it trains, on terminals wide and narrow and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ladderfast.training import logs

FIGURES = {"test_error": 9.66, "validation_error": 8.9, "total": 11.32, "steps_per_second": 229.31}


def drawn(monkeypatch, width: int, title: str, *, terminal: bool = True) -> str:
    """The last thing that was shown after 120 of 200 steps."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    monkeypatch.setattr(logs, "Console", lambda **_: console)
    bar = logs.ProgressBar(title, 200, 119)
    bar.advance()
    bar.show(12, 20, FIGURES, ended=False)
    if not terminal:
        bar.show(20, 20, FIGURES, ended=True)
    bar.close()
    return [
        line
        for line in file.getvalue().replace("\r", "\n").replace("\x1b[2K", "").split("\n")
        if "12/20" in line or "20/20" in line
    ][-1]


def test_a_wide_terminal_shows_everything(monkeypatch):
    line = drawn(monkeypatch, 140, "digits")
    assert "digits 12/20" in line
    assert "test error 9.66 %, validation 8.90 %, cost 11.32, 229.3 steps/s" in line


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("digits", " test error 9.66 %, cost 11.32, 229.3/s "),
        ("occluded_small_convlstm_1000", " 9.66 %, cost 11.32, 229.3/s "),
    ],
)
def test_a_terminal_of_80_columns_has_error_cost_and_speed(monkeypatch, title, shown):
    line = drawn(monkeypatch, 80, title)
    assert shown in line
    assert "…" not in line
    assert len(line.rstrip()) <= 80
    assert "━" in line


def test_elsewhere_a_line_has_everything(monkeypatch):
    line = drawn(monkeypatch, 80, "digits", terminal=False)
    assert line == "digits: epoch 20/20, test error 9.66 %, validation 8.90 %, cost 11.32, 229.3 steps/s"

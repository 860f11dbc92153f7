"""The speed table: medians over the runs, and how far the ratio goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.from_path import load

TABLE = Path(__file__).parents[1] / "bench" / "table.py"
pytestmark = pytest.mark.skipif(not TABLE.exists(), reason="needs the source folder")


def run(ours: float, compiled: float, copy: float = 1e-3) -> dict:
    """A run of one case, times in ms."""
    info = {
        "op": "an_op",
        "shape": "(2, 3) float32",
        "phase": "both",
        "device": "cpu",
        "bytes_moved": 2 * 10**6,
        "bytes_kept": 2**20,
        "bytes_peak": None,
        "copy_seconds": copy,
        "call_seconds": 0.0,
    }
    return {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {"machine": "a machine", "threads": 2, "torch": "2"},
        "benchmarks": [
            {
                "fullname": variant,
                "extra_info": {**info, "variant": variant},
                "stats": {"median": time * 1e-3},
            }
            for variant, time in (("ladderfast", ours), ("plain", 20.0), ("compile", compiled))
        ],
    }


def written(tmp_path: Path, monkeypatch, *runs: dict) -> str:
    for k, one in enumerate(runs):
        (tmp_path / f"{k}.json").write_text(json.dumps(one))
    names = [str(tmp_path / f"{k}.json") for k in range(len(runs))]
    monkeypatch.setattr(sys, "argv", ["table.py", *names, "--out", str(tmp_path / "table.md")])
    load(TABLE).main()
    return (tmp_path / "table.md").read_text()


def test_of_several_runs_the_median_and_the_range(tmp_path, monkeypatch):
    text = written(tmp_path, monkeypatch, run(2, 8), run(4, 8), run(1, 6, copy=2e-3))
    measured = "Measured 2026-01-02 on a machine, 2 threads, torch 2, which copies 2 MiB at 2 GB/s; medians of 3 runs"
    assert measured in text
    # ours 2, compiled 8; the ratios 4, 2 and 6; a copy takes 1 ms, and 2 MB in 2 ms are a GB a second
    assert "| an_op | (2, 3) float32 | both | 2 | 20 | 8 | 4.0 (2.0 to 6.0) | 1 | 50% | 50% | 1 | 1 |" in text


def test_of_one_run_what_it_says(tmp_path, monkeypatch):
    text = written(tmp_path, monkeypatch, run(2, 8))
    assert "torch 2, which copies 2 MiB at 2 GB/s; medians.\n" in text
    assert "| 2 | 20 | 8 | 4.0 | 1 |" in text


def test_runs_of_other_benchmarks_do_not_mix(tmp_path, monkeypatch):
    other = run(2, 8)
    other["benchmarks"][0]["fullname"] = "another"
    with pytest.raises(SystemExit, match="not of the same benchmarks"):
        written(tmp_path, monkeypatch, run(2, 8), other)

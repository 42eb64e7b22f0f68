"""The benchmark of a step's overhead, small: every row is there, and its figures are consistent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--sequences", "3,6", "--steps", "20", "--warm-up", "60", "--step-ms", "4"]

pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "step_overhead.py"), *SMALL, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout


def test_every_number_of_sequences_and_ranks_has_a_row() -> None:
    summary = json.loads(run("--ranks", "1,2", "--json"))
    assert [row["sequences"] for row in summary["parts"]] == [3, 6]
    assert [(row["ranks"], row["sequences"]) for row in summary["overlap"]] == [(1, 3), (1, 6), (2, 3), (2, 6)]
    for row in summary["parts"]:
        assert 0 < row["mean_running"] <= row["sequences"]
        for part in ("scheduling", "tokens_back", "rank_inputs", "rank_drawing", "rank_output"):
            assert row[part]["mean"] > 0 and 0 <= row[part]["p50"] <= row[part]["p99"]
    for row in summary["overlap"]:
        assert row["transport"]["p50"] > 0
        for mode in ("device", "own_thread"):
            figures = row[mode]
            assert figures["period"]["p50"] >= 4.0 - 1e-6, "a step never takes less than its model"
            period = 4.0 + figures["unhidden"]["mean"] + figures["sleep_lateness"]["mean"]
            assert figures["period"]["mean"] <= 1.5 * period
            assert figures["unhidden_share"] == pytest.approx(figures["unhidden"]["mean"] / 4.0)


def test_prints_tables() -> None:
    lines = run("--ranks", "1").splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0] in ("3", "6")]
    assert [row[0] for row in rows] == ["3", "6", "3", "6"]
    assert all("holds" in row or "MISSED" in row for row in rows[2:])

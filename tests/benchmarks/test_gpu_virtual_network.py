"""The checks of virtual ranks run on a CPU as on a GPU, and find what is wrong."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_parts import virtual_network
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger
from gpu_parts.virtual_network import check_virtual_ranks, measure_virtual_ranks, run_virtual_network
from gpu_pipeline import SMALL_BATCHES

from engine import DType
from engine.model_config import Architecture
from engine.pipeline.trial import Trial
from engine.random_checkpoint import sized_config
from engine.virtual_ranks import VirtualAllReduce

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number format, one batch, two layers."""
    model = sized_config(Architecture.LLAMA)
    for name, value in {
        "TOLERANCES": {DType.FLOAT32: 1e-4},
        "SMALL_BATCHES": SMALL_BATCHES[-1:],
        "LARGE_BATCHES": {"mixed": SMALL_BATCHES[-1]},
        "_SMALL": model,
        "LARGE_SHAPE": model,
    }.items():
        monkeypatch.setattr(virtual_network, name, value)


def test_every_mode_is_compared_with_the_model_that_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(check_virtual_ranks(CPU))
    assert [row.name for row in rows] == [f"2 float32 {mode}" for mode in ("sequential", "nanobatch", "overlap")]
    assert all(row.is_right for row in rows)

    def lose_a_rank(self: VirtualAllReduce, output_TE: Any, partials_TX: Any, *, is_beside: bool = False) -> None:
        output_TE.copy_(partials_TX.chunk(2, dim=1)[0])

    monkeypatch.setattr(VirtualAllReduce, "start", lose_a_rank)
    assert not any(row.is_right for row in check_virtual_ranks(CPU))


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_what_there_is_no_time_for_is_said(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_network, "measure_virtual_ranks", lambda device, num_ctas, seconds: [])
    ledger = Ledger("pipeline", tmp_path, {}, quiet=True)
    run_virtual_network(ledger, Budget(seconds), CPU)
    notes = [row.note for row in ledger.rows]
    assert notes == ([NO_TIME] if seconds == 0 else ["", "", ""])


def test_timings_are_labelled_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [SimpleNamespace(seconds=seconds, rounds=()) for seconds in (0.002, 0.004, 0.001)]
    monkeypatch.setattr(Trial, "run", lambda self, contestants, batch, seconds: timings)
    rows = list(measure_virtual_ranks(CPU, 8, 1.0))
    assert [row.value for row in rows] == [2.0, 4.0, 1.0]
    assert [row.note for row in rows] == [f"EMULATION; {gain} x sequential" for gain in ("1.000", "0.500", "2.000")]
    assert all(row.is_right is None and "sums on 8 programs" in row.name for row in rows)

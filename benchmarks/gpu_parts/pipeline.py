"""The part `pipeline`: `gpu_pipeline`'s checks and timings as rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row
from gpu_parts.virtual_network import run_virtual_network
from gpu_pipeline import SECONDS_PER_TRIAL, check_pipeline, measure_pipeline

_LEAST_SECONDS = 10.0
_NUM_TRIALS = 4


def run_pipeline(ledger: Ledger, budget: Budget, device: torch.device, schedules: Path | None) -> None:
    """Right first; timings in the time that is left."""
    for row in check_pipeline(device):
        ledger.add(_checked(row))
    if not budget.has(_LEAST_SECONDS):
        ledger.skip("pipeline", "timings", NO_TIME)
        return
    seconds = min(SECONDS_PER_TRIAL, 0.5 * budget.left / _NUM_TRIALS)
    for row in measure_pipeline(device, schedules, seconds):
        for timed in _timed(row):
            ledger.add(timed)
    run_virtual_network(ledger, budget, device)


def _checked(row: dict[str, Any]) -> Row:
    return Row(
        group="pipeline",
        name=f"{row['model']} {row['dtype']} {row['mode']}",
        value=row["error"],
        unit="worst",
        is_right=row["is_right"],
        note=row.get("note", "" if row["same_tokens"] else "other tokens than the plain model's"),
    )


def _timed(row: dict[str, Any]) -> Iterator[Row]:
    for how in ("captured", "launched"):
        yield Row(
            group="pipeline",
            name=f"{row['batch']} {row['library']} {row['schedule']}, {how}",
            value=1e3 * row[f"{how}_seconds"],
            unit="ms",
            note=f"{row[f'{how}_gain']:.3f} x sequential",
            details=row,
        )

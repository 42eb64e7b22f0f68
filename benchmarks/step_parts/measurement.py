"""`measure`: everything this benchmark knows of one number of sequences and one number of ranks, as a row of figures.

Milliseconds: a figure is `mean`, `p50` and `p99` over the steps.
"""

from typing import Any, Final

import numpy as np
from step_parts.one_step_ahead import OverlappedRun, measure_transport, run_engine
from step_parts.rank_group import RankGroup
from step_parts.runner import measure_rank
from step_parts.scheduling import measure_scheduling, steady_batch
from step_parts.setting import Setting

SCHEDULING_LIMIT_MS: Final = {256: 0.3, 2048: 1.5}
TRANSPORT_LIMIT_MS: Final = {(256, 2): 0.5}
UNHIDDEN_LIMIT: Final = 0.02

Row = dict[str, Any]


def figure(seconds: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in milliseconds."""
    milliseconds = np.asarray(seconds) * 1e3
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {"mean": float(milliseconds.mean()), "p50": float(p50), "p99": float(p99)}


def measure_parts(num_running: int, num_steps: int, num_warm_up: int) -> Row:
    """What does not depend on the number of ranks: scheduling, and a rank's work around the model."""
    setting = Setting(num_running)
    times = measure_scheduling(setting, num_warm_up, num_steps)
    rank = measure_rank(setting.config, times.batches, len(times.compose))
    scheduling = [sum(pair) for pair in zip(times.compose, times.ends_and_arrivals, strict=True)]
    row: Row = {
        "sequences": num_running,
        "mean_running": float(np.mean(times.num_running)),
        "arrivals_per_step": times.num_arrivals / num_steps,
        "cached_prompt_share": times.cached_share,
        "scheduling": figure(scheduling),
        "tokens_back": figure(times.tokens_back),
        "scheduling_and_tokens_back": figure(times.all_of_it),
        "rank_inputs": figure(rank.inputs),
        "rank_drawing": figure(rank.drawing),
        "rank_output": figure(rank.output),
    }
    limit = SCHEDULING_LIMIT_MS.get(num_running)
    if limit is not None:
        row["scheduling_limit_ms"] = limit
        row["scheduling_holds"] = row["scheduling"]["mean"] < limit
    return row


async def measure_overlap(
    setting: Setting, group: RankGroup, *, num_steps: int, num_warm_up: int, step_ms: float
) -> Row:
    """What does: transport, and how much of a step's host time the device waits for."""
    transport = figure(await measure_transport(group, [steady_batch(setting.num_running)], 10 * num_steps))
    row: Row = {"sequences": setting.num_running, "ranks": setting.num_ranks, "transport": transport}
    limit = TRANSPORT_LIMIT_MS.get((setting.num_running, setting.num_ranks))
    if limit is not None:
        row |= {"transport_limit_ms": limit, "transport_holds": transport["p50"] < limit}
    for name, launches_ahead in (("device", True), ("own_thread", False)):
        run = await run_engine(
            setting,
            group,
            step_seconds=step_ms / 1e3,
            num_steps=num_steps,
            num_warm_up=num_warm_up,
            launches_ahead=launches_ahead,
        )
        row[name] = _overlapped(run, step_ms)
    row |= {"unhidden_limit": UNHIDDEN_LIMIT, "unhidden_holds": row["device"]["unhidden_share"] < UNHIDDEN_LIMIT}
    return row


def _overlapped(run: OverlappedRun, step_ms: float) -> Row:
    unhidden = figure(run.unhidden)
    return {
        "unhidden": unhidden,
        "unhidden_share": unhidden["mean"] / step_ms,
        "period": figure(run.periods),
        "sleep_lateness": figure(run.lateness),
        "schedule": figure(run.schedule),
        "send": figure(run.send),
        "deliver": figure(run.deliver),
        "message": figure(run.message),
        "mean_decodes": float(np.mean(run.num_decodes)),
    }

"""The server beside the engine alone, at saturation: tokens per second, with and without the client's processor time.

The client of a service runs elsewhere; here it takes its time from the same cores. Two corrections, neither of which
touches anything the server itself uses:

- *by time*: where cores were idle the client may have used those and cost nothing; the rest of its time is handed
  back to all cores evenly, tokens / (seconds - (client - idle) / cores). That is less than it took: an engine whose
  threads wait for each other at barriers stands still on all cores while one is taken from it.
- *by a stand-in*: the engine alone is measured again beside a process that takes as much processor time as the client
  did, in the same rhythm, once a step. Both sides then lose what a client takes, barriers included.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from http_path.client_stand_in import StandIn
from http_path.http_load import HttpLoad, LoadResult
from http_path.offline_run import run_offline
from http_path.server_process import ServerOptions, ServerProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturatedRun:
    """One run of the load. Rates are tokens out per second, times processor seconds."""

    tokens: int
    seconds: float
    client: float
    idle: float
    others: float
    by_role: Mapping[str, float]

    @classmethod
    def of(cls, result: LoadResult) -> "SaturatedRun":
        """From what the load took."""
        mine = sum(result.used.by_role.values()) + result.client
        return cls(
            tokens=result.num_output_tokens,
            seconds=result.seconds,
            client=result.client,
            idle=result.used.idle,
            others=max(0.0, result.used.busy - mine),
            by_role=result.used.by_role,
        )

    @property
    def rate(self) -> float:
        """As measured."""
        return self.tokens / self.seconds

    @property
    def corrected_rate(self) -> float:
        """With the client's time handed back."""
        return self.tokens / (self.seconds - max(0.0, self.client - self.idle) / num_cores())


def num_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0))


def measure_saturation(
    server: ServerProcess, ways: Mapping[str, str], options: ServerOptions, load: HttpLoad, num_rounds: int
) -> list[dict[str, Any]]:
    """A row for every way (name -> URL) to the server, beside the engine alone; rounds interleaved, medians."""
    for way in ways.values():
        load.run(server, way, seed=0)  # warms up, and does not count
    alone: list[float] = []
    beside: list[float] = []
    runs: dict[str, list[SaturatedRun]] = {way: [] for way in ways}
    for number in range(1, num_rounds + 1):
        with server.paused():
            alone.append(run_offline(options, load, number))
        for position, (way, url) in enumerate(ways.items()):
            runs[way].append(SaturatedRun.of(load.run(server, url, seed=number + 1000 * (position + 1))))
        last = runs[next(iter(ways))][-1]
        stand_in = StandIn(
            period_seconds=last.seconds / load.num_output_tokens, busy_seconds=last.client / load.num_output_tokens
        )
        with server.paused(), stand_in.running():
            beside.append(run_offline(options, load, number))
    return [_row(way, runs[way], alone, beside) for way in ways]


def _row(way: str, runs: Sequence[SaturatedRun], alone: Sequence[float], beside: Sequence[float]) -> dict[str, Any]:
    def median_of(values: Sequence[float]) -> float:
        return statistics.median(values)

    total = sum(run.seconds for run in runs) * num_cores()
    tokens = sum(run.tokens for run in runs)
    roles = sorted({role for run in runs for role in run.by_role})
    seconds = {role: sum(run.by_role.get(role, 0.0) for run in runs) for role in roles}
    not_ranks = sum(value for role, value in seconds.items() if role != "ranks")
    return {
        "way": way,
        "output_tokens_per_second": median_of([run.rate for run in runs]),
        "corrected_tokens_per_second": median_of([run.corrected_rate for run in runs]),
        "offline_tokens_per_second": median_of(alone),
        "offline_beside_stand_in_tokens_per_second": median_of(beside),
        "ratio": median_of([run.rate / offline for run, offline in zip(runs, alone, strict=True)]),
        "corrected_ratio": median_of([run.corrected_rate / offline for run, offline in zip(runs, alone, strict=True)]),
        "stand_in_ratio": median_of([run.rate / offline for run, offline in zip(runs, beside, strict=True)]),
        "microseconds_per_token": {role: 1e6 * value / tokens for role, value in seconds.items()},
        "client_microseconds_per_token": 1e6 * sum(run.client for run in runs) / tokens,
        "server_share_beside_ranks": not_ranks / total,
        "client_share": sum(run.client for run in runs) / total,
        "idle_share": sum(run.idle for run in runs) / total,
        "others_share": sum(run.others for run in runs) / total,
        "rounds": [
            {"serve": run.rate, "corrected": run.corrected_rate, "offline": offline, "beside": other}
            for run, offline, other in zip(runs, alone, beside, strict=True)
        ],
    }

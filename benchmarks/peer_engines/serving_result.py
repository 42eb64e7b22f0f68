"""`ServingResult`: what one server did in the rounds, beside its own offline engine and beside this project's server.

The client runs on the cores that it measures, where that of a service would not. Its processor time is taken out like
this: what it used beyond the time that cores were idle is handed back to all cores evenly, tokens / (seconds -
(client - idle) / cores). That is less than it took from an engine whose threads wait for each other.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRound:
    """One turn. `client_seconds`, `idle_seconds` and `foreign_seconds` are of processors, times in seconds.

    `idle_seconds` and `foreign_seconds` are 0 where there is no /proc.
    """

    num_output_tokens: int
    seconds: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    client_seconds: float
    idle_seconds: float
    foreign_seconds: float

    @property
    def rate(self) -> float:
        """Output tokens per second as measured."""
        return self.num_output_tokens / self.seconds

    @property
    def rate_without_client(self) -> float:
        """With the client's processor time handed back."""
        taken = max(0.0, self.client_seconds - self.idle_seconds) / len(os.sched_getaffinity(0))
        return self.num_output_tokens / (self.seconds - taken)


@dataclass(slots=True, kw_only=True)
class ServingResult:
    """Of `engine`: its rounds, or in `problem` why there are none."""

    engine: str
    problem: str | None = None
    rounds: list[ServedRound] = field(default_factory=list)

    def row(self, reference: "ServingResult", version: str | None, offline_rates: Sequence[float]) -> dict[str, Any]:
        """The line of the table: medians over the rounds, of ratios the medians of those within a round.

        `offline_rates` are of the engine's own offline class, by round; empty where it failed.
        """
        status = "ok" if self.problem is None else "failed"
        row: dict[str, Any] = {"engine": self.engine, "version": version, "status": status, "error": self.problem}
        if self.problem is not None:
            return row
        is_comparable = reference.problem is None
        return row | {
            "output_tokens_per_second": self._median(lambda served: served.rate),
            "ratio": _median_ratio(self.rounds, reference.rounds) if is_comparable else None,
            "ttft_p50_ms": 1000 * self._median(lambda served: served.ttft_p50),
            "ttft_p99_ms": 1000 * self._median(lambda served: served.ttft_p99),
            "tpot_p50_ms": 1000 * self._median(lambda served: served.tpot_p50),
            "offline_tokens_per_second": statistics.median(offline_rates) if offline_rates else None,
            "serving_efficiency": _efficiency([served.rate for served in self.rounds], offline_rates),
            "serving_efficiency_without_client": _efficiency(
                [served.rate_without_client for served in self.rounds], offline_rates
            ),
            "client_cores": self._median(lambda served: served.client_seconds / served.seconds),
            "client_microseconds_per_token": 1e6
            * self._median(lambda served: served.client_seconds / served.num_output_tokens),
            "idle_cores": self._median(lambda served: served.idle_seconds / served.seconds),
            "foreign_cores": max(served.foreign_seconds / served.seconds for served in self.rounds),
            "rates": [served.rate for served in self.rounds],
            "offline_rates": list(offline_rates),
        }

    def _median(self, value: Callable[[ServedRound], float]) -> float:
        return statistics.median(map(value, self.rounds))


def _median_ratio(own: Sequence[ServedRound], other: Sequence[ServedRound]) -> float:
    return statistics.median(mine.rate / theirs.rate for mine, theirs in zip(own, other, strict=True))


def _efficiency(served: Sequence[float], offline: Sequence[float]) -> float | None:
    return statistics.median(a / b for a, b in zip(served, offline, strict=True)) if offline else None

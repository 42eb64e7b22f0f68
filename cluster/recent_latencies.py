"""`RecentLatencies`: what the calls of the last minute waited for, exactly, for people who are looking now.

Histograms (`cluster.metrics`) know no "now" without somebody who scrapes them, and their percentiles are buckets'.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WINDOW_SECONDS = 60.0
_MOST_CALLS = 10_000  # of a minute; with more the window is shorter


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a latency in seconds, over `num_calls` calls."""

    num_calls: int
    p50: float
    p99: float


class RecentLatencies:
    """Of one ingress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_token: deque[tuple[float, float]] = deque(maxlen=_MOST_CALLS)
        self._per_token: deque[tuple[float, float]] = deque(maxlen=_MOST_CALLS)

    def first_token(self, seconds: float) -> None:
        """A call's first token has come."""
        self._first_token.append((self._clock(), seconds))

    def per_token(self, seconds: float) -> None:
        """A call has ended; its tokens after the first took so long each."""
        self._per_token.append((self._clock(), seconds))

    def time_to_first_token(self) -> Percentiles | None:
        """Of the last `WINDOW_SECONDS`; None where there was no call."""
        return self._recent(self._first_token)

    def time_per_output_token(self) -> Percentiles | None:
        """Of the calls that ended in the last `WINDOW_SECONDS`; None where there was none."""
        return self._recent(self._per_token)

    def _recent(self, calls: deque[tuple[float, float]]) -> Percentiles | None:
        oldest = self._clock() - WINDOW_SECONDS
        while calls and calls[0][0] < oldest:
            calls.popleft()
        if not calls:
            return None
        seconds = sorted(value for _, value in calls)
        return Percentiles(len(seconds), nearest_rank(seconds, 0.5), nearest_rank(seconds, 0.99))


def nearest_rank(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]

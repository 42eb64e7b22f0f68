"""`RefusalLog`: the warning of an ingress that calls are refused, since no replica is ready to take them.

Each has its line in the log of exchanges, at the level of any other answer: one more refusal is no news, clients try
again at once, and as many warnings would hide whatever else is wrong.
"""

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0


class RefusalLog:
    """Of one ingress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at: float | None = None
        self._num_unsaid = 0

    def refused(self, reason: str) -> None:
        """A call was; it is said now, or with those that follow."""
        self._num_unsaid += 1
        now = self._clock()
        if self._said_at is not None and now < self._said_at + SECONDS_BETWEEN_LINES:
            return
        calls = "1 call" if self._num_unsaid == 1 else f"{self._num_unsaid} calls"
        since = "" if self._said_at is None else f" since the last such line, {now - self._said_at:.0f} s ago"
        logger.warning("Refused %s%s: %s", calls, since, reason)
        self._said_at, self._num_unsaid = now, 0

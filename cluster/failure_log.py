"""`FailureLog`: the lines of an ingress about calls that the server failed.

A call that broke off has a line of its own, with its id and the cause. One refused as it came, since no replica
was ready, has nothing to tell that the one before had not; clients try again at once, and so many lines would fill a
disk and take the time of those that could be answered. They share a line.
"""

import logging
import math
import time
from collections.abc import Callable

from cluster.api_error import ApiError

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0


class FailureLog:
    """Of one ingress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at = -math.inf
        self._num_unsaid = 0

    def failed(self, call_id: str, error: Exception) -> None:
        """The server gave up on a call; an `ApiError` is a refusal."""
        if not isinstance(error, ApiError):
            logger.warning("Call %s failed: %r", call_id, error)
            return
        if self._clock() < self._said_at + SECONDS_BETWEEN_LINES:
            self._num_unsaid += 1
            return
        others = f", as {self._num_unsaid} others since the last such line" if self._num_unsaid else ""
        logger.warning("Call %s was refused%s: %s", call_id, others, error.message)
        self._said_at, self._num_unsaid = self._clock(), 0

"""`WritePace`: how often an ingress writes to its open calls, so that writing never takes the machine from the engine.

A write costs the ingress, HAProxy and the client some 50 microseconds of processor time each (docs/http_overhead.md),
however few tokens are in it. While calls are few or steps slow every step is written as it comes; where many calls meet
fast steps, tokens of several steps go out together, never later than a reader would notice.
"""

import asyncio
import math
from collections.abc import Iterable
from typing import Protocol

from engine import num_usable_cpus

_WRITE_SECONDS = 50e-6
# Of all cores, and at most, that writing may take.
_SHARE_OF_CORES, _MOST_CORES = 0.05, 0.5
# A pause below is not worth a timer; one above would be seen.
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.005, 0.05


class Waking(Protocol):
    """Somebody who looks for what has arrived when woken."""

    def wake(self) -> None: ...


def seconds_between_writes(num_calls: int, num_cores: int) -> float:
    """The pause after which so many open calls are written to again; 0 for at once."""
    seconds = num_calls * _WRITE_SECONDS / min(_SHARE_OF_CORES * num_cores, _MOST_CORES)
    return 0.0 if seconds < _SHORTEST_SECONDS else min(seconds, _LONGEST_SECONDS)


class WritePace:
    """Wakes calls in which something arrived, together. For one event loop."""

    def __init__(self, num_cores: int | None = None) -> None:
        self._num_cores = num_cores or num_usable_cpus()
        self._due: set[Waking] = set()
        self._last = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    def arrived(self, calls: Iterable[Waking], num_open: int) -> None:
        """Wake these calls now, or with the others when the pause is over. `num_open` calls share the budget."""
        self._due.update(calls)
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        due_at = self._last + seconds_between_writes(num_open, self._num_cores)
        if loop.time() >= due_at:
            self._wake(loop)
        else:
            self._timer = loop.call_at(due_at, self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        self._last, self._timer = loop.time(), None
        due, self._due = self._due, set()
        for call in due:
            call.wake()

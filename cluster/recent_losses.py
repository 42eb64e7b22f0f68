"""`RecentLosses`: an engine's counters over the last seconds, so that "now" means the same to everybody who asks."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from engine import EngineStats, LossWaterfall

WINDOW_SECONDS = 10.0
SAMPLE_SECONDS = 1.0
_log = logging.getLogger(__name__)


class RecentLosses:
    """Remembers what `read` said over the last `WINDOW_SECONDS`, as long as `run` runs."""

    def __init__(self, read: Callable[[], EngineStats], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._snapshots = deque([read()], maxlen=round(WINDOW_SECONDS / SAMPLE_SECONDS))
        self._times = deque([clock()], maxlen=self._snapshots.maxlen)
        self._before = self._snapshots[0]  # the last that knew less than the oldest of the window

    async def run(self) -> None:
        """Take a snapshot every `SAMPLE_SECONDS`, until cancelled; one that fails is left out."""
        is_failing = False
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            try:
                self.sample()
                is_failing = False
            except Exception:
                if not is_failing:  # once, not every second
                    _log.exception("The engine's counters cannot be read: nanoserve_percent_of_optimal stays behind.")
                is_failing = True

    def sample(self) -> None:
        """Take a snapshot; the oldest goes when the window is full."""
        oldest = self._snapshots[0]
        self._snapshots.append(self._read())
        self._times.append(self._clock())
        if oldest.accounted_seconds < self._snapshots[0].accounted_seconds:
            self._before = oldest

    def tokens_per_second(self) -> tuple[float, float]:
        """Prompt tokens begun and tokens generated since the oldest snapshot."""
        seconds = self._clock() - self._times[0]
        if seconds <= 0:
            return 0.0, 0.0
        before, now = self._snapshots[0], self._read()
        return (
            (now.num_prompt_tokens - before.num_prompt_tokens) / seconds,
            (now.num_generated_tokens - before.num_generated_tokens) / seconds,
        )

    def waterfall(self) -> LossWaterfall | None:
        """Of the time since the oldest snapshot; None where the optimum is unknown.

        During a step longer than the window nothing has been booked in it: what was booked last is told until then.
        """
        now = self._read()
        return LossWaterfall.between(self._snapshots[0], now) or LossWaterfall.between(self._before, now)

"""`RecentLosses`: an engine's counters over the last seconds, so that "now" means the same to every scraper."""

import asyncio
from collections import deque
from collections.abc import Callable

from engine import EngineStats, LossWaterfall

WINDOW_SECONDS = 10.0
SAMPLE_SECONDS = 1.0


class RecentLosses:
    """Remembers what `read` said over the last `WINDOW_SECONDS`, as long as `run` runs."""

    def __init__(self, read: Callable[[], EngineStats]) -> None:
        self._read = read
        self._snapshots = deque([read()], maxlen=round(WINDOW_SECONDS / SAMPLE_SECONDS))

    async def run(self) -> None:
        """Take a snapshot every `SAMPLE_SECONDS`, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.sample()

    def sample(self) -> None:
        """Take a snapshot; the oldest goes when the window is full."""
        self._snapshots.append(self._read())

    def waterfall(self) -> LossWaterfall | None:
        """Of the time since the oldest snapshot; None while nothing is known of it."""
        return LossWaterfall.between(self._snapshots[0], self._read())

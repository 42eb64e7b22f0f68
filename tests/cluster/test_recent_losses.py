import asyncio

import pytest

from cluster import recent_losses
from cluster.recent_losses import RecentLosses
from engine import EngineStats


class Engine:
    """Half as fast as its optimum for its first 20 seconds, then at rest."""

    now = 0.0

    def stats(self) -> EngineStats:
        return EngineStats(
            accounted_seconds=self.now, ideal_seconds=min(self.now, 20.0) / 2, optimal_tokens_per_second=1.0
        )


def test_only_the_last_seconds_count() -> None:
    engine = Engine()
    recent = RecentLosses(engine.stats)
    assert recent.waterfall() is None
    percents = []
    for second in range(1, 41):
        engine.now = second
        waterfall = recent.waterfall()
        assert waterfall is not None
        assert waterfall.wall_seconds == min(second, 10)
        percents.append(waterfall.percent_of_optimal)
        recent.sample()
    assert percents[0] == percents[19] == 50
    assert percents[24] == 25, "half of the window was at rest"
    assert percents[30] == 0


async def test_it_samples_by_itself_until_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_losses, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(recent_losses, "WINDOW_SECONDS", 0.005)
    engine = Engine()
    recent = RecentLosses(engine.stats)
    task = asyncio.create_task(recent.run())
    engine.now = 5.0
    async with asyncio.timeout(5):
        while recent.waterfall() is not None:  # until every snapshot is of the same moment
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()

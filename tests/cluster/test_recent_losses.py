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


def test_a_step_longer_than_the_window_leaves_what_was_booked_before_it() -> None:
    engine = Engine()
    recent = RecentLosses(engine.stats)
    for second in range(1, 6):
        engine.now = second
        recent.sample()
    for _ in range(40):
        recent.sample()
        waterfall = recent.waterfall()
        assert waterfall is not None and waterfall.percent_of_optimal == 50
    engine.now = 45.0
    waterfall = recent.waterfall()
    assert waterfall is not None and waterfall.wall_seconds == 40, "the whole step, and nothing before it"


async def test_it_samples_by_itself_until_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_losses, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(recent_losses, "WINDOW_SECONDS", 0.005)
    engine = Engine()
    recent = RecentLosses(engine.stats)
    task = asyncio.create_task(recent.run())
    engine.now = 5.0
    async with asyncio.timeout(5):
        while _window_begins(recent, engine, 7.0) != 5.0:
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def _window_begins(recent: RecentLosses, engine: Engine, now: float) -> float:
    """What the oldest snapshot knew, seen from `now`."""
    before, engine.now = engine.now, now
    waterfall = recent.waterfall()
    engine.now = before
    assert waterfall is not None
    return now - waterfall.wall_seconds


async def test_a_sample_that_fails_is_logged_once_and_sampling_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recent_losses, "SAMPLE_SECONDS", 0.001)
    num_reads = 0

    def read() -> EngineStats:
        nonlocal num_reads
        num_reads += 1
        if 1 < num_reads < 5:
            raise RuntimeError("no numbers")
        return EngineStats()

    task = asyncio.create_task(RecentLosses(read).run())
    async with asyncio.timeout(5):
        while num_reads < 10:
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["no numbers"]


def test_rates_are_those_of_the_window() -> None:
    now = 0.0
    stats = EngineStats()
    recent = RecentLosses(lambda: stats, lambda: now)
    assert recent.tokens_per_second() == (0.0, 0.0)
    for second in range(1, 31):
        now = second
        stats = EngineStats(num_prompt_tokens=100 * second, num_generated_tokens=7 * min(second, 25))
        recent.sample()
    prompt, generated = recent.tokens_per_second()
    assert prompt == 100
    assert generated == 7 * (25 - 21) / 9, "nine seconds, of which four generated tokens"

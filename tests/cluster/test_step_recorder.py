"""`StepRecorder`: the next step for everybody who asks, nothing where none comes, and never an old one."""

import asyncio

from cluster.step_recorder import StepRecorder
from engine import RecordedStep


def recorded(rank: int, step: int) -> RecordedStep:
    return RecordedStep(rank=rank, step=step, plan="p", num_tokens=1, num_decodes=1, began=0.0, seconds=0.0, events=())


async def test_who_asks_at_the_same_time_is_given_the_same_step() -> None:
    recorder = StepRecorder(2)
    assert not recorder.begins(1), "nobody asked"
    first, second = (asyncio.create_task(recorder.record(5.0)) for _ in range(2))
    await asyncio.sleep(0)
    assert recorder.begins(2)
    assert not recorder.begins(3), "one step is enough"
    recorder.take(recorded(1, 2))
    recorder.take(recorded(0, 2))
    assert [rank.rank for rank in await first] == [0, 1]
    assert await first == await second
    assert not recorder.begins(4)


async def test_idle_is_nothing_and_a_late_rank_is_not_mixed_in() -> None:
    recorder = StepRecorder(1)
    assert await recorder.record(0.01) == ()
    assert not recorder.begins(1), "who asked has left"
    recorder.take(recorded(0, 1))
    again = asyncio.create_task(recorder.record(5.0))
    await asyncio.sleep(0)
    assert recorder.begins(2)
    recorder.take(recorded(0, 1))
    recorder.take(recorded(0, 2))
    assert [rank.step for rank in await again] == [2]


async def test_a_step_that_has_begun_is_waited_for() -> None:
    recorder = StepRecorder(1)
    asked = asyncio.create_task(recorder.record(0.01))
    await asyncio.sleep(0)
    assert recorder.begins(1)
    await asyncio.sleep(0.05)
    recorder.take(recorded(0, 1))
    assert len(await asked) == 1

"""When calls are woken: at once while they are few, together where they are many."""

import asyncio

import pytest

from cluster.write_pace import WritePace, seconds_between_writes


class Call:
    """Notes when it was woken."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def wake(self) -> None:
        self.times.append(asyncio.get_running_loop().time())


def test_few_calls_are_written_at_every_step() -> None:
    assert seconds_between_writes(0, 2) == 0
    assert seconds_between_writes(8, 2) == 0
    assert seconds_between_writes(64, 16) > 0


@pytest.mark.parametrize(
    ("num_calls", "num_cores", "seconds"), [(32, 2, 0.016), (64, 2, 0.032), (100, 8, 0.0125), (300, 64, 0.03)]
)
def test_the_pause_keeps_writing_within_its_share(num_calls: int, num_cores: int, seconds: float) -> None:
    assert seconds_between_writes(num_calls, num_cores) == pytest.approx(seconds)


def test_the_pause_is_never_one_that_a_reader_sees() -> None:
    assert seconds_between_writes(10_000, 1) == 0.05


async def test_few_calls_are_woken_at_once() -> None:
    pace, call = WritePace(num_cores=2), Call()
    for number in range(1, 4):
        pace.arrived([call], num_open=1)
        assert len(call.times) == number


async def test_many_calls_are_woken_together_and_each_once() -> None:
    pace, calls = WritePace(num_cores=1), [Call() for _ in range(3)]
    pace.arrived(calls[:1], num_open=1000)  # the first for long
    assert [len(call.times) for call in calls] == [1, 0, 0]
    for _ in range(4):
        pace.arrived(calls, num_open=1000)
    assert [len(call.times) for call in calls] == [1, 0, 0]
    while not calls[2].times:
        await asyncio.sleep(0.005)
    assert [len(call.times) for call in calls] == [2, 1, 1]
    assert calls[0].times[1] - calls[0].times[0] >= 0.049, "the pause began just before the first was woken"


async def test_nothing_arrived_is_left_waiting_when_no_more_comes() -> None:
    pace, call = WritePace(num_cores=1), Call()
    pace.arrived([call], num_open=500)
    pace.arrived([call], num_open=500)
    await asyncio.wait_for(_woken(call, 2), 10)
    pace.arrived([call], num_open=500)
    await asyncio.wait_for(_woken(call, 3), 10)


async def _woken(call: Call, times: int) -> None:
    while len(call.times) < times:
        await asyncio.sleep(0.002)

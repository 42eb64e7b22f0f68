"""The real engine over stand-in ranks: where a step's host time goes, and how much of it the device has to wait for.

The engine serves one ingress through `cluster.engine_host`, in this process; requests come as sequences end. The
device's unhidden time is that between the end of a step and the start of the next.
"""

import asyncio
import pickle
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from step_parts.rank_group import RankGroup
from step_parts.setting import MAX_MODEL_LEN, VOCAB_SIZE, Setting
from step_parts.stand_in_device import StepBoard
from step_parts.traffic import Traffic

from cluster.engine_host import EngineHost
from cluster.step_message import Hello, MetricsTarget, StepMessage, unpack
from engine import Batch, LLMEngine, Request, StepOutput
from engine.llm_engine import _StepInFlight
from engine.scheduler import ScheduledStep

_TARGET = MetricsTarget("benchmark", "benchmark", "127.0.0.1:0")


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlappedRun:
    """Seconds per step, each list over the same steps."""

    unhidden: list[float]
    periods: list[float]
    lateness: list[float]
    schedule: list[float]
    send: list[float]
    deliver: list[float]
    message: list[float]
    num_decodes: list[int]


class _TimedEngine(LLMEngine):
    """Notes how long it takes to schedule and to deliver."""

    def __init__(self, setting: Setting, executor: RankGroup) -> None:
        super().__init__(setting.config, executor)
        self.schedule_times: list[float] = []
        self.deliver_times: list[float] = []
        self.num_decodes: list[int] = []

    def _schedule(self) -> ScheduledStep | None:
        started = time.perf_counter()
        scheduled = super()._schedule()
        if scheduled is not None:
            self.schedule_times.append(time.perf_counter() - started)
            self.num_decodes.append(scheduled.batch.num_decodes)
        return scheduled

    def _deliver(self, step: _StepInFlight, output: StepOutput) -> None:
        started = time.perf_counter()
        super()._deliver(step, output)
        self.deliver_times.append(time.perf_counter() - started)


async def run_engine(
    setting: Setting, group: RankGroup, *, step_seconds: float, num_steps: int, num_warm_up: int, launches_ahead: bool
) -> OverlappedRun:
    """`num_warm_up` steps as fast as they go, then `num_steps` of `step_seconds` each."""
    group.capacity = setting.capacity
    group.board.set(step_seconds=0.0, launches_ahead=launches_ahead)
    traffic = Traffic(setting.num_running, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
    standing = traffic.standing()
    coming = deque(traffic.arrivals((num_steps + num_warm_up) * setting.num_running // 100 + 100))
    engine = _TimedEngine(setting, group)
    host = EngineHost(engine, await engine.start(), _TARGET)
    messages: list[float] = []
    # The two steps before and after a change of pace are of neither.
    async for message in host.outputs("benchmark", _TARGET):
        if isinstance(message, Hello):
            host.submit("benchmark", standing)
            continue
        messages.append(_receive(message, host, coming))
        num_done = len(engine.deliver_times)
        if num_done >= num_warm_up and group.board.step_seconds == 0:
            group.board.set(step_seconds=step_seconds, launches_ahead=launches_ahead)
        if num_done >= num_warm_up + num_steps + 4:
            break
    steps = slice(num_warm_up + 2, num_warm_up + num_steps + 2)
    group.board.set(step_seconds=0.0, launches_ahead=launches_ahead)
    await host.close()
    await group.settle()
    return OverlappedRun(
        **_device_times(group.board, steps, step_seconds, launches_ahead=launches_ahead),
        schedule=engine.schedule_times[steps],
        send=group.send_seconds[steps],
        deliver=engine.deliver_times[steps],
        message=messages[-num_steps:],
        num_decodes=engine.num_decodes[steps],
    )


def _receive(message: StepMessage, host: EngineHost, coming: deque[Request]) -> float:
    """Pickle a message, as the way to an ingress does, and send a request for each that ended; the pickle's seconds."""
    started = time.perf_counter()
    pickle.dumps(message, protocol=5)
    ended = time.perf_counter()
    num_ended = sum(output.finish_reason is not None for output in unpack(message.outputs))
    host.submit("benchmark", [coming.popleft() for _ in range(num_ended)])
    return ended - started


def _device_times(
    board: StepBoard, steps: slice, step_seconds: float, *, launches_ahead: bool
) -> dict[str, list[float]]:
    """What the device's clock says about the steps; see `StandInDevice`."""
    launched, lateness = board.launched[:, : steps.stop + 1], board.lateness[:, : steps.stop + 1]
    ends = np.zeros(launched.shape[1])
    starts = np.zeros(launched.shape[1])
    unhidden = np.zeros(launched.shape[1])
    for step in range(steps.start, launched.shape[1]):
        starts[step] = max(ends[step - 1], launched[:, step].max())
        ends[step] = starts[step] + step_seconds
        if launches_ahead:
            unhidden[step] = starts[step] - ends[step - 1]
        else:  # a rank that woke late launched the next step so much later
            unhidden[step] = max(0.0, (launched[:, step] - lateness[:, step - 1]).max() - ends[step - 1])
    timed = slice(steps.start + 1, steps.stop + 1)
    return {
        "unhidden": unhidden[timed].tolist(),
        "periods": np.diff(starts)[steps].tolist(),
        "lateness": lateness[0, steps].tolist(),
    }


async def measure_transport(group: RankGroup, batches: list[Batch], num_rounds: int) -> list[float]:
    """Seconds from a batch to rank 0's answer, one at a time; the ranks prepare nothing."""
    group.board.set(step_seconds=-1.0, launches_ahead=True)
    seconds = []
    for number in range(num_rounds + len(batches)):
        started = time.perf_counter()
        await group.execute(batches[number % len(batches)])
        if number >= len(batches):  # the first pass warms up
            seconds.append(time.perf_counter() - started)
        await asyncio.sleep(0)
    return seconds

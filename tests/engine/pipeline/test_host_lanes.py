"""What the lanes of a CPU count: overlap saved the time that a collective flew while something was computed, no more.

A clock made by hand: launching, computing and waiting take the seconds that the script says.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.batch import StepTimes
from engine.layers.collective import CollectiveOperation
from engine.pipeline.dispatch import Dispatch
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.schedule import Lane
from engine.pipeline.stopwatch import Stopwatch
from engine.tensor_parallel import TensorParallel

LAUNCH = 5.0


class Clock:
    """Stands still until somebody takes time; what is due on the way happens at its moment."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def take(self, seconds: float) -> None:
        end = self.seconds + seconds
        for moment, event in sorted(self._due, key=lambda due: due[0]):
            if moment <= end:
                self._due.remove((moment, event))
                self.seconds = moment
                event()
        self.seconds = end

    def at(self, moment: float, event: Callable[[], None]) -> None:
        self._due.append((moment, event))


class Flying:
    """A collective that is over `seconds` after its launch, and takes a moment more to wake up who waits for it."""

    WAKE_UP = 0.25

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._landing = clock, clock.seconds + seconds

    def wait(self) -> None:
        if self._clock.seconds < self._landing:
            self._clock.take(self._landing + self.WAKE_UP - self._clock.seconds)

    def get_future(self) -> Any:
        def add_done_callback(callback: Callable[[object], None]) -> None:
            self._clock.at(self._landing, lambda: callback(None))

        return SimpleNamespace(add_done_callback=add_done_callback)


class Reduce(CollectiveOperation):
    """Takes `LAUNCH` to launch."""

    is_in_place = True
    is_identity = False

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__(TensorParallel(), 1)
        self._clock, self._seconds = clock, seconds

    def start(self, output: Tensor, input: Tensor, *, is_beside: bool = False) -> Any:
        self._clock.take(LAUNCH)
        return Flying(self._clock, self._seconds)


def run(
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    script: Sequence[tuple[str, float, tuple[int, ...]]],
    *,
    overlaps: bool,
) -> StepTimes:
    """Run steps (kind of node, seconds, places waited for), one after the other: "reduce" flies, the others compute."""
    monkeypatch.setattr("engine.pipeline.stopwatch.time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    order, nodes = [], {}
    for place, (kind, seconds, waits) in enumerate(script):
        operation = Reduce(clock, seconds) if kind == "reduce" else None
        name = f"{kind} {place}"
        calls = (SimpleNamespace(operation=operation),)
        nodes[name] = SimpleNamespace(calls=calls, node=SimpleNamespace(name=name), seconds=seconds)
        lane = Lane.NETWORK if operation else Lane.COMPUTE
        placed = SimpleNamespace(index=place, lane=lane, step=SimpleNamespace(node=name))
        order.append(Dispatch(cast(Any, placed), 0, waits))
    values = SimpleNamespace(
        network_tensors=lambda *_: (None, None), arrive=lambda *_: None, run=lambda bound, *_: clock.take(bound.seconds)
    )
    stopwatch = Stopwatch()
    HostLanes(overlaps=overlaps).run(
        order, [(0, 1)] * len(order), cast(Any, [SimpleNamespace(nodes=nodes)]), cast(Any, values), stopwatch
    )
    return stopwatch.times()


@pytest.mark.parametrize(
    ("overlaps", "flight", "compute", "in_flight", "exposed"),
    [
        (True, 10.0, 4.0, 10.25, 6.25),  # 4 s hidden, then waited for
        (True, 10.0, 20.0, 10.0, 0.0),  # over before anybody waited
        (False, 10.0, 20.0, 10.25, 10.25),  # waited for at once: nothing hidden
    ],
)
def test_only_what_flew_beside_computation_is_hidden(
    monkeypatch: pytest.MonkeyPatch, overlaps: bool, flight: float, compute: float, in_flight: float, exposed: float
) -> None:
    clock = Clock()
    script = [("reduce", flight, ()), ("product", compute, ()), ("sum", 0.0, (0,))]
    times = run(monkeypatch, clock, script, overlaps=overlaps)
    assert times.network_seconds == in_flight
    assert times.exposed_network_seconds == exposed
    assert clock.seconds == 100.0 + LAUNCH + compute + exposed


def test_a_collective_is_begun_while_another_flies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one waits for what computed its input and for nothing else."""
    clock = Clock()
    script = [("reduce", 50.0, ()), ("product", 10.0, ()), ("reduce", 20.0, (1,)), ("product", 10.0, ())]
    times = run(monkeypatch, clock, script, overlaps=True)
    assert times.exposed_network_seconds == pytest.approx(50.0 - 10.0 - LAUNCH - 10.0 + Flying.WAKE_UP)
    assert clock.seconds == 100.0 + LAUNCH + 50.0 + Flying.WAKE_UP


@pytest.mark.parametrize(
    ("overlaps", "pieces", "left", "seconds"),
    [
        (True, [(0, 4), (4, 10)], (4, 10), 50.0 + Flying.WAKE_UP + LAUNCH),  # the first was waited for
        (True, [(4, 10), (0, 4)], (0, 4), 50.0 + Flying.WAKE_UP + LAUNCH),
        (True, [(0, 10)], (0, 10), 0.0),
        (False, [(0, 4), (4, 10)], None, 50.0 + Flying.WAKE_UP),  # all at once, and waited for
    ],
)
def test_what_the_layers_read_first_arrives_one_nano_batch_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
    overlaps: bool,
    pieces: Sequence[tuple[int, int]],
    left: tuple[int, int] | None,
    seconds: float,
) -> None:
    clock = Clock()
    monkeypatch.setattr("engine.pipeline.stopwatch.time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    stopwatch = Stopwatch()
    flight = HostLanes(overlaps=overlaps).begin(Reduce(clock, 50.0), torch.zeros(10, 2), pieces, stopwatch)
    assert (None if flight is None else flight.tokens) == left
    assert clock.seconds == 100.0 + LAUNCH + seconds
    if flight is not None:
        clock.take(20.0)
        flight.land(stopwatch)
        assert clock.seconds == pytest.approx(100.0 + LAUNCH + seconds + 50.0 + Flying.WAKE_UP)


def test_flights_count_whenever_they_are_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("engine.pipeline.stopwatch.time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    stopwatch, lanes, values = Stopwatch(), HostLanes(overlaps=True), torch.zeros(10, 2)
    first = lanes.begin(Reduce(clock, 10.0), values, [(4, 10)], stopwatch)
    clock.take(20.0)
    second = lanes.begin(Reduce(clock, 10.0), values, [(0, 4)], stopwatch)
    assert first is not None and second is not None
    clock.take(15.0)
    second.land(stopwatch)
    first.land(stopwatch)
    assert stopwatch.times().network_seconds == pytest.approx(20.0)
    assert stopwatch.times().exposed_network_seconds == 0.0

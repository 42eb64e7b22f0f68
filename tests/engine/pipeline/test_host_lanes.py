"""What the lanes of a CPU count: overlap saved the time that a collective flew while something was computed, no more.

A clock made by hand: launching, computing and waiting take the seconds that the script says.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from engine.layers.collective import CollectiveOperation
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

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__(TensorParallel(), 1)
        self._clock, self._seconds = clock, seconds

    def start(self, output: Tensor, input: Tensor) -> Any:
        self._clock.take(LAUNCH)
        return Flying(self._clock, self._seconds)


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
    monkeypatch.setattr("engine.pipeline.stopwatch.time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    reduce = SimpleNamespace(
        calls=(SimpleNamespace(operation=Reduce(clock, flight)),), node=SimpleNamespace(name="reduce")
    )
    nodes = {"reduce": reduce, "product": SimpleNamespace(), "sum": SimpleNamespace()}
    values = SimpleNamespace(
        network_tensors=lambda *_: (None, None),
        run=lambda bound, *_: clock.take(compute if bound is nodes["product"] else 0.0),
    )
    lanes = {"reduce": Lane.NETWORK, "product": Lane.COMPUTE, "sum": Lane.COMPUTE}
    placed = [
        SimpleNamespace(index=index, lane=lane, step=SimpleNamespace(node=node))
        for index, (node, lane) in enumerate(lanes.items())
    ]
    order = [(placed[0], 0, ()), (placed[1], 0, ()), (placed[2], 0, (0,))]
    stopwatch = Stopwatch()
    HostLanes(overlaps=overlaps).run(
        cast(Any, order), [(0, 1)] * 3, cast(Any, [SimpleNamespace(nodes=nodes)]), cast(Any, values), stopwatch
    )
    times = stopwatch.times()
    assert times.network_seconds == in_flight
    assert times.exposed_network_seconds == exposed
    assert clock.seconds == 100.0 + LAUNCH + compute + exposed

"""`HostLanes`: the lanes of a CPU: computing happens in the calling thread, collectives fly beside it.

A collective is begun as soon as its turn comes and waited for when somebody needs its result; gloo's threads carry it
in the meantime. With `overlaps` False every collective is waited for at once, which is the `nanobatch` mode.
"""

from collections import deque
from collections.abc import Sequence

from engine.layers.collective import CollectiveOperation
from engine.pipeline.dispatch import Dispatch
from engine.pipeline.layer_program import BoundNode, LayerProgram
from engine.pipeline.schedule import Lane
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.pipeline.values import Values
from engine.tensor_parallel import Collective


class HostLanes:
    """Runs issues in their order. One object serves one rank; its steps do not overlap."""

    def __init__(self, *, overlaps: bool) -> None:
        self._overlaps = overlaps

    def run(
        self,
        order: Sequence[Dispatch],
        ranges: Sequence[tuple[int, int]],
        programs: Sequence[LayerProgram],
        values: Values,
        stopwatch: Stopwatch,
    ) -> None:
        """Run every step of the order on its range; `ranges` goes by the index of the step, `programs` by the layer."""
        flights: deque[tuple[int, _Flight]] = deque()
        for place, (placed, layer, waits) in enumerate(order):
            awaited = [wait for wait in waits if order[wait].placed.lane is Lane.NETWORK]
            if awaited:  # what else it waits for has been computed; a collective lands after those begun before it
                _land(flights, max(awaited), stopwatch)
            start, stop = ranges[placed.index]
            if start == stop:
                continue
            bound = programs[layer].nodes[placed.step.node]
            if placed.lane is Lane.NETWORK:
                operation = bound.calls[0].operation
                if operation is not None and not operation.is_in_place:
                    # Its result may lie where an earlier one reads from, which buffers take to be over by now.
                    _land(flights, place, stopwatch)
                flights.append((place, _Flight(bound, layer, (start, stop), values)))
                if not self._overlaps:
                    _land(flights, place, stopwatch)
            else:
                started = stopwatch.now()
                values.run(bound, layer, start, stop, stopwatch)
                stopwatch.record(placed.step.node, placed.lane, started, layer=layer, tokens=(start, stop))
        _land(flights, len(order), stopwatch)


def _land(flights: "deque[tuple[int, _Flight]]", last: int, stopwatch: Stopwatch) -> None:
    """Wait for every collective that was begun at a place up to `last`."""
    while flights and flights[0][0] <= last:
        flights.popleft()[1].land(stopwatch)


class _Flight:
    """A collective from its start to its landing."""

    def __init__(self, bound: BoundNode, layer: int, tokens: tuple[int, int], values: Values) -> None:
        (call,) = bound.calls
        assert isinstance(call.operation, CollectiveOperation)
        self._name, self._layer, self._tokens = bound.node.name, layer, tokens
        self._ended: float | None = None
        self._started = Stopwatch.now()
        self._collective = call.operation.start(*values.network_tensors(bound, layer, *tokens))
        # From here on the compute lane is free: what launching took is no time that overlap hid.
        self._launched = Stopwatch.now()
        if self._collective is not None:
            self._notice_end(self._collective)

    def land(self, stopwatch: Stopwatch) -> None:
        """Wait until the result is there; only the waiting is time that the compute lane lost."""
        now = stopwatch.now()
        if self._collective is not None:
            early = self._ended  # over before anybody waited; else it is when the waiting is
            self._collective.wait()
            landed = stopwatch.spent(Cost.NETWORK, now)
            stopwatch.flown(self._launched, early or landed)
            ended = min(self._ended or landed, landed)
            stopwatch.record(
                self._name, Lane.NETWORK, self._started, ended=ended, layer=self._layer, tokens=self._tokens
            )

    def _notice_end(self, collective: Collective) -> None:
        def end(_: object) -> None:
            self._ended = Stopwatch.now()

        collective.get_future().add_done_callback(end)

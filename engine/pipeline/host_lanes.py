"""`HostLanes`: the lanes of a CPU: computing happens in the calling thread, collectives fly beside it.

A collective is begun as soon as its turn comes and waited for when somebody needs its result; gloo's threads carry it
in the meantime. With `overlaps` False every collective is waited for at once, which is the `nanobatch` mode.
"""

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from engine.layers.collective import CollectiveOperation
from engine.pipeline.dispatch import Dispatch
from engine.pipeline.flight import Flight
from engine.pipeline.layer_program import BoundNode, LayerProgram
from engine.pipeline.schedule import Lane, Mechanism
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.values import Values
from engine.units_at_hand import UnitsAtHand


class HostLanes:
    """Runs issues in their order. One object serves one rank; its steps do not overlap."""

    runs_plainly = True

    def __init__(self, *, overlaps: bool) -> None:
        self._overlaps = overlaps

    def begin(
        self,
        collective: CollectiveOperation,
        values_TE: Tensor,
        pieces: Sequence[tuple[int, int]],
        stopwatch: Stopwatch,
    ) -> Flight | None:
        """See `Lanes`. Where lanes overlap, pieces go one after the other, because two would share the link when the
        first is waited for; the last is still in flight on return.
        """
        if collective.is_identity:
            return None
        flight: Flight | None = None
        for tokens in pieces if self._overlaps else [(0, len(values_TE))]:
            if flight is not None:
                flight.land(stopwatch)
            rows_TE = values_TE[slice(*tokens)]
            flight = Flight(collective, rows_TE, rows_TE, name="embedding_all_reduce", layer=None, tokens=tokens)
        if flight is not None and not self._overlaps:
            flight.land(stopwatch)
            flight = None
        return flight

    def run(
        self,
        order: Sequence[Dispatch],
        ranges: Sequence[tuple[int, int]],
        programs: Sequence[LayerProgram],
        values: Values,
        stopwatch: Stopwatch,
        mechanism: Mechanism = Mechanism.STREAMS,
        units: UnitsAtHand | None = None,
    ) -> None:
        """Run every step of the order on its range; `ranges` goes by the index of the step, `programs` by the layer.

        Whatever computes has all cores, so neither a mechanism nor units say anything here.
        """
        flights: deque[tuple[int, Flight]] = deque()
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
                values.arrive(start, stop, stopwatch)
                flights.append((place, _flight(bound, layer, (start, stop), values)))
                if not self._overlaps:
                    _land(flights, place, stopwatch)
            else:
                started = stopwatch.now()
                values.run(bound, layer, start, stop, stopwatch)
                stopwatch.record(placed.step.node, placed.lane, started, layer=layer, tokens=(start, stop))
        _land(flights, len(order), stopwatch)


def _land(flights: "deque[tuple[int, Flight]]", last: int, stopwatch: Stopwatch) -> None:
    """Wait for every collective that was begun at a place up to `last`."""
    while flights and flights[0][0] <= last:
        flights.popleft()[1].land(stopwatch)


def _flight(bound: BoundNode, layer: int, tokens: tuple[int, int], values: Values) -> Flight:
    (call,) = bound.calls
    assert isinstance(call.operation, CollectiveOperation)
    tensors = values.network_tensors(bound, layer, *tokens)
    return Flight(call.operation, *tensors, name=bound.node.name, layer=layer, tokens=tokens)

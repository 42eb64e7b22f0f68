"""`StreamLanes`: the lanes of a CUDA device: the compute lane is the current stream, the others run on side streams.

A step waits for events of other lanes and for nothing else, the host never waits, and the side streams branch off the
current one at the start and join it at the end, so that a run can be captured into a graph.

Why memory is safe without `record_stream`. Values that cross lanes lie in the pipeline's arena, and the inputs of
the step and their parts (views, made without allocating) were there before the streams branched off: all of it
belongs to the current stream and is freed, if at all, after the join. Temporaries are made and dropped inside one
step, so torch's allocator hands their memory on within the stream that used it, in its order. Captured, the same holds
of the graph's own pool.

What a schedule asks for and a device does not promise: a step's share of the execution units holds only for kernels
that honour it (`ExecutionUnits`), and `Schedule.starts` is the order in which steps are issued, while a kernel begins
when its stream, its events and free units let it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.layers.collective import CollectiveOperation
from engine.pipeline.dispatch import Dispatch
from engine.pipeline.execution_units import ExecutionUnits
from engine.pipeline.flight import Flight
from engine.pipeline.layer_program import BoundNode, LayerProgram
from engine.pipeline.schedule import Lane
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.values import Values

# Attention's few long-lived blocks must get onto the device between the many of a matrix product.
_HIGH_PRIORITY = -1


class StreamLanes:
    """Runs issues in their order. One object serves one rank, from one thread; keep it, as libraries keep memory for
    every stream that they have seen. With `overlaps` False everything runs on the current stream, with all units.

    Every `run` may be launched before the one before has ended: it begins, on the device, after that one's join.
    """

    runs_plainly = False  # captured graphs want values in places that stay

    def __init__(self, device: torch.device, *, overlaps: bool) -> None:
        self._device = device
        self._sides: dict[Lane, torch.cuda.Stream] = {}
        self._units: ExecutionUnits | None = None
        self._events: list[torch.cuda.Event] = []
        if overlaps:
            self._units = ExecutionUnits(device)
            self._sides[Lane.MEMORY] = torch.cuda.Stream(device, _HIGH_PRIORITY)  # type: ignore[no-untyped-call]
            self._sides[Lane.NETWORK] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(
        self,
        collective: CollectiveOperation,
        values_TE: Tensor,
        pieces: Sequence[tuple[int, int]],
        stopwatch: Stopwatch,
    ) -> Flight | None:
        """Queue it on the current stream, which `run` branches off: one of some hundred is not worth cutting."""
        collective(values_TE)  # in place
        return None

    def run(
        self,
        order: Sequence[Dispatch],
        ranges: Sequence[tuple[int, int]],
        programs: Sequence[LayerProgram],
        values: Values,
        stopwatch: Stopwatch,
    ) -> None:
        """Launch every step of the order on its range; `ranges` goes by the index of the step, `programs` by the layer.

        The stopwatch reads the host's clock and learns nothing of a device, unless it records events: then the steps
        are timed by events of CUDA and waited for at the end, which a capture does not allow.
        """
        current = torch.cuda.current_stream(self._device)
        lanes = {dispatch.placed.lane for dispatch in order}
        sides = {lane: stream for lane, stream in self._sides.items() if lane in lanes}
        marks = None if stopwatch.events is None else _Marks(current)
        for side in sides.values():
            side.wait_stream(current)
        awaited = {place for dispatch in order for place in dispatch.waits} if sides else set()
        ended: dict[int, torch.cuda.Event] = {}
        for place, (placed, layer, waits) in enumerate(order):
            stream = sides.get(placed.lane, current)
            if sides:
                for wait in waits:
                    stream.wait_event(ended[wait])
            start, stop = ranges[placed.index]
            if start < stop:  # else only its waits count, as others may rely on them through this place
                bound = programs[layer].nodes[placed.step.node]
                begun = None if marks is None else _mark(stream)
                with torch.cuda.stream(None if stream is current else stream):
                    self._launch(bound, placed.step.share, layer, (start, stop), values, stopwatch)
                if marks is not None and begun is not None:
                    marks.end(stream, begun, bound, placed.lane, layer, (start, stop))
            if place in awaited:
                ended[place] = self._event(len(ended))
                ended[place].record(stream)
        for side in sides.values():
            current.wait_stream(side)
        if marks is not None:
            marks.tell(stopwatch)

    def _launch(
        self,
        bound: BoundNode,
        share: int,
        layer: int,
        tokens: tuple[int, int],
        values: Values,
        stopwatch: Stopwatch,
    ) -> None:
        """Queue a node's calls on the stream that is current now."""
        first = bound.calls[0].operation
        if isinstance(first, CollectiveOperation):
            # The waiting in it is the stream's. Where lanes overlap, it runs beside what the others compute.
            first.into(*values.network_tensors(bound, layer, *tokens), is_beside=bool(self._sides))
        elif self._units is None:
            values.run(bound, layer, *tokens, stopwatch)
        else:
            with self._units.share(share):
                values.run(bound, layer, *tokens, stopwatch)

    def _event(self, number: int) -> torch.cuda.Event:
        """The same events serve every run: a stream that was told to wait for one waits for its record of then."""
        if number == len(self._events):
            self._events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        return self._events[number]


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """The moment when what was queued so far is over."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class _Mark(NamedTuple):
    """A step between two events."""

    operation: str
    lane: Lane
    layer: int
    tokens: tuple[int, int]
    begun: torch.cuda.Event
    ended: torch.cuda.Event


class _Marks:
    """The steps of a recorded run, on the device's clock, tied to the host's where the device was idle."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()
        self._stream = stream
        self._started = Stopwatch.now()
        self._origin = _mark(stream)
        self._marks: list[_Mark] = []

    def end(
        self,
        stream: torch.cuda.Stream,
        begun: torch.cuda.Event,
        bound: BoundNode,
        lane: Lane,
        layer: int,
        tokens: tuple[int, int],
    ) -> None:
        """A step has been queued behind `begun`."""
        self._marks.append(_Mark(bound.node.name, lane, layer, tokens, begun, _mark(stream)))

    def tell(self, stopwatch: Stopwatch) -> None:
        """Wait for the device, then give the stopwatch its events."""
        self._stream.synchronize()
        for mark in self._marks:
            started, ended = (self._origin.elapsed_time(event) / 1e3 for event in (mark.begun, mark.ended))
            stopwatch.record(
                mark.operation,
                mark.lane,
                self._started + started,
                ended=self._started + ended,
                layer=mark.layer,
                tokens=mark.tokens,
            )

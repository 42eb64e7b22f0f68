"""`StreamLanes`: the lanes of a CUDA device, each on a stream: of its own, or the current one (the compute lane's).

A step waits for events of other lanes and for nothing else, the host never waits, and the streams of lanes branch off
the current one at the start and join it at the end, so that a run can be captured into a graph.

Why memory is safe without `record_stream`. Values that cross lanes lie in the pipeline's arena, and the inputs of
the step and their parts (views, made without allocating) were there before the streams branched off: all of it
belongs to the current stream and is freed, if at all, after the join. Temporaries are made and dropped inside one
step, so torch's allocator hands their memory on within the stream that used it, in its order. Captured, the same holds
of the graph's own pool.

What a schedule asks for and a device does not promise: a step's share of the execution units holds only for kernels
that honour it (`ExecutionUnits`), unless the units are split (`Mechanism.GREEN`); and `Schedule.starts` is the order in
which steps are issued, while a kernel begins when its stream, its events and free units let it.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.layers.collective import CollectiveOperation
from engine.pipeline.dispatch import Dispatch
from engine.pipeline.flight import Flight
from engine.pipeline.lane_grants import LaneGrant, LaneGrants
from engine.pipeline.layer_program import BoundNode, LayerProgram
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.values import Values
from engine.units_at_hand import UnitsAtHand

_log = logging.getLogger(__name__)


class StreamLanes:
    """Runs issues in their order. One object serves one rank, from one thread; keep it, as libraries keep memory for
    every stream that they have seen. With `overlaps` False everything runs on the current stream, with all units.

    Every `run` may be launched before the one before has ended: it begins, on the device, after that one's join.
    `grants` are what the lanes run on, where others share it.
    """

    runs_plainly = False  # captured graphs want values in places that stay

    def __init__(self, device: torch.device, *, overlaps: bool, grants: LaneGrants | None = None) -> None:
        self._device = device
        self._grants = (grants or LaneGrants(device)) if overlaps else None
        self._refused: set[Mechanism] = set()
        self._events: list[torch.cuda.Event] = []

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
        mechanism: Mechanism = Mechanism.STREAMS,
        units: UnitsAtHand | None = None,
    ) -> None:
        """Launch every step of the order on its range; `ranges` goes by the index of the step, `programs` by the layer.

        The stopwatch reads the host's clock and learns nothing of a device, unless it records events: then the steps
        are timed by events of CUDA and waited for at the end, which a capture does not allow. A mechanism that the
        device or the kernels refuse is told once, and the lanes are then plain streams.
        """
        current = torch.cuda.current_stream(self._device)
        grants = self._granted(order, mechanism, units)
        sides = list(dict.fromkeys(grant.stream for grant in grants.values() if grant.stream is not None))
        marks = None if stopwatch.events is None else _Marks(current)
        for side in sides:
            side.wait_stream(current)
        awaited = {place for dispatch in order for place in dispatch.waits} if sides else set()
        ended: dict[int, torch.cuda.Event] = {}
        for place, (placed, layer, waits) in enumerate(order):
            grant = grants.get((placed.lane, placed.step.share))
            stream = current if grant is None else grant.stream or current
            if sides:
                for wait in waits:
                    stream.wait_event(ended[wait])
            start, stop = ranges[placed.index]
            if start < stop:  # else only its waits count, as others may rely on them through this place
                bound = programs[layer].nodes[placed.step.node]
                begun = None if marks is None else _mark(stream)
                with torch.cuda.stream(None if stream is current else stream):
                    self._launch(bound, grant, units, layer, (start, stop), values, stopwatch)
                if marks is not None and begun is not None:
                    marks.end(stream, begun, bound, placed.lane, layer, (start, stop))
            if place in awaited:
                ended[place] = self._event(len(ended))
                ended[place].record(stream)
        for side in sides:
            current.wait_stream(side)
        if marks is not None:
            marks.tell(stopwatch)

    def _granted(
        self, order: Sequence[Dispatch], mechanism: Mechanism, units: UnitsAtHand | None
    ) -> dict[tuple[Lane, int], LaneGrant]:
        """What steps of a lane with a share run on; nothing where lanes take turns on the current stream."""
        if self._grants is None:
            return {}
        steps = {(dispatch.placed.lane, dispatch.placed.step.share) for dispatch in order}
        if mechanism is not Mechanism.STREAMS and mechanism not in self._refused:
            memory_share = next((share for lane, share in steps if lane is Lane.MEMORY), ALL_UNITS // 2)
            reason = self._grants.refusal(mechanism, units, memory_share)
            if reason is not None:
                _log.warning("Lanes overlap by %s, not by %s: %s", Mechanism.STREAMS, mechanism, reason)
                self._refused.add(mechanism)
        if mechanism in self._refused:
            mechanism = Mechanism.STREAMS
        return {step: self._grants.of(mechanism, *step) for step in steps}

    def _launch(
        self,
        bound: BoundNode,
        grant: LaneGrant | None,
        units: UnitsAtHand | None,
        layer: int,
        tokens: tuple[int, int],
        values: Values,
        stopwatch: Stopwatch,
    ) -> None:
        """Queue a node's calls on the stream that is current now."""
        first = bound.calls[0].operation
        if isinstance(first, CollectiveOperation):
            # The waiting in it is the stream's. Where lanes overlap, it runs beside what the others compute.
            first.into(*values.network_tensors(bound, layer, *tokens), is_beside=self._grants is not None)
        elif self._grants is None or grant is None:
            values.run(bound, layer, *tokens, stopwatch)
        else:
            with self._grants.units.launching(grant.units, units):
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

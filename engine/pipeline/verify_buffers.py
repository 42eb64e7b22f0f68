"""`verify_buffers`: proves that every read finds in the arena what its producer wrote there, whatever the durations.

By the definition and not by lifetimes: a run of a few layers is written out, step by step and dependency by
dependency; every other write to the bytes of a read must happen before the producer or after the reader.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from engine.pipeline.buffers import BufferPlan
from engine.pipeline.dependencies import Dependencies, PlacedStep, kind_ranges
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.lifetimes import run_length
from engine.pipeline.schedule import Lane, Schedule, ScheduleError

_BEFORE_ALL = (-1, -1)
_AFTER_ALL = (-2, -2)
_Instance = tuple[int, int]  # (step, layer), or one of the two above: what comes before and after the layers


@dataclass(frozen=True, slots=True)
class _Write:
    step: int
    value: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Read:
    """A reader of rows that `producer` wrote in `layer`; either may be outside the layers."""

    producer: _Instance
    reader: _Instance
    layer: int
    value: str
    start: int
    stop: int


def verify_buffers(plan: BufferPlan, schedule: Schedule, graph: OperationGraph) -> None:
    """Raises `ScheduleError` for values that may be overwritten while they are needed, or lie outside the arena."""
    if plan.num_tokens != schedule.cut.num_tokens:
        raise ScheduleError(
            f"the buffers are planned for {plan.num_tokens} tokens and the schedule has {schedule.cut.num_tokens}:"
            f" plan them for this schedule."
        )
    dependencies = Dependencies.of(schedule, graph)
    writes = list(_writes(dependencies, schedule, graph))
    homeless = sorted(({write.value for write in writes} | {LAYER_INPUT, graph.output}) - plan.offsets.keys())
    if homeless:
        raise ScheduleError(f"the plan has no buffer for {', '.join(homeless)}: plan it for this schedule.")
    _verify_places(plan, graph)
    num_layers = run_length(plan.num_layers, schedule)
    run = _Order(dependencies, num_layers)
    for read in _reads(dependencies.steps, writes, schedule, graph, num_layers):
        for write in writes:
            _verify_write(plan, run, read, write, num_layers, dependencies.steps)


def _verify_places(plan: BufferPlan, graph: OperationGraph) -> None:
    for layer in range(2):
        if plan.address(LAYER_INPUT, layer) != plan.address(graph.output, layer - 1):
            raise ScheduleError(f"{LAYER_INPUT} must lie where {graph.output} of the layer before does.")
        for value in plan.offsets:
            if plan.address(value, layer) < 0 or plan.address(value, layer, plan.num_tokens) > plan.num_bytes:
                raise ScheduleError(f"the buffer of {value} does not lie within the arena of {plan.num_bytes} bytes.")


def _verify_write(
    plan: BufferPlan, run: "_Order", read: _Read, write: _Write, num_layers: int, steps: tuple[PlacedStep, ...]
) -> None:
    """In no layer does this write come between the read's producer and its reader."""
    begin, end = (plan.address(read.value, read.layer, row) for row in (read.start, read.stop))
    for layer in range(num_layers):
        writer = (write.step, layer)
        if plan.address(write.value, layer, write.stop) <= begin or end <= plan.address(
            write.value, layer, write.start
        ):
            continue
        if writer == read.producer and write.value == read.value:
            continue
        if writer == read.reader and _is_in_place(plan, read, write):
            continue
        if not (run.is_before(writer, read.producer) or run.is_before(read.reader, writer)):
            raise ScheduleError(
                f"overlapping buffers: {steps[write.step].step} of layer {layer} may write {write.value} over rows"
                f" {read.start} to {read.stop} of {read.value}, which {_name(read.reader, steps)} needs: their bytes"
                f" must be different."
            )


def _is_in_place(plan: BufferPlan, read: _Read, write: _Write) -> bool:
    return plan.in_place.get(write.value) == read.value and plan.offsets[write.value] == plan.offsets[read.value]


def _name(instance: _Instance, steps: tuple[PlacedStep, ...]) -> str:
    return "what follows the layers" if instance == _AFTER_ALL else f"{steps[instance[0]].step} of layer {instance[1]}"


def _writes(dependencies: Dependencies, schedule: Schedule, graph: OperationGraph) -> Iterator[_Write]:
    for placed in dependencies.steps:
        node = graph.by_name[placed.step.node]
        for start, stop in kind_ranges(schedule.cut, placed.step.start, placed.step.stop, node.tokens):
            for value in node.outputs:
                yield _Write(placed.index, value, start, stop)


def _reads(
    steps: tuple[PlacedStep, ...], writes: list[_Write], schedule: Schedule, graph: OperationGraph, num_layers: int
) -> Iterator[_Read]:
    """Every pair of a producer and a reader of the same rows, in all layers, before the first and after the last."""
    for placed in steps:
        node = graph.by_name[placed.step.node]
        for begin, end in kind_ranges(schedule.cut, placed.step.start, placed.step.stop, node.tokens):
            for write in writes:
                start, stop = max(begin, write.start), min(end, write.stop)
                lags = [0] * (write.value in node.inputs)
                lags += [1] * (write.value == graph.output and LAYER_INPUT in node.inputs)
                for lag in lags if start < stop else []:
                    for layer in range(num_layers):
                        producer = (write.step, layer - lag) if layer >= lag else _BEFORE_ALL
                        yield _Read(producer, (placed.index, layer), layer - lag, write.value, start, stop)
    for write in writes:
        if write.value == graph.output:
            last = num_layers - 1
            yield _Read((write.step, last), _AFTER_ALL, last, write.value, write.start, write.stop)


class _Order:
    """What happens before what in a run of some layers: for every step the set of those it waits for, at any remove."""

    def __init__(self, dependencies: Dependencies, num_layers: int) -> None:
        waits: defaultdict[_Instance, list[_Instance]] = defaultdict(list)
        for lane in Lane:
            steps = [placed for placed in dependencies.steps if placed.lane is lane]
            instances = sorted(
                (layer + placed.step.delay, placed.index, layer) for placed in steps for layer in range(num_layers)
            )
            for (_, first, first_layer), (_, second, second_layer) in pairwise(instances):
                waits[second, second_layer].append((first, first_layer))
        for placed in dependencies.steps:
            for producer, lag in dependencies.waits[placed.index]:
                for layer in range(lag, num_layers):
                    waits[placed.index, layer].append((producer, layer - lag))
        self._waits = waits
        self._before: dict[_Instance, frozenset[_Instance]] = {}

    def is_before(self, first: _Instance, second: _Instance) -> bool:
        """Whether `first` has ended when `second` begins."""
        if second == _AFTER_ALL or first == _BEFORE_ALL:
            return True
        if first == _AFTER_ALL or second == _BEFORE_ALL:
            return False
        return first in self._all_before(second)

    def _all_before(self, instance: _Instance) -> frozenset[_Instance]:
        """Depth first, without recursion, which a long run would not survive."""
        stack = [instance]
        while stack:
            top = stack[-1]
            unknown = [wait for wait in self._waits[top] if wait not in self._before]
            if top in self._before or not unknown:
                stack.pop()
                direct = self._waits[top]
                self._before.setdefault(top, frozenset(direct).union(*(self._before[wait] for wait in direct)))
            else:
                stack += unknown
        return self._before[instance]

"""The ways to break a schedule that is right, each with the sentence that must reject it. Imported by tests."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations

from engine.pipeline.dependencies import Dependencies, PlacedStep, has_tokens
from engine.pipeline.graph import OperationGraph
from engine.pipeline.schedule import Lane, Schedule, Step
from tests.engine.pipeline.schedule_strategies import needs


@dataclass(frozen=True, slots=True)
class Mutation:
    """A way to break a schedule: `apply` returns None where it has nothing to break; `error` matches the message."""

    name: str
    apply: Callable[[Schedule, OperationGraph], Schedule | None]
    error: str


def _change(schedule: Schedule, placed: PlacedStep, *steps: Step) -> Schedule:
    """The schedule with some steps in place of one."""
    place = [lane for lane, _ in schedule.steps][: placed.index].count(placed.lane)
    lane = schedule.lanes[placed.lane]
    return Schedule(schedule.cut, {**schedule.lanes, placed.lane: (*lane[:place], *steps, *lane[place + 1 :])})


def _busy(schedule: Schedule, graph: OperationGraph) -> Iterable[PlacedStep]:
    """The steps that have tokens to compute."""
    for placed in Dependencies.of(schedule, graph).steps:
        step = placed.step
        if has_tokens(schedule.cut, step.start, step.stop, graph.by_name[step.node].tokens):
            yield placed


def _missing(schedule: Schedule, graph: OperationGraph) -> Schedule:
    return _change(schedule, next(iter(_busy(schedule, graph))))


def _doubled(schedule: Schedule, graph: OperationGraph) -> Schedule:
    placed = list(_busy(schedule, graph))[-1]
    return _change(schedule, placed, placed.step, placed.step)


def _overlapping_ranges(schedule: Schedule, graph: OperationGraph) -> Schedule | None:
    for placed in _busy(schedule, graph):
        step, tokens = placed.step, graph.by_name[placed.step.node].tokens
        if step.stop < schedule.cut.num_tokens and has_tokens(schedule.cut, step.stop, step.stop + 1, tokens):
            return _change(schedule, placed, replace(step, stop=step.stop + 1))
    return None


def _unknown_node(schedule: Schedule, graph: OperationGraph) -> Schedule:
    placed = next(iter(_busy(schedule, graph)))
    return _change(schedule, placed, replace(placed.step, node="no_such_node"))


def _outside_the_batch(schedule: Schedule, graph: OperationGraph) -> Schedule:
    placed = next(iter(_busy(schedule, graph)))
    return _change(schedule, placed, replace(placed.step, stop=schedule.cut.num_tokens + 1))


def _wrong_share(schedule: Schedule, graph: OperationGraph) -> Schedule:
    placed = next(iter(_busy(schedule, graph)))
    return _change(schedule, placed, replace(placed.step, share=11))


def _wrong_starts(schedule: Schedule, graph: OperationGraph) -> Schedule | None:
    """Everything that the compute lane has first, where some of it needs the network."""
    dependencies = Dependencies.of(schedule, graph)
    compute = [placed.index for placed in dependencies.steps if placed.lane is Lane.COMPUTE]
    if all(dependencies.steps[needed].lane is Lane.COMPUTE for i in compute for needed in needs(dependencies, i)):
        return None
    starts = [Lane.COMPUTE] * len(compute) + [lane for lane, _ in schedule.steps if lane is not Lane.COMPUTE]
    return replace(schedule, starts=tuple(starts))


def _wrong_lane(schedule: Schedule, graph: OperationGraph) -> Schedule:
    placed = next(iter(_busy(schedule, graph)))
    to = Lane.COMPUTE if placed.lane is Lane.NETWORK else Lane.NETWORK
    without = _change(schedule, placed)
    return Schedule(schedule.cut, {**without.lanes, to: (*without.lanes.get(to, ()), placed.step)})


def _needs_the_future(schedule: Schedule, graph: OperationGraph) -> Schedule | None:
    dependencies = Dependencies.of(schedule, graph)
    for consumer, waits in enumerate(dependencies.waits):
        for producer, lag in waits:
            if producer != consumer:
                late = dependencies.steps[consumer].step.delay + lag + 1
                placed = dependencies.steps[producer]
                return _change(schedule, placed, replace(placed.step, delay=late))
    return None


def _swapped(schedule: Schedule, first: PlacedStep, second: PlacedStep) -> Schedule:
    """The two steps, of one lane, each in the other's place."""
    return _change(_change(schedule, first, second.step), second, first.step)


def _same_lane_pairs(schedule: Schedule, graph: OperationGraph) -> Iterable[tuple[PlacedStep, PlacedStep]]:
    """Producers and consumers that share a lane and a period."""
    dependencies = Dependencies.of(schedule, graph)
    for consumer in dependencies.steps:
        for producer in sorted(needs(dependencies, consumer.index)):
            if dependencies.steps[producer].lane is consumer.lane:
                yield dependencies.steps[producer], consumer


def _broken_dependency(schedule: Schedule, graph: OperationGraph) -> Schedule | None:
    pair = next(iter(_same_lane_pairs(schedule, graph)), None)
    return None if pair is None else _swapped(schedule, *pair)


def _read_before_write(schedule: Schedule, graph: OperationGraph) -> Schedule | None:
    """A chunk's attention before the KV write of an earlier range, with all other dependencies as they should be."""
    dependencies = Dependencies.of(schedule, graph)
    for producer, consumer in _same_lane_pairs(schedule, graph):
        writer, reader = graph.by_name[producer.step.node], graph.by_name[consumer.step.node]
        if writer.cache_writes and reader.cache_reads and producer.step.stop <= consumer.step.start:
            late = {producer.index}
            between = range(producer.index, consumer.index)
            for index in between:
                if needs(dependencies, index) & late:
                    late.add(index)
            if needs(dependencies, consumer.index) & late == {producer.index}:
                steps = [placed.step for placed in dependencies.steps]
                moved = [steps[index] for index in between if index not in late]
                moved += [consumer.step, *(steps[index] for index in sorted(late))]
                lane = [placed.step for placed in dependencies.steps if placed.lane is consumer.lane]
                place = lane.index(producer.step)
                lane[place : place + len(moved)] = moved
                return Schedule(schedule.cut, {**schedule.lanes, consumer.lane: tuple(lane)})
    return None


def _cycle(schedule: Schedule, graph: OperationGraph) -> Schedule | None:
    """Two collectives that depend on each other through compute alone, in the wrong order."""
    dependencies = Dependencies.of(schedule, graph)
    network = [placed for placed in dependencies.steps if placed.lane is Lane.NETWORK]
    for first, second in combinations(network, 2):
        reached = {second.index}
        while more := {needed for index in reached for needed in needs(dependencies, index)} - reached:
            reached |= more
        swapped = _swapped(schedule, first, second)
        in_order = all(producer.index < consumer.index for producer, consumer in _same_lane_pairs(swapped, graph))
        if first.index in reached and in_order:
            return swapped
    return None


# What `verify` must reject. Crossed collectives and overlapping buffers need more than one schedule to show: see the
# tests of `verify_group` and `verify_buffers`.
MUTATIONS = (
    Mutation("missing step", _missing, r"missing step: .*"),
    Mutation("doubled step", _doubled, r"doubled step: "),
    Mutation("overlap of ranges", _overlapping_ranges, r"doubled step: |belong to different branches"),
    Mutation("unknown node", _unknown_node, r"unknown node; the layer has "),
    Mutation("range outside the batch", _outside_the_batch, r"lie within the batch"),
    Mutation("share of eleven tenths", _wrong_share, r"a share is 1 to 10"),
    Mutation("start before its producer", _wrong_starts, r"the order of starts has .* whose result it needs"),
    Mutation("wrong lane", _wrong_lane, r"is on the wrong lane"),
    Mutation("needs the future", _needs_the_future, r"would be in a later period: give it a delay of at least"),
    Mutation("broken dependency", _broken_dependency, r"broken dependency on lane .* must come after it"),
    Mutation("KV read before write", _read_before_write, r"broken dependency on lane .* reads the KV cache written by"),
    Mutation("cycle between lanes", _cycle, r"a cycle between lanes: "),
)


def broken_schedules(schedule: Schedule, graph: OperationGraph) -> dict[Mutation, Schedule]:
    """Every mutation of the schedule that has something to break in it."""
    broken = {mutation: mutation.apply(schedule, graph) for mutation in MUTATIONS}
    return {mutation: mutant for mutation, mutant in broken.items() if mutant is not None}

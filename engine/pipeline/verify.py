"""`verify`: proves that a schedule computes what the model does, whatever the durations, or says what is wrong.

Every token passes every node once, a lane has each step after those that it depends on, and lanes never wait for
each other in a circle. `verify_group` adds what ranks must agree on. Memory has its own check: `verify_buffers`.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from engine.operation import Resource
from engine.pipeline.dependencies import Dependencies, PlacedStep, has_tokens
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.schedule import ALL_UNITS, LARGEST_DELAY, Lane, Mechanism, Schedule, ScheduleError, Step


def verify(schedule: Schedule, graph: OperationGraph) -> None:
    """Raises `ScheduleError`, which names the steps at fault and what would be right."""
    if any(min(part.num_decodes, part.num_prefills) < 0 for part in schedule.cut.nano_batches):
        raise ScheduleError("a nano-batch has a negative number of tokens: it can have none of a kind, but not fewer.")
    for lane, step in schedule.steps:
        _verify_step(schedule, graph, lane, step)
    steps: dict[str, list[Step]] = {}
    for _, step in schedule.steps:
        steps.setdefault(step.node, []).append(step)
    for node in graph.nodes:
        if node.branch is None:
            _verify_coverage(schedule, node, steps.get(node.name, []), 0, schedule.cut.num_tokens)
    if graph.branches:
        for start, stop in pairwise(schedule.cut.borders):
            _verify_branches(schedule, graph, steps, start, stop)
    dependencies = Dependencies.of(schedule, graph)
    for producer, consumer, lag in _dependency_pairs(dependencies):
        _verify_pair(graph, producer, consumer, lag)
    _verify_no_circle(dependencies)
    if schedule.starts:
        _verify_starts(schedule, dependencies)
    if schedule.mechanism is not Mechanism.STREAMS:
        _verify_mechanism(schedule)


def verify_group(schedules: Sequence[Schedule], graph: OperationGraph) -> None:
    """Verify every rank's schedule, and that all ranks start the same collectives in the same order."""
    for schedule in schedules:
        verify(schedule, graph)
    first = schedules[0]
    for rank, schedule in enumerate(schedules):
        if schedule.cut != first.cut:
            raise ScheduleError(f"rank {rank} cuts the batch otherwise than rank 0: all ranks must cut it alike.")
        ours, theirs = _collectives(schedule), _collectives(first)
        for place, (our, their) in enumerate(zip(ours, theirs, strict=False)):
            if our != their:
                raise ScheduleError(
                    f"crossed collectives: on lane network, place {place}, rank {rank} has {our} where rank 0 has"
                    f" {their}: all ranks must start the same collectives in the same order."
                )
        if len(ours) != len(theirs):
            raise ScheduleError(
                f"rank {rank} has {len(ours)} collectives and rank 0 has {len(theirs)}: all must start the same ones."
            )


def _collectives(schedule: Schedule) -> list[Step]:
    """Shares of execution units are a rank's own affair."""
    return [Step(step.node, step.start, step.stop, delay=step.delay) for step in schedule.lanes.get(Lane.NETWORK, ())]


def _verify_step(schedule: Schedule, graph: OperationGraph, lane: Lane, step: Step) -> None:
    node = graph.by_name.get(step.node)
    if node is None:
        raise ScheduleError(f"{step} on lane {lane}: unknown node; the layer has {', '.join(graph.by_name)}.")
    if not 0 <= step.start < step.stop <= schedule.cut.num_tokens:
        raise ScheduleError(
            f"{step} on lane {lane}: its range must hold a token and lie within the batch,"
            f" [0:{schedule.cut.num_tokens}]."
        )
    if not 1 <= step.share <= ALL_UNITS or not 0 <= step.delay <= LARGEST_DELAY:
        raise ScheduleError(
            f"{step} on lane {lane}: a share is 1 to {ALL_UNITS} tenths, and a delay is 0 to {LARGEST_DELAY} periods."
        )
    if (node.resource is Resource.NETWORK) != (lane is Lane.NETWORK):
        right = "network" if node.resource is Resource.NETWORK else "compute or memory"
        raise ScheduleError(f"{step} is on the wrong lane, {lane}: a {node.resource} operation belongs on {right}.")


def _verify_coverage(schedule: Schedule, node: Node, steps: Sequence[Step], start: int, stop: int) -> None:
    """Every token of the node's kind from `start` to `stop` is in exactly one of `steps`."""
    borders = {border for step in steps for border in (step.start, step.stop)} | {start, stop}
    for piece in pairwise(sorted(border for border in borders if start <= border <= stop)):
        if not has_tokens(schedule.cut, *piece, node.tokens):
            continue
        covering = [step for step in steps if step.start <= piece[0] and piece[1] <= step.stop]
        if not covering:
            kind = "" if node.branch is None else f" of branch {node.branch}"
            raise ScheduleError(
                f"missing step: nothing computes {node.name}[{piece[0]}:{piece[1]}]{kind};"
                f" its {node.tokens} tokens must each be in one step."
            )
        if len(covering) > 1:
            raise ScheduleError(
                f"doubled step: {covering[0]} and {covering[1]} both compute {node.name}[{piece[0]}:{piece[1]}];"
                f" each token must be in one of them."
            )


def _verify_branches(
    schedule: Schedule, graph: OperationGraph, steps: dict[str, list[Step]], start: int, stop: int
) -> None:
    """The nano-batch from `start` to `stop` takes one branch, all of it."""
    members = [node for node in graph.nodes if node.branch and has_tokens(schedule.cut, start, stop, node.tokens)]
    taken = {
        node.branch: step
        for node in members
        for step in steps.get(node.name, [])
        if has_tokens(schedule.cut, max(start, step.start), min(stop, step.stop), node.tokens)
    }
    if len(taken) > 1:
        first, second = list(taken.values())[:2]
        raise ScheduleError(
            f"{first} and {second} belong to different branches: nano-batch [{start}:{stop}] must take one of"
            f" {', '.join(graph.branches)}."
        )
    if members and not taken:
        raise ScheduleError(
            f"missing step: nano-batch [{start}:{stop}] takes none of the branches {', '.join(graph.branches)}."
        )
    for node in members:
        if node.branch in taken:
            _verify_coverage(schedule, node, steps.get(node.name, []), start, stop)


def _dependency_pairs(dependencies: Dependencies) -> Iterator[tuple[PlacedStep, PlacedStep, int]]:
    for consumer, waits in zip(dependencies.steps, dependencies.waits, strict=True):
        for producer, lag in waits:
            yield dependencies.steps[producer], consumer, lag


def _verify_pair(graph: OperationGraph, producer: PlacedStep, consumer: PlacedStep, lag: int) -> None:
    """The consumer is in no earlier period than the producer; in the same one and on the same lane, it comes later."""
    writer, reader = graph.by_name[producer.step.node], graph.by_name[consumer.step.node]
    needs = "reads the KV cache written by" if writer.cache_writes and reader.cache_reads else "needs the result of"
    wait = consumer.step.delay + lag - producer.step.delay
    if wait < 0:
        raise ScheduleError(
            f"delays: {consumer.step} {needs} {producer.step}, which would be in a later period:"
            f" give it a delay of at least {producer.step.delay - lag}."
        )
    if wait == 0 and consumer.lane is producer.lane and consumer.index <= producer.index:
        raise ScheduleError(
            f"broken dependency on lane {consumer.lane}: {consumer.step} {needs} {producer.step}"
            f" and must come after it."
        )


def _verify_no_circle(dependencies: Dependencies) -> None:
    """No deadlock. Nothing waits for a later period (`_verify_pair`), so a circle lies within one period."""
    waits: list[set[int]] = [set() for _ in dependencies.steps]
    for first, second in pairwise(dependencies.steps):
        if first.lane is second.lane:
            waits[second.index].add(first.index)
    for producer, consumer, lag in _dependency_pairs(dependencies):
        if producer.step.delay == consumer.step.delay + lag:
            waits[consumer.index].add(producer.index)
    blocked = set(range(len(waits)))
    while free := {index for index in blocked if not waits[index] & blocked}:
        blocked -= free
    if not blocked:
        return
    path = [min(blocked)]
    while path.count(path[-1]) == 1:
        path.append(min(waits[path[-1]] & blocked))
    circle = [dependencies.steps[index] for index in path[path.index(path[-1]) :]]
    names = ", which waits for ".join(f"{placed.step} on lane {placed.lane}" for placed in circle)
    raise ScheduleError(f"deadlock, a cycle between lanes: {names}: order the lanes so that one of these can begin.")


def _verify_starts(schedule: Schedule, dependencies: Dependencies) -> None:
    """The order of starts has every step, and none before one that it waits for in the same period."""
    indices = {lane: [placed.index for placed in dependencies.steps if placed.lane is lane] for lane in Lane}
    if any(schedule.starts.count(lane) != len(indices[lane]) for lane in Lane):
        raise ScheduleError("the order of starts must name a lane once for every step that the lane has.")
    queues = {lane: iter(mine) for lane, mine in indices.items()}
    place = {next(queues[lane]): count for count, lane in enumerate(schedule.starts)}
    for producer, consumer, lag in _dependency_pairs(dependencies):
        is_same_period = producer.step.delay == consumer.step.delay + lag
        if is_same_period and place[producer.index] > place[consumer.index]:
            raise ScheduleError(
                f"the order of starts has {consumer.step} before {producer.step}, whose result it needs: it must come"
                f" after."
            )


def _verify_mechanism(schedule: Schedule) -> None:
    """Both lanes that the mechanism divides are there, with the shares that it can give them."""
    mechanism = schedule.mechanism
    compute, memory = ({step.share for step in schedule.lanes.get(lane, ())} for lane in (Lane.COMPUTE, Lane.MEMORY))
    if not compute or not memory:
        raise ScheduleError(
            f"overlap {mechanism}: it is between the compute and the memory lane, of which one has no steps: leave out"
            " the line, or give both lanes steps."
        )
    if mechanism is Mechanism.CORESIDENT and compute | memory != {ALL_UNITS}:
        raise ScheduleError(
            f"overlap {mechanism}: every unit runs both lanes, so their steps have no shares, but these have"
            f" {_tenths(compute | memory)} tenths: leave out the shares."
        )
    is_split = len(compute) == len(memory) == 1 and min(compute) + min(memory) == ALL_UNITS
    if mechanism is Mechanism.GREEN and not is_split:
        raise ScheduleError(
            f"overlap {mechanism}: the units are split once for the whole step, so all steps of a lane have one share,"
            f" and both shares make {ALL_UNITS} tenths, such as 7 and 3; compute has {_tenths(compute)}, memory has"
            f" {_tenths(memory)}."
        )


def _tenths(shares: set[int]) -> str:
    return " and ".join(map(str, sorted(shares)))

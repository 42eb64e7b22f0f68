"""Random schedules that are right, the ways to break them, and the graphs to try both on. Imported by tests.

A schedule is drawn in the way that makes it right: tokens are dealt, each node is cut on its own, delays are lowered
until no step needs the future, and the lanes share out one order that respects every dependency.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise

import torch
from hypothesis import strategies as st

from engine.model_config import Architecture
from engine.models import build_model
from engine.operation import Resource, TokenKind
from engine.pipeline.dependencies import Dependencies, PlacedStep, has_tokens
from engine.pipeline.graph import LAYER_INPUT, Call, Node, OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Lane, Schedule, Step
from engine.pipeline.tracer import trace_layer
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel


@cache
def traced_graph(architecture: Architecture, num_ranks: int) -> OperationGraph:
    """The graph of a tiny model's layer as one of `num_ranks` ranks has it."""
    config = sized_config(architecture)
    model = build_model(config, TensorParallel(0, num_ranks), torch.float32, torch.device("cpu"))
    return trace_layer(model.layers[0], config.hidden_size).graph


def node(
    name: str,
    inputs: str,
    outputs: str = "",
    resource: Resource = Resource.COMPUTE,
    tokens: TokenKind = TokenKind.ALL,
    **more: bool | str,
) -> Node:
    """A node by hand; its value has its name unless `outputs` says otherwise."""
    values = tuple((outputs or name).split())
    call = Call(name=name, inputs=tuple(inputs.split()), signature=name)
    return Node(
        name=name,
        calls=(call,),
        inputs=call.inputs,
        outputs=values,
        resource=resource,
        tokens=tokens,
        **more,  # type: ignore[arg-type]
    )


def two_way_graph() -> OperationGraph:
    """The paper's layer, with both ways to place the attention's collective: AG, O, AG or O, AR."""
    attention = "decode_attention prefill_attention"
    nodes = (
        node("qkv", LAYER_INPUT, cache_writes=True),
        node("decode_attention", "qkv", resource=Resource.MEMORY, tokens=TokenKind.DECODE, cache_reads=True),
        node("prefill_attention", "qkv", tokens=TokenKind.PREFILL, cache_reads=True),
        node("gather_heads", attention, resource=Resource.NETWORK, branch="gather"),
        node("o_columns", "gather_heads", branch="gather"),
        node("gather_columns", "o_columns", "attended", Resource.NETWORK, branch="gather"),
        node("o_rows", attention, branch="reduce"),
        node("reduce_rows", "o_rows", "attended", Resource.NETWORK, branch="reduce"),
        node("up", f"{LAYER_INPUT} attended", "residual up"),
        node("down", "up"),
        node("reduce_down", "down", resource=Resource.NETWORK),
        node("add", "residual reduce_down", resource=Resource.MEMORY),
    )
    return OperationGraph(nodes, "add")


@cache
def graphs() -> dict[str, OperationGraph]:
    """Dense and expert layers, alone and of two ranks; two branches; and the smallest one."""
    models = (Architecture.LLAMA, Architecture.QWEN3, Architecture.MIXTRAL)
    traced = {f"{model.name.lower()}-{size}": traced_graph(model, size) for model in models for size in (1, 2)}
    return traced | {"two-way": two_way_graph(), "one-node": OperationGraph((node("all", LAYER_INPUT),), "all")}


def any_graph() -> st.SearchStrategy[OperationGraph]:
    """One of `graphs`."""
    return st.sampled_from(list(graphs())).map(lambda name: graphs()[name])


@st.composite
def schedules(draw: st.DrawFn, graph: OperationGraph, max_tokens: int = 24, *, in_delays: int = 2) -> Schedule:
    """A schedule that passes `verify`: any cut, other ranges for every node, delays up to `in_delays`, 2 or 3 lanes."""
    cut = draw(cuts(max_tokens))
    ranges = [step for item in _ways(draw, graph, cut) for step in _ranges(draw, cut, *item)]
    steps = list(dict.fromkeys(ranges))
    shares = draw(st.booleans())
    if shares:
        steps = [replace(step, share=draw(st.integers(1, 10))) for step in steps]
    steps = _with_delays(draw, graph, cut, steps, in_delays)
    order = _period_order(draw, graph, cut, steps)
    lanes: dict[Lane, list[Step]] = {lane: [] for lane in draw(st.permutations(list(Lane)))}
    has_memory_lane = draw(st.booleans())
    for step in order:
        if graph.by_name[step.node].resource is Resource.NETWORK:
            lanes[Lane.NETWORK].append(step)
        else:
            lanes[Lane.MEMORY if has_memory_lane and draw(st.booleans()) else Lane.COMPUTE].append(step)
    return Schedule(cut, {lane: tuple(steps) for lane, steps in lanes.items()})


@st.composite
def cuts(draw: st.DrawFn, max_tokens: int = 24) -> Cut:
    """One to four nano-batches of either kind, or none, of tokens, with a token at least in all."""
    num_nano_batches = draw(st.integers(1, 4))
    sizes = st.integers(0, max(1, max_tokens // (2 * num_nano_batches)))
    parts = draw(st.lists(st.tuples(sizes, sizes), min_size=num_nano_batches, max_size=num_nano_batches))
    if not any(map(sum, parts)):
        parts[0] = (1, 0)
    return Cut(tuple(NanoBatch(*part) for part in parts))


def sequential(graph: OperationGraph, *nano_batches: NanoBatch, branch: int = 0) -> Schedule:
    """Nodes in their order, each nano-batch after nano-batch, without a memory lane; for tests by example."""
    cut = Cut(nano_batches)
    steps = [
        (item, Step(item.name, start, stop))
        for item in graph.nodes
        if item.branch is None or item.branch == graph.branches[branch]
        for start, stop in pairwise(cut.borders)
        if has_tokens(cut, start, stop, item.tokens)
    ]
    network = tuple(step for item, step in steps if item.resource is Resource.NETWORK)
    compute = tuple(step for item, step in steps if item.resource is not Resource.NETWORK)
    return Schedule(cut, {Lane.COMPUTE: compute, Lane.NETWORK: network})


def _ways(draw: st.DrawFn, graph: OperationGraph, cut: Cut) -> Iterable[tuple[Node, int, int]]:
    """Every node with the positions to cover; of the branches, the one that each nano-batch is dealt."""
    for item in graph.nodes:
        if item.branch is None:
            yield item, 0, cut.num_tokens
    for start, stop in pairwise(cut.borders):
        branch = draw(st.sampled_from(graph.branches)) if graph.branches else None
        for item in graph.nodes:
            if branch is not None and item.branch == branch:
                yield item, start, stop


def _ranges(draw: st.DrawFn, cut: Cut, item: Node, start: int, stop: int) -> Iterable[Step]:
    """Up to four ranges, cut anywhere; those without a token of the node's kind may stay or go."""
    if start == stop:
        return
    inner = draw(st.sets(st.integers(start + 1, stop - 1), max_size=3)) if stop - start > 1 else set()
    keep_idle = draw(st.booleans())
    for first, last in pairwise(sorted({start, stop} | inner)):
        if keep_idle or has_tokens(cut, first, last, item.tokens):
            yield Step(item.name, first, last)


def _one_lane(graph: OperationGraph, cut: Cut, steps: Sequence[Step]) -> Dependencies:
    """The dependencies of steps that have no order yet; step i has index i."""
    return Dependencies.of(Schedule(cut, {Lane.COMPUTE: tuple(steps)}), graph)


def _with_delays(draw: st.DrawFn, graph: OperationGraph, cut: Cut, steps: Sequence[Step], most: int) -> Sequence[Step]:
    """Any delays, lowered until no producer is in a later period than its consumer."""
    delays = [draw(st.integers(0, most)) for _ in steps]
    dependencies = _one_lane(graph, cut, steps)
    changed = True
    while changed:
        changed = False
        for consumer, waits in enumerate(dependencies.waits):
            for producer, lag in waits:
                if delays[producer] > delays[consumer] + lag:
                    delays[producer], changed = delays[consumer] + lag, True
    return [replace(step, delay=delay) for step, delay in zip(steps, delays, strict=True)]


def _period_order(draw: st.DrawFn, graph: OperationGraph, cut: Cut, steps: Sequence[Step]) -> Sequence[Step]:
    """A random order of one period in which everything comes after what it needs of the same period."""
    dependencies = _one_lane(graph, cut, steps)
    priorities = draw(st.permutations(range(len(steps))))
    waiting = dict.fromkeys(priorities)
    order = []
    while waiting:
        ready = next(index for index in waiting if not _needs(dependencies, index) & waiting.keys())
        del waiting[ready]
        order.append(steps[ready])
    return order


def _needs(dependencies: Dependencies, index: int) -> set[int]:
    """What a step waits for in its own period."""
    delays = [placed.step.delay for placed in dependencies.steps]
    return {producer for producer, lag in dependencies.waits[index] if delays[producer] == delays[index] + lag}


@dataclass(frozen=True, slots=True)
class Mutation:
    """A way to break a schedule: `apply` returns None where it has nothing to break; `error` matches the message."""

    name: str
    apply: Callable[[Schedule, OperationGraph], Schedule | None]
    error: str


def _change(schedule: Schedule, placed: PlacedStep, *steps: Step) -> Schedule:
    """The schedule with some steps in place of one."""
    before = sum(len(others) for lane, others in schedule.lanes.items() if _is_before(schedule, lane, placed.lane))
    place = placed.index - before
    lane = schedule.lanes[placed.lane]
    return Schedule(schedule.cut, {**schedule.lanes, placed.lane: (*lane[:place], *steps, *lane[place + 1 :])})


def _is_before(schedule: Schedule, lane: Lane, other: Lane) -> bool:
    lanes = list(schedule.lanes)
    return lanes.index(lane) < lanes.index(other)


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
        for producer in sorted(_needs(dependencies, consumer.index)):
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
                if _needs(dependencies, index) & late:
                    late.add(index)
            if _needs(dependencies, consumer.index) & late == {producer.index}:
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
        while more := {needed for index in reached for needed in _needs(dependencies, index)} - reached:
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

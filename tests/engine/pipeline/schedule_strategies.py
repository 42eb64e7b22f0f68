"""Random schedules that are right, and graphs to draw them for. Imported by tests.

A schedule is drawn in the way that makes it right: tokens are dealt, each node is cut on its own, delays are lowered
until no step needs the future, and the lanes share out one order that respects every dependency.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import torch
from hypothesis import strategies as st

from engine.model_config import Architecture
from engine.models import build_model
from engine.operation import Resource, TokenKind
from engine.pipeline.dependencies import Dependencies, has_tokens
from engine.pipeline.graph import LAYER_INPUT, Call, Node, OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism, Schedule, Step
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
    steps: Sequence[Step] = list(dict.fromkeys(ranges))
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
    lane_of = {step: lane for lane, steps in lanes.items() for step in steps}
    starts = tuple(lane_of[step] for step in order) if draw(st.booleans()) else ()
    schedule = Schedule(cut, {lane: tuple(steps) for lane, steps in lanes.items()}, starts)
    return _overlapping(draw, schedule) if lanes[Lane.MEMORY] and lanes[Lane.COMPUTE] else schedule


def _overlapping(draw: st.DrawFn, schedule: Schedule) -> Schedule:
    """The schedule by some mechanism, with the shares that this can give to its lanes."""
    mechanism = draw(st.sampled_from(Mechanism))
    if mechanism is Mechanism.STREAMS:
        return schedule
    compute = draw(st.integers(1, ALL_UNITS - 1)) if mechanism is Mechanism.GREEN else ALL_UNITS
    shares = {Lane.COMPUTE: compute, Lane.MEMORY: ALL_UNITS - compute or ALL_UNITS, Lane.NETWORK: ALL_UNITS}
    lanes = {lane: tuple(replace(step, share=shares[lane]) for step in steps) for lane, steps in schedule.lanes.items()}
    return replace(schedule, lanes=lanes, mechanism=mechanism)


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
        ready = next(index for index in waiting if not needs(dependencies, index) & waiting.keys())
        del waiting[ready]
        order.append(steps[ready])
    return order


def needs(dependencies: Dependencies, index: int) -> set[int]:
    """What a step waits for in its own period."""
    delays = [placed.step.delay for placed in dependencies.steps]
    return {producer for producer, lag in dependencies.waits[index] if delays[producer] == delays[index] + lag}

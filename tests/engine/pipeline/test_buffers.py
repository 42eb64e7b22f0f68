import random
from collections.abc import Mapping
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.operation import Resource
from engine.pipeline.buffers import ALIGNMENT, BufferPlan, plan_buffers
from engine.pipeline.dependencies import kind_ranges
from engine.pipeline.dispatch import Dispatch, dispatch_order
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.nano_batch import NanoBatch
from engine.pipeline.schedule import Lane, Schedule, ScheduleError
from engine.pipeline.verify_buffers import verify_buffers
from tests.engine.pipeline.schedule_strategies import any_graph, graphs, node, schedules, sequential

# Who may write over whom, and who has other rows of whose place, where a graph has these values.
IN_PLACE = {
    "attention_all_reduce": "o_proj",
    "feed_forward_all_reduce": "down_proj",
    "reduce_down": "down",
    "attended": "o_rows",
}
JOINED = {"prefill_attention": "decode_attention"}
LLAMA_8B = {"gate_up_proj": 28672}


def _shared(graph: OperationGraph, shared: Mapping[str, str]) -> dict[str, str]:
    return {value: other for value, other in shared.items() if value in graph.producers and other in graph.producers}


def _widths(graph: OperationGraph, draw: st.DataObject) -> dict[str, int]:
    widths = {value: draw.draw(st.sampled_from([32, 64, 96, 512])) for value in graph.producers}
    for value, other in {**_shared(graph, JOINED), **_shared(graph, IN_PLACE)}.items():
        widths[value] = widths[other]
    return widths


def _llama_widths(graph: OperationGraph) -> dict[str, int]:
    return {value: LLAMA_8B.get(value, 4096) for value in graph.producers}


def _plan(graph: OperationGraph, schedule: Schedule, widths: Mapping[str, int], num_layers: int = 9) -> BufferPlan:
    return plan_buffers(
        schedule,
        graph,
        widths,
        2,
        num_layers=num_layers,
        in_place=_shared(graph, IN_PLACE),
        joined=_shared(graph, JOINED),
    )


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_plans_of_random_schedules_pass_and_run_in_any_order(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph))
    plan = _plan(graph, schedule, _widths(graph, data), num_layers=data.draw(st.integers(1, 12)))
    verify_buffers(plan, schedule, graph)
    _run(plan, schedule, graph, data.draw(st.integers(0, 1000)))


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_a_longer_run_shows_nothing_that_a_short_one_does_not(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph, 8))
    num_layers = data.draw(st.integers(11, 14))
    plan = _plan(graph, schedule, _widths(graph, data), num_layers)
    with patch("engine.pipeline.verify_buffers.run_length", return_value=num_layers):
        verify_buffers(plan, schedule, graph)


def _run(plan: BufferPlan, schedule: Schedule, graph: OperationGraph, seed: int) -> None:
    """Run all layers on an arena of stamps, the lanes as unevenly as they may; every read must find its producer's."""
    arena = np.zeros((plan.num_bytes, 3), dtype=np.int64)
    order = dispatch_order(schedule, graph, plan.num_layers)
    values = [LAYER_INPUT, *graph.producers]

    def rows(value: str, layer: int, start: int, stop: int) -> NDArray[np.int64]:
        return arena[plan.address(value, layer, start) : plan.address(value, layer, stop)]

    rows(LAYER_INPUT, 0, 0, plan.num_tokens)[:] = values.index(graph.output), -1, 0
    for place in _any_order(order, random.Random(seed)):
        placed, layer, _ = order[place]
        item = graph.by_name[placed.step.node]
        for start, stop in kind_ranges(schedule.cut, placed.step.start, placed.step.stop, item.tokens):
            for value in item.inputs:
                name, of_layer = (graph.output, layer - 1) if value == LAYER_INPUT else (value, layer)
                for first, last in _written(schedule, graph, name, start, stop):
                    assert (rows(name, of_layer, first, last) == (values.index(name), of_layer, 0)).all(), (
                        placed,
                        layer,
                        name,
                    )
            for value in item.outputs:
                rows(value, layer, start, stop)[:] = values.index(value), layer, 0
    last = plan.num_layers - 1
    assert (rows(graph.output, last, 0, plan.num_tokens) == (values.index(graph.output), last, 0)).all()


def _written(schedule: Schedule, graph: OperationGraph, value: str, start: int, stop: int) -> list[tuple[int, int]]:
    """The rows of a range that the producers of the value fill: attention has one kind only."""
    return [
        (max(start, first), min(stop, last))
        for _, step in schedule.steps
        if step.node in graph.producers[value]
        for first, last in kind_ranges(schedule.cut, step.start, step.stop, graph.by_name[step.node].tokens)
        if max(start, first) < min(stop, last)
    ]


def _any_order(order: list[Dispatch], generator: random.Random) -> list[int]:
    """An order that lanes and waits allow, with one lane far ahead of the others for as long as it can be."""
    queues = {lane: [place for place, item in enumerate(order) if item.placed.lane is lane] for lane in Lane}
    done: set[int] = set()
    result = []
    favourite = generator.choice(list(Lane))
    while any(queues.values()):
        ready = [lane for lane, queue in queues.items() if queue and done.issuperset(order[queue[0]].waits)]
        if generator.random() < 0.1:
            favourite = generator.choice(list(Lane))
        lane = favourite if favourite in ready else generator.choice(ready)
        place = queues[lane].pop(0)
        done.add(place)
        result.append(place)
    return result


@pytest.mark.parametrize("num_nano_batches", [1, 2])
def test_one_arena_serves_a_layer_of_llama_3_8b(num_nano_batches: int) -> None:
    graph = graphs()["llama-2"]
    part = NanoBatch(512 // num_nano_batches, 1536 // num_nano_batches)
    schedule = sequential(graph, *[part] * num_nano_batches)
    plan = _plan(graph, schedule, _llama_widths(graph) | {"of another graph": 1}, num_layers=32)
    assert plan.naive_bytes == 2 * 2048 * (28672 + 9 * 4096)
    verify_buffers(plan, schedule, graph)
    # At the same time live in gate_up_proj: its output, the sum beside it, and both of its inputs.
    assert 2 * 2048 * 28672 < plan.num_bytes <= 2 * 2048 * (28672 + 3 * 4096)
    assert plan.num_bytes < 0.63 * plan.naive_bytes
    assert all(offset % ALIGNMENT == 0 for copies in plan.offsets.values() for offset in copies)


def test_collectives_and_the_two_attentions_take_no_memory_of_their_own() -> None:
    graph = graphs()["llama-2"]
    plan = _plan(graph, sequential(graph, NanoBatch(2, 2)), _llama_widths(graph))
    assert plan.offsets["attention_all_reduce"] == plan.offsets["o_proj"]
    assert plan.offsets["prefill_attention"] == plan.offsets["decode_attention"]
    assert plan.offsets[LAYER_INPUT] == plan.offsets[graph.output]


@pytest.mark.parametrize("name", ["llama-2", "mixtral-1", "two-way"])
def test_a_tampered_plan_is_rejected(name: str) -> None:
    """No operation may write where it reads, unless it is said to be in place."""
    graph = graphs()[name]
    schedule = sequential(graph, NanoBatch(3, 2), NanoBatch(2, 3))
    plan = _plan(graph, schedule, dict.fromkeys(graph.producers, 128))
    used = {step.node for _, step in schedule.steps}
    pairs = [
        (value, output)
        for item in graph.nodes
        if item.name in used
        for value in item.inputs
        for output in item.outputs
        if plan.in_place.get(output) != value and value in plan.offsets
    ]
    assert len(pairs) > 5
    for value, output in pairs:
        offsets = {**plan.offsets, output: plan.offsets[value]}
        if output == graph.output:
            offsets[LAYER_INPUT] = offsets[output]
        with pytest.raises(ScheduleError, match=r"overlapping buffers: .* may write .* which .* needs"):
            verify_buffers(replace(plan, offsets=offsets), schedule, graph)


def test_a_branch_that_is_not_taken_has_no_memory() -> None:
    graph = graphs()["two-way"]
    schedule = sequential(graph, NanoBatch(2, 2), branch=1)
    plan = _plan(graph, schedule, dict.fromkeys(graph.producers, 128))
    assert {*graph.producers} - {*plan.offsets} == {"gather_heads", "o_columns"}
    verify_buffers(plan, schedule, graph)
    other = sequential(graph, NanoBatch(2, 2), branch=0)
    with pytest.raises(ScheduleError, match="the plan has no buffer for gather_heads, o_columns"):
        verify_buffers(plan, other, graph)


def test_one_byte_too_near_is_rejected() -> None:
    graph = OperationGraph((node("up", LAYER_INPUT), node("down", "up")), "down")
    schedule = sequential(graph, NanoBatch(4, 0))
    plan = plan_buffers(schedule, graph, {"up": 128, "down": 128}, 2, num_layers=3)
    assert plan.num_bytes == plan.naive_bytes == 2048
    verify_buffers(plan, schedule, graph)
    near = replace(plan, offsets={"up": (1023,), "down": (0,), LAYER_INPUT: (0,)})
    with pytest.raises(ScheduleError, match="overlapping buffers"):
        verify_buffers(near, schedule, graph)
    with pytest.raises(ScheduleError, match="up does not lie within the arena of 2048 bytes"):
        verify_buffers(replace(plan, offsets={"up": (1025,), "down": (0,), LAYER_INPUT: (0,)}), schedule, graph)
    with pytest.raises(ScheduleError, match="hidden must lie where down of the layer before does"):
        verify_buffers(replace(plan, offsets={**plan.offsets, LAYER_INPUT: plan.offsets["up"]}), schedule, graph)
    with pytest.raises(ScheduleError, match="planned for 4 tokens and the schedule has 5"):
        verify_buffers(plan, schedule.scaled(5, 0), graph)


def test_a_lane_that_runs_ahead_keeps_buffers_apart() -> None:
    """One lane's steps are in order and share memory; on two lanes the same values may be live together."""
    nodes = (
        node("left", LAYER_INPUT),
        node("left_end", "left"),
        node("right", LAYER_INPUT),
        node("right_end", "right"),
    )
    graph = OperationGraph((*nodes, node("add", "left_end right_end")), "add")
    widths = dict.fromkeys(graph.producers, 128) | {"left": 1280, "right": 1280}
    one_lane = sequential(graph, NanoBatch(4, 0))
    text = "nano-batches: 4+0\ncompute: left[0:4] left_end[0:4]\nmemory: right[0:4] right_end[0:4] add[0:4]\n"
    two_lanes = Schedule.parse(text)
    plans = {schedule: plan_buffers(schedule, graph, widths, 2, num_layers=4) for schedule in (one_lane, two_lanes)}
    for schedule, plan in plans.items():
        verify_buffers(plan, schedule, graph)
    assert plans[one_lane].num_bytes < 4 * 2 * 2 * 1280 < plans[two_lanes].num_bytes
    with pytest.raises(ScheduleError, match="overlapping buffers"):
        verify_buffers(plans[one_lane], two_lanes, graph)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_a_layer_that_reads_its_input_while_it_writes_its_output_has_two_copies_of_it(num_layers: int) -> None:
    graph = graphs()["one-node"]
    schedule = sequential(graph, NanoBatch(4, 0))
    plan = plan_buffers(schedule, graph, {"all": 128}, 2, num_layers=num_layers)
    assert plan.offsets["all"] == plan.offsets[LAYER_INPUT][::-1]
    assert plan.num_bytes == 2 * 4 * 2 * 128
    verify_buffers(plan, schedule, graph)
    _run(plan, schedule, graph, 0)
    one_copy = replace(plan, offsets={"all": (0,), LAYER_INPUT: (0,)})
    with pytest.raises(ScheduleError, match="overlapping buffers"):
        verify_buffers(one_copy, schedule, graph)


def test_what_nothing_waits_for_has_no_safe_buffer() -> None:
    """A reader that the layer's output does not depend on may still read when the next layer writes."""
    nodes = (node("up", LAYER_INPUT), node("watch", "up", resource=Resource.MEMORY), node("down", "up"))
    graph = OperationGraph(nodes, "down")
    schedule = Schedule.parse("nano-batches: 4+0\ncompute: up[0:4] down[0:4]\nmemory: watch[0:4]\n")
    with pytest.raises(ScheduleError, match="nothing makes a later layer's write to up wait for this one's readers"):
        plan_buffers(schedule, graph, {"up": 8, "down": 8, "watch": 8}, 2, num_layers=3)
    verify_buffers(plan_buffers(schedule, graph, {"up": 8, "down": 8, "watch": 8}, 2, num_layers=1), schedule, graph)


def test_in_place_needs_that_nobody_else_reads_the_input_later() -> None:
    nodes = (
        node("up", LAYER_INPUT),
        node("reduce", "up", resource=Resource.NETWORK),
        node("down", "up reduce"),
    )
    graph = OperationGraph(nodes, "down")
    widths = {"up": 8, "reduce": 8, "down": 8}
    schedule = sequential(graph, NanoBatch(4, 0))
    with pytest.raises(ScheduleError, match=r"reduce\[0:4\] would write over up while that may be needed: reduce must"):
        plan_buffers(schedule, graph, widths, 2, num_layers=2, in_place={"reduce": "up"})
    plan = plan_buffers(schedule, graph, widths, 2, num_layers=2)
    wrong = replace(plan, offsets={**plan.offsets, "reduce": plan.offsets["up"]}, in_place={"reduce": "up"})
    with pytest.raises(ScheduleError, match="overlapping buffers"):
        verify_buffers(wrong, schedule, graph)


def test_widths_must_be_known_and_agree() -> None:
    graph = OperationGraph((node("up", LAYER_INPUT), node("down", "up")), "down")
    schedule = sequential(graph, NanoBatch(4, 0))
    with pytest.raises(ScheduleError, match="the widths of down are missing"):
        plan_buffers(schedule, graph, {"up": 8}, 2, num_layers=2)
    with pytest.raises(ScheduleError, match="down cannot lie where up does"):
        plan_buffers(schedule, graph, {"up": 8, "down": 4}, 2, num_layers=2, in_place={"down": "up"})

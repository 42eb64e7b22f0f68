from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.operation import Resource
from engine.pipeline.dependencies import Dependencies
from engine.pipeline.dispatch import Dispatch, dispatch_order
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.nano_batch import NanoBatch
from engine.pipeline.schedule import Lane, Schedule, ScheduleError
from tests.engine.pipeline.schedule_strategies import any_graph, graphs, node, schedules, sequential


def _done_before(order: list[Dispatch]) -> list[set[int]]:
    """For every place, what has certainly ended when it begins: what its lane ran, what it waited for, and so on."""
    done: list[set[int]] = []
    last: dict[Lane, int] = {}
    for place, (placed, _, waits) in enumerate(order):
        direct = {*waits, *([last[placed.lane]] if placed.lane in last else [])}
        done.append(direct.union(*(done[other] for other in direct)))
        last[placed.lane] = place
    return done


@given(st.data())
@settings(max_examples=60)
def test_every_step_of_every_layer_once_after_all_it_needs(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph))
    num_layers = data.draw(st.integers(1, 5))
    order = dispatch_order(schedule, graph, num_layers)
    dependencies = Dependencies.of(schedule, graph)
    places = {(dispatch.placed.index, dispatch.layer): place for place, dispatch in enumerate(order)}

    assert sorted(places) == [(index, layer) for index in range(len(dependencies.steps)) for layer in range(num_layers)]
    assert len(order) == len(places)
    done = _done_before(order)
    for place, (placed, layer, waits) in enumerate(order):
        assert all(order[wait].placed.lane is not placed.lane and wait < place for wait in waits)
        for producer, lag in dependencies.waits[placed.index]:
            assert layer < lag or places[producer, layer - lag] in done[place]


@given(st.data())
@settings(max_examples=40)
def test_a_lane_keeps_its_order_period_by_period(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph))
    order = dispatch_order(schedule, graph, 4)
    for lane in schedule.lanes:
        mine = [(layer + placed.step.delay, placed.index) for placed, layer, _ in order if placed.lane is lane]
        assert mine == sorted(mine)


@given(st.data())
@settings(max_examples=40)
def test_no_wait_is_implied_by_the_others(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    order = dispatch_order(data.draw(schedules(graph)), graph, 3)
    done = _done_before(order)
    last: dict[Lane, int] = {}
    for place, (placed, _, waits) in enumerate(order):
        earlier = [last[placed.lane]] if placed.lane in last else []
        for wait in waits:
            others = {*earlier, *waits} - {wait}
            assert wait not in others.union(*(done[other] for other in others))
        last[placed.lane] = place


@given(st.data())
@settings(max_examples=40)
def test_a_collective_is_issued_as_soon_as_its_inputs_are(data: st.DataObject) -> None:
    """Right after the last step that it needs, or after the collective before it."""
    graph = data.draw(any_graph())
    schedule = replace(data.draw(schedules(graph)), starts=())
    order = dispatch_order(schedule, graph, 3)
    places = {(dispatch.placed.index, dispatch.layer): place for place, dispatch in enumerate(order)}
    dependencies = Dependencies.of(schedule, graph)
    before = -1
    for place, (placed, layer, _) in enumerate(order):
        if placed.lane is Lane.NETWORK:
            waits = dependencies.waits[placed.index]
            needed = [places[producer, layer - lag] for producer, lag in waits if layer >= lag]
            assert place == max([before, *needed]) + 1
            before = place


@given(st.data())
@settings(max_examples=40)
def test_steps_are_issued_in_the_order_of_their_planned_starts(data: st.DataObject) -> None:
    """The strategy gives starts that respect every dependency, so nothing keeps a step from its place."""
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph).filter(lambda schedule: bool(schedule.starts)))
    order = dispatch_order(schedule, graph, 3)
    queues = {lane: iter(steps) for lane, steps in schedule.lanes.items()}
    starts = [next(queues[lane]) for lane in schedule.starts]
    issued = [(layer + placed.step.delay, starts.index(placed.step)) for placed, layer, _ in order]
    assert issued == sorted(issued)


def test_starts_that_contradict_a_dependency_give_way_to_it() -> None:
    nodes = (node("up", LAYER_INPUT), node("reduce", "up", resource=Resource.NETWORK))
    schedule = Schedule.parse("nano-batches: 1+0\ncompute: up[0:1]\nnetwork: reduce[0:1]\nstarts: NC\n")
    order = dispatch_order(schedule, OperationGraph(nodes, "reduce"), 1)
    assert [placed.step.node for placed, _, _ in order] == ["up", "reduce"]


def test_two_nano_batches_compute_while_the_other_communicates() -> None:
    nodes = (
        node("up", LAYER_INPUT),
        node("reduce", "up", resource=Resource.NETWORK),
        node("down", "reduce"),
    )
    graph = OperationGraph(nodes, "down")
    order = dispatch_order(sequential(graph, NanoBatch(2, 0), NanoBatch(2, 0)), graph, 2)
    assert [f"{placed.step} {layer} {waits}" for placed, layer, waits in order] == [
        "up[0:2] 0 ()",
        "reduce[0:2] 0 (0,)",
        "up[2:4] 0 ()",
        "reduce[2:4] 0 (2,)",
        "down[0:2] 0 (1,)",
        "down[2:4] 0 (3,)",
        "up[0:2] 1 ()",
        "reduce[0:2] 1 (6,)",
        "up[2:4] 1 ()",
        "reduce[2:4] 1 (8,)",
        "down[0:2] 1 (7,)",
        "down[2:4] 1 (9,)",
    ]


def test_delayed_steps_belong_to_earlier_layers() -> None:
    graph = OperationGraph((node("head", LAYER_INPUT), node("tail", "head")), "tail")
    schedule = Schedule.parse("nano-batches: 1+0\ncompute: tail[0:1]@1 head[0:1]\n")
    order = dispatch_order(schedule, graph, 3)
    assert [(placed.step.node, layer) for placed, layer, _ in order] == [
        ("head", 0),
        ("tail", 0),
        ("head", 1),
        ("tail", 1),
        ("head", 2),
        ("tail", 2),
    ]


def test_deadlock_is_an_error_that_names_the_steps() -> None:
    graph = graphs()["llama-2"]
    schedule = sequential(graph, NanoBatch(2, 2))
    reverse = Schedule(schedule.cut, {**schedule.lanes, Lane.NETWORK: schedule.lanes[Lane.NETWORK][::-1]})
    with pytest.raises(ScheduleError, match=r"wait for each other at feed_forward_all_reduce\[0:4\] of layer 0 on"):
        dispatch_order(reverse, graph, 2)

"""Schedules run on paper: hand-computed times."""

from itertools import pairwise

import pytest

from engine.batch_shape import BatchShape
from engine.operation import Resource
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Lane, Schedule, ScheduleError
from engine.pipeline.sequential import sequential_schedule
from engine.pipeline.simulator import Simulator
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.verify import verify
from tests.engine.pipeline.planned_layer import PAPER_SHAPE, PAPER_SPEEDS, TABLE_2, LineCosts, layer, node

# Two independent chains of one layer: `first` and `second` feed nothing but the layer's end.
PAIR = OperationGraph(
    (
        node("first", ["hidden"], Resource.COMPUTE),
        node("second", ["hidden"], Resource.NETWORK),
        node("end", ["first", "second"], Resource.COMPUTE),
    ),
    "end",
)
TOKENS = BatchShape(num_decodes=0, num_prefills=10)
PAIR_TEXT = "nano-batches: 0+10\ncompute: first[0:10]{first} end[0:10]\nnetwork: second[0:10]{second}\n"


def simulate_pair(costs: LineCosts, first: str = "", second: str = "", more: str = "") -> Simulator:
    return Simulator(Schedule.parse(PAIR_TEXT.format(first=first, second=second) + more), PAIR, costs, TOKENS)


def pair_costs(**settings: object) -> LineCosts:
    return LineCosts({"first": (10, 0), "second": (0, 0.4), "end": (1, 0)}, **settings)  # type: ignore[arg-type]


def test_one_after_the_other_takes_the_sum() -> None:
    graph = layer()
    simulator = Simulator(sequential_schedule(graph, 1280, 768), graph, LineCosts(), PAPER_SHAPE)
    alone = sum(
        fixed + per_token * {"decode": 1280, "prefill": 768}.get(name, 2048)
        for name, (fixed, per_token) in TABLE_2.items()
        if name in graph.by_name
    )
    assert simulator.period_seconds() == pytest.approx(alone * 1e-6)
    assert simulator.step_seconds(80) == pytest.approx(80 * alone * 1e-6)
    assert simulator.step_seconds(80) == pytest.approx(0.225, rel=0.001)


def test_lanes_run_beside_each_other() -> None:
    simulator = simulate_pair(pair_costs())
    assert simulator.step_seconds(1) == pytest.approx(11e-6)
    assert simulator.step_seconds(3) == pytest.approx(33e-6)


def test_speed_follows_what_runs_beside_at_the_moment() -> None:
    simulator = simulate_pair(pair_costs(beside_network=0.5, network_beside=0.8))
    timeline = simulator.timeline(1, "pair")
    # `second` needs 4 / 0.8 = 5 us; by then `first` has done 2.5 us of its 10, and is alone for the other 7.5
    ends = {event.operation: event.end for event in timeline.events}
    assert ends == pytest.approx({"second": 5e-6, "first": 12.5e-6, "end": 13.5e-6})
    assert timeline.is_predicted and timeline.title == "pair" and timeline.seconds == pytest.approx(13.5e-6)


def test_a_share_waits_until_it_is_free() -> None:
    costs = pair_costs(table={resource: [1] * 10 for resource in Resource})
    assert simulate_pair(costs, "*6", "*4").step_seconds(1) == pytest.approx(11e-6)
    assert simulate_pair(costs, "*6", "*5").step_seconds(1) == pytest.approx(15e-6)


def test_the_order_of_starts_is_kept() -> None:
    costs = pair_costs(table={resource: [1] * 10 for resource in Resource})
    runs = simulate_pair(costs, "*6", "*5", "starts: NCC\n").timeline(1, "").events
    assert [event.operation for event in runs] == ["second", "first", "end"]
    assert runs[1].start == pytest.approx(4e-6)
    runs = simulate_pair(costs, "*6", "*5", "starts: CNC\n").timeline(1, "").events
    assert [event.operation for event in runs] == ["first", "second", "end"]


def test_shares_change_durations() -> None:
    costs = pair_costs(table=PAPER_SPEEDS)
    assert simulate_pair(costs, "*5", "*1").step_seconds(1) == pytest.approx(21e-6)


def test_a_layer_overlaps_the_next_where_delays_say_so() -> None:
    """The tail of one layer under the head of the next: a network lane of 4 us hides behind 11 us of computing."""
    graph = layer(has_network=True)
    cut = Cut((NanoBatch(0, 5), NanoBatch(0, 5)))
    lines = {name: (0.0, 0.2) for name in TABLE_2} | {"o_reduce": (0.0, 0.1), "down_reduce": (0.0, 0.1)}
    costs = LineCosts(lines | {"residual": (0.0, 0.0)})
    schedule = split_schedule(graph, cut)
    verify(schedule, graph)
    simulator = Simulator(schedule, graph, costs, TOKENS)
    assert simulator.period_seconds() < 1.05 * 10 * 5 * 0.2e-6 + 0.5e-6
    events = simulator.timeline(2, "").events
    for lane in Lane:
        mine = sorted((event.start, event.end) for event in events if event.lane is lane)
        assert all(first[1] <= second[0] + 1e-12 for first, second in pairwise(mine))


def test_prefill_attention_waits_for_the_keys_of_earlier_prompts() -> None:
    graph = layer()
    cut = Cut((NanoBatch(64, 64), NanoBatch(64, 64)))
    simulator = Simulator(split_schedule(graph, cut), graph, LineCosts(), BatchShape(num_decodes=128, num_prefills=128))
    events = {(event.operation, event.nano_batch): event for event in simulator.timeline(1, "").events}
    assert events["prefill", 1].start >= events["qkv", 0].end
    late = Schedule.parse(str(split_schedule(graph, cut)).replace("qkv[0:128] qkv[128:256]", "qkv[128:256] qkv[0:128]"))
    events = {
        (event.operation, event.nano_batch): event
        for event in Simulator(late, graph, LineCosts(), BatchShape(num_decodes=128, num_prefills=128))
        .timeline(1, "")
        .events
    }
    assert events["qkv", 0].start >= events["qkv", 1].end
    assert events["prefill", 1].start >= events["qkv", 0].end


def test_lanes_that_wait_for_each_other_are_named() -> None:
    text = "nano-batches: 0+10\ncompute: end[0:10] first[0:10]\nnetwork: second[0:10]\n"
    with pytest.raises(ScheduleError, match=r"end\[0:10\] of layer 0 waits for first\[0:10\] of layer 0"):
        Simulator(Schedule.parse(text), PAIR, pair_costs(), TOKENS).step_seconds(1)


def test_a_node_that_is_not_there_is_named() -> None:
    with pytest.raises(ScheduleError, match="no node third; it has first, second, end"):
        Simulator(Schedule.parse("nano-batches: 0+10\ncompute: third[0:10]\n"), PAIR, pair_costs(), TOKENS)


def test_starts_are_written_read_and_scaled() -> None:
    text = "nano-batches: 0+4 8+0\ncompute: first[0:4] first[4:12]\nnetwork: second[0:12]*3\nstarts: CNC\n"
    schedule = Schedule.parse(text)
    assert schedule.starts == (Lane.COMPUTE, Lane.NETWORK, Lane.COMPUTE)
    assert str(schedule) == text
    assert schedule.scaled(16, 8).starts == schedule.starts
    assert schedule.scaled(16, 0).starts == (Lane.NETWORK, Lane.COMPUTE)  # the first step lost its tokens
    for wrong, message in (
        ("starts: CXC", "written as letters CMN"),
        ("starts: CN", "one letter for every step"),
        ("starts: CNC\nstarts: CNC", "appears a second time"),
    ):
        with pytest.raises(ScheduleError, match=message):
            Schedule.parse(text.replace("starts: CNC", wrong))

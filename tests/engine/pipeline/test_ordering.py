"""One partition ordered: periods that are known, and schedules that keep what the solver promised."""

import math
import random
from contextlib import suppress
from itertools import permutations, product

import pytest

from engine.batch_shape import BatchShape
from engine.operation import Resource
from engine.pipeline.graph import OperationGraph
from engine.pipeline.instance import Instance
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.ordering import PeriodicOrder, TimedMode, solve_order, timed_modes
from engine.pipeline.partition import Partition
from engine.pipeline.periodic import schedule_of
from engine.pipeline.placement import GPU_LANES
from engine.pipeline.schedule import Lane, Schedule, ScheduleError
from engine.pipeline.simulator import Simulator
from engine.pipeline.verify import verify
from tests.engine.pipeline.planned_layer import PAPER_SHAPE, PAPER_SPEEDS, LineCosts, layer, node

UNIT = 1e-6
GRAPH = layer()
HALVES = Partition(cut=Cut((NanoBatch(640, 384), NanoBatch(640, 384))), branches=(None, None))


def modes_of(instance: Instance, costs: LineCosts) -> list[list[TimedMode]]:
    return [
        timed_modes(operation.seconds, [(mode.share, mode.speed) for mode in costs.modes(operation.node)], UNIT)
        for operation in instance.operations
    ]


def solve(instance: Instance, costs: LineCosts, seconds: float, upper: int = 4000) -> tuple[PeriodicOrder, float]:
    result = solve_order(
        instance,
        modes_of(instance, costs),
        lower=1,
        upper=upper,
        seconds=seconds,
        workers=4,
        divides_units=costs.shares_units,
    )
    assert result.order is not None
    return result.order, result.bound


def check(instance: Instance, costs: LineCosts, order: PeriodicOrder) -> Schedule:
    """The schedule is verified and, run on paper, has a period no longer than promised."""
    schedule = schedule_of(instance, order, divides_units=costs.shares_units)
    verify(schedule, GRAPH)
    assert Schedule.parse(str(schedule)) == schedule
    simulator = Simulator(schedule, GRAPH, costs, PAPER_SHAPE)
    assert simulator.period_seconds() <= order.period * UNIT * (1 + 1e-9)
    assert simulator.step_seconds(80) <= (80 + 2) * order.period * UNIT
    return schedule


def test_without_interference_computing_hardly_waits() -> None:
    costs = LineCosts()
    instance = Instance.of(HALVES, GRAPH, costs, PAPER_SHAPE, GPU_LANES)
    order, bound = solve(instance, costs, 20)
    assert bound == order.period  # proven
    compute = sum(
        math.ceil(operation.seconds / UNIT - 1e-6) or 1
        for operation in instance.operations
        if operation.lane is GPU_LANES[0]
    )
    assert compute <= order.period <= 1.02 * compute
    schedule = check(instance, costs, order)
    assert schedule.starts == ()
    assert any(step.delay for _, step in schedule.steps)  # the tail of a layer overlaps the next


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_order_of_a_small_layer_is_shorter_than_the_proven_one(seed: int) -> None:
    """All orders and delays of two nano-batches of three operations, run on paper."""
    chance = random.Random(seed)
    graph = OperationGraph(
        (
            node("head", ["hidden"], Resource.COMPUTE),
            node("reduce", ["head"], Resource.NETWORK),
            node("tail", ["reduce"], Resource.COMPUTE),
        ),
        "tail",
    )
    costs = LineCosts({name: (10.0, chance.randint(1, 9)) for name in graph.by_name})
    cut = Cut((NanoBatch(0, 10), NanoBatch(0, chance.randint(5, 20))))
    shape = BatchShape(num_decodes=0, num_prefills=cut.num_tokens)
    instance = Instance.of(Partition(cut=cut, branches=(None, None)), graph, costs, shape, GPU_LANES)
    order, bound = solve(instance, costs, 20)
    assert bound == order.period
    compute, network = (
        [operation for operation in instance.operations if operation.lane is lane] for lane in GPU_LANES[::2]
    )
    shortest = math.inf
    for others, second in product(permutations(compute[1:]), permutations(network)):
        for delays in product((0, 1), repeat=5):
            steps = [operation.step(10, delay) for operation, delay in zip((*others, *second), delays, strict=True)]
            lanes = {Lane.COMPUTE: (compute[0].step(), *steps[:3]), Lane.NETWORK: tuple(steps[3:])}
            with suppress(ScheduleError):
                simulator = Simulator(Schedule(cut, lanes), graph, costs, shape)
                shortest = min(shortest, simulator.period_seconds())
    assert shortest == pytest.approx(order.period * UNIT)


def test_one_nano_batch_is_a_chain() -> None:
    costs = LineCosts()
    whole = Partition(cut=Cut((NanoBatch(1280, 768),)), branches=(None,))
    instance = Instance.of(whole, GRAPH, costs, PAPER_SHAPE, GPU_LANES)
    order, bound = solve(instance, costs, 10)
    assert bound == order.period
    chain = sum(operation.seconds for operation in instance.operations if operation.node.name != "prefill")
    assert order.period == pytest.approx(chain / UNIT, abs=len(instance.operations))


def test_shares_fit_at_every_moment() -> None:
    costs = LineCosts(table=PAPER_SPEEDS)
    instance = Instance.of(HALVES, GRAPH, costs, PAPER_SHAPE, GPU_LANES)
    order, _ = solve(instance, costs, 2)
    schedule = check(instance, costs, order)
    assert len(schedule.starts) == len(instance.operations)
    events = Simulator(schedule, GRAPH, costs, PAPER_SHAPE).timeline(6, "").events
    for moment in [event.start + 1e-12 for event in events]:
        assert sum(event.share for event in events if event.start <= moment < event.end) <= 10


def test_an_impossible_period_is_refused() -> None:
    costs = LineCosts()
    instance = Instance.of(HALVES, GRAPH, costs, PAPER_SHAPE, GPU_LANES)
    result = solve_order(
        instance, modes_of(instance, costs), lower=1, upper=1500, seconds=10, workers=4, divides_units=False
    )
    assert result.order is None
    assert result.bound == math.inf


def test_random_durations_keep_the_promise() -> None:
    chance = random.Random(3)
    for _ in range(6):
        lines = {node.name: (chance.uniform(5, 200), chance.uniform(0, 0.3)) for node in GRAPH.nodes}
        costs = LineCosts(lines)
        num_decodes, num_prefills = chance.randint(100, 900), chance.randint(0, 500)
        cut = Cut((NanoBatch(num_decodes, num_prefills), NanoBatch(1280 - num_decodes, 768 - num_prefills)))
        partition = Partition(
            cut=cut,
            branches=(None, None),
            num_write_pieces=chance.choice((1, 2)),
            num_read_pieces=chance.choice((1, 2)),
            multiple=64,
        )
        instance = Instance.of(partition, GRAPH, costs, PAPER_SHAPE, GPU_LANES)
        order, _ = solve(instance, costs, 1, upper=sum(modes[0].duration for modes in modes_of(instance, costs)))
        check(instance, costs, order)

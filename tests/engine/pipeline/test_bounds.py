"""Lower bounds: never above what any order achieves, and tight where the answer is known."""

import random

import pytest

from engine.operation import Resource
from engine.pipeline.bounds import ConfigurationBounds, simple_bound
from engine.pipeline.instance import Instance
from engine.pipeline.partition import Partition, partitions
from engine.pipeline.placement import GPU_LANES
from engine.pipeline.schedule import Lane, Schedule, Step
from engine.pipeline.sharing import Sharing
from engine.pipeline.simulator import Simulator
from tests.engine.pipeline.interference_free import InterferenceFree
from tests.engine.pipeline.planned_layer import PAPER_SHAPE, PAPER_SPEEDS, TABLE_2, LineCosts, layer

GRAPH = layer(has_branches=True)
PARTITIONS = list(partitions(GRAPH, GPU_LANES, 1280, 768, 128))
COSTS = {
    "free": LineCosts(),
    "shares": LineCosts(table=PAPER_SPEEDS),
    "pairs": LineCosts(beside_network=0.8, network_beside=0.9),
    "shares and pairs": LineCosts(table=PAPER_SPEEDS, beside_network=0.9),
}


def instance_of(partition: Partition, costs: LineCosts) -> Instance:
    return Instance.of(partition, GRAPH, costs, PAPER_SHAPE, GPU_LANES)


def any_schedule(instance: Instance, chance: random.Random, *, divides_units: bool) -> Schedule:
    """The nano-operations in a random order that respects their dependencies, with random shares."""
    waits = {j: {i for i, to, lag in instance.edges if to == j and not lag} for j in range(len(instance.operations))}
    lanes: dict[Lane, list[Step]] = {lane: [] for lane in instance.lanes}
    done: set[int] = set()
    while ready := [j for j in waits if j not in done and waits[j] <= done]:
        index = chance.choice(ready)
        done.add(index)
        operation = instance.operations[index]
        lanes[operation.lane].append(operation.step(chance.randint(1, 10) if divides_units else 10))
    return Schedule(instance.cut, {lane: tuple(steps) for lane, steps in lanes.items()})


@pytest.mark.parametrize("name", COSTS)
def test_no_order_beats_the_bounds(name: str) -> None:
    costs, chance = COSTS[name], random.Random(1)
    sharing = Sharing(costs, GRAPH.nodes)
    bounds = ConfigurationBounds(sharing)
    for partition in chance.sample(PARTITIONS, 25):
        instance = instance_of(partition, costs)
        quick, tight = bounds.quick(instance), bounds.tight(instance).seconds
        assert simple_bound(instance, sharing) <= tight * (1 + 1e-5) or name == "free"
        assert quick <= tight * (1 + 1e-9)
        for _ in range(3):
            schedule = any_schedule(instance, chance, divides_units=costs.shares_units)
            period = Simulator(schedule, GRAPH, costs, PAPER_SHAPE).period_seconds()
            assert period >= tight * (1 - 1e-9)
            assert period >= simple_bound(instance, sharing) * (1 - 1e-9)


def test_one_nano_batch_takes_as_long_as_its_chain() -> None:
    partition = Partition(cut=PARTITIONS[0].cut, branches=("reduce",))
    instance = instance_of(partition, COSTS["free"])
    chain = sum(operation.seconds for operation in instance.operations if operation.node.name != "prefill")
    sharing = Sharing(COSTS["free"], GRAPH.nodes)
    assert simple_bound(instance, sharing) == pytest.approx(chain)
    assert ConfigurationBounds(sharing).tight(instance).seconds == pytest.approx(chain, rel=1e-5)


def test_mean_speeds_are_those_of_the_overlap() -> None:
    """The network hides behind computing: while it flies, computing runs at 0.8; the mean lies between."""
    costs = COSTS["pairs"]
    sharing = Sharing(costs, GRAPH.nodes)
    assert not sharing.is_separable
    assert Sharing(COSTS["shares"], GRAPH.nodes).is_separable
    instance = instance_of(PARTITIONS[200], costs)
    bound = ConfigurationBounds(sharing).tight(instance)
    for operation, speed in zip(instance.operations, bound.speeds, strict=True):
        slowest = 0.9 if operation.node.resource is Resource.NETWORK else 0.8
        assert slowest - 1e-6 <= speed <= 1 + 1e-6
    assert min(bound.speeds) < 0.99


def test_interference_cannot_make_the_bound_lower() -> None:
    for partition in PARTITIONS[::100]:
        free = ConfigurationBounds(Sharing(InterferenceFree(COSTS["shares"]), GRAPH.nodes))
        shares = ConfigurationBounds(Sharing(COSTS["shares"], GRAPH.nodes))
        instance = instance_of(partition, COSTS["shares"])
        assert free.tight(instance).seconds <= shares.tight(instance).seconds * (1 + 1e-6)


def test_modes_that_are_no_faster_are_left_out() -> None:
    sharing = Sharing(COSTS["shares"], GRAPH.nodes)
    network = GRAPH.by_name["down_reduce"]
    assert [mode.share for mode in sharing.modes(network)] == list(range(1, 10))  # 9 tenths are as fast as 10
    pair = sharing.team_modes([GRAPH.by_name["up"], network])
    assert all(sum(mode.shares) == 10 for mode in pair)
    assert {mode.shares for mode in pair} == {(10 - share, share) for share in range(1, 10)}
    assert TABLE_2.keys() >= GRAPH.by_name.keys()

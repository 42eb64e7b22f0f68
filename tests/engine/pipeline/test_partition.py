"""The family of partitions: complete on its grid, and without repetitions."""

from collections import Counter

import pytest

from engine.pipeline.instance import Instance, time_unit
from engine.pipeline.partition import Partition, cuts, partitions
from engine.pipeline.placement import CPU_LANES, GPU_LANES, lane_of
from engine.pipeline.schedule import Lane
from tests.engine.pipeline.planned_layer import PAPER_SHAPE, LineCosts, layer


def test_lanes_follow_the_resource_but_for_what_is_too_short() -> None:
    graph = layer(has_branches=True)
    lanes = {name: lane_of(node, GPU_LANES) for name, node in graph.by_name.items()}
    assert {name for name, lane in lanes.items() if lane is Lane.MEMORY} == {"decode"}
    assert {name for name, lane in lanes.items() if lane is Lane.NETWORK} == {
        "o_reduce",
        "gather_heads",
        "gather_columns",
        "down_reduce",
    }
    on_cpu = {lane_of(node, CPU_LANES) for node in graph.nodes}
    assert on_cpu == {Lane.COMPUTE, Lane.NETWORK}


@pytest.mark.parametrize(("num_decodes", "num_prefills"), [(1280, 768), (0, 512), (300, 0), (100, 413), (1, 1)])
def test_cuts_deal_every_token_once(num_decodes: int, num_prefills: int) -> None:
    found = list(cuts(num_decodes, num_prefills, 128))
    assert len(found[0].nano_batches) == 1
    for cut in found:
        assert (cut.num_decodes, cut.num_prefills) == (num_decodes, num_prefills)
        assert all(nano_batch.num_tokens > 0 for nano_batch in cut.nano_batches)
        assert cut.nano_batches[0].num_tokens % 128 == 0 or len(cut.nano_batches) == 1
    assert len(set(found)) == len(found)


def test_every_node_covers_its_tokens_in_every_partition() -> None:
    graph = layer(has_branches=True)
    for partition in partitions(graph, GPU_LANES, 384, 128, 128):
        covered: Counter[str] = Counter()
        for placed in partition.ranges(graph, GPU_LANES):
            covered[placed.node.name] += placed.stop - placed.start
        assert covered["qkv"] == covered["up"] == covered["residual"] == 512
        assert (covered["decode"], covered["prefill"]) == (384, 128)
        assert covered["o"] + covered["o_columns"] == 512
        assert covered["gather_heads"] == covered["gather_columns"] == covered["o_columns"]


def test_mirrored_partitions_are_searched_once() -> None:
    graph = layer()
    found = list(partitions(graph, CPU_LANES, 0, 512, 128))
    assert [[each.num_tokens for each in partition.cut.nano_batches] for partition in found] == [
        [512],
        [128, 384],
        [256, 256],
    ]


def test_the_head_is_halved_only_where_that_lets_something_overlap() -> None:
    graph = layer()
    assert {p.num_write_pieces for p in partitions(graph, GPU_LANES, 1024, 1024, 128)} == {1, 2}
    assert {p.num_write_pieces for p in partitions(graph, CPU_LANES, 1024, 1024, 128)} == {1}
    assert {p.num_read_pieces for p in partitions(graph, GPU_LANES, 0, 1024, 128)} == {1}


def test_an_instance_has_the_edges_of_its_ranges() -> None:
    graph = layer()
    (partition,) = [
        partition
        for partition in partitions(graph, GPU_LANES, 1280, 768, 128)
        if isinstance(partition, Partition)
        and [each.num_tokens for each in partition.cut.nano_batches] == [1024, 1024]
        and partition.cut.nano_batches[0].num_decodes == 640
        and (partition.num_write_pieces, partition.num_read_pieces) == (1, 1)
    ]
    instance = Instance.of(partition, graph, LineCosts(), PAPER_SHAPE, GPU_LANES)
    edges = {(str(instance.operations[i]), str(instance.operations[j]), lag) for i, j, lag in instance.edges}
    assert ("qkv[0:1024]", "decode[0:640]", 0) in edges
    assert ("residual[0:1024]", "qkv[0:1024]", 1) in edges
    assert ("qkv[0:1024]", "prefill[1664:2048]", 0) in edges  # keys of an earlier prompt's chunk
    assert ("qkv[1024:2048]", "prefill[640:1024]", 0) not in edges
    names = [str(operation) for operation in instance.operations]
    assert (names.index("qkv[0:1024]"), names.index("down_reduce[0:1024]")) in instance.exclusive
    assert (names.index("qkv[0:1024]"), names.index("down_reduce[1024:2048]")) not in instance.exclusive
    assert (names.index("decode[0:640]"), names.index("prefill[640:1024]")) not in instance.exclusive
    assert {str(instance.operations[i]) for i in instance.last} == {"residual[0:1024]", "residual[1024:2048]"}


def test_time_units_are_round_and_fine_enough() -> None:
    graph = layer()
    (partition, *_) = partitions(graph, GPU_LANES, 1280, 768, 128)
    operations = Instance.of(partition, graph, LineCosts(), PAPER_SHAPE, GPU_LANES).operations
    assert time_unit(operations, 2000) == pytest.approx(1e-6)
    assert time_unit(operations, 10_000) == pytest.approx(2e-7)
    assert time_unit(operations, 1000) == pytest.approx(2e-6)


def test_the_mirrored_partition_has_the_same_nano_operations_in_the_other_order() -> None:
    graph = layer(has_branches=True)
    costs = LineCosts()
    for partition in partitions(graph, GPU_LANES, 384, 640, 128):
        here, there = (
            Instance.of(each, graph, costs, PAPER_SHAPE, GPU_LANES) for each in (partition, partition.mirrored)
        )
        places = here.places_in(there)
        assert sorted(places) == list(range(len(here.operations)))
        for place, mirrored in zip(places, there.operations, strict=True):
            operation = here.operations[place]
            assert (operation.node, operation.lane) == (mirrored.node, mirrored.lane)
            assert operation.stop - operation.start == mirrored.stop - mirrored.start
            assert operation.nano_batch == len(partition.cut.nano_batches) - 1 - mirrored.nano_batch
            assert operation.seconds == pytest.approx(mirrored.seconds)
        assert partition.mirrored.mirrored == partition

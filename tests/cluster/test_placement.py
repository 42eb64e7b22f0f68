"""Placement: everything asked for fits at once, or the error says what is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import NodeResources, Placement, plan_placement
from engine import CapacityError, DeviceKind


def cpu(cores: float, tensor_parallel: int, replicas: int, ingress: int = 1) -> Placement:
    nodes = [NodeResources("a", cores)]
    return plan_placement(
        nodes, device=DeviceKind.CPU, tensor_parallel=tensor_parallel, num_replicas=replicas, num_ingress=ingress
    )


def gpu(nodes: list[int], tensor_parallel: int, replicas: int) -> Placement:
    return plan_placement(
        [NodeResources(f"node{index}", 32, count) for index, count in enumerate(nodes)],
        device=DeviceKind.CUDA,
        tensor_parallel=tensor_parallel,
        num_replicas=replicas,
        num_ingress=1,
    )


def test_two_replicas_of_two_ranks_on_two_cores() -> None:
    placement = cpu(2, tensor_parallel=2, replicas=2)
    assert len(placement.bundles) == 3
    total = placement.ingress_cpus + 2 * sum(bundle["CPU"] for bundle in placement.bundles)
    assert total <= 2
    assert placement.threads_per_rank == 1
    assert "GPU" not in placement.bundles[1]


@given(
    cores=st.integers(1, 128), tensor_parallel=st.integers(1, 8), replicas=st.integers(1, 8), ingress=st.integers(1, 4)
)
def test_a_plan_never_asks_for_more_than_there_is(
    cores: int, tensor_parallel: int, replicas: int, ingress: int
) -> None:
    try:
        placement = cpu(cores, tensor_parallel, replicas, ingress)
    except CapacityError as error:
        assert "lower replicas or tensor_parallel" in str(error)
        assert cores < 0.2 * (replicas + ingress) + 0.02 * replicas * tensor_parallel
        return
    assert len({frozenset(bundle.items()) for bundle in placement.bundles[1:]}) == 1
    total = ingress * placement.ingress_cpus + replicas * sum(bundle["CPU"] for bundle in placement.bundles)
    assert total <= cores
    assert placement.threads_per_rank * replicas * tensor_parallel <= max(cores, replicas * tensor_parallel)


def test_one_gpu_per_rank_on_one_node() -> None:
    placement = gpu([8], tensor_parallel=4, replicas=2)
    assert [bundle.get("GPU", 0) for bundle in placement.bundles] == [0, 1, 1, 1, 1]
    assert placement.threads_per_rank == 4


def test_a_replica_is_never_split_over_nodes() -> None:
    with pytest.raises(CapacityError) as raised:
        gpu([2, 2], tensor_parallel=4, replicas=1)
    message = str(raised.value)
    assert "need 4 GPUs, all 4 of a replica on one node; node0 has 2, node1 has 2" in message
    assert "room for 0 such replicas" in message


def test_missing_gpus_are_counted() -> None:
    with pytest.raises(CapacityError, match="room for 3 such replicas"):
        gpu([4, 3], tensor_parallel=2, replicas=4)
    assert gpu([4, 3], tensor_parallel=2, replicas=3).rank_gpus == 1


def test_no_gpu_at_all() -> None:
    with pytest.raises(CapacityError, match="use --device cpu"):
        gpu([0], tensor_parallel=1, replicas=1)

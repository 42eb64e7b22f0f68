"""Where the processes of a served model go: resources of the ingress, of a replica and of each rank. Pure.

A replica and its ranks are one STRICT_PACK placement group: one node, all of it or nothing. A rank takes one GPU, or
on a CPU machine a fraction of the cores, computed so that everything the recipe asks for can be scheduled at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine import CapacityError, DeviceKind

STRATEGY = "STRICT_PACK"
CONTROL_CPUS = 0.1  # an ingress or replica process: mostly waiting
MAX_GPU_THREADS = 8  # a rank whose work is on a GPU gains nothing from more
_SPARE = 0.1  # of a node's cores, for Ray's own tasks and a replica that is being replaced


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What one node of the cluster offers."""

    name: str
    num_cpus: float
    num_gpus: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Resources to ask Ray for. `bundles` are the placement group of one replica: its process first, then the ranks."""

    ingress_cpus: float
    replica_cpus: float
    rank_cpus: float
    rank_gpus: float
    tensor_parallel: int
    threads_per_rank: int

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundle 0 is the replica's process, bundle 1 + r is rank r."""
        rank = {"CPU": self.rank_cpus} | ({"GPU": self.rank_gpus} if self.rank_gpus else {})
        return [{"CPU": self.replica_cpus}, *[dict(rank) for _ in range(self.tensor_parallel)]]


def plan_placement(
    nodes: Sequence[NodeResources],
    *,
    device: DeviceKind,
    tensor_parallel: int,
    num_replicas: int,
    num_ingress: int,
) -> Placement:
    """Share the nodes out; raises `CapacityError` saying what is missing."""
    num_ranks = num_replicas * tensor_parallel
    wanted = f"{num_replicas} replica{'s' * (num_replicas > 1)} with tensor_parallel {tensor_parallel}"
    if device is DeviceKind.CUDA:
        room = [int(node.num_gpus) // tensor_parallel for node in nodes]
        if sum(room) < num_replicas:
            offered = ", ".join(f"{node.name} has {node.num_gpus:g}" for node in nodes) or "there is no node"
            raise CapacityError(
                f"{wanted} need {num_ranks} GPUs, all {tensor_parallel} of a replica on one node; {offered}. "
                f"This cluster has room for {sum(room)} such replica{'s' * (sum(room) != 1)}: "
                "lower replicas or tensor_parallel, add GPUs, or use --device cpu."
            )
    else:
        room = [1 if node.num_cpus >= 1 else 0 for node in nodes]
        if not any(room):
            raise CapacityError(f"{wanted} need a node with at least one CPU core; there is none.")
    usable = [node for node, replicas in zip(nodes, room, strict=True) if replicas]
    per_node = _replicas_per_node(room, num_replicas) if device is DeviceKind.CUDA else -(-num_replicas // len(usable))
    num_cpus = min(node.num_cpus for node in usable)
    control = CONTROL_CPUS * (num_ingress + per_node)
    share = (num_cpus * (1 - _SPARE) - control) / (per_node * tensor_parallel)
    rank_cpus = math.floor(min(share, 1.0) * 100) / 100
    if rank_cpus <= 0:
        raise CapacityError(
            f"{wanted} on {num_cpus:g} cores per node leave no CPU for the ranks "
            f"({per_node} replicas and {num_ingress} ingress processes there): lower replicas or tensor_parallel."
        )
    threads = max(1, int(num_cpus) // (per_node * tensor_parallel))
    return Placement(
        ingress_cpus=CONTROL_CPUS,
        replica_cpus=CONTROL_CPUS,
        rank_cpus=rank_cpus,
        rank_gpus=1.0 if device is DeviceKind.CUDA else 0.0,
        tensor_parallel=tensor_parallel,
        threads_per_rank=min(threads, MAX_GPU_THREADS) if device is DeviceKind.CUDA else threads,
    )


def _replicas_per_node(room: Sequence[int], num_replicas: int) -> int:
    """The most replicas that one node must take when they are spread as evenly as the room allows."""
    for level in range(1, max(room) + 1):
        if sum(min(level, replicas) for replicas in room) >= num_replicas:
            return level
    raise AssertionError("checked by the caller")

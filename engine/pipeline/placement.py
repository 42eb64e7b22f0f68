"""Which lane of a device a node belongs to: the planner's rule, for whoever places nodes."""

from collections.abc import Collection

from engine.operation import Resource
from engine.pipeline.graph import Node
from engine.pipeline.schedule import Lane

GPU_LANES = (Lane.COMPUTE, Lane.MEMORY, Lane.NETWORK)
CPU_LANES = (Lane.COMPUTE, Lane.NETWORK)


def lane_of(node: Node, device_lanes: Collection[Lane]) -> Lane:
    """The lane named like the node's resource where the device has it, else the compute lane; collectives always fly.

    A memory-bound node gets the memory lane only for the cache that it reads: what is left (an addition that closes a
    layer) is so short that waiting for another lane would cost more than it takes.
    """
    match node.resource:
        case Resource.NETWORK:
            return Lane.NETWORK
        case Resource.MEMORY if Lane.MEMORY in device_lanes and node.cache_reads:
            return Lane.MEMORY
        case _:
            return Lane.COMPUTE

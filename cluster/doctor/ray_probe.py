"""A process that joins a Ray cluster and tells what it sees, as JSON. Run by `cluster.doctor.ray_cluster`.

Of its own, because Ray tries for minutes, says why only on standard error, and leaves state in a process.
"""

import json
import logging
import sys
import time
from typing import Any

_NODE_SECONDS = 20.0


def probe(address: str) -> dict[str, Any]:
    """Versions, nodes and clocks; raises whatever Ray raises."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="nanoserve-doctor")
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return {
        "ray": ray.__version__,
        "num_dead": len(ray.nodes()) - len(nodes),  # type: ignore[no-untyped-call]
        "nodes": [
            {
                "address": node["NodeManagerAddress"],
                "cpus": node["Resources"].get("CPU", 0.0),
                "gpus": node["Resources"].get("GPU", 0.0),
                "clock": _clock(node["NodeID"]) if len(nodes) > 1 else None,
            }
            for node in nodes
        ],
    }


def _now() -> float:
    return time.time()


def _clock(node_id: str) -> tuple[float, float, float] | None:
    """(sent, told, received) of one question to a node, the second: the first has to start a process there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    question: Any = ray.remote(_now).options(num_cpus=0, scheduling_strategy=where)
    try:
        for _ in range(2):
            sent = time.time()
            told = ray.get(question.remote(), timeout=_NODE_SECONDS)
        return sent, told, time.time()
    except ray.exceptions.RayError:
        return None


if __name__ == "__main__":
    try:
        print(json.dumps(probe(sys.argv[1])))
    except Exception as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")

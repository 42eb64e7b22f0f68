"""Values that tests of the status show: reports of replicas, and views made of them."""

from typing import Any

from cluster.replica_report import ReplicaReport
from cluster.status.cluster_view import ClusterView, IngressView, LatencyView, ReplicaState, ReplicaView
from cluster.status.load_summary import load_of
from engine import Loss, LossWaterfall


def waterfall(optimum: float = 1000.0, **changes: float) -> LossWaterfall:
    """Ten seconds, of which four were ideal."""
    seconds = {"no_requests": 3.0, "exposed_attention": 2.0, "cpu_gap": 1.0} | changes
    return LossWaterfall(
        wall_seconds=10.0,
        ideal_seconds=10.0 - sum(seconds.values()),
        skipped_head_seconds=0.0,
        seconds={loss: seconds.get(loss.value, 0.0) for loss in Loss},
        optimal_tokens_per_second=optimum,
    )


def report(**changes: Any) -> ReplicaReport:
    given: dict[str, Any] = {
        "node": "127.0.0.1",
        "ranks": (11, 12),
        "uptime_seconds": 5.0,
        "num_running": 3,
        "num_waiting": 1,
        "kv_usage": 0.25,
        "num_preemptions": 0,
        "prompt_tokens_per_second": 50.0,
        "generated_tokens_per_second": 250.0,
        "waterfall": waterfall(),
    }
    return ReplicaReport(**given | changes)


def replica(name: str, state: ReplicaState = ReplicaState.READY, detail: str = "", **changes: Any) -> ReplicaView:
    has_load = state in (ReplicaState.READY, ReplicaState.DRAINING)
    return ReplicaView(
        id=name,
        state=state,
        detail=detail,
        node="127.0.0.1" if has_load else None,
        ranks=(11, 12) if has_load else (),
        uptime_seconds=5.0 if has_load else None,
        load=load_of([report(**changes)]) if has_load else None,
    )


def view(*replicas: ReplicaView, **changes: Any) -> ClusterView:
    latency = LatencyView(num_calls=25, p50_seconds=0.0357, p99_seconds=1.2)
    given: dict[str, Any] = {
        "time": 1_700_000_000.0,
        "version": "1.2.3",
        "models": ("demo",),
        "num_wanted": 2,
        "num_ready": sum(each.state is ReplicaState.READY for each in replicas),
        "num_restarts": 0,
        "total": load_of([report() for each in replicas if each.load is not None]),
        "replicas": replicas,
        "ingress": IngressView(
            id="i1", num_ingresses=1, window_seconds=60.0, time_to_first_token=latency, time_per_output_token=None
        ),
    }
    return ClusterView(**given | changes)

"""`ClusterView`: the answer of `GET /cluster`, which `nanoserve status` and the page at `/` show.

Times of day are Unix seconds, durations and latencies seconds, shares 0 to 1, percentages 0 to 100. What is unknown is
null: the optimum where no GEMM peak was measured, latencies where no call was answered lately.
"""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict


class ReplicaState(StrEnum):
    """What a replica is doing, as one ingress sees it."""

    READY = "ready"
    STARTING = "starting"
    FAILED = "failed"  # its start; Ray Serve tries again
    CONNECTING = "connecting"  # it runs, but this ingress has no connection to it
    SILENT = "silent"  # it is connected, but did not answer in time
    DRAINING = "draining"


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class LossView(_View):
    """A part of the time that went to no useful matrix product at peak rate; `loss` is the metric's label."""

    loss: str
    description: str
    percent: float


class LoadView(_View):
    """Of one replica or of all: requests, KV cache, tokens, and how far from the optimum the last seconds were.

    `losses` are the largest first, and with `percent_of_optimal` they are all of the time.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    percent_of_optimal: float | None
    optimal_tokens_per_second: float | None
    losses: tuple[LossView, ...]


class ReplicaView(_View):
    """One replica. `ranks` are process ids on `node`; `load` is null unless it is ready or draining."""

    id: str
    state: ReplicaState
    detail: str
    node: str | None
    ranks: tuple[int, ...]
    uptime_seconds: float | None
    load: LoadView | None


class LatencyView(_View):
    """Percentiles of a latency."""

    num_calls: int
    p50_seconds: float
    p99_seconds: float


class IngressView(_View):
    """Who answered, and the latencies of the calls that came through it: with several, each sees its own."""

    id: str
    num_ingresses: int
    window_seconds: float
    time_to_first_token: LatencyView | None
    time_per_output_token: LatencyView | None


class ClusterView(_View):
    """Everything. `num_restarts` counts replicas that took the place of one that was lost or did not start, since the
    application was deployed; those that scaling adds or removes do not count.
    """

    object: Literal["nanoserve.cluster"] = "nanoserve.cluster"
    time: float
    version: str
    models: tuple[str, ...]
    num_wanted: int
    num_ready: int
    num_restarts: int
    total: LoadView
    replicas: tuple[ReplicaView, ...]
    ingress: IngressView

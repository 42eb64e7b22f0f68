"""`ClusterWatch`: asks everybody and answers `GET /cluster`. Nobody looks, nobody is asked.

All who look at about the same time are given the same answer, so that a hundred of them cost what one does.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from cluster.dispatcher import Dispatcher
from cluster.recent_latencies import WINDOW_SECONDS, Percentiles, RecentLatencies
from cluster.replica_report import Question, ReplicaReport
from cluster.replica_start import ReplicaStart, ReplicaStarts
from cluster.status.cluster_view import (
    ClusterView,
    IngressView,
    LatencyView,
    ReplicaState,
    ReplicaView,
)
from cluster.status.load_summary import load_of

logger = logging.getLogger(__name__)
FRESH_SECONDS = 0.5
REPORT_SECONDS = 2.0
_LONGEST_DETAIL = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What this application is: its models' names, the replicas that were asked for, and who tells of their starts.

    `read_starts` blocks; see `cluster.startup.read_reports`.
    """

    models: tuple[str, ...]
    num_replicas: int = 1
    read_starts: Callable[[], ReplicaStarts] = ReplicaStarts


class ClusterWatch:
    """Of one ingress."""

    def __init__(self, deployment: Deployment, dispatcher: Dispatcher, latencies: RecentLatencies) -> None:
        self._deployment = deployment
        self._dispatcher = dispatcher
        self._latencies = latencies
        self._seeing: asyncio.Task[ClusterView] | None = None
        self._seen_at = float("-inf")
        self._reading: asyncio.Task[ReplicaStarts] | None = None
        self._starts = ReplicaStarts()

    async def view(self) -> ClusterView:
        """How the cluster is, or was less than `FRESH_SECONDS` ago."""
        if self._seeing is None or (self._seeing.done() and time.monotonic() - self._seen_at > FRESH_SECONDS):
            self._seeing = asyncio.create_task(self._see(), name="look at the cluster")
        return await asyncio.shield(self._seeing)

    async def _see(self) -> ClusterView:
        connected = self._dispatcher.connected
        asked = [*(each for each, is_ready in connected.items() if is_ready), *self._dispatcher.draining]
        reading = asyncio.create_task(self._read_starts())
        answers = await asyncio.gather(
            *(self._dispatcher.ask(replica_id, Question.REPORT, REPORT_SECONDS) for replica_id in asked)
        )
        starts = await reading
        reports = {
            replica_id: answer
            for replica_id, answer in zip(asked, answers, strict=True)
            if isinstance(answer, ReplicaReport)
        }
        draining = self._dispatcher.draining
        replicas = replica_views(connected, draining, reports, starts.by_replica, self._deployment.num_replicas)
        self._seen_at = time.monotonic()
        return ClusterView(
            time=time.time(),
            version=_version(),
            models=self._deployment.models,
            num_wanted=self._deployment.num_replicas,
            num_ready=sum(replica.state is ReplicaState.READY for replica in replicas),
            num_restarts=starts.num_lost,
            total=load_of(list(reports.values())),
            replicas=replicas,
            ingress=self._ingress(),
        )

    async def _read_starts(self) -> ReplicaStarts:
        """The starts, or those known last where Ray's head is away: what serves goes on, and is to be seen.

        A read of a head that is away may last a minute. It is not waited for, nor is another begun beside it, since
        each holds one of the threads that tokenise long prompts.
        """
        if self._reading is None:
            self._reading = asyncio.create_task(asyncio.to_thread(self._deployment.read_starts), name="read starts")
        reading = self._reading
        await asyncio.wait([reading], timeout=REPORT_SECONDS)
        if reading.done():
            self._reading = None
            if (error := reading.exception()) is None:
                self._starts = reading.result()
            else:
                logger.warning("The starts of replicas cannot be read: %s", error)
        return self._starts

    def _ingress(self) -> IngressView:
        return IngressView(
            id=self._dispatcher.process_id,
            num_ingresses=sum(target.kind == "ingress" for target in self._dispatcher.metrics_targets),
            window_seconds=WINDOW_SECONDS,
            time_to_first_token=_latency(self._latencies.time_to_first_token()),
            time_per_output_token=_latency(self._latencies.time_per_output_token()),
        )


def replica_views(
    connected: Mapping[str, bool],
    draining: list[str],
    reports: Mapping[str, ReplicaReport],
    starts: Mapping[str, ReplicaStart],
    num_wanted: int,
) -> tuple[ReplicaView, ...]:
    """Those that serve, then those that may: `connected` has the running ones and whether they said hello.

    A start that was cut off says nothing of it; so of those that began and did not end, no more are taken to go on
    than replicas are missing, the latest.
    """
    views = []
    for replica_id in [*sorted(connected), *sorted(draining)]:
        report = reports.get(replica_id)
        if replica_id in draining:
            state = ReplicaState.DRAINING
        elif connected[replica_id]:
            state = ReplicaState.SILENT if report is None else ReplicaState.READY
        else:
            state = ReplicaState.CONNECTING
        views.append(_running(replica_id, state, report))
    known = {*connected, *draining}
    unready = {key: start for key, start in starts.items() if key not in known and start.ready_at is None}
    by_age = sorted(unready, key=lambda key: -unready[key].begun_at)
    for replica_id in by_age[: max(0, num_wanted - len(connected))]:
        views.append(_starting(replica_id, unready[replica_id]))
    return tuple(views)


def _running(replica_id: str, state: ReplicaState, report: ReplicaReport | None) -> ReplicaView:
    return ReplicaView(
        id=replica_id,
        state=state,
        detail="",
        node=None if report is None else report.node,
        ranks=() if report is None else report.ranks,
        uptime_seconds=None if report is None else report.uptime_seconds,
        load=None if report is None else load_of([report]),
    )


def _starting(replica_id: str, start: ReplicaStart) -> ReplicaView:
    state = ReplicaState.STARTING if start.error is None else ReplicaState.FAILED
    if start.error is not None:
        detail = (str(start.error) or type(start.error).__name__)[:_LONGEST_DETAIL]
    elif start.doing:
        detail = start.doing
    else:
        detail = f"{start.done / start.total:.0%} of its weights read" if start.total else ""
    return ReplicaView(id=replica_id, state=state, detail=detail, node=None, ranks=(), uptime_seconds=None, load=None)


def _latency(percentiles: Percentiles | None) -> LatencyView | None:
    if percentiles is None:
        return None
    return LatencyView(num_calls=percentiles.num_calls, p50_seconds=percentiles.p50, p99_seconds=percentiles.p99)


def _version() -> str:
    try:
        return version("nanoserve")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that was not installed

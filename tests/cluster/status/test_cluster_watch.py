"""What `GET /cluster` is made of: the states of replicas, sums, restarts, and one look for many who ask."""

import asyncio
import itertools
import threading
from typing import Any

from cluster.recent_latencies import RecentLatencies
from cluster.replica_report import Question, ReplicaReport
from cluster.replica_start import ReplicaStart, ReplicaStarts
from cluster.status import cluster_watch
from cluster.status.cluster_view import ReplicaState
from cluster.status.cluster_watch import ClusterWatch, Deployment, replica_views
from cluster.status.load_summary import load_of
from engine import ConfigError
from tests.cluster.status.views import report, waterfall


def states(*arguments: Any) -> dict[str, tuple[ReplicaState, str]]:
    return {each.id: (each.state, each.detail) for each in replica_views(*arguments)}


def test_every_state_is_told() -> None:
    starts = {
        "ready": ReplicaStart(begun_at=1, ready_at=2),
        "gone": ReplicaStart(begun_at=1, ready_at=3),
        "reading": ReplicaStart(begun_at=9, done=43, total=100),
        "broken": ReplicaStart(begun_at=8, error=ConfigError("no such model")),
        "compiling": ReplicaStart(begun_at=7, done=100, total=100, doing="compiling kernels"),
        "cut off": ReplicaStart(begun_at=2, done=1, total=100),
    }
    connected = {"ready": True, "mute": True, "far": False}
    found = states(connected, ["old"], {"ready": report(), "old": report()}, starts, 6)
    assert found == {
        "far": (ReplicaState.CONNECTING, ""),
        "mute": (ReplicaState.SILENT, ""),
        "ready": (ReplicaState.READY, ""),
        "old": (ReplicaState.DRAINING, ""),
        "reading": (ReplicaState.STARTING, "43% of its weights read"),
        "broken": (ReplicaState.FAILED, "no such model"),
        "compiling": (ReplicaState.STARTING, "compiling kernels"),
    }


def test_no_more_are_starting_than_are_missing() -> None:
    starts = {f"s{number}": ReplicaStart(begun_at=number) for number in range(5)}
    assert list(states({"a": True}, [], {}, starts, 2)) == ["a", "s4"]
    assert list(states({"a": True, "b": True}, [], {}, starts, 2)) == ["a", "b"]


def test_loads_add_up_and_losses_come_by_size() -> None:
    load = load_of([report(), report(waterfall=waterfall(3000.0, cpu_gap=5.0), kv_usage=0.75, num_waiting=0)])
    assert (load.num_running, load.num_waiting, load.kv_usage) == (6, 1, 0.5)
    assert load.generated_tokens_per_second == 500
    assert load.optimal_tokens_per_second == 4000
    assert load.percent_of_optimal is not None
    assert [loss.loss for loss in load.losses] == ["cpu_gap", "no_requests", "exposed_attention"]
    assert abs(load.percent_of_optimal + sum(loss.percent for loss in load.losses) - 100) < 1e-6
    assert load_of([]).percent_of_optimal is None
    assert load_of([report(waterfall=None)]).losses == ()


class _Dispatcher:
    """One replica that answers, and one that never does."""

    process_id = "i1"
    metrics_targets = ()
    draining = ()
    connected = {"a": True, "b": True}  # noqa: RUF012

    def __init__(self) -> None:
        self.num_asked = 0

    async def ask(self, replica_id: str, question: Question, seconds: float) -> ReplicaReport | None:
        self.num_asked += 1
        await asyncio.sleep(0.01)
        return report() if replica_id == "a" else None


async def test_many_who_look_cost_what_one_does(monkeypatch: Any) -> None:
    def read_starts() -> ReplicaStarts:
        return ReplicaStarts(by_replica={name: ReplicaStart(ready_at=1.0) for name in "ab"}, num_lost=1)

    dispatcher = _Dispatcher()
    deployment = Deployment(models=("m",), num_replicas=2, read_starts=read_starts)
    watch = ClusterWatch(deployment, dispatcher, RecentLatencies())  # type: ignore[arg-type]
    views = await asyncio.gather(*(watch.view() for _ in range(50)))
    assert dispatcher.num_asked == 2
    assert all(view is views[0] for view in views)
    assert (views[0].num_ready, views[0].num_restarts, views[0].total.num_running) == (1, 1, 3)
    assert await watch.view() is views[0], "it is fresh"
    monkeypatch.setattr(cluster_watch, "FRESH_SECONDS", 0.0)
    assert await watch.view() is not views[0]


async def test_who_leaves_does_not_take_the_answer_with_him() -> None:
    watch = ClusterWatch(Deployment(models=("m",)), _Dispatcher(), RecentLatencies())  # type: ignore[arg-type]
    impatient = asyncio.create_task(watch.view())
    patient = asyncio.create_task(watch.view())
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).models == ("m",)


async def test_what_serves_is_seen_also_while_rays_head_is_away() -> None:
    def read_starts() -> ReplicaStarts:
        raise ConnectionError("the head is away")

    deployment = Deployment(models=("m",), read_starts=read_starts)
    watch = ClusterWatch(deployment, _Dispatcher(), RecentLatencies())  # type: ignore[arg-type]
    assert (await watch.view()).num_ready == 1


async def test_a_head_that_keeps_silent_holds_up_nobody_and_one_thread(monkeypatch: Any) -> None:
    monkeypatch.setattr(cluster_watch, "FRESH_SECONDS", 0.0)
    silence, num_reads = threading.Event(), itertools.count()

    def read_starts() -> ReplicaStarts:
        if next(num_reads) == 1:
            silence.wait(60)
        return ReplicaStarts(by_replica={name: ReplicaStart(ready_at=1.0) for name in "ab"}, num_lost=1)

    deployment = Deployment(models=("m",), num_replicas=2, read_starts=read_starts)
    watch = ClusterWatch(deployment, _Dispatcher(), RecentLatencies())  # type: ignore[arg-type]
    try:
        for _ in range(4):
            seen = await watch.view()
            assert (seen.num_ready, seen.num_restarts) == (1, 1), "what was known last"
            monkeypatch.setattr(cluster_watch, "REPORT_SECONDS", 0.05)
        assert next(num_reads) == 2, "the second read is still the only one"
    finally:
        silence.set()

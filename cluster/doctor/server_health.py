"""A running server, by what its `GET /cluster` says."""

import time
from dataclasses import dataclass

from cluster.doctor.clock import ClockOffset, judge_clocks, offset_of
from cluster.doctor.finding import Finding, error, ok, warning
from cluster.status.cluster_client import ClusterClient, NoAnswerError
from cluster.status.cluster_view import ClusterView, ReplicaState

CHECK = "server"
_LOGS = "/tmp/ray/session_latest/logs, or of `nanoserve serve` alone /tmp/nanoserve-*/ray/session_latest/logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHealth:
    """The answer, or the `problem` there was with it; `clock` where there was one."""

    url: str
    view: ClusterView | None = None
    problem: str = ""
    clock: ClockOffset | None = None


def read_server(url: str) -> ServerHealth:
    """Ask it."""
    with ClusterClient(url) as client:
        try:
            sent = time.time()
            view = client.view()
        except NoAnswerError as silence:
            return ServerHealth(url=client.url, problem=str(silence))
        return ServerHealth(url=client.url, view=view, clock=offset_of(client.url, sent, view.time, time.time()))


def judge_server(server: ServerHealth) -> list[Finding]:
    """Whether it answers, and is whole."""
    view = server.view
    if view is None:
        remedy = "Start it (`nanoserve serve`), or correct --url; on its own machine `ss -ltnp` shows where it listens."
        return [error(CHECK, server.problem, server.url, remedy)]
    findings = []
    for replica in view.replicas:
        if replica.state is ReplicaState.FAILED:
            remedy = f"Correct what it says; Ray Serve goes on trying. Logs on its node: {_LOGS}."
            findings.append(error(CHECK, f"Replica {replica.id} failed: {replica.detail}", server.url, remedy))
        elif replica.state is ReplicaState.SILENT:
            remedy = "Look at its node (load, memory, `nanoserve doctor` there); Ray Serve replaces it if it stays so."
            findings.append(warning(CHECK, f"Replica {replica.id} does not answer.", server.url, remedy))
    if view.num_ready < view.num_wanted:
        found = f"{view.num_ready} of {view.num_wanted} replicas are ready."
        remedy = "Wait if they are starting (`nanoserve status`); else see whether the cluster has room (`ray status`)."
        level = error if view.num_ready == 0 else warning
        findings.append(level(CHECK, found, server.url, remedy))
    if view.num_restarts:
        remedy = "Find out why they died: Ray's logs say, and the kernel's (`dmesg` names who was out of memory)."
        findings.append(warning(CHECK, f"{view.num_restarts} replicas had to be replaced.", server.url, remedy))
    findings += judge_clocks([] if server.clock is None else [server.clock])
    models = ", ".join(view.models)
    return [ok(CHECK, f"Serves {models}, {view.num_ready} of {view.num_wanted} replicas.", server.url), *findings]

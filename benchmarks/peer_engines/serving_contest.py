"""`ServingContest`: the chosen servers, each running in processes of its own, and the rounds in which they take turns.

The client is that of `nanoserve bench serve`, in this process, so that its processor time is known.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peer_engines.peer_engine import EngineSetup
from peer_engines.peer_environment import PeerEnvironment
from peer_engines.peer_process import PeerFailureError
from peer_engines.peer_server import PeerServer
from peer_engines.processor_time import busy_seconds, idle_seconds, used_seconds
from peer_engines.serving_peer import MODEL_NAME, ServingPeer
from peer_engines.serving_result import ServedRound, ServingResult

from cluster.load_test.latency_report import LatencyReport, ServiceLevel
from cluster.load_test.load_target import LoadTarget, api_url
from cluster.load_test.serve_benchmark import ServeBenchmark
from engine.errors import NanoserveError
from engine.workloads.workload import Workload

REQUEST_SECONDS = 600.0


class ServingContest:
    """Of `servers`, whose environments are folders of `root`. A server that fails is out, and the others go on.

    `results` by name hold what was measured, or why nothing was.
    """

    def __init__(self, servers: Sequence[ServingPeer], root: Path, setup: EngineSetup, vocab_size: int) -> None:
        self._servers = servers
        self._root = root
        self._setup = setup
        self._vocab_size = vocab_size
        self._running: dict[str, PeerServer] = {}
        self.results = {server.name: ServingResult(engine=server.name) for server in servers}

    @contextmanager
    def started(self, *, install: bool) -> Iterator[None]:
        """Start the servers one after another, each paused when it is ready; stop them at the end."""
        try:
            for server in self._servers:
                try:
                    self._start(server, install=install)
                except (PeerFailureError, subprocess.SubprocessError, OSError) as error:
                    self._fail(server.name, error)
            yield
        finally:
            for running in self._running.values():
                running.close()

    def run_round(self, number: int, workload: Workload) -> None:
        """Every server answers `workload` once, all requests at once. Round 0 warms up and does not count."""
        for name, server in list(self._running.items()):
            try:
                with server.awake():
                    served = self._measure(server, workload, number)
            except (PeerFailureError, NanoserveError) as error:
                self._fail(name, error)
                continue
            if number > 0:
                self.results[name].rounds.append(served)
            _say(f"round {number}: {name} over HTTP {served.rate:,.0f} tokens/s")

    def _start(self, server: ServingPeer, *, install: bool) -> None:
        environment = PeerEnvironment(self._root, server.peer)
        if install and not server.is_installed(environment):
            _say(f"installing the server of {server.name} into {environment.path}")
            server.install(environment)
        if not server.is_installed(environment):
            raise PeerFailureError("not installed: run with --install")
        _say(f"starting the server of {server.name}")
        logs = self._root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        running = self._running[server.name] = PeerServer(
            server, environment, self._setup, logs / f"{server.name}-server.log"
        )
        running.wait_ready()
        running.pause()

    def _measure(self, server: PeerServer, workload: Workload, seed: int) -> ServedRound:
        """One load test; raises `PeerFailureError` unless every request was answered with its number of tokens."""
        benchmark = ServeBenchmark(
            target=LoadTarget(url=api_url(server.url), model=MODEL_NAME),
            workload=workload,
            vocab_size=self._vocab_size,
            seed=seed,
            concurrency=len(workload.requests),
            timeout=REQUEST_SECONDS,
            service_level=ServiceLevel(),
        )
        processes = [os.getpid(), *server.processes()]
        busy, idle, used = busy_seconds() or 0.0, idle_seconds() or 0.0, used_seconds(processes)
        report, _ = benchmark.run()
        busy, idle = (busy_seconds() or 0.0) - busy, (idle_seconds() or 0.0) - idle
        used = used_seconds(processes) - used
        _check(report, workload)
        return ServedRound(
            num_output_tokens=report.num_output_tokens,
            seconds=report.seconds,
            ttft_p50=report.ttft.p50,
            ttft_p99=report.ttft.p99,
            tpot_p50=report.tpot.p50,
            client_seconds=report.client_busy * report.seconds,
            idle_seconds=idle,
            foreign_seconds=max(0.0, busy - used),
        )

    def _fail(self, name: str, error: Exception) -> None:
        self.results[name].problem = str(error)
        _say(f"{name}: {error}")
        if server := self._running.pop(name, None):
            server.close()


def _check(report: LatencyReport, workload: Workload) -> None:
    if report.num_failed:
        raise PeerFailureError(f"{report.num_failed} requests failed: {report.errors} {report.error_details}")
    if report.num_wrong_length or report.num_output_tokens != workload.num_output_tokens:
        raise PeerFailureError(
            f"{report.num_wrong_length} answers had another length: {report.num_output_tokens} tokens came, and "
            f"{workload.num_output_tokens} were asked for."
        )


def _say(text: str) -> None:
    """Progress, kept apart from the result."""
    print(text, file=sys.stderr, flush=True)

"""`Contest`: the chosen engines, each loaded in a process of its own, and the rounds in which they take turns."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peer_engines.peer import Peer
from peer_engines.peer_engine import EngineSetup
from peer_engines.peer_environment import PeerEnvironment
from peer_engines.peer_process import PeerFailureError, PeerProcess
from peer_engines.peer_result import PeerResult
from peer_engines.peer_workload import make_requests
from peer_engines.processor_time import busy_seconds

from engine.workloads.workload import Workload

LOAD_SECONDS, RUN_SECONDS = 900.0, 600.0  # loading includes converting and compiling the model
_BENCHMARKS = Path(__file__).resolve().parents[1]


class Contest:
    """Of `peers`, whose environments are folders of `root`. An engine that fails is out, and the others go on.

    `results` by name hold what was measured, or why nothing was.
    """

    def __init__(self, peers: list[Peer], root: Path, setup: EngineSetup) -> None:
        self._peers = peers
        self._root = root
        self._setup = setup
        self._running: dict[str, PeerProcess] = {}
        self.results = {peer.name: PeerResult(engine=peer.name) for peer in peers}

    @contextmanager
    def loaded(self, *, install: bool) -> Iterator[None]:
        """Load the engines one after another, having installed what is missing if wanted; close them at the end."""
        try:
            for peer in self._peers:
                try:
                    self._load(peer, install)
                except (PeerFailureError, subprocess.CalledProcessError, OSError) as error:
                    self._fail(peer.name, error)
            yield
        finally:
            for process in self._running.values():
                process.close()

    def run_round(self, number: int, workload: Workload, vocab_size: int) -> None:
        """Every engine runs `workload` once, with the prompts of this round. Round 0 warms up and does not count."""
        requests = make_requests(workload, vocab_size, seed=number)
        for name in list(self._running):
            try:
                seconds = self._take_turn(name, requests, is_counted=number > 0)
            except PeerFailureError as error:
                self._fail(name, error)
            else:
                _say(f"round {number}: {name} {workload.num_output_tokens / seconds:,.0f} tokens/s")

    def _load(self, peer: Peer, install: bool) -> None:
        result = self.results[peer.name]
        environment = PeerEnvironment(self._root, peer)
        if install and not environment.is_installed:
            _say(f"installing {peer.name} into {environment.path}")
            environment.install()
        if not environment.is_installed:
            result.is_installed, result.problem = False, "not installed: run with --install"
            return
        _say(f"loading {peer.name}")
        process = self._running[peer.name] = self._start(peer, environment)
        values = asdict(replace(self._setup, options=dict(peer.options)))
        values |= {"checkpoint": str(self._setup.checkpoint), "converted": str(self._setup.converted)}
        result.version = process.ask("load", values, LOAD_SECONDS)["version"]

    def _start(self, peer: Peer, environment: PeerEnvironment) -> PeerProcess:
        """The worker finds this package; one that runs in our own interpreter also the project around it."""
        logs = self._root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        places = [_BENCHMARKS] if peer.environment else [_BENCHMARKS, _BENCHMARKS.parent]
        variables = environment.variables(self._setup.num_threads) | {"PYTHONPATH": ":".join(map(str, places))}
        command = [str(environment.python), "-m", peer.module]
        return PeerProcess(command, folder=logs, variables=variables, log=logs / f"{peer.name}.log")

    def _take_turn(self, name: str, requests: list[tuple[list[int], int]], *, is_counted: bool) -> float:
        """Seconds of one run."""
        result = self.results[name]
        busy_before = busy_seconds()
        answer: dict[str, Any] = self._running[name].ask("run", requests, RUN_SECONDS)
        busy_after = busy_seconds()
        seconds = float(answer["seconds"])
        if is_counted:
            result.seconds.append(seconds)
            result.tokens.append(answer["tokens"])
            if busy_before is not None and busy_after is not None:
                foreign = busy_after - busy_before - answer["cpu_seconds"]
                result.foreign_cores.append(max(0.0, foreign) / seconds)
        return seconds

    def _fail(self, name: str, error: Exception) -> None:
        self.results[name].problem = str(error)
        _say(f"{name}: {error}")
        if process := self._running.pop(name, None):
            process.close()


def _say(text: str) -> None:
    """Progress, kept apart from the result."""
    print(text, file=sys.stderr, flush=True)

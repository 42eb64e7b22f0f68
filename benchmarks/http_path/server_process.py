"""`ServerProcess`: `nanoserve serve` as a process of its own, its processes by role, and their processor time."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from http_path.processor_seconds import ProcessorSeconds, read_processor_seconds
from http_path.stage_clock.sitecustomize import FOLDER_VARIABLE, SERVE_VARIABLES

from cluster.process_tree import descendants
from engine.errors import NanoserveError

ROOT: Final = Path(__file__).resolve().parents[2]
START_SECONDS: Final = 180.0
STOP_SECONDS: Final = 40.0
CONFIGURATION_SECONDS: Final = 15.0
MODEL_NAME: Final = "model"
_ROLES: Final = (
    ("ray::ServeReplica:nanoserve:Ingress", "ingress"),
    ("ray::ServeReplica:nanoserve:Replica", "replica"),
    ("ray::Rank", "ranks"),
    ("/bin/haproxy ", "HAProxy"),
    ("ray::ProxyActor", "Serve's proxy"),
)
OTHER_ROLE: Final = "Ray, idle parts"


class ServerError(NanoserveError):
    """The server under test did not do what it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What is served and how. `variables` replace some of Serve's environment; `clock` is where stages are noted."""

    checkpoint: Path
    num_threads: int
    cache: str
    max_model_len: int
    rank_variables: Mapping[str, str]
    serve_variables: Mapping[str, str]
    rank_niceness: int | None = None
    clock: Path | None = None


class ServerProcess:
    """A running server on a free port of 127.0.0.1. `started` waits until it is ready and stops it at the end."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, directory: Path) -> None:
        self._process = process
        self._directory = directory
        self.url = f"http://127.0.0.1:{port}"

    @classmethod
    @contextlib.contextmanager
    def started(cls, options: ServerOptions) -> Iterator[Self]:
        """Raises `ServerError` with what it said where it does not become ready."""
        port = _free_port()
        command = [sys.executable, "-m", "cluster.cli", "serve", str(options.checkpoint), "--port", str(port)]
        command += ["--name", MODEL_NAME, "--device", "cpu", "--threads", str(options.num_threads)]
        command += ["--cache", options.cache, "--max-model-len", str(options.max_model_len), "--plan-seconds", "0"]
        with tempfile.TemporaryDirectory(prefix="http-path-") as name:
            directory = Path(name)
            with (directory / "output").open("w") as output, (directory / "errors").open("w") as errors:
                # A process group keeps a Ctrl-C from it. A session of its own would be a scheduling group, and
                # the ranks' niceness would count for nothing outside it: the client would wait up to a second.
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=output, stderr=errors, env=_environment(options), process_group=0
                )
            server = cls(process, port, directory)
            try:
                server._wait_ready()
                if options.rank_niceness is not None:
                    server._set_niceness("ranks", options.rank_niceness)
                yield server
            finally:
                server._stop()

    def processor_seconds(self) -> ProcessorSeconds:
        """What each role has used since it began."""
        return read_processor_seconds(self._roles())

    def ingress_url(self) -> str:
        """Where the one ingress process itself listens, as HAProxy's configuration says; raises `ServerError`."""
        found = re.search(r"state and logs in (\S+)\)", (self._directory / "errors").read_text())
        folder = Path(found[1]) if found else self._directory
        deadline = time.monotonic() + CONFIGURATION_SECONDS
        while time.monotonic() < deadline:
            for file in sorted(folder.glob("**/haproxy.cfg")):
                backend = re.search(r"^\s*server \S*Ingress\S* (127\.0\.0\.1:\d+) ", file.read_text(), re.MULTILINE)
                if backend:
                    return f"http://{backend[1]}"
            time.sleep(0.1)
        raise ServerError(f"No HAProxy configuration below {folder} names the ingress process.")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """All of its processes stopped, so that it takes no processor time."""
        processes = [self._process.pid, *descendants(self._process.pid)]
        _signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(processes, signal.SIGCONT)

    def _roles(self) -> dict[int, str]:
        roles = {}
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                roles[pid] = next((role for mark, role in _ROLES if mark in line), OTHER_ROLE)
        return roles

    def _set_niceness(self, role: str, niceness: int) -> None:
        """Of every thread: on Linux a thread has its own."""
        for pid in (pid for pid, its_role in self._roles().items() if its_role == role):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "is ready" not in (self._directory / "output").read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"nanoserve serve did not start: {(self._directory / 'errors').read_text()[-2000:]}")
            time.sleep(0.05)

    def _stop(self) -> None:
        processes = descendants(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            _signal([pid for pid in processes if Path(f"/proc/{pid}").exists()], signal.SIGKILL)


def _environment(options: ServerOptions) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= options.rank_variables
    if options.clock is not None:
        environment[FOLDER_VARIABLE] = str(options.clock)
    if options.serve_variables:
        environment[SERVE_VARIABLES] = json.dumps(dict(options.serve_variables))
    if options.clock is not None or options.serve_variables:
        paths = [str(Path(__file__).parent / "stage_clock"), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
    return port


def _signal(processes: list[int], number: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

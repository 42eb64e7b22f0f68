"""`PeerServer`: a server of the comparison as a process with all that it starts, paused while it is not its turn."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peer_engines.peer_engine import EngineSetup
from peer_engines.peer_environment import PeerEnvironment
from peer_engines.peer_process import PeerFailureError
from peer_engines.serving_peer import ServingPeer

from cluster.process_tree import descendants

START_SECONDS, WAKE_SECONDS, STOP_SECONDS = 600.0, 30.0, 40.0
_SETTLE_SECONDS = 3.0  # after a pause: timers of all its processes have run out, and connections may be made again


class PeerServer:
    """Starts the server on a free port of 127.0.0.1. Its output goes to the file `log`."""

    def __init__(self, server: ServingPeer, environment: PeerEnvironment, setup: EngineSetup, log: Path) -> None:
        self._log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._ready_url = self.url + server.ready_path
        variables = environment.variables(setup.num_threads)
        variables = {name: value for name, value in variables.items() if not name.startswith("RAY_")}
        for name, value in server.variables.items():
            if value is None:
                variables.pop(name, None)
            else:
                variables[name] = value
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(server.program(environment)), *server.arguments(setup, port)],
                cwd=server.folder or log.parent,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Of the server: the one that was started, and all below it."""
        return [self._process.pid, *descendants(self._process.pid)]

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Until it is ready; raises `PeerFailureError` where it ends or says nothing for so long."""
        deadline = time.monotonic() + seconds
        while not self._answers():
            if self._process.poll() is not None:
                raise PeerFailureError(f"The server ended with status {self._process.returncode}; see {self._log}.")
            if time.monotonic() > deadline:
                raise PeerFailureError(f"The server was not ready within {seconds:.0f} seconds; see {self._log}.")
            time.sleep(0.2)

    def pause(self) -> None:
        """Stop all of its processes."""
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Its turn: all processes run, and it answers."""
        self._signal(signal.SIGCONT)
        try:
            time.sleep(_SETTLE_SECONDS)
            self.wait_ready(WAKE_SECONDS)
            yield
        finally:
            self.pause()

    def close(self) -> None:
        """Let it stop itself, then make an end of what is left. Idempotent."""
        processes = self.processes()
        self._signal(signal.SIGCONT)
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in processes[1:]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self._ready_url, timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, number)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
    return port

"""`Command`: `nanoserve serve` as a process, with the means to watch and to stop it, for tests of a real server."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
START_SECONDS = 150.0
STOP_SECONDS = 40.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
    return port


def until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.1)


class Command:
    """A running `nanoserve serve`, and every process it causes, recognisable by a mark in their environment."""

    def __init__(
        self, directory: Path, checkpoint: Path, *options: str, variables: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.mark = uuid.uuid4().hex
        self.output = directory / "output"
        self.errors = directory / "errors"
        command = [sys.executable, "-m", "cluster.cli", "serve", str(checkpoint), "--port", str(self.port), *options]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with self.output.open("w") as output, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=errors,
                env=environment | dict(variables or {}) | {"MARK": self.mark},
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    @property
    def state_directory(self) -> Path | None:
        told = re.search(r"state and logs in (\S+)\)", self.errors.read_text())
        return None if told is None else Path(told[1])

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.errors.read_text()
            return "is ready" in self.output.read_text()

        until(is_ready, START_SECONDS, "the ready line")

    def signal(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)

    def processes(self) -> dict[int, str]:
        """Command lines of all living processes with the mark."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def named(self, name: str) -> list[int]:
        return [pid for pid, line in self.processes().items() if line.startswith(f"ray::{name}")]

    def ranks(self) -> list[int]:
        return self.named("Rank")

    def targets(self, kind: str = "") -> list[str]:
        """The metrics addresses of the processes of one kind, or of all."""
        listed = self.client.get("/metrics/targets").json()
        return [target["targets"][0] for target in listed if kind in ("", target["labels"]["nanoserve_process"])]

    def samples(self, name: str, addresses: list[str] | None = None) -> dict[str, float]:
        """The sum of a metric's samples, per process."""
        sums = {}
        for address in self.targets() if addresses is None else addresses:
            text = httpx.get(f"http://{address}/metrics").text
            values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
            if values:
                sums[address] = sum(map(float, values))
        return sums

    @property
    def is_idle(self) -> bool:
        names = ("num_requests_running", "num_requests_waiting", "kv_blocks_used", "routed_requests")
        return not any(sum(self.samples(f"nanoserve_{name}").values()) for name in names)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.state_directory is not None:
            shutil.rmtree(self.state_directory, ignore_errors=True)

"""`PeerProcess`: the comparison's side of the protocol that `worker_loop` serves: one engine in one process.

A process is paused by a signal while it is not its turn: engines that spin when idle, and threads that do so for a
while after a step, would otherwise take time from the one being measured.
"""

import json
import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_CLOSE_SECONDS = 30.0


class PeerFailureError(RuntimeError):
    """An engine that cannot load or run; says why in one line."""


class PeerProcess:
    """Starts `command`. What it writes to standard error goes to the file `log`."""

    def __init__(self, command: list[str], *, folder: Path, variables: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a process group of its own, to pause it with all its children
            )

    def ask(self, verb: str, value: Any, seconds: float) -> dict[str, Any]:
        """Send one message, and wait so long for the answer; the process is paused before and after.

        Raises `PeerFailureError` for an answer that is an error, a dead process, and no answer in time.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({verb: value}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailureError(self._why_dead()) from None
        answer: dict[str, Any] = json.loads(self._line(verb, seconds))
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise PeerFailureError(answer["error"])
        return answer

    def close(self) -> None:
        """Let the engine stop itself, then make an end of what is left of the process group. Idempotent."""
        if self._process.poll() is None:
            with suppress(PeerFailureError):
                self.ask("close", None, _CLOSE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was never read by the dead process
                    pipe.close()

    def _line(self, verb: str, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        received = bytearray()
        while not received.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise PeerFailureError(f"No answer to {verb} within {seconds:.0f} seconds; see {self._log}.")
            chunk = os.read(descriptor, 1 << 20)
            if not chunk:
                raise PeerFailureError(self._why_dead())
            received += chunk
        return bytes(received)

    def _why_dead(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"The process ended with status {status}: {lines[-1] if lines else 'it said nothing'}"

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

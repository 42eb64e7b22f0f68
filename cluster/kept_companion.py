"""`KeptCompanion`: Prometheus or Grafana beside a cluster's head: started, and started again when it has ended.

The pause before a new start doubles with every end that comes soon after it, so that a program which cannot run costs
nothing. What happens is told in the program's own log, where its last words are.
"""

import os
import subprocess
from datetime import datetime
from pathlib import Path

from cluster.monitoring import Companion, is_free

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0
STEADY_SECONDS = 60.0  # who has run for so long is taken to be well, and its next end for another matter
_STOP_SECONDS = 10.0


class KeptCompanion:
    """`look` at it every few seconds. Times are of one monotonic clock, in seconds."""

    def __init__(self, companion: Companion, directory: Path) -> None:
        """Logs go to `directory`, where the program runs too."""
        self._companion = companion
        self._directory = directory
        self._log = directory / f"{companion.name.lower()}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_at = 0.0
        self._pause = FIRST_PAUSE_SECONDS

    def look(self, now: float) -> None:
        """Start the program if it is due; note if it has ended, and when to start it again."""
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            self._process = None
            self._ended(now, f"ended with status {status}")
        elif now >= self._start_at:
            self._start(now)

    def end(self) -> None:
        """Stop it for good."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _start(self, now: float) -> None:
        self._started_at = now
        if not is_free(self._companion.port):
            self._ended(now, f"cannot be started, since something else listens on port {self._companion.port}")
            return
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._companion.command,
                    env=os.environ | dict(self._companion.environment),
                    cwd=self._directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:
            self._ended(now, f"cannot be started: {error}")

    def _ended(self, now: float, what: str) -> None:
        if now - self._started_at >= STEADY_SECONDS:
            self._pause = FIRST_PAUSE_SECONDS
        self._start_at = now + self._pause
        with self._log.open("a") as log:
            moment = datetime.now().astimezone().isoformat(timespec="seconds")
            log.write(f"{moment} nanoserve: {self._companion.name} {what}; trying again in {self._pause:.0f} s.\n")
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)

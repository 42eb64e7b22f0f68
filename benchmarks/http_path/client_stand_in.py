"""`StandIn`: a process that takes as much processor time as a client would. Run as a program, it is that process."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """`busy_seconds` of processor time in every `period_seconds`."""

    period_seconds: float
    busy_seconds: float

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Takes its time until the block ends."""
        command = [sys.executable, "-I", "-S", __file__, str(self.period_seconds), str(self.busy_seconds)]
        with subprocess.Popen(command) as process:
            try:
                yield
            finally:
                process.kill()


def main() -> None:
    """Take processor time until killed; the arguments are those of `StandIn`."""
    period, busy = map(float, sys.argv[1:])
    due = time.monotonic()
    while True:
        end = time.thread_time() + busy
        while time.thread_time() < end:
            pass
        due = max(due + period, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main()

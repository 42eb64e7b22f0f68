"""What stays beside a machine's Ray and ends with it: `python -m cluster.node_keeper DIRECTORY`, one on every machine.

On the head it runs Prometheus and Grafana. On all it waits for the raylet to end, whatever ends it, and then ends what
is left of what `nanoserve ray start` started: `ray down` stops the head alone, and a worker whose head is gone loses
its raylet after a minute, but would keep others of Ray's processes for ever.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.marked_processes import MARK, MarkedProcess, end_marked, marked_processes, start_apart
from cluster.monitoring import companions, is_free
from cluster.ray_node import HEAD_MARK, ROOT, running_node

_POLL_SECONDS = 2.0
_GRACE_SECONDS = 5.0  # for `ray stop`, which ends processes one after the other
_STOP_SECONDS = 10.0


def start_keeper(directory: Path, raylet: MarkedProcess) -> list[str]:
    """Have one run from now on, unless one does; what to tell the user."""
    if any("cluster.node_keeper" in process.command for process in marked_processes()):
        return []
    said = []
    if raylet.mark.startswith(HEAD_MARK):
        for companion in companions(directory, ROOT):
            if is_free(companion.port):
                said.append(f"{companion.name} listens on http://127.0.0.1:{companion.port}.")
            else:
                said.append(
                    f"{companion.name} is not started, since something listens on port {companion.port} already; "
                    "docs/launch.md says how it can read this cluster."
                )
    start_apart([sys.executable, "-m", "cluster.node_keeper", str(directory)], raylet.environment, ROOT)
    return said


def main() -> None:
    """Return once Ray and all that belongs to it has ended."""
    directory, mark = Path(sys.argv[1]), os.environ[MARK]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    running = _start_companions(directory) if mark.startswith(HEAD_MARK) else []
    try:
        while running_node() is not None:
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    time.sleep(_GRACE_SECONDS)
    end_marked(mark)


def _start_companions(directory: Path) -> list[subprocess.Popen[bytes]]:
    running = []
    for companion in companions(directory, ROOT):
        if is_free(companion.port):
            with (directory / f"{companion.name.lower()}.log").open("ab") as log:
                environment = os.environ | dict(companion.environment)
                running.append(
                    subprocess.Popen(companion.command, env=environment, cwd=directory, stdout=log, stderr=log)
                )
    return running


if __name__ == "__main__":
    main()

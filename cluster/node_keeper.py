"""What stays beside a machine's Ray and ends with it: `python -m cluster.node_keeper DIRECTORY`, one on every machine.

On the head it runs Prometheus and Grafana, again when they have ended. On all it waits for the raylet to end, whatever
ends it, and then ends what is left of what `nanoserve ray start` started: `ray down` stops the head alone, and a worker
whose head is gone loses its raylet after a minute, but would keep others of Ray's processes for ever.
"""

import os
import signal
import sys
import time
from pathlib import Path

from cluster.kept_companion import KeptCompanion
from cluster.marked_processes import MARK, MarkedProcess, end_marked, marked_processes, start_apart
from cluster.monitoring import Companion, companions, is_free
from cluster.ray_node import HEAD_MARK, ROOT, running_node

_POLL_SECONDS = 2.0
_GRACE_SECONDS = 5.0  # for `ray stop`, which ends processes one after the other


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
    kept = [KeptCompanion(each, directory) for each in _own_companions(directory)] if mark.startswith(HEAD_MARK) else []
    try:
        while running_node() is not None:
            for companion in kept:
                companion.look(time.monotonic())
            time.sleep(_POLL_SECONDS)
    finally:
        for companion in kept:
            companion.end()
    time.sleep(_GRACE_SECONDS)
    end_marked(mark)


def _own_companions(directory: Path) -> list[Companion]:
    """Those whose port nobody has: who has it when Ray starts is the user's own, and is to stay."""
    return [companion for companion in companions(directory, ROOT) if is_free(companion.port)]


if __name__ == "__main__":
    main()

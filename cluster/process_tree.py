"""`ProcessTree`: every process that descends from this one, so that none outlives it. Linux.

Ray's daemons start each other and outlive their parents. As a "child subreaper" this process inherits such orphans,
so that at the end everything it caused is found below it, and nothing that it did not.
"""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PROC = Path("/proc")


class ProcessTree:
    """Adopts orphans from now on."""

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def end(self, patience: float = 3.0) -> int:
        """Ask every descendant to end, then make it; returns how many there were."""
        processes = descendants(os.getpid())
        _signal(processes, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while descendants(os.getpid()) and time.monotonic() < deadline:
            _reap()
            time.sleep(0.05)
        while left := descendants(os.getpid()):
            _signal(left, signal.SIGKILL)
            _reap()
            time.sleep(0.02)
        _reap()
        return len(processes)


def descendants(process_id: int) -> set[int]:
    """Living processes below `process_id`."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The command in parentheses may hold anything; state and parent follow the last one.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found: set[int] = set()
    front = [process_id]
    while front:
        new = [child for parent in front for child in children.get(parent, []) if child not in found]
        found.update(new)
        front = new
    return found


def _signal(processes: set[int], number: signal.Signals) -> None:
    for process_id in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass

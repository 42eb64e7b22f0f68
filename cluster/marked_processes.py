"""Processes recognised by an environment variable that all their descendants inherit. Linux, the same user only.

`ray stop` ends every Ray process of a machine, whoever started it. What `nanoserve ray start` started carries a mark,
so that it can be found again by a later command, and ended alone.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.process_tree import descendants

MARK = "NANOSERVE_NODE"
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedProcess:
    """A living process with the mark."""

    process_id: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)

    @property
    def mark(self) -> str:
        """The value of the mark."""
        return self.environment[MARK]

    def runs(self, program: str) -> bool:
        """Whether its executable's name is `program`."""
        return Path(self.command[0]).name == program


def marked_processes() -> list[MarkedProcess]:
    """All but this process and those above it, which may have inherited the mark from a shell of the user's.

    Nor those of containers on this machine, which are machines of their own.
    """
    found = []
    above = _ancestors()
    here = os.readlink("/proc/self/ns/pid")
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) in above:
            continue
        with contextlib.suppress(OSError):
            if os.readlink(entry / "ns" / "pid") != here:
                continue
            if f"{MARK}=".encode() not in (data := (entry / "environ").read_bytes()):
                continue
            variables = dict(item.split("=", 1) for item in data.decode(errors="replace").split("\0") if "=" in item)
            command = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            if MARK in variables and command != [""]:
                found.append(MarkedProcess(process_id=int(entry.name), command=tuple(command), environment=variables))
    return found


def start_apart(command: Sequence[str], environment: Mapping[str, str], directory: Path | None = None) -> None:
    """Start a program that outlives this one and says nothing; `environment` carries the mark."""
    quiet = subprocess.DEVNULL
    subprocess.Popen(
        command, env=environment, cwd=directory, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
    )


def end_marked(mark: str, patience: float = 10.0) -> int:
    """End every process with this mark and those below it, first by asking; returns how many there were.

    Below it, since a process that has changed its title, as many of Ray's have, shows no environment any more.
    """
    targets = _family(mark)
    num_found = len(targets)
    _signal(targets, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while targets := {process_id for process_id in targets if _is_alive(process_id)} | _family(mark):
        if time.monotonic() > deadline:
            _signal(targets, signal.SIGKILL)
        time.sleep(0.1)
    return num_found


def _family(mark: str) -> set[int]:
    marked = {process.process_id for process in marked_processes() if process.mark == mark}
    return marked.union(*map(descendants, marked)) - _ancestors()


def _is_alive(process_id: int) -> bool:
    try:
        state = (_PROC / str(process_id) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for process_id in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)


def _ancestors() -> set[int]:
    process_id, found = os.getpid(), set[int]()
    while process_id > 0:
        found.add(process_id)
        status = (_PROC / str(process_id) / "stat").read_text()
        process_id = int(status.rpartition(")")[2].split()[1])
    return found

"""What servers that were killed have left behind: processes that nobody waits for, and their folders."""

import contextlib
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import Finding, ok, warning
from cluster.doctor.socket_table import command_of
from cluster.serving import RAY_DIRECTORY

CHECK = "leftovers"
_PREFIX = "nanoserve-"
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenProcess:
    """A process of this machine."""

    process_id: int
    parent: int
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """All processes that can be seen, and the folders that local clusters of `nanoserve serve` keep their state in."""

    processes: tuple[SeenProcess, ...]
    directories: tuple[Path, ...]


def read_leftovers(directory: Path | None = None) -> Leftovers:
    """Of now; `directory` is where such folders are made."""
    processes = []
    for entry in _PROC.iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit():
                # The command in parentheses may hold anything; state and parent follow the last one.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    number = int(entry.name)
                    processes.append(SeenProcess(process_id=number, parent=int(parent), command=command_of(number)))
    places = {directory} if directory else {Path(tempfile.gettempdir()), Path("/tmp")}
    found = {session.parents[1] for place in places for session in place.glob(f"{_PREFIX}*/{RAY_DIRECTORY}/session_*")}
    return Leftovers(processes=tuple(processes), directories=tuple(sorted(found)))


def judge_leftovers(leftovers: Leftovers) -> list[Finding]:
    """A server's processes descend from it; those that do not, but use such a folder, have lost it."""
    by_id = {process.process_id: process for process in leftovers.processes}
    findings = []
    for directory in leftovers.directories:
        users = [process for process in leftovers.processes if _uses(process, directory)]
        if any(_has_server(process, by_id) for process in users):
            continue
        if users:
            ids = " ".join(str(process.process_id) for process in sorted(users, key=lambda each: each.process_id))
            found = f"{len(users)} processes of a server that is gone still run; they hold memory, and devices."
            findings.append(warning(CHECK, found, str(directory), f"End them: `kill {ids}`, then `rm -r {directory}`."))
        else:
            found = "The folder of a server that was killed."
            findings.append(warning(CHECK, found, str(directory), f"Remove it: `rm -r {directory}`."))
    return findings or [
        ok(CHECK, "Nothing of earlier servers is left.", str(Path(tempfile.gettempdir()) / f"{_PREFIX}*"))
    ]


def _uses(process: SeenProcess, directory: Path) -> bool:
    return f"{directory}/" in f"{process.command}/" or f"={directory} " in f"{process.command} "


def _has_server(process: SeenProcess, by_id: dict[int, SeenProcess]) -> bool:
    """Whether the `nanoserve serve` (or another program) that started it lives: its topmost parent below init."""
    seen: set[int] = set()
    while process.process_id not in seen:
        seen.add(process.process_id)
        if is_server(process.command.split()):
            return True
        if process.parent not in by_id:
            return False
        process = by_id[process.parent]
    return False


def is_server(words: Sequence[str] | Collection[str]) -> bool:
    """Whether a command line is that of `nanoserve serve`, however it was called."""
    return "serve" in words and any(word.endswith(("nanoserve", "cluster.cli")) for word in words)

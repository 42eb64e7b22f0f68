"""`SocketTable`: who listens on which TCP port of this machine, from /proc. Linux."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_LISTENING = "0A"
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process by its id and command line."""

    process_id: int
    command: str

    def __str__(self) -> str:
        return f"process {self.process_id} ({self.command[:80]})"


@dataclass(frozen=True, slots=True)
class SocketTable:
    """Inodes of the sockets that listen, by port."""

    inodes: dict[int, frozenset[int]]

    @classmethod
    def read(cls) -> "SocketTable":
        """Of now."""
        inodes: dict[int, set[int]] = {}
        for name in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in (_PROC / "net" / name).read_text(encoding="ascii").splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == _LISTENING:
                        inodes.setdefault(int(fields[1].rpartition(":")[2], 16), set()).add(int(fields[9]))
        return cls({port: frozenset(found) for port, found in inodes.items()})

    def holder(self, port: int) -> Process | None:
        """The process that listens on a port; None where nobody does, or it is not ours to see."""
        wanted = {f"socket:[{inode}]" for inode in self.inodes.get(port, ())}
        if not wanted:
            return None
        for entry in _PROC.iterdir():
            if entry.name.isdigit() and _holds(entry / "fd", wanted):
                return Process(process_id=int(entry.name), command=command_of(int(entry.name)))
        return None


def command_of(process_id: int) -> str:
    """The command line of a process; empty where it is gone."""
    try:
        return (_PROC / str(process_id) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _holds(descriptors: Path, wanted: set[str]) -> bool:
    with contextlib.suppress(OSError):
        for descriptor in descriptors.iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(descriptor) in wanted:
                    return True
    return False

"""`ProcessorSeconds`: processor time by role, and the time that the machine's processors were idle. Linux."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_USER, _SYSTEM = 11, 12  # of proc(5)'s /proc/PID/stat, counted after the command in parentheses
_IDLE_COLUMNS = (3, 4)  # idle and waiting for input and output, of the first line of /proc/stat
_GUEST_COLUMN = 8  # from here on, time that other columns already contain


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSeconds:
    """Seconds used `by_role`, by everything on the machine (`busy`), and by nobody (`idle`), since some moment."""

    by_role: Mapping[str, float]
    busy: float
    idle: float

    def since(self, earlier: Self) -> "ProcessorSeconds":
        """What was used between the two."""
        by_role = {role: seconds - earlier.by_role.get(role, 0.0) for role, seconds in self.by_role.items()}
        return ProcessorSeconds(by_role=by_role, busy=self.busy - earlier.busy, idle=self.idle - earlier.idle)


def read_processor_seconds(roles: Mapping[int, str]) -> ProcessorSeconds:
    """Of the processes in `roles` that still live, all threads, user and system."""
    by_role = dict.fromkeys(roles.values(), 0.0)
    for pid, role in roles.items():
        with contextlib.suppress(OSError):
            columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            by_role[role] += (int(columns[_USER]) + int(columns[_SYSTEM])) / _TICKS_PER_SECOND
    ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:]][:_GUEST_COLUMN]
    idle = sum(ticks[column] for column in _IDLE_COLUMNS)
    return ProcessorSeconds(
        by_role=by_role, busy=(sum(ticks) - idle) / _TICKS_PER_SECOND, idle=idle / _TICKS_PER_SECOND
    )

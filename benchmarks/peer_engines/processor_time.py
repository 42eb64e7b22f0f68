"""Processor time of the machine and of processes: what disturbs a comparison, and what a client takes of it."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_IDLE_COLUMNS = {3, 4}  # idle and waiting for input and output, of proc(5)'s first line of /proc/stat
_GUEST_COLUMN = 8  # from here on, time that other columns already contain
_USER, _SYSTEM = 11, 12  # of /proc/PID/stat, counted after the command in parentheses


def busy_seconds() -> float | None:
    """Seconds that all processors together were not idle since the machine started; None where there is no /proc."""
    return _seconds(is_idle=False)


def idle_seconds() -> float | None:
    """Seconds that all processors together had nothing to do; None where there is no /proc."""
    return _seconds(is_idle=True)


def used_seconds(processes: Iterable[int]) -> float:
    """What these processes have used, of those that live, all threads, user and system."""
    ticks = 0
    for process in processes:
        with contextlib.suppress(OSError):
            columns = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(columns[_USER]) + int(columns[_SYSTEM])
    return ticks / os.sysconf("SC_CLK_TCK")


def _seconds(*, is_idle: bool) -> float | None:
    try:
        first, *_ = Path("/proc/stat").read_text().splitlines()
    except FileNotFoundError:
        return None
    columns = [int(text) for text in first.split()[1:]][:_GUEST_COLUMN]
    ticks = sum(value for column, value in enumerate(columns) if (column in _IDLE_COLUMNS) is is_idle)
    return ticks / os.sysconf("SC_CLK_TCK")

"""How much of the machine's processors other programs take while an engine runs: what disturbs a comparison."""

import os
from pathlib import Path

_IDLE_COLUMNS = {3, 4}  # idle and waiting for input and output, of proc(5)'s first line of /proc/stat
_GUEST_COLUMN = 8  # from here on, time that other columns already contain


def busy_seconds() -> float | None:
    """Seconds that all processors together were not idle since the machine started; None where there is no /proc."""
    try:
        first, *_ = Path("/proc/stat").read_text().splitlines()
    except FileNotFoundError:
        return None
    columns = [int(text) for text in first.split()[1:]][:_GUEST_COLUMN]
    ticks = sum(value for column, value in enumerate(columns) if column not in _IDLE_COLUMNS)
    return ticks / os.sysconf("SC_CLK_TCK")

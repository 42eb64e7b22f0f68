"""How many of the machine's CPUs this process may use: a container is often given fewer than the machine has.

`os.cpu_count` knows the machine alone. A set of CPUs (taskset, `docker --cpuset-cpus`) is the process's affinity; a
quota (`docker --cpus`, a pod's limit, systemd's CPUQuota) is a setting of its control group or of one above that.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def num_usable_cpus() -> int:
    """At least 1; a quota of two and a half CPUs is two."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(affinity), *_quotas(_CONTROL_GROUPS, _OWN_GROUPS)])))


def _quotas(mounted: Path, own: Path) -> Iterator[float]:
    """The limits of every control group that this process is in, in CPUs, of version 1 and 2 (cgroups(7))."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounted / "cpu" if controllers else mounted
        group = Path(path.lstrip("/"))  # in a container with a name space of its own, itself the root
        for level in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no limit there, or said otherwise
                yield _quota(root / level, is_first_version=bool(controllers))


def _quota(group: Path, *, is_first_version: bool) -> float:
    if is_first_version:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    else:
        quota, period = (group / "cpu.max").read_text().split()
    if float(quota) <= 0:
        raise ValueError("-1 is no limit")
    return float(quota) / float(period)

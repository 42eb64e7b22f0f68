"""Room on the disks that a server writes to."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import Finding, error, ok, warning

CHECK = "disk"
LEAST_BYTES = 1 << 30
AMPLE_BYTES = 5 << 30
_RAY_LIMIT = 0.95  # Ray refuses to write objects to a file system that is fuller


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpace:
    """Of the file system of `path`, in bytes; `purpose` is what a server writes there."""

    path: Path
    purpose: str
    free: int
    total: int
    is_writable: bool = True


def read_disks(places: Sequence[tuple[str, Path]]) -> list[DiskSpace]:
    """Of (purpose, path) pairs; a folder that does not exist yet is taken for its nearest parent."""
    spaces = []
    for purpose, wanted in places:
        path = wanted
        while not path.exists():
            path = path.parent
        usage = shutil.disk_usage(path)
        spaces.append(
            DiskSpace(
                path=path, purpose=purpose, free=usage.free, total=usage.total, is_writable=os.access(path, os.W_OK)
            )
        )
    return spaces


def judge_disks(spaces: Sequence[DiskSpace]) -> list[Finding]:
    """One finding each."""
    return [_judge(space) for space in spaces]


def _judge(space: DiskSpace) -> Finding:
    free, where = f"{space.free / 2**30:.2f} of {space.total / 2**30:.1f} GiB are free", f"{space.path}"
    move = (
        "free some, or choose another place with TMPDIR (sessions of `nanoserve serve`, if of at most 8 characters), "
        "RAY_TMPDIR (those of `nanoserve ray`) and NANOSERVE_CACHE_DIR (plans, kernels)"
    )
    if not space.is_writable:
        return error(
            CHECK, f"{space.purpose} cannot be written.", where, f"Give this user the right to write; or {move}."
        )
    if space.free < LEAST_BYTES:
        return error(CHECK, f"{space.purpose}: only {free}.", where, f"Make room: {move}.")
    if space.free < AMPLE_BYTES or space.free < (1 - _RAY_LIMIT) * space.total:
        return warning(CHECK, f"{space.purpose}: {free}; Ray wants 5 % and logs grow.", where, f"Make room: {move}.")
    return ok(CHECK, f"{space.purpose}: {free}.", where)

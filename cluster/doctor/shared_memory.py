"""Shared memory: Ray's object store lies there, and NCCL's buffers of a node's ranks. Containers have 64 MiB."""

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import Finding, error, ok, warning

CHECK = "shared memory"
DEFAULT_PATH = Path("/dev/shm")
LEAST_BYTES = 100 << 20  # the object store of `nanoserve serve` takes 80 MiB
AMPLE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """Bytes of the file system at `path`; None where there is none."""

    path: Path
    total: int | None
    free: int | None


def read_shared_memory(path: Path = DEFAULT_PATH) -> SharedMemory:
    """How large it is now."""
    try:
        numbers = os.statvfs(path)
    except OSError:
        return SharedMemory(path=path, total=None, free=None)
    return SharedMemory(path=path, total=numbers.f_blocks * numbers.f_frsize, free=numbers.f_bavail * numbers.f_frsize)


def judge_shared_memory(memory: SharedMemory) -> Finding:
    """Too little of it makes Ray fall back to the disk, and NCCL fail with a bus error."""
    where = str(memory.path)
    remedy = (
        "Make it larger: `docker run --shm-size=2g`, an emptyDir of medium Memory at /dev/shm in Kubernetes, or "
        f"`mount -o remount,size=2G {where}`."
    )
    if memory.total is None or memory.free is None:
        return error(
            CHECK, "There is no shared memory.", where, f"Mount a tmpfs: `mount -t tmpfs -o size=2G tmpfs {where}`."
        )
    found = f"{memory.free / 2**20:,.0f} of {memory.total / 2**20:,.0f} MiB are free"
    if memory.free < LEAST_BYTES:
        if memory.total >= AMPLE_BYTES:  # it is large, and others fill it
            remedy = (
                f"Remove what nobody uses any more (`ls -la {where}`); plasma and nccl files of dead processes stay."
            )
        return error(CHECK, f"Only {found}: Ray's object store alone takes 80.", where, remedy)
    if memory.total < AMPLE_BYTES:
        return warning(CHECK, f"{found}: little for ranks on GPUs, whose collectives use it.", where, remedy)
    return ok(CHECK, f"{found}.", where)

"""Host memory: what of it a process holds, and what the C library does with arrays that torch frees.

By default glibc returns large freed arrays to the operating system, and the next step pays a page fault for every
4 KiB of its temporaries: a quarter of a small model's CPU step, as measured (docs/cpu_attention.md). So it is asked to
keep them; and once, when weights have been loaded and packed, to return what that has left behind.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TRIM_THRESHOLD = -1  # names of mallopt(3), from malloc.h
_MMAP_THRESHOLD = -3
_LARGEST_RECYCLED = 32 * 2**20  # glibc accepts no more
_KEPT_BYTES = 512 * 2**20
_MADV_HUGEPAGE = 14  # of madvise(2), from mman.h
_HUGE_PAGE = 2 * 2**20  # where pages are of 4 KiB; elsewhere a start that lies a little late


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentMemory:
    """Of one process, in bytes, as proc(5) has it in smaps_rollup.

    `resident` (RSS) counts pages that are shared with other processes in full, `proportional` (PSS) its share of them.
    `anonymous` is what the process has written itself; the rest are pages of files: libraries, and shared memory.
    """

    resident: int
    proportional: int
    anonymous: int


def keep_freed_memory() -> bool:
    """Recycle arrays of up to 32 MiB and keep up to 512 MiB in this process; False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_RECYCLED)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))


def prefer_huge_pages(address: int, num_bytes: int) -> bool:
    """Ask for the whole huge pages within `num_bytes` not yet written to be such; False where the system has none."""
    first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE - first
    if length <= 0:
        return False
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    return bool(madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE) == 0)


def return_freed_memory() -> bool:
    """Give what is free in the heap back to the operating system, once; False where there was none or is no glibc."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False


def resident_memory(pid: int | None = None) -> ResidentMemory | None:
    """Of process `pid`, else of this one; None where it has ended, is another user's, or is not on Linux."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return None
    kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return ResidentMemory(
        resident=1024 * kibibytes["Rss"],
        proportional=1024 * kibibytes["Pss"],
        anonymous=1024 * kibibytes["Anonymous"],
    )


def resident_file_bytes(wanted: Callable[[str], bool]) -> int:
    """Resident bytes of this process's mappings of files whose path is `wanted`; 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    num_bytes, is_wanted = 0, False
    for line in lines:
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):  # a mapping's addresses; its path, if it has one, comes last
            is_wanted = len(rest) == 5 and wanted(rest[-1])
        elif is_wanted and first == "Rss:":
            num_bytes += 1024 * int(rest[0])
    return num_bytes

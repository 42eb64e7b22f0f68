"""Host memory: asks the C library to keep what torch frees, for the next step to use.

By default glibc returns large freed arrays to the operating system, and the next step pays a page fault for every
4 KiB of its temporaries: a quarter of a small model's CPU step, as measured (docs/cpu_attention.md).
"""

import ctypes

_TRIM_THRESHOLD = -1  # names of mallopt(3), from malloc.h
_MMAP_THRESHOLD = -3
_LARGEST_RECYCLED = 32 * 2**20  # glibc accepts no more
_KEPT_BYTES = 512 * 2**20


def keep_freed_memory() -> bool:
    """Recycle arrays of up to 32 MiB and keep up to 512 MiB in this process; False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_RECYCLED)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))

"""Freed memory that is kept, in processes of its own, because the setting cannot be taken back; and huge pages."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.host_memory import prefer_huge_pages

PROGRAM = """
import resource
import torch
from engine.host_memory import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if {keep} else True
torch.ones(2**21)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    arrays = [torch.ones(2**20) for _ in range(4)]  # 4 MiB each: 1,024 pages
    del arrays
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> tuple[bool, int]:
    """Whether the setting was made, and the page faults of 20 rounds of allocating and freeing 16 MiB."""
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    # glibc's first thresholds, fixed: left to itself it may or may not learn better, depending on where arrays lie.
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=120)
    kept, num_faults = result.stdout.split()
    return kept == "True", int(num_faults)


def test_freed_arrays_are_used_again() -> None:
    kept, num_faults = faults(keep=True)
    if not kept:
        pytest.skip("the C library is not glibc")
    assert num_faults < 3 * 4096  # once
    assert faults(keep=False)[1] > 15 * 4096  # every round


def test_a_large_cache_lies_in_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the system gives no huge pages")
    mapping = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(mapping, dtype=np.uint8)
    before = _huge_bytes()
    assert prefer_huge_pages(array.ctypes.data, array.nbytes)
    array[:] = 1
    assert _huge_bytes() - before >= 32 * 2**20
    assert array[0] == array[-1] == 1


def _huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


@pytest.mark.parametrize("num_bytes", [0, 4096, 2 * 2**20 - 1])
def test_less_than_a_huge_page_stays_as_it_is(num_bytes: int) -> None:
    assert not prefer_huge_pages(2**21 + 1, num_bytes)

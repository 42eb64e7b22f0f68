"""Keeping freed memory, in processes of its own, because the setting cannot be taken back."""

import os
import subprocess
import sys

import pytest

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

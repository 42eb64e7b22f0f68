"""What all tests share: nothing is read from, or written to, the cache of the user who runs them.

Without a GPU Triton's kernels are interpreted. Triton must know before it is first imported, whoever does that.
"""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No time limits in tests: machines differ, and a busy one has seconds in which it does nothing for us.
settings.register_profile("nanoserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nanoserve")


@pytest.fixture(scope="session", autouse=True)
def cache_directory() -> Iterator[None]:
    """A cache of the session's own, which the processes that tests start inherit."""
    with tempfile.TemporaryDirectory(prefix="nanoserve-cache-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOSERVE_CACHE_DIR", directory)
        yield

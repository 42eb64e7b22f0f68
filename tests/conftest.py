"""What all tests share: nothing is read from, or written to, the cache of the user who runs them."""

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_directory() -> Iterator[None]:
    """A cache of the session's own, which the processes that tests start inherit."""
    with tempfile.TemporaryDirectory(prefix="nanoserve-cache-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOSERVE_CACHE_DIR", directory)
        yield

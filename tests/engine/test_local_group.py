import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from engine import EngineConfig, EngineDeadError, local_group
from engine.local_group import LocalGroup

HANG_SECONDS = 300.0


def fail_or_hang(rank: int) -> None:
    """Rank 0 waits for rank 1, which fails."""
    if rank == 1:
        raise RuntimeError("no more")
    time.sleep(HANG_SECONDS)


def test_a_failed_rank_ends_those_that_wait_for_it(
    engine_config: Callable[..., EngineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_group, "CLOSE_SECONDS", HANG_SECONDS)
    config = replace(engine_config(), tensor_parallel=2)
    began = time.monotonic()
    with pytest.raises(EngineDeadError, match="Rank 1 failed: RuntimeError: no more"), LocalGroup(config, fail_or_hang):
        pass
    assert time.monotonic() - began < HANG_SECONDS / 4
    assert not {process.name for process in multiprocessing.active_children()} & {"rank 0", "rank 1"}

"""Ranks as processes of their own, for tests of what several do together."""

from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import spawn

from engine.local_group import leave_process


def run_ranks(function: Callable[..., None], size: int, *args: Any) -> None:
    """`function(rank, size, *args)` on every rank; raises what the first that failed raised."""
    spawn(_run, args=(function, size, args), nprocs=size)  # type: ignore[no-untyped-call]


def _run(rank: int, function: Callable[..., None], size: int, args: tuple[Any, ...]) -> None:
    function(rank, size, *args)
    leave_process()

"""Ranks as processes of their own, for tests of what several do together."""

import os
import sys
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import spawn


def run_ranks(function: Callable[..., None], size: int, *args: Any) -> None:
    """`function(rank, size, *args)` on every rank; raises what the first that failed raised."""
    spawn(_run, args=(function, size, args), nprocs=size)  # type: ignore[no-untyped-call]


def _run(rank: int, function: Callable[..., None], size: int, args: tuple[Any, ...]) -> None:
    function(rank, size, *args)
    # No finalization of the interpreter: a thread of gloo that is only now letting go of the tensors of the last
    # collective would ask a dead interpreter for its lock, which aborts the process.
    sys.stdout.flush()
    os._exit(0)

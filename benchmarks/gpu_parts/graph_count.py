"""`GraphCount`: how many CUDA graphs a process made, and how often they were replayed: whoever made them, for whatever.

What a step was meant to be and what it became are two things; this sees the latter. A graph is counted where it is
recorded, which all kinds of `Captures` do alike. Those that operations are timed by at a start are among them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.pipeline.capture import CapturedRun, Captures


@dataclass(slots=True)
class GraphCount:
    """Since the counting began."""

    num_captured: int = 0
    num_replayed: int = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Of all `Captures` of this process, while it lasts."""
        record, replay = Captures.record, CapturedRun.replay

        def counted_record(captures: Captures, run: Callable[[], Any]) -> Any:
            recorded = record(captures, run)
            self.num_captured += 1
            return recorded

        def counted_replay(run: CapturedRun[Any]) -> Any:
            self.num_replayed += 1
            return replay(run)

        Captures.record = counted_record  # type: ignore[method-assign, assignment]
        CapturedRun.replay = counted_replay  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Captures.record, CapturedRun.replay = record, replay  # type: ignore[method-assign]

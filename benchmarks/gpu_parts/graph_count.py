"""`GraphCount`: how many CUDA graphs a process made, and how often they were replayed: whoever made them, for whatever.

What a step was meant to be and what it became are two things; this sees the latter.
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
        capture, replay = Captures.capture, CapturedRun.replay

        def counted_capture(captures: Captures, run: Callable[[], Any]) -> Any:
            captured = capture(captures, run)
            self.num_captured += 1
            return captured

        def counted_replay(run: CapturedRun[Any]) -> Any:
            self.num_replayed += 1
            return replay(run)

        Captures.capture = counted_capture  # type: ignore[method-assign, assignment]
        CapturedRun.replay = counted_replay  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Captures.capture, CapturedRun.replay = capture, replay  # type: ignore[method-assign]

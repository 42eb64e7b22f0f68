"""`StepRecorder`: has the next step of a worker group recorded, when somebody asks; until then it costs nothing.

Everybody who asks while a step is awaited is given the same one.
"""

import asyncio

from engine import RecordedStep

_WAIT_AFTER_BEGIN_SECONDS = 10.0  # a step that has begun ends; only ranks that die keep somebody waiting


class StepRecorder:
    """Of a group of `num_ranks`; used from the event loop that runs its steps."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._next: asyncio.Future[tuple[RecordedStep, ...]] | None = None
        self._step: int | None = None
        self._ranks: list[RecordedStep] = []

    async def record(self, seconds: float) -> tuple[RecordedStep, ...]:
        """The next step, as each rank saw it, by rank; nothing where none begins within `seconds`."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        awaited = self._next
        await asyncio.wait([awaited], timeout=seconds)
        if not awaited.done() and self._step is not None:
            await asyncio.wait([awaited], timeout=_WAIT_AFTER_BEGIN_SECONDS)
        if not awaited.done():
            self._finish(())
        return awaited.result()

    def begins(self, step: int) -> bool:
        """Whether this step, which is about to be sent, is the one to record."""
        if self._next is None or self._step is not None:
            return False
        self._step = step
        return True

    def take(self, recorded: RecordedStep) -> None:
        """A rank tells what it saw; of a step that nobody waits for any more it is forgotten."""
        if recorded.step != self._step:
            return
        self._ranks.append(recorded)
        if len(self._ranks) == self._num_ranks:
            self._finish(tuple(sorted(self._ranks, key=lambda rank: rank.rank)))

    def _finish(self, ranks: tuple[RecordedStep, ...]) -> None:
        if self._next is not None and not self._next.done():
            self._next.set_result(ranks)
        self._next = self._step = None
        self._ranks = []

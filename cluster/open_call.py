"""`OpenCall`: the outputs of one HTTP call's requests, as they arrive from whichever replicas run them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Protocol

from engine import FinishReason, NanoserveError, Request, RequestId, TokenOutput


class CallWatcher(Protocol):
    """Who wants to know where the requests of one call are."""

    def dispatched(self, request: Request, replica_id: str, num_cached_tokens: int) -> Request:
        """A replica was chosen; the request as it shall go there."""
        ...

    def returned(self, request_id: RequestId) -> None:
        """Nothing more will come for this request."""
        ...


class OpenCall:
    """The outputs of one HTTP call's requests, a list for each time something arrived; ends when all have ended.

    `with_pauses` raises the `RequestError` or `EngineDeadError` that ended a request. Use it as a context manager:
    whatever is still open on leaving is aborted.
    """

    def __init__(
        self,
        abort: Callable[[Iterable[RequestId], FinishReason], None],
        request_ids: Sequence[RequestId],
        watcher: CallWatcher | None = None,
    ) -> None:
        self.watcher = watcher
        self._abort = abort
        self._open = set(request_ids)
        self._error: NanoserveError | None = None
        self._wake = asyncio.Event()
        self.outputs: list[TokenOutput] = []
        self.has_begun = False

    def __enter__(self) -> "OpenCall":
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort(list(self._open))

    async def with_pauses(self, seconds: float) -> AsyncGenerator[list[TokenOutput], None]:
        """What arrives; an empty list at least every `seconds` in which nothing does."""
        loop = asyncio.get_running_loop()
        pause = loop.time() + seconds
        timer = loop.call_at(pause, self.wake)
        try:
            while self._open or self.outputs or self._error is not None:
                if self.outputs:
                    outputs, self.outputs = self.outputs, []
                    pause = loop.time() + seconds
                    yield outputs
                elif self._error is not None:
                    raise self._error
                elif loop.time() >= timer.when():  # re-armed only when it has fired: most calls never see it
                    is_pause = loop.time() >= pause
                    pause = max(pause, loop.time() + seconds) if is_pause else pause
                    timer = loop.call_at(pause, self.wake)
                    if is_pause:
                        yield []
                else:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            timer.cancel()

    def abort(self, request_ids: Iterable[RequestId], reason: FinishReason = FinishReason.ABORT) -> None:
        """End requests of this call now."""
        self._abort(request_ids, reason)

    def begin(self) -> None:
        """Its first tokens are there, and nobody shall wait for those."""
        self.has_begun = True
        self.wake()

    def ended(self, request_id: RequestId) -> None:
        """The dispatcher will say no more about this request."""
        self._open.discard(request_id)
        if self.watcher is not None:
            self.watcher.returned(request_id)
        self.wake()

    def fail(self, error: NanoserveError) -> None:
        """One request cannot go on, and so the call cannot."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """There is something to look at."""
        self._wake.set()

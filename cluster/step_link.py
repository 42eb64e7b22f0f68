"""`StepLink`: an ingress's end of the connection that a replica's `StepDoor` invited it to. For one event loop."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from cluster.replica_report import Answer, Question
from cluster.step_door import (
    Inquiry,
    InquiryAnswer,
    Invitation,
    Submission,
    SubmissionAnswer,
    encode,
    keep_alive,
    read_message,
)
from cluster.step_message import Abort, Hello, RequestProblem, StepMessage
from engine import NanoserveError, Request

CONNECT_SECONDS = 10.0


class StepLink:
    """Outputs come from `messages`, which must be read for answers of `submit` to come too."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._is_closed = False

    @classmethod
    @asynccontextmanager
    async def connected(cls, invitation: Invitation) -> AsyncIterator["StepLink"]:
        """Raises `OSError` or `TimeoutError` where there is nobody to connect to."""
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(invitation.host, invitation.port)
        link = cls(reader, writer)
        try:
            keep_alive(writer)
            writer.write(invitation.key)
            yield link
        finally:
            link._close()

    async def messages(self) -> AsyncGenerator[Hello | StepMessage, None]:
        """What the replica says; raises `ConnectionError` when it is gone."""
        while True:
            message = await read_message(self._reader)
            if not isinstance(message, SubmissionAnswer | InquiryAnswer):
                yield message
            elif (answer := self._answers.pop(message.number, None)) is not None and not answer.done():
                answer.set_result(message)

    async def submit(self, requests: Sequence[Request], aborted: Sequence[Abort]) -> list[RequestProblem | None]:
        """Queue and end requests; raises what the engine raised, or `ConnectionError`."""
        number, answer = self._next()
        self._writer.write(encode(Submission(number, requests, aborted)))
        result: SubmissionAnswer = await answer
        if result.error is not None:
            raise result.error
        return result.problems

    async def ask(self, question: Question) -> Answer:
        """What the replica answers; raises what it raised, or `ConnectionError`."""
        number, answer = self._next()
        self._writer.write(encode(Inquiry(number, question)))
        try:
            result: InquiryAnswer = await answer
        finally:
            self._answers.pop(number, None)  # who waits no longer must not be remembered for ever
        if result.answer is None:
            raise result.error or NanoserveError("The replica gave no answer.")
        return result.answer

    def _next(self) -> "tuple[int, asyncio.Future[Any]]":
        if self._is_closed:
            raise ConnectionResetError("The connection was closed.")
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        return number, answer

    def _close(self) -> None:
        self._is_closed = True
        self._writer.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError("The connection was closed."))

"""`StepDoor`: where a replica's ingresses connect, for outputs and submissions: one TCP connection each.

Ray Serve brings the two together: an ingress asks through its handle and is given an `Invitation` with a key that
works once; who connects without one is sent away before anything else he says is looked at. From then on nothing of
Serve lies between an engine step and the ingress: through a handle, messages cost the two processes 0.9 ms of processor
time more each, and a first token came 3.4 ms later (`docs/http_overhead.md`).
"""

import asyncio
import logging
import pickle
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cluster.engine_host import EngineHost
from cluster.replica_report import Answer, Question
from cluster.step_message import Abort, MetricsTarget, RequestProblem
from engine import NanoserveError, Request

logger = logging.getLogger(__name__)
KEY_BYTES = 32
KEY_SECONDS = 10.0  # from connecting to having said the key
INVITATION_SECONDS = 30.0  # from being invited to having said it
_UNREAD_BYTES = 1 << 16  # an ingress that leaves more than this unread gets the next steps in one message
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where to connect, and what to say first."""

    host: str
    port: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Submission:
    """Requests to queue and others to end; `number` is what the answer refers to."""

    number: int
    requests: Sequence[Request]
    aborted: Sequence[Abort]


@dataclass(frozen=True, slots=True)
class SubmissionAnswer:
    """Per request None or what is wrong with it; or the `error` for which none was taken."""

    number: int
    problems: list[RequestProblem | None]
    error: NanoserveError | None = None


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A question to the replica; `number` is what the answer refers to, one of the same row as submissions'."""

    number: int
    question: Question


@dataclass(frozen=True, slots=True)
class InquiryAnswer:
    """What the replica says, or the `error` for which it could not."""

    number: int
    answer: Answer | None = None
    error: NanoserveError | None = None


def encode(message: object) -> bytes:
    """One message as it travels."""
    payload = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(payload)) + payload


async def read_message(reader: asyncio.StreamReader) -> Any:
    """The next message; raises `ConnectionResetError` at the end. Only from a peer that has shown or given a key."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return pickle.loads(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("The connection was closed.") from None


def keep_alive(connection: asyncio.StreamWriter) -> None:
    """Have the kernel notice within half a minute that the other machine is gone; a busy process is not.

    Where data is on its way no probes are sent: the user timeout, in milliseconds, counts then.
    """
    peer: socket.socket = connection.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class StepDoor:
    """Listens for the ingresses of one `EngineHost`. Create it with `open`, on the engine's event loop."""

    def __init__(self, engine: EngineHost, host: str, server: asyncio.Server) -> None:
        self._engine = engine
        self._host = host
        self._server = server
        self._guests: dict[bytes, _Guest] = {}

    @classmethod
    async def open(cls, engine: EngineHost, host: str) -> "StepDoor":
        """Listen on a free port of `host`."""

        async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await door._welcome(reader, writer)

        server = await asyncio.start_server(welcome, host, 0)
        door = cls(engine, host, server)
        return door

    @asynccontextmanager
    async def invited(self, ingress_id: str, metrics: MetricsTarget) -> AsyncIterator["_Guest"]:
        """An ingress that may connect, once, while the block runs; its connection ends with the block."""
        port: int = self._server.sockets[0].getsockname()[1]
        guest = _Guest(Invitation(self._host, port, secrets.token_bytes(KEY_BYTES)), ingress_id, metrics)
        self._guests[guest.invitation.key] = guest
        deadline = asyncio.get_running_loop().call_later(INVITATION_SECONDS, guest.expire)
        try:
            yield guest
        finally:
            deadline.cancel()
            self._guests.pop(guest.invitation.key, None)
            guest.leave()

    def close(self) -> None:
        """Listen no more; connections end with their engine."""
        self._server.close()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            guest = await self._identify(reader)
            if guest is not None:
                keep_alive(writer)
                writer.transport.set_write_buffer_limits(high=_UNREAD_BYTES)
                await guest.serve(self._engine, reader, writer)
        except (OSError, NanoserveError) as error:
            logger.info("The connection of an ingress ended: %s", error)
        finally:
            writer.close()

    async def _identify(self, reader: asyncio.StreamReader) -> "_Guest | None":
        with suppress(TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(KEY_SECONDS):
                return self._guests.pop(await reader.readexactly(KEY_BYTES), None)
        return None


class _Guest:
    """One ingress and its connection; `gone` is set when that has ended."""

    def __init__(self, invitation: Invitation, ingress_id: str, metrics: MetricsTarget) -> None:
        self.invitation = invitation
        self.gone = asyncio.Event()
        self._ingress_id = ingress_id
        self._metrics = metrics
        self._serving: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()

    def expire(self) -> None:
        """Nobody is waited for any longer; who has come stays."""
        if self._serving is None:
            self.gone.set()

    def leave(self) -> None:
        if self._serving is not None:
            self._serving.cancel()

    async def serve(self, engine: EngineHost, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk until either side ends."""
        listening = asyncio.create_task(self._listen(engine, reader, writer), name=f"requests of {self._ingress_id}")
        self._serving = asyncio.create_task(self._tell(engine, writer), name=f"outputs for {self._ingress_id}")
        both = (listening, self._serving)
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*both, *self._answering):
                task.cancel()
            ended = await asyncio.gather(*both, return_exceptions=True)
            self.gone.set()
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    async def _tell(self, engine: EngineHost, writer: asyncio.StreamWriter) -> None:
        async with aclosing(engine.outputs(self._ingress_id, self._metrics)) as messages:
            async for message in messages:
                writer.write(encode(message))
                await writer.drain()

    async def _listen(self, engine: EngineHost, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            submission: Submission | Inquiry = await read_message(reader)
            if isinstance(submission, Inquiry):  # an answer may take its time; requests do not wait for it
                task = asyncio.create_task(self._answer(engine, submission, writer), name="answer to an inquiry")
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
                continue
            try:
                problems = engine.submit(self._ingress_id, submission.requests, submission.aborted)
                answer = SubmissionAnswer(submission.number, problems)
            except NanoserveError as error:
                answer = SubmissionAnswer(submission.number, [], error)
            except Exception as error:  # none of these requests, but all others of this ingress go on
                logger.exception("Requests could not be taken")
                answer = SubmissionAnswer(submission.number, [], NanoserveError(f"Not taken: {error!r}"))
            writer.write(encode(answer))

    async def _answer(self, engine: EngineHost, inquiry: Inquiry, writer: asyncio.StreamWriter) -> None:
        try:
            answer = InquiryAnswer(inquiry.number, await engine.answer(inquiry.question))
        except NanoserveError as error:
            answer = InquiryAnswer(inquiry.number, error=error)
        except Exception as error:  # somebody's curiosity must not end anybody's stream
            logger.exception("An inquiry could not be answered")
            answer = InquiryAnswer(inquiry.number, error=NanoserveError(f"Not answered: {error!r}"))
        writer.write(encode(answer))

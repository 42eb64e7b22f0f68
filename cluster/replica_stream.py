"""`ReplicaStream`: an ingress's side of one replica: one long stream down, batched submissions up.

Requests and aborts that appear while a submission is on its way leave together with the next one, so that a burst of
requests costs a few calls and not one each. Knows how to talk to a replica; not which replica to choose.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from cluster.replica_report import Answer, Question
from cluster.step_message import Abort, Hello, MetricsTarget, RequestProblem, StepMessage, unpack_problem
from engine import EngineDeadError, FinishReason, Request, RequestError, RequestId

logger = logging.getLogger(__name__)
RETRY_SECONDS = 0.5


class ReplicaTransport(Protocol):
    """Calls to one replica; `cluster.replica.ServeTransport` makes them over a connection that Ray Serve arranges."""

    def outputs(self, ingress_id: str, metrics: MetricsTarget) -> AsyncGenerator[Hello | StepMessage, None]:
        """The replica's stream; raises whatever went wrong."""
        ...

    async def submit(
        self, ingress_id: str, requests: list[Request], aborted: list[Abort]
    ) -> list[RequestProblem | None]:
        """Queue and end requests; raises whatever went wrong."""
        ...

    async def ask(self, question: Question) -> Answer:
        """What the replica knows; raises whatever went wrong."""
        ...


class StreamListener(Protocol):
    """Who is told what a replica says."""

    def on_hello(self, hello: Hello) -> None: ...

    def on_message(self, replica_id: str, message: StepMessage) -> None: ...

    def on_rejected(self, request_id: RequestId, error: RequestError) -> None: ...

    def on_lost(self, replica_id: str, error: EngineDeadError) -> None:
        """Everything open at this replica is over; it may say hello again."""
        ...


class ReplicaStream:
    """Keeps a stream open for as long as the replica exists. Create it on the event loop."""

    def __init__(
        self,
        replica_id: str,
        transport: ReplicaTransport,
        listener: StreamListener,
        ingress_id: str,
        metrics: MetricsTarget,
    ) -> None:
        self.replica_id = replica_id
        self._transport = transport
        self._listener = listener
        self._ingress_id = ingress_id
        self._metrics = metrics
        self._requests: list[Request] = []
        self._aborted: list[Abort] = []
        self._has_work = asyncio.Event()
        self._reader = self._start_reader(0)
        self._sender = asyncio.create_task(self._send(), name=f"submissions to {replica_id}")

    def submit(self, request: Request) -> None:
        """Send a request with the next submission."""
        self._requests.append(request)
        self._has_work.set()

    def abort(self, request_id: RequestId, reason: FinishReason) -> None:
        """End a request with the next submission; one that was not sent yet never is."""
        waiting = [request for request in self._requests if request.request_id != request_id]
        if len(waiting) < len(self._requests):
            self._requests = waiting
            return
        self._aborted.append((request_id, reason))
        self._has_work.set()

    async def ask(self, question: Question) -> Answer:
        """What the replica knows; raises whatever went wrong."""
        return await self._transport.ask(question)

    async def close(self) -> None:
        """Stop reading; the replica then aborts what is open."""
        self._reader.cancel()
        self._sender.cancel()
        await asyncio.gather(self._reader, self._sender, return_exceptions=True)

    def _start_reader(self, delay: float) -> asyncio.Task[None]:
        return asyncio.create_task(self._read(delay), name=f"outputs of {self.replica_id}")

    async def _read(self, delay: float) -> None:
        while True:
            await asyncio.sleep(delay)
            delay = RETRY_SECONDS
            try:
                await self._read_once()
            except Exception as error:
                self._lose(EngineDeadError(f"Replica {self.replica_id} was lost: {describe(error)}"))

    async def _read_once(self) -> None:
        async with contextlib.aclosing(self._transport.outputs(self._ingress_id, self._metrics)) as messages:
            async for message in messages:
                if isinstance(message, Hello):
                    self._listener.on_hello(message)
                    continue
                self._listener.on_message(self.replica_id, message)
                if message.death is not None:
                    self._lose(EngineDeadError(message.death))
                    return
        self._lose(EngineDeadError(f"Replica {self.replica_id} closed its stream."))

    async def _send(self) -> None:
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            requests, self._requests = self._requests, []
            aborted, self._aborted = self._aborted, []
            try:
                problems = await self._transport.submit(self._ingress_id, requests, aborted)
            except Exception as error:
                # The stream may still look alive; a new one begins with a hello, which makes the replica usable again.
                self._reader.cancel()
                self._lose(EngineDeadError(f"Replica {self.replica_id} took no requests: {describe(error)}"))
                self._reader = self._start_reader(RETRY_SECONDS)
                continue
            for request, problem in zip(requests, problems, strict=True):
                if problem is not None:
                    self._listener.on_rejected(request.request_id, unpack_problem(problem))

    def _lose(self, error: EngineDeadError) -> None:
        logger.warning("%s", error)
        self._requests.clear()
        self._aborted.clear()
        self._listener.on_lost(self.replica_id, error)


def describe(error: BaseException) -> str:
    """The last line of an error that Ray has wrapped in a traceback."""
    lines: list[Any] = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__

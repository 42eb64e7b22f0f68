"""The connection between an ingress and a replica: over real sockets, with a simulated engine behind it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest

from cluster import step_door
from cluster.dispatcher import Dispatcher
from cluster.replica_report import Answer, Question, ReplicaReport
from cluster.routing_policy import RoutingPolicy
from cluster.step_door import KEY_BYTES, Invitation, StepDoor
from cluster.step_link import StepLink
from cluster.step_message import Abort, Hello, MetricsTarget, RequestProblem, StepMessage, unpack
from engine import EngineDeadError, FinishReason, NanoserveError, Request, RequestId, SamplingParams
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config
from tests.cluster.local_replicas import LocalReplica, engine_config

INGRESS = MetricsTarget("ingress", "i1", "127.0.0.1:2")
CONFIG = engine_config(sized_config(Architecture.LLAMA))


def request(name: str, max_tokens: int = 5, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=RequestId(name), prompt_token_ids=prompt, sampling=sampling)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        await asyncio.sleep(0.005)


@pytest.fixture
async def replica() -> AsyncIterator[LocalReplica]:
    replica = LocalReplica("a", CONFIG, step_seconds=lambda batch: 0.002)
    await replica.start()
    yield replica
    await replica.host.close()


@pytest.fixture
async def door(replica: LocalReplica) -> AsyncIterator[StepDoor]:
    door = await StepDoor.open(replica.host, "127.0.0.1")
    yield door
    door.close()


async def next_hello(link: StepLink, messages: AsyncGenerator[Hello | StepMessage, None]) -> Hello:
    hello = await anext(messages)
    assert isinstance(hello, Hello)
    return hello


async def test_outputs_and_answers_share_a_connection(door: StepDoor) -> None:
    async with door.invited("i1", INGRESS) as guest, StepLink.connected(guest.invitation) as link:
        messages = link.messages()
        assert (await next_hello(link, messages)).replica_id == "a"
        requests = [request("good"), request("endless", 10_000), request("also good", 3)]
        answer = asyncio.create_task(link.submit(requests, []))
        tokens: dict[str, int] = {}
        while tokens != {"good": 5, "also good": 3}:
            message = await anext(messages)
            assert isinstance(message, StepMessage)
            for output in unpack(message.outputs):
                assert output.position == tokens.get(output.request_id, 0), "tokens come in order"
                tokens[output.request_id] = output.position + len(output.token_ids)
        problems = await answer
        assert [problem is None for problem in problems] == [True, False, True]
        assert problems[1] is not None
        assert "maximum context length" in problems[1][0]
        await messages.aclose()


async def test_a_link_that_closes_ends_its_requests(door: StepDoor, replica: LocalReplica) -> None:
    async with door.invited("i1", INGRESS) as guest:
        async with StepLink.connected(guest.invitation) as link:
            messages = link.messages()
            await next_hello(link, messages)
            waiting = asyncio.create_task(link.submit([request("long", 400)], []))
            await until(lambda: replica.num_open == 1)
        await asyncio.wait_for(guest.gone.wait(), 60)
        assert replica.num_open == 0
        with pytest.raises(ConnectionError):
            await waiting
        with pytest.raises(ConnectionError):
            await link.submit([request("later")], [])


async def test_the_end_of_an_invitation_ends_its_connection(door: StepDoor, replica: LocalReplica) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with door.invited("i1", INGRESS) as guest:
            link = await stack.enter_async_context(StepLink.connected(guest.invitation))
            messages = link.messages()
            await next_hello(link, messages)
        with pytest.raises(ConnectionError):
            while True:
                await asyncio.wait_for(anext(messages), 60)
        await until(lambda: guest.gone.is_set())


async def test_a_key_is_needed_and_works_once(door: StepDoor, replica: LocalReplica) -> None:
    async with door.invited("i1", INGRESS) as guest:
        invitation = guest.invitation
        assert len(invitation.key) == KEY_BYTES
        for key in (bytes(KEY_BYTES), b"GET / HTTP/1.1\r\nHost: a-host-name\r\n\r\n"):
            forged = Invitation(invitation.host, invitation.port, key)
            async with StepLink.connected(forged) as link:
                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(anext(link.messages()), 5)
        async with StepLink.connected(invitation) as link:
            await next_hello(link, link.messages())
            async with StepLink.connected(invitation) as second:
                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(anext(second.messages()), 5)
    assert replica.num_open == 0


async def test_what_the_engine_raises_is_raised_at_the_other_end(door: StepDoor, replica: LocalReplica) -> None:
    async with door.invited("i1", INGRESS) as guest, StepLink.connected(guest.invitation) as link:
        messages = link.messages()
        await next_hello(link, messages)
        newer = replica.host.outputs("i1", INGRESS)  # takes the place of the connection's stream
        await anext(newer)
        await newer.aclose()
        answer = asyncio.create_task(link.submit([request("r")], []))
        with pytest.raises((EngineDeadError, ConnectionError)):
            while not answer.done():
                await anext(messages)
            await answer
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)


class DoorTransport:
    """A `ReplicaTransport` like Serve's, with the invitation handed over directly."""

    def __init__(self, door: StepDoor) -> None:
        self._door = door
        self.link: StepLink | None = None

    async def outputs(self, ingress_id: str, metrics: MetricsTarget) -> AsyncGenerator[Hello | StepMessage, None]:
        async with self._door.invited(ingress_id, metrics) as guest, StepLink.connected(guest.invitation) as link:
            self.link = link
            async with contextlib.aclosing(link.messages()) as messages:
                async for message in messages:
                    yield message

    async def submit(
        self, ingress_id: str, requests: list[Request], aborted: list[Abort]
    ) -> list[RequestProblem | None]:
        assert self.link is not None
        return await self.link.submit(requests, aborted)

    async def ask(self, question: Question) -> Answer:
        assert self.link is not None
        return await self.link.ask(question)


async def test_a_dispatcher_works_through_it(door: StepDoor, replica: LocalReplica) -> None:
    dispatcher = Dispatcher(RoutingPolicy(), lambda replica_id: DoorTransport(door), INGRESS)
    dispatcher.set_replicas(frozenset(["a"]))
    await until(lambda: dispatcher.is_ready)
    with dispatcher.open([request("x", 7)]) as call:
        tokens = [token async for outputs in call.with_pauses(5) for output in outputs for token in output.token_ids]
    assert len(tokens) == 7
    with dispatcher.open([request("y", 400)]):
        await until(lambda: replica.num_open == 1)
    await until(lambda: replica.num_open == 0)
    stopped = dispatcher.open([request("z", 400)])
    await until(lambda: replica.num_open == 1)
    stopped.abort([RequestId("z")], FinishReason.STOP)
    await until(lambda: replica.num_open == 0)
    await dispatcher.close()


async def test_who_was_invited_and_does_not_come_is_not_waited_for(
    door: StepDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_door, "INVITATION_SECONDS", 0.2)
    async with (
        door.invited("late", INGRESS) as late,
        door.invited("i1", INGRESS) as guest,
        StepLink.connected(guest.invitation) as link,
    ):
        await next_hello(link, link.messages())
        await asyncio.wait_for(late.gone.wait(), 60)
        assert not guest.gone.is_set()


async def test_a_request_that_cannot_even_be_read_ends_no_other(door: StepDoor) -> None:
    async with door.invited("i1", INGRESS) as guest, StepLink.connected(guest.invitation) as link:
        messages = link.messages()
        await next_hello(link, messages)
        reading = asyncio.create_task(collect(messages))
        with pytest.raises(NanoserveError, match="Not taken: TypeError"):
            await link.submit([request("odd", prompt=(1.5, 2))], [])  # type: ignore[arg-type]
        assert await link.submit([request("good")], []) == [None]
        reading.cancel()


async def collect(messages: AsyncGenerator[Hello | StepMessage, None]) -> None:
    async for _ in messages:
        pass


async def test_questions_are_answered_beside_the_stream(door: StepDoor, replica: LocalReplica) -> None:
    async with door.invited("i1", INGRESS) as guest, StepLink.connected(guest.invitation) as link:
        messages = link.messages()
        await next_hello(link, messages)

        async def read() -> None:
            async for _ in messages:
                pass

        reading = asyncio.create_task(read())
        assert await link.submit([request("r", max_tokens=200)], []) == [None]
        report = await link.ask(Question.REPORT)
        assert isinstance(report, ReplicaReport)
        assert report.num_running + report.num_waiting == 1
        assert await link.ask(Question.STEP) == (), "there are no ranks that could record one"
        reports = await asyncio.gather(*(link.ask(Question.REPORT) for _ in range(20)))
        assert len(reports) == 20
        impatient = asyncio.create_task(link.ask(Question.REPORT))
        await asyncio.sleep(0)
        impatient.cancel()
        assert isinstance(await link.ask(Question.REPORT), ReplicaReport)
        assert not link._answers, "who waits no longer is forgotten"
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_a_question_that_fails_ends_no_stream(
    door: StepDoor, replica: LocalReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(question: Question) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(replica.host, "answer", fail)
    async with door.invited("i1", INGRESS) as guest, StepLink.connected(guest.invitation) as link:
        messages = link.messages()
        await next_hello(link, messages)
        asked = asyncio.create_task(link.ask(Question.REPORT))
        while not asked.done():
            await anext(messages)
        with pytest.raises(NanoserveError, match="odd"):
            await asked
        assert isinstance(await anext(messages), StepMessage)

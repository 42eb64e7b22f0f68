"""What a replica promises its ingresses, and an ingress's calls: streams, batching, rejections, deaths, drains."""

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Callable

import pytest

from cluster.dispatcher import Dispatcher, NoReplicaError, ReplicaEvent
from cluster.open_call import OpenCall
from cluster.replica_stream import RETRY_SECONDS
from cluster.routing_policy import RoutingPolicy
from cluster.step_message import Hello, MetricsTarget, StepMessage, pack, unpack
from engine import (
    Batch,
    EngineDeadError,
    FinishReason,
    Request,
    RequestError,
    RequestId,
    SamplingParams,
    StepOutput,
    TokenLogprob,
    TokenOutput,
)
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config
from tests.cluster.local_replicas import LocalReplica, engine_config

INGRESS = MetricsTarget("ingress", "i1", "127.0.0.1:2")
CONFIG = engine_config(sized_config(Architecture.LLAMA))


def request(name: str, max_tokens: int = 5, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
    )


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        await asyncio.sleep(0.005)


class Replicas:
    """Some replicas and a dispatcher that knows them."""

    def __init__(self, *replicas: LocalReplica) -> None:
        self.by_id = {replica.replica_id: replica for replica in replicas}
        self.policy = RoutingPolicy(prefix_affinity=False)
        self.events: list[ReplicaEvent] = []
        self.gone: list[str] = []
        self.dispatcher = Dispatcher(
            self.policy,
            self.by_id.__getitem__,
            INGRESS,
            on_replica=self.events.append,
            on_gone=self.gone.append,
        )

    async def start(self) -> None:
        for replica in self.by_id.values():
            await replica.start()
        self.dispatcher.set_replicas(frozenset(self.by_id))
        await until(lambda: len(self.policy.replica_ids) == len(self.by_id))

    async def close(self) -> None:
        await self.dispatcher.close()
        for replica in self.by_id.values():
            await replica.host.close()

    @property
    def is_idle(self) -> bool:
        loads = set(self.policy.loads().values())
        return not self.dispatcher.num_open and loads <= {(0, 0)} and not any(r.num_open for r in self.by_id.values())


@pytest.fixture
async def one() -> AsyncIterator[Replicas]:
    replicas = Replicas(LocalReplica("a", CONFIG))
    await replicas.start()
    yield replicas
    await replicas.close()


@pytest.fixture
async def two() -> AsyncIterator[Replicas]:
    replicas = Replicas(LocalReplica("a", CONFIG), LocalReplica("b", CONFIG))
    await replicas.start()
    yield replicas
    await replicas.close()


async def read(call: OpenCall) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    with call:
        async for outputs in call.with_pauses(5):
            for output in outputs:
                assert output.position == len(tokens.setdefault(output.request_id, []))
                tokens[output.request_id] += output.token_ids
    return tokens


async def test_every_call_gets_its_own_tokens(two: Replicas) -> None:
    calls = [two.dispatcher.open([request(f"{i}.0"), request(f"{i}.1", 3)]) for i in range(50)]
    for index, tokens in enumerate(await asyncio.gather(*map(read, calls))):
        assert {name: len(ids) for name, ids in tokens.items()} == {f"{index}.0": 5, f"{index}.1": 3}
    await until(lambda: two.is_idle)
    assert all(len(replica.executor.batches) > 5 for replica in two.by_id.values()), "both took part"


async def test_a_burst_leaves_in_few_submissions(one: Replicas) -> None:
    await asyncio.gather(*[read(one.dispatcher.open([request(str(i))])) for i in range(100)])
    assert one.by_id["a"].num_submissions <= 5


async def test_all_outputs_of_a_step_are_one_message() -> None:
    replica = LocalReplica("a", CONFIG)
    await replica.start()
    stream = replica.host.outputs("i1", INGRESS)
    hello = await anext(stream)
    assert isinstance(hello, Hello)
    assert (hello.replica_id, hello.capacity_tokens) == ("a", 64 * hello.block_size)
    assert replica.host.submit("i1", [request(str(i)) for i in range(8)]) == [None] * 8
    message = await anext(stream)
    assert isinstance(message, StepMessage)
    assert len(unpack(message.outputs)) == 8
    assert message.load.num_running == 8
    assert message.ingresses == (INGRESS,), "told once, and again when they change"
    await until(lambda: not replica.num_open)  # a slow ingress gets the remaining steps together
    message = await anext(stream)
    assert isinstance(message, StepMessage)
    assert len(unpack(message.outputs)) == 8 * 4
    assert message.load.num_free_tokens == 64 * hello.block_size
    heartbeat = await anext(stream)
    assert isinstance(heartbeat, StepMessage)
    assert (heartbeat.outputs, heartbeat.ingresses) == ((), None)
    await stream.aclose()
    await replica.host.close()


async def test_a_bad_request_fails_alone_and_keeps_its_field(one: Replicas) -> None:
    good = one.dispatcher.open([request("good")])
    bad = one.dispatcher.open([request("bad", max_tokens=600)])
    with pytest.raises(RequestError) as raised:
        await read(bad)
    assert (raised.value.parameter, raised.value.code) == ("prompt", "context_length_exceeded")
    assert len((await read(good))["good"]) == 5
    assert one.is_idle


async def test_leaving_a_call_aborts_it_in_the_engine(one: Replicas) -> None:
    call = one.dispatcher.open([request("long", 400)])
    with call:
        async for _ in call.with_pauses(5):
            break
    await until(lambda: one.is_idle)
    assert one.by_id["a"].engine.stats().num_finished == {"abort": 1}
    assert one.by_id["a"].engine.stats().num_used_blocks == 0


async def test_a_request_aborted_before_it_was_sent_never_is(one: Replicas) -> None:
    with one.dispatcher.open([request("early")]):
        pass
    await asyncio.sleep(0.05)
    assert one.is_idle
    assert one.by_id["a"].engine.stats().num_finished == {}


async def test_a_stream_that_ends_takes_its_requests_with_it() -> None:
    replica = LocalReplica("a", CONFIG)
    await replica.start()
    stream = replica.host.outputs("i1", INGRESS)
    await anext(stream)
    replica.host.submit("i1", [request("r", 400)])
    await anext(stream)
    await stream.aclose()
    assert replica.num_open == 0
    with pytest.raises(EngineDeadError, match="has no open stream"):
        replica.host.submit("i1", [request("later")])
    await replica.host.close()


async def test_a_lost_replica_ends_its_requests_and_only_those(two: Replicas) -> None:
    calls = {name: two.dispatcher.open([request(name, 300)]) for name in ("r0", "r1")}
    lost, other = (two.dispatcher._open[RequestId(name)].replica_id for name in ("r0", "r1"))
    await until(lambda: all(replica.num_open for replica in two.by_id.values()))
    two.by_id[lost].fail_with = ConnectionResetError("gone")
    results = await asyncio.gather(*[read(call) for call in calls.values()], return_exceptions=True)
    assert isinstance(results[0], EngineDeadError)
    assert f"Replica {lost} was lost: gone" in str(results[0])
    assert isinstance(results[1], dict)
    assert two.policy.replica_ids == [other]
    two.by_id[lost].fail_with = None
    await until(lambda: len(two.policy.replica_ids) == 2)  # it says hello again
    await until(lambda: two.is_idle)


async def test_without_replicas_nothing_waits(one: Replicas) -> None:
    one.by_id["a"].fail_with = ConnectionResetError("gone")
    await until(lambda: not one.dispatcher.is_ready)
    with pytest.raises(NoReplicaError):
        one.dispatcher.open([request("r")])


async def test_a_failed_submission_ends_its_requests_and_reconnects(one: Replicas) -> None:
    replica = one.by_id["a"]
    submit, replica.submit = replica.submit, _refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(EngineDeadError, match="took no requests: not today"):
        await read(one.dispatcher.open([request("r")]))
    replica.submit = submit  # type: ignore[method-assign]
    await until(lambda: one.dispatcher.is_ready)
    assert len((await read(one.dispatcher.open([request("again")])))["again"]) == 5


async def _refuse(*arguments: object) -> None:
    raise ConnectionRefusedError("not today")


async def test_a_replica_that_leaves_finishes_what_it_has(two: Replicas) -> None:
    calls = [two.dispatcher.open([request(name, 200)]) for name in ("r0", "r1")]
    await until(lambda: all(replica.num_open for replica in two.by_id.values()))
    two.dispatcher.set_replicas(frozenset({"b"}))
    late = two.dispatcher.open([request("late")])
    assert [sum(map(len, (await read(call)).values())) for call in [*calls, late]] == [200, 200, 5]
    assert len(two.by_id["a"].host._streams) == 0 or not two.by_id["a"].num_open
    await until(lambda: not two.by_id["a"].host._streams)


async def test_a_client_that_leaves_is_told_to_a_replica_that_is_leaving(two: Replicas) -> None:
    names = [RequestId(f"r{number}") for number in range(4)]
    for name in names:
        two.dispatcher.open([request(name, 400)])
    leaving = two.by_id["a"]
    await until(lambda: leaving.num_open == 2)
    two.dispatcher.set_replicas(frozenset({"b"}))
    first, second = [name for name in names if two.dispatcher._open[name].replica_id == "a"]
    two.dispatcher.abort([first])
    await until(lambda: leaving.num_open == 1)
    assert second in two.dispatcher._open, "the other goes on"
    two.dispatcher.abort([second])
    await until(lambda: not leaving.num_open and not leaving.host._streams)
    two.dispatcher.abort(names)


async def test_a_dead_engine_says_so_to_everybody() -> None:
    class Dying:
        def start(self) -> object:
            return LocalReplica("x", CONFIG).capacity

        async def execute(self, batch: Batch) -> StepOutput:
            raise EngineDeadError("Rank 1 died: killed.")

        def close(self) -> None: ...

    replica = LocalReplica("a", CONFIG)
    replica.engine._executor = Dying()  # type: ignore[assignment]
    replicas = Replicas(replica)
    await replicas.start()
    call = replicas.dispatcher.open([request("r")])
    with pytest.raises(EngineDeadError, match="Rank 1 died: killed"):
        await read(call)
    with pytest.raises(EngineDeadError, match="Rank 1 died"):
        replica.host.check()
    with pytest.raises(EngineDeadError, match="Rank 1 died"):
        await anext(replica.host.outputs("i2", INGRESS))
    await asyncio.sleep(RETRY_SECONDS + 0.2)
    assert not replicas.dispatcher.is_ready, "a dead engine says no hello, however often it is asked"
    await replicas.close()


async def test_metrics_targets_name_every_process(two: Replicas) -> None:
    other = two.by_id["a"].host.outputs("i2", MetricsTarget("ingress", "i2", "127.0.0.1:3"))
    await anext(other)
    await until(lambda: len(two.dispatcher.metrics_targets) == 4)
    assert [target.process_id for target in two.dispatcher.metrics_targets] == ["i1", "i2", "a", "b"]
    with two.dispatcher.open([request("r0", 400)]), two.dispatcher.open([request("r1", 400)]):
        await until(lambda: all(replica.num_open for replica in two.by_id.values()))
        two.dispatcher.set_replicas(frozenset({"b"}))
        await other.aclose()  # of this "a" tells while it drains
        await until(lambda: len(two.dispatcher.metrics_targets) == 2)
        await until(lambda: not two.by_id["a"].num_open)
    assert [target.process_id for target in two.dispatcher.metrics_targets] == ["i1", "b"], "nothing that left is kept"


async def test_pauses_are_told(one: Replicas) -> None:
    one.by_id["a"].executor._step_seconds = lambda batch: 0.5
    call = one.dispatcher.open([request("slow", 2)])
    arrivals = [len(outputs) async for outputs in call.with_pauses(0.05)]
    assert arrivals.count(1) == 2
    assert arrivals.count(0) >= 4


def test_outputs_survive_the_wire() -> None:
    output = TokenOutput(
        request_id=RequestId("r"),
        token_ids=(1, 2),
        position=3,
        finish_reason=FinishReason.STOP,
        logprobs=(TokenLogprob(logprob=-0.5, top=((1, -0.5),)),),
        num_cached_tokens=16,
    )
    other = output._replace(request_id=RequestId("s"), finish_reason=None, logprobs=None)
    assert unpack(pickle.loads(pickle.dumps(pack([output, other])))) == [output, other]
    assert unpack(pack([])) == []


async def test_replicas_that_come_and_go_are_counted_once_each(two: Replicas) -> None:
    joined, lost, left = ReplicaEvent.JOINED, ReplicaEvent.LOST, ReplicaEvent.LEFT
    assert two.events == [joined, joined]
    two.by_id["a"].fail_with = ConnectionResetError("gone")
    await asyncio.gather(*[read(two.dispatcher.open([request(f"r{i}")])) for i in range(2)], return_exceptions=True)
    await asyncio.sleep(2.5 * RETRY_SECONDS)
    assert two.events[2:] == [lost], "attempts to reach it again are no further losses"
    two.by_id["a"].fail_with = None
    await until(lambda: len(two.policy.replica_ids) == 2)
    assert two.events[3:] == [joined]
    two.dispatcher.set_replicas(frozenset({"b"}))
    assert two.events[4:] == [left]
    two.by_id["b"].fail_with = ConnectionResetError("gone")
    await until(lambda: not two.policy.replica_ids)
    two.dispatcher.set_replicas(frozenset())
    assert two.events[5:] == [lost], "one that was lost does not leave as well"
    assert two.gone == ["a", "b"], "once Serve lists them no more, and not when they were lost"

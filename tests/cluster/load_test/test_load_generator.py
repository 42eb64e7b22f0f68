"""The load generator against a server of known delays: what is sent when, what is measured, nothing lost."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.load_test.latency_report import LatencyReport
from cluster.load_test.load_generator import LoadGenerator
from cluster.load_test.load_prompts import LoadPrompts, TokenPrompts, WordPrompts
from cluster.load_test.load_target import Endpoint, LoadTarget, api_url, find_model
from cluster.load_test.request_outcome import RequestOutcome
from engine import ConfigError, PlannedRequest, SyntheticPrompts, Workload
from engine.workloads.request_trace import read_trace
from tests.cluster.load_test.fake_openai_server import FakeServer, serving


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(FakeServer()) as running:
        yield running


def target(server: FakeServer, **changes: Any) -> LoadTarget:
    return LoadTarget(url=api_url(server.url), model="fake-model", **changes)


def workload(count: int, output: int = 4, prompt: int = 3, gap: float = 0.0) -> Workload:
    requests = tuple(
        PlannedRequest(num_prompt_tokens=prompt, num_output_tokens=output, arrival_seconds=gap * index)
        for index in range(count)
    )
    return Workload(requests=requests, description="test")


TOKENS = TokenPrompts(synthetic=SyntheticPrompts(vocab_size=100))


async def generate(
    server: FakeServer, plan: Workload, prompts: LoadPrompts = TOKENS, concurrency: int | None = None, **changes: Any
) -> list[RequestOutcome]:
    timeout = changes.pop("timeout", 20.0)
    generator = LoadGenerator(target(server, **changes), plan, prompts, concurrency=concurrency, timeout=timeout)
    return await generator.run()


async def test_times_to_first_and_per_token_are_the_servers(server: FakeServer) -> None:
    server.prefill_seconds, server.chunk_seconds = 0.2, 0.03
    outcomes = await generate(server, workload(10, output=11, gap=0.02))
    report = LatencyReport.of(outcomes, num_planned=10)
    assert report.errors == {}
    # Never less; more on a busy machine, but no other of these figures.
    assert 0.2 <= report.ttft.p50 < 0.5
    # A chunk that arrives late makes the next gap shorter than the server made it.
    assert 0.024 <= report.tpot.p50 < 0.15
    assert 0.024 <= report.itl.p50 < 0.15
    assert 0.5 <= report.e2e.p50 < 2.0
    assert report.itl.count <= 10 * 10
    assert (report.num_prompt_tokens, report.num_output_tokens, report.num_cached_tokens) == (30, 110, 10)


async def test_tokens_that_come_together_do_not_shorten_the_time_per_token(server: FakeServer) -> None:
    server.tokens_per_chunk, server.chunk_seconds = 5, 0.1
    outcomes = await generate(server, workload(4, output=21))
    report = LatencyReport.of(outcomes, num_planned=4)
    assert 0.016 <= report.tpot.p50 < 0.08  # 4 gaps of 100 ms over 20 tokens
    assert 0.08 <= report.itl.p50 < 0.4


async def test_open_loop_sends_on_time_whether_or_not_answers_come(server: FakeServer) -> None:
    server.prefill_seconds = 3.0
    outcomes = await generate(server, workload(20, output=1, gap=0.025))
    arrivals = np.array(server.arrivals) - server.arrivals[0]
    assert server.most_open == 20
    assert np.median(np.abs(arrivals - 0.025 * np.arange(20))) < 0.2
    assert [outcome.scheduled_at for outcome in outcomes] == pytest.approx(0.025 * np.arange(20))
    assert all(outcome.lag >= 0 for outcome in outcomes)
    assert np.median([outcome.lag for outcome in outcomes]) < 0.2


async def test_a_trace_is_replayed_with_its_own_gaps(server: FakeServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    times = [10.0, 10.1, 10.1, 10.8, 11.0]
    trace.write_text(
        "timestamp,request_id,input_tokens,output_tokens\n"
        + "".join(f"{moment},{index},{8 * (index + 1)},8\n" for index, moment in enumerate(times))
    )
    plan = read_trace(trace).with_lengths_divided(8).with_time_stretched(0.5)
    outcomes = await generate(server, plan)
    assert [outcome.scheduled_at for outcome in outcomes] == pytest.approx([0.0, 0.05, 0.05, 0.4, 0.5])
    assert all(outcome.lag >= 0 for outcome in outcomes)
    assert sorted(len(body["prompt"]) for body in server.bodies) == [1, 2, 3, 4, 5]
    gaps = np.array(server.arrivals) - server.arrivals[0]
    assert np.median(np.abs(gaps - [0.0, 0.05, 0.05, 0.4, 0.5])) < 0.2


async def test_closed_loop_keeps_exactly_its_users_busy(server: FakeServer) -> None:
    server.prefill_seconds = 0.05
    outcomes = await generate(server, workload(15, gap=100.0), concurrency=5)
    assert len(outcomes) == 15
    assert server.most_open == 5
    assert all(outcome.lag < 1 for outcome in outcomes)


async def test_what_is_sent_is_the_workload(server: FakeServer) -> None:
    plan = workload(3, output=7, prompt=12)
    await generate(server, plan, api_key="secret", temperature=0.5, extra={"top_p": 0.9, "max_tokens": 6})
    body = min(server.bodies, key=lambda body: str(body["prompt"]))
    assert body == {
        "model": "fake-model",
        "prompt": min((TOKENS.prompt(plan, index) for index in range(3)), key=str),
        "max_tokens": 6,
        "min_tokens": 7,
        "ignore_eos": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert server.headers[0]["authorization"] == "Bearer secret"


async def test_chat_prompts_are_words_of_the_measured_length(server: FakeServer) -> None:
    words = WordPrompts(tokens_per_word=2.0)
    outcomes = await generate(server, workload(2, prompt=40), words, endpoint=Endpoint.CHAT, exact_lengths=False)
    assert [outcome.num_prompt_tokens for outcome in outcomes] == [40, 40]  # this server has two tokens a word
    assert [outcome.num_output_tokens for outcome in outcomes] == [4, 4]
    assert "ignore_eos" not in server.bodies[0]
    assert server.bodies[0]["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("behaviour", "error", "detail"),
    [
        ("refuse", "HTTP 429", "too busy"),
        ("cut", "incomplete", "DONE"),
        ("error", "stream error", "engine_dead"),
        ("hang", "timeout", ""),
        ("reset", "ClientPayloadError", ""),
    ],
)
async def test_every_failure_is_an_outcome_of_its_kind(
    server: FakeServer, behaviour: str, error: str, detail: str
) -> None:
    timeout = 0.5 if behaviour == "hang" else 20.0
    outcomes = await generate(server, workload(3), extra={"behave": behaviour}, timeout=timeout)
    assert [outcome.error for outcome in outcomes] == [error] * 3
    assert detail in outcomes[0].detail


async def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    outcomes = await generate(FakeServer(url="http://127.0.0.1:9"), workload(3))
    assert [outcome.error for outcome in outcomes] == ["connection"] * 3


async def test_a_server_without_usage_is_measured_by_its_chunks(server: FakeServer) -> None:
    server.has_usage = False
    outcomes = await generate(server, workload(2, output=6))
    assert [(outcome.num_output_tokens, outcome.has_usage) for outcome in outcomes] == [(6, False)] * 2


async def test_cancelling_returns_what_there_is(server: FakeServer) -> None:
    requests = [
        PlannedRequest(num_prompt_tokens=1, num_output_tokens=length, arrival_seconds=due)
        for length, due in ((1, 0.0), (10_000, 0.0), (1, 3600.0))
    ]
    server.chunk_seconds = 0.05
    generator = LoadGenerator(
        target(server), Workload(requests=tuple(requests), description="test"), TOKENS, timeout=60
    )
    run = asyncio.create_task(generator.run())
    async with asyncio.timeout(20):
        while len(server.arrivals) < 2 or server.num_open > 1:  # the short one has ended
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    run.cancel()
    outcomes = await run
    assert [outcome.error for outcome in outcomes] == [None, "cancelled"]
    report = LatencyReport.of(outcomes, num_planned=3)
    assert report.errors == {"cancelled": 1, "not sent": 1}


async def test_nothing_is_lost_among_thousands_of_chunks(server: FakeServer) -> None:
    outcomes = await generate(server, workload(50, output=100))
    assert sum(outcome.num_output_tokens for outcome in outcomes) == 5000
    assert all(outcome.is_ok for outcome in outcomes)


async def test_a_load_needs_times_or_users(server: FakeServer) -> None:
    with pytest.raises(ConfigError, match="--request-rate or --concurrency"):
        await generate(server, workload(2).without_arrivals())


async def test_the_model_is_the_first_listed(server: FakeServer) -> None:
    assert await find_model(api_url(server.url), None) == "fake-model"


async def test_nobody_at_the_url_is_an_error_that_says_so() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="No OpenAI-compatible server answers"):
        await find_model("http://127.0.0.1:9/v1", None)
    assert time.monotonic() - started < 30


async def test_a_server_of_something_else_is_an_error_that_says_so(server: FakeServer) -> None:
    with pytest.raises(ConfigError, match="answered 404"):
        await find_model(f"{server.url}/elsewhere", None)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/"]
)
def test_urls_may_be_written_in_several_ways(url: str) -> None:
    assert api_url(url) == "http://127.0.0.1:8000/v1"

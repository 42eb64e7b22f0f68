"""The HTTP side, over a real socket: answers, streams, errors in OpenAI's shape, disconnects, overload, metrics."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from cluster import ingress as ingress_module
from cluster.dispatcher import Dispatcher
from cluster.ingress import Ingress, build_app
from cluster.metrics import IngressMetrics
from cluster.routing_policy import RoutingPolicy
from cluster.served_model import ServedModel
from cluster.step_message import MetricsTarget
from cluster.tokenizer import Tokenizer
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config
from engine.random_tokenizer import write_tokenizer
from tests.cluster.local_replicas import VOCABULARY, LocalReplica, engine_config
from tests.cluster.test_replica import until

MAX_BODY = 100_000
CONFIG = engine_config(sized_config(Architecture.LLAMA))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, VOCABULARY, 512)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer.load(path)


class Served:
    """A running ingress with one replica: room for 20 sequences and 64 blocks of 16 tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.registry = CollectorRegistry()
        metrics = IngressMetrics(self.registry, "m")
        self.replica = LocalReplica("a", CONFIG)
        self.policy = RoutingPolicy()
        target = MetricsTarget("ingress", "i1", "127.0.0.1:2")
        self.dispatcher = Dispatcher(self.policy, lambda _: self.replica, target, metrics.routed)
        model = ServedModel(names=("m", "alias"), tokenizer=tokenizer, max_model_len=512, vocab_size=VOCABULARY)
        self.app = build_app(Ingress({name: model for name in model.names}, self.dispatcher, metrics, MAX_BODY))

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"model": "m"} | labels) or 0.0

    @property
    def is_idle(self) -> bool:
        return not self.dispatcher.num_open and not self.replica.num_open and self.policy.loads() == {"a": (0, 0)}


@pytest.fixture
async def served(tokenizer: Tokenizer) -> AsyncIterator[tuple[Served, httpx.AsyncClient]]:
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    made = Served(tokenizer)
    await made.replica.start()
    made.dispatcher.set_replicas(frozenset({"a"}))
    server = uvicorn.Server(uvicorn.Config(made.app, port=0, log_config=None, lifespan="on"))
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield made, client
    server.should_exit = True
    await running
    await made.dispatcher.close()
    await made.replica.host.close()


Pair = tuple[Served, httpx.AsyncClient]


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True} | changes


async def frames(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_completion_of_token_ids(served: Pair) -> None:
    made, client = served
    response = await client.post("/v1/completions", json=completion())
    assert response.status_code == 200
    assert response.json()["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert made.is_idle


async def test_a_stream_says_the_same_as_a_body(served: Pair) -> None:
    _, client = served
    whole = (await client.post("/v1/completions", json=completion(seed=7))).json()
    parts = await frames(client, "/v1/completions", completion(seed=7, stream_options={"include_usage": True}))
    text = "".join(choice["text"] for part in parts for choice in part["choices"])
    assert text == whole["choices"][0]["text"]
    assert parts[-1]["usage"]["completion_tokens"] == 5
    chat = {"model": "alias", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert (await frames(client, "/v1/chat/completions", chat))[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_models(served: Pair) -> None:
    _, client = served
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["m", "alias"]
    assert (await client.get("/v1/models/alias")).json()["root"] == "m"


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, "unknown_url"),
        ("GET", "/v1/models/other", b"", 404, "model_not_found"),
        ("POST", "/v1/completions", b'{"model":"other","prompt":"x"}', 404, "model_not_found"),
        ("DELETE", "/v1/completions", b"", 405, "method_not_allowed"),
        ("POST", "/v1/completions", b"{", 400, "invalid_value"),
        ("POST", "/v1/chat/completions", b"[]", 400, None),
        ("POST", "/v1/completions", b'{"model":"m","prompt":"x","max_tokens":-1}', 400, None),
        ("POST", "/v1/completions", b'{"model":"m","prompt":[1,512]}', 400, None),
        ("POST", "/v1/completions", b" " * (MAX_BODY + 1), 413, "request_too_large"),
    ],
)
async def test_errors_have_one_shape(
    served: Pair, method: str, path: str, content: bytes, status: int, code: str | None
) -> None:
    made, client = served
    response = await client.request(method, path, content=content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code
    assert made.is_idle


async def test_a_body_of_ten_megabytes_is_refused_politely(served: Pair) -> None:
    _, client = served
    response = await client.post("/v1/completions", json=completion(prompt="x" * 10_500_000))
    assert response.status_code == 413
    assert (await client.post("/v1/completions", json=completion())).status_code == 200


async def test_a_request_the_engine_refuses_is_a_400_also_when_streamed(served: Pair) -> None:
    made, client = served
    made.replica.engine._limits = replace(made.replica.engine._limits, cache_tokens=32)
    for stream in (False, True):
        response = await client.post("/v1/completions", json=completion(max_tokens=100, stream=stream))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert made.is_idle


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_request_at_once(served: Pair, stream: bool) -> None:
    made, client = served
    made.replica.executor._step_seconds = lambda batch: 0.01
    sending = asyncio.create_task(client.post("/v1/completions", json=completion(max_tokens=500, stream=stream)))
    await until(lambda: made.replica.num_open == 1)
    await until(lambda: made.replica.engine.stats().num_generated_tokens > 1)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await until(lambda: made.is_idle)
    stats = made.replica.engine.stats()
    assert stats.num_finished == {"abort": 1}
    assert stats.num_used_blocks == 0
    assert made.value("nanoserve_generation_tokens_total") == 0
    assert made.value("nanoserve_unanswered_tokens_total", kind="generation") > 0


async def test_three_hundred_calls_against_room_for_twenty_all_finish(served: Pair) -> None:
    made, client = served
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=120, limits=limits) as many:
        calls = [
            many.post("/v1/completions", json=completion(max_tokens=4, prompt=[i % 500, i // 500], stream=i % 2 == 0))
            for i in range(300)
        ]
        responses = await asyncio.gather(*calls)
    assert {response.status_code for response in responses} == {200}
    assert all("[DONE]" in response.text for response in responses[::2])
    assert {response.json()["usage"]["completion_tokens"] for response in responses[1::2]} == {4}
    assert made.is_idle
    assert made.replica.num_submissions < 150


async def test_an_engine_that_dies_is_a_503_or_the_last_frame(served: Pair) -> None:
    made, client = served
    made.replica.executor._step_seconds = lambda batch: 0.01
    whole = asyncio.create_task(client.post("/v1/completions", json=completion(max_tokens=500)))
    async with client.stream("POST", "/v1/completions", json=completion(max_tokens=500, stream=True)) as response:
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("data: {")
        made.replica.fail_with = ConnectionResetError("gone")
        received = [line async for line in lines if line]
    assert json.loads(received[-1].removeprefix("data: "))["error"]["code"] == "service_unavailable"
    assert (await whole).status_code == 503
    assert int((await whole).headers["retry-after"]) >= 1
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200
    assert (await client.post("/v1/completions", json=completion())).status_code == 503
    made.replica.fail_with = None
    await until(lambda: made.dispatcher.is_ready)
    assert (await client.get("/ready")).status_code == 200
    await until(lambda: made.is_idle)


async def test_token_counters_equal_the_usage_that_clients_saw(served: Pair) -> None:
    made, client = served
    prompt = completion(max_tokens=60, seed=3)
    first = (await client.post("/v1/completions", json=prompt)).json()
    stop = first["choices"][0]["text"][20:24]
    bodies = [prompt, prompt | {"stop": [stop]}, prompt | {"n": 3}, prompt | {"prompt": [[1], [2, 3]]}]
    usages = [first["usage"]]
    for body in bodies:
        usages.append((await client.post("/v1/completions", json=body)).json()["usage"])
        streamed = await frames(client, "/v1/completions", body | {"stream_options": {"include_usage": True}})
        usages.append(streamed[-1]["usage"])
    assert usages[3]["completion_tokens"] < 60, "the stop string ended it early"
    assert (await client.post("/v1/completions", json=prompt | {"prompt": [1] * 600})).status_code == 400
    assert made.value("nanoserve_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert made.value("nanoserve_generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    assert made.value("nanoserve_request_success_total", finished_reason="stop") == 2
    assert made.value("nanoserve_request_success_total", finished_reason="length") == 3 + 2 * 3 + 2 * 2
    await until(lambda: made.is_idle)


async def test_a_long_wait_sends_signs_of_life(served: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    made, client = served
    monkeypatch.setattr(ingress_module, "KEEP_ALIVE_SECONDS", 0.05)
    made.replica.executor._step_seconds = lambda batch: 0.5
    async with client.stream("POST", "/v1/completions", json=completion(max_tokens=2, stream=True)) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert lines.count(": keep-alive") >= 3
    assert lines[-1] == "data: [DONE]"


async def test_clients_cannot_invent_metric_labels(served: Pair) -> None:
    made, client = served
    for name in ("a", "b", "c"):
        await client.get(f"/{name}")
        await client.get(f"/v1/models/{name}")
    assert made.value("nanoserve_http_responses_total", route="unknown", status="404") == 3
    assert made.value("nanoserve_http_responses_total", route="/v1/models/{name:path}", status="404") == 3


async def test_metrics_targets_is_service_discovery(served: Pair) -> None:
    _, client = served
    targets = (await client.get("/metrics/targets")).json()
    assert targets[0] == {"targets": ["127.0.0.1:2"], "labels": {"nanoserve_process": "ingress"}}
    assert targets[1]["labels"] == {"nanoserve_process": "replica"}


async def test_calls_are_judged_by_the_objectives(served: Pair) -> None:
    made, client = served

    def judged(objective: str, outcome: str) -> float:
        return made.value("nanoserve_objective_requests_total", objective=objective, outcome=outcome)

    assert (await client.post("/v1/completions", json=completion())).status_code == 200
    assert [judged(name, "met") for name in ("time_to_first_token", "time_per_output_token", "all")] == [1, 1, 1]
    assert (await client.post("/v1/completions", json=completion(max_tokens=-1))).status_code == 400
    made.dispatcher.set_replicas(frozenset())
    assert (await client.post("/v1/completions", json=completion())).status_code == 503
    assert [judged(name, "missed") for name in ("time_to_first_token", "time_per_output_token", "all")] == [1, 0, 1]
    assert judged("all", "met") == 1, "what a client asked wrongly is not judged"


async def test_a_bug_is_a_500_without_its_cause(served: Pair, caplog: pytest.LogCaptureFixture) -> None:
    made, client = served

    def broken(*arguments: object) -> Any:
        return 1 / 0

    made.dispatcher.open = broken  # type: ignore[method-assign,assignment]
    response = await client.post("/v1/completions", json=completion())
    assert response.status_code == 500
    assert "division" not in response.text
    assert "division" in caplog.text


async def test_calls_that_no_replica_takes_have_one_warning_together(
    served: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    made, client = served
    made.dispatcher.set_replicas(frozenset())
    with caplog.at_level(logging.INFO):
        answers = [await client.post("/v1/completions", json=completion()) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {503}
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["Refused 1 call: No replica of the model is ready."]
    assert caplog.text.count("POST /v1/completions 503") == 20, "each has its line as any other"

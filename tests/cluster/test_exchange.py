"""One line of the log and one trace for each HTTP request, of a real server over a simulated engine."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import httpx
import pytest
import uvicorn
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from cluster.config import LogFormat, LogsConfig
from cluster.dispatcher import Dispatcher
from cluster.ingress import Ingress, build_app
from cluster.metrics import IngressMetrics
from cluster.request_trace import RequestTrace
from cluster.routing_policy import RoutingPolicy
from cluster.served_model import ServedModel
from cluster.step_message import MetricsTarget
from cluster.tokenizer import Tokenizer
from cluster.tracing import NO_TRACER
from engine import EngineDeadError
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config
from engine.random_tokenizer import write_tokenizer
from tests.cluster.local_replicas import VOCABULARY, LocalReplica, engine_config

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID, CALLER_SPAN = CALLER.split("-")[1:3]
BODY = {"model": "m", "prompt": "secret words", "max_tokens": 5, "ignore_eos": True}


class Spans:
    """A tracer whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = self._provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def below(self, span: ReadableSpan) -> list[str]:
        """Names of its children, in the order in which they began."""
        children = [
            (child.start_time or 0, child.name)
            for child in self._exporter.get_finished_spans()
            if child.parent is not None and child.parent.span_id == span.context.span_id
        ]
        return [name for _, name in sorted(children)]


class Served:
    """An ingress that answers, with what it traced and logged."""

    def __init__(self, tokenizer: Tokenizer, logs: LogsConfig, tracer: Tracer) -> None:
        config = engine_config(sized_config(Architecture.LLAMA))
        trace = RequestTrace(tracer, "m", "a")
        self.replica = LocalReplica("a", config, on_finished=trace.finished)
        metrics = IngressMetrics(CollectorRegistry(), "m")
        target = MetricsTarget("ingress", "i1", "127.0.0.1:2")
        self.dispatcher = Dispatcher(RoutingPolicy(), lambda _: self.replica, target)
        model = ServedModel(names=("m",), tokenizer=tokenizer, max_model_len=512, vocab_size=VOCABULARY)
        self.app = build_app(Ingress({"m": model}, self.dispatcher, metrics, 10_000, logs=logs, tracer=tracer))
        self.client = httpx.AsyncClient()

    async def start(self, stack: AsyncExitStack) -> None:
        await self.replica.start()
        stack.push_async_callback(self.replica.host.close)
        self.dispatcher.set_replicas(frozenset({"a"}))
        stack.push_async_callback(self.dispatcher.close)
        server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_config=None))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)

        async def stop() -> None:
            await self.client.aclose()
            server.should_exit = True
            await running

        stack.push_async_callback(stop)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, VOCABULARY, 512)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer.load(path)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "cluster.exchange")
    return caplog


def lines(log: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in log.records if record.name == "cluster.exchange"]


async def line(log: pytest.LogCaptureFixture) -> logging.LogRecord:
    """The only one; a server writes it when the client may have read the whole answer already."""
    for _ in range(500):
        if lines(log):
            break
        await asyncio.sleep(0.01)
    (record,) = lines(log)
    return record


async def test_the_spans_of_a_streamed_call(stack: AsyncExitStack, tokenizer: Tokenizer) -> None:
    spans = Spans()
    served = Served(tokenizer, LogsConfig(), spans.tracer)
    await served.start(stack)
    async with served.client.stream(
        "POST", "/v1/completions", json=BODY | {"stream": True, "n": 2}, headers={"traceparent": CALLER}
    ) as response:
        text = (await response.aread()).decode()
    assert text.endswith("data: [DONE]\n\n")
    while not spans.named("POST /v1/completions"):
        await asyncio.sleep(0.01)

    call = spans.one("POST /v1/completions")
    assert call.context is not None and call.parent is not None and call.attributes is not None
    assert format(call.context.trace_id, "032x") == TRACE_ID, "it is the caller's trace"
    assert format(call.parent.span_id, "016x") == CALLER_SPAN
    assert spans.below(call) == ["tokenize", "dispatch", "dispatch"]
    assert call.attributes["http.response.status_code"] == 200
    assert call.attributes["gen_ai.usage.output_tokens"] == 10
    assert call.attributes["nanoserve.replicas"] == ("a",)
    for dispatch in spans.named("dispatch"):
        assert spans.below(dispatch) == ["generate"]
    for generate in spans.named("generate"):
        assert spans.below(generate) == ["queue", "prefill", "decode"]
        assert (generate.attributes or {})["gen_ai.usage.output_tokens"] == 5
        assert (generate.attributes or {})["gen_ai.response.finish_reasons"] == ("length",)
    for phase in ("queue", "prefill", "decode"):
        for span in spans.named(phase):
            assert call.start_time <= span.start_time <= span.end_time <= call.end_time  # type: ignore[operator]
    assert "secret" not in str([dict(span.attributes or {}) for span in spans.named("POST /v1/completions")])


async def test_a_caller_that_does_not_sample_is_not_traced(stack: AsyncExitStack, tokenizer: Tokenizer) -> None:
    spans = Spans()
    served = Served(tokenizer, LogsConfig(), spans.tracer)
    await served.start(stack)
    headers = {"traceparent": CALLER[:-1] + "0"}
    assert (await served.client.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
    for name in ("POST /v1/completions", "dispatch", "generate", "queue"):
        assert spans.named(name) == []


async def test_bad_input_is_a_span_without_an_error_of_ours(stack: AsyncExitStack, tokenizer: Tokenizer) -> None:
    spans = Spans()
    served = Served(tokenizer, LogsConfig(), spans.tracer)
    await served.start(stack)
    assert (await served.client.post("/v1/completions", json=BODY | {"max_tokens": -1})).status_code == 400
    assert (await served.client.get("/v1/models")).status_code == 200
    while not spans.named("POST /v1/completions"):
        await asyncio.sleep(0.01)
    call = spans.one("POST /v1/completions")
    assert (call.attributes or {})["error.type"] == "invalid_value"
    assert call.status.is_unset and spans.below(call) == []
    assert spans.named("GET /v1/models") == [], "only calls are traced"


async def test_an_escaped_path_is_the_same_call(stack: AsyncExitStack, tokenizer: Tokenizer) -> None:
    spans = Spans()
    served = Served(tokenizer, LogsConfig(), spans.tracer)
    await served.start(stack)
    answer = await served.client.post("/v1/%63ompletions", json=BODY, headers={"traceparent": CALLER})
    assert answer.status_code == 200
    while not spans.named("POST /v1/completions"):
        await asyncio.sleep(0.01)
    assert spans.below(spans.one("POST /v1/completions")) == ["tokenize", "dispatch"]
    assert spans.below(spans.one("dispatch")) == ["generate"]


async def test_names_that_clients_make_up_are_not_logged(
    stack: AsyncExitStack, tokenizer: Tokenizer, log: pytest.LogCaptureFixture
) -> None:
    spans = Spans()
    served = Served(tokenizer, LogsConfig(), spans.tracer)
    await served.start(stack)
    answer = await served.client.post("/v1/completions", json=BODY | {"logit_bias": {"secret": 1}})
    assert answer.json()["error"]["param"] == "logit_bias.secret"
    record = await line(log)
    assert "param=logit_bias " in f"{record.message} " and "secret" not in str(vars(record))
    assert (spans.one("POST /v1/completions").attributes or {})["nanoserve.param"] == "logit_bias"


async def test_a_call_that_its_replica_loses_is_an_error(
    stack: AsyncExitStack, tokenizer: Tokenizer, log: pytest.LogCaptureFixture
) -> None:
    spans = Spans()
    served = Served(tokenizer, LogsConfig(), spans.tracer)
    await served.start(stack)
    served.replica.fail_with = EngineDeadError("Rank 1 was killed.")
    assert (await served.client.post("/v1/completions", json=BODY)).status_code == 503
    record = await line(log)
    assert record.levelno == logging.WARNING and "Rank 1 was killed." in record.message
    call = spans.one("POST /v1/completions")
    assert not call.status.is_ok and "Rank 1 was killed." in str(call.status.description)
    assert spans.below(call) == ["tokenize", "dispatch"]


async def test_a_client_that_leaves_is_said_so(
    stack: AsyncExitStack, tokenizer: Tokenizer, log: pytest.LogCaptureFixture
) -> None:
    spans = Spans()
    served = Served(tokenizer, LogsConfig(), spans.tracer)
    await served.start(stack)
    served.replica.executor._step_seconds = lambda batch: 0.2
    with suppress(httpx.ReadTimeout):
        await served.client.post("/v1/completions", json=BODY | {"max_tokens": 400}, timeout=0.5)
    record = await line(log)
    assert (record.status, record.client_left) == (499, True)  # type: ignore[attr-defined]
    while not spans.named("generate"):
        await asyncio.sleep(0.01)
    assert (spans.one("generate").attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)


@pytest.mark.parametrize("prompts", [False, True])
async def test_a_line_has_the_facts_and_prompts_only_where_asked_for(
    stack: AsyncExitStack, tokenizer: Tokenizer, log: pytest.LogCaptureFixture, prompts: bool
) -> None:
    served = Served(tokenizer, LogsConfig(format=LogFormat.JSON, prompts=prompts), NO_TRACER)
    await served.start(stack)
    answer = await served.client.post("/v1/completions", json=BODY, headers={"x-request-id": "r-1"})
    facts: dict[str, Any] = vars(await line(log))
    usage = answer.json()["usage"]
    assert facts["message"] == "POST /v1/completions 200"
    assert facts["request_id"] == "r-1"
    assert (facts["response_id"], facts["model"], facts["replicas"]) == (answer.json()["id"], "m", ["a"])
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert facts["finish_reasons"] == ["length"]
    assert 0 < facts["first_token_seconds"] <= facts["seconds"]
    assert ("secret words" in str(facts)) is prompts
    json.dumps({name: value for name, value in facts.items() if name not in {"args", "exc_info"}})


async def test_text_cannot_be_forged(
    stack: AsyncExitStack, tokenizer: Tokenizer, log: pytest.LogCaptureFixture
) -> None:
    served = Served(tokenizer, LogsConfig(), NO_TRACER)
    await served.start(stack)
    await served.client.get("/v1/x%0AWARNING%20forged%20status=200")
    record = await line(log)
    assert record.message.startswith("GET /v1/x%0AWARNING%20forged%20status=200 404 seconds=")
    assert "\n" not in record.message
    assert "error=" in record.message


async def test_probes_are_not_worth_a_line(
    stack: AsyncExitStack, tokenizer: Tokenizer, log: pytest.LogCaptureFixture
) -> None:
    served = Served(tokenizer, LogsConfig(), NO_TRACER)
    await served.start(stack)
    for path in ("/health", "/ready", "/metrics/targets"):
        assert (await served.client.get(path)).status_code == 200
    assert (await served.client.get("/v1/models")).status_code == 200
    record = await line(log)
    assert record.message.startswith("GET /v1/models 200")

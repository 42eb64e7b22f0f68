"""`nanoserve serve` that traces and logs JSON: what a collector gets from its processes, and what is in their logs."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.serve_command import ROOT, Command, until
from tests.cluster.trace_collector import CollectedSpan, TraceCollector, tree_below

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TRACE_ID, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "xylophonist"  # in no file but a log with prompts
_OPTIONS = "--cache 8MiB --threads 1 --device cpu --plan-seconds 0 --compile never --log-format json"
REQUEST_TREE = ("dispatch", (("generate", (("queue", ()), ("prefill", ()), ("decode", ()))),))


@pytest.fixture(scope="module")
def collector() -> Iterator[TraceCollector]:
    collector = TraceCollector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: TraceCollector) -> Iterator[Command]:
    options = [*_OPTIONS.split(), "--otlp-traces-endpoint", collector.url]
    command = Command(tmp_path_factory.mktemp("traced"), ROOT / "deploy/models/demo.yaml", *options)
    try:
        command.wait_ready()
        yield command
    finally:
        command.close()


@pytest.fixture(scope="module")
def spans(server: Command, collector: TraceCollector) -> list[CollectedSpan]:
    """Of one streamed call with two answers."""
    body = {"model": "demo", "messages": [{"role": "user", "content": SECRET}], "n": 2, "max_tokens": 6, "stream": True}
    headers = {"traceparent": f"00-{TRACE_ID}-{CALLER_SPAN}-01", "x-request-id": "call-1"}
    with server.client.stream("POST", "/v1/chat/completions", json=body | {"ignore_eos": True}, headers=headers) as got:
        assert got.read().endswith(b"data: [DONE]\n\n")
        assert got.headers["x-request-id"] == "call-1"
    until(lambda: len(collector.trace(TRACE_ID)) >= 12, 60, "the spans to be exported")
    return collector.trace(TRACE_ID)


def test_the_span_tree_of_a_streamed_call(spans: list[CollectedSpan]) -> None:
    assert tree_below(spans, CALLER_SPAN) == (
        ("POST /v1/chat/completions", (("tokenize", ()), REQUEST_TREE, REQUEST_TREE)),
    )
    assert len(spans) == 12, "and nothing beside it"


def test_every_span_says_whose_it_is_and_lies_within_its_parent(spans: list[CollectedSpan]) -> None:
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        is_engine = span.name in {"generate", "queue", "prefill", "decode"}
        assert span.process == ("replica" if is_engine else "ingress")
        assert not span.is_error
        parent = by_id.get(span.parent_id)
        if parent is not None:  # two processes of one machine read the same clock, at slightly different times
            assert parent.begin - 1_000_000 <= span.begin <= span.end <= parent.end + 1_000_000, span.name
    (call,) = (span for span in spans if span.parent_id == CALLER_SPAN)
    assert call.attributes["gen_ai.usage.output_tokens"] == 12
    assert call.attributes["nanoserve.request_id"] == "call-1"
    assert all(SECRET not in str(span.attributes) for span in spans)


def test_the_log_has_a_line_of_json_for_the_call_and_no_prompt(server: Command, spans: list[CollectedSpan]) -> None:
    assert spans, "the call was made"
    assert server.state_directory is not None
    logs = server.state_directory / "ray/session_latest/logs"
    (ingress,) = (logs / "serve").glob("replica_nanoserve_Ingress_*.log")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in ingress.read_text().splitlines()]

    until(lambda: any(line.get("request_id") == "call-1" for line in lines()), 10, "the line to be written")
    (line,) = (line for line in lines() if line.get("request_id") == "call-1")
    assert line["message"] == "POST /v1/chat/completions 200"
    assert (line["trace_id"], line["completion_tokens"], line["model"]) == (TRACE_ID, 12, "demo")
    assert line["levelname"] == "INFO" and line["component_name"] == "replica"
    everywhere = [path for path in logs.rglob("*") if path.is_file()]
    assert len(everywhere) > 5
    assert [path.name for path in everywhere if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("odd", [b"\xe9\x9b31m", b"\xc2\x9b31m", b"a -- POST /v1/x 500", b"q" * 129, b""])
def test_an_odd_request_id_is_replaced(server: Command, odd: bytes) -> None:
    """One that is not UTF-8 would be Serve's 500, others would write what they like into the log."""
    for ids in ([odd], [odd, b"call-2"], [b"call-2", odd]):
        headers = [(b"x-request-id", each) for each in ids]
        answer = server.client.post("/v1/completions", json={"model": "none", "prompt": "a"}, headers=headers)
        assert answer.status_code == 404
        assert len(answer.headers["x-request-id"]) == 36, "a UUID"


def test_a_request_id_of_the_clients_is_kept(server: Command) -> None:
    for given in ("call-2", "q" * 128, 'a"b=c\\'):
        answer = server.client.get("/health", headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given


def test_a_collector_that_is_gone_stops_neither_calls_nor_the_end(server: Command, collector: TraceCollector) -> None:
    collector.close()
    answer = server.client.post("/v1/completions", json={"model": "demo", "prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200
    assert server.signal(signal.SIGINT) == 0
    assert server.processes() == {}

"""Reading event streams cut at any byte, with times that the test chooses."""

import json
from typing import Any

import pytest

from cluster.load_test.streamed_reply import StreamedReply


def event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def text(value: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": value, "finish_reason": finish}]})


def delta(**fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
DONE = b"data: [DONE]\n\n"


def test_times_gaps_and_usage() -> None:
    reply = StreamedReply()
    for now, data in ((1.0, text("a")), (1.5, text("b")), (3.5, text("c", "length")), (4.0, USAGE + DONE)):
        reply.feed(data, now)
    assert (reply.first_output_at, reply.last_output_at) == (1.0, 3.5)
    assert list(reply.gaps) == [0.5, 2.0]
    assert (reply.num_prompt_tokens, reply.num_output_tokens) == (7, 3)
    assert reply.is_done
    assert reply.error is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_the_stream_may_be_cut_anywhere(size: int) -> None:
    stream = (
        b": a comment\r\n\r\n" + text("ä") + text("b").replace(b"\n", b"\r\n") + b"data:" + text("c")[6:] + USAGE + DONE
    )
    reply = StreamedReply()
    for start in range(0, len(stream), size):
        reply.feed(stream[start : start + size], float(start))
    assert reply.num_output_chunks == 3
    assert len(reply.gaps) == 2
    assert (reply.num_output_tokens, reply.is_done) == (3, True)


def test_output_of_one_read_came_at_one_time() -> None:
    reply = StreamedReply()
    reply.feed(text("a"), 1.0)
    reply.feed(text("b") + text("c"), 2.0)
    assert list(reply.gaps) == [1.0]
    assert reply.num_output_chunks == 3


def test_the_opening_chunk_of_a_chat_is_no_output() -> None:
    reply = StreamedReply()
    reply.feed(delta(role="assistant", content=""), 1.0)
    assert reply.first_output_at is None
    reply.feed(delta(content="hello"), 2.0)
    assert reply.first_output_at == 2.0


@pytest.mark.parametrize("fields", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}])
def test_reasoning_and_tool_calls_are_output(fields: dict[str, Any]) -> None:
    reply = StreamedReply()
    reply.feed(delta(**fields), 1.0)
    assert reply.first_output_at == 1.0


def test_the_last_chunk_counts_even_without_text() -> None:
    reply = StreamedReply()
    reply.feed(text("", "stop"), 1.0)
    assert reply.first_output_at == 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (event({"error": {"message": "dead", "code": "engine_dead", "type": "server_error"}}), "engine_dead"),
        (event({"error": {"message": "dead", "type": "server_error"}}), "server_error"),
        (event({"error": "plain"}), "plain"),
        (b"data: {broken\n\n", "malformed"),
        (b"data: [1]\n\n", "malformed"),
        (event({"choices": [], "usage": {"prompt_tokens": 1}}), "malformed"),
    ],
)
def test_errors_in_the_stream_are_kept(data: bytes, message: str) -> None:
    reply = StreamedReply()
    reply.feed(data + DONE, 1.0)
    assert reply.error is not None
    assert message in reply.error

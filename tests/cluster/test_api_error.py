"""Every error has OpenAI's shape, the status and headers that SDKs act on, and tells nothing of our insides."""

import json
import pickle

import pytest

from cluster.api_error import ApiError
from engine import EngineDeadError, RequestError
from tests.cluster import openai_schema

ALL = {
    "invalid": (ApiError.invalid("no", "n"), 400, "n", None),
    "context": (ApiError.prompt_too_long(9, 8, "messages"), 400, "messages", "context_length_exceeded"),
    "model": (ApiError.model_not_found("org/m"), 404, "model", "model_not_found"),
    "path": (ApiError.not_found("/v2"), 404, None, "unknown_url"),
    "method": (ApiError.method_not_allowed("GET", "/v1/completions"), 405, None, "method_not_allowed"),
    "size": (ApiError.body_too_large(100), 413, None, "request_too_large"),
    "unavailable": (ApiError.unavailable("down"), 503, None, "service_unavailable"),
    "internal": (ApiError.internal(), 500, None, "internal_error"),
}


@pytest.mark.parametrize("name", ALL)
def test_shape(name: str) -> None:
    error, status, param, code = ALL[name]
    body = json.loads(error.body())
    openai_schema.check("ErrorResponse", body)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (error.status, body["error"]["param"], body["error"]["code"]) == (status, param, code)
    assert error.frame() == b"data: " + error.body() + b"\n\n"
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, again.headers, again.body()) == (error.status, error.headers, error.body())


def test_context_overflow_is_worded_as_clients_match_it() -> None:
    message = ApiError.prompt_too_long(5000, 4096, "messages").message
    assert message.startswith("This model's maximum context length is 4096 tokens. However, ")
    assert "5000 tokens" in message


def test_waiting_times_are_whole_seconds_and_never_zero() -> None:
    assert ApiError.unavailable("busy", 2.4).headers == {"Retry-After": "3", "retry-after-ms": "2400"}
    assert ApiError.unavailable("busy", 0).headers == {"Retry-After": "1", "retry-after-ms": "1"}


def test_exceptions_become_answers() -> None:
    error = ApiError.of(RequestError("top_k must be ...", "top_k"))
    assert (error.status, error.param, error.message) == (400, "top_k", "top_k must be ...")
    assert ApiError.of(EngineDeadError("rank 1: CUDA error at 0xdead")).status == 503
    internal = ApiError.of(KeyError("secret"))
    assert internal.status == 500
    assert internal.headers == {"x-should-retry": "false"}
    assert b"secret" not in internal.body()
    assert b"0xdead" not in ApiError.of(EngineDeadError("0xdead")).body()
    assert ApiError.of(error) is error

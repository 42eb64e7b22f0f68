"""What clients send is understood, and what cannot be served is refused with the name of the field."""

import json
from typing import Any

import pytest

from cluster.api_error import ApiError
from cluster.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from tests.cluster import openai_schema

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
FIELDS = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
NULLABLE = sorted(FIELDS - {"model", "prompt", "messages"})


def refusal(kind: type[GenerationRequest], body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        kind.parse(body)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    openai_schema.check("ErrorResponse", json.loads(caught.value.body()))
    return caught.value


def chat_refusal(**fields: Any) -> ApiError:
    return refusal(ChatCompletionRequest, json.dumps(CHAT | fields).encode())


def completion_refusal(**fields: Any) -> ApiError:
    return refusal(CompletionRequest, json.dumps(COMPLETION | fields).encode())


@pytest.mark.parametrize("name", NULLABLE)
def test_null_means_not_given(name: str) -> None:
    body = json.dumps(CHAT | COMPLETION | {name: None}).encode()
    assert getattr(ChatCompletionRequest.parse(body), name, None) is None
    assert getattr(CompletionRequest.parse(body), name, None) is None


def test_unknown_fields_are_tolerated() -> None:
    extras = {"store": True, "metadata": {"a": 1}, "reasoning_effort": "low", "keep_alive": 3, "cache_prompt": True}
    assert ChatCompletionRequest.parse(json.dumps(CHAT | extras).encode()).model == "m"
    message = {"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}}
    ChatCompletionRequest.parse(json.dumps(CHAT | {"messages": [message]}).encode())


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_roles_and_contents(role: str) -> None:
    for content in ("text", None, [], [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "x": 1}]):
        body = json.dumps(CHAT | {"messages": [{"role": role, "content": content}]}).encode()
        ChatCompletionRequest.parse(body)
    ChatCompletionRequest.parse(json.dumps(CHAT | {"messages": [{"role": role}]}).encode())


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "messages"),
        ({"messages": "hi"}, "messages", "array"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", '"robot"'),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a string or a list of text parts"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "must be an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages[0].content[0].type",
            "must be 'text', but is \"image_url\"",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 3}]}, "messages[0].tool_call_id", "string"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls", "array"),
        ({"model": None}, "model", "string"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens", "integer"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "128"),
        ({"seed": 2**63}, "seed", "less"),
        ({"seed": 10**400}, "seed", ""),
        ({"max_tokens": -(10**400)}, "max_tokens", ""),
        ({"min_tokens": 10**400}, "min_tokens", ""),
        ({"top_k": -(10**400)}, "top_k", ""),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream": 1}, "stream", "boolean"),
        ({"stop": 5}, "stop", "a string or a list of strings"),
        ({"stop": ["a", 5]}, "stop[1]", "string"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": "x" * 2000}, "stop", "1024"),
        ({"logit_bias": {"abc": 1}}, "logit_bias.abc", "integer"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5", "number"),
        ({"logit_bias": []}, "logit_bias", "object"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs is true"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs", "logprobs is true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"stream": True, "stream_options": {"include_usage": "x"}}, "stream_options.include_usage", "boolean"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]", "integer"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not supported"),
        ({"guided_regex": "a+"}, "guided_regex", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    ],
)
def test_what_is_wrong_with_a_chat_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    error = chat_refusal(**fields)
    assert error.param == param
    assert param in error.message
    assert says in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [5, "a"]}, "prompt[1]"),
        ({"prompt": [5, True]}, "prompt[1]"),
        ({"prompt": [[5], [1.5]]}, "prompt[1][0]"),
        ({"prompt": [[5], "a"]}, "prompt[1]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_wrong_with_a_completion_is_named(fields: dict[str, Any], param: str) -> None:
    assert completion_refusal(**fields).param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": None},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "audio": None},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stop": []},
        {"stop": [f"{i}" for i in range(16)]},
        {"temperature": 0, "seed": -(2**63), "logit_bias": {"5": -100}},
        {"logprobs": True, "top_logprobs": 0},
    ],
)
def test_what_asks_for_nothing_special_is_fine(fields: dict[str, Any]) -> None:
    ChatCompletionRequest.parse(json.dumps(CHAT | fields).encode())


def test_values_arrive() -> None:
    body = {"stop": "x", "logit_bias": {"7": 1}, "stream": True, "stream_options": {"include_usage": True}}
    wire = ChatCompletionRequest.parse(json.dumps(CHAT | body | {"logprobs": True}).encode())
    assert (wire.stop_strings, wire.logit_bias, wire.include_usage, wire.num_logprobs) == (("x",), {7: 1.0}, True, 0)
    assert CompletionRequest.parse(json.dumps(COMPLETION | {"best_of": 2, "n": 2, "suffix": ""}).encode()).n == 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (json.dumps(CHAT).encode()[:-1] + b',"temperature":NaN}', "temperature"),
        (json.dumps(CHAT).encode()[:-1] + b',"temperature":1e999}', "temperature"),
        (json.dumps(CHAT).encode()[:-1] + b',"seed":' + b"9" * 5000 + b"}", "not valid JSON"),
        (json.dumps(CHAT).encode()[:-1] + b',"stop":' + b"9" * 4000 + b"}", "stop"),
        (b'{"model":"\\ud800","messages":[]}', "not valid JSON"),
    ],
)
def test_bodies_that_are_no_object(body: bytes, says: str) -> None:
    assert says in refusal(ChatCompletionRequest, body).message


def test_a_long_wrong_value_is_not_sent_back_whole() -> None:
    assert len(chat_refusal(messages="x" * 100_000).message) < 300

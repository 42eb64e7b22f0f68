"""From a body to engine requests: prompts, limits, seeds, and every refusal that needs the model to be known."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api_call import derive_seed, open_chat, open_completion
from cluster.api_error import ApiError
from cluster.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from cluster.served_model import ServedModel, model_card, model_list
from engine import ConfigError
from tests.cluster import openai_schema, tiny_tokenizers
from tests.cluster.scripted_engine import MODEL, MODELS, chat, completion, tokens

TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def refused(**fields: Any) -> ApiError:
    make = completion if "prompt" in fields else chat
    with pytest.raises(ApiError) as caught:
        make(**fields)
    openai_schema.check("ErrorResponse", json.loads(caught.value.body()))
    return caught.value


def prompt_text(**fields: Any) -> str:
    (request,) = chat(**fields).requests
    return MODEL.tokenizer.decode(request.prompt_token_ids)


def test_a_chat_is_its_rendered_template() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "D"}, {"role": "user", "content": parts}]
    assert prompt_text(messages=messages) == (
        "<s><|im_start|>system\nD<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(add_generation_prompt=False).endswith("hi<|im_end|>\n")
    assert prompt_text(chat_template_kwargs={"style": "S"}).endswith("assistant\nS")


def test_tool_calls_of_the_past_reach_the_template_with_null_content() -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    text = prompt_text(messages=messages)
    assert '<|im_start|>assistant\n{"a": 1}<|im_end|>' in text  # an object, not a string in quotes
    assert "None" not in text


def test_tool_arguments_that_are_no_json_stay_text() -> None:
    def past(arguments: str) -> list[dict[str, Any]]:
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]

    assert "not JSON" in prompt_text(messages=past("not JSON"))
    assert refused(messages=past('{"a": "\\ud800"}')).code == "chat_template_error"
    assert refused(messages=past("[" * 100_000)).code == "context_length_exceeded"


def test_null_content_is_an_empty_text_for_the_template() -> None:
    """Templates search in it ("</think>" in content) or print it; neither goes well with a null or a missing key."""
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level(), "{{ messages[0].content is string }}")
    models = {"m": ServedModel(names=("m",), tokenizer=tokenizer, max_model_len=64, vocab_size=512)}
    body = {"model": "m", "messages": [{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}]}
    (request,) = open_chat(json.dumps(body).encode(), models).requests
    assert tokenizer.decode(request.prompt_token_ids) == "True"


def test_template_errors_are_400() -> None:
    error = refused(messages=[{"role": "tool", "content": "3"}])
    assert (error.status, error.param) == (400, "messages")
    assert "needs a tool_call_id" in error.message


def test_four_forms_of_prompt() -> None:
    def prompts(prompt: object) -> list[tuple[int, ...]]:
        return [request.prompt_token_ids for request in completion(prompt=prompt).requests]

    hello, world = tuple(MODEL.tokenizer.encode("Hello")), tuple(MODEL.tokenizer.encode("world"))
    assert hello[0] == 0
    assert prompts("Hello") == [hello]
    assert prompts(["Hello", "world"]) == [hello, world]
    assert prompts([5, 6]) == [(5, 6)]
    assert prompts([[5, 6], [7]]) == [(5, 6), (7,)]
    assert prompts("") == [(0,)]


def test_an_empty_prompt_needs_a_token_to_begin_with() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.word_piece())
    model = ServedModel(names=("w",), tokenizer=tokenizer, max_model_len=64, vocab_size=512)
    assert open_completion(b'{"model":"w","prompt":""}', {"w": model}).requests[0].prompt_token_ids
    tokenizer.bos_token_id = None
    with pytest.raises(ApiError, match=r"prompt\[1\] is empty"):
        open_completion(b'{"model":"w","prompt":["hello",""]}', {"w": model})


def test_limits() -> None:
    num_prompt = len(chat().requests[0].prompt_token_ids)
    assert chat().requests[0].sampling.max_tokens == 100
    assert chat(max_tokens=7).requests[0].sampling.max_tokens == 7
    assert chat(max_tokens=7, max_completion_tokens=8).requests[0].sampling.max_tokens == 8
    assert chat(max_tokens=None).requests[0].sampling.max_tokens == 100
    assert chat(max_tokens=256 - num_prompt).requests[0].sampling.max_tokens == 256 - num_prompt
    assert completion().requests[0].sampling.max_tokens == 16
    assert completion(max_tokens=None).requests[0].sampling.max_tokens == 16
    assert completion(prompt=[5] * 250).requests[0].sampling.max_tokens == 6
    fitted = completion(prompt=[5] * 250, min_tokens=10).requests[0].sampling
    assert (fitted.max_tokens, fitted.min_tokens) == (6, 6)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_more_than_the_context_is_refused_not_cut(name: str) -> None:
    error = refused(messages=[{"role": "user", "content": "hi"}], **{name: 250})
    assert (error.status, error.param, error.code) == (400, name, "context_length_exceeded")
    assert error.message.startswith("This model's maximum context length is 256 tokens. However, you requested 26")
    assert refused(prompt=[5] * 250, max_tokens=7).param == "max_tokens"


@pytest.mark.parametrize("num_tokens", [256, 257, 5000])
def test_context_overflow(num_tokens: int) -> None:
    error = refused(prompt=[5] * num_tokens)
    assert (error.status, error.param, error.code) == (400, "prompt", "context_length_exceeded")
    assert error.message.startswith("This model's maximum context length is 256 tokens. However, ")
    assert f"{num_tokens} tokens" in error.message
    error = refused(messages=[{"role": "user", "content": "x " * num_tokens}])
    assert (error.param, error.code) == ("messages", "context_length_exceeded")
    assert completion(prompt=[5] * 255).requests[0].sampling.max_tokens == 1


def test_unknown_model() -> None:
    for make in (chat, completion):
        with pytest.raises(ApiError) as caught:
            make(model="org/other")
        assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert chat(model="gpt-4o").model is MODEL


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": -1}, "logprobs"),
        ({"prompt": [5, 512]}, "prompt[1]"),
        ({"prompt": [[5], [6, -1]]}, "prompt[1][1]"),
        ({"prompt": [2**70]}, "prompt[0]"),
        ({"prompt": ["x"] * 100, "n": 100}, "n"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (400, param)
    assert param.removesuffix("[1]").removesuffix("[1]") in error.message


def test_every_sampling_field_arrives() -> None:
    (request,) = chat(
        temperature=0, top_p=0.5, top_k=3, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
        min_tokens=2, max_tokens=9, ignore_eos=True, stop_token_ids=[7, 8], logit_bias={"5": -3}, seed=-4,
        logprobs=True, top_logprobs=2, priority=-3, cache_salt="tenant",
    ).requests  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 3, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos, sampling.seed) == (2, 9, True, -4)
    assert (sampling.stop_token_ids, sampling.logit_bias, sampling.logprobs) == (frozenset({7, 8}), ((5, -3.0),), 2)
    assert (request.priority, request.cache_salt) == (3, "tenant")  # the wire's lower is the engine's higher
    assert chat(logprobs=True).requests[0].sampling.logprobs == 0
    assert completion(logprobs=0).requests[0].sampling.logprobs == 0
    assert chat().requests[0].sampling.logprobs is None


@pytest.mark.parametrize("top_k", [-1, 0, 513, 10**9])
def test_ways_to_switch_top_k_off(top_k: int) -> None:
    assert chat(top_k=top_k).requests[0].sampling.top_k == 0


def test_top_p_zero_is_the_most_likely_token() -> None:
    assert 0 < chat(top_p=0).requests[0].sampling.top_p < 1e-6


def test_seeds() -> None:
    def seeds(**fields: Any) -> list[int]:
        return [request.sampling.seed for request in completion(**fields).requests]

    several = seeds(seed=5, n=3)
    assert several[0] == 5
    assert len(set(several)) == 3
    assert several == seeds(seed=5, n=3) == seeds(seed=5, n=128)[:3]
    assert seeds(seed=5, n=2, prompt=["a", "b"]) == several[:2] * 2
    assert seeds(seed=6, n=3)[1:] != several[1:]
    unseeded = seeds(n=2, prompt=["a", "a"]) + seeds()
    assert len(set(unseeded)) == 5
    assert all(0 <= seed < 2**63 for seed in unseeded)
    assert derive_seed(-(2**63), 127) >= 0


def test_identifiers_are_unique_and_in_order() -> None:
    call = completion(prompt=["a", "b"], n=2)
    assert [request.request_id for request in call.requests] == [f"{call.response_id}-{k}" for k in range(4)]
    assert call.requests[1].prompt_token_ids == call.requests[0].prompt_token_ids != call.requests[2].prompt_token_ids
    assert call.response_id.startswith("cmpl-")
    assert chat().response_id.startswith("chatcmpl-")
    assert chat().response_id != chat().response_id


def test_a_model_without_a_chat_template_serves_completions_only() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level(), chat_template=None)
    models = {"m": ServedModel(names=("m",), tokenizer=tokenizer, max_model_len=64, vocab_size=512)}
    with pytest.raises(ApiError, match="/v1/completions") as caught:
        open_chat(b'{"model":"m","messages":[{"role":"user","content":"x"}]}', models)
    assert caught.value.status == 400
    assert open_completion(b'{"model":"m","prompt":"x"}', models).requests


def test_a_tokenizer_larger_than_the_model_cannot_reach_past_the_embedding() -> None:
    small = ServedModel(names=("m",), tokenizer=MODEL.tokenizer, max_model_len=64, vocab_size=200)
    assert max(tokens(" the quick")) >= 200
    with pytest.raises(ApiError, match=r"vocabulary is 0\.\.199"):
        open_completion(b'{"model":"m","prompt":" the quick"}', {"m": small})


def test_list_of_models() -> None:
    body = json.loads(model_list([MODEL]))
    openai_schema.check("ListModelsResponse", body)
    assert [card["id"] for card in body["data"]] == ["tiny", "gpt-4o"]
    openai_schema.check("Model", model_card(MODEL, "tiny"))


def test_a_served_model_is_checked() -> None:
    with pytest.raises(ConfigError):
        ServedModel(names=(), tokenizer=MODEL.tokenizer, max_model_len=64, vocab_size=200)
    with pytest.raises(ConfigError, match="default_max_tokens"):
        ServedModel(names=("m",), tokenizer=MODEL.tokenizer, max_model_len=64, vocab_size=2, default_max_tokens=0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("01ab", max_size=3), inner, max_size=3),
    max_leaves=5,
)
message_values = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "?"])},
    optional={name: json_values for name in ("content", "name", "tool_calls", "tool_call_id", "extra")},
)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_no_body_gets_anything_but_a_call_or_a_clear_refusal(
    kind: type[GenerationRequest], data: st.DataObject
) -> None:
    names = st.sampled_from(sorted({*kind.model_fields, *kind.refused, "user"} - {"model"}))
    fields = data.draw(st.dictionaries(names, json_values, max_size=3))
    if kind is ChatCompletionRequest:
        fields.setdefault("messages", data.draw(st.lists(message_values, max_size=2)))
    else:
        fields.setdefault("prompt", data.draw(st.text(max_size=3) | st.lists(st.integers(-1, 520), max_size=3)))
    body = json.dumps({"model": "tiny"} | fields).encode()
    try:
        call = (open_chat if kind is ChatCompletionRequest else open_completion)(body, MODELS)
    except ApiError as error:
        assert error.status == 400
        assert error.message
    else:
        assert call.requests or call.reply.done
        for request in call.requests:
            request.sampling.validate(MODEL.vocab_size)
            assert len(request.prompt_token_ids) + request.sampling.max_tokens <= MODEL.max_model_len


def test_models_are_looked_up_before_anything_is_encoded() -> None:
    assert MODELS["gpt-4o"] is MODELS["tiny"]
    with pytest.raises(ApiError) as caught:
        open_completion(json.dumps({"model": "x", "prompt": [10**6]}).encode(), MODELS)
    assert caught.value.status == 404

"""Replies, whole and streamed: the same text and numbers both ways, valid by OpenAI's schemas, read by its SDK."""

import json
import time
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api_call import ApiCall, open_chat, open_completion
from cluster.api_error import ApiError
from cluster.served_model import ServedModel
from engine import FinishReason, NanoserveError, TokenOutput
from tests.cluster import openai_schema, tiny_tokenizers
from tests.cluster.scripted_engine import EOS, Played, chat, completion, outputs_of, play, tokens

STORY = "Hello, 東京 🙂! The quick   brown fox.\n\n"


def whole(call: ApiCall, *scripts: list[int], chunk: int = 1) -> Any:
    """The checked body of a call that is not streamed."""
    assert play(call, scripts, chunk).frames == b""
    body = json.loads(call.reply.body())
    is_chat = call.response_id.startswith("chat")
    openai_schema.check("CreateChatCompletionResponse" if is_chat else "CreateCompletionResponse", body)
    return body


def streamed(call: ApiCall, *scripts: list[int], chunk: int = 1) -> Played:
    """The checked frames of a streamed call."""
    played = play(call, scripts, chunk)
    for event in played.events:
        if call.response_id.startswith("chat"):
            openai_schema.check("CreateChatCompletionStreamResponse", event)
        else:
            openai_schema.check_completion_chunk(event)
    return played


def text_of(played: Played, index: int = 0) -> str:
    choices = [choice for event in played.events for choice in event["choices"] if choice["index"] == index]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


def test_a_whole_chat() -> None:
    call = chat()
    body = whole(call, [*tokens("Hello, 東京"), EOS])
    assert body["id"] == call.response_id
    assert (body["object"], body["model"], body["system_fingerprint"]) == ("chat.completion", "tiny", "fp_test")
    assert abs(body["created"] - time.time()) < 60
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, 東京", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt, num_completion = len(call.requests[0].prompt_token_ids), len(tokens("Hello, 東京")) + 1
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_streamed_chat() -> None:
    played = streamed(chat(stream=True), [*tokens("Hello, 東京"), EOS])
    choices = [event["choices"][0] for event in played.events]
    assert choices[0]["delta"] == {"role": "assistant", "content": "Hello"}
    assert [choice["delta"].get("role") for choice in choices[1:]] == [None] * (len(choices) - 1)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}
    assert len({(event["id"], event["created"], event["model"]) for event in played.events}) == 1
    assert all("usage" not in event for event in played.events)
    assert text_of(played) == "Hello, 東京"


def test_a_streamed_completion() -> None:
    played = streamed(completion(stream=True, max_tokens=3), tokens(" the quick brown fox jumps"))
    assert text_of(played) == "".join(map(_decoded, tokens(" the quick brown fox jumps")[:3]))
    assert [event["choices"][0]["finish_reason"] for event in played.events][-2:] == [None, "length"]
    assert {event["object"] for event in played.events} == {"text_completion"}


def _decoded(token_id: int) -> str:
    return bytes(chat().model.tokenizer.vocabulary.token_bytes(token_id)).decode()


@pytest.mark.parametrize("make", [chat, completion])
def test_usage_comes_last_and_only_when_asked_for(make: Any) -> None:
    script = [*tokens("yes"), EOS]
    call = make(stream=True, stream_options={"include_usage": True})
    *others, last = streamed(call, script).events
    assert last["choices"] == []
    assert last["usage"] == whole(make(), script)["usage"] == call.reply.usage().to_dict()
    assert all(event["choices"] and event.get("usage") is None for event in others)
    assert all(event["choices"] for event in streamed(make(stream=True), script).events)


def test_choices_and_prompts_have_their_own_index() -> None:
    scripts = [[*tokens(word), EOS] for word in ("one", "two and more", "three", "four")]
    body = whole(completion(prompt=["Hello", "world peace"], n=2), *scripts)
    assert [choice["text"] for choice in body["choices"]] == ["one", "two and more", "three", "four"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    call = completion(prompt=["Hello", "world peace"], n=2, stream=True, stream_options={"include_usage": True})
    played = streamed(call, *scripts)
    assert [text_of(played, i) for i in range(4)] == ["one", "two and more", "three", "four"]
    finished = [c["index"] for e in played.events for c in e["choices"] if c["finish_reason"]]
    assert sorted(finished) == [0, 1, 2, 3]
    # Each prompt counts once, and so do its cached tokens: those of its first choice (3 + k for request k).
    prompts = [len(call.requests[i].prompt_token_ids) for i in (0, 2)]
    assert body["usage"]["prompt_tokens"] == sum(prompts)
    assert prompts[1] > 5
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == min(3, prompts[0]) + 5
    assert played.events[-1]["usage"] == body["usage"]
    roles = [
        c["delta"].get("role") for e in streamed(chat(n=2, stream=True), *scripts[:2]).events for c in e["choices"]
    ]
    assert roles.count("assistant") == 2


stop_lists = st.lists(st.text("ox Tq.\n", min_size=1, max_size=4), max_size=3)


@given(text=st.text(st.sampled_from("The quick brøwn fox 東🙂\n."), max_size=30), stops=stop_lists, data=st.data())
@settings(deadline=None)
@pytest.mark.parametrize("make", [chat, completion])
def test_streamed_is_whole_is_cut_where_the_text_says(make: Any, text: str, stops: list[str], data: Any) -> None:
    """However tokens are grouped into steps: same text, same reason, same number of tokens."""
    include = data.draw(st.booleans())
    fields = {"stop": stops, "max_tokens": 100, "include_stop_str_in_output": include}
    script = [*tokens(text), EOS]
    body = whole(make(**fields), script)
    choice = body["choices"][0]
    got = choice["message"]["content"] if "message" in choice else choice["text"]
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    end, _, stop = min(ends, default=(len(text), 0, ""))
    assert got == text[: end if include else end - len(stop)]
    assert choice["finish_reason"] == "stop"
    for chunk in (1, 2, 7):
        call = make(stream=True, stream_options={"include_usage": True}, **fields)
        played = streamed(call, script, chunk=chunk)
        assert text_of(played) == got
        assert played.events[-1]["usage"] == body["usage"]
        still_running = body["usage"]["completion_tokens"] <= (len(script) - 1) // chunk * chunk
        assert played.aborted == ([call.requests[0].request_id] if ends and still_running else [])


def test_stop_strings_never_leak_their_beginning() -> None:
    call = chat(stream=True, stop=["\nUser:"], max_tokens=50)
    played = streamed(call, tokens("yes\nUser: hi\nAssistant: yes"))
    assert text_of(played) == "yes"
    assert played.events[-1]["choices"][0]["finish_reason"] == "stop"
    assert played.aborted == [call.requests[0].request_id]
    held = streamed(chat(stream=True, stop=["\nUser:"], max_tokens=50), [*tokens("yes\nUse"), EOS])
    assert text_of(held) == "yes\nUse"


def test_outputs_after_the_end_are_ignored() -> None:
    """The engine is a step ahead: tokens drawn before the abort arrives, and its confirmation, come late."""
    call = chat(stop=["b"])
    (request,) = call.requests
    for output in outputs_of(request, tokens("a b c d"), chunk=1):
        call.reply.feed([output])
    call.reply.feed(
        [TokenOutput(request_id=request.request_id, token_ids=(), position=9, finish_reason=FinishReason.ABORT)]
    )
    assert json.loads(call.reply.body())["choices"][0]["message"]["content"] == "a "
    assert call.reply.take_aborts() == [request.request_id]
    assert call.reply.take_aborts() == []


def test_min_tokens_hold_for_stop_strings_too() -> None:
    script = tokens("a b a b a b")
    assert [_decoded(token_id) for token_id in script[:3]] == ["a", " ", "b"]
    for min_tokens, text in ((2, "a "), (3, "a b a "), (7, "a b a b a ")):
        body = whole(chat(stop="b", min_tokens=min_tokens, max_tokens=20), script)
        assert body["choices"][0]["message"]["content"] == text


def test_stop_tokens_are_not_shown_unless_asked_for() -> None:
    (stop_id,) = tokens("Hello")
    script = [*tokens("yes"), stop_id]
    assert whole(chat(stop_token_ids=[stop_id]), script)["choices"][0]["message"]["content"] == "yes"
    shown = whole(chat(stop_token_ids=[stop_id], include_stop_str_in_output=True), script)
    assert shown["choices"][0]["message"]["content"] == "yesHello"
    special = whole(
        chat(ignore_eos=True, max_tokens=4, skip_special_tokens=False), [*tokens("y"), EOS, EOS, *tokens("n")]
    )
    assert special["choices"][0]["message"]["content"] == "y</s></s>n"


def test_an_unfinished_character_at_the_end_is_flushed() -> None:
    script = tokens("a🙂")[:-1]
    body = whole(chat(max_tokens=len(script)), script)
    played = streamed(chat(max_tokens=len(script), stream=True), script)
    assert body["choices"][0]["message"]["content"] == text_of(played) == "a\ufffd"


def test_chat_logprobs() -> None:
    script = [*tokens(STORY), EOS]
    body = whole(chat(logprobs=True, top_logprobs=2), script)
    content = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == STORY
    assert [entry["logprob"] for entry in content] == [-0.5] * (len(script) - 1)
    assert [other["logprob"] for other in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert content[0]["top_logprobs"][1] == {"token": "x", "logprob": -9999.0, "bytes": [120]}
    played = streamed(chat(logprobs=True, top_logprobs=2, stream=True), script, chunk=3)
    together = [e for event in played.events for e in event["choices"][0]["logprobs"]["content"]]
    assert together == content
    assert all(event["choices"][0]["logprobs"]["refusal"] is None for event in played.events)
    bare = whole(chat(logprobs=True), script)["choices"][0]["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in bare} == {0}


def test_completion_logprobs() -> None:
    script = [*tokens(STORY), EOS]
    logprobs = whole(completion(logprobs=1, max_tokens=100), script)["choices"][0]["logprobs"]
    assert len({len(column) for column in logprobs.values()}) == 1
    assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or STORY.startswith(token, offset)
    only_drawn = whole(completion(logprobs=0, max_tokens=100), script)["choices"][0]["logprobs"]
    assert only_drawn["top_logprobs"][0] == {only_drawn["tokens"][0]: -0.5}
    played = streamed(completion(logprobs=1, max_tokens=100, stream=True), script, chunk=2)
    for name, column in logprobs.items():
        assert [x for event in played.events for x in event["choices"][0]["logprobs"][name]] == column


@pytest.mark.parametrize("chunk", [1, 4])
def test_logprobs_end_with_the_text(chunk: int) -> None:
    fields = {"logprobs": True, "stop": ["uick brow"], "max_tokens": 50}
    script = tokens("Hello, The quick brown fox")
    played = streamed(chat(stream=True, **fields), script, chunk=chunk)
    content = [e for event in played.events for e in event["choices"][0]["logprobs"]["content"]]
    assert content == whole(chat(**fields), script)["choices"][0]["logprobs"]["content"]
    assert text_of(played) == "Hello, The q"
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "Hello, The quick"  # no token is cut


def test_logprobs_are_null_unless_asked_for() -> None:
    assert whole(completion(), [EOS])["choices"][0]["logprobs"] is None
    for make in (chat, completion):
        events = streamed(make(stream=True), [*tokens("a b"), EOS]).events
        assert [event["choices"][0]["logprobs"] for event in events] == [None] * len(events)


def test_echo() -> None:
    script = [*tokens(" there"), EOS]
    assert whole(completion(prompt="Hello", echo=True), script)["choices"][0]["text"] == "Hello there"
    assert text_of(streamed(completion(prompt="Hello", echo=True, stream=True), script)) == "Hello there"
    ids = completion(prompt=tokens("Hello"), echo=True, max_tokens=0)
    assert ids.requests == ()
    assert ids.reply.done
    body = whole(ids)
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("Hello", "length")
    assert body["usage"]["completion_tokens"] == 0
    assert text_of(streamed(completion(prompt="Hello", echo=True, stream=True, max_tokens=0))) == "Hello"
    full = completion(prompt=[5] * 256, echo=True, max_tokens=0)
    assert full.reply.done


def test_token_ids_on_request() -> None:
    script = [*tokens("a🙂 b"), EOS]
    assert whole(chat(return_token_ids=True), script)["choices"][0]["token_ids"] == script
    played = streamed(completion(return_token_ids=True, stream=True, max_tokens=50), script)
    assert [i for event in played.events for i in event["choices"][0]["token_ids"]] == script


def test_repeated_tokens_are_dropped_and_missing_ones_noticed() -> None:
    call = chat()
    first, second, *_ = outputs_of(call.requests[0], [*tokens("a b c"), EOS], chunk=2)
    for output in (first, first, second, first):
        call.reply.feed([output])
    assert call.reply.usage().num_completion_tokens == 4
    overlapping = TokenOutput(request_id=first.request_id, token_ids=(*second.token_ids, *tokens("z")), position=2)
    call.reply.feed([overlapping])
    assert call.reply.usage().num_completion_tokens == 5
    gap = TokenOutput(request_id=first.request_id, token_ids=(7,), position=9)
    with pytest.raises(NanoserveError, match="4 tokens before 9 are missing"):
        call.reply.feed([gap])


def test_a_request_the_engine_gave_up_is_an_error_not_an_end() -> None:
    call = chat(stream=True)
    (request,) = call.requests
    call.reply.feed(outputs_of(request, tokens("a b c"), chunk=1)[:1])
    aborted = TokenOutput(request_id=request.request_id, token_ids=(), position=1, finish_reason=FinishReason.ABORT)
    with pytest.raises(ApiError) as caught:
        call.reply.feed([aborted])
    assert caught.value.status == 503
    openai_schema.check("ErrorResponse", json.loads(caught.value.frame().decode().removeprefix("data: ")))


def test_a_completion_keeps_the_space_that_a_chat_drops() -> None:
    """SentencePiece writes a space before a word: between prompt and completion it is text, at the start it is not."""
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.sentence_piece())
    model = ServedModel(names=("m",), tokenizer=tokenizer, max_model_len=256, vocab_size=tokenizer.vocab_size)
    script = [*tokenizer.encode("world", add_special_tokens=False), EOS]
    assert tokenizer.vocabulary.token_bytes(script[0]).startswith(b" ")
    answer = open_completion(b'{"model":"m","prompt":"Hello","stop_token_ids":[1]}', {"m": model})
    play(answer, [script])
    assert json.loads(answer.reply.body())["choices"][0]["text"] == " world"
    messages = b'[{"role":"user","content":"x"}]'
    answer = open_chat(b'{"model":"m","stop_token_ids":[1],"messages":' + messages + b"}", {"m": model})
    play(answer, [script])
    assert json.loads(answer.reply.body())["choices"][0]["message"]["content"] == "world"


def test_outputs_of_strangers_are_ignored() -> None:
    call, other = chat(stream=True), chat(stream=True)
    assert call.reply.feed(outputs_of(other.requests[0], tokens("a"), chunk=1)) == b""


def sdk(content: bytes, content_type: str) -> openai.OpenAI:
    """OpenAI's own client, answered with these bytes."""
    answer = httpx2.Response(200, content=content, headers={"content-type": content_type})
    transport = httpx2.MockTransport(lambda request: answer)
    return openai.OpenAI(
        api_key="x", base_url="http://x/v1", http_client=httpx2.Client(transport=transport), max_retries=0
    )


def test_the_official_client_reads_a_stream() -> None:
    call = chat(stream=True, stream_options={"include_usage": True}, logprobs=True, n=2)
    frames = play(call, [[*tokens(STORY), EOS], [*tokens("no"), EOS]]).frames
    messages: list[Any] = [{"role": "user", "content": "x"}]
    with (
        sdk(frames, "text/event-stream") as client,
        client.chat.completions.stream(model="m", messages=messages) as stream,
    ):
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == [STORY, "no"]
    assert [choice.message.role for choice in final.choices] == ["assistant", "assistant"]
    assert final.usage is not None
    assert final.usage.completion_tokens == len(tokens(STORY)) + len(tokens("no")) + 2


def test_the_official_client_reads_a_body_and_raises_on_an_error_frame() -> None:
    call = completion(logprobs=1, max_tokens=50)
    play(call, [[*tokens(STORY), EOS]])
    with sdk(call.reply.body(), "application/json") as client:
        assert client.completions.create(model="m", prompt="x").choices[0].text == STORY
    call = chat(stream=True)
    frames = call.reply.feed(outputs_of(call.requests[0], tokens("a b"), chunk=1)[:1]) + ApiError.internal().frame()
    with sdk(frames, "text/event-stream") as client, pytest.raises(openai.APIError, match="had an error"):
        list(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True))


def test_a_chunk_costs_microseconds() -> None:
    """The budget is 20 µs (4 measured); four times that still tells a rendering that dumps a model per token."""
    best = float("inf")
    for _ in range(5):
        call = chat(stream=True, max_tokens=200)
        outputs = outputs_of(call.requests[0], tokens("word ") * 40, chunk=1)
        start = time.perf_counter()
        for output in outputs:
            call.reply.feed([output])
        best = min(best, (time.perf_counter() - start) / len(outputs))
    assert best < 80e-6

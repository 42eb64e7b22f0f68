"""An engine that says what it is told to: plays token ids into a reply the way the real one would, step by step."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.api_call import ApiCall, open_chat, open_completion
from cluster.served_model import ServedModel
from engine import FinishReason, Request, TokenLogprob, TokenOutput
from tests.cluster import tiny_tokenizers

EOS = 1  # "</s>" of tiny_tokenizers.byte_level
MODEL = ServedModel(
    names=("tiny", "gpt-4o"),
    tokenizer=tiny_tokenizers.make(tiny_tokenizers.byte_level()),
    max_model_len=256,
    vocab_size=512,
    default_max_tokens=100,
    created=1_700_000_000,
    fingerprint="fp_test",
)
MODELS = {name: MODEL for name in MODEL.names}


def chat(**fields: Any) -> ApiCall:
    """A chat call; `model` and one user message unless given."""
    given = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
    return open_chat(json.dumps(given).encode(), MODELS)


def completion(**fields: Any) -> ApiCall:
    """A completion call; `model` and a prompt unless given."""
    return open_completion(json.dumps({"model": "tiny", "prompt": "Hello"} | fields).encode(), MODELS)


def tokens(text: str) -> list[int]:
    """What a model would draw for `text`."""
    return MODEL.tokenizer.encode(text, add_special_tokens=False)


@dataclass
class Played:
    """What came out: the frames of a stream, the requests that were to be aborted."""

    frames: bytes
    aborted: list[str] = field(default_factory=list)

    @property
    def events(self) -> list[Any]:
        """The JSON of every data frame but [DONE]."""
        lines = self.frames.decode().split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def outputs_of(request: Request, token_ids: Sequence[int], chunk: int) -> list[TokenOutput]:
    """The outputs of one request, `chunk` tokens each, ended as an engine ends them."""
    sampling = request.sampling
    token_ids = token_ids[: sampling.max_tokens]
    num_cached = 3 + int(request.request_id.rpartition("-")[2])  # a number of its own for each choice
    ended = token_ids[-1] in {EOS, *sampling.stop_token_ids}
    parts = [token_ids[i : i + chunk] for i in range(0, len(token_ids), chunk)]
    return [
        TokenOutput(
            request_id=request.request_id,
            token_ids=tuple(part),
            position=i * chunk,
            finish_reason=None if i + 1 < len(parts) else (FinishReason.STOP if ended else FinishReason.LENGTH),
            logprobs=None if sampling.logprobs is None else tuple(_logprob(t, sampling.logprobs) for t in part),
            num_cached_tokens=num_cached if i == 0 else 0,
        )
        for i, part in enumerate(parts)
    ]


def _logprob(token_id: int, num_top: int) -> TokenLogprob:
    top = [(token_id, -0.5), (tokens("x")[0], float("-inf")), (tokens("y")[0], -3.0)]
    return TokenLogprob(logprob=-0.5, top=tuple(top[:num_top]))


def play(call: ApiCall, scripts: Sequence[Sequence[int]], chunk: int = 1) -> Played:
    """Feed every request its script, all requests side by side, until the reply is done; [DONE] must come last."""
    pending = [outputs_of(request, script, chunk) for request, script in zip(call.requests, scripts, strict=True)]
    played = Played(call.reply.start())
    while any(pending):
        step = [outputs.pop(0) for outputs in pending if outputs]
        played.frames += call.reply.feed(step)
        played.aborted += call.reply.take_aborts()
    assert call.reply.done
    if call.stream:
        assert played.frames.endswith(b"data: [DONE]\n\n")
        assert played.frames.count(b"[DONE]") == 1
    return played

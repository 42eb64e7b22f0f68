"""What crosses the engine's port for one request: a `Request` in, `TokenOutput`s out.

All of it is frozen and knows token ids only: no text, no HTTP, no clock.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, NewType

from engine.errors import RequestError

RequestId = NewType("RequestId", str)


class FinishReason(StrEnum):
    """Why a request's last `TokenOutput` was its last."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. `validate` states the allowed ranges.

    `seed` and the position of a token are the only sources of randomness, so a request continued elsewhere draws
    the same tokens. `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filters off.
    `logprobs` is None for none, else the number of most likely alternatives wanted beside the drawn token.
    `stop_token_ids` end the request beside the model's own end-of-sequence ids, which `ignore_eos` switches off;
    neither kind is drawn before `min_tokens` tokens.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False

    def validate(self, vocab_size: int) -> None:
        """Raise `RequestError` naming the first field that is out of its range."""
        limits: tuple[tuple[str, float, float, float], ...] = (
            ("max_tokens", self.max_tokens, 1, float("inf")),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("temperature", self.temperature, 0, 2),
            ("top_k", self.top_k, 0, vocab_size),
            ("top_p", self.top_p, 1e-9, 1),
            ("min_p", self.min_p, 0, 1),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
            ("repetition_penalty", self.repetition_penalty, 1e-9, 1e9),
            ("logprobs", self.logprobs or 0, 0, 20),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise RequestError(f"{name} must be between {low:g} and {high:g}, but is {value:g}.", name)
        for token, bias in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}; the vocabulary is 0..{vocab_size - 1}.", "logit_bias"
                )
            if not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias of token {token} must be between -100 and 100, but is {bias:g}.", "logit_bias"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue. Requests of higher `priority` go first; equal ones in order of arrival.

    Prefix-cached blocks are shared only between requests of equal `cache_salt` (a tenant's name, for example).
    `trace_context` names the span that the request belongs to (a W3C `traceparent`); it is carried, not read.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: str = ""
    trace_context: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural-log probability of the drawn token and of the most likely `(token id, logprob)`s, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenOutput(NamedTuple):
    """What one step added to one request. A tuple: a step makes one per sequence, in a third of a dataclass's time.

    `position` is the index of `token_ids[0]` among the request's generated tokens, so that a receiver can tell a
    repeated or missing token. The last output of a request has a `finish_reason`; it may carry no token (abort).
    A token that ended the request by being an end-of-sequence or stop id is included.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    position: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    num_cached_tokens: int = 0

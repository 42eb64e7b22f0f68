"""`ApiCall`: one HTTP body turned into engine `Request`s and the `Reply` that their outputs will fill.

    call = open_chat(body, models)                  # or open_completion; raises ApiError
    submit every call.requests                      # none at all where the reply is done from the start
    write call.reply.start(), then for each step:
        write call.reply.feed(outputs)              # outputs of this call's requests
        abort every call.reply.take_aborts()        # those that hit a stop string
    until call.reply.done; without `stream`, answer call.reply.body()

The work is a template, an encoding and a few objects: CPU time in proportion to the prompt, no waiting.
"""

import hashlib
import secrets
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.api_error import ApiError
from cluster.choice import Choice
from cluster.prompt import check_token_id, encode_messages, encode_prompts, prompt_texts
from cluster.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from cluster.reply import Reply, ReplyHead
from cluster.reply_format import ChatFormat, CompletionFormat, ReplyFormat
from cluster.served_model import ServedModel, find_model
from cluster.stop_strings import StopStrings
from cluster.tokenizer import Tokenizer
from engine import Request, RequestError, RequestId, SamplingParams

_DEFAULT_COMPLETION_TOKENS = 16
# The smallest nucleus the engine knows; OpenAI allows 0, which means the same: the most likely token.
_SMALLEST_TOP_P = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiCall:
    """`requests` are what the engine runs, in order of the reply's choices; `reply` takes their outputs."""

    response_id: str
    model: ServedModel
    stream: bool
    requests: tuple[Request, ...]
    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What differs between the endpoints. `continues`: the answer goes on from the prompt's text.

    `limit_name` is the field that asked for `max_tokens`; a default, which nobody asked for, may be cut to what fits.
    """

    format: ReplyFormat
    prompts: Sequence[Sequence[int]]
    openings: Sequence[str]
    max_tokens: int
    limit_name: str | None
    num_logprobs: int | None
    prompt_name: str
    continues: bool


def open_chat(body: bytes, models: Mapping[str, ServedModel]) -> ApiCall:
    """POST /v1/chat/completions. `models` maps every name and alias; raises `ApiError`."""
    wire = ChatCompletionRequest.parse(body)
    model = find_model(models, wire.model)
    prompt = encode_messages(wire, model)
    asked = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
    name = _wire_name(wire, "max_tokens")
    if asked == 0:
        raise ApiError.invalid(f"{name} must be at least 1, but is 0.", name, "invalid_value")
    plan = _Plan(
        format=ChatFormat(wire.num_logprobs is not None, bool(wire.return_token_ids)),
        prompts=[prompt],
        openings=[""],
        max_tokens=model.default_max_tokens if asked is None else asked,
        limit_name=None if asked is None else name,
        num_logprobs=wire.num_logprobs,
        prompt_name="messages",
        continues=False,
    )
    return _open(wire, model, plan)


def open_completion(body: bytes, models: Mapping[str, ServedModel]) -> ApiCall:
    """POST /v1/completions. `models` maps every name and alias; raises `ApiError`."""
    wire = CompletionRequest.parse(body)
    model = find_model(models, wire.model)
    prompts = encode_prompts(wire, model)
    plan = _Plan(
        format=CompletionFormat(wire.num_logprobs is not None, bool(wire.return_token_ids)),
        prompts=prompts,
        openings=prompt_texts(wire, model) if wire.echo else [""] * len(prompts),
        max_tokens=_DEFAULT_COMPLETION_TOKENS if wire.max_tokens is None else wire.max_tokens,
        limit_name=None if wire.max_tokens is None else "max_tokens",
        num_logprobs=wire.num_logprobs,
        prompt_name="prompt",
        continues=True,
    )
    return _open(wire, model, plan)


def derive_seed(seed: int, choice: int) -> int:
    """The seed of one of `n` choices: the first has the request's own, so `n=1` equals the first of several."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<qq", seed, choice), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _open(wire: GenerationRequest, model: ServedModel, plan: _Plan) -> ApiCall:
    num_choices = wire.n or 1
    if len(plan.prompts) * num_choices > model.max_requests:
        message = (
            f"{len(plan.prompts)} prompts times n={num_choices} exceeds the {model.max_requests} answers of one call."
        )
        raise ApiError.invalid(message, "n")
    response_id = plan.format.id_prefix + secrets.token_hex(16)
    sampling = _sampling(wire, model, plan)
    requests: list[Request] = []
    choices: list[tuple[RequestId, Choice]] = []
    for prompt, opening in zip(plan.prompts, plan.openings, strict=True):
        fitted = _fit(sampling, len(prompt), model, plan)
        seed = secrets.randbits(63) if wire.seed is None else wire.seed
        token_ids = tuple(prompt)
        for i in range(num_choices):
            request = Request(
                request_id=RequestId(f"{response_id}-{len(choices)}"),
                prompt_token_ids=token_ids,
                sampling=replace(fitted, seed=derive_seed(seed, i)),
                priority=-(wire.priority or 0),  # on the wire, as in vLLM, lower goes first
                cache_salt=wire.cache_salt or "",
            )
            choice = _choice(wire, model.tokenizer, request, len(choices), opening, plan.continues)
            choices.append((request.request_id, choice))
            requests.append(request)
    reply = Reply(
        ReplyHead(response_id=response_id, created=int(time.time()), model=wire.model, fingerprint=model.fingerprint),
        plan.format,
        choices,
        [len(prompt) for prompt in plan.prompts],
        stream=bool(wire.stream),
        include_usage=wire.include_usage,
        max_tokens=plan.max_tokens,
    )
    return ApiCall(
        response_id=response_id,
        model=model,
        stream=bool(wire.stream),
        requests=tuple(requests) if plan.max_tokens else (),
        reply=reply,
    )


def _sampling(wire: GenerationRequest, model: ServedModel, plan: _Plan) -> SamplingParams:
    """The engine's parameters, checked, before they are fitted to a prompt; nothing given means the default."""
    given = {
        "temperature": wire.temperature,
        "top_p": _SMALLEST_TOP_P if wire.top_p == 0 else wire.top_p,
        "min_p": wire.min_p,
        "presence_penalty": wire.presence_penalty,
        "frequency_penalty": wire.frequency_penalty,
        "repetition_penalty": wire.repetition_penalty,
        "min_tokens": wire.min_tokens,
        "ignore_eos": wire.ignore_eos,
        # vLLM's "off" is -1 or 0; more than there are tokens is off too
        "top_k": None if wire.top_k is None or wire.top_k == -1 or wire.top_k > model.vocab_size else wire.top_k,
    }
    for token_id in wire.stop_token_ids or ():
        check_token_id(token_id, model, "stop_token_ids")
    sampling = SamplingParams(
        max_tokens=plan.max_tokens,
        logprobs=plan.num_logprobs,
        logit_bias=tuple((wire.logit_bias or {}).items()),
        stop_token_ids=frozenset(wire.stop_token_ids or ()),
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    if plan.max_tokens == 0:
        return sampling
    try:
        sampling.validate(model.vocab_size)
    except RequestError as error:
        name = error.parameter or ""
        wire_name = _wire_name(wire, name)
        message = error.message.replace(name, wire_name, 1)
        raise ApiError.invalid(message, wire_name or None, error.code or "invalid_value") from None
    return sampling


def _fit(sampling: SamplingParams, num_prompt_tokens: int, model: ServedModel, plan: _Plan) -> SamplingParams:
    """The same within what the context window leaves after the prompt; raises `ApiError` for more than that asked."""
    room = model.max_model_len - num_prompt_tokens
    if room < min(1, sampling.max_tokens):
        raise ApiError.prompt_too_long(num_prompt_tokens, model.max_model_len, plan.prompt_name)
    if plan.limit_name is not None and sampling.max_tokens > room:
        raise ApiError.too_many_tokens(num_prompt_tokens, sampling.max_tokens, model.max_model_len, plan.limit_name)
    return replace(sampling, max_tokens=min(sampling.max_tokens, room), min_tokens=min(sampling.min_tokens, room))


def _choice(
    wire: GenerationRequest, tokenizer: Tokenizer, request: Request, index: int, opening: str, continues: bool
) -> Choice:
    include_stop = bool(wire.include_stop_str_in_output)
    return Choice(
        index,
        tokenizer.vocabulary,
        tokenizer.detokenizer(
            skip_special_tokens=wire.skip_special_tokens is not False,
            after=request.prompt_token_ids if continues else (),
        ),
        StopStrings(wire.stop_strings, include_stop),
        min_tokens=request.sampling.min_tokens,
        shown_stop_ids=request.sampling.stop_token_ids if include_stop else frozenset(),
        opening=opening,
    )


def _wire_name(wire: GenerationRequest, parameter: str) -> str:
    """What the client calls one of the engine's parameters."""
    if not isinstance(wire, ChatCompletionRequest):
        return parameter
    max_tokens = "max_tokens" if wire.max_completion_tokens is None else "max_completion_tokens"
    return {"max_tokens": max_tokens, "logprobs": "top_logprobs"}.get(parameter, parameter)

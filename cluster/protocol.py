"""The wire: pydantic models of POST /v1/chat/completions and /v1/completions, OpenAI's fields and vLLM's extras.

Types are strict (a boolean is no integer, a string no number) and null always means "not given". Unknown fields are
tolerated, because clients add some; fields that would change the answer and are not implemented are refused by
name, never ignored. Ranges of sampling parameters are the engine's (`SamplingParams.validate`), not repeated here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from cluster.api_error import ApiError

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_PROMPTS = 2048

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _string_or_list(value: object) -> str | None:
    """Which of the two, as the marked tag of a union; pydantic's own union errors list every branch."""
    return "<string>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _prompt_form(value: object) -> str | None:
    """A list is what its first element says, so that errors name the odd one out."""
    if not isinstance(value, list):
        return "<string>" if isinstance(value, str) else None
    if value and isinstance(value[0], str):
        return "<strings>"
    return "<token lists>" if value and isinstance(value[0], list) else "<tokens>"


class TextPart(BaseModel):
    """One part of a message's content. Only text: this server has no multimodal models."""

    model_config = ConfigDict(strict=True, frozen=True)
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[TextPart], Tag("<list>")],
    Discriminator(
        _string_or_list, custom_error_type="content", custom_error_message="must be a string or a list of text parts"
    ),
]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("<list>")],
    Discriminator(
        _string_or_list, custom_error_type="stop", custom_error_message="must be a string or a list of strings"
    ),
]
Tokens = Annotated[list[int], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("<strings>")]
    | Annotated[Tokens, Tag("<tokens>")]
    | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS), Tag("<token lists>")],
    Discriminator(
        _prompt_form,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class ChatMessage(BaseModel):
    """One turn. Tool calls and other fields of a turn (`reasoning_content`, ...) are kept for the chat template."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(strict=True, frozen=True)
    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both endpoints share. `refused` maps fields to the values that ask for nothing, beside empty ones."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "response_format": ({"type": "text"},),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
        "use_beam_search": (),
        "prompt_logprobs": (),
        "logits_processors": (),
        "bad_words": (),
        "allowed_token_ids": (),
        "truncate_prompt_tokens": (),
    }

    model: str
    max_tokens: Int32 | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Int64 | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    # vLLM's extras
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Int32] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Int32 | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request in a JSON body; raises `ApiError` (400) naming the first field that is wrong."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise ApiError.from_validation(error) from None
        request.check()
        return request

    def check(self) -> None:
        """What types cannot say: combinations of fields, and fields that are not implemented."""
        for name, value in (self.model_extra or {}).items():
            accepted = self.refused.get(name)
            if value and accepted is not None and value not in accepted:
                raise ApiError.invalid(f"{name} is not supported by this server.", name, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise ApiError.invalid("stream_options is only allowed when stream is true.", "stream_options")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.refused,
        "tools": (),
        "tool_choice": ("none", "auto"),
        "functions": (),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "documents": (),
        "chat_template": (),
        "continue_final_message": (),
        "echo": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """See `GenerationRequest.check`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError.invalid("top_logprobs is only allowed when logprobs is true.", "top_logprobs")

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each drawn token; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {**GenerationRequest.refused, "suffix": ()}

    prompt: Prompt
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Int32 | None = None

    def check(self) -> None:
        """See `GenerationRequest.check`."""
        super().check()
        if not self.prompt and isinstance(self.prompt, list):
            raise ApiError.invalid("prompt must not be an empty list.", "prompt")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError.invalid("best_of is not supported by this server; leave it out.", "best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError.invalid(
                "echo together with logprobs is not supported: log probabilities of the prompt are not computed.",
                "echo",
                "unsupported_parameter",
            )

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each drawn token; None for no log probabilities at all."""
        return self.logprobs

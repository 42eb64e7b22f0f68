"""`ApiError`: every error a client can see, in OpenAI's shape, in one place.

Status, type and code follow what the official SDKs and their wrappers match on (`context_length_exceeded`,
`model_not_found`, ...). One error has two forms: a whole HTTP body, and a frame inside a stream that has already
begun. It knows no HTTP library: the ingress copies `status`, `headers` and `body()`.
"""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Self

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine import EngineDeadError, NanoserveError, RequestError

_SHOWN_INPUT_CHARACTERS = 60


class ApiError(NanoserveError):
    """An answer that is not 2xx.

    `param` is the path of the offending field ("messages[0].content"). `headers` hold `Retry-After` where waiting
    helps, and `x-should-retry: false`, which the SDKs obey, where repeating the request cannot help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The HTTP body: all four fields are always present, as OpenAI's schema requires."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode(errors="replace")

    def frame(self) -> bytes:
        """The same inside a stream. SDKs raise on it; a stream that merely ends would pass for a complete answer."""
        return b"data: " + self.body() + b"\n\n"

    @classmethod
    def invalid(cls, message: str, param: str | None = None, code: str | None = None) -> Self:
        """400: the request can never work as it is."""
        return cls(HTTPStatus.BAD_REQUEST, message, param=param, code=code)

    @classmethod
    def prompt_too_long(cls, num_prompt_tokens: int, max_model_len: int, param: str) -> Self:
        """400 with the wording and code that LiteLLM, aider, LangChain and KramaBench recognise."""
        return cls.invalid(
            f"This model's maximum context length is {max_model_len} tokens. However, your {param} resulted in "
            f"{num_prompt_tokens} tokens, which leaves no room for a completion. Please reduce the length of the "
            f"{param}.",
            param,
            "context_length_exceeded",
        )

    @classmethod
    def too_many_tokens(cls, num_prompt_tokens: int, max_tokens: int, max_model_len: int, param: str) -> Self:
        """400, recognised like the above: prompt and requested answer together exceed the context."""
        return cls.invalid(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the prompt, {max_tokens} in the "
            f"completion). Please reduce the prompt or {param}.",
            param,
            "context_length_exceeded",
        )

    @classmethod
    def model_not_found(cls, name: str) -> Self:
        """404: no such model is served."""
        message = f"The model `{name}` does not exist or you do not have access to it."
        return cls(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")

    @classmethod
    def not_found(cls, path: str) -> Self:
        """404: no such URL."""
        return cls(HTTPStatus.NOT_FOUND, f"Unknown URL: {path}.", code="unknown_url")

    @classmethod
    def method_not_allowed(cls, method: str, path: str) -> Self:
        """405: the URL exists for another method."""
        return cls(HTTPStatus.METHOD_NOT_ALLOWED, f"{method} is not allowed for {path}.", code="method_not_allowed")

    @classmethod
    def body_too_large(cls, max_bytes: int) -> Self:
        """413: the body was not read to its end."""
        message = f"The request body is larger than the {max_bytes} bytes this server accepts."
        return cls(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="request_too_large")

    @classmethod
    def unavailable(cls, message: str, retry_after_s: float = 1.0) -> Self:
        """503: nothing can serve the request at this moment."""
        headers = _retry_after(retry_after_s)
        return cls(503, message, type="service_unavailable_error", code="service_unavailable", headers=headers)

    @classmethod
    def internal(cls) -> Self:
        """500: a fault of ours. The cause belongs in the log, not in the answer."""
        message = "The server had an error while processing your request."
        headers = {"x-should-retry": "false"}
        return cls(500, message, type="server_error", code="internal_error", headers=headers)

    @classmethod
    def of(cls, error: BaseException) -> "ApiError":
        """The answer for any exception; one that is not known is an internal error."""
        match error:
            case ApiError():
                return error
            case RequestError():
                return cls.invalid(error.message, error.parameter, error.code)
            case EngineDeadError():
                return cls.unavailable("The model stopped working and is being restarted. Please try again.")
            case _:
                return cls.internal()

    @classmethod
    def from_validation(cls, error: ValidationError) -> Self:
        """400 for the first thing wrong with a body; `param` is its path."""
        details = error.errors(include_url=False, include_context=False)
        first = details[0]
        path = _field_path(first["loc"])
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        return cls.invalid(_explain(path, first), path or None, code)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.status, self.message, self.type, self.param, self.code, self.headers)


def _rebuild(
    status: int, message: str, type: str, param: str | None, code: str | None, headers: dict[str, str]
) -> ApiError:
    return ApiError(status, message, type=type, param=param, code=code, headers=headers)


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds for HTTP, and the milliseconds that OpenAI's SDKs prefer."""
    return {"Retry-After": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, round(seconds * 1000)))}


def _field_path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "<parts>", 1) -> "messages[0].content[1]"; "<..>", "[key]" are pydantic's."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith(("<", "[")):
            path += f".{step}" if path else step
    return path


def _explain(path: str, details: ErrorDetails) -> str:
    """A sentence that names the field, what it must be and what it is."""
    kind, message = details["type"], details["msg"]
    if kind == "json_invalid":
        return f"The request body is not valid JSON ({message.removeprefix('Invalid JSON: ')})."
    if not path:
        return "The request body must be a JSON object."
    if kind == "missing":
        return f"{path} is required."
    shown = json.dumps(details["input"], ensure_ascii=False, default=str)
    if len(shown) > _SHOWN_INPUT_CHARACTERS:
        shown = shown[:_SHOWN_INPUT_CHARACTERS] + "..."
    if message.startswith(("Input should be ", "must ")):
        return f"{path} must {message.removeprefix('Input should ').removeprefix('must ')}, but is {shown}."
    return f"{path} is invalid: {message} (it is {shown})."

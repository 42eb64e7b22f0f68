"""`LoadTarget`: one OpenAI-compatible endpoint as a load generator sees it: where to send what, and what it serves."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp

from engine import ConfigError


class Endpoint(StrEnum):
    """Which of the two generating endpoints gets the load."""

    COMPLETIONS = "completions"
    CHAT = "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTarget:
    """`url` ends in /v1. `extra` fields are added to every request and win over ours.

    `exact_lengths` asks for exactly the planned number of output tokens with `ignore_eos` and `min_tokens`, which
    OpenAI's own API does not know.
    """

    url: str
    model: str
    endpoint: Endpoint = Endpoint.COMPLETIONS
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    exact_lengths: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def request_url(self) -> str:
        """Where requests go."""
        return f"{self.url}/chat/completions" if self.endpoint is Endpoint.CHAT else f"{self.url}/completions"

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Content-Type": "application/json", **authorization(self.api_key)}

    def body(self, prompt: list[int] | str, num_output_tokens: int) -> bytes:
        """The JSON of one streaming request."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": num_output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.exact_lengths:
            fields |= {"ignore_eos": True, "min_tokens": num_output_tokens}
        if self.endpoint is Endpoint.CHAT:
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        return json.dumps(fields | self.extra, separators=(",", ":")).encode()


def api_url(url: str) -> str:
    """`url` with a scheme and with /v1 at its end, whether or not it had them."""
    url = url.rstrip("/")
    url = url if "://" in url else f"http://{url}"
    return url if url.endswith("/v1") else f"{url}/v1"


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key, if there is one."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


async def find_model(url: str, api_key: str | None) -> str:
    """The first model that `url`/models lists; raises `ConfigError` where there is none or nobody answers."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
            session.get(f"{url}/models", headers=authorization(api_key)) as response,
        ):
            text = await response.text()
            if response.status != 200:
                raise ConfigError(f"GET {url}/models answered {response.status}: {text[:300]}")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConfigError(f"No OpenAI-compatible server answers at {url}: {error or type(error).__name__}.") from error
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise ConfigError(f"GET {url}/models lists no model; name one with --model. It says: {text[:300]}") from error

"""`ServedModel`: what the API needs to know of a model: its names, its tokenizer and its limits.

Requests name a model by any of its names; aliases let clients with a built-in model name (`gpt-4o`) work.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.api_error import ApiError
from cluster.tokenizer import Tokenizer
from engine import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`names[0]` is the model's own name. `max_model_len` bounds prompt plus completion, in tokens.

    `vocab_size` is the model's (rows of its embedding), not the tokenizer's. `default_max_tokens` bounds a chat
    answer where the client gives no limit; `max_requests` the engine requests (prompts times `n`) of one call.
    `created` is a Unix time in seconds, `fingerprint` the `system_fingerprint` of every reply.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    default_max_tokens: int = 1024
    max_requests: int = 2048
    created: int = 0
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("A served model needs at least one name.")
        if self.default_max_tokens < 1:
            raise ConfigError(f"default_max_tokens must be at least 1, but is {self.default_max_tokens}.")


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """The model of that name or alias; raises `ApiError` (404)."""
    model = models.get(name)
    if model is None:
        raise ApiError.model_not_found(name)
    return model


def model_card(model: ServedModel, name: str) -> dict[str, object]:
    """The answer to GET /v1/models/{name}."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "nanoserve",
        "root": model.names[0],
        "parent": None if name == model.names[0] else model.names[0],
        "max_model_len": model.max_model_len,
    }


def model_list(models: Iterable[ServedModel]) -> bytes:
    """The body of GET /v1/models: each model under each of its names."""
    cards = [model_card(model, name) for model in models for name in model.names]
    return json.dumps({"object": "list", "data": cards}, ensure_ascii=False).encode()

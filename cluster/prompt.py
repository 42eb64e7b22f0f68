"""Prompts as the engine wants them: from the messages of a chat, and from the four forms a completion's prompt has.

Chat templates were written for plain dictionaries with one text per message; `encode_messages` makes those. Every
function raises `ApiError` (400) naming the field that does not fit.
"""

import json
from collections.abc import Sequence
from typing import Any

from cluster.api_error import ApiError
from cluster.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest
from cluster.served_model import ServedModel


def encode_messages(wire: ChatCompletionRequest, model: ServedModel) -> list[int]:
    """The token ids of a conversation, ready to be answered."""
    messages = [_template_message(message) for message in wire.messages]
    add_generation_prompt = wire.add_generation_prompt is not False
    token_ids = model.tokenizer.encode_chat(messages, add_generation_prompt, wire.chat_template_kwargs)
    if not token_ids:
        raise ApiError.invalid("messages are empty once the chat template has rendered them.", "messages")
    return _check_ids(token_ids, model, "messages")


def encode_prompts(wire: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """The token ids of each prompt."""
    return [
        _encode_text(item, model, where) if isinstance(item, str) else _check_ids(item, model, where)
        for where, item in _prompt_items(wire)
    ]


def prompt_texts(wire: CompletionRequest, model: ServedModel) -> list[str]:
    """Each prompt as text, for an echo: as it came, or decoded."""
    return [item if isinstance(item, str) else model.tokenizer.decode(item) for _, item in _prompt_items(wire)]


def check_token_id(token_id: int, model: ServedModel, where: str) -> None:
    """Raise `ApiError` unless the model has an embedding for the token."""
    if not 0 <= token_id < model.vocab_size:
        message = f"{where} names token {token_id}; the vocabulary is 0..{model.vocab_size - 1}."
        raise ApiError.invalid(message, where, "invalid_value")


def _prompt_items(wire: CompletionRequest) -> Sequence[tuple[str, str | list[int]]]:
    """The prompts, however many, each with its path in the body."""
    prompt: Any = wire.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [("prompt", prompt)]
    return [(f"prompt[{i}]", item) for i, item in enumerate(prompt)]


def _encode_text(text: str, model: ServedModel, where: str) -> list[int]:
    """Token ids of one text; an empty one is what the tokenizer begins a text with."""
    token_ids = model.tokenizer.encode(text)
    if not token_ids and model.tokenizer.bos_token_id is not None:
        token_ids = [model.tokenizer.bos_token_id]
    if not token_ids:
        message = f"{where} is empty, and this model has no token to begin a text with; give at least one character."
        raise ApiError.invalid(message, where, "invalid_value")
    return _check_ids(token_ids, model, where)


def _check_ids(token_ids: list[int], model: ServedModel, where: str) -> list[int]:
    """`token_ids`, if the model has an embedding for each of them."""
    if min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
        for i, token_id in enumerate(token_ids):
            check_token_id(token_id, model, f"{where}[{i}]" if where != "messages" else where)
    return token_ids


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates expect it: content as one text, arguments of tool calls as objects."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    # Null content becomes "": templates test it for truth, and some search in it.
    fields = {"role": message.role, **(message.model_extra or {}), "content": content or ""}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [_template_tool_call(call) for call in message.tool_calls]
    return fields


def _template_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """The wire carries the arguments as a string of JSON; templates print them with `tojson`."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # no JSON, or nested deeper than anything could print
        return call
    return {**call, "function": {**function, "arguments": arguments}}

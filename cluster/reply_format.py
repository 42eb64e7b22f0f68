"""How a reply looks as JSON: `ChatFormat` and `CompletionFormat`, whole bodies and single chunks.

A chunk is written for every token that any client reads, so it is put together from prepared strings; only the
text goes through the JSON encoder. Both formats know `Delta`s and nothing of requests or engines.
"""

import json
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.choice import Delta, LogprobEntry, RankedToken

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ReplyFormat(Protocol):
    """One endpoint's shapes. `first` marks the first chunk of a choice."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def chunk_choice(self, index: int, delta: Delta, first: bool) -> str:
        """The JSON of one entry of a chunk's `choices`."""

    def choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """One entry of a whole body's `choices`."""


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, with_logprobs: bool, with_token_ids: bool) -> None:
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids

    def chunk_choice(self, index: int, delta: Delta, first: bool) -> str:
        """See `ReplyFormat.chunk_choice`. The role is sent once, for SDKs concatenate repeated strings."""
        if first:
            content = f'"role":"assistant","content":{to_json(delta.text)}'
        else:
            content = f'"content":{to_json(delta.text)}' if delta.text else ""
        logprobs = to_json(_chat_logprobs(delta.entries)) if self._with_logprobs else "null"
        return (
            f'{{"index":{index},"delta":{{{content}}},"logprobs":{logprobs},'
            f'"finish_reason":{_finish_reason(delta)}{_token_ids(delta) if self._with_token_ids else ""}}}'
        )

    def choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `ReplyFormat.choice`."""
        whole = _join(deltas)
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": _chat_logprobs(whole.entries) if self._with_logprobs else None,
            "finish_reason": whole.finish_reason,
        }
        return choice | ({"token_ids": whole.token_ids} if self._with_token_ids else {})


class CompletionFormat:
    """text_completion, which chunks and whole bodies share."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, with_logprobs: bool, with_token_ids: bool) -> None:
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids

    def chunk_choice(self, index: int, delta: Delta, first: bool) -> str:
        """See `ReplyFormat.chunk_choice`."""
        logprobs = to_json(_completion_logprobs(delta.entries)) if self._with_logprobs else "null"
        return (
            f'{{"index":{index},"text":{to_json(delta.text)},"logprobs":{logprobs},'
            f'"finish_reason":{_finish_reason(delta)}{_token_ids(delta) if self._with_token_ids else ""}}}'
        )

    def choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `ReplyFormat.choice`."""
        whole = _join(deltas)
        choice = {
            "index": index,
            "text": whole.text,
            "logprobs": _completion_logprobs(whole.entries) if self._with_logprobs else None,
            "finish_reason": whole.finish_reason,
        }
        return choice | ({"token_ids": whole.token_ids} if self._with_token_ids else {})


def _join(deltas: Sequence[Delta]) -> Delta:
    """A whole answer as one delta."""
    return Delta(
        text="".join(delta.text for delta in deltas),
        entries=tuple(entry for delta in deltas for entry in delta.entries),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        finish_reason=deltas[-1].finish_reason if deltas else None,
    )


def _finish_reason(delta: Delta) -> str:
    return f'"{delta.finish_reason.value}"' if delta.finish_reason is not None else "null"


def _token_ids(delta: Delta) -> str:
    return f',"token_ids":{to_json(delta.token_ids)}'


def _chat_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any]:
    content = [_chat_token(entry.drawn) | {"top_logprobs": [*map(_chat_token, entry.top)]} for entry in entries]
    return {"content": content, "refusal": None}


def _chat_token(token: RankedToken) -> dict[str, Any]:
    return {"token": token.label, "logprob": token.logprob, "bytes": list(token.raw)}


def _completion_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any]:
    """The legacy columns. `top_logprobs` always names the drawn token: clients take the maximum of each entry."""
    return {
        "text_offset": [entry.text_offset for entry in entries],
        "token_logprobs": [entry.drawn.logprob for entry in entries],
        "tokens": [entry.drawn.label for entry in entries],
        "top_logprobs": [{token.label: token.logprob for token in (*entry.top, entry.drawn)} for entry in entries],
    }

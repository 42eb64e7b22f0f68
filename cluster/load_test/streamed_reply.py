"""`StreamedReply`: reads one server-sent-event stream of a completion and notes when its output came.

Made to be cheap: it is fed raw bytes as they arrive and keeps numbers, not text. Output that arrives in one read came
at one time, whatever number of chunks it was sent in.
"""

import json
from array import array
from typing import Any


class StreamedReply:
    """Feed it every read with the time of the read; afterwards its attributes tell what happened.

    `gaps` are the seconds between successive arrivals of output. Token counts are None without a usage chunk.
    """

    def __init__(self) -> None:
        self.first_output_at: float | None = None
        self.last_output_at: float | None = None
        self.gaps = array("d")
        self.num_output_chunks = 0
        self.num_prompt_tokens: int | None = None
        self.num_cached_tokens = 0
        self.num_output_tokens: int | None = None
        self.error: str | None = None
        self.is_done = False
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take what one read brought, at `now` seconds."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        has_output = False
        for line in lines:
            if line.startswith(b"data:"):
                has_output |= self._take(line[5:].strip())
        if not has_output:
            return
        if self.last_output_at is None:
            self.first_output_at = now
        else:
            self.gaps.append(now - self.last_output_at)
        self.last_output_at = now

    def _take(self, event: bytes) -> bool:
        """Whether the event carries output."""
        if event == b"[DONE]":
            self.is_done = True
            return False
        try:
            chunk = json.loads(event)
            self._take_usage(chunk)
            has_output = any(_has_output(choice) for choice in chunk.get("choices", ()))
        except (ValueError, TypeError, AttributeError, KeyError):
            self.error = self.error or f"malformed event: {event[:100]!r}"
            return False
        self.num_output_chunks += has_output
        return has_output

    def _take_usage(self, chunk: dict[str, Any]) -> None:
        failure = chunk.get("error")
        if failure:
            code = (failure.get("code") or failure.get("type")) if isinstance(failure, dict) else failure
            self.error = f"error event: {code}"
        usage = chunk.get("usage")
        if usage:
            self.num_prompt_tokens = int(usage["prompt_tokens"])
            self.num_output_tokens = int(usage["completion_tokens"])
            self.num_cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def _has_output(choice: dict[str, Any]) -> bool:
    """Text, reasoning or a tool call; an opening chunk with only a role has none, a closing one counts as output."""
    if choice.get("text") or choice.get("finish_reason"):
        return True
    delta = choice.get("delta") or {}
    return any(value for key, value in delta.items() if key != "role")

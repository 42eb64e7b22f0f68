"""`Reply`: the answer to one API call, put together from the outputs of its engine requests.

`feed` takes one step's outputs and gives the server-sent-event frames to write, all of a step in one piece;
`body` gives the whole answer where the client did not ask for a stream. It performs no input or output and holds no
clock, so it works the same under any server.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.choice import Choice, Delta
from cluster.reply_format import ReplyFormat, to_json
from engine import RequestId, TokenOutput

DONE_FRAME = b"data: [DONE]\n\n"
KEEP_ALIVE_FRAME = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one call. A prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's CompletionUsage."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What every object of a reply begins with. `created` is a Unix time in seconds."""

    response_id: str
    created: int
    model: str
    fingerprint: str | None = None

    def to_dict(self, object_name: str) -> dict[str, Any]:
        """The head of a reply object of that kind."""
        head = {"id": self.response_id, "object": object_name, "created": self.created, "model": self.model}
        return head | ({"system_fingerprint": self.fingerprint} if self.fingerprint else {})


class Reply:
    """`choices` has an entry per engine request, in order: prompt by prompt, `n` choices each.

    `max_tokens` 0 means that nothing is sent to an engine: the reply is complete from the start.
    """

    def __init__(
        self,
        head: ReplyHead,
        format: ReplyFormat,
        choices: Sequence[tuple[RequestId, Choice]],
        prompt_lengths: Sequence[int],
        *,
        stream: bool,
        include_usage: bool,
        max_tokens: int,
    ) -> None:
        self._head = head
        self._format = format
        self._choices = dict(choices)
        self._prompt_lengths = tuple(prompt_lengths)
        self._stream = stream
        self._include_usage = include_usage
        self._aborts: list[RequestId] = []
        self._num_open = len(self._choices)
        self._started: set[int] = set()
        self._deltas: dict[int, list[Delta]] = {choice.index: [] for choice in self._choices.values()}
        self._chunk_prefix = "data: " + to_json(head.to_dict(format.chunk_object_name))[:-1] + ',"choices":['
        self._opening = self._take((choice, choice.open(max_tokens)) for choice in self._choices.values())

    @property
    def done(self) -> bool:
        """Whether every choice is finished."""
        return self._num_open == 0

    def start(self) -> bytes:
        """Frames to write before any output: an echoed prompt, or everything where nothing is to be generated."""
        return self._opening

    def feed(self, outputs: Iterable[TokenOutput]) -> bytes:
        """Take one step's outputs of this call; the frames to write, b"" for none. Finished choices take no more.

        Raises what `Choice.feed` raises; `ApiError.of` turns that into the frame that ends the stream.
        """
        return self._take(self._advance(outputs))

    def take_aborts(self) -> list[RequestId]:
        """Requests that a stop string ended since the last call and that the engine still runs."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def body(self) -> bytes:
        """The whole answer; only once `done`, and only if it was not streamed."""
        assert self.done and not self._stream, "the reply is not complete, or it was streamed"
        choices = [self._format.choice(index, deltas) for index, deltas in sorted(self._deltas.items())]
        body = self._head.to_dict(self._format.object_name) | {"choices": choices, "usage": self.usage().to_dict()}
        return to_json(body).encode()

    def usage(self) -> Usage:
        """Tokens so far."""
        choices = sorted(self._choices.values(), key=lambda choice: choice.index)
        num_choices_each = max(1, len(choices) // max(1, len(self._prompt_lengths)))
        firsts = choices[::num_choices_each]
        # After a failover the cache may hold generated tokens too; those are no part of the prompt.
        num_cached = (min(n, first.num_cached_tokens) for n, first in zip(self._prompt_lengths, firsts, strict=True))
        return Usage(
            num_prompt_tokens=sum(self._prompt_lengths),
            num_completion_tokens=sum(choice.num_tokens for choice in choices),
            num_cached_tokens=sum(num_cached),
        )

    def _advance(self, outputs: Iterable[TokenOutput]) -> Iterable[tuple[Choice, Delta | None]]:
        for output in outputs:
            choice = self._choices.get(output.request_id)
            if choice is None or choice.finish_reason is not None:
                continue
            delta = choice.feed(output)
            if choice.must_abort:
                self._aborts.append(output.request_id)
            yield choice, delta

    def _take(self, deltas: Iterable[tuple[Choice, Delta | None]]) -> bytes:
        """Keep or render the deltas, and close the reply with the last of them."""
        frames: list[str] = []
        num_open = self._num_open
        for choice, delta in deltas:
            if delta is None:
                continue
            if delta.finish_reason is not None:
                self._num_open -= 1
            if self._stream:
                frames.append(self._chunk(choice.index, delta))
            else:
                self._deltas[choice.index].append(delta)
        if not self._stream:
            return b""
        closing = self._close() if num_open and self.done else b""
        return "".join(frames).encode() + closing

    def _chunk(self, index: int, delta: Delta) -> str:
        first = index not in self._started
        self._started.add(index)
        return f"{self._chunk_prefix}{self._format.chunk_choice(index, delta, first)}]}}\n\n"

    def _close(self) -> bytes:
        if not self._include_usage:
            return DONE_FRAME
        usage = to_json(self.usage().to_dict())
        return f'{self._chunk_prefix}],"usage":{usage}}}\n\n'.encode() + DONE_FRAME

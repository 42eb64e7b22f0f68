"""`Choice`: one of a reply's answers as it grows, from token outputs to what a reader may see.

It puts together the detokenizer, the stop strings and the log probabilities: a log probability is released with the
text of its token, and one whose text a stop string cut away is not released at all. It knows no JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.api_error import ApiError
from cluster.detokenizer import IncrementalDetokenizer
from cluster.stop_strings import StopStrings
from cluster.vocabulary import Vocabulary
from engine import FinishReason, NanoserveError, TokenLogprob, TokenOutput

# OpenAI's value for "not worth a number"; JSON has no infinity.
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedToken:
    """A token with its log probability, as readers see tokens."""

    label: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobEntry:
    """The drawn token, the most likely ones, best first, and where in the choice's text (characters) it begins."""

    drawn: RankedToken
    top: tuple[RankedToken, ...]
    text_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added for the reader. The last one has a `finish_reason`."""

    text: str
    entries: tuple[LogprobEntry, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


class Choice:
    """Fed with the outputs of one engine request. `opening` is shown before them (the prompt, where it is echoed).

    Stop strings count once more than `min_tokens` tokens are there, as the engine draws no end of sequence before.
    A token of `shown_stop_ids` that ended the request is part of the text; any other such token is not.
    """

    def __init__(
        self,
        index: int,
        vocabulary: Vocabulary,
        detokenizer: IncrementalDetokenizer,
        stop_strings: StopStrings,
        *,
        min_tokens: int = 0,
        shown_stop_ids: frozenset[int] = frozenset(),
        opening: str = "",
    ) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.must_abort = False
        self._vocabulary = vocabulary
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._min_tokens = min_tokens
        self._shown_stop_ids = shown_stop_ids
        self._opening = opening
        self._num_characters = self._num_shown = len(opening)
        self._entries: list[LogprobEntry] = []
        self._token_ids: list[int] = []

    def open(self, max_tokens: int) -> Delta | None:
        """What is there before any output; with `max_tokens` 0 it is also all."""
        if max_tokens == 0:
            self.finish_reason = FinishReason.LENGTH
        if not self._opening and self.finish_reason is None:
            return None
        return Delta(text=self._opening, finish_reason=self.finish_reason)

    def feed(self, output: TokenOutput) -> Delta | None:
        """Take one step's output; None where the reader sees nothing new. `must_abort` is set by a stop string.

        Tokens that came before are dropped. Raises `ApiError` (503) where the engine gave the request up, and
        `NanoserveError` where tokens are missing.
        """
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        num_repeated = self.num_tokens - output.position
        if num_repeated < 0:
            raise NanoserveError(f"{output.request_id}: {-num_repeated} tokens before {output.position} are missing.")
        if output.finish_reason is FinishReason.ABORT:
            raise ApiError.unavailable("The server gave up this request before it was complete. Please try again.")
        text = self._add_tokens(output, num_repeated)
        cut = self.finish_reason is not None
        if output.finish_reason is not None and not cut:
            text += self._show(self._detokenizer.flush())
            cut = self.finish_reason is not None
            if not cut:
                text += self._stop_strings.flush()
                self.finish_reason = output.finish_reason
        self.must_abort = self.finish_reason is not None and output.finish_reason is None
        if not text and self.finish_reason is None:
            return None
        complete = self.finish_reason is not None and not cut
        due = len(self._entries) if complete else _count_before(self._entries, self._num_shown)
        entries, self._entries = tuple(self._entries[:due]), self._entries[due:]
        token_ids, self._token_ids = tuple(self._token_ids), []
        return Delta(text=text, entries=entries, token_ids=token_ids, finish_reason=self.finish_reason)

    def _add_tokens(self, output: TokenOutput, start: int) -> str:
        text = ""
        last = len(output.token_ids) - 1
        for i in range(start, last + 1):
            token_id = output.token_ids[i]
            self.num_tokens += 1
            self._token_ids.append(token_id)
            if i == last and output.finish_reason is FinishReason.STOP and token_id not in self._shown_stop_ids:
                break
            if output.logprobs is not None:
                self._entries.append(self._entry(token_id, output.logprobs[i]))
            text += self._show(self._detokenizer.push(token_id))
            if self.finish_reason is not None:
                break
        return text

    def _show(self, text: str) -> str:
        """The part of `text` and of what was held back that can be shown; ends the choice on a stop string."""
        self._num_characters += len(text)
        shown, hit = self._stop_strings.push(text, armed=self.num_tokens > self._min_tokens)
        self._num_shown += len(shown)
        if hit:
            self.finish_reason = FinishReason.STOP
        return shown

    def _entry(self, token_id: int, logprob: TokenLogprob) -> LogprobEntry:
        top = tuple(self._rank(other, value) for other, value in logprob.top)
        return LogprobEntry(drawn=self._rank(token_id, logprob.logprob), top=top, text_offset=self._num_characters)

    def _rank(self, token_id: int, logprob: float) -> RankedToken:
        # Written so that NaN becomes the lowest value too.
        value = logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
        return RankedToken(
            label=self._vocabulary.label(token_id), raw=self._vocabulary.token_bytes(token_id), logprob=value
        )


def _count_before(entries: Sequence[LogprobEntry], offset: int) -> int:
    """How many of the entries, which are in order, begin before `offset`."""
    return next((i for i, entry in enumerate(entries) if entry.text_offset >= offset), len(entries))

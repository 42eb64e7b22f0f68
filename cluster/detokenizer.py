"""Turning a growing list of token ids into a growing text, whole characters only, in time linear in the tokens.

`ByteDetokenizer` serves tokenizers whose decoder is concatenation (see `cluster.vocabulary`): it decodes UTF-8 as it
comes. `WindowDetokenizer` serves any other: it decodes a short window of recent tokens before and after each new
token and emits the difference. It knows no stop strings; those work on text (`cluster.stop_strings`).
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer as BackendTokenizer

from cluster.vocabulary import LeadingSpace, Vocabulary

_REPLACE_EACH_BYTE = "nanoserve.replace_each_byte"
_MAX_WINDOW_TOKENS = 16
_PROBE_TEXTS = ("Hello, world! It's 12:30.", " two  spaces\n\ttab", "naïve 東京 🙂 Ελληνικά", "x=[1,2];//<s>")
_NUM_PROBE_TOKENS = 256


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD per byte of a malformed sequence, as byte-fallback decoders do; "replace" makes one per sequence."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer(Protocol):
    """The text of one sequence as it grows; the emitted parts concatenate to the decoded whole."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" where it only begins a character or is not shown."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""


class ByteDetokenizer:
    """Concatenates token bytes. `hidden_ids` are not shown; `continues` says that the text goes on from a prompt.

    A continued text keeps the leading space that a decoder would drop from a text of its own. The result is the
    decoder's, with one exception: where a byte-fallback run holds both whole characters and malformed bytes, the
    decoder gives U+FFFD for all of it; the characters are already with the reader here, and stay.
    """

    def __init__(self, vocabulary: Vocabulary, hidden_ids: frozenset[int], continues: bool = False) -> None:
        self._vocabulary = vocabulary
        self._hidden_ids = hidden_ids
        self._utf8 = _Utf8Decoder(_REPLACE_EACH_BYTE if vocabulary.byte_fallback else "replace")
        self._partial = False
        self._leading_space = LeadingSpace.KEPT if continues else vocabulary.leading_space

    def push(self, token_id: int) -> str:
        """See `IncrementalDetokenizer.push`."""
        if token_id in self._hidden_ids:
            return ""
        if self._leading_space is LeadingSpace.FIRST_TOKEN:
            if not self._vocabulary.has(token_id):
                return ""  # the decoder skips what is no token, and the next one begins the text
            piece = self._vocabulary.first_piece(token_id)
            self._leading_space = LeadingSpace.KEPT
        else:
            piece = self._vocabulary.piece(token_id)
        if not self._partial and isinstance(piece, str):
            text = piece
        else:
            text = self._utf8.decode(piece.encode() if isinstance(piece, str) else piece)
            self._partial = bool(self._utf8.getstate()[0])
        return self._strip(text) if self._leading_space is LeadingSpace.FIRST_CHARACTER else text

    def flush(self) -> str:
        """See `IncrementalDetokenizer.flush`."""
        self._partial = False
        return self._utf8.decode(b"", final=True)

    def _strip(self, text: str) -> str:
        if not text:
            return text
        self._leading_space = LeadingSpace.KEPT
        return text.removeprefix(" ")


class WindowDetokenizer:
    """Decodes a window of tokens with the tokenizer's own decoder; `prompt_tail` are tokens the text goes on from.

    The window holds the tokens of the last emission (context for spaces and joins) and those still unemitted. It is
    cut after 16 unemitted tokens, so that a model that draws broken bytes for ever costs no more than any other.
    """

    def __init__(self, backend: BackendTokenizer, hidden_ids: frozenset[int], prompt_tail: Sequence[int] = ()) -> None:
        self._backend = backend
        self._hidden_ids = hidden_ids
        self._window = list(prompt_tail[-_MAX_WINDOW_TOKENS:])
        self._num_emitted = len(self._window)
        self._emitted_text = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """See `IncrementalDetokenizer.push`."""
        if token_id in self._hidden_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_emitted
        if (text.endswith("\ufffd") or len(text) <= len(self._emitted_text)) and num_pending < _MAX_WINDOW_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """See `IncrementalDetokenizer.flush`."""
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        delta = text[len(self._emitted_text) :]
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)
        self._emitted_text = self._decode(self._window)
        return delta

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False) if token_ids else ""
        return text


def concatenates(backend: BackendTokenizer, vocabulary: Vocabulary) -> bool:
    """Whether `ByteDetokenizer` gives what the tokenizer's decoder gives, tried on texts and across the vocabulary."""
    if not vocabulary.decoder_known:
        return False
    samples: list[list[int]] = [backend.encode(text, add_special_tokens=False).ids for text in _PROBE_TEXTS]
    first = next((token_ids[0] for token_ids in samples if token_ids), 0)
    step = max(1, vocabulary.size // _NUM_PROBE_TOKENS)
    samples += [[first, token_id] for token_id in range(0, vocabulary.size, step)]
    for token_ids in samples:
        detokenizer = ByteDetokenizer(vocabulary, hidden_ids=frozenset())
        text = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
        expected: str = backend.decode(token_ids, skip_special_tokens=False)
        if text != expected and "\ufffd" not in expected:
            return False
    return True

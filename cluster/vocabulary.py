"""`Vocabulary`: what each token id stands for, as bytes, for incremental detokenizing and for logprobs.

A tokenizer's decoder turns a list of tokens into text. For the two families in use (byte-level BPE, and
SentencePiece with byte fallback) that is concatenation of bytes per token plus a rule for the leading space, and so
can be done one token at a time at no cost. The rule is read from the decoder's own description; `decoder_known`
is False for any other decoder, for which token bytes are only what the token decodes to on its own.
"""

import json
from enum import StrEnum
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

# Sequences of decoder steps that amount to concatenation.
_BYTE_LEVEL = (["ByteLevel"], ["ByteLevel", "Fuse"])
_SENTENCE_PIECE = (
    ["Replace", "ByteFallback", "Fuse", "Strip"],
    ["Replace", "ByteFallback", "Fuse"],
    ["ByteFallback", "Metaspace"],
    ["Metaspace"],
)


class LeadingSpace(StrEnum):
    """What a decoder does with the space that SentencePiece puts before the first word of a text."""

    KEPT = "kept"
    FIRST_CHARACTER = "first_character"  # drops one space if the text begins with one
    FIRST_TOKEN = "first_token"  # drops every space mark of the first token


class Vocabulary:
    """The tokens of a `tokenizers.Tokenizer`. Entries are made when first asked for and kept."""

    def __init__(self, backend: BackendTokenizer) -> None:
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | bytes] = {}
        self.size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        rules = _decoder_rules(backend)
        kinds = [rule["type"] for rule in rules]
        self.decoder_known = bool(rules)
        self.byte_fallback = "ByteFallback" in kinds
        self._byte_level = kinds in _BYTE_LEVEL
        self._space_mark = next((mark for mark in map(_space_mark, rules) if mark), None)
        self.leading_space = LeadingSpace.FIRST_CHARACTER if "Strip" in kinds else LeadingSpace.KEPT
        if kinds and kinds[-1] == "Metaspace" and rules[-1].get("prepend_scheme", "always") != "never":
            self.leading_space = LeadingSpace.FIRST_TOKEN

    def has(self, token_id: int) -> bool:
        """Whether the id is a token's; models may have more ids than their tokenizer."""
        return self._backend.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token inside a text; part of a character perhaps; empty for an id that is no token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._make_bytes(token_id)
        return found

    def piece(self, token_id: int) -> str | bytes:
        """The token as text where it is whole characters, else its bytes."""
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = _as_text(self.token_bytes(token_id))
        return found

    def first_piece(self, token_id: int) -> str | bytes:
        """The piece where it begins a text and `leading_space` is FIRST_TOKEN."""
        token: str = self._backend.id_to_token(token_id) or ""
        if self._space_mark and self._space_mark in token:
            return token.replace(self._space_mark, "")
        return self.piece(token_id)

    def label(self, token_id: int) -> str:
        """The token for a reader of logprobs; part of a character is spelled `bytes:\\xe4`, as OpenAI does."""
        piece = self.piece(token_id)
        if isinstance(piece, str):
            return piece
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _make_bytes(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            # An added token may hold characters outside the alphabet (a real space); it then stands for itself.
            stand_ins = [_BYTE_OF.get(character, -1) for character in token]
            return token.encode() if -1 in stand_ins else bytes(stand_ins)
        if self.byte_fallback and (byte := _fallback_byte(token)) is not None:
            return bytes([byte])
        if self._space_mark:
            return token.replace(self._space_mark, " ").encode()
        decoded: str = self._backend.decode([token_id], skip_special_tokens=False)
        return decoded.encode()


def _as_text(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable ones stand for themselves, others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoder_rules(backend: BackendTokenizer) -> list[dict[str, Any]]:
    """The decoder's steps, none if they are not of a shape that `Vocabulary` understands."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    rules: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [rule["type"] for rule in rules]
    if kinds in _BYTE_LEVEL:
        return rules
    strips = [(rule["content"], rule["start"], rule["stop"]) for rule in rules if rule["type"] == "Strip"]
    if kinds in _SENTENCE_PIECE and any(map(_space_mark, rules)) and strips in ([], [(" ", 1, 0)]):
        return rules
    return []


def _space_mark(rule: dict[str, Any]) -> str | None:
    """The character that a Replace or Metaspace step turns into a space."""
    match rule:
        case {"type": "Metaspace", "replacement": str(mark)}:
            return mark
        case {"type": "Replace", "pattern": {"String": str(mark)}, "content": " "}:
            return mark
    return None


def _fallback_byte(token: str) -> int | None:
    """The byte of <0xE4>, else None."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None

"""Writes a byte-level tokenizer of any vocabulary size, for checkpoints whose weights are random.

Ids 0..255 are the bytes, so that every text encodes and comes back unchanged; 256 ends a text; the rest are words
that no text encodes to but that a random model may well generate, and that shall look like words when it does.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any, Final

from engine.errors import ConfigError

END_OF_TEXT: Final = "<|endoftext|>"
END_OF_TEXT_ID: Final = 256
MIN_VOCAB_SIZE: Final = 257

_SYLLABLES: Final = tuple(consonant + vowel for consonant, vowel in product("bdfghjklmnprstvz", "aeiou"))
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tokenizer(path: Path, vocab_size: int, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into `path`; raises `ConfigError` for too small a vocabulary."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"A byte-level vocabulary needs at least {MIN_VOCAB_SIZE} ids, but vocab_size is {vocab_size}."
        )
    _write_json(path / "tokenizer.json", _tokenizer(vocab_size))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", settings)


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """The `tokenizers` library's JSON of a byte-pair encoding without any merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    vocabulary[END_OF_TEXT] = END_OF_TEXT_ID
    for number in range(vocab_size - MIN_VOCAB_SIZE):
        vocabulary["\u0120" + _word(number)] = MIN_VOCAB_SIZE + number  # U+0120 stands for a space
    return {
        "version": "1.0",
        "added_tokens": [{"id": END_OF_TEXT_ID, "content": END_OF_TEXT, **special}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 defined it."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _word(number: int) -> str:
    """A pronounceable word of at least two syllables, a different one for every number."""
    syllables: list[str] = []  # the digits of the number, the lowest first
    while number or len(syllables) < 2:
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
    return "".join(syllables)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

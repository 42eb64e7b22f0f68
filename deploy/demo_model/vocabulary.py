"""The tokenizer: byte-level BPE, so that any text survives encoding and decoding. Digits are tokens of their own."""

import json
from itertools import islice
from pathlib import Path

from corpus import documents
from corpus.chat import CHAT_TEMPLATE, DOCUMENT_END, TURN_END, TURN_START, Exchange, render
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

VOCABULARY_SIZE = 2048
NUM_DOCUMENTS = 20_000
MAX_LENGTH = 2048
# Words take the space before them; every digit, every line break and every other sign stands alone.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
SPECIALS = (DOCUMENT_END, TURN_START, TURN_END)
# Names that transformers 4 and 5 both know; `save_pretrained` of 5 writes some that only 5 knows.
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": TURN_END,
    "pad_token": DOCUMENT_END,
    "additional_special_tokens": [TURN_START],
    "model_max_length": MAX_LENGTH,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
SURVIVORS = ("Hello, world!", " two  spaces\n\n\ttab ", "naïve 北京 🙂 \u0000\u200d", "1234567890")


def train_tokenizer(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_without_specials, islice(documents(seed), NUM_DOCUMENTS)), trainer)
    return tokenizer


def _without_specials(document: str) -> str:
    for special in SPECIALS:
        document = document.replace(special, "")
    return document


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    _check(folder)


def _check(folder: Path) -> None:
    """What was saved loads, keeps every text, and renders conversations as the model saw them in training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*SURVIVORS, "".join(map(chr, range(32, 0x2FFF, 29)))):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, f"does not survive: {text!r}"
    turns = {"system": "S", "user": "U", "assistant": "A"}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == render([Exchange(user="U", assistant="A")], system="S").removesuffix(DOCUMENT_END)

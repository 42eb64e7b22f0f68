"""Small tokenizers made on the fly: the two families of real checkpoints, and one that neither rule covers."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cluster.tokenizer import Tokenizer
from cluster.tokenizer_files import TokenizerFiles

CORPUS = [
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "  two spaces, then a\ttab and\nnew lines\n\n",
    "naïve café, 東京は夜です, Ελληνικά, 🙂🙃👩‍👩‍👧",
    "STOP here. stopping is not stop; User: hi\nAssistant: yes",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' and not message.tool_call_id %}"
    "{{ raise_exception('a tool message needs a tool_call_id') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ style | default('') }}"
)


@cache
def byte_level() -> BackendTokenizer:
    """Like GPT-2, Llama 3, Qwen: bytes under printable stand-ins; BOS added by the post-processor (Llama 3)."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["added token", "ünïcode▁token"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@cache
def sentence_piece() -> BackendTokenizer:
    """Like Llama 2 and Mistral: spaces as U+2581, unknown characters as <0xNN> bytes, a leading space dropped."""
    return _byte_fallback(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    )


@cache
def metaspace() -> BackendTokenizer:
    """The same vocabulary under tokenizers' own Metaspace decoder."""
    return _byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


@cache
def word_piece() -> BackendTokenizer:
    """A decoder that is not concatenation: spaces depend on the neighbours."""
    backend = BackendTokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _byte_fallback(decoder: Any) -> BackendTokenizer:
    bytes_as_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = BackendTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *SPECIAL], initial_alphabet=["▁"], show_progress=False
    )
    ascii_corpus = ["".join(c for c in text if ord(c) < 128) for text in CORPUS]
    backend.train_from_iterator([text.replace(" ", "▁") for text in ascii_corpus], trainer)
    vocabulary = {**backend.get_vocab(with_added_tokens=False)}
    for token in bytes_as_tokens:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [(left, right) for left, right in json.loads(backend.model.__getstate__())["merges"]]
    backend.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend.decoder = decoder
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def save(backend: BackendTokenizer, path: Path, chat_template: str | None = CHATML, **settings: Any) -> Path:
    """Write a checkpoint's tokenizer files into the directory `path`."""
    _pretrained(backend, chat_template, **settings).save_pretrained(str(path))
    return path


def make(backend: BackendTokenizer, chat_template: str | None = CHATML) -> Tokenizer:
    """A `Tokenizer` without a round trip over the disk."""
    return Tokenizer(TokenizerFiles.of(_pretrained(backend, chat_template)))


def _pretrained(backend: BackendTokenizer, chat_template: str | None, **settings: Any) -> Any:
    """A `transformers` tokenizer over a copy of `backend`."""
    kind: Any = PreTrainedTokenizerFast
    copy = BackendTokenizer.from_str(backend.to_str())
    pretrained = kind(tokenizer_object=copy, bos_token="<s>", eos_token="</s>", **settings)
    pretrained.chat_template = chat_template
    return pretrained

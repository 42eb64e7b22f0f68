"""`TokenizerFiles`: what a checkpoint's tokenizer files say, read without `transformers` where that surely agrees.

It is certain where `tokenizer_config.json` names one of the classes that take tokenizer.json as it is, and the rest of
it only repeats what is in there. Other classes rebuild the tokenizer in Python, from parts and by rules of their own:
those are left to `transformers`, whose import takes some three seconds of a processor and 200 MB.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as BackendTokenizer

from engine import CheckpointError

_PLAIN_CLASSES: Final = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
# Of the models served here, those for which `transformers` takes the named class at its word.
_PLAIN_MODELS: Final = frozenset({None, "llama", "mistral", "mixtral", "qwen3", "qwen3_moe"})
_NAMED_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_OTHER_SOURCES: Final = ("added_tokens.json", "tekken.json", "additional_chat_templates")
# A vocabulary as large as those that were once published with a faulty regular expression, which `transformers` mends.
_LARGEST_UNCHECKED_MISTRAL: Final = 100_000
# What `transformers` reports where tokenizer_config.json names no length is about 1e30.
_LONGEST_MODEL: Final = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """`special_tokens` are the named ones, such as bos_token; `max_len` is None where no limit is named."""

    backend: BackendTokenizer
    special_tokens: Mapping[str, str]
    chat_template: str | None
    max_len: int | None

    @classmethod
    def read(cls, path: Path) -> "TokenizerFiles":
        """Of the checkpoint in directory `path`; raises `CheckpointError` where there is no usable tokenizer."""
        if not path.is_dir():
            raise CheckpointError(f"The checkpoint directory {path} does not exist.")
        try:
            return cls._read_plain(path) or cls._read_with_transformers(path)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"The tokenizer in {path} cannot be read: {error}") from error

    @classmethod
    def of(cls, pretrained: Any) -> "TokenizerFiles":
        """Of a `transformers` tokenizer with a Rust backend."""
        template = pretrained.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return cls(
            backend=pretrained.backend_tokenizer,
            special_tokens=pretrained.special_tokens_map,
            chat_template=template,
            max_len=_length(pretrained.model_max_length),
        )

    @classmethod
    def _read_plain(cls, path: Path) -> "TokenizerFiles | None":
        """None where only `transformers` knows what the files amount to."""
        if not (path / "tokenizer.json").is_file() or any((path / name).exists() for name in _OTHER_SOURCES):
            return None
        settings = _json(path / "tokenizer_config.json")
        model_type = _json(path / "config.json").get("model_type")
        if settings.get("tokenizer_class") not in _PLAIN_CLASSES or model_type not in _PLAIN_MODELS:
            return None
        backend = BackendTokenizer.from_file(str(path / "tokenizer.json"))
        if model_type == "mistral" and backend.get_vocab_size() > _LARGEST_UNCHECKED_MISTRAL:
            return None
        tokens = {name: _text(settings[name]) for name in _NAMED_TOKENS if settings.get(name) is not None}
        template = settings.get("chat_template")
        if (path / "chat_template.jinja").exists():
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if not isinstance(template, str | None) or not _says_no_more(path, settings, backend, tokens.values()):
            return None
        return cls(
            backend=backend,
            special_tokens={name: text for name, text in tokens.items() if text is not None},
            chat_template=template,
            max_len=_length(settings.get("model_max_length", settings.get("max_len"))),
        )

    @classmethod
    def _read_with_transformers(cls, path: Path) -> "TokenizerFiles":
        """From local files only, never from a hub and never running code from the checkpoint."""
        from transformers import AutoTokenizer

        pretrained = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if getattr(pretrained, "backend_tokenizer", None) is None:
            raise CheckpointError(f"The tokenizer in {path} has no tokenizer.json, which this server needs.")
        return cls.of(pretrained)


def _says_no_more(path: Path, settings: dict[str, Any], backend: BackendTokenizer, named: Iterable[str | None]) -> bool:
    """Whether tokenizer_config.json only repeats what `backend`, read from tokenizer.json, has already."""
    in_backend = {token_id: token.__getstate__() for token_id, token in backend.get_added_tokens_decoder().items()}
    contents = {state["content"] for state in in_backend.values()}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    declared = settings.get("added_tokens_decoder")
    own_names = [
        key
        for key, value in settings.items()
        if key.endswith("_token") and key not in _NAMED_TOKENS and not isinstance(value, bool | None)
    ]
    if declared is None and (path / "special_tokens_map.json").exists():
        return False
    return (
        "auto_map" not in settings
        and not settings.get("split_special_tokens")
        and backend.padding is None
        and isinstance(extra, list)
        and not own_names
        and {*named, *map(_text, extra)} <= contents
        and all(in_backend.get(int(key)) == {"special": False, **value} for key, value in (declared or {}).items())
    )


def _text(token: Any) -> str | None:
    """A token of the settings; None for one in a form that is not known."""
    if isinstance(token, dict) and token.get("__type") == "AddedToken":
        token = token.get("content")
    return token if isinstance(token, str) else None


def _length(value: Any) -> int | None:
    return int(value) if value is not None and value < _LONGEST_MODEL else None


def _json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    if not file.exists():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}

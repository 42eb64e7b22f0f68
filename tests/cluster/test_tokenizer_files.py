"""Tokenizer files read without `transformers` say what it says; where that is not certain, it is asked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster import tokenizer_files
from cluster.tokenizer import Tokenizer
from cluster.tokenizer_files import TokenizerFiles
from tests.cluster import tiny_tokenizers

ROOT = Path(__file__).parents[2]
TEXTS = ["Hello, world", "", " ", "  a\n\nb<|im_end|>added token</s>x", "naïve 東京 🙂", *tiny_tokenizers.CORPUS[:4]]


def change(path: Path, **settings: Any) -> None:
    """Of tokenizer_config.json; None takes a key out."""
    file = path / "tokenizer_config.json"
    changed = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


@pytest.fixture
def refuse_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> TokenizerFiles:
        raise AssertionError(f"{path} was given to transformers")

    monkeypatch.setattr(TokenizerFiles, "_read_with_transformers", read)


def check_equal(path: Path) -> None:
    files, reference = TokenizerFiles.read(path), AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    expected = TokenizerFiles.of(reference)
    found, wanted = json.loads(files.backend.to_str()), json.loads(expected.backend.to_str())
    if found["post_processor"] is None:  # transformers writes one that does nothing
        assert wanted.pop("post_processor")["special_tokens"] == {}
        del found["post_processor"]
    assert found == wanted
    assert dict(files.special_tokens) == dict(expected.special_tokens)
    assert (files.chat_template, files.max_len) == (expected.chat_template, expected.max_len)
    tokenizer = Tokenizer(files)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text).input_ids
        assert tokenizer.encode(text, False) == reference(text, add_special_tokens=False).input_ids


@pytest.mark.usefixtures("refuse_transformers")
@pytest.mark.parametrize("name", ["byte_level", "sentence_piece", "metaspace", "word_piece"])
@pytest.mark.parametrize("model_type", [None, "llama"])
def test_every_family_is_read_as_by_transformers(name: str, model_type: str | None, tmp_path: Path) -> None:
    tiny_tokenizers.save(getattr(tiny_tokenizers, name)(), tmp_path, model_max_length=77)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    check_equal(tmp_path)


@pytest.mark.usefixtures("refuse_transformers")
def test_the_checkpoints_of_this_project_are_read_as_by_transformers() -> None:
    check_equal(ROOT / "deploy/demo_model/model")


@pytest.mark.usefixtures("refuse_transformers")
def test_the_long_form_of_settings_that_llama_3_has(tmp_path: Path) -> None:
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    added = tiny_tokenizers.byte_level().get_added_tokens_decoder()
    states = {str(number): token.__getstate__() for number, token in added.items()}
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "</s>"}')  # nobody reads it then
    change(
        tmp_path,
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder=states,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        pad_token="</s>",
        add_bos_token=True,
        model_input_names=["input_ids"],
        clean_up_tokenization_spaces=True,
        backend=None,
    )
    check_equal(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token": "<new>"},
        {"extra_special_tokens": ["<new>"]},
        {"extra_special_tokens": {"image_token": "<|im_end|>"}},
        {"image_token": "<|im_end|>"},
        {"split_special_tokens": True},
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": None},
        {"chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]},
        {"added_tokens_decoder": {"0": {"content": "<s>", "special": False}}},
    ],
)
def test_what_tokenizer_json_does_not_say_is_left_to_transformers(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    change(tmp_path, **settings)
    asked: list[Path] = []
    monkeypatch.setattr(TokenizerFiles, "_read_with_transformers", asked.append)
    TokenizerFiles.read(tmp_path)
    assert asked == [tmp_path]


def test_a_default_among_several_templates_is_the_one(tmp_path: Path) -> None:
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    change(tmp_path, chat_template=[{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}])
    assert TokenizerFiles.read(tmp_path).chat_template == "x"


def test_models_whose_class_transformers_replaces_are_left_to_it() -> None:
    from transformers.models.auto import tokenization_auto

    for model_type in tokenizer_files._PLAIN_MODELS - {None}:
        assert model_type not in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


def test_neither_transformers_nor_torch_is_imported_for_a_tokenizer() -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.tokenizer import Tokenizer;"
        "tokenizer = Tokenizer.load(Path('deploy/demo_model/model'));"
        "assert tokenizer.encode_chat([{'role': 'user', 'content': 'Hello'}]);"
        "assert not {'transformers', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

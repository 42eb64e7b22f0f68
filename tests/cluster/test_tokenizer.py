"""Reading a checkpoint's tokenizer, and encoding texts and conversations exactly as `transformers` does."""

import threading
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cluster.api_error import ApiError
from cluster.tokenizer import Tokenizer
from engine import CheckpointError
from tests.cluster import tiny_tokenizers

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "東京?"}]


def test_loaded_from_disk_it_encodes_as_transformers_does(tmp_path: Path) -> None:
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path, model_max_length=77)
    tokenizer, reference = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ["Hello, world", "", " ", "  a\n\nb<|im_end|>added token", "naïve 東京 🙂", *tiny_tokenizers.CORPUS]:
        assert tokenizer.encode(text) == reference(text).input_ids
        assert tokenizer.encode(text, False) == reference(text, add_special_tokens=False).input_ids
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(MESSAGES) == expected
    assert (tokenizer.max_len, tokenizer.bos_token_id, tokenizer.eos_token_id) == (77, 0, 1)


def test_a_long_text_does_not_stop_other_threads() -> None:
    """Streams of the same process go on while a prompt of a megabyte is encoded in a thread."""
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level())
    text = "Hello, how are you? " * 50_000
    worker = threading.Thread(target=tokenizer.encode, args=(text,))
    start = time.perf_counter()
    worker.start()
    num_turns = 0
    while worker.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 20, f"{num_turns} turns in {time.perf_counter() - start:.2f} s"


def test_length_limit_is_none_where_the_checkpoint_names_none() -> None:
    assert tiny_tokenizers.make(tiny_tokenizers.byte_level()).max_len is None


def test_bos_comes_once() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level())
    assert tokenizer.encode("hi").count(0) == 1
    assert tokenizer.encode_chat(MESSAGES).count(0) == 1


def test_truncation_saved_in_the_tokenizer_file_never_cuts_a_prompt(tmp_path: Path) -> None:
    backend = type(tiny_tokenizers.byte_level()).from_str(tiny_tokenizers.byte_level().to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tiny_tokenizers.save(backend, tmp_path)
    assert Tokenizer.load(tmp_path).encode("a b c d e f g h") == tiny_tokenizers.make(backend).encode("a b c d e f g h")
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode("a b c d e f"), True) == "a b c d e f"


def test_developer_is_system_for_templates_that_do_not_know_it() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level())
    assert "<|im_start|>system\nX<|im_end|>" in tokenizer.render_chat([{"role": "developer", "content": "X"}])
    knowing = tiny_tokenizers.make(tiny_tokenizers.byte_level(), "{# developer #}{{ messages[0].role }}")
    assert knowing.render_chat([{"role": "developer", "content": "X"}]) == "developer"


def test_template_arguments_reach_the_template() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level())
    assert tokenizer.render_chat(MESSAGES, False, {"style": "terse"}).endswith("<|im_end|>\nterse")
    assert not tokenizer.render_chat(MESSAGES, False).endswith("assistant\n")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tokenizer_kwargs", "messages", "conversation"])
def test_template_arguments_cannot_replace_what_is_the_servers(name: str) -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level())
    with pytest.raises(ApiError) as caught:
        tokenizer.render_chat(MESSAGES, True, {name: "{{ 1 }}"})
    assert caught.value.status == 400


def test_complaints_of_the_template_are_the_clients_to_read() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level())
    with pytest.raises(ApiError, match="a tool message needs a tool_call_id") as caught:
        tokenizer.render_chat([{"role": "tool", "content": "4"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("template", ["{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% if %}"])
def test_a_template_that_breaks_is_a_400_too(template: str) -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level(), template)
    with pytest.raises(ApiError) as caught:
        tokenizer.render_chat(MESSAGES)
    assert caught.value.status == 400


def test_no_template_says_what_to_use_instead() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.byte_level(), chat_template=None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ApiError, match=r"no chat template.*/v1/completions"):
        tokenizer.encode_chat(MESSAGES)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece", "metaspace"])
def test_token_bytes_add_up_to_the_text(name: str) -> None:
    tokenizer = tiny_tokenizers.make(getattr(tiny_tokenizers, name)())
    token_ids = tokenizer.encode("naïve 東京 🙂", add_special_tokens=False)
    raw = b"".join(map(tokenizer.vocabulary.token_bytes, token_ids))
    assert raw.decode().removeprefix(" ") == "naïve 東京 🙂"


def test_labels_spell_bytes_that_are_no_character() -> None:
    tokenizer = tiny_tokenizers.make(tiny_tokenizers.sentence_piece())
    labels = [tokenizer.vocabulary.label(i) for i in tokenizer.encode("東", add_special_tokens=False)]
    assert labels[-3:] == ["bytes:\\xe6", "bytes:\\x9d", "bytes:\\xb1"]
    assert tokenizer.vocabulary.label(10**6) == ""

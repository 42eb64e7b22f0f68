"""Random checkpoints: reproducible, loadable by transformers, with a tokenizer that gives every text back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.model_config import Architecture, DType, ModelConfig
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.random_tokenizer import END_OF_TEXT_ID, write_tokenizer


@pytest.mark.parametrize("architecture", Architecture)
def test_what_is_written_is_what_was_asked_for(architecture: Architecture, tmp_path: Path) -> None:
    config = sized_config(architecture, dtype=DType.BFLOAT16, num_layers=3, head_dim=32, vocab_size=300)
    write_random_checkpoint(tmp_path, config)
    assert ModelConfig.from_checkpoint(tmp_path) == config
    assert all(tensor.dtype is torch.bfloat16 for tensor in load_file(tmp_path / "model.safetensors").values())


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    config = sized_config(Architecture.LLAMA)
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_random_checkpoint(tmp_path / name, config, seed=seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_greedy_decoding_has_clear_winners(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_random_checkpoint(tmp_path, sized_config(Architecture.LLAMA, hidden_size=256, num_layers=4, vocab_size=4096))
    tokens = torch.randint(0, 4096, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        best, second = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits[0].topk(2).values.unbind(-1)
    assert (best - second).median() > 0.1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sliding_windows": (8, 8)}, "sliding_windows"),
        ({"qk_norm": True}, "qk_norm"),
        ({"qkv_bias": True, "output_bias": False}, "output_bias"),
    ],
)
def test_options_an_architecture_does_not_have(change: dict[str, object], name: str, tmp_path: Path) -> None:
    config = replace(sized_config(Architecture.LLAMA), **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=name):
        write_random_checkpoint(tmp_path, config)
    assert not (tmp_path / "config.json").exists()


def test_a_vocabulary_needs_every_byte(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 257 ids"):
        write_tokenizer(tmp_path, 256, 2048)


@pytest.mark.parametrize("architecture", Architecture)
def test_the_tokenizer_loads_and_every_id_is_text(architecture: Architecture, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_random_checkpoint(tmp_path, sized_config(architecture, vocab_size=7000))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = [str(tokenizer.decode([token])) for token in range(257, 7000)]
    assert len(tokenizer) == 7000
    assert len(set(words)) == len(words)
    assert all(word[0] == " " and word[1:].isalpha() for word in words)
    assert tokenizer.eos_token_id == END_OF_TEXT_ID
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "user: hi\nassistant: "


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text())
def test_every_text_comes_back(text: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    if not (tmp_path / "tokenizer.json").exists():
        write_tokenizer(tmp_path, 1000, 2048)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids == list(text.encode()) or "<|endoftext|>" in text

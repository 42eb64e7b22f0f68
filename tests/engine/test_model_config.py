"""Reading config.json: old and new forms, each architecture's rules, and an error for everything else."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError, ConfigError
from engine.model_config import DType, ModelConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
QWEN3_MOE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """`ModelConfig` of a config.json and, where given, a generation_config.json."""

    def parse(values: Any, generation: Any = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_checkpoint(tmp_path)

    return parse


def test_the_form_before_transformers_5(read: Any) -> None:
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    config = read({**LLAMA, "rope_scaling": scaling})
    assert config.dtype is DType.BFLOAT16
    assert (config.head_dim, config.num_layers, config.eos_token_ids) == (16, 3, {2})
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("llama3", 500000.0, 8.0)
    assert config.rope.original_max_position_embeddings == 1024


def test_the_form_of_transformers_5(read: Any) -> None:
    values = {key: value for key, value in LLAMA.items() if key not in ("torch_dtype", "rope_theta")}
    rope = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}
    config = read({**values, "dtype": "float16", "rope_parameters": rope, "head_dim": None})
    assert config.dtype is DType.FLOAT16
    assert (config.rope.kind, config.rope.theta, config.rope.factor, config.head_dim) == ("linear", 20000.0, 2.0, 16)


def test_end_of_sequence_ids_of_both_files_count(read: Any) -> None:
    assert read(LLAMA, {"eos_token_id": [7, 9]}).eos_token_ids == {2, 7, 9}
    assert read({**LLAMA, "eos_token_id": None}, {"eos_token_id": None}).eos_token_ids == frozenset()


def test_a_window_is_read_by_the_rules_of_its_architecture(read: Any) -> None:
    def windows(architecture: str, **values: Any) -> tuple[int | None, ...]:
        result: tuple[int | None, ...] = read({**LLAMA, "architectures": [architecture], **values}).sliding_windows
        return result

    assert windows("LlamaForCausalLM", sliding_window=8) == ()
    assert windows("MistralForCausalLM", sliding_window=8) == (8, 8, 8)
    assert windows("MistralForCausalLM", sliding_window=None) == ()
    assert windows("MistralForCausalLM") == (4096, 4096, 4096)
    assert windows("Qwen2ForCausalLM", sliding_window=8, max_window_layers=1) == ()
    assert windows("Qwen2ForCausalLM", sliding_window=8, max_window_layers=1, use_sliding_window=True) == (None, 8, 8)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows("Qwen3ForCausalLM", sliding_window=8, layer_types=kinds, use_sliding_window=True) == (8, None, 8)


def test_transformers_agrees_on_the_windows(read: Any) -> None:
    from transformers import Qwen2Config

    values: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    theirs: Any = Qwen2Config(num_hidden_layers=3, **values)
    expected = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    assert read({**LLAMA, "architectures": ["Qwen2ForCausalLM"], **values}).sliding_windows == expected


def test_sparse_layers(read: Any) -> None:
    assert read(QWEN3_MOE).sparse_layers == (True, True, True)
    assert read({**QWEN3_MOE, "decoder_sparse_step": 2}).sparse_layers == (False, True, False)
    assert read({**QWEN3_MOE, "mlp_only_layers": [0]}).sparse_layers == (False, True, True)
    mixtral = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    config = read(mixtral)
    assert (config.moe_intermediate_size, config.num_experts, config.norm_topk_prob) == (128, 4, True)


def test_yarn_takes_its_factor_from_the_lengths_and_its_temperature_from_the_paper(read: Any) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 1024}
    config = read({**LLAMA, "rope_parameters": rope})
    assert config.rope.factor == 4.0
    assert config.rope.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM"),
        ({"architectures": None}, "architectures is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, 'hidden_size must be a whole number of at least 1, but is "64"'),
        ({"hidden_size": 0}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above zero"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number or a list of them"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_cannot_run_is_named(read: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({**LLAMA, **change})


def test_more_experts_per_token_than_experts(read: Any) -> None:
    with pytest.raises(CheckpointError, match="num_experts_per_tok 9 exceeds the 8 experts"):
        read({**QWEN3_MOE, "num_experts_per_tok": 9})


def test_layer_types_must_fit(read: Any) -> None:
    values = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
    with pytest.raises(CheckpointError, match="for each of the 3 layers"):
        read({**values, "layer_types": ["full_attention"]})


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_a_file_that_is_no_json_object(read: Any, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(text)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        ModelConfig.from_checkpoint(tmp_path)


def test_ranks_must_share_evenly(read: Any) -> None:
    config = read(LLAMA)
    config.check_tensor_parallel(4)  # more ranks than key/value heads: they hold copies
    assert config.kv_heads_per_rank(4) == 1
    with pytest.raises(ConfigError, match="does not divide the model's 4 attention heads"):
        config.check_tensor_parallel(3)
    with pytest.raises(ConfigError, match="does not divide intermediate_size 127"):
        read({**LLAMA, "intermediate_size": 127}).check_tensor_parallel(2)

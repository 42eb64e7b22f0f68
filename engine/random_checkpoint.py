"""Random checkpoints of any supported architecture and size, in Hugging Face's form: `nanoserve make-model`.

What a test, a benchmark or a first try needs is the shape of a model, not its knowledge. Weights are scaled so that
activations keep their size through the layers and logits have clear winners. Tensors are made and written one at a
time, so the memory needed is that of the largest one.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import INDEX_FILE, SINGLE_FILE
from engine.errors import ConfigError
from engine.model_config import Architecture, DType, ModelConfig
from engine.random_tokenizer import END_OF_TEXT_ID, write_tokenizer
from engine.rope_config import RopeConfig
from engine.weight_layout import weight_layout

_SAFETENSORS_DTYPES = {DType.FLOAT64: "F64", DType.FLOAT32: "F32", DType.FLOAT16: "F16", DType.BFLOAT16: "BF16"}
_MODEL_TYPES = {
    Architecture.LLAMA: "llama",
    Architecture.MISTRAL: "mistral",
    Architecture.MIXTRAL: "mixtral",
    Architecture.QWEN2: "qwen2",
    Architecture.QWEN3: "qwen3",
    Architecture.QWEN3_MOE: "qwen3_moe",
}


def sized_config(
    architecture: Architecture,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = 512,
    max_position_embeddings: int = 2048,
    dtype: DType = DType.FLOAT32,
    rope: RopeConfig | None = None,
    tie_word_embeddings: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    sliding_window: int | None = None,
    num_experts: int = 4,
    num_experts_per_token: int = 2,
    num_dense_layers: int = 0,
) -> ModelConfig:
    """A model of these sizes with everything else as its architecture has it.

    `intermediate_size` is also one expert's; the first `num_dense_layers` layers of Qwen3-MoE have no experts.
    """
    model = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or hidden_size // num_heads,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-6,
        dtype=dtype,
        rope=rope or RopeConfig(),
        tie_word_embeddings=tie_word_embeddings,
        qkv_bias=attention_bias or architecture is Architecture.QWEN2,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture in (Architecture.QWEN3, Architecture.QWEN3_MOE),
        sliding_windows=() if sliding_window is None else (sliding_window,) * num_layers,
        norm_topk_prob=False,
        eos_token_ids=frozenset({END_OF_TEXT_ID}),
    )
    if architecture not in (Architecture.MIXTRAL, Architecture.QWEN3_MOE):
        return model
    return _with_experts(model, num_experts, num_experts_per_token, num_dense_layers)


def write_random_checkpoint(path: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write config, weights and a byte-level tokenizer into the folder `path`, made if need be.

    The same config and seed give the same bytes. Raises `ConfigError` when config.json cannot express `config`,
    when the vocabulary is smaller than a byte-level one, or when the folder holds another checkpoint's index.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot make the folder {path}: {error.strerror}.") from None
    if (path / INDEX_FILE).exists():
        raise ConfigError(f"{path} already holds a checkpoint of several files; name another folder.")
    write_tokenizer(path, config.vocab_size, config.max_position_embeddings)
    generation = {"eos_token_id": sorted(config.eos_token_ids), "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (path / "config.json").write_text(json.dumps(_config_json(config), indent=2) + "\n")
    readable = ModelConfig.from_checkpoint(path)
    wrong = [item.name for item in fields(config) if getattr(readable, item.name) != getattr(config, item.name)]
    if wrong:
        (path / "config.json").unlink()
        raise ConfigError(f"{config.architecture} cannot have these values of {', '.join(wrong)}.")
    _write_weights(path / SINGLE_FILE, config, seed)


def _with_experts(
    model: ModelConfig, num_experts: int, num_experts_per_token: int, num_dense_layers: int
) -> ModelConfig:
    return replace(
        model,
        sparse_layers=tuple(layer >= num_dense_layers for layer in range(model.num_layers)),
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
        moe_intermediate_size=model.intermediate_size,
        norm_topk_prob=True,
    )


def _config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json in transformers 5's form."""
    architecture = Architecture(config.architecture)
    values: dict[str, Any] = {
        "architectures": [architecture.value],
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope_json(config.rope),
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": sorted(config.eos_token_ids),
        "dtype": config.dtype.value,
    }
    if architecture in (Architecture.LLAMA, Architecture.QWEN3, Architecture.QWEN3_MOE):
        values["attention_bias"] = config.qkv_bias
    if architecture is Architecture.LLAMA:
        values["mlp_bias"] = config.mlp_bias
    else:
        values |= _window_json(config, architecture)
    if architecture is Architecture.MIXTRAL:
        values |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_token}
    if architecture is Architecture.QWEN3_MOE:
        values |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_token,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "mlp_only_layers": [layer for layer in range(config.num_layers) if not config.is_sparse(layer)],
        }
    return values


def _rope_json(rope: RopeConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        values |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "truncate": rope.truncate,
        }
    return values


def _window_json(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    window = next((size for size in config.sliding_windows if size is not None), None)
    values: dict[str, Any] = {"sliding_window": window}
    if architecture in (Architecture.QWEN2, Architecture.QWEN3, Architecture.QWEN3_MOE):
        values["use_sliding_window"] = window is not None
    if architecture in (Architecture.QWEN2, Architecture.QWEN3) and window is not None:
        values["layer_types"] = [
            "full_attention" if config.sliding_window(layer) is None else "sliding_attention"
            for layer in range(config.num_layers)
        ]
    return values


def _write_weights(file: Path, config: ModelConfig, seed: int) -> None:
    """Stream a safetensors file: the header's length, the header padded to eight bytes, the tensors in its order."""
    shapes = {part.tensor: part.shape for part in weight_layout(config)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * config.dtype.num_bytes
        entry = {"dtype": _SAFETENSORS_DTYPES[config.dtype], "shape": shape, "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for weight in _weights(shapes, config, seed):
            weight.contiguous().view(torch.uint8).numpy().tofile(stream)


def _weights(shapes: dict[str, tuple[int, ...]], config: ModelConfig, seed: int) -> Iterator[Tensor]:
    """Each tensor is drawn from a generator of its own, so it does not depend on the others."""
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            weight = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            weight = 0.1 * noise
        elif name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
            weight = noise
        else:
            weight = noise * (1.5 if "lm_head" in name else 1.0) / shape[-1] ** 0.5
        yield weight.to(getattr(torch, config.dtype.value))

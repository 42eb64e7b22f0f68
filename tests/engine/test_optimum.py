"""Active parameters, counted here from the tensors of a real checkpoint layout, and the optimum that they give."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from safetensors import safe_open

from engine import ModelConfig
from engine.config import EngineConfig
from engine.executor import CacheCapacity
from engine.model_config import Architecture, DType
from engine.optimum import Optimum, active_parameters, optimal_tokens_per_second, wide_parameters
from engine.random_checkpoint import sized_config, write_random_checkpoint


def matrices_of(path: Path) -> dict[str, int]:
    """Number of weights of every matrix of the checkpoint, by name."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {name: prod(shape) for name, shape in shapes.items() if len(shape) == 2}


@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.QWEN3])
def test_a_dense_model_counts_every_matrix_but_the_embedding(tmp_path: Path, architecture: Architecture) -> None:
    write_random_checkpoint(tmp_path, sized_config(architecture, num_kv_heads=1))
    expected = sum(size for name, size in matrices_of(tmp_path).items() if "embed_tokens" not in name)
    assert active_parameters(ModelConfig.from_checkpoint(tmp_path)) == expected


def test_a_tied_embedding_counts_once_as_the_output_head(tmp_path: Path) -> None:
    config = sized_config(Architecture.LLAMA, tie_word_embeddings=True)
    write_random_checkpoint(tmp_path, config)
    assert active_parameters(config) == sum(matrices_of(tmp_path).values())


@pytest.mark.parametrize("architecture", [Architecture.MIXTRAL, Architecture.QWEN3_MOE])
def test_a_mixture_counts_the_experts_that_a_token_visits(tmp_path: Path, architecture: Architecture) -> None:
    config = sized_config(architecture, num_experts=8, num_experts_per_token=2)
    write_random_checkpoint(tmp_path, config)
    total = sum(size for name, size in matrices_of(tmp_path).items() if "embed_tokens" not in name)
    idle_experts = config.num_layers * 6 * 3 * config.hidden_size * config.moe_intermediate_size
    assert active_parameters(config) == total - idle_experts


def test_the_optimum_is_two_operations_per_active_parameter() -> None:
    config = sized_config(Architecture.LLAMA)
    assert optimal_tokens_per_second(2e12, config) == pytest.approx(1e12 / active_parameters(config))


@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.QWEN3_MOE])
def test_products_that_are_not_in_fp8_take_their_time_at_their_own_peak(architecture: Architecture) -> None:
    config = sized_config(architecture)
    num_wide = config.hidden_size * config.vocab_size
    if config.num_experts:
        num_wide += config.num_layers * config.hidden_size * config.num_experts
    assert wide_parameters(config) == num_wide
    seconds = 2 * (active_parameters(config) - num_wide) / 4e12 + 2 * num_wide / 1e12
    assert optimal_tokens_per_second(4e12, config, 1e12) == pytest.approx(1 / seconds)
    assert optimal_tokens_per_second(1e12, config, 1e12) == pytest.approx(optimal_tokens_per_second(1e12, config))


def test_the_head_has_its_share_of_the_time() -> None:
    """Not in FP8 it is a larger one; of a group every rank has a part of everything."""
    model = sized_config(Architecture.LLAMA)
    config = EngineConfig(model=model, checkpoint=Path("/nonexistent"), dtype=DType.BFLOAT16, tensor_parallel=2)
    capacity = CacheCapacity(num_blocks=1, block_size=1, gemm_flops_per_second=4e12, dense_flops_per_second=2e12)
    alike = Optimum.of(config, capacity)
    head = model.hidden_size * model.vocab_size
    assert alike is not None and alike.head_share == pytest.approx(head / active_parameters(model))
    assert alike.tokens_per_second == pytest.approx(2 * alike.dense_tokens_per_second)
    apart = Optimum.of(config, replace(capacity, wide_flops_per_second=1e12))
    assert apart is not None
    others = active_parameters(model) - head
    assert apart.head_share == pytest.approx(4 * head / (4 * head + others))
    assert apart.tokens_per_second == pytest.approx(2 / (2 * others / 4e12 + 2 * head / 1e12))
    assert apart.dense_tokens_per_second == pytest.approx(2 / (2 * others / 2e12 + 2 * head / 1e12))


@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.QWEN3_MOE])
def test_the_tail_is_what_the_last_layer_multiplies_behind_its_attention(
    tmp_path: Path, architecture: Architecture
) -> None:
    config = sized_config(architecture)
    write_random_checkpoint(tmp_path, config)
    behind = {
        name: size
        for name, size in matrices_of(tmp_path).items()
        if f"layers.{config.num_layers - 1}." in name and ("o_proj" in name or ".mlp." in name)
    }
    idle = config.num_experts - config.num_experts_per_token if config.num_experts else 0
    expected = sum(behind.values()) - idle * 3 * config.hidden_size * config.moe_intermediate_size
    engine = EngineConfig(model=config, checkpoint=tmp_path, dtype=DType.FLOAT32)
    optimum = Optimum.of(engine, CacheCapacity(num_blocks=1, block_size=4, gemm_flops_per_second=1e12))
    assert optimum is not None
    assert optimum.tail_share == pytest.approx(expected / active_parameters(config))

"""What the engine's tests share: a model shape without weights, and an engine over the simulated executor."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine import CacheCapacity, DType, EngineConfig, ModelConfig


@pytest.fixture
def model_config() -> ModelConfig:
    """A shape that never becomes a model."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype=DType.FLOAT32,
        eos_token_ids=frozenset(),
    )


@pytest.fixture
def engine_config(model_config: ModelConfig) -> Callable[..., EngineConfig]:
    """`EngineConfig` with small limits; keyword arguments override."""

    def make(**overrides: object) -> EngineConfig:
        settings: dict[str, object] = dict(
            model=model_config,
            checkpoint=Path("/nonexistent"),
            dtype=DType.FLOAT32,
            max_model_len=1024,
            max_batch_tokens=64,
            max_sequences=16,
            block_size=4,
        )
        return EngineConfig(**(settings | overrides))  # type: ignore[arg-type]

    return make


@pytest.fixture
def capacity() -> Callable[[int], CacheCapacity]:
    """A cache of so many blocks of 4 tokens."""
    return lambda num_blocks: CacheCapacity(num_blocks=num_blocks, block_size=4)

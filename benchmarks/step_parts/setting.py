"""`Setting`: how large everything is around a number of running sequences: limits of the engine, and its cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine import CacheCapacity, DType, EngineConfig
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config

BLOCK_SIZE: Final = 16
MAX_MODEL_LEN: Final = 8192
VOCAB_SIZE: Final = 32_000


@dataclass(frozen=True, slots=True)
class Setting:
    """An engine of `num_running` sequences; nothing about it depends on a model that has weights."""

    num_running: int
    num_ranks: int = 1

    @property
    def capacity(self) -> CacheCapacity:
        """Half as many blocks again as ShareGPT's sequences hold on average, so that prefixes are kept and evicted."""
        return CacheCapacity(num_blocks=48 * self.num_running + 1024, block_size=BLOCK_SIZE)

    @property
    def config(self) -> EngineConfig:
        """Room for as many prompt tokens per step as decodes: arrivals bring 0.86 of that."""
        model = sized_config(
            Architecture.LLAMA,
            hidden_size=64,
            intermediate_size=64,
            num_layers=1,
            num_heads=4,
            num_kv_heads=4,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=MAX_MODEL_LEN,
            dtype=DType.FLOAT32,
        )
        return EngineConfig(
            model=model,
            checkpoint=Path("no checkpoint"),
            dtype=DType.FLOAT32,
            tensor_parallel=self.num_ranks,
            max_model_len=MAX_MODEL_LEN,
            max_batch_tokens=max(2048, 2 * self.num_running),
            max_sequences=self.num_running,
            block_size=BLOCK_SIZE,
            num_threads=1,
        )

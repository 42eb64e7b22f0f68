"""The random Llama that all engines are compared with: small enough for two cores."""

from pathlib import Path

from engine.model_config import Architecture, DType
from engine.random_checkpoint import sized_config, write_random_checkpoint


def random_llama(models: Path, dtype: DType) -> Path:
    """Its checkpoint in a folder of its own below `models`, written where it is not there yet."""
    checkpoint = models / f"llama-8x512-{dtype}" / "checkpoint"
    if not checkpoint.exists():
        model = sized_config(
            Architecture.LLAMA,
            hidden_size=512,
            intermediate_size=1408,
            num_layers=8,
            num_heads=8,
            num_kv_heads=4,
            vocab_size=32_000,
            max_position_embeddings=8192,
            dtype=dtype,
        )
        partial = checkpoint.with_suffix(".partial")
        write_random_checkpoint(partial, model)
        partial.rename(checkpoint)
    return checkpoint

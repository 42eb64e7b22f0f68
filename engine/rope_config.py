"""`RopeConfig`: how positions become rotations, read from config.json; `engine.layers.rotary` makes the table of it."""

import math
from dataclasses import dataclass

from engine.config_json import ConfigJson
from engine.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `kind` is config.json's rope_type: default, linear, dynamic, llama3 or yarn.

    `attention_factor` scales cosine and sine (yarn). A dynamic table differs from the default one only beyond
    max_position_embeddings, which no request may exceed.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    @classmethod
    def from_json(cls, config: ConfigJson, max_position_embeddings: int, default_theta: float) -> "RopeConfig":
        """Read rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
        rope = config.object("rope_parameters", "rope_scaling")
        kind = rope.text("rope_type", "type", default="default")
        if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
            raise CheckpointError(
                f"{rope.where}: rope_type {kind!r} is not supported; default, linear, dynamic, llama3 and yarn are."
            )
        for source in (config, rope):
            if source.number("partial_rotary_factor", default=1.0) != 1:
                raise CheckpointError(f"{source.where}: partial_rotary_factor other than 1 is not supported.")
        theta = rope.number("rope_theta", default=config.number("rope_theta", default=default_theta))
        if kind == "default":
            return cls(theta=theta)
        original = config.integer(
            "original_max_position_embeddings",
            default=rope.integer("original_max_position_embeddings", default=max_position_embeddings),
        )
        if kind == "yarn":
            factor = rope.number("factor", default=max_position_embeddings / original)
        else:
            factor = rope.number("factor")
        return cls(
            theta=theta,
            kind=kind,
            factor=factor,
            low_freq_factor=rope.number("low_freq_factor") if kind == "llama3" else 1.0,
            high_freq_factor=rope.number("high_freq_factor") if kind == "llama3" else 4.0,
            original_max_position_embeddings=original if kind in ("llama3", "yarn") else None,
            beta_fast=rope.number("beta_fast", default=32.0),
            beta_slow=rope.number("beta_slow", default=1.0),
            attention_factor=_yarn_attention_factor(rope, factor) if kind == "yarn" else 1.0,
            truncate=rope.boolean("truncate", True),
        )


def _yarn_attention_factor(rope: ConfigJson, factor: float) -> float:
    """YaRN (arXiv 2309.00071), section 3.4; mscale and mscale_all_dim are DeepSeek's generalisation."""
    if rope.has("attention_factor"):
        return rope.number("attention_factor")

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return temperature(rope.number("mscale")) / temperature(rope.number("mscale_all_dim"))
    return temperature(1.0)

"""Rotary position embedding (arXiv 2104.09864): the table of cosines and sines.

Follows transformers' modeling_rope_utils: linear scaling, llama3's frequency bands and YaRN (arXiv 2309.00071).
Shapes: M positions, T tokens, H heads, d elements of a head, h = d / 2 frequencies.
"""

import math

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from engine.rope_config import RopeConfig


class RotaryTable:
    """cos and sin of every position of a model, computed once and shared by its layers.

    The table [M, d] holds h cosines and then h sines per position, in float32 (float64 for a float64 model).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        frequencies_h = _frequencies(config.rope, config.head_dim, wide)
        angles_Mh = torch.outer(torch.arange(config.max_position_embeddings, dtype=wide), frequencies_h)
        table_Md = torch.cat((angles_Mh.cos(), angles_Mh.sin()), dim=-1) * config.rope.attention_factor
        self.table_Md = table_Md.to(device)

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, h] of these positions."""
        cos_T1h, sin_T1h = self.table_Md[positions_T].unsqueeze(1).chunk(2, dim=-1)
        return cos_T1h, sin_T1h


def _frequencies(rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Radians per position of each pair of elements, [h]."""
    periods_h = rope.theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    frequencies_h = 1.0 / periods_h
    match rope.kind:
        case "linear":
            return frequencies_h / rope.factor
        case "llama3":
            return _llama3(rope, frequencies_h)
        case "yarn":
            extrapolated_h = _yarn_extrapolation(rope, head_dim, dtype)
            return frequencies_h / rope.factor * (1 - extrapolated_h) + frequencies_h * extrapolated_h
        case _:
            return frequencies_h


def _llama3(rope: RopeConfig, frequencies_h: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones are kept, those between are interpolated."""
    assert rope.original_max_position_embeddings is not None
    turns_h = rope.original_max_position_embeddings * frequencies_h / (2 * math.pi)
    kept_h = (turns_h - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept_h = kept_h.clamp(0, 1)
    return (1 - kept_h) * frequencies_h / rope.factor + kept_h * frequencies_h


def _yarn_extrapolation(rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> Tensor:
    """How much of each frequency is kept rather than stretched, [h] in 0..1: a ramp over the dimensions."""
    assert rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings

    def dimension(num_turns: float) -> float:
        return head_dim * math.log(context / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp_h = ((torch.arange(head_dim // 2, dtype=dtype) - low) / (high - low)).clamp(0, 1)
    return 1 - ramp_h

"""The rotary table against transformers' functions, and rotation against complex multiplication."""

from typing import Any

import pytest
import torch

from engine.kernels.fused import rotate
from engine.layers.rotary import RotaryTable
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config
from engine.rope_config import RopeConfig

CPU = torch.device("cpu")
ROPES = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=2.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512),
    "yarn": dict(factor=8.0, attention_factor=1.25, original_max_position_embeddings=512),
}


def _table(rope: RopeConfig, dtype: torch.dtype = torch.float32) -> RotaryTable:
    config = sized_config(Architecture.LLAMA, head_dim=32, max_position_embeddings=4096, rope=rope)
    return RotaryTable(config, dtype, CPU)


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_equal_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    options: dict[str, Any] = ROPES[kind]
    parameters = {"rope_type": kind, "rope_theta": 5e5, **options}
    reference = LlamaConfig(head_dim=32, max_position_embeddings=4096, rope_parameters=parameters)
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](reference, CPU)
    angles = torch.outer(torch.arange(4096).float(), frequencies)

    table = _table(RopeConfig(kind=kind, theta=5e5, **options))
    cos, sin = table.at(torch.arange(4096))
    # A frequency's last bit is 6e-8 of it, and the largest angle is 4096.
    assert torch.allclose(cos[:, 0], angles.cos() * scale, atol=1e-3)
    assert torch.allclose(sin[:, 0], angles.sin() * scale, atol=1e-3)
    assert torch.allclose(cos[:64, 0], angles[:64].cos() * scale, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_is_complex_multiplication(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 17, 4095])
    heads = torch.randn(4, 3, 32).to(dtype)
    table = _table(RopeConfig(), dtype)
    rotated = rotate(heads, *table.at(positions))

    angles = positions[:, None].double() * 10_000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    numbers = torch.complex(*heads.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((numbers.real, numbers.imag), dim=-1)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert rotated.dtype is dtype
    assert torch.allclose(rotated.double(), expected, atol=tolerance)


def test_the_table_is_wide_whatever_the_model_computes_in() -> None:
    assert _table(RopeConfig(), torch.bfloat16).table_Md.dtype is torch.float32
    assert _table(RopeConfig(), torch.float64).table_Md.dtype is torch.float64

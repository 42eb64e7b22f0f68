"""A cache in FP8 with scale 1: what is written is the nearest e4m3, and attention over it is attention over that."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.kernels import reference
from engine.kernels.prefill import PrefillPlan, prefill_attention
from engine.memory_budget import bytes_per_block
from engine.model_config import DType
from engine.number_format import NumberFormat
from engine.pipeline.synthetic_step import synthetic_cache

CPU = torch.device("cpu")
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
SHAPE = (6, 2, 4, 16)  # blocks, heads, slots, elements
TABLES = torch.tensor([[5, 1, 3], [0, 2, 4]])
LENGTHS = (11, 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 5])
def test_attention_reads_what_was_stored(device: str, window: int | None) -> None:
    keys, values = (torch.zeros(SHAPE, dtype=torch.float8_e4m3fn, device=device) for _ in range(2))
    tables = TABLES.to(device)
    for table, length in zip(tables, LENGTHS, strict=True):
        key, value = (torch.randn(length, 2, 16, device=device).bfloat16() for _ in range(2))
        positions = torch.arange(length, device=device)
        slots = table[positions // 4] * 4 + positions % 4
        reference.write_kv(key, value, slots, keys, values)
        places = (table[positions // 4], slice(None), positions % 4)
        assert torch.equal(keys.float()[places], key.to(torch.float8_e4m3fn).float())
        assert torch.equal(values.float()[places], value.to(torch.float8_e4m3fn).float())
    wide = keys.float(), values.float()
    query_DHd = torch.randn(2, 4, 16, device=device).bfloat16()
    lengths = torch.tensor(LENGTHS, device=device)
    found, expected = (
        reference.decode_attention(query_DHd, *cache, tables, lengths, max(LENGTHS), 0.25, window)
        for cache in ((keys, values), wide)
    )
    assert torch.equal(found, expected) and found.dtype is torch.bfloat16
    query_QHd = torch.randn(9, 4, 16, device=device).bfloat16()
    found, expected = (
        reference.prefill_attention(query_QHd, *cache, tables, (5, 4), LENGTHS, 0.25, window)
        for cache in ((keys, values), wide)
    )
    assert torch.equal(found, expected) and found.dtype is torch.bfloat16
    if device == "cpu":
        plan = PrefillPlan.of(tables, (5, 4), LENGTHS, num_kv_heads=2, num_heads=4, block_size=4, window=window)
        found, expected = (
            prefill_attention(query_QHd, *cache, plan, scale=0.25, window=window) for cache in ((keys, values), wide)
        )
        assert torch.equal(found, expected)


def test_what_does_not_fit_is_finite() -> None:
    keys, values = (torch.zeros(1, 1, 2, 4, dtype=torch.float8_e4m3fn) for _ in range(2))
    odd = torch.tensor([1e4, -torch.inf, torch.nan, 447.0]).bfloat16().view(1, 1, 4)
    reference.write_kv(odd, odd, torch.tensor([1]), keys, values)
    assert keys[0, 0].float().tolist() == [[0, 0, 0, 0], [448, -448, 0, 448]]


def test_measuring_has_a_cache_like_it(engine_config: Callable[..., EngineConfig]) -> None:
    plain = engine_config(dtype=DType.BFLOAT16)
    config = replace(plain, kv_cache_format=NumberFormat.FP8)
    assert bytes_per_block(config) == bytes_per_block(plain) // 2
    cache = synthetic_cache(config, 8000, CPU)
    assert cache.num_blocks == 2000
    for tensor in (cache.keys[0], cache.values[0]):
        assert tensor.dtype is torch.float8_e4m3fn
        assert 0.9 < tensor.float().std() < 1.1

"""A rank's memory: the cache takes what it is allowed, and the parts add up to what the operating system says.

In a process of its own, because what else this one has done would be counted.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import EngineConfig
from engine.host_memory import ResidentMemory, resident_memory
from engine.kv_cache import KVCache
from engine.memory_budget import bytes_per_block, num_affordable_blocks
from engine.memory_use import MemoryPart, MemoryUse
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_bytes import tensor_bytes

MakeConfig = Callable[..., EngineConfig]
ROOT = Path(__file__).parents[2]
MEBIBYTE = 2**20
CACHE_BYTES = 96 * MEBIBYTE + 12_345  # of no whole number of blocks

# Prints the parts, what is resident, and how much that grows when every page of the cache is written.
PROGRAM = f"""
import json, sys
from pathlib import Path
from engine import EngineConfig, ModelConfig, resident_memory
from engine.worker import Worker

checkpoint = Path(sys.argv[1])
model = ModelConfig.from_checkpoint(checkpoint)
worker = Worker(EngineConfig(
    model=model, checkpoint=checkpoint, dtype=model.dtype, max_model_len=1024, cache_bytes={CACHE_BYTES},
    num_threads=1, plan_seconds=0,
))
worker.start()
use = worker.memory()
for tensor in (*worker._cache.keys, *worker._cache.values):
    tensor.fill_(1)
print(json.dumps({{
    "parts": use.parts, "budget": use.cache_budget, "resident": use.memory.resident, "unexplained": use.unexplained,
    "grown": resident_memory().anonymous - use.memory.anonymous,
}}))
"""


@pytest.mark.skipif(resident_memory() is None, reason="there is no /proc")
def test_the_memory_of_a_rank_is_explained(tmp_path: Path) -> None:
    config = sized_config(
        Architecture.LLAMA, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4, num_kv_heads=4
    )
    write_random_checkpoint(tmp_path, config)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    told = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert told["parts"][MemoryPart.WEIGHTS] == pytest.approx(stored, abs=16384), "the file is weights and a header"
    assert told["budget"] == CACHE_BYTES
    block = 2 * 4 * 4 * 16 * 64 * config.dtype.num_bytes
    assert CACHE_BYTES - block < told["parts"][MemoryPart.KV_CACHE] <= CACHE_BYTES
    assert abs(told["grown"]) < 4 * MEBIBYTE, "every page of the cache was there already"
    assert abs(told["unexplained"]) < 0.06 * told["resident"]


@pytest.mark.parametrize("cache_bytes", [2**20, 2**20 + 1, 3_000_001])
def test_the_cache_fills_its_budget_and_no_more(engine_config: MakeConfig, cache_bytes: int) -> None:
    config = replace(engine_config(max_model_len=64), cache_bytes=cache_bytes, num_blocks=None)
    cache = KVCache.allocate(config, num_affordable_blocks(config, 2**30), torch.device("cpu"))
    assert cache_bytes - bytes_per_block(config) < cache.num_bytes <= cache_bytes
    assert tensor_bytes(cache) == {"cpu": cache.num_bytes}


def test_shared_memory_counts_once() -> None:
    linear = nn.Linear(8, 4, bias=False)
    tied = nn.Linear(8, 4, bias=False)
    tied.weight = linear.weight
    assert tensor_bytes([linear, tied, linear.weight.data[1:], {"other": torch.zeros(3)}]) == {"cpu": 4 * 32 + 12}


def test_packed_weights_count() -> None:
    weight = torch.zeros(32, 64)
    assert tensor_bytes([weight.to_mkldnn()]) == {"cpu": weight.nbytes}


def test_what_no_part_explains_is_the_rest() -> None:
    use = MemoryUse(
        process="rank 0",
        pid=1,
        parts={MemoryPart.WEIGHTS: 60, MemoryPart.KV_CACHE: 30},
        memory=ResidentMemory(resident=100, proportional=80, anonymous=95),
    )
    assert (use.explained, use.unexplained) == (90, 10)


def test_memory_of_others_that_ended_is_unknown() -> None:
    assert resident_memory(2**22 + 1) is None

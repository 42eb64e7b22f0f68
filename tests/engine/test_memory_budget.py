from collections.abc import Callable
from dataclasses import replace

import pytest

from engine import CapacityError, DeviceKind, EngineConfig, check_host_memory
from engine.memory_budget import bytes_per_block
from engine.weight_layout import rank_weight_bytes

MakeConfig = Callable[..., EngineConfig]


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda num_bytes: monkeypatch.setattr("engine.memory_budget.available_host_bytes", lambda: num_bytes)


def test_weights_of_every_rank_count(engine_config: MakeConfig, free_bytes: Callable[[int], None]) -> None:
    config = engine_config(tensor_parallel=2)
    weights = rank_weight_bytes(config.model, config.dtype, 2)
    free_bytes(4 * weights - 1)
    with pytest.raises(CapacityError, match="weights of 4 ranks"):
        check_host_memory(config, 2)
    free_bytes(4 * weights + 2**30)
    check_host_memory(config, 2)


def test_a_given_cache_is_taken_by_every_rank(engine_config: MakeConfig, free_bytes: Callable[[int], None]) -> None:
    config = engine_config(tensor_parallel=2)
    cache = bytes_per_block(config) * config.max_blocks_per_sequence
    config = replace(config, cache_bytes=cache)
    weights = 4 * rank_weight_bytes(config.model, config.dtype, 2)
    free_bytes(weights + 4 * cache)
    check_host_memory(config, 2)
    free_bytes(weights + 4 * cache - 4)
    with pytest.raises(CapacityError, match="cache_bytes asks for"):
        check_host_memory(config, 2)


def test_gpus_are_not_judged_by_the_host(engine_config: MakeConfig, free_bytes: Callable[[int], None]) -> None:
    free_bytes(1)
    check_host_memory(engine_config(device=DeviceKind.CUDA))

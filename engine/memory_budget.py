"""The memory budget of an engine: bytes of its weights and of a KV block, and how many blocks a rank can afford.

Torch-free, so that what cannot fit is refused before any rank starts. Knows the host's memory; a GPU's is known only
where the GPU is, and given to `num_affordable_blocks` from there.
"""

import os

from engine.config import DeviceKind, EngineConfig
from engine.errors import CapacityError
from engine.weight_layout import rank_weight_bytes

DEFAULT_CPU_CACHE_BYTES = 2**30  # per rank, where the user names no size: a laptop shall survive the default


def bytes_per_block(config: EngineConfig) -> int:
    """Bytes one block takes on one rank: keys and values of all layers."""
    model = config.model
    num_kv_heads = model.kv_heads_per_rank(config.tensor_parallel)
    return 2 * model.num_layers * num_kv_heads * config.block_size * model.head_dim * config.cache_format.num_bytes


def available_host_bytes() -> int:
    """Memory that the operating system can still give."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def check_host_memory(config: EngineConfig, num_groups: int = 1) -> None:
    """Raise `CapacityError` unless `num_groups` groups of CPU ranks fit this machine: their weights, and a cache each.

    Says nothing of GPUs: how much memory is free there, their ranks find out.
    """
    if config.device is not DeviceKind.CPU:
        return
    weights = rank_weight_bytes(config.model, config.dtype, config.tensor_parallel, in_fp8=config.in_fp8)
    free = available_host_bytes()
    num_ranks = num_groups * config.tensor_parallel
    if num_ranks * weights > free:
        raise CapacityError(
            f"The weights of {num_ranks} ranks take {num_ranks * weights / 2**30:.2f} GiB in "
            f"{config.number_format.value}, but only {free / 2**30:.2f} GiB of this machine's memory are free: use a "
            "smaller dtype or model."
        )
    # A size that the user gave is every rank's own; the default is a share of what its group gets.
    is_given = config.cache_bytes is not None or config.num_blocks is not None
    num_affordable_blocks(config, (free - num_ranks * weights) // (num_ranks if is_given else num_groups))


def cache_budget(config: EngineConfig, free_bytes: int) -> tuple[int, str]:
    """Bytes that the cache of one rank may take, given the `free_bytes` of its device, and which setting says so.

    `num_blocks` decides, else `cache_bytes`, else `cache_fraction` of the free memory: all of it on a GPU, which
    belongs to one rank; on a CPU the rank's share of the machine, and no more than `DEFAULT_CPU_CACHE_BYTES` (or
    one longest sequence), because there the memory is the machine's and the user may be running other things.
    """
    per_block = bytes_per_block(config)
    if config.num_blocks is not None:
        return config.num_blocks * per_block, "num_blocks"
    if config.cache_bytes is not None:
        return config.cache_bytes, "cache_bytes"
    if config.device is DeviceKind.CUDA:
        return int(config.cache_fraction * free_bytes), "cache_fraction"
    share = int(config.cache_fraction * free_bytes / config.tensor_parallel)
    wanted = max(DEFAULT_CPU_CACHE_BYTES, config.max_blocks_per_sequence * per_block)
    return min(share, wanted), "cache_fraction of this rank's share of the free memory"


def num_affordable_blocks(config: EngineConfig, free_bytes: int) -> int:
    """Blocks of one rank: as many as `cache_budget` holds. Raises `CapacityError` when no sequence would fit."""
    per_block = bytes_per_block(config)
    needed = config.max_blocks_per_sequence
    budget, source = cache_budget(config, free_bytes)
    num_blocks = budget // per_block
    if num_blocks < needed:
        raise CapacityError(
            f"The KV cache holds {num_blocks * config.block_size} tokens, but one sequence of max_model_len "
            f"{config.max_model_len} needs {needed} blocks = {needed * per_block / 2**20:.1f} MiB per rank, and "
            f"{source} gives {budget / 2**20:.1f} MiB. Lower max_model_len, or raise cache_bytes (`cache` of a recipe) "
            "or num_blocks."
        )
    if budget > free_bytes:
        raise CapacityError(
            f"{source} asks for a KV cache of {budget / 2**30:.2f} GiB per rank, but only {free_bytes / 2**30:.2f} GiB "
            f"are free on the {config.device.value} device: at most {free_bytes // per_block} blocks fit."
        )
    return int(num_blocks)

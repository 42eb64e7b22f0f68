"""`KVCache`: one rank's keys and values of every layer, in blocks; and how many blocks a rank can afford.

It knows no sequences and does no accounting: the control plane's `BlockManager` decides who owns which block.
"""

import os

import torch
from torch import Tensor

from engine.config import DeviceKind, EngineConfig
from engine.errors import CapacityError

DEFAULT_CPU_CACHE_BYTES = 2**30  # per rank, where the user names no size: a laptop shall survive the default


class KVCache:
    """Per layer two tensors [num_blocks, num_kv_heads, block_size, head_dim] ("HND"): the tokens of one (block, head)
    are one contiguous tile. Zeroed at the start, because a masked position still multiplies by its value.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: tuple[Tensor, ...] = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self.values: tuple[Tensor, ...] = tuple(torch.zeros_like(keys) for keys in self.keys)

    @classmethod
    def allocate(cls, config: EngineConfig, num_blocks: int, device: torch.device) -> "KVCache":
        """The cache of one rank of `config`'s group; raises `CapacityError` when the memory is not there after all."""
        try:
            return cls(
                num_layers=config.model.num_layers,
                num_blocks=num_blocks,
                num_kv_heads=config.model.kv_heads_per_rank(config.tensor_parallel),
                block_size=config.block_size,
                head_dim=config.model.head_dim,
                dtype=getattr(torch, config.dtype.value),
                device=device,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            num_bytes = num_blocks * KVCache.bytes_per_block(config)
            raise CapacityError(
                f"The KV cache of {num_blocks} blocks ({num_bytes / 2**30:.2f} GiB per rank) could not be allocated on "
                f"{device}: lower cache_bytes, cache_fraction or num_blocks."
            ) from error

    @staticmethod
    def bytes_per_block(config: EngineConfig, tensor_parallel: int | None = None) -> int:
        """Bytes one block takes on one rank: keys and values of all layers."""
        model = config.model
        num_kv_heads = model.kv_heads_per_rank(tensor_parallel or config.tensor_parallel)
        return 2 * model.num_layers * num_kv_heads * config.block_size * model.head_dim * config.dtype.num_bytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        return self.keys[index], self.values[index]


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now: the device's free memory, or what the operating system can still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def num_affordable_blocks(config: EngineConfig, free_bytes: int) -> int:
    """Blocks of one rank, given the `free_bytes` of its device; raises `CapacityError` when no sequence would fit.

    `num_blocks` decides, else `cache_bytes`, else `cache_fraction` of the free memory: all of it on a GPU, which
    belongs to one rank; on a CPU the rank's share of the machine, and no more than `DEFAULT_CPU_CACHE_BYTES` (or
    one longest sequence), because there the memory is the machine's and the user may be running other things.
    """
    per_block = KVCache.bytes_per_block(config)
    needed = config.max_blocks_per_sequence
    if config.num_blocks is not None:
        num_blocks, budget, source = config.num_blocks, config.num_blocks * per_block, "num_blocks"
    else:
        if config.cache_bytes is not None:
            budget, source = config.cache_bytes, "cache_bytes"
        elif config.device is DeviceKind.CUDA:
            budget, source = int(config.cache_fraction * free_bytes), "cache_fraction"
        else:
            share = int(config.cache_fraction * free_bytes / config.tensor_parallel)
            wanted = max(DEFAULT_CPU_CACHE_BYTES, needed * per_block)
            budget, source = min(share, wanted), "cache_fraction of this rank's share of the free memory"
        num_blocks = budget // per_block
    if num_blocks < needed:
        raise CapacityError(
            f"The KV cache holds {num_blocks * config.block_size} tokens, but one sequence of max_model_len "
            f"{config.max_model_len} needs {needed} blocks = {needed * per_block / 2**20:.1f} MiB per rank, and "
            f"{source} gives {budget / 2**20:.1f} MiB. Lower max_model_len, or raise cache_bytes or num_blocks."
        )
    if budget > free_bytes:
        raise CapacityError(
            f"{source} asks for a KV cache of {budget / 2**30:.2f} GiB per rank, but only {free_bytes / 2**30:.2f} GiB "
            f"are free on the {config.device.value} device: at most {free_bytes // per_block} blocks fit."
        )
    return int(num_blocks)

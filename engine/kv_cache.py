"""`KVCache`: one rank's keys and values of every layer, in blocks.

It knows no sequences and does no accounting: the control plane's `BlockManager` decides who owns which block, and
`engine.memory_budget` how many a rank can afford.
"""

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import CapacityError
from engine.host_memory import prefer_huge_pages
from engine.kv_scales import KVScales
from engine.memory_budget import bytes_per_block


class KVCache:
    """Per layer two tensors [num_blocks, num_kv_heads, block_size, head_dim] ("HND"): the tokens of one (block, head)
    are one contiguous tile. Zeroed at the start, because a masked position still multiplies by its value.

    Keys and values of FP8 stand for themselves times the layer's scale in `scales`; without, and in other dtypes, for
    themselves.
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
        scales: KVScales | None = None,
    ) -> None:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._scales = scales if dtype.itemsize == 1 else None
        # One array, so that on a CPU it can lie in huge pages: attention reads tiles of a few KiB from all over it.
        tiles = torch.empty(2 * num_layers, *shape, dtype=dtype, device=device)
        if tiles.device.type == "cpu":
            prefer_huge_pages(tiles.data_ptr(), tiles.nbytes)
        tiles.zero_()
        self.keys: tuple[Tensor, ...] = tiles[:num_layers].unbind()
        self.values: tuple[Tensor, ...] = tiles[num_layers:].unbind()

    @classmethod
    def allocate(
        cls, config: EngineConfig, num_blocks: int, device: torch.device, scales: KVScales | None = None
    ) -> "KVCache":
        """The cache of one rank of `config`'s group; raises `CapacityError` when the memory is not there after all."""
        try:
            return cls(
                num_layers=config.model.num_layers,
                num_blocks=num_blocks,
                num_kv_heads=config.model.kv_heads_per_rank(config.tensor_parallel),
                block_size=config.block_size,
                head_dim=config.model.head_dim,
                dtype=getattr(torch, config.cache_format.torch_name),
                device=device,
                scales=scales,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            num_bytes = num_blocks * bytes_per_block(config)
            raise CapacityError(
                f"The KV cache of {num_blocks} blocks ({num_bytes / 2**30:.2f} GiB per rank) could not be allocated on "
                f"{device}: lower cache_bytes (`cache` of a recipe), cache_fraction or num_blocks."
            ) from error

    @property
    def num_bytes(self) -> int:
        """Of all blocks of all layers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        return self.keys[index], self.values[index]

    def scales(self, index: int) -> tuple[float, float]:
        """Of keys and of values of one layer: what they are divided by to be stored."""
        return (1.0, 1.0) if self._scales is None else (self._scales.keys[index], self._scales.values[index])

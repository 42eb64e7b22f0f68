"""Random keys and values of sequences in a cache of shuffled blocks, for tests of attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.reference import LARGEST_CACHED


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCache:
    """A cache [N, K, S, d], tables [sequences, B] with stray numbers behind each sequence's last block, and lengths."""

    keys: Tensor
    values: Tensor
    block_tables: Tensor
    lengths: Tensor

    @classmethod
    def random(
        cls,
        lengths: tuple[int, ...],
        *,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        index_dtype: torch.dtype = torch.int32,
    ) -> "PagedCache":
        """Slots that no sequence owns hold the largest numbers that a cache can: whoever reads them shows it."""
        needed = [-(-length // block_size) for length in lengths]
        shape = (sum(needed) + 2, num_kv_heads, block_size, head_dim)
        largest = min(LARGEST_CACHED, torch.finfo(dtype).max)
        keys, values = (torch.full(shape, largest, dtype=torch.float32) for _ in range(2))
        order = iter(torch.randperm(shape[0])[: sum(needed)].tolist())
        tables = torch.full((len(lengths), max([*needed, 1]) + 1), shape[0] - 1, dtype=index_dtype)
        for row, length in enumerate(lengths):
            for column in range(needed[row]):
                block = tables[row, column] = next(order)
                num_filled = min(block_size, length - column * block_size)
                keys[block, :, :num_filled] = torch.randn(num_kv_heads, num_filled, head_dim)
                values[block, :, :num_filled] = torch.randn(num_kv_heads, num_filled, head_dim)
        return cls(
            keys=keys.to(dtype).to(device),
            values=values.to(dtype).to(device),
            block_tables=tables.to(device),
            lengths=torch.tensor(lengths, dtype=index_dtype, device=device),
        )

    def plain(self, key_scale: float = 1.0, value_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Keys and values as float64 on a CPU, for a reference; scaled."""
        return self.keys.cpu().double() * key_scale, self.values.cpu().double() * value_scale


# Of results about 1 large, for a cache of each dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float8_e4m3fn: 3e-2}

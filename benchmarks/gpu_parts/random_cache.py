"""`RandomCache`: keys and values of sequences in shuffled blocks of a paged cache, made on the device.

Slots that no sequence owns hold the largest numbers that a cache can, so that a kernel that reads them shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.reference import LARGEST_CACHED


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomCache:
    """A cache [N, K, S, d], block tables [sequences, B] and lengths [sequences], int32."""

    keys: Tensor
    values: Tensor
    block_tables: Tensor
    lengths: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "RandomCache":
        """For sequences of these lengths, of which some may be 0."""
        needed = [-(-length // block_size) for length in lengths]
        num_blocks = sum(needed) + 2
        order = torch.randperm(num_blocks, device=device, dtype=torch.int32)[: sum(needed)]
        width = max([*needed, 1])
        tables = torch.full((len(lengths), width), num_blocks - 1, dtype=torch.int32, device=device)
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        largest = min(LARGEST_CACHED, torch.finfo(dtype).max)
        keys, values = (torch.randn(shape, device=device, dtype=torch.float32) for _ in range(2))
        is_owned = torch.zeros(num_blocks, block_size, dtype=torch.bool, device=device)
        start = 0
        for row, count in enumerate(needed):
            tables[row, :count] = order[start : start + count]
            start += count
        places = torch.arange(width * block_size, device=device).view(width, block_size)
        lengths_S = torch.tensor(list(lengths), dtype=torch.int32, device=device)
        filled = places < lengths_S[:, None, None]  # [sequences, B, S]
        is_used = torch.arange(width, device=device) < torch.tensor(needed, device=device)[:, None]
        is_owned[tables[is_used].long()] = filled[is_used]
        for cache in (keys, values):
            cache.masked_fill_(~is_owned[:, None, :, None], largest)
        return cls(keys=keys.to(dtype), values=values.to(dtype), block_tables=tables, lengths=lengths_S)

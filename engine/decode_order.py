"""`DecodeOrder`: decodes put in order of their lengths and cut into parts that are attended together.

A CPU attends every sequence of a call to the context of the longest. Where lengths differ that can be most of the work;
a call for every length would cost more than it saves. Lengths of decodes grow together, so an order lasts as long as
the batch has the same sequences. Pure: it knows lengths and costs, no tensors.
"""

from dataclasses import dataclass

import numpy as np

from engine.sampling_table import Int64s

# A call for a part costs as much as reading so many bytes of the cache does (25 us on an AMD EPYC, two cores).
_PART_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOrder:
    """`order` [D] names the decodes, shortest first. `parts` are ranges of it and the blocks of the longest of each."""

    order: Int64s
    parts: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, lengths_D: Int64s, *, block_size: int, block_bytes: int) -> "DecodeOrder | None":
        """For contexts of these lengths, a block of which takes `block_bytes`. None: all may as well be one part."""
        num_blocks_D = -(-lengths_D // block_size)
        if (num_blocks_D.max() * len(lengths_D) - num_blocks_D.sum()) * block_bytes <= _PART_BYTES:
            return None
        order = np.argsort(lengths_D, kind="stable")
        parts = parts_of(lengths_D[order], block_size=block_size, block_bytes=block_bytes)
        return cls(order=order, parts=parts) if len(parts) > 1 else None


def parts_of(lengths_D: Int64s, *, block_size: int, block_bytes: int) -> tuple[tuple[int, int, int], ...]:
    """Ranges of ascending lengths with the blocks of each one's longest: in none are more bytes read in vain than a
    part is worth.
    """
    num_blocks, counts = np.unique(-(-lengths_D // block_size), return_counts=True)
    parts: list[tuple[int, int, int]] = []
    stop = start = len(lengths_D)
    width = wasted = 0
    for blocks, count in zip(num_blocks[::-1].tolist(), counts[::-1].tolist(), strict=True):
        wasted += count * (width - blocks) * block_bytes
        if start < stop and wasted > _PART_BYTES:
            parts.append((start, stop, width))
            stop = start
        if start == stop:
            width, wasted = blocks, 0
        start -= count
    if start < stop:
        parts.append((start, stop, width))
    return tuple(reversed(parts))

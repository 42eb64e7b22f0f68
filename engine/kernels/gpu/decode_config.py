"""`DecodeConfig`: tile, warps and stages of decode attention, and which of them a cache and a number of CTAs get.

Legend: L tokens of a tile, d head dimension. What has to be in flight follows from Little's law: 4.3 TB/s x 0.8 us is
3.4 MB, that is 26 KiB on each of 132 SMs, but 86 KiB on each of 40. So a launch of two CTAs per SM takes few stages
(one CTA's products hide behind the other's loads), and a launch on few SMs, one CTA each, takes as many as fit.
"""

import functools
from dataclasses import dataclass

# Shared memory that two CTAs of an SM, or one alone, may take: 228 KiB less 1 KiB that the driver takes for each.
_SHARED_OF_TWO = 113 * 1024
_SHARED_OF_ONE = 227 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One way to launch the kernel; `max_registers` leaves room for a GEMM on the same SM."""

    tile: int  # tokens
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def shared_bytes(self, *, head_dim: int, rows: int, cache_bytes: int, query_bytes: int) -> int:
        """Shared memory of a CTA, to within a few KiB; `*_bytes` are those of an element, `rows` the padded group.

        Stages of keys, values and queries, weights on their way to a product, and what reductions take.
        """
        width = 1 << (head_dim - 1).bit_length()
        stage = (2 * self.tile * cache_bytes + rows * query_bytes) * width
        return self.num_stages * stage + self.tile * rows * query_bytes + 2048


# Tensor cores take 64 tokens at a time; wider caches need smaller tiles. More than four stages of an fp8 cache cost too
# many registers, through which Triton takes its values; a tile of 128 tokens and 8 warps keeps more of it in flight.
CANDIDATES = tuple(
    DecodeConfig(tile=tile, num_warps=num_warps, num_stages=num_stages)
    for tile, num_warps in ((128, 8), (64, 4), (32, 4), (16, 4))
    for num_stages in (6, 5, 4, 3, 2)
)
# Beside a GEMM of three stages (`gemm_config.CORESIDENT`): what that leaves of an SM's shared memory, and registers to
# match.
CORESIDENT_BYTES = 80 * 1024
CORESIDENT = DecodeConfig(tile=64, num_warps=4, num_stages=2, max_registers=104)


def padded_rows(group_size: int) -> int:
    """Rows that the query heads of a KV head take in a product: tensor cores want 16 at least."""
    return max(16, 1 << (group_size - 1).bit_length())


@functools.lru_cache(maxsize=256)
def decode_config(
    *, head_dim: int, group_size: int, cache_bytes: int, query_bytes: int, num_ctas: int, num_sms: int = 132
) -> DecodeConfig:
    """Of the largest tile the most stages that fit, twice on an SM where so many are launched; a function of shapes.

    Float32 queries get small tiles and two stages: their products are exact and so not for tensor cores, right rather
    than fast.
    """
    is_alone = num_ctas <= num_sms
    most_stages = 2 if query_bytes == 4 else 4 if cache_bytes == 1 else 6
    largest_tile = 32 if query_bytes == 4 else 128 if is_alone and cache_bytes == 1 else 64
    candidates = [config for config in CANDIDATES if config.tile <= largest_tile and config.num_stages <= most_stages]
    for limit in (_SHARED_OF_ONE,) if is_alone else (_SHARED_OF_TWO, _SHARED_OF_ONE):
        for config in candidates:
            shared = config.shared_bytes(
                head_dim=head_dim,
                rows=padded_rows(group_size),
                cache_bytes=cache_bytes,
                query_bytes=query_bytes,
            )
            if shared <= limit:
                return config
    return candidates[-1]

"""`PaddedInputs`: what the host says of a padded step, a few integers in one place on the device that stays.

A graph reads them there: rows and positions of its tokens, decodes' rows and lengths, chunks' rows, starts and lengths.
What follows from them (token ids, slots, block tables) it gathers itself from the pool of tokens, so that nothing else
has to travel. What no token, decode or chunk of the batch is behind is said by a position of -1, a length of 0 and a
start at the end.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.sampling_table import Int64s
from engine.step_inputs import StepInputs
from engine.token_bucket import TokenBucket
from engine.token_pool import TokenPool


class PaddedInputs:
    """For steps of all buckets, one after the other: each reads the first integers of the same memory."""

    def __init__(self, buckets: Sequence[TokenBucket], pool: TokenPool, kv_cache: KVCache) -> None:
        self._pool = pool
        self._kv_cache = kv_cache
        num_integers = max(sum(_sections(bucket).values()) for bucket in buckets)
        self._integers = torch.zeros(num_integers, dtype=torch.int64, device=pool.block_tables.device)

    def fill(self, packed: Tensor) -> None:
        """The next step is what `packed_step` made, on the device."""
        self._integers[: len(packed)].copy_(packed)

    def clear(self, bucket: TokenBucket) -> None:
        """The next step is one of this bucket without a token: it writes nothing to the cache."""
        self._integers.zero_()
        self._integers[bucket.num_tokens : 2 * bucket.num_tokens] = -1

    def step(self, bucket: TokenBucket, attention_TA: Tensor) -> StepInputs:
        """The inputs of the step that is there when this runs, gathered on the device."""
        sizes = _sections(bucket)
        parts = torch.split_with_sizes(self._integers[: sum(sizes.values())], list(sizes.values()))
        parts_of = dict(zip(sizes, parts, strict=True))
        rows_T, positions_T = parts_of["token_row"], parts_of["token_position"]
        is_padding_T = positions_T < 0
        known_T = positions_T.clamp(min=0)
        block_size = self._kv_cache.block_size
        indices_T = known_T // block_size
        slots_T = self._pool.slots(rows_T, indices_T, known_T - indices_T * block_size, block_size)
        width = self._pool.block_tables.shape[1]
        return StepInputs(
            tokens=self._pool.read_tokens(rows_T, known_T),
            positions=positions_T,
            slots=slots_T.masked_fill_(is_padding_T, -1),
            decode_block_tables=self._pool.tables(parts_of["lane_row"], width),
            decode_lengths=parts_of["lane_length"],
            prefill_block_tables=self._pool.tables(parts_of["chunk_row"], width),
            num_decodes=bucket.num_lanes,
            max_decode_length=width * block_size,
            prefill_chunk_sizes=(),
            prefill_context_lengths=(),
            kv_cache=self._kv_cache,
            prefill_starts=parts_of["chunk_start"],
            prefill_lengths=parts_of["chunk_length"],
            attention=attention_TA,
        )


def packed_step(bucket: TokenBucket, batch: Batch, token_rows: Int64s, token_positions: Int64s) -> Int64s:
    """What travels to the device for a batch that the bucket holds; of its tokens, rows and positions are given."""
    num_decodes, num_tokens = batch.num_decodes, len(token_rows)
    rows, lengths = batch.rows, batch.starts + batch.counts
    ends = num_decodes + batch.counts[num_decodes:].cumsum()
    values: dict[str, tuple[NDArray[np.integer], int]] = {
        "token_row": (token_rows, 0),
        "token_position": (token_positions, -1),
        "lane_row": (rows[:num_decodes], 0),
        "lane_length": (lengths[:num_decodes], 0),
        "chunk_row": (rows[num_decodes:], 0),
        "chunk_start": (np.concatenate(([num_decodes], ends)), num_tokens),
        "chunk_length": (lengths[num_decodes:], 0),
    }
    sizes = _sections(bucket)
    packed = np.empty(sum(sizes.values()), dtype=np.int64)
    first = 0
    for name, size in sizes.items():
        given, rest = values[name]
        packed[first : first + len(given)] = given
        packed[first + len(given) : first + size] = rest
        first += size
    return packed


def _sections(bucket: TokenBucket) -> dict[str, int]:
    """Names and sizes, in their order."""
    return {
        "token_row": bucket.num_tokens,
        "token_position": bucket.num_tokens,
        "lane_row": bucket.num_lanes,
        "lane_length": bucket.num_lanes,
        "chunk_row": bucket.num_chunks,
        "chunk_start": bucket.num_chunks + 1,
        "chunk_length": bucket.num_chunks,
    }

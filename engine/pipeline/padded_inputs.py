"""`PaddedInputs`: what the host says of a padded step, a few integers in one place on the device that stays.

A graph reads them there: rows and positions of its tokens and, for each nano-batch, decodes' rows and lengths, chunks'
rows, starts and lengths. What follows from them (token ids, slots, block tables) it gathers itself from the pool of
tokens, so that nothing else has to travel. What no token, decode or chunk of the batch is behind is said by a position
of -1, a length of 0 and a start at the end; a lane without a decode whose row may be a prefill token's by a length
of -1, so that attention leaves the row alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.pipeline.nano_batch import Cut
from engine.pipeline.padded_parts import PaddedParts, PaddedTokens
from engine.pipeline.token_bucket import PaddedNanoBatch, TokenBucket, chunk_pieces
from engine.sampling_table import Int64s
from engine.step_inputs import StepInputs
from engine.token_pool import TokenPool


class PaddedInputs:
    """For steps of all buckets, one after the other: each reads the first integers of the same memory."""

    def __init__(self, num_integers: int, pool: TokenPool, kv_cache: KVCache) -> None:
        """`num_integers` are those of the bucket that has the most."""
        self._pool = pool
        self._kv_cache = kv_cache
        self._integers = torch.zeros(num_integers, dtype=torch.int64, device=pool.block_tables.device)

    def fill(self, packed: Tensor) -> None:
        """The next step is what `packed_step` made, on the device."""
        self._integers[: len(packed)].copy_(packed)

    def clear(self, bucket: TokenBucket) -> None:
        """The next step is one of this bucket without a token: it writes nothing to the cache."""
        self._integers.zero_()
        self._integers[bucket.num_tokens : 2 * bucket.num_tokens] = -1

    def step(self, bucket: TokenBucket, attention_TA: Tensor) -> StepInputs:
        """The inputs of the step that is there when this runs, gathered on the device; of a bucket in one piece."""
        _, (step,) = self._gathered(bucket)
        return replace(step, attention=attention_TA)

    def parts(self, bucket: TokenBucket) -> PaddedParts:
        """The same of any bucket, for a schedule on its rows."""
        tokens, steps = self._gathered(bucket)
        return PaddedParts(bucket, tokens, steps)

    def _gathered(self, bucket: TokenBucket) -> tuple[PaddedTokens, list[StepInputs]]:
        """What all rows are, and the inputs of each nano-batch."""
        sizes = [size for _, size in _sections(bucket)]
        parts = iter(torch.split_with_sizes(self._integers[: sum(sizes)], sizes))
        rows_T, positions_T = next(parts), next(parts)
        is_padding_T = positions_T < 0
        known_T = positions_T.clamp(min=0)
        block_size = self._kv_cache.block_size
        indices_T = known_T // block_size
        slots_T = self._pool.slots(rows_T, indices_T, known_T - indices_T * block_size, block_size)
        tokens = PaddedTokens(
            self._pool.read_tokens(rows_T, known_T), positions_T, slots_T.masked_fill_(is_padding_T, -1)
        )
        ranges = zip(pairwise(bucket.borders), bucket.nano_batches, strict=True)
        return tokens, [self._nano_batch(tokens, slice(*rows), each, parts) for rows, each in ranges]

    def _nano_batch(
        self, tokens: PaddedTokens, rows: slice, nano_batch: PaddedNanoBatch, parts: Iterator[Tensor]
    ) -> StepInputs:
        width = self._pool.block_tables.shape[1]
        lane_rows, lane_lengths, chunk_rows, chunk_starts, chunk_lengths = (next(parts) for _ in range(_NUM_SECTIONS))
        return StepInputs(
            tokens=tokens.tokens[rows],
            positions=tokens.positions[rows],
            slots=tokens.slots[rows],
            decode_block_tables=self._pool.tables(lane_rows, width),
            decode_lengths=lane_lengths,
            prefill_block_tables=self._pool.tables(chunk_rows, width),
            num_decodes=nano_batch.num_lanes,
            max_decode_length=width * self._kv_cache.block_size,
            prefill_chunk_sizes=(),
            prefill_context_lengths=(),
            kv_cache=self._kv_cache,
            prefill_starts=chunk_starts,
            prefill_lengths=chunk_lengths,
        )


def packed_step(
    bucket: TokenBucket, batch: Batch, dealt: Cut, token_rows: Int64s, token_positions: Int64s
) -> tuple[Int64s, Int64s]:
    """What travels to the device for a batch that is `dealt` to the bucket, and the rows of its tokens.

    Of the tokens, decodes first, rows of the pool and positions are given.
    """
    sections = [np.full(size, rest, dtype=np.int64) for rest, size in _sections(bucket)]
    places = bucket.rows_of(dealt)
    sections[0][places], sections[1][places] = token_rows, token_positions
    rows, lengths = batch.rows, batch.starts + batch.counts
    pieces = chunk_pieces(dealt, batch.counts[batch.num_decodes :])
    first, remaining = 0, iter(sections[2:])
    for nano_batch, mine in zip(dealt.nano_batches, pieces, strict=True):
        lane_rows, lane_lengths, chunk_rows, chunk_starts, chunk_lengths = (
            next(remaining) for _ in range(_NUM_SECTIONS)
        )
        decodes = slice(first, first + nano_batch.num_decodes)
        first = decodes.stop
        lane_rows[: nano_batch.num_decodes] = rows[decodes]
        lane_lengths[: nano_batch.num_decodes] = lengths[decodes]
        start = nano_batch.num_decodes
        for place, (chunk, before, size) in enumerate(mine):
            number = batch.num_decodes + chunk
            chunk_rows[place] = rows[number]
            chunk_starts[place] = start
            chunk_lengths[place] = batch.starts[number] + before + size
            start += size
        chunk_starts[len(mine) :] = start
    return np.concatenate(sections), places


def num_integers(num_tokens: int, num_nano_batches: int, num_chunks: int) -> int:
    """What a bucket of so many rows takes at most, whose nano-batches have so many chunks each."""
    return 4 * num_tokens + num_nano_batches * (3 * num_chunks + 1)


_NUM_SECTIONS = 5  # of a nano-batch


def _sections(bucket: TokenBucket) -> list[tuple[int, int]]:
    """What stands where nothing is said, and sizes, in their order: tokens' rows and positions, then for each
    nano-batch its lanes' rows and lengths, its chunks' rows, starts and lengths.
    """
    sections = [(0, bucket.num_tokens), (-1, bucket.num_tokens)]
    for each in bucket.nano_batches:
        no_decode = -1 if each.num_chunks else 0
        sections += [(0, each.num_lanes), (no_decode, each.num_lanes)]
        sections += [(0, each.num_chunks), (0, each.num_chunks + 1), (0, each.num_chunks)]
    return sections

"""`TokenBucket`: a size that steps are padded to, so that a few CUDA graphs serve every batch. Pure: no tensors.

A bucket says how many rows each nano-batch has, and nothing of who gets them: first come its decodes, as many as there
are, then prefill tokens, then padding. So a batch of as many tokens as the bucket has rows is padded by nothing,
whatever its mix: a loaded engine fills its dense batch in every step, while its decodes drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch
from engine.pipeline.nano_batch import Cut, NanoBatch

# Up to 64 powers of two, then multiples of this: a step of more tokens takes as long as its products, and one more tile
# of them is what padding may cost.
_STEP = 128
# Larger steps keep a device busy for longer than their launches take, and every graph takes memory.
_LARGEST = 4096
# Chunks of prompts in one step; each has programs of its own in every layer's attention, whether it is there or not.
_MAX_CHUNKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedNanoBatch:
    """`num_tokens` rows: of up to `num_lanes` decodes and, behind them, up to `num_chunks` chunks of prompts.

    Without lanes it is for prefill tokens alone, without chunks for decodes alone.
    """

    num_tokens: int
    num_lanes: int
    num_chunks: int


@dataclass(frozen=True)
class TokenBucket:
    """A step of as many rows as its nano-batches have together."""

    nano_batches: tuple[PaddedNanoBatch, ...]

    @property
    def num_tokens(self) -> int:
        """Rows, with or without a token."""
        return self.borders[-1]

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """The rows where nano-batches begin, and the end."""
        return tuple(accumulate((each.num_tokens for each in self.nano_batches), initial=0))

    @property
    def least_decodes(self) -> int:
        """Of a batch that fills every row: nothing but decodes can be where they have a nano-batch of their own."""
        return sum(0 if each.num_chunks else each.num_lanes for each in self.nano_batches)

    def dealt(self, batch: Batch) -> Cut | None:
        """How many decodes and prefill tokens of a batch each nano-batch gets; None where they do not fit."""
        if not batch.num_tokens:
            return None
        cut = self._dealt(batch.num_decodes, batch.num_tokens - batch.num_decodes)
        if cut is None:
            return None
        pieces = chunk_pieces(cut, batch.counts[batch.num_decodes :])
        is_room = all(len(mine) <= each.num_chunks for mine, each in zip(pieces, self.nano_batches, strict=True))
        return cut if is_room else None

    def rows_of(self, cut: Cut) -> NDArray[np.int64]:
        """The rows of a batch's tokens, numbered decodes first, that are `dealt` like this."""
        dealt = list(zip(self.borders, cut.nano_batches, strict=False))
        ranges = [(start, start + each.num_decodes) for start, each in dealt]
        ranges += [(start + each.num_decodes, start + each.num_tokens) for start, each in dealt]
        return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in ranges])

    def _dealt(self, num_decodes: int, num_prefills: int) -> Cut | None:
        """Decodes by lanes, prefill tokens by the rows that are left; but first of all decodes where nothing else can
        be, because a row that they leave there is nobody's.
        """
        if num_decodes > sum(each.num_lanes for each in self.nano_batches):
            return None
        alone = [0 if each.num_chunks else each.num_lanes for each in self.nano_batches]
        num_alone = min(num_decodes, sum(alone))
        mixed = [each.num_lanes if each.num_chunks else 0 for each in self.nano_batches]
        parts = zip(_shared(alone, num_alone), _shared(mixed, num_decodes - num_alone), strict=True)
        decodes = [sum(counts) for counts in parts]
        room = [
            each.num_tokens - own if each.num_chunks else 0
            for each, own in zip(self.nano_batches, decodes, strict=True)
        ]
        if num_prefills > sum(room):
            return None
        return Cut(tuple(NanoBatch(*counts) for counts in zip(decodes, _shared(room, num_prefills), strict=True)))


def token_sizes(max_batch_tokens: int) -> tuple[int, ...]:
    """The rows that steps are padded to, from the fewest; the last hold every batch, or the largest that a graph pays
    for.
    """
    largest = min(max_batch_tokens, _LARGEST)
    powers = (2**exponent for exponent in range(7))
    return tuple(sorted({size for size in (*powers, *range(_STEP, largest, _STEP), largest) if size <= largest}))


def most_chunks(num_tokens: int, max_sequences: int) -> int:
    """What so many rows have room for."""
    return min(num_tokens, max_sequences, _MAX_CHUNKS)


def whole_bucket(num_tokens: int, max_sequences: int) -> TokenBucket:
    """For every mix, in one piece."""
    return TokenBucket(
        (
            PaddedNanoBatch(
                num_tokens=num_tokens,
                num_lanes=min(num_tokens, max_sequences),
                num_chunks=most_chunks(num_tokens, max_sequences),
            ),
        )
    )


def chunk_pieces(cut: Cut, counts: NDArray[np.integer]) -> list[list[tuple[int, int, int]]]:
    """For each nano-batch the pieces of chunks of these sizes that it gets: (chunk, tokens before it, its tokens).

    A chunk that a border runs through has a piece on either side.
    """
    ends = accumulate(counts.tolist(), initial=0)
    chunks = list(enumerate(pairwise(ends)))
    pieces: list[list[tuple[int, int, int]]] = []
    first = 0
    for nano_batch in cut.nano_batches:
        last = first + nano_batch.num_prefills
        pieces.append(
            [
                (index, max(start, first) - start, min(stop, last) - max(start, first))
                for index, (start, stop) in chunks
                if max(start, first) < min(stop, last)
            ]
        )
        first = last
    return pieces


def _shared(capacities: Sequence[int], total: int) -> list[int]:
    """`total` dealt in proportion; to none more than its capacity, as long as all of them together suffice."""
    whole = sum(capacities)
    borders = [
        (2 * total * border + whole) // (2 * whole) if whole else 0 for border in accumulate(capacities, initial=0)
    ]
    return [stop - start for start, stop in pairwise(borders)]

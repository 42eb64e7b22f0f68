"""`NanoBatch` and `Cut`: how the tokens of a batch are dealt to nano-batches, each with its own mix of the two kinds.

A cut puts the tokens in an order: nano-batch after nano-batch, and in each the decodes before the prefill tokens.
Every range of a schedule is a range of positions in that order. A cut planned for one batch is scaled to the sizes of
another, so that one plan serves a bucket of similar batches.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class NanoBatch:
    """Tokens that flow through a layer together: some of the decodes and some of the prefill tokens, in their order."""

    num_decodes: int
    num_prefills: int

    @property
    def num_tokens(self) -> int:
        """Tokens of both kinds."""
        return self.num_decodes + self.num_prefills


@dataclass(frozen=True)
class Cut:
    """The nano-batches of a batch, in order; some may be empty after scaling."""

    nano_batches: tuple[NanoBatch, ...]

    @property
    def num_decodes(self) -> int:
        """Decodes of the whole batch."""
        return sum(nano_batch.num_decodes for nano_batch in self.nano_batches)

    @property
    def num_prefills(self) -> int:
        """Prefill tokens of the whole batch."""
        return sum(nano_batch.num_prefills for nano_batch in self.nano_batches)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.num_decodes + self.num_prefills

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """The positions where nano-batches begin, and the end: one more than there are nano-batches."""
        return tuple(accumulate((nano_batch.num_tokens for nano_batch in self.nano_batches), initial=0))

    def decodes_before(self, position: int) -> int:
        """Decodes at positions below this one."""
        return sum(
            min(max(0, position - start), nano_batch.num_decodes)
            for start, nano_batch in zip(self.borders, self.nano_batches, strict=False)
        )

    def prefills_before(self, position: int) -> int:
        """Prefill tokens at positions below this one."""
        return position - self.decodes_before(position)

    def positions_of(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where tokens of the batch, numbered decodes first, lie in the order of this cut."""
        num_decodes = [nano_batch.num_decodes for nano_batch in self.nano_batches]
        num_prefills = [nano_batch.num_prefills for nano_batch in self.nano_batches]
        starts = np.array(self.borders[:-1])
        decode_starts = np.cumsum([0, *num_decodes[:-1]])
        prefill_starts = self.num_decodes + np.cumsum([0, *num_prefills[:-1]])
        of_decodes = np.searchsorted(decode_starts, tokens, side="right") - 1
        of_prefills = np.searchsorted(prefill_starts, tokens, side="right") - 1
        as_decodes = starts[of_decodes] + tokens - decode_starts[of_decodes]
        as_prefills = starts[of_prefills] + np.array(num_decodes)[of_prefills] + tokens - prefill_starts[of_prefills]
        positions: NDArray[np.int64] = np.where(tokens < self.num_decodes, as_decodes, as_prefills)
        return positions

    def scaled(self, num_decodes: int, num_prefills: int) -> "Cut":
        """The same proportions for a batch of other sizes; a kind that this cut lacks must be absent there too."""
        decodes = _scaled([nano_batch.num_decodes for nano_batch in self.nano_batches], num_decodes)
        prefills = _scaled([nano_batch.num_prefills for nano_batch in self.nano_batches], num_prefills)
        return Cut(tuple(NanoBatch(*counts) for counts in zip(decodes, prefills, strict=True)))

    def position_in(self, other: "Cut", position: int) -> int:
        """Where a border of this cut lies in `other`, a scaled copy: monotone, and borders map to borders."""
        index = bisect_right(self.borders, position) - 1
        if index == len(self.nano_batches):
            return other.num_tokens
        mine, others = self.nano_batches[index], other.nano_batches[index]
        offset = position - self.borders[index]
        decodes = _share(min(offset, mine.num_decodes), mine.num_decodes, others.num_decodes)
        prefills = _share(max(0, offset - mine.num_decodes), mine.num_prefills, others.num_prefills)
        return other.borders[index] + decodes + prefills


def _scaled(counts: Sequence[int], total: int) -> list[int]:
    planned = sum(counts)
    assert planned or not total, "a kind of token that the cut does not have"
    borders = [_share(border, planned, total) for border in accumulate(counts, initial=0)]
    return [stop - start for start, stop in pairwise(borders)]


def _share(part: int, whole: int, total: int) -> int:
    """`total` * `part` / `whole`, rounded half up, exactly."""
    return (2 * total * part + whole) // (2 * whole) if whole else 0

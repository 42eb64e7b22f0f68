"""`Bucket`: batches alike enough to share a plan: a step of a ladder of token counts, and how much of it is decodes.

A function of the batch alone, so that every rank comes to the same one. The ladder has powers of two, and near the
dense batch, where a loaded engine is nearly always, three quarters of it and the dense batch itself. A bucket's plan is
made for its smallest batch, where splitting pays least, with the middle of its mixes, and is stretched for others. Not
for all of them where it gives decodes a nano-batch of their own and steps are padded (`padded_schedule`): no prefill
token can take a row there, so that full batches with fewer decodes than its rows run sequentially, which is told.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

# Batches below run sequentially: their operations are too short for overlap to repay the split.
SMALLEST_BATCH = 128


class DecodeShare(StrEnum):
    """How much of a batch is decodes. The outer two are exact: a schedule needs a place for every kind that occurs."""

    ALL_PREFILL = "all prefill"
    MOSTLY_PREFILL = "mostly prefill"
    MIXED = "mixed"
    MOSTLY_DECODE = "mostly decode"
    ALL_DECODE = "all decode"

    @classmethod
    def of(cls, num_decodes: int, num_prefills: int) -> "DecodeShare":
        """By quarters of the tokens."""
        num_tokens = num_decodes + num_prefills
        if num_decodes == 0:
            return cls.ALL_PREFILL
        if num_prefills == 0:
            return cls.ALL_DECODE
        if 4 * num_decodes <= num_tokens:
            return cls.MOSTLY_PREFILL
        return cls.MOSTLY_DECODE if 4 * num_decodes >= 3 * num_tokens else cls.MIXED

    def most_decodes(self, num_tokens: int) -> int:
        """Of so many tokens."""
        match self:
            case DecodeShare.ALL_PREFILL:
                return 0
            case DecodeShare.MOSTLY_PREFILL:
                return num_tokens // 4
            case DecodeShare.MIXED:
                return (3 * num_tokens - 1) // 4
            case DecodeShare.MOSTLY_DECODE:
                return num_tokens - 1
            case DecodeShare.ALL_DECODE:
                return num_tokens


@dataclass(frozen=True, slots=True)
class Bucket:
    """Batches of at least `num_tokens` and fewer than the next step of the ladder."""

    num_tokens: int
    share: DecodeShare

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens, {self.share}"

    def batch(self, max_sequences: int) -> tuple[int, int] | None:
        """Decodes and prefill tokens of the batch to plan for; None where the bucket would need more sequences."""
        part = _DECODE_EIGHTHS[self.share]
        num_decodes = min(max_sequences, round(self.num_tokens * part / 8))
        if self.share is not DecodeShare.ALL_PREFILL:
            num_decodes = max(1, num_decodes)
        batch = num_decodes, self.num_tokens - num_decodes
        return batch if batch[1] >= 0 and DecodeShare.of(*batch) is self.share else None

    def sizes(self, max_batch_tokens: int) -> range:
        """Tokens of the batches in it, where the largest has so many."""
        steps = ladder(max_batch_tokens)
        index = steps.index(self.num_tokens) + 1
        return range(self.num_tokens, steps[index] if index < len(steps) else max_batch_tokens + 1)


_DECODE_EIGHTHS = {
    DecodeShare.ALL_PREFILL: 0,
    DecodeShare.MOSTLY_PREFILL: 1,
    DecodeShare.MIXED: 4,
    DecodeShare.MOSTLY_DECODE: 7,
    DecodeShare.ALL_DECODE: 8,
}

# In a loaded engine.
_COMMONEST_FIRST = (
    DecodeShare.MIXED,
    DecodeShare.MOSTLY_DECODE,
    DecodeShare.ALL_DECODE,
    DecodeShare.MOSTLY_PREFILL,
    DecodeShare.ALL_PREFILL,
)


def ladder(max_batch_tokens: int) -> tuple[int, ...]:
    """The smallest batch of every step, ascending; the dense batch is the last, however small it is."""
    steps = {max_batch_tokens, 3 * max_batch_tokens // 4}
    size = SMALLEST_BATCH
    while size < max_batch_tokens:
        steps.add(size)
        size *= 2
    return tuple(sorted(step for step in steps if step >= min(SMALLEST_BATCH, max_batch_tokens)))


def bucket_of(num_decodes: int, num_prefills: int, max_batch_tokens: int) -> Bucket | None:
    """The bucket of a batch; None below the smallest one."""
    steps = ladder(max_batch_tokens)
    index = bisect_right(steps, num_decodes + num_prefills) - 1
    return Bucket(steps[index], DecodeShare.of(num_decodes, num_prefills)) if index >= 0 else None


def buckets(max_batch_tokens: int, max_sequences: int) -> Iterator[Bucket]:
    """Every bucket that a batch of at most so many sequences can be in: the largest first, then the commonest kind."""
    for num_tokens in reversed(ladder(max_batch_tokens)):
        for share in _COMMONEST_FIRST:
            bucket = Bucket(num_tokens, share)
            if bucket.batch(max_sequences) is not None:
                yield bucket

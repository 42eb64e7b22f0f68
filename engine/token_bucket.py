"""`TokenBucket`: a size that steps are padded to, so that a few CUDA graphs serve every batch. Pure: no tensors."""

from dataclasses import dataclass

from engine.batch import Batch

# Up to 64 powers of two, then multiples of this: a step of more tokens takes as long as its products, and one more tile
# of them is what padding may cost.
_STEP = 128
# Larger steps keep a device busy for longer than their launches take, and every graph takes memory.
_LARGEST = 4096
# Chunks of prompts in one step; each has programs of its own in every layer's attention, whether it is there or not.
_MAX_CHUNKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBucket:
    """A step of `num_tokens` rows: up to `num_lanes` decodes and up to `num_chunks` chunks of prompts behind them."""

    num_tokens: int
    num_lanes: int
    num_chunks: int

    def holds(self, batch: Batch) -> bool:
        """Whether a batch can be padded to this."""
        num_chunks = len(batch.rows) - batch.num_decodes
        return (
            0 < batch.num_tokens <= self.num_tokens
            and batch.num_decodes <= self.num_lanes
            and num_chunks <= self.num_chunks
        )


def token_buckets(max_batch_tokens: int, max_sequences: int) -> tuple[TokenBucket, ...]:
    """From the smallest to the largest; the last holds every batch, or the largest that a graph pays for."""
    largest = min(max_batch_tokens, _LARGEST)
    powers = (2**exponent for exponent in range(7))
    sizes = sorted({size for size in (*powers, *range(_STEP, largest, _STEP), largest) if size <= largest})
    return tuple(
        TokenBucket(
            num_tokens=size,
            num_lanes=min(size, max_sequences),
            num_chunks=min(size, max_sequences, _MAX_CHUNKS),
        )
        for size in sizes
    )

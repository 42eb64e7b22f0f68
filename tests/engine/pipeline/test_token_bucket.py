"""The sizes that steps are padded to."""

import numpy as np
import pytest

from engine.batch import Batch
from engine.pipeline.token_bucket import PaddedNanoBatch, TokenBucket, token_sizes, whole_bucket


def batch_of(num_decodes: int, chunks: list[int]) -> Batch:
    counts = np.array([1] * num_decodes + chunks, np.int32)
    return Batch(
        step=0,
        admissions=(),
        block_updates=np.zeros((0, 3), np.int32),
        rows=np.arange(len(counts), dtype=np.int32),
        starts=np.zeros(len(counts), np.int32),
        counts=counts,
        num_decodes=num_decodes,
        sampled=np.zeros(0, np.int32),
    )


@pytest.mark.parametrize(
    ("max_batch_tokens", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (64, [1, 2, 4, 8, 16, 32, 64]),
        (128, [1, 2, 4, 8, 16, 32, 64, 128]),
        (300, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]),
    ],
)
def test_sizes(max_batch_tokens: int, sizes: list[int]) -> None:
    assert list(token_sizes(max_batch_tokens)) == sizes


def test_the_largest_are_limited_in_number_and_size() -> None:
    assert len(token_sizes(2048)) == 7 + 16
    assert token_sizes(100_000)[-2:] == (3968, 4096)
    assert whole_bucket(2048, 1024).nano_batches == (PaddedNanoBatch(num_tokens=2048, num_lanes=1024, num_chunks=64),)
    assert whole_bucket(1, 1024).nano_batches == (PaddedNanoBatch(num_tokens=1, num_lanes=1, num_chunks=1),)


@pytest.mark.parametrize(
    ("num_decodes", "chunks", "holds"),
    [
        (0, [], False),
        (2, [], True),
        (3, [], False),
        (1, [7], True),
        (1, [8], False),
        (1, [1, 1], False),
        (0, [8], True),
    ],
)
def test_what_a_bucket_holds(num_decodes: int, chunks: list[int], holds: bool) -> None:
    bucket = TokenBucket((PaddedNanoBatch(num_tokens=8, num_lanes=2, num_chunks=1),))
    assert (bucket.dealt(batch_of(num_decodes, chunks)) is not None) is holds

"""The sizes that steps are padded to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.pipeline.token_bucket import PaddedNanoBatch, TokenBucket, chunk_pieces, token_sizes, whole_bucket


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


@st.composite
def buckets(draw: st.DrawFn) -> TokenBucket:
    """Mixed, or for decodes alone."""
    sizes = draw(st.lists(st.integers(2, 40), min_size=1, max_size=5))
    num_chunks = draw(st.sampled_from((0, 64)))
    return TokenBucket(
        tuple(
            PaddedNanoBatch(
                num_tokens=size,
                num_lanes=draw(st.integers(1, size - 1)) if num_chunks else size,
                num_chunks=num_chunks,
            )
            for size in sizes
        )
    )


@given(bucket=buckets(), num_decodes=st.integers(0, 99), chunks=st.lists(st.integers(1, 60), max_size=6))
@settings(max_examples=300, deadline=None)
def test_every_batch_that_has_room_is_dealt(bucket: TokenBucket, num_decodes: int, chunks: list[int]) -> None:
    """As many rows as the bucket has suffice for any mix, as long as there are lanes."""
    batch = batch_of(num_decodes, chunks)
    dealt = bucket.dealt(batch)
    mixed = bool(bucket.nano_batches[0].num_chunks)
    has_room = 0 < batch.num_tokens <= bucket.num_tokens and (mixed or not chunks)
    assert (dealt is not None) is (has_room and num_decodes <= sum(each.num_lanes for each in bucket.nano_batches))
    if dealt is None:
        return
    assert (dealt.num_decodes, dealt.num_prefills) == (num_decodes, sum(chunks))
    for mine, each in zip(dealt.nano_batches, bucket.nano_batches, strict=True):
        assert mine.num_decodes <= each.num_lanes and mine.num_tokens <= each.num_tokens
    rows = bucket.rows_of(dealt).tolist()
    assert len(set(rows)) == batch.num_tokens
    assert rows[:num_decodes] == sorted(rows[:num_decodes]) and rows[num_decodes:] == sorted(rows[num_decodes:])
    pieces = chunk_pieces(dealt, batch.counts[num_decodes:])
    assert [sum(size for _, _, size in mine) for mine in pieces] == [each.num_prefills for each in dealt.nano_batches]
    done = [0] * len(chunks)
    for those in pieces:
        for chunk, before, size in those:
            assert before == done[chunk], "pieces of a chunk follow each other"
            done[chunk] += size
    assert done == chunks


def test_prefill_tokens_take_the_rows_that_decodes_leave() -> None:
    bucket = TokenBucket((PaddedNanoBatch(num_tokens=1024, num_lanes=768, num_chunks=64),) * 2)
    for num_decodes in (512, 677, 1024, 1400, 1536):
        dealt = bucket.dealt(batch_of(num_decodes, [2048 - num_decodes]))
        assert dealt is not None and [each.num_tokens for each in dealt.nano_batches] == [1024, 1024]
        assert abs(dealt.nano_batches[0].num_decodes - num_decodes / 2) <= 0.5
    assert bucket.dealt(batch_of(1537, [1])) is None

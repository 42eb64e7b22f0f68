"""The order and parts of decodes: every decode once, and no part that reads more in vain than it is worth."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.decode_order import _PART_BYTES, DecodeOrder, parts_of

BLOCK_SIZE = 64
lengths = st.lists(st.integers(1, 4000), min_size=1, max_size=80)


@given(lengths, st.sampled_from([1_000, 65_536, 300_000, 2**22]))
def test_parts_hold_every_decode_and_waste_little(values: list[int], block_bytes: int) -> None:
    ascending = np.sort(np.array(values, np.int64))
    parts = parts_of(ascending, block_size=BLOCK_SIZE, block_bytes=block_bytes)
    assert [start for start, _, _ in parts] == [0, *(stop for _, stop, _ in parts[:-1])]
    assert parts[-1][1] == len(values)
    num_blocks = -(-ascending // BLOCK_SIZE)
    for start, stop, width in parts:
        assert width == num_blocks[stop - 1]
        assert (width * (stop - start) - num_blocks[start:stop].sum()) * block_bytes <= _PART_BYTES
    for (start, stop, width), (_, next_stop, next_width) in pairwise(parts):
        joined = next_width * (next_stop - start) - num_blocks[start:next_stop].sum()
        assert joined * block_bytes > _PART_BYTES, (start, stop, width)


@given(lengths)
def test_the_order_is_of_lengths_and_then_of_places(values: list[int]) -> None:
    found = DecodeOrder.of(np.array(values, np.int64), block_size=BLOCK_SIZE, block_bytes=2**20)
    if found is None:
        assert len(parts_of(np.sort(np.array(values)), block_size=BLOCK_SIZE, block_bytes=2**20)) == 1
    else:
        assert found.order.tolist() == sorted(range(len(values)), key=lambda place: (values[place], place))
        assert found.parts[-1][1] == len(values)


def test_sequences_that_are_alike_are_one_part() -> None:
    alike = np.array([130, 128, 190, 129], np.int64)
    assert DecodeOrder.of(alike, block_size=BLOCK_SIZE, block_bytes=2**30) is not None
    assert DecodeOrder.of(alike, block_size=BLOCK_SIZE, block_bytes=1000) is None
    assert DecodeOrder.of(alike[[0, 2, 3]], block_size=BLOCK_SIZE, block_bytes=2**30) is None

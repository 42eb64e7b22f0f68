from hypothesis import given
from hypothesis import strategies as st

from engine.block_manager import BlockManager
from engine.request import Request, RequestId
from engine.sequence import Sequence


def test_allocates_until_nothing_is_left_and_changes_nothing_on_refusal() -> None:
    blocks = BlockManager(4, 16)
    first = blocks.allocate(3)
    assert first is not None and len(set(first)) == 3
    assert blocks.allocate(2) is None
    assert blocks.num_free_blocks == 1
    blocks.release(first)
    assert blocks.num_free_blocks == 4 and blocks.num_cached_blocks == 0


def test_registered_block_survives_its_sequence_and_is_matched() -> None:
    blocks = BlockManager(4, 16)
    held = blocks.allocate(2)
    assert held is not None
    blocks.register(held[0], b"a")
    blocks.register(held[1], b"b")
    blocks.release(held)
    assert blocks.num_cached_blocks == 2
    assert blocks.match([b"a", b"b", b"c"]) == held
    assert blocks.match([b"c", b"a"]) == []
    blocks.acquire(held)
    assert blocks.num_used_blocks == 2 and blocks.num_cached_blocks == 0


def test_cached_blocks_are_forgotten_least_recently_used_and_tail_first() -> None:
    blocks = BlockManager(3, 16)
    held = blocks.allocate(3)
    assert held is not None
    for block_id, prefix_hash in zip(held, (b"a", b"b", b"c"), strict=True):
        blocks.register(block_id, prefix_hash)
    blocks.release(held)
    assert blocks.allocate(1) == [held[2]]
    assert blocks.match([b"a", b"b", b"c"]) == held[:2]


def test_without_prefix_caching_nothing_is_kept() -> None:
    blocks = BlockManager(2, 16, prefix_caching=False)
    held = blocks.allocate(1)
    assert held is not None
    blocks.register(held[0], b"a")
    assert blocks.match([b"a"]) == []


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.integers(0, 5)), max_size=60))
def test_every_block_is_in_exactly_one_state(actions: list[tuple[int, bool, int]]) -> None:
    blocks = BlockManager(8, 4)
    held: list[list[int]] = []
    for count, release, name in actions:
        if release and held:
            blocks.release(held.pop(0))
            continue
        matched = blocks.match([bytes([name])])
        blocks.acquire(matched)
        new = blocks.allocate(count)
        if new is None:
            blocks.release(matched)
            continue
        blocks.register(new[0], bytes([name]))
        held.append(matched + new)
        referenced = {block_id for block_ids in held for block_id in block_ids}
        assert blocks.num_used_blocks == len(referenced)
    for block_ids in held:
        blocks.release(block_ids)
    assert blocks.num_free_blocks == 8


def test_block_hashes_depend_on_everything_before_and_on_the_salt() -> None:
    def hashes(prompt: tuple[int, ...], salt: str = "") -> list[bytes]:
        request = Request(request_id=RequestId("r"), prompt_token_ids=prompt, cache_salt=salt)
        return Sequence(request, 0, 0.0).hash_blocks(2)

    assert hashes((1, 2, 3, 4, 5)) == hashes((1, 2, 3, 4, 6))
    assert hashes((1, 2, 3, 4))[0] == hashes((1, 2, 9, 9))[0]
    assert hashes((1, 2, 3, 4))[1] != hashes((9, 2, 3, 4))[1]
    long_salt = "t" * 100
    assert len({hashes((1, 2), salt)[0] for salt in ("", "a", long_salt, long_salt + "x")}) == 4

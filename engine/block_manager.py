"""`BlockManager`: who holds which KV block, and which blocks hold a prefix worth keeping.

Pure accounting: block ids and reference counts, no tensors and no tokens. A block is used (referenced by sequences),
cached (free, but its prefix may be asked for again) or empty. Free blocks are handed out least recently used first,
empty ones before cached ones.
"""

from collections import OrderedDict


class BlockManager:
    """Allocates blocks and shares those of equal prefix by reference count.

    Per block, by its id: the number of sequences that reference it, and the hash of the prefix that ends in it. Two
    plain lists, because there are a hundred thousand blocks and every step touches hundreds.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._num_references = [0] * num_blocks
        self._prefix_hashes: list[bytes | None] = [None] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that at least one sequence references."""
        return self.num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that still hold a prefix."""
        return len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, prefix_hashes: list[bytes]) -> list[int]:
        """Ids of the blocks that hold the longest known prefix; does not reference them."""
        block_ids: list[int] = []
        for prefix_hash in prefix_hashes:
            block_id = self._by_hash.get(prefix_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_cached_among(self, block_ids: list[int]) -> int:
        """How many of the blocks are free now, so that acquiring them uses up free blocks."""
        return sum(self._num_references[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: list[int]) -> None:
        """Reference blocks that `match` found."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                del self._cached[block_id]
            self._num_references[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take free blocks, forgetting cached prefixes where needed; None, changing nothing, if there are too few."""
        if num_blocks > self.num_free_blocks:
            return None
        block_ids = []
        for _ in range(min(num_blocks, len(self._empty))):
            block_ids.append(self._empty.pop())
        for _ in range(num_blocks - len(block_ids)):
            block_ids.append(self._forget_oldest())
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def register(self, block_id: int, prefix_hash: bytes) -> None:
        """Offer a block, full and computed, as the end of a prefix; the first block of a prefix keeps it."""
        if self.prefix_caching and prefix_hash not in self._by_hash:
            self._by_hash[prefix_hash] = block_id
            self._prefix_hashes[block_id] = prefix_hash

    def release(self, block_ids: list[int]) -> None:
        """Drop a sequence's references. Later blocks are forgotten first: a prefix is worthless without its start."""
        references, prefix_hashes = self._num_references, self._prefix_hashes
        for block_id in reversed(block_ids):
            references[block_id] -= 1
            if references[block_id] == 0:
                if prefix_hashes[block_id] is None:
                    self._empty.append(block_id)
                else:
                    self._cached[block_id] = None

    def _forget_oldest(self) -> int:
        """The cached block that was released longest ago; its prefix is known no more."""
        block_id, _ = self._cached.popitem(last=False)
        prefix_hash = self._prefix_hashes[block_id]
        assert prefix_hash is not None
        del self._by_hash[prefix_hash]
        self._prefix_hashes[block_id] = None
        return block_id

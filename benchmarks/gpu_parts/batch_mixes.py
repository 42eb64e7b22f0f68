"""`BatchMixes`: random steps as a scheduler might compose them, with the kinds among them that padding must get right:
no decodes, decodes alone, one token, and exactly as many tokens as a bucket has.

Sequences come into rows that others have left, into blocks that others have used.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from engine.batch import Admission, Batch
from engine.request import SamplingParams

KINDS = ("mixed", "full bucket", "decodes alone", "one token", "no decodes")
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.9),
    SamplingParams(seed=3, top_k=20, temperature=0.7),
)


@dataclass(slots=True)
class MixedRow:
    """A sequence: `length` tokens will be there when the steps so far are done, `computed` of them in the cache."""

    length: int
    end: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Tokens to compute: 1 where it decodes."""
        return self.length - self.computed


class BatchMixes:
    """`bucket_sizes` are hit exactly now and then. `kinds` counts what came, but for full buckets."""

    def __init__(
        self, seed: int, *, num_rows: int, num_blocks: int, block_size: int, vocab_size: int, bucket_sizes: list[int]
    ) -> None:
        self.kinds: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._free = list(range(num_blocks))
        self._random.shuffle(self._free)
        self._num_rows, self._block_size, self._vocab_size = num_rows, block_size, vocab_size
        self._bucket_sizes = bucket_sizes
        self._rows: dict[int, MixedRow] = {}
        self._admissions: list[Admission] = []

    def slots(self, batch: Batch) -> list[int]:
        """Where the batch's tokens lie in the cache: block * block size + offset."""
        size = self._block_size
        return [
            self._rows[row].blocks[place // size] * size + place % size
            for row, start, count in zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True)
            for place in range(start, start + count)
        ]

    def batches(self, num_steps: int) -> Iterator[Batch]:
        """So many, the kinds in turns; a sequence leaves when it has all of its tokens."""
        for number in range(num_steps):
            self._leave()
            self._come()
            yield self._batch(number, self._work(KINDS[number % len(KINDS)]))

    def _leave(self) -> None:
        for number, row in list(self._rows.items()):
            if row.computed >= row.end:
                self._free += row.blocks
                del self._rows[number]

    def _come(self) -> None:
        """Into free rows, as long as there are blocks for all that the sequence will be."""
        for number in range(self._num_rows):
            size = self._random.choice((1, 2, 17, 64, 65, self._random.randint(1, 200)))
            end = size + self._random.randint(2, 30)
            reserved = sum(-(-(row.end + 1) // self._block_size) for row in self._rows.values())
            held = sum(len(row.blocks) for row in self._rows.values())
            if number in self._rows or reserved - held + -(-(end + 1) // self._block_size) > len(self._free):
                continue
            tokens = np.array([self._random.randrange(self._vocab_size) for _ in range(size)], np.int32)
            self._rows[number] = MixedRow(length=size, end=end)
            sampling = self._random.choice(SAMPLINGS)
            self._admissions.append(Admission(row=number, token_ids=tokens, num_prompt_tokens=size, sampling=sampling))

    def _work(self, kind: str) -> list[tuple[int, int]]:
        """(row, tokens): decodes first, then chunks."""
        decodes = [number for number, row in self._rows.items() if row.missing == 1 and row.computed]
        chunks = [number for number, row in self._rows.items() if not (row.missing == 1 and row.computed)]
        self._random.shuffle(decodes)
        self._random.shuffle(chunks)
        if kind == "one token":
            return [(self._random.choice([*decodes, *chunks]), 1)]
        if kind == "decodes alone" and decodes:
            chunks = []
        if kind == "no decodes" and chunks:
            decodes = []
        most = min(sum(self._rows[number].missing for number in chunks) + len(decodes), self._bucket_sizes[-1])
        sizes = [size for size in self._bucket_sizes if size <= most]
        limit = (
            self._random.choice(sizes[-3:])
            if sizes and kind == "full bucket"
            else self._random.randint(1, max(1, most))
        )
        work = [(number, 1) for number in decodes[:limit]]
        left = limit - len(work)
        for number in chunks:
            count = min(left, self._rows[number].missing)
            if kind == "mixed" and count > 1:  # a piece of it, which need not end it
                count = self._random.randint(1, count)
            if count:
                work.append((number, count))
                left -= count
        return work

    def _batch(self, step: int, work: list[tuple[int, int]]) -> Batch:
        rows = [self._rows[number] for number, _ in work]
        num_decodes = sum(row.missing == 1 and row.computed > 0 for row in rows)
        updates, sampled, starts = [], [], []
        for index, ((number, count), row) in enumerate(zip(work, rows, strict=True)):
            starts.append(row.computed)
            row.computed += count
            while len(row.blocks) * self._block_size < row.computed:
                updates.append((number, len(row.blocks), self._free[-1]))
                row.blocks.append(self._free.pop())
            if row.computed == row.length:
                sampled.append(index)
                row.length += 1
        admissions, self._admissions = tuple(self._admissions), []
        batch = Batch(
            step=step,
            admissions=admissions,
            block_updates=np.array(updates, np.int32).reshape(-1, 3),
            rows=np.array([number for number, _ in work], np.int32),
            starts=np.array(starts, np.int32),
            counts=np.array([count for _, count in work], np.int32),
            num_decodes=num_decodes,
            sampled=np.array(sampled, np.int32),
        )
        self._note(batch)
        return batch

    def _note(self, batch: Batch) -> None:
        self.kinds["one token"] += batch.num_tokens == 1
        self.kinds["no decodes"] += not batch.num_decodes
        self.kinds["decodes alone"] += batch.num_decodes == len(batch.rows)
        self.kinds["mixed"] += 0 < batch.num_decodes < len(batch.rows)

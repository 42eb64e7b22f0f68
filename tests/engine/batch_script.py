"""Composes batches by hand, as a scheduler would: rows, chunks and scattered blocks, without any policy.

Imported by tests and by the spawned ranks of a tensor-parallel test.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.batch import Admission, Batch
from engine.request import SamplingParams


@dataclass(slots=True)
class ScriptedRow:
    """What the script knows of a row: tokens there will be once all steps are done, tokens computed, blocks held."""

    length: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class BatchScript:
    """Hands out blocks in a shuffled order and keeps count of each row."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._free = list(range(num_blocks))
        random.Random(0).shuffle(self._free)
        self._block_size = block_size
        self._rows: dict[int, ScriptedRow] = {}
        self._admissions: list[Admission] = []
        self._num_steps = 0
        self._decoding: list[int] | None = None

    def admit(
        self, row: int, token_ids: Sequence[int], sampling: SamplingParams, num_prompt_tokens: int | None = None
    ) -> None:
        """Seat a sequence in `row`, whose former one loses its blocks; it travels with the next batch."""
        if row in self._rows:
            self._free.extend(self._rows[row].blocks)
        self._rows[row] = ScriptedRow(length=len(token_ids))
        self._admissions.append(
            Admission(
                row=row,
                token_ids=np.asarray(token_ids, np.int32),
                num_prompt_tokens=num_prompt_tokens or len(token_ids),
                sampling=sampling,
            )
        )

    def step(self, decodes: Sequence[int] = (), prefills: Sequence[tuple[int, int]] = ()) -> Batch:
        """Decode these rows and prefill these (row, tokens); a prefill that reaches the end of its row draws."""
        work = [*((row, 1) for row in decodes), *prefills]
        starts, updates, sampled = [], [], []
        for index, (number, count) in enumerate(work):
            row = self._rows[number]
            starts.append(row.computed)
            row.computed += count
            assert row.computed <= row.length
            while len(row.blocks) * self._block_size < row.computed:
                updates.append((number, len(row.blocks), self._free[0]))
                row.blocks.append(self._free.pop(0))
            if row.computed == row.length:
                sampled.append(index)
                row.length += 1
        decoding = list(decodes) if not prefills else None
        batch = Batch(
            step=self._num_steps,
            admissions=tuple(self._admissions),
            block_updates=np.array(updates, np.int32).reshape(-1, 3),
            rows=np.array([row for row, _ in work], np.int32),
            starts=np.array(starts, np.int32),
            counts=np.array([count for _, count in work], np.int32),
            num_decodes=len(decodes),
            sampled=np.array(sampled, np.int32),
            repeats=decoding is not None and decoding == self._decoding and not self._admissions,
        )
        self._decoding = decoding
        self._admissions = []
        self._num_steps += 1
        return batch

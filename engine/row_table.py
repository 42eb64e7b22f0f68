"""`RowTable`: the rows of the device-side token pool, and the few numbers per row that scheduling needs in bulk.

One NumPy array per number, indexed by row, so that predicting for two thousand sequences is a few operations.
"""

import numpy as np

from engine.batch import IntArray
from engine.sequence import Sequence


class RowTable:
    """Which sequence sits in which row. `positions` is the next token to compute, which the `DecodeSet` knows of
    decodes; lengths are in tokens.
    """

    def __init__(self, num_rows: int) -> None:
        self.sequences: dict[int, Sequence] = {}
        self.positions = np.zeros(num_rows, np.int32)
        self.prompt_lengths = np.zeros(num_rows, np.int32)
        self.max_lengths = np.zeros(num_rows, np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def is_full(self) -> bool:
        """True when no row is free."""
        return not self._free

    def enter(self, sequence: Sequence, position: int) -> None:
        """Seat a sequence whose blocks are known, to compute from `position` on."""
        row = self._free.pop()
        sequence.row = row
        self.sequences[row] = sequence
        self.positions[row] = position
        self.prompt_lengths[row] = sequence.num_prompt_tokens
        self.max_lengths[row] = sequence.max_length
        self.num_blocks[row] = len(sequence.block_ids)

    def leave(self, sequence: Sequence) -> None:
        """Free a sequence's row."""
        del self.sequences[sequence.row]
        self._free.append(sequence.row)
        sequence.row = -1

    def generated(self, rows: IntArray) -> IntArray:
        """Tokens drawn or being drawn, per row; 0 while the prompt is computed."""
        generated: IntArray = self.positions[rows] + 1 - self.prompt_lengths[rows]
        return generated.clip(min=0)

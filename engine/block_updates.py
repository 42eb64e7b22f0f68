"""`BlockUpdates`: the entries of block tables that one step changes, collected column by column.

Columns, because lists of plain integers become an array several times faster than a list of tuples does.
"""

from collections.abc import Iterable

import numpy as np

from engine.batch import IntArray

_NO_UPDATES = np.empty((0, 3), np.int32)


class BlockUpdates:
    """(row, index in the row's block table, block id) of every change, in order."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._indices: list[int] = []
        self._block_ids: list[int] = []

    def add(self, rows: Iterable[int], indices: Iterable[int], block_ids: Iterable[int]) -> None:
        """Several changes; the three are equally long."""
        self._rows.extend(rows)
        self._indices.extend(indices)
        self._block_ids.extend(block_ids)

    def array(self) -> IntArray:
        """All of them, [U, 3]: `Batch.block_updates`."""
        if not self._rows:
            return _NO_UPDATES
        updates = np.empty((len(self._rows), 3), np.int32)
        updates[:, 0] = self._rows
        updates[:, 1] = self._indices
        updates[:, 2] = self._block_ids
        return updates

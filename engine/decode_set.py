"""`DecodeSet`: the sequences that decode, one token each in every step, and when each of them needs something.

A decode advances by one token a step until it ends, so the steps at which it begins a block or draws its last token are
known as soon as it is there. They wait in lists by step: a step looks at those that are due and at nobody else. Arrays
of the whole set are made when somebody comes or goes.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.batch import IntArray
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """The decodes of one step, in order: `rows`, the positions `starts` that they compute, and the sequences.

    With their tokens known, `completing` have a full block more; `ending` draw their last token. `repeats`: the same
    sequences as in the step before.
    """

    rows: IntArray
    starts: IntArray
    sequences: list[Sequence]
    completing: list[Sequence]
    ending: list[Sequence]
    repeats: bool


@dataclass(slots=True, eq=False)
class _Arrays:
    """Of all decodes, in order, for the step `step`."""

    rows: IntArray
    starts: IntArray
    sequences: list[Sequence]
    step: int


class DecodeSet:
    """Sequences by row, in the order in which they came. Steps are counted here, from one `take` to the next."""

    def __init__(self, num_rows: int, block_size: int) -> None:
        self._block_size = block_size
        self._sequences: dict[int, Sequence] = {}
        self._step = 0
        # By row: the position computed in a step less the step's number, and the steps when the next block begins and
        # when the last token is drawn.
        self._offsets = np.zeros(num_rows, np.int32)
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._beginning: defaultdict[int, dict[int, Sequence]] = defaultdict(dict)
        self._ending: defaultdict[int, dict[int, Sequence]] = defaultdict(dict)
        self._arrays: _Arrays | None = None
        self._was_taken = False

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, row: int) -> bool:
        return row in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def add(self, sequence: Sequence, position: int) -> None:
        """A sequence with a row computes `position` in the next step; at least one of its tokens is not drawn yet."""
        row, step = sequence.row, self._step
        self._sequences[row] = sequence
        self._offsets[row] = position - step
        self._begins[row] = begins = step + -position % self._block_size
        self._ends[row] = ends = step + sequence.max_length - 2 - position
        self._beginning[begins][row] = sequence
        self._ending[ends][row] = sequence
        self._arrays = None

    def remove(self, row: int) -> None:
        """The row decodes no more, if it did."""
        if self._sequences.pop(row, None) is not None:
            self._beginning[self._begins.pop(row)].pop(row, None)
            self._ending[self._ends.pop(row)].pop(row, None)
            self._arrays = None

    def position(self, row: int) -> int:
        """What the row's sequence computes in the next step."""
        return int(self._offsets[row]) + self._step

    def beginning(self) -> list[Sequence]:
        """Those that begin a block in the next step; each is told of once."""
        due = self._beginning.pop(self._step, None)
        if not due:
            return []
        begins = self._step + self._block_size
        for row in due:
            self._begins[row] = begins
        self._beginning[begins] |= due
        return list(due.values())

    def rows(self) -> IntArray:
        """All rows."""
        return self._current().rows

    def starts(self) -> IntArray:
        """The positions that they compute in the next step."""
        return self._current().starts

    def take(self) -> DecodeStep:
        """The next step; those that draw their last token in it are gone afterwards."""
        arrays = self._current()
        ending = list(self._ending.get(self._step, {}).values())
        step = DecodeStep(
            rows=arrays.rows,
            starts=arrays.starts,
            sequences=arrays.sequences,
            completing=list(self._beginning.get(self._step + 1, {}).values()),
            ending=ending,
            repeats=self._was_taken,
        )
        self._was_taken = True
        for sequence in ending:
            self.remove(sequence.row)
        self._ending.pop(self._step, None)
        self._step += 1
        return step

    def _current(self) -> _Arrays:
        arrays = self._arrays
        if arrays is None:
            rows = np.fromiter(self._sequences, np.int32, len(self._sequences))
            arrays = self._arrays = _Arrays(
                rows=rows,
                starts=self._offsets[rows] + np.int32(self._step),
                sequences=list(self._sequences.values()),
                step=self._step,
            )
            self._was_taken = False
        elif arrays.step < self._step:
            arrays.starts = arrays.starts + np.int32(self._step - arrays.step)
            arrays.step = self._step
        return arrays

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
class _Decode:
    """`offset` is the position that the sequence computes in a step, less the step's number; in the step `begins` it
    begins a block, in `ends` it computes the last position that it needs.
    """

    sequence: Sequence
    offset: int
    begins: int
    ends: int


@dataclass(slots=True, eq=False)
class _Arrays:
    """Of all decodes, in order, for the step `step`."""

    rows: IntArray
    starts: IntArray
    sequences: list[Sequence]
    step: int


class DecodeSet:
    """Sequences by row, in the order in which they came. Steps are counted here, from one `take` to the next."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._decodes: dict[int, _Decode] = {}
        self._step = 0
        self._beginning: defaultdict[int, dict[int, Sequence]] = defaultdict(dict)
        self._ending: defaultdict[int, dict[int, Sequence]] = defaultdict(dict)
        self._arrays: _Arrays | None = None
        self._was_taken = False

    def __len__(self) -> int:
        return len(self._decodes)

    def __contains__(self, row: int) -> bool:
        return row in self._decodes

    def __iter__(self) -> Iterator[Sequence]:
        return (decode.sequence for decode in self._decodes.values())

    def add(self, sequence: Sequence, position: int) -> None:
        """A sequence with a row computes `position` in the next step; at least one of its tokens is not drawn yet."""
        row, step = sequence.row, self._step
        decode = _Decode(
            sequence, position - step, step + -position % self._block_size, step + sequence.max_length - 2 - position
        )
        self._decodes[row] = decode
        self._beginning[decode.begins][row] = sequence
        self._ending[decode.ends][row] = sequence
        self._arrays = None

    def remove(self, row: int) -> None:
        """The row decodes no more, if it did."""
        decode = self._decodes.pop(row, None)
        if decode is not None:
            self._beginning[decode.begins].pop(row, None)
            self._ending[decode.ends].pop(row, None)
            self._arrays = None

    def position(self, row: int) -> int:
        """What the row's sequence computes in the next step."""
        return self._decodes[row].offset + self._step

    def beginning(self) -> list[Sequence]:
        """Those that begin a block in the next step; each is told of once."""
        due = self._beginning.pop(self._step, None)
        if not due:
            return []
        begins = self._step + self._block_size
        for row in due:
            self._decodes[row].begins = begins
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
        ending = self._ending.pop(self._step, {})
        step = DecodeStep(
            rows=arrays.rows,
            starts=arrays.starts,
            sequences=arrays.sequences,
            completing=list(self._beginning.get(self._step + 1, {}).values()),
            ending=list(ending.values()),
            repeats=self._was_taken,
        )
        self._was_taken = True
        self._step += 1
        for row in ending:
            self.remove(row)
        return step

    def _current(self) -> _Arrays:
        arrays = self._arrays
        if arrays is None:
            decodes = self._decodes.values()
            count = len(decodes)
            arrays = self._arrays = _Arrays(
                rows=np.fromiter(self._decodes, np.int32, count),
                starts=np.fromiter((decode.offset + self._step for decode in decodes), np.int32, count),
                sequences=[decode.sequence for decode in decodes],
                step=self._step,
            )
            self._was_taken = False
        elif arrays.step < self._step:
            arrays.starts = arrays.starts + np.int32(self._step - arrays.step)
            arrays.step = self._step
        return arrays

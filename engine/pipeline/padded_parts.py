"""`PaddedParts`: the inputs of a padded step for a schedule on its rows, and the part of them that a step of it reads.

Shapes follow from the bucket alone. Rows are not told apart by what they hold: decode attention is given the lanes of a
nano-batch, and prefill attention all its rows, with the places where chunks begin. Both write to one place, each the
rows that are its own (see `StepInputs`).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from engine.operation import TokenKind
from engine.pipeline.step_parts import Rows
from engine.pipeline.token_bucket import TokenBucket
from engine.step_inputs import StepInputs


class PaddedTokens(NamedTuple):
    """What `StepInputs` says of all rows [T]."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor


class PaddedParts:
    """Of nano-batches' inputs; everything was gathered before, parts are views and shared by all layers."""

    def __init__(self, bucket: TokenBucket, tokens: PaddedTokens, steps: Sequence[StepInputs]) -> None:
        """`tokens` are of all rows, `steps` the inputs of each nano-batch."""
        self._bucket = bucket
        self._steps = steps
        self._parts: dict[tuple[int, int, TokenKind], StepInputs] = {}
        self.whole = replace(
            _without_decodes(_without_chunks(steps[0])),
            tokens=tokens.tokens,
            positions=tokens.positions,
            slots=tokens.slots,
        )

    def rows(self, start: int, stop: int, kind: TokenKind) -> Sequence[Rows]:
        """The rows that tokens of `kind` may have in a range, as (start, stop) pairs, one for each nano-batch."""
        if kind is TokenKind.ALL:
            return [(start, stop)]
        found: list[Rows] = []
        for (first, last), nano_batch in zip(pairwise(self._bucket.borders), self._bucket.nano_batches, strict=True):
            if kind is TokenKind.DECODE:
                last = first + nano_batch.num_lanes
            elif not nano_batch.num_chunks:
                last = first
            if start <= first < last <= stop:
                found.append((first, last))
        return found or [(start, start)]

    def part(self, start: int, stop: int, kind: TokenKind) -> StepInputs:
        """What a step reads on rows `start` to `stop`: those of one nano-batch, unless it is of both kinds."""
        key = (start, stop, kind)
        if key not in self._parts:
            self._parts[key] = self._made(start, stop, kind)
        return self._parts[key]

    def _made(self, start: int, stop: int, kind: TokenKind) -> StepInputs:
        if kind is TokenKind.ALL:
            return _of_tokens(self.whole, start, stop)
        number = self._bucket.borders.index(start)
        assert stop <= self._bucket.borders[number + 1], "attention of several nano-batches at once"
        step = self._steps[number]
        return _without_chunks(step) if kind is TokenKind.DECODE else _without_decodes(step)


def _of_tokens(step: StepInputs, start: int, stop: int) -> StepInputs:
    rows = slice(start, stop)
    return replace(step, tokens=step.tokens[rows], positions=step.positions[rows], slots=step.slots[rows])


def _without_decodes(step: StepInputs) -> StepInputs:
    return replace(
        step,
        decode_block_tables=step.decode_block_tables[:0],
        decode_lengths=step.decode_lengths[:0],
        num_decodes=0,
        max_decode_length=0,
    )


def _without_chunks(step: StepInputs) -> StepInputs:
    return replace(step, prefill_block_tables=step.prefill_block_tables[:0], prefill_starts=None, prefill_lengths=None)

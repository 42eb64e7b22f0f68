"""`StepParts`: the inputs of one step, put in the order of a cut, and the part of them that a nano-operation reads.

A range of positions holds some decodes and some prefill tokens; a chunk of a prompt that a border runs through becomes
a shorter chunk on either side, the later one with the earlier one as part of its context.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from engine.operation import TokenKind
from engine.pipeline.nano_batch import Cut
from engine.step_inputs import StepInputs

Rows = tuple[int, int]


class Parts(Protocol):
    """The inputs of a step in the order of a cut, for whoever runs a schedule on it."""

    @property
    def whole(self) -> StepInputs:
        """All tokens."""
        ...

    def rows(self, start: int, stop: int, kind: TokenKind) -> Sequence[Rows]:
        """The positions of what an operation of `kind` computes in a range, in (start, stop) pairs."""
        ...

    def part(self, start: int, stop: int, kind: TokenKind) -> StepInputs:
        """What it reads there."""
        ...


class StepParts:
    """`whole` is the step in the order of the cut. Parts are made once and shared by all layers."""

    def __init__(self, step: StepInputs, cut: Cut) -> None:
        assert (cut.num_decodes, cut.num_tokens) == (step.num_decodes, len(step.tokens))
        self._cut = cut
        self._chunk_ends = tuple(accumulate(step.prefill_chunk_sizes, initial=0))
        self._parts: dict[tuple[int, int, TokenKind], StepInputs] = {}
        self._step = step
        self.whole = replace(
            step,
            tokens=self._ordered(step.tokens),
            positions=self._ordered(step.positions),
            slots=self._ordered(step.slots),
        )

    def part(self, start: int, stop: int, kind: TokenKind) -> StepInputs:
        """The tokens of `kind` at positions `start` to `stop`; per-token tensors follow the order of the cut."""
        key = (start, stop, kind)
        if key not in self._parts:
            self._parts[key] = self._make(start, stop, kind)
        return self._parts[key]

    def rows(self, start: int, stop: int, kind: TokenKind) -> Sequence[Rows]:
        """The positions of the tokens of `kind` in a range, as few (start, stop) pairs as they form."""
        if kind is TokenKind.ALL:
            return [(start, stop)]
        found: list[Rows] = []
        for (first, last), nano_batch in zip(pairwise(self._cut.borders), self._cut.nano_batches, strict=True):
            middle = first + nano_batch.num_decodes
            low, high = (first, middle) if kind is TokenKind.DECODE else (middle, last)
            low, high = max(low, start), min(high, stop)
            if low < high:
                found.append((low, high))
        return found or [(start, start)]

    def _ordered(self, values_T: Tensor) -> Tensor:
        """Per-token values of the batch's order in the order of the cut; no copy where the two agree."""
        nano_batches = [nano_batch for nano_batch in self._cut.nano_batches if nano_batch.num_tokens]
        if len(nano_batches) < 2:
            return values_T
        parts: list[Tensor] = []
        decode, prefill = 0, self._cut.num_decodes
        for nano_batch in nano_batches:
            parts.append(values_T[decode : decode + nano_batch.num_decodes])
            parts.append(values_T[prefill : prefill + nano_batch.num_prefills])
            decode += nano_batch.num_decodes
            prefill += nano_batch.num_prefills
        return torch.cat(parts)

    def _make(self, start: int, stop: int, kind: TokenKind) -> StepInputs:
        step, cut = self._step, self._cut
        decodes = cut.decodes_before(start), cut.decodes_before(stop)
        prefills = cut.prefills_before(start), cut.prefills_before(stop)
        match kind:
            case TokenKind.ALL:
                source, tokens = self.whole, slice(start, stop)
            case TokenKind.DECODE:
                source, tokens, prefills = step, slice(*decodes), (0, 0)
            case TokenKind.PREFILL:
                source, tokens = step, slice(step.num_decodes + prefills[0], step.num_decodes + prefills[1])
                decodes = (0, 0)
        chunks = self._chunks(*prefills)
        first, last = (chunks[0][0], chunks[-1][0] + 1) if chunks else (0, 0)
        starts, lengths = self._chunks_on_device(first, last, *prefills)
        return StepInputs(
            tokens=source.tokens[tokens],
            positions=source.positions[tokens],
            slots=source.slots[tokens],
            decode_block_tables=step.decode_block_tables[slice(*decodes)],
            decode_lengths=step.decode_lengths[slice(*decodes)],
            prefill_block_tables=step.prefill_block_tables[first:last],
            num_decodes=decodes[1] - decodes[0],
            max_decode_length=step.max_decode_length,
            prefill_chunk_sizes=tuple(size for _, size, _ in chunks),
            prefill_context_lengths=tuple(length for _, _, length in chunks),
            kv_cache=step.kv_cache,
            prefill_starts=starts,
            prefill_lengths=lengths,
        )

    def _chunks_on_device(self, first: int, last: int, start: int, stop: int) -> tuple[Tensor | None, Tensor | None]:
        """Starts and context lengths of the pieces, on chunks `first` to `last`, where layers read them there."""
        starts, lengths = self._step.prefill_starts, self._step.prefill_lengths
        if starts is None or lengths is None or first == last:
            return None, None
        ends = starts[first + 1 : last + 1]
        return starts[first : last + 1].clamp(start, stop) - start, lengths[first:last] - (ends - ends.clamp(max=stop))

    def _chunks(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(index, size, context length) of the pieces of chunks among prefill tokens `start` to `stop`."""
        pieces: list[tuple[int, int, int]] = []
        for index, (first, last) in enumerate(pairwise(self._chunk_ends)):
            low, high = max(first, start), min(last, stop)
            if low < high:
                pieces.append((index, high - low, self._step.prefill_context_lengths[index] - (last - high)))
        return pieces

"""`Scheduler`: which sequences compute which tokens in the next step.

Continuous batching with a constant dense batch: every running sequence decodes one token, and prefill, cut at token
granularity, fills the rest (NanoFlow, section 4.2.1; Sarathi's chunked prefill). It knows sequences, rows, blocks and
a token budget; it knows no token that is still on the device, no clock and no executor, so it runs as well in a
simulation. Per-step work is proportional to what changed: between two steps of a large model its code and data have
left the processor's caches, and what is touched costs more than what is computed.
"""

import heapq
import logging
from dataclasses import dataclass

import numpy as np

from engine.batch import Admission, Batch
from engine.block_manager import BlockManager
from engine.block_updates import BlockUpdates
from engine.decode_set import DecodeSet, DecodeStep
from engine.length_predictor import LengthPredictor
from engine.peak_use import PeakUse
from engine.request import FinishReason
from engine.row_table import RowTable
from engine.sequence import Sequence, SequenceStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """A batch for the executor, and the sequences whose tokens will come back, in the order of `Batch.sampled`.

    With their tokens known, the sequences `completing` have a full block more.
    `num_recomputed` of the batch's tokens were computed before and lost by a preemption.
    """

    batch: Batch
    sampled: list[Sequence]
    completing: list[Sequence]
    num_recomputed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Tokens `start .. start + count - 1` of a sequence's prompt (or of all its tokens, after a preemption)."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        return self.start + self.count == len(self.sequence.token_ids)

    @property
    def num_recomputed(self) -> int:
        return max(0, min(self.start + self.count, self.sequence.num_lost) - self.start)


class Scheduler:
    """Sequences wait by priority and arrival, are admitted when their predicted peak fits, then run to the end.

    A sequence is never scheduled past its limit, so only an end-of-sequence token, seen one step late, wastes a token.
    """

    def __init__(
        self,
        blocks: BlockManager,
        predictor: LengthPredictor,
        *,
        max_batch_tokens: int,
        max_sequences: int,
    ) -> None:
        self._blocks = blocks
        self._block_size = blocks.block_size
        self._predictor = predictor
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._decodes = DecodeSet(max_sequences, blocks.block_size)
        self._rows = RowTable(max_sequences)
        self._previous: Batch | None = None
        self._num_finished_waiting = 0
        self._step = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_recomputed_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without a row."""
        return len(self._waiting) - self._num_finished_waiting

    @property
    def num_running(self) -> int:
        """Sequences with a row."""
        return len(self._rows.sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose longest possible length fits the cache."""
        heapq.heappush(self._waiting, sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now, whatever it is doing; a step in flight may still compute a token of it, to be dropped.

        Its blocks are free at once: a later step that reuses them runs after the step in flight.
        """
        if sequence.status is SequenceStatus.WAITING:
            self._num_finished_waiting += 1
        else:
            self._leave_row(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        if reason is not FinishReason.ABORT:
            self._predictor.observe(sequence.num_generated)

    def append(self, step: ScheduledStep, token_ids: list[int]) -> None:
        """A step's tokens came back; blocks that they complete become prefixes for others.

        Tokens of sequences that have ended meanwhile are dropped.
        """
        finished = SequenceStatus.FINISHED  # looking up a member of an enum takes as long as appending
        for sequence, token_id in zip(step.sampled, token_ids, strict=True):
            if sequence.status is not finished:
                sequence.token_ids.append(token_id)
        for sequence in step.completing:
            if sequence.status is SequenceStatus.RUNNING:
                # The newest token's key and value are not written before the next step.
                self._register(sequence, (len(sequence.token_ids) - 1) // self._block_size)

    def schedule(self, now: float) -> ScheduledStep | None:
        """Compose the next step; None when no sequence can compute anything."""
        block_updates = BlockUpdates()
        any_preempted = self._grow_decodes(block_updates)
        budget = self._max_batch_tokens - len(self._decodes)
        chunks = self._continue_prefills(budget) if self._prefilling else []
        admitted: list[_Chunk] = []
        if self._waiting and not any_preempted:
            admitted = self._admit(budget - sum(chunk.count for chunk in chunks), now, block_updates)
            chunks += admitted
        if not self._decodes and not chunks:
            return None
        decodes = self._decodes.take()
        for sequence in decodes.ending:
            self._rows.positions[sequence.row] = sequence.max_length - 1
        for chunk in chunks:
            self._advance_prefill(chunk)
        return self._compose(decodes, chunks, admitted, block_updates)

    def _grow_decodes(self, block_updates: BlockUpdates) -> bool:
        """Give a block to every decode that begins a new one; True if that took blocks from a younger sequence."""
        needy = self._decodes.beginning()
        if not needy:
            return False
        block_ids = self._blocks.allocate(len(needy))
        if block_ids is None:
            return self._grow_oldest_first(needy, block_updates)
        for sequence, block_id in zip(needy, block_ids, strict=True):
            self._add_block(sequence, block_id, block_updates)
        return False

    def _add_block(self, sequence: Sequence, block_id: int, block_updates: BlockUpdates) -> None:
        block_updates.add([sequence.row], [len(sequence.block_ids)], [block_id])
        sequence.block_ids.append(block_id)
        self._rows.num_blocks[sequence.row] += 1

    def _grow_oldest_first(self, needy: list[Sequence], block_updates: BlockUpdates) -> bool:
        """The same, one after the other, where there are too few free blocks for all."""
        any_preempted = False
        for sequence in sorted(needy):
            while sequence.row >= 0:
                block_ids = self._blocks.allocate(1)
                if block_ids is not None:
                    self._add_block(sequence, block_ids[0], block_updates)
                    break
                self._preempt(max(filter(self._is_schedulable, self._rows.sequences.values())))
                any_preempted = True
        return any_preempted

    def _continue_prefills(self, budget: int) -> list[_Chunk]:
        chunks = []
        for sequence in self._prefilling:
            if budget <= 0:
                break
            count = min(budget, len(sequence.token_ids) - sequence.num_computed)
            chunks.append(_Chunk(sequence=sequence, start=sequence.num_computed, count=count))
            budget -= count
        return chunks

    def _admit(self, budget: int, now: float, block_updates: BlockUpdates) -> list[_Chunk]:
        """Admit waiting sequences, best first, while tokens, rows and predicted blocks last."""
        chunks: list[_Chunk] = []
        peak: PeakUse | None = None
        while budget > 0 and self._waiting and not self._rows.is_full:
            sequence = self._waiting[0]
            if sequence.status is SequenceStatus.FINISHED:
                heapq.heappop(self._waiting)
                self._num_finished_waiting -= 1
                continue
            prefix = self._match_prefix(sequence)
            num_new_blocks = self._blocks.num_blocks_for(len(sequence.token_ids)) - len(prefix)
            num_taken = num_new_blocks + self._blocks.num_cached_among(prefix)
            if num_taken > self._blocks.num_free_blocks:
                break
            peak = peak or self._peak_use()
            self._add_candidate(peak, sequence, num_taken)
            if self._rows.sequences and not peak.fits(self._blocks.num_blocks):
                break
            heapq.heappop(self._waiting)
            self._enter_row(sequence, prefix, num_new_blocks, now)
            num_blocks = len(sequence.block_ids)
            block_updates.add([sequence.row] * num_blocks, range(num_blocks), sequence.block_ids)
            count = min(budget, len(sequence.token_ids) - sequence.num_computed)
            chunks.append(_Chunk(sequence=sequence, start=sequence.num_computed, count=count))
            budget -= count
        return chunks

    def _peak_use(self) -> PeakUse:
        self._rows.positions[self._decodes.rows()] = self._decodes.starts()
        rows = np.fromiter(self._rows.sequences, np.int32, self.num_running)
        limits = self._rows.max_lengths[rows] - self._rows.prompt_lengths[rows]
        remaining, variance = self._predictor.remaining(self._rows.generated(rows), limits)
        held = self._rows.num_blocks[rows]
        return PeakUse(
            block_size=self._block_size,
            held=held,
            remaining=remaining,
            variance=variance,
            num_shared=int(held.sum()) - self._blocks.num_used_blocks,
        )

    def _add_candidate(self, peak: PeakUse, sequence: Sequence, num_blocks: int) -> None:
        generated = np.asarray([sequence.num_generated], np.int32)
        limits = np.asarray([sequence.request.sampling.max_tokens], np.int32)
        remaining, variance = self._predictor.remaining(generated, limits)
        peak.add(num_blocks, float(remaining[0]), float(variance[0]))

    def _match_prefix(self, sequence: Sequence) -> list[int]:
        if not self._blocks.prefix_caching:
            return []
        # At least one token is computed, since its logits are what the sequence came for.
        num_usable = (len(sequence.token_ids) - 1) // self._block_size
        return self._blocks.match(sequence.hash_blocks(self._block_size)[:num_usable])

    def _enter_row(self, sequence: Sequence, prefix: list[int], num_new_blocks: int, now: float) -> None:
        self._blocks.acquire(prefix)
        new_blocks = self._blocks.allocate(num_new_blocks)
        assert new_blocks is not None
        num_cached = len(prefix) * self._block_size
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            sequence.num_cached_tokens = num_cached
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_prompt_tokens += num_cached
        sequence.status = SequenceStatus.RUNNING
        sequence.block_ids = prefix + new_blocks
        sequence.num_registered_blocks = len(prefix)
        sequence.num_computed = num_cached
        self._rows.enter(sequence, num_cached)
        self._prefilling.append(sequence)

    def _advance_prefill(self, chunk: _Chunk) -> None:
        sequence = chunk.sequence
        sequence.num_computed += chunk.count
        self._rows.positions[sequence.row] = sequence.num_computed
        self._register(sequence, sequence.num_computed // self._block_size)
        if chunk.completes:
            self._prefilling.remove(sequence)
            if sequence.num_computed + 1 < sequence.max_length:
                self._decodes.add(sequence, sequence.num_computed)

    def _compose(
        self, decodes: DecodeStep, chunks: list[_Chunk], admitted: list[_Chunk], block_updates: BlockUpdates
    ) -> ScheduledStep:
        batch = (
            self._mixed_batch(decodes, chunks, admitted, block_updates)
            if chunks
            else self._decode_batch(decodes, block_updates)
        )
        self._step += 1
        self._previous = None if chunks else batch
        if not chunks:
            return ScheduledStep(batch=batch, sampled=decodes.sequences, completing=decodes.completing)
        ended = [chunk for chunk in chunks if chunk.completes]
        num_recomputed = sum(chunk.num_recomputed for chunk in chunks)
        self.num_recomputed_tokens += num_recomputed
        return ScheduledStep(
            batch=batch,
            sampled=decodes.sequences + [chunk.sequence for chunk in ended],
            completing=decodes.completing
            + [chunk.sequence for chunk in ended if (chunk.start + chunk.count) % self._block_size == 0],
            num_recomputed=num_recomputed,
        )

    def _decode_batch(self, decodes: DecodeStep, block_updates: BlockUpdates) -> Batch:
        """A step of decodes alone; of the arrays that nothing has changed, the previous step's."""
        previous = self._previous if decodes.repeats else None
        num_decodes = len(decodes.rows)
        return Batch(
            step=self._step,
            admissions=(),
            block_updates=block_updates.array(),
            rows=decodes.rows,
            starts=decodes.starts,
            counts=np.ones(num_decodes, np.int32) if previous is None else previous.counts,
            num_decodes=num_decodes,
            sampled=np.arange(num_decodes, dtype=np.int32) if previous is None else previous.sampled,
            repeats=previous is not None,
        )

    def _mixed_batch(
        self, decodes: DecodeStep, chunks: list[_Chunk], admitted: list[_Chunk], block_updates: BlockUpdates
    ) -> Batch:
        num_decodes = len(decodes.rows)
        completing = [index for index, chunk in enumerate(chunks, num_decodes) if chunk.completes]
        return Batch(
            step=self._step,
            admissions=tuple(
                Admission(
                    row=chunk.sequence.row,
                    token_ids=np.array(chunk.sequence.token_ids, np.int32),
                    num_prompt_tokens=chunk.sequence.num_prompt_tokens,
                    sampling=chunk.sequence.request.sampling,
                )
                for chunk in admitted
            ),
            block_updates=block_updates.array(),
            rows=np.concatenate([decodes.rows, np.asarray([chunk.sequence.row for chunk in chunks], np.int32)]),
            starts=np.concatenate([decodes.starts, np.asarray([chunk.start for chunk in chunks], np.int32)]),
            counts=np.concatenate(
                [np.ones(num_decodes, np.int32), np.asarray([chunk.count for chunk in chunks], np.int32)]
            ),
            num_decodes=num_decodes,
            sampled=np.concatenate([np.arange(num_decodes, dtype=np.int32), np.asarray(completing, np.int32)]),
        )

    def _register(self, sequence: Sequence, num_full_blocks: int) -> None:
        if not self._blocks.prefix_caching:
            return
        hashes = sequence.hash_blocks(self._block_size)
        for index in range(sequence.num_registered_blocks, num_full_blocks):
            self._blocks.register(sequence.block_ids[index], hashes[index])
        sequence.num_registered_blocks = max(sequence.num_registered_blocks, num_full_blocks)

    def _is_schedulable(self, sequence: Sequence) -> bool:
        """False once a sequence's last token is being drawn: it holds blocks for one more step only."""
        return sequence.row in self._decodes or sequence in self._prefilling

    def _preempt(self, sequence: Sequence) -> None:
        """The prediction was wrong: the youngest sequence gives up its blocks and is computed again later."""
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        logger.warning(
            "preempted request %s at %d tokens: no free KV block (%d in all)",
            sequence.request.request_id,
            len(sequence.token_ids),
            self._blocks.num_blocks,
        )
        row = sequence.row
        num_computed = self._decodes.position(row) if row in self._decodes else sequence.num_computed
        sequence.num_lost = max(sequence.num_lost, num_computed)
        self._leave_row(sequence)
        sequence.status = SequenceStatus.WAITING
        heapq.heappush(self._waiting, sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        self._decodes.remove(sequence.row)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._rows.leave(sequence)
        self._blocks.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_registered_blocks = 0
        sequence.num_computed = 0

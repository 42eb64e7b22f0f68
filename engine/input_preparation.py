"""`InputPreparation`: what the host does before a step can run: the batch becomes tensors of the device.

Where a step repeats the one before, its tensors are that one's, advanced by a token in place; nothing travels but what
changed. In-place is safe: steps run in the order in which they are prepared, each after the one before has read them.

Legend: S sequences of the step, K of them drawn from, T tokens, D decodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, IntArray
from engine.config import EngineConfig
from engine.decode_order import DecodeOrder, parts_of
from engine.kv_cache import KVCache
from engine.pipeline.nano_batch import Cut
from engine.pipeline.padded_inputs import PaddedInputs, packed_step
from engine.pipeline.token_bucket import TokenBucket
from engine.sampling_table import Int64s, SamplingPlan, SamplingTable
from engine.staging import HostArray, stage
from engine.step_inputs import DecodePart, StepInputs
from engine.token_pool import TokenPool

Begin = Callable[[], None]


def _nobody_asks() -> None:
    """For steps whose time nobody measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """A step that can run: what its layers read (None without tokens, or padded), where its draws come from and go to.

    `sampled_tokens` [K] are the drawn hidden states' places, None where all are drawn, each in its place. `sections`
    are the plan's arrays on the device. The token drawn k-th goes to the pool at (`drawn_rows`, `drawn_positions`) [K],
    or the `order`[k]-th does.
    """

    inputs: StepInputs | None
    plan: SamplingPlan
    sections: dict[str, Tensor]
    sampled_tokens: Tensor | None
    drawn_rows: Tensor
    drawn_positions: Tensor
    order: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class _Repeatable:
    """The last step, of decodes alone: the next may be the same a token further.

    `counters` [3, D] are positions, slots and lengths. `drawn` comes when the step has run, in the order of its inputs.
    """

    step: PreparedStep
    inputs: StepInputs
    cut: Cut
    counters: Tensor
    order: DecodeOrder | None
    drawn: Tensor | None = None


class InputPreparation:
    """For one rank's batches, in their order. The pool of tokens and the parameters of sampling are kept here."""

    def __init__(
        self,
        config: EngineConfig,
        kv_cache: KVCache,
        device: torch.device,
        *,
        returns_logprobs: bool,
        lengths_on_device: bool = False,
        orders_decodes: bool = False,
    ) -> None:
        """`lengths_on_device`: layers read there where chunks begin and how long contexts are. `orders_decodes`: they
        attend decodes in parts, where they lie in order of length.
        """
        self._kv_cache = kv_cache
        self._device = device
        self._returns_logprobs = returns_logprobs
        self._lengths_on_device = lengths_on_device
        self._orders_decodes = orders_decodes
        self.pool = TokenPool(
            max_sequences=config.max_sequences,
            max_model_len=config.max_model_len,
            max_blocks_per_sequence=config.max_blocks_per_sequence,
            device=device,
        )
        self._sampling = SamplingTable(config.max_sequences, config.model.vocab_size, config.model.eos_token_ids)
        self._last: _Repeatable | None = None
        keys = kv_cache.keys[0]
        self._block_bytes = 2 * keys[0].numel() * keys.element_size()

    def prepare(self, batch: Batch, cut: Cut, *, begin: Begin = _nobody_asks) -> PreparedStep:
        """The batch, to be run by a schedule with this cut; `begin` is called when the device is first given work."""
        last = self._last
        if batch.repeats and last is not None and last.drawn is not None and last.cut == cut:
            begin()
            step = self._advance(last, last.drawn, batch)
            if step is not None:
                return step
        return self._prepare(batch, cut, begin)

    def drawn(self, step: PreparedStep, token_ids_K: Tensor) -> None:
        """The prepared step has drawn these tokens; they are what its rows compute next."""
        if step.order is not None:
            token_ids_K = token_ids_K[step.order]
        self.pool.write_tokens(step.drawn_rows, step.drawn_positions, token_ids_K)
        if self._last is not None and self._last.step is step:
            self._last.drawn = token_ids_K

    def prepare_padded(
        self, batch: Batch, dealt: Cut, inputs: PaddedInputs, bucket: TokenBucket, *, begin: Begin = _nobody_asks
    ) -> PreparedStep:
        """The batch, padded to be run on these inputs: dealt like this to the nano-batches of a bucket.

        `begin` as in `prepare`.
        """
        self._last = None
        self._admit(batch)
        arrays = _step_arrays(batch, None, self._kv_cache.block_size, None)
        plan = self._sampling.plan(arrays["sampled_row"], arrays["sampled_position"], self._returns_logprobs)
        packed, places = packed_step(bucket, batch, dealt, arrays["token_row"], arrays["token_position"])
        if "sampled_token" in arrays or len(bucket.nano_batches) > 1:
            arrays["sampled_token"] = places[batch.counts.cumsum(dtype=np.int64)[batch.sampled] - 1]
        travelling: dict[str, HostArray] = {"padded": packed}
        travelling |= {name: array for name, array in arrays.items() if name.startswith("sampled_")}
        arrays_of_step = _update_arrays(batch) | travelling | plan.arrays
        begin()
        staged = stage(arrays_of_step, self._device)
        self._write_admitted(batch, staged)
        self._write_blocks(batch, staged)
        inputs.fill(staged["padded"])
        return PreparedStep(
            inputs=None,
            plan=plan,
            sections=staged,
            sampled_tokens=staged.get("sampled_token"),
            drawn_rows=staged["sampled_row"],
            drawn_positions=staged["sampled_position"],
        )

    def _prepare(self, batch: Batch, cut: Cut, begin: Begin) -> PreparedStep:
        self._admit(batch)
        order = self._order(batch, cut)
        arrays = _step_arrays(batch, cut, self._kv_cache.block_size, None if order is None else order.order)
        if self._lengths_on_device and len(batch.rows) > batch.num_decodes:
            arrays["chunk_start"] = _starts(batch.counts[batch.num_decodes :])
        plan = self._sampling.plan(arrays["sampled_row"], arrays["sampled_position"], self._returns_logprobs)
        arrays_of_step = _update_arrays(batch) | arrays | plan.arrays
        begin()
        staged = stage(arrays_of_step, self._device)
        self._write_admitted(batch, staged)
        self._write_blocks(batch, staged)
        inputs = self._step_inputs(batch, arrays["length"], staged, order) if len(batch.rows) else None
        step = PreparedStep(
            inputs=inputs,
            plan=plan,
            sections=staged,
            sampled_tokens=staged.get("sampled_token"),
            drawn_rows=staged["sampled_row"],
            drawn_positions=staged["sampled_position"],
        )
        self._last = None
        if inputs is not None and batch.num_decodes == len(batch.rows) == len(batch.sampled):
            step = self._remember(step, inputs, cut, order)
        return step

    def _order(self, batch: Batch, cut: Cut) -> DecodeOrder | None:
        """Where nothing is cut, decodes lie in order of length if that pays."""
        if not self._orders_decodes or len(cut.nano_batches) != 1 or batch.num_decodes < 2:
            return None
        lengths = batch.starts[: batch.num_decodes].astype(np.int64) + 1
        return DecodeOrder.of(lengths, block_size=self._kv_cache.block_size, block_bytes=self._block_bytes)

    def _remember(self, step: PreparedStep, inputs: StepInputs, cut: Cut, order: DecodeOrder | None) -> PreparedStep:
        """The same step, of decodes alone, on tensors that can be advanced."""
        counters = torch.stack((inputs.positions, inputs.slots, inputs.decode_lengths))
        positions_D, slots_D, lengths_D = counters.unbind()
        parts = tuple(replace(part, lengths=lengths_D[part.start : part.stop]) for part in inputs.decode_parts)
        inputs = replace(inputs, positions=positions_D, slots=slots_D, decode_lengths=lengths_D, decode_parts=parts)
        step = replace(step, inputs=inputs, drawn_rows=step.sections["row"], drawn_positions=lengths_D)
        if order is not None:
            step = replace(step, order=torch.from_numpy(order.order))
        self._last = _Repeatable(step=step, inputs=inputs, cut=cut, counters=counters, order=order)
        return step

    def _advance(self, last: _Repeatable, drawn_D: Tensor, batch: Batch) -> PreparedStep | None:
        """The last step once more, of the tokens that it drew; None where it is to be prepared anew after all."""
        inputs = last.inputs
        last.counters.add_(1)
        longest = inputs.max_decode_length + 1
        if len(batch.block_updates):
            if last.order is None and self._order(batch, last.cut) is not None:
                return None
            self._write_blocks(batch, stage(_update_arrays(batch), self._device))
            inputs = self._with_new_blocks(last, batch, longest)
        plan, sections = last.step.plan, last.step.sections
        if plan.arrays:
            lengths = batch.starts.astype(np.int64) + 1
            plan = self._sampling.plan(batch.rows.astype(np.int64), lengths, self._returns_logprobs)
            sections = stage(plan.arrays, self._device)
        inputs = replace(inputs, tokens=drawn_D, max_decode_length=longest, decode_plans={})
        step = replace(last.step, inputs=inputs, plan=plan, sections=sections)
        last.step, last.inputs, last.drawn = step, inputs, None
        return step

    def _with_new_blocks(self, last: _Repeatable, batch: Batch, longest: int) -> StepInputs:
        """The inputs with tables and slots as they are now."""
        inputs, rows_D, block_size = last.inputs, last.step.drawn_rows, self._kv_cache.block_size
        indices_D = inputs.positions // block_size
        offsets_D = inputs.positions - indices_D * block_size
        inputs.slots.copy_(self.pool.slots(rows_D, indices_D, offsets_D, block_size))
        tables = self.pool.tables(rows_D, -(-longest // block_size))
        if last.order is None:
            return replace(inputs, decode_block_tables=tables)
        lengths = batch.starts.astype(np.int64)[last.order.order] + 1
        ranges = parts_of(lengths, block_size=block_size, block_bytes=self._block_bytes)
        parts = self._parts(ranges, rows_D, inputs.decode_lengths)
        return replace(inputs, decode_block_tables=tables, decode_parts=parts)

    def _parts(
        self, ranges: Sequence[tuple[int, int, int]], rows_D: Tensor, lengths_D: Tensor
    ) -> tuple[DecodePart, ...]:
        return tuple(
            DecodePart(
                start=start,
                stop=stop,
                block_tables=self.pool.tables(rows_D[start:stop], num_blocks),
                lengths=lengths_D[start:stop],
            )
            for start, stop, num_blocks in ranges
        )

    def _admit(self, batch: Batch) -> None:
        for admission in batch.admissions:
            self._sampling.admit(admission.row, admission.sampling, admission.num_prompt_tokens)

    def _write_admitted(self, batch: Batch, staged: dict[str, Tensor]) -> None:
        if batch.admissions:
            self.pool.write_tokens(staged["new_row"], staged["new_position"], staged["new_token"])

    def _write_blocks(self, batch: Batch, staged: dict[str, Tensor]) -> None:
        if len(batch.block_updates):
            self.pool.write_blocks(staged["block_row"], staged["block_index"], staged["block_id"])

    def _step_inputs(
        self, batch: Batch, lengths: Int64s, staged: dict[str, Tensor], order: DecodeOrder | None
    ) -> StepInputs:
        """What the layers read; everything per token is gathered on the device."""
        block_size = self._kv_cache.block_size
        num_decodes = batch.num_decodes
        rows_S, lengths_S = staged["row"], staged["length"]
        rows_T, positions_T = staged["token_row"], staged["token_position"]
        longest_decode = int(lengths[:num_decodes].max(initial=0))
        longest_prefill = int(lengths[num_decodes:].max(initial=0))
        return StepInputs(
            tokens=self.pool.read_tokens(rows_T, positions_T),
            positions=positions_T,
            slots=self.pool.slots(rows_T, staged["token_block"], staged["token_offset"], block_size),
            decode_block_tables=self.pool.tables(rows_S[:num_decodes], -(-longest_decode // block_size)),
            decode_lengths=lengths_S[:num_decodes],
            prefill_block_tables=self.pool.tables(rows_S[num_decodes:], -(-longest_prefill // block_size)),
            num_decodes=num_decodes,
            max_decode_length=longest_decode,
            prefill_chunk_sizes=tuple(batch.counts[num_decodes:].tolist()),
            prefill_context_lengths=tuple(lengths[num_decodes:].tolist()),
            kv_cache=self._kv_cache,
            decode_parts=() if order is None else self._parts(order.parts, rows_S, lengths_S),
            prefill_starts=staged.get("chunk_start"),
            prefill_lengths=lengths_S[num_decodes:] if "chunk_start" in staged else None,
        )


def _update_arrays(batch: Batch) -> dict[str, HostArray]:
    """The tokens of admitted rows and the changed entries of block tables, one flat array per column, if any."""
    arrays: dict[str, HostArray] = {}
    if batch.admissions:
        sizes = np.array([len(admission.token_ids) for admission in batch.admissions], dtype=np.int64)
        rows = np.array([admission.row for admission in batch.admissions], dtype=np.int64)
        tokens = np.concatenate([admission.token_ids for admission in batch.admissions])
        arrays["new_row"] = np.repeat(rows, sizes)
        arrays["new_position"] = _ranges(np.zeros_like(sizes), sizes)
        arrays["new_token"] = tokens.astype(np.int64)
    if len(batch.block_updates):
        columns = batch.block_updates.T.astype(np.int64, order="C")
        arrays["block_row"], arrays["block_index"], arrays["block_id"] = columns
    return arrays


def _step_arrays(batch: Batch, planned: Cut | None, block_size: int, order: Int64s | None) -> dict[str, Int64s]:
    """Rows and positions of the T tokens, the S sequences and the K draws; hidden states lie in the order of a cut, or
    of the batch without one, and of the batch's decodes in `order`.

    In a step of decodes alone several of them are the same, and no "sampled_token" says that every hidden state is
    drawn from, in its place.
    """
    rows, starts = batch.rows.astype(np.int64), batch.starts.astype(np.int64)
    draws_all = len(batch.sampled) == len(rows)
    drawn_rows, ends = rows, starts + batch.counts
    if not draws_all:
        drawn_rows, ends = rows[batch.sampled], ends[batch.sampled]
    if order is not None:
        rows, starts = (np.concatenate((array[order], array[len(order) :])) for array in (rows, starts))
    has_prefills = len(rows) > batch.num_decodes
    arrays = {"row": rows, "length": starts + batch.counts, "token_row": rows, "token_position": starts}
    if order is None and draws_all:
        ends = arrays["length"]  # so it travels once
    arrays["sampled_row"], arrays["sampled_position"] = drawn_rows, ends
    if has_prefills:
        arrays["token_row"] = np.repeat(rows, batch.counts)
        arrays["token_position"] = _ranges(starts, batch.counts.astype(np.int64))
    arrays["token_block"], arrays["token_offset"] = np.divmod(arrays["token_position"], block_size)
    if order is not None or has_prefills or not draws_all or (planned is not None and len(planned.nano_batches) > 1):
        places = batch.counts.cumsum(dtype=np.int64) - 1
        if order is not None:
            places[order] = np.arange(len(order))
        arrays["sampled_token"] = places[batch.sampled]
        if planned is not None:
            cut = planned.scaled(batch.num_decodes, batch.num_tokens - batch.num_decodes)
            arrays["sampled_token"] = cut.positions_of(places[batch.sampled])
    return arrays


def _starts(counts: IntArray) -> Int64s:
    """Where each of them begins when they lie side by side, and where the last ends."""
    return np.concatenate((np.zeros(1, np.int64), counts.cumsum(dtype=np.int64)))


def _ranges(starts: Int64s, counts: Int64s) -> Int64s:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ...: one flat int64 array."""
    shifts = starts - (counts.cumsum() - counts)
    return np.arange(counts.sum(), dtype=np.int64) + np.repeat(shifts, counts)

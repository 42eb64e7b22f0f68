"""`ModelRunner`: one `Batch` to one step on the device: inputs, forward pass, logits, drawn tokens, token pool.

It owns the row tables and nothing else; a step is launched without waiting for the device, so the next one can be
launched before this one's tokens are on the host. It knows no sequences, no prefixes, no other ranks.

Legend: S sequences of the step, K of them drawn from, T tokens, D decodes, P prefills.
"""

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import EngineConfig, PipelineMode
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.pending_step import PendingStep, StepClock
from engine.pipeline.lanes import lanes_for
from engine.pipeline.nano_batch import Cut
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.plan_set import PlanSet
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.sampler import Drawn, sample
from engine.sampling_table import Int64s, SamplingPlan, SamplingTable
from engine.staging import HostArray, stage
from engine.step_inputs import StepInputs
from engine.token_pool import TokenPool


class ModelRunner:
    """Runs batches in the order of the `launch` calls."""

    def __init__(
        self,
        config: EngineConfig,
        model: Decoder,
        pipeline: Pipeline,
        kv_cache: KVCache,
        device: torch.device,
        plans: PlanSet | None = None,
        *,
        returns_logprobs: bool = True,
    ) -> None:
        self._model = model
        self.pipeline = pipeline
        self._lanes = lanes_for(device, overlaps=config.pipeline is PipelineMode.OVERLAP)
        self.plans = PlanChoice(pipeline.sequential, plans)
        self._kv_cache = kv_cache
        self.device = device
        self._returns_logprobs = returns_logprobs
        self._pool = TokenPool(
            max_sequences=config.max_sequences,
            max_model_len=config.max_model_len,
            max_blocks_per_sequence=config.max_blocks_per_sequence,
            device=device,
        )
        self._sampling = SamplingTable(config.max_sequences, config.model.vocab_size, config.model.eos_token_ids)
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def use(self, plans: PlanChoice, *, overlaps: bool) -> None:
        """Run the steps from now on by other plans; benchmarks compare modes on one model with it."""
        self.plans = plans
        self._lanes = lanes_for(self.device, overlaps=overlaps)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start one step; on a CPU it is over on return."""
        clock = StepClock(self.device)
        stopwatch = Stopwatch()
        num_prefills = batch.num_tokens - batch.num_decodes
        name, schedule = self.plans.of(batch.num_decodes, num_prefills)
        for admission in batch.admissions:
            self._sampling.admit(admission.row, admission.sampling, admission.num_prompt_tokens)
        arrays = _step_arrays(batch, schedule.cut, self._kv_cache.block_size)
        plan = self._sampling.plan(arrays["sampled_row"], arrays["sampled_position"], self._returns_logprobs)
        staged = stage(_update_arrays(batch) | arrays | plan.arrays, self.device)
        if batch.admissions:
            self._pool.write_tokens(staged["new_row"], staged["new_position"], staged["new_token"])
        if len(batch.block_updates):
            self._pool.write_blocks(staged["block_row"], staged["block_index"], staged["block_id"])
        drawn = None
        if len(batch.rows):
            step = self._step_inputs(batch, arrays["length"], staged)
            hidden_TE = self.pipeline.run(step, schedule, self._lanes, stopwatch)
            if len(batch.sampled):
                drawn = self._draw(hidden_TE, plan, staged, stopwatch)
        clock.stop()
        times = stopwatch.times() if self.device.type == "cpu" else None
        return PendingStep(batch.step, plan, drawn, clock, self._copies, plan_name=name, times=times)

    def _draw(self, hidden_TE: Tensor, plan: SamplingPlan, staged: dict[str, Tensor], stopwatch: Stopwatch) -> Drawn:
        """Draw the sampled tokens; chunks that do not end a prompt have only filled the cache."""
        started = stopwatch.now()
        hidden_KE = hidden_TE[staged["sampled_token"]] if "sampled_token" in staged else hidden_TE
        shard_KR = self._model.lm_head.shard(self._model.norm(hidden_KE))
        multiplied = stopwatch.spent(Cost.GEMM, started)
        logits_KV = self._model.lm_head.join(shard_KR)
        stopwatch.gathered(multiplied, self._model.lm_head.all_gather)
        best = self._model.lm_head.best
        if best is not None and not plan.arrays:  # all that every row asks for is its best token
            drawn = Drawn(token_ids=best(logits_KV)[0])
        else:
            drawn = sample(logits_KV, plan, staged, self._pool)
        self._pool.write_tokens(staged["sampled_row"], staged["sampled_position"], drawn.token_ids)
        return drawn

    def _step_inputs(self, batch: Batch, lengths: Int64s, staged: dict[str, Tensor]) -> StepInputs:
        """What the layers read; everything per token is gathered on the device."""
        block_size = self._kv_cache.block_size
        num_decodes = batch.num_decodes
        rows_S, lengths_S = staged["row"], staged["length"]
        rows_T, positions_T = staged["token_row"], staged["token_position"]
        longest_decode = int(lengths[:num_decodes].max(initial=0))
        longest_prefill = int(lengths[num_decodes:].max(initial=0))
        return StepInputs(
            tokens=self._pool.read_tokens(rows_T, positions_T),
            positions=positions_T,
            slots=self._pool.slots(rows_T, staged["token_block"], staged["token_offset"], block_size),
            decode_block_tables=self._pool.tables(rows_S[:num_decodes], -(-longest_decode // block_size)),
            decode_lengths=lengths_S[:num_decodes],
            prefill_block_tables=self._pool.tables(rows_S[num_decodes:], -(-longest_prefill // block_size)),
            num_decodes=num_decodes,
            max_decode_length=longest_decode,
            prefill_chunk_sizes=tuple(batch.counts[num_decodes:].tolist()),
            prefill_context_lengths=tuple(lengths[num_decodes:].tolist()),
            kv_cache=self._kv_cache,
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


def _step_arrays(batch: Batch, planned: Cut, block_size: int) -> dict[str, Int64s]:
    """Rows and positions of the T tokens, the S sequences and the K draws; hidden states lie in the order of a cut.

    In a step of decodes alone several of them are the same, and no "sampled_token" says that every hidden state is
    drawn from, in its place.
    """
    rows, starts = batch.rows.astype(np.int64), batch.starts.astype(np.int64)
    lengths = starts + batch.counts
    arrays = {"row": rows, "length": lengths, "token_row": rows, "token_position": starts}
    has_prefills = len(rows) > batch.num_decodes
    if has_prefills:
        arrays["token_row"] = np.repeat(rows, batch.counts)
        arrays["token_position"] = _ranges(starts, batch.counts.astype(np.int64))
    arrays["token_block"], arrays["token_offset"] = np.divmod(arrays["token_position"], block_size)
    arrays["sampled_row"], arrays["sampled_position"] = rows, lengths
    draws_all = len(batch.sampled) == len(rows)
    if not draws_all:
        arrays["sampled_row"], arrays["sampled_position"] = rows[batch.sampled], lengths[batch.sampled]
    if has_prefills or not draws_all or len(planned.nano_batches) > 1:
        cut = planned.scaled(batch.num_decodes, batch.num_tokens - batch.num_decodes)
        ends = batch.counts.cumsum(dtype=np.int64)
        arrays["sampled_token"] = cut.positions_of(ends[batch.sampled] - 1)
    return arrays


def _ranges(starts: Int64s, counts: Int64s) -> Int64s:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ...: one flat int64 array."""
    shifts = starts - (counts.cumsum() - counts)
    return np.arange(counts.sum(), dtype=np.int64) + np.repeat(shifts, counts)

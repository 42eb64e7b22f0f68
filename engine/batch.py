"""The plan of one step, as the scheduler sends it to every rank, and the result that comes back.

A `Batch` is small and picklable: it names rows and blocks, never token values of running sequences, because those
stay in each rank's token pool, a device table of shape [row, position]. A row's prompt, sampling parameters and
block table travel once (an `Admission` and block updates); after that a decode costs three integers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams, TokenLogprob

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A sequence takes `row`: its tokens so far (prompt, then any generated ones) and how to sample.

    The first `num_prompt_tokens` of `token_ids` [n] are the prompt; penalties look at the rest, seeds at positions.
    """

    row: int
    token_ids: IntArray
    num_prompt_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step: S scheduled sequences, K of which sample a token from the logits of their last scheduled token.

    `rows`, `starts`, `counts` [S]: sequence i computes tokens `starts[i] .. starts[i] + counts[i] - 1` of its row.
    The first `num_decodes` sequences compute one token each; the others are prefill chunks. `sampled` [K] holds
    indices into the S sequences, ascending; the token drawn for sequence i is written to the token pool at
    `[rows[i], starts[i] + counts[i]]`. `block_updates` [U, 3] are (row, index in the row's block table, block id),
    applied before the step, after the admissions. `repeats`: the step before was of the same decodes and nothing else,
    so that `rows`, `counts` and `sampled` are its own and `starts` are one larger. `is_recorded`: every rank shall tell
    what ran when (`engine.recorded_step`).
    """

    step: int
    admissions: tuple[Admission, ...]
    block_updates: IntArray
    rows: IntArray
    starts: IntArray
    counts: IntArray
    num_decodes: int
    sampled: IntArray
    repeats: bool = False
    is_recorded: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step: the size of the dense batch."""
        return self.num_decodes if len(self.counts) == self.num_decodes else int(self.counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Where the device time of one step went, on one rank, in seconds; what is not named here is memory-bound rest.

    Measured on a CPU, shared out of what was measured on a GPU (`engine.device_times`).

    `gemm_seconds` are matrix products: projections, experts, the output head. `attention_seconds` is attention on the
    compute path, of decodes and of prefills. `exposed_network_seconds` is the time computation waited for collectives,
    or was interrupted by them; `network_seconds` the time at least one collective was in flight, hidden or not.
    """

    gemm_seconds: float = 0.0
    attention_seconds: float = 0.0
    exposed_network_seconds: float = 0.0
    network_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What rank 0 returns: the drawn tokens [K], in the order of `Batch.sampled`.

    `logprobs` is None when no sequence of the batch asked for any; else one entry per drawn token, None for those
    that did not ask. `device_seconds` is the time the ranks spent computing the step, `times` its parts where they
    were measured. `plan` names the schedule that ran; `num_padding_tokens` rows were computed for nothing, to fill it.
    `skips_tail`: behind the last attention only the rows of the drawn tokens were computed.
    """

    step: int
    token_ids: IntArray
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    device_seconds: float = 0.0
    times: StepTimes | None = None
    plan: str = "sequential"
    num_padding_tokens: int = 0
    skips_tail: bool = False

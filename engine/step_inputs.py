"""`StepInputs`: the device tensors of one step that layers read; made by the `ModelRunner`, cut by nano-batching.

Legend: T tokens of the step, decode tokens first; D decode sequences (one token each, so also D tokens);
P prefill sequences with Q = T - D tokens together; B width of a block table. All integer tensors are int64 unless
said otherwise (CPU indexing wants int64; kernels convert).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from engine.kernels.prefill import PrefillPlan
from engine.kv_cache import KVCache

if TYPE_CHECKING:  # Triton is not everywhere
    from engine.kernels.gpu.decode_plan import DecodeScratch


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePart:
    """The decodes `start` to `stop`, to be attended by themselves: tables [n, B] as wide as the longest needs."""

    start: int
    stop: int
    block_tables: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What every layer of one forward pass shares.

    `tokens`, `positions` [T]; `slots` [T]: where each token's key and value go, block id * block size + offset.
    `decode_block_tables` [D, B] and `decode_lengths` [D]: blocks and context length (the new token included) of
    each decode. `prefill_block_tables` [P, B]. The chunks follow the decodes in order, `prefill_chunk_sizes` tokens
    each; `prefill_context_lengths` count each sequence's tokens up to and including its chunk. Host-side integers are
    known without a device synchronisation. `decode_parts` together are all decodes, if there are any: who can attend
    them at less cost than all at once does. `prefill_plans`, by sliding window: the first layer to need one makes it.

    For kernels that read lengths on the device: `prefill_starts` [P + 1], the chunks' first places among the Q tokens
    and the end of the last, and `prefill_lengths` [P], the context lengths; `decode_plans` as `prefill_plans`, by
    window and tile.

    In a padded step, whose shapes are larger than its batch (see `engine.pipeline.padded_inputs`), `num_decodes` counts
    lanes. Rows without a token have the position and the slot -1. Any row that is not a decode's may be a chunk's, so
    `prefill_starts` count all rows, and both kinds of attention write to one place, each to its own rows: prefill
    attention those of the chunks, and zeros behind them; decode attention those of the lanes that have a decode. Others
    have the length -1, or 0 and get zeros where no chunk can be. That place is `attention` [T, A] if it is given.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    decode_block_tables: Tensor
    decode_lengths: Tensor
    prefill_block_tables: Tensor
    num_decodes: int
    max_decode_length: int
    prefill_chunk_sizes: tuple[int, ...]
    prefill_context_lengths: tuple[int, ...]
    kv_cache: KVCache
    decode_parts: tuple[DecodePart, ...] = ()
    prefill_plans: dict[int | None, PrefillPlan] = field(default_factory=dict, compare=False, repr=False)
    prefill_starts: Tensor | None = None
    prefill_lengths: Tensor | None = None
    decode_plans: "dict[tuple[int | None, int], DecodeScratch]" = field(default_factory=dict, compare=False, repr=False)
    attention: Tensor | None = None

"""`StepWork`: how much of what a step computes, as far as its time depends on it. Pure: no tensors, no time.

Attention is counted by the tokens that it sees: of a sliding window no more than fit, on average over the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.batch import Batch, IntArray
from engine.batch_shape import BatchShape
from engine.pipeline.nano_batch import Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """`num_rows` of each nano-batch, padding included. The contexts of `shape` are tokens seen by one of its kind.

    `num_drawn` of the rows met the output head.
    """

    num_rows: tuple[int, ...]
    shape: BatchShape
    num_drawn: int

    @classmethod
    def of(cls, batch: Batch, cut: Cut, windows: Sequence[int | None], num_padding_tokens: int = 0) -> "StepWork":
        """A batch that is run by a schedule of this cut, with the windows of its layers' attention."""
        num_decodes, num_prefills = batch.num_decodes, batch.num_tokens - batch.num_decodes
        pieces = [each.num_tokens for each in cut.scaled(num_decodes, num_prefills).nano_batches]
        pieces[-1] += num_padding_tokens
        decodes, chunks = slice(None, num_decodes), slice(num_decodes, None)
        return cls(
            num_rows=tuple(piece for piece in pieces if piece),
            shape=BatchShape(
                num_decodes=num_decodes,
                num_prefills=num_prefills,
                decode_context=mean_seen(batch.starts[decodes], batch.counts[decodes], windows),
                prefill_context=mean_seen(batch.starts[chunks], batch.counts[chunks], windows),
            ),
            num_drawn=len(batch.sampled),
        )


def mean_seen(starts: IntArray, counts: IntArray, windows: Sequence[int | None]) -> float:
    """How many tokens a token sees, itself included, on average over all layers and over the tokens `starts[i]` up to
    `starts[i] + counts[i]` of their sequences; 0 without tokens.
    """
    num_tokens = int(counts.sum())
    if num_tokens == 0:
        return 0.0
    first, num = starts.astype(np.float64), counts.astype(np.float64)
    total = 0.0
    for window in set(windows):
        # The first of the tokens see all that is before them, and the others a full window.
        num_short = num if window is None else (window - first).clip(0, num)
        seen = num_short * first + num_short * (num_short + 1) / 2
        if window is not None:
            seen = seen + (num - num_short) * window
        total += windows.count(window) / len(windows) * float(seen.sum())
    return total / num_tokens

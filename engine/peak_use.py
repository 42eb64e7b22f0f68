"""`PeakUse`: the most KV blocks that a set of sequences will hold at once, as predicted now.

Sequences end at different times, so the peak is less than the sum of their final sizes. With the sequences sorted by
the tokens r_i they still have to come, those that live at time r_i hold sum(held) + count * r_i / block_size blocks;
the peak is the largest of these sums (NanoFlow, section 4.2.1: estimated peak memory use decides admission). Two
standard deviations of the summed growth are added, so that a peak above the prediction is an exception.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.batch import IntArray
from engine.length_predictor import FloatArray


@dataclass(frozen=True, kw_only=True)
class PeakUse:
    """`held` blocks [R] now and `remaining` tokens [R] (mean, with `variance`) of every sequence.

    `num_shared` is how often `held` counts a block more than once, because sequences share prefixes.
    """

    block_size: int
    held: IntArray
    remaining: FloatArray
    variance: FloatArray
    num_shared: int

    @cached_property
    def num_blocks(self) -> float:
        """The predicted peak, in blocks."""
        if not len(self.held):
            return 0.0
        order = np.argsort(-self.remaining, kind="stable")
        remaining = self.remaining[order]
        alive = np.arange(1, len(order) + 1)
        # A growing sequence's last block is half full on average.
        growth = alive * (remaining / self.block_size + 0.5 * (remaining > 0))
        margin = 2.0 * np.sqrt(np.cumsum(self.variance[order])) / self.block_size
        return float(np.max(np.cumsum(self.held[order]) + growth + margin)) - self.num_shared

    def with_sequence(self, held: int, remaining: FloatArray, variance: FloatArray) -> "PeakUse":
        """The same with one more sequence; `remaining` and `variance` have one element."""
        return PeakUse(
            block_size=self.block_size,
            held=np.append(self.held, np.int32(held)),
            remaining=np.append(self.remaining, remaining),
            variance=np.append(self.variance, variance),
            num_shared=self.num_shared,
        )

"""`PeakUse`: the most KV blocks that a set of sequences will hold at once, as predicted now.

Sequences end at different times, so the peak is less than the sum of their final sizes. With the sequences sorted by
the tokens r_i they still have to come, those that live at time r_i hold sum(held) + count * r_i / block_size blocks;
the peak is the largest of these sums (NanoFlow, section 4.2.1: estimated peak memory use decides admission). Two
standard deviations of the summed growth are added, so that a peak above the prediction is an exception.

At no time does another sequence add more than it will hold in the end, with a margin of its own. So after one exact
answer a sum tells that the next few fit, and the peak itself is computed again only near the limit.
"""

import numpy as np

from engine.batch import IntArray
from engine.length_predictor import FloatArray


class PeakUse:
    """`held` blocks [R] now and `remaining` tokens [R] (mean, with `variance`) of every sequence; more may be added.

    `num_shared` is how often `held` counts a block more than once, because sequences share prefixes.
    """

    def __init__(
        self, *, block_size: int, held: IntArray, remaining: FloatArray, variance: FloatArray, num_shared: int
    ) -> None:
        self._block_size = block_size
        self._sequences = np.stack([held, remaining, variance])
        self._num_shared = num_shared
        self._added: list[tuple[float, float, float]] = []
        self._at_most = np.inf

    def add(self, held: int, remaining: float, variance: float) -> None:
        """One more sequence."""
        self._added.append((held, remaining, variance))
        self._at_most += held + remaining / self._block_size + 0.5 + 2.0 * variance**0.5 / self._block_size

    def fits(self, num_blocks: int) -> bool:
        """Whether the peak is at most `num_blocks`."""
        if self._at_most > num_blocks:
            self._at_most = self.num_blocks()
        return self._at_most <= num_blocks

    def num_blocks(self) -> float:
        """The predicted peak, in blocks."""
        sequences = np.hstack([self._sequences, np.array(self._added).reshape(-1, 3).T])
        if not sequences.size:
            return 0.0
        held, remaining, variance = sequences[:, np.argsort(-sequences[1], kind="stable")]
        alive = np.arange(1, len(held) + 1)
        # A growing sequence's last block is half full on average.
        growth = alive * (remaining / self._block_size + 0.5 * (remaining > 0))
        margin = 2.0 * np.sqrt(np.cumsum(variance)) / self._block_size
        return float(np.max(np.cumsum(held) + growth + margin)) - self._num_shared

"""`Contest`: what came of running the best candidates for a batch against the sequential schedule."""

import statistics
from dataclasses import dataclass

from engine.pipeline.schedule import Schedule
from engine.pipeline.trial import Timing

# A plan must be measured to save this part of a step to be kept.
LEAST_MEASURED_GAIN = 0.03


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate, how long a step's layers were predicted to take with it, and how long they took."""

    schedule: Schedule
    predicted_seconds: float
    timing: Timing


@dataclass(frozen=True, slots=True)
class Contest:
    """The sequential schedule against the best candidates, measured turn by turn."""

    predicted_sequential: float
    sequential: Timing
    tried: tuple[Tried, ...]

    @property
    def winner(self) -> Tried | None:
        """The fastest candidate, if it beats the sequential schedule by enough, as a rule and in nearly every round."""
        best = self._fastest
        if best is None:
            return None
        ratios = [
            ours / theirs for ours, theirs in zip(best.timing.rounds, self.sequential.rounds, strict=True)
        ]  # of turns that followed each other, so that a slow spell of the machine hits both
        num_slower = sum(ratio > 1 for ratio in ratios)
        return best if statistics.median(ratios) <= 1 - LEAST_MEASURED_GAIN and 4 * num_slower <= len(ratios) else None

    @property
    def _fastest(self) -> Tried | None:
        return min(self.tried, key=lambda tried: tried.timing.seconds, default=None)

    def __str__(self) -> str:
        times = f"sequential {1e3 * self.sequential.seconds:.1f} ms (predicted {1e3 * self.predicted_sequential:.1f})"
        best = self._fastest
        if best is None:
            return f"{times}, and no plan promises to be faster"
        return (
            f"{times}, the best plan {1e3 * best.timing.seconds:.1f} ms (predicted {1e3 * best.predicted_seconds:.1f})"
            + ("" if self.winner else ", which is not enough to be used")
        )

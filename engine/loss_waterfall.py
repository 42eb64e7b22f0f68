"""`LossWaterfall`: how far a stretch of time was from the optimum, and why: seconds of each `Loss` that add up.

Seconds of the window = ideal - skipped output head + all losses + unexplained. In tokens per second: the achieved rate
plus what each loss took is the optimum, measured GEMM peak / (2 * active parameters) (NanoFlow, equation 5). Losses
are booked from their own measurements by the engine's `LossLedger`; what contradicts itself stays in `unexplained`:
positive where a step's parts were not measured, negative where a part was counted twice or the peak is too low.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.loss import Loss
from engine.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWaterfall:
    """One window of `wall_seconds`. `ideal_seconds` are what its useful tokens would take at the optimum.

    `skipped_head_seconds` are a part of the ideal that nobody had to compute: prompt tokens skip the output head, and
    in some steps what lies between the last attention and that.
    `seconds` has an entry for every loss.
    """

    wall_seconds: float
    ideal_seconds: float
    skipped_head_seconds: float
    seconds: dict[Loss, float]
    optimal_tokens_per_second: float

    @classmethod
    def between(cls, earlier: EngineStats, later: EngineStats) -> "LossWaterfall | None":
        """Of the time between two snapshots of one engine.

        None where the optimum is unknown, and where nothing was booked in between, as while one long step runs.
        """
        wall = later.accounted_seconds - earlier.accounted_seconds
        if later.optimal_tokens_per_second is None or wall <= 0:
            return None
        return cls(
            wall_seconds=wall,
            ideal_seconds=later.ideal_seconds - earlier.ideal_seconds,
            skipped_head_seconds=later.skipped_head_seconds - earlier.skipped_head_seconds,
            seconds={loss: later.loss_seconds.get(loss, 0.0) - earlier.loss_seconds.get(loss, 0.0) for loss in Loss},
            optimal_tokens_per_second=later.optimal_tokens_per_second,
        )

    @classmethod
    def combined(cls, waterfalls: Sequence["LossWaterfall"]) -> "LossWaterfall":
        """Of several engines over the same time: the optimum is theirs together, seconds add up.

        A second of an engine weighs as much as its optimum, so that shares of seconds are shares of tokens.
        """
        optimum = sum(one.optimal_tokens_per_second for one in waterfalls)
        weights = [one.optimal_tokens_per_second * len(waterfalls) / optimum for one in waterfalls]

        def total(read: Callable[[LossWaterfall], float]) -> float:
            return sum(weight * read(one) for weight, one in zip(weights, waterfalls, strict=True))

        return cls(
            wall_seconds=total(lambda one: one.wall_seconds),
            ideal_seconds=total(lambda one: one.ideal_seconds),
            skipped_head_seconds=total(lambda one: one.skipped_head_seconds),
            seconds={loss: total(lambda one, loss=loss: one.seconds[loss]) for loss in Loss},  # type: ignore[misc]
            optimal_tokens_per_second=optimum,
        )

    @property
    def percent_of_optimal(self) -> float:
        """Useful tokens per second as a percentage of the optimum."""
        return 100 * self.ideal_seconds / self.wall_seconds

    @property
    def unexplained_seconds(self) -> float:
        """What the named parts lack (or, negative, exceed the window by)."""
        return self.wall_seconds - self.ideal_seconds + self.skipped_head_seconds - sum(self.seconds.values())

    @property
    def achieved_tokens_per_second(self) -> float:
        """Useful tokens: those computed, without the discarded ones."""
        return self.tokens_per_second(self.ideal_seconds)

    def tokens_per_second(self, seconds: float) -> float:
        """The rate that a part of the window stands for: its share of the optimum."""
        return self.optimal_tokens_per_second * seconds / self.wall_seconds

    def percent(self, seconds: float) -> float:
        """A part of the window as a percentage of the whole."""
        return 100 * seconds / self.wall_seconds

    def with_optimum(self, optimal_tokens_per_second: float) -> "LossWaterfall":
        """The same window against an optimum measured otherwise: what it changes is GEMM below the peak.

        Products that turn out to be faster than a lower peak leave a negative unexplained part, as always.
        """
        kept = self.optimal_tokens_per_second / optimal_tokens_per_second
        freed = (1 - kept) * (self.ideal_seconds - self.skipped_head_seconds)
        if freed > 0:  # first of all, products that seemed faster than the old peak no longer do
            freed -= min(freed, max(0.0, -self.unexplained_seconds))
        below = max(0.0, self.seconds[Loss.GEMM_BELOW_PEAK] + freed)
        return LossWaterfall(
            wall_seconds=self.wall_seconds,
            ideal_seconds=kept * self.ideal_seconds,
            skipped_head_seconds=kept * self.skipped_head_seconds,
            seconds=self.seconds | {Loss.GEMM_BELOW_PEAK: below},
            optimal_tokens_per_second=optimal_tokens_per_second,
        )

    def parts(self) -> Iterator[tuple[str, float]]:
        """Title and seconds of every part, in the order of a drawing; they add up to the window."""
        yield "optimum for these tokens", self.ideal_seconds
        yield "output head skipped", -self.skipped_head_seconds
        for loss in Loss:
            yield loss.description, self.seconds[loss]
        yield "unexplained", self.unexplained_seconds

    def table(self) -> str:
        """For people; parts that took no time are left out."""
        rows = [(title, seconds) for title, seconds in self.parts() if abs(self.percent(seconds)) >= 0.005]
        rows.append(("all", self.wall_seconds))
        lines = [f"{'where the time went':<26} {'seconds':>10} {'percent':>8} {'tokens/s':>12}"]
        lines += [
            f"{title:<26} {seconds:>10.3f} {self.percent(seconds):>8.2f} {self.tokens_per_second(seconds):>12,.1f}"
            for title, seconds in rows
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As plain values; seconds and, of the parts, percentages of the window."""
        return {
            "wall_seconds": self.wall_seconds,
            "ideal_seconds": self.ideal_seconds,
            "skipped_head_seconds": self.skipped_head_seconds,
            "loss_seconds": {loss.value: seconds for loss, seconds in self.seconds.items()},
            "loss_percent": {loss.value: self.percent(seconds) for loss, seconds in self.seconds.items()},
            "unexplained_seconds": self.unexplained_seconds,
            "percent_of_optimal": self.percent_of_optimal,
            "optimal_tokens_per_second": self.optimal_tokens_per_second,
            "achieved_tokens_per_second": self.achieved_tokens_per_second,
        }

"""`PeerResult`: what one engine did in the rounds, and how that compares with the engine of this project."""

import statistics
from dataclasses import dataclass, field
from typing import Any

Tokens = list[list[int]]


@dataclass(slots=True, kw_only=True)
class PeerResult:
    """Of `engine`: seconds and tokens of each round, or in `problem` why there are none.

    `foreign_cores` are those that other programs kept busy meanwhile, on average over the round.
    """

    engine: str
    version: str | None = None
    problem: str | None = None
    is_installed: bool = True
    seconds: list[float] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)

    def row(
        self, reference: "PeerResult", *, num_prompt_tokens: int, num_output_tokens: int, optimum: float
    ) -> dict[str, Any]:
        """The engine's line of the table; rates are per second, of the median round.

        `ratio` is the median over the rounds of the engine's rate divided by the reference's in the same round.
        `optimum` is in tokens per second, in and out. `agreement` is None without tokens to compare with.
        `foreign_cores` are those of the most disturbed round, None where that cannot be known.
        """
        status = "ok" if self.problem is None else "failed" if self.is_installed else "not installed"
        row: dict[str, Any] = {"engine": self.engine, "version": self.version, "status": status, "error": self.problem}
        if self.problem is not None:
            return row
        seconds = statistics.median(self.seconds)
        is_comparable = reference.problem is None
        pairs = list(zip(self.seconds, reference.seconds, strict=True)) if is_comparable else []
        return row | {
            "output_tokens_per_second": num_output_tokens / seconds,
            "ratio": statistics.median(other / own for own, other in pairs) if pairs else None,
            "percent_of_optimum": 100 * (num_prompt_tokens + num_output_tokens) / seconds / optimum,
            "median_seconds": seconds,
            "seconds": self.seconds,
            "foreign_cores": max(self.foreign_cores, default=None),
            "agreement": self._agreement(reference) if is_comparable else None,
        }

    def _agreement(self, reference: "PeerResult") -> dict[str, float]:
        """The share of requests with the same tokens, and tokens before the first difference, on average over requests.

        Greedy tokens of a random model differ after any two logits that rounding brings into another order.
        """
        pairs = [
            pair
            for own, other in zip(self.tokens, reference.tokens, strict=True)
            for pair in zip(own, other, strict=True)
        ]
        return {
            "requests": sum(own == other for own, other in pairs) / len(pairs),
            "mean_common_prefix": statistics.mean(_common_prefix(own, other) for own, other in pairs),
            "mean_length": statistics.mean(len(own) for own, _ in pairs),
        }


def _common_prefix(first: list[int], second: list[int]) -> int:
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))

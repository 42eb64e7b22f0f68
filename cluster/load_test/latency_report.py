"""`LatencyReport`: the statistics of a load test, computed from its outcomes, as a table and as JSON.

Latencies are of requests that were answered in full; failures are counted by kind and never averaged in. TTFT is the
time to the first output, TPOT a request's mean time per output token after the first, ITL the gaps between arrivals
of output over all requests, E2E the time to the end. All but TPOT and ITL count from the scheduled time of a request.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cluster.load_test.request_outcome import RequestOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of durations in seconds; all 0 for an empty sample."""

    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float
    count: int

    @classmethod
    def of(cls, sample: ArrayLike) -> "Distribution":
        """Percentiles by linear interpolation."""
        values = np.asarray(sample, dtype=np.float64)
        if values.size == 0:
            return cls(mean=0.0, p50=0.0, p90=0.0, p99=0.0, maximum=0.0, count=0)
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(
            mean=float(values.mean()), p50=p50, p90=p90, p99=p99, maximum=float(values.max()), count=int(values.size)
        )

    def milliseconds(self) -> dict[str, float]:
        """Rounded to microseconds."""
        names = ("mean", "p50", "p90", "p99", "maximum")
        return {name: round(1000 * getattr(self, name), 3) for name in names} | {"count": self.count}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """What a user calls good, in milliseconds; None where anything goes."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything is asked for."""
        return (self.ttft_ms, self.tpot_ms, self.e2e_ms) != (None, None, None)

    def is_met_by(self, outcome: RequestOutcome) -> bool:
        """A request that failed never meets it; one of a single token has no TPOT to miss."""
        measured = (outcome.time_to_first_token, outcome.time_per_output_token, outcome.end_to_end)
        limits = (self.ttft_ms, self.tpot_ms, self.e2e_ms)
        return outcome.is_ok and all(
            limit is None or value is None or 1000 * value <= limit
            for value, limit in zip(measured, limits, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyReport:
    """Rates are over `seconds`: from the first scheduled request to the end of the last answer."""

    seconds: float
    num_planned: int
    num_ok: int
    errors: dict[str, int]
    error_details: dict[str, str]
    offered_rate: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_without_usage: int
    num_wrong_length: int
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2e: Distribution
    lag: Distribution
    client_busy: float
    service_level: ServiceLevel
    num_good: int

    @classmethod
    def of(
        cls,
        outcomes: list[RequestOutcome],
        *,
        num_planned: int,
        offered_rate: float | None = None,
        client_busy: float = 0.0,
        service_level: ServiceLevel | None = None,
    ) -> "LatencyReport":
        """`client_busy` is the share of one core that the client itself used."""
        level = service_level or ServiceLevel()
        answered = [outcome for outcome in outcomes if outcome.is_ok]
        failed = [outcome for outcome in outcomes if not outcome.is_ok]
        errors = Counter(outcome.error or "" for outcome in failed)
        if num_planned > len(outcomes):
            errors["not sent"] = num_planned - len(outcomes)
        gaps = [outcome.gaps for outcome in answered]
        return cls(
            seconds=max((outcome.ended_at for outcome in outcomes), default=0.0),
            num_planned=num_planned,
            num_ok=len(answered),
            errors=dict(errors.most_common()),
            error_details={outcome.error or "": outcome.detail for outcome in reversed(failed)},
            offered_rate=offered_rate,
            num_prompt_tokens=sum(outcome.num_prompt_tokens for outcome in answered),
            num_cached_tokens=sum(outcome.num_cached_tokens for outcome in answered),
            num_output_tokens=sum(outcome.num_output_tokens for outcome in answered),
            num_without_usage=sum(not outcome.has_usage for outcome in answered),
            num_wrong_length=sum(outcome.num_output_tokens != outcome.num_planned_tokens for outcome in answered),
            ttft=Distribution.of([value for item in answered if (value := item.time_to_first_token) is not None]),
            tpot=Distribution.of([value for item in answered if (value := item.time_per_output_token) is not None]),
            itl=Distribution.of(np.concatenate(gaps) if gaps else []),
            e2e=Distribution.of([outcome.end_to_end for outcome in answered]),
            lag=Distribution.of([outcome.lag for outcome in outcomes]),
            client_busy=client_busy,
            service_level=level,
            num_good=sum(level.is_met_by(outcome) for outcome in outcomes),
        )

    @property
    def num_failed(self) -> int:
        """Requests that were not answered in full, for whatever reason."""
        return self.num_planned - self.num_ok

    def per_second(self, count: float) -> float:
        """`count` over the length of the test."""
        return count / self.seconds if self.seconds else 0.0

    def warnings(self) -> list[str]:
        """What makes the figures doubtful, in words."""
        found = []
        if self.lag.p99 > 0.010:
            found.append(
                f"The client could not keep the schedule: 1 % of the requests were sent {1000 * self.lag.p99:.0f} ms "
                "or more after they were due (latencies include this). Use a faster or less busy machine."
            )
        if self.client_busy > 0.8:
            found.append(f"The client used {100 * self.client_busy:.0f} % of a core: it may be what limits the result.")
        if self.num_without_usage:
            found.append(
                f"{self.num_without_usage} answers told no usage: their prompt tokens are missing and their output "
                "tokens are counted as chunks."
            )
        if self.num_wrong_length:
            found.append(f"{self.num_wrong_length} answers had another number of tokens than was asked for.")
        return found

    def to_json(self) -> dict[str, Any]:
        """Durations in milliseconds where the name says so, else in seconds."""
        level = self.service_level
        good = {
            "ttft_ms": level.ttft_ms,
            "tpot_ms": level.tpot_ms,
            "e2e_ms": level.e2e_ms,
            "num_requests": self.num_good,
            "requests_per_second": self.per_second(self.num_good),
            "fraction": self.num_good / self.num_planned if self.num_planned else 0.0,
        }
        return {
            "seconds": self.seconds,
            "num_requests": self.num_planned,
            "num_ok": self.num_ok,
            "num_failed": self.num_failed,
            "errors": self.errors,
            "error_details": self.error_details,
            "offered_requests_per_second": self.offered_rate,
            "achieved_requests_per_second": self.per_second(self.num_ok),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_prompt_tokens": self.num_cached_tokens,
            "num_output_tokens": self.num_output_tokens,
            "prompt_tokens_per_second": self.per_second(self.num_prompt_tokens),
            "output_tokens_per_second": self.per_second(self.num_output_tokens),
            "ttft_ms": self.ttft.milliseconds(),
            "tpot_ms": self.tpot.milliseconds(),
            "itl_ms": self.itl.milliseconds(),
            "e2e_ms": self.e2e.milliseconds(),
            "schedule_lag_ms": self.lag.milliseconds(),
            "client_busy_fraction": self.client_busy,
            "num_without_usage": self.num_without_usage,
            "num_wrong_length": self.num_wrong_length,
            "goodput": good if level.is_set else None,
            "warnings": self.warnings(),
        }

    def table(self) -> str:
        """For people."""
        offered = "" if self.offered_rate is None else f" (offered {self.offered_rate:.2f})"
        rows = [
            ("requests", f"{self.num_ok:,} answered, {self.num_failed:,} failed, in {self.seconds:.2f} s"),
            ("requests per second", f"{self.per_second(self.num_ok):.2f}{offered}"),
            ("tokens in", f"{self.num_prompt_tokens:,} ({self.num_cached_tokens:,} from the prefix cache)"),
            ("tokens out", f"{self.num_output_tokens:,}"),
            ("tokens in per second", f"{self.per_second(self.num_prompt_tokens):,.1f}"),
            ("tokens out per second", f"{self.per_second(self.num_output_tokens):,.1f}"),
        ]
        rows += [
            (f"failed: {kind}", f"{count:,}  {self.error_details.get(kind, '')}") for kind, count in self.errors.items()
        ]
        if self.service_level.is_set:
            share = 100 * self.num_good / self.num_planned if self.num_planned else 0.0
            rows.append(("goodput", f"{self.per_second(self.num_good):.2f} requests per second ({share:.1f} % of all)"))
        lines = [f"{name:<22} {value}" for name, value in rows]
        lines += ["", f"{'milliseconds':<22} {'mean':>10} {'p50':>10} {'p90':>10} {'p99':>10} {'max':>10}"]
        for name, distribution in (
            ("TTFT", self.ttft),
            ("TPOT", self.tpot),
            ("ITL", self.itl),
            ("E2E", self.e2e),
            ("client's lag", self.lag),
        ):
            values = list(distribution.milliseconds().values())[:5]
            lines.append(f"{name:<22} " + " ".join(f"{value:>10.2f}" for value in values))
        lines += [f"warning: {warning}" for warning in self.warnings()]
        return "\n".join(lines)

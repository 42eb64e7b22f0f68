"""The statistics of a load test, on outcomes whose figures can be computed by hand."""

from typing import Any

import numpy as np
import pytest

from cluster.load_test.latency_report import Distribution, LatencyReport, ServiceLevel
from cluster.load_test.request_outcome import RequestOutcome


def outcome(index: int, **changes: Any) -> RequestOutcome:
    """Due at `index` s, first of 11 tokens 0.1 s later, one each 10 ms, the end 0.3 s after being due."""
    fields: dict[str, Any] = {
        "index": index,
        "scheduled_at": float(index),
        "sent_at": float(index),
        "first_output_at": index + 0.1,
        "last_output_at": index + 0.2,
        "ended_at": index + 0.3,
        "num_planned_tokens": 11,
        "num_prompt_tokens": 5,
        "num_output_tokens": 11,
        "gaps": np.full(10, 0.01),
    }
    return RequestOutcome(**(fields | changes))


def failed(index: int, error: str) -> RequestOutcome:
    return RequestOutcome(
        index=index, scheduled_at=index, sent_at=index, ended_at=index + 9.0, error=error, detail=f"why {index}"
    )


def test_distribution_of_a_known_sample() -> None:
    values = Distribution.of(np.arange(101) / 1000).milliseconds()
    assert values == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "maximum": 100.0, "count": 101}
    assert Distribution.of([]).count == 0


def test_latencies_and_rates() -> None:
    report = LatencyReport.of([outcome(0), outcome(1), outcome(9, ended_at=10.0)], num_planned=3, offered_rate=0.5)
    assert report.seconds == 10.0
    assert report.ttft.p50 == pytest.approx(0.1)
    assert report.tpot.mean == pytest.approx(0.01)
    assert (report.itl.count, report.itl.maximum) == (30, 0.01)
    assert report.e2e.p50 == pytest.approx(0.3)
    assert report.e2e.maximum == pytest.approx(1.0)
    result = report.to_json()
    assert result["achieved_requests_per_second"] == pytest.approx(0.3)
    assert result["offered_requests_per_second"] == 0.5
    assert result["prompt_tokens_per_second"] == pytest.approx(1.5)
    assert result["output_tokens_per_second"] == pytest.approx(3.3)
    assert result["warnings"] == []


def test_a_late_client_cannot_hide_waiting_and_is_warned_about() -> None:
    late = outcome(1, sent_at=3.0, first_output_at=3.1, last_output_at=3.2, ended_at=3.3)
    report = LatencyReport.of([late], num_planned=1)
    assert report.ttft.mean == pytest.approx(2.1)
    assert report.e2e.mean == pytest.approx(2.3)
    assert report.lag.maximum == pytest.approx(2.0)
    assert "could not keep the schedule" in report.warnings()[0]


def test_failures_are_counted_by_kind_and_not_averaged_in() -> None:
    outcomes = [outcome(0), failed(1, "timeout"), failed(2, "HTTP 429"), failed(3, "timeout")]
    report = LatencyReport.of(outcomes, num_planned=6)
    assert report.errors == {"timeout": 2, "HTTP 429": 1, "not sent": 2}
    assert (report.num_ok, report.num_failed) == (1, 5)
    assert sum(report.errors.values()) == report.num_failed
    assert report.error_details["timeout"] == "why 1"
    assert report.e2e.count == report.ttft.count == 1
    assert "why 2" in report.table()


@pytest.mark.parametrize(
    ("level", "num_good"),
    [
        (ServiceLevel(), 3),
        (ServiceLevel(ttft_ms=150), 2),
        (ServiceLevel(tpot_ms=15), 3),
        (ServiceLevel(tpot_ms=9), 1),  # the one of a single token has no TPOT to miss
        (ServiceLevel(e2e_ms=350), 2),
        (ServiceLevel(ttft_ms=150, e2e_ms=250), 1),
    ],
)
def test_goodput_counts_answers_within_every_limit(level: ServiceLevel, num_good: int) -> None:
    slow = outcome(1, first_output_at=1.2, last_output_at=1.3, ended_at=1.4)
    short = outcome(2, num_output_tokens=1, num_planned_tokens=1, last_output_at=2.1, ended_at=2.15, gaps=np.empty(0))
    report = LatencyReport.of([outcome(0), slow, short, failed(3, "timeout")], num_planned=4, service_level=level)
    assert report.num_good == num_good
    goodput = report.to_json()["goodput"]
    if level.is_set:
        assert goodput["requests_per_second"] == pytest.approx(num_good / 12.0)
        assert goodput["fraction"] == num_good / 4
    else:
        assert goodput is None


def test_doubtful_figures_are_said_to_be() -> None:
    outcomes = [outcome(0, has_usage=False), outcome(1, num_output_tokens=10)]
    warnings = LatencyReport.of(outcomes, num_planned=2, client_busy=0.95).warnings()
    assert len(warnings) == 3
    assert "95 % of a core" in warnings[0]


def test_a_test_without_any_answer_still_reports() -> None:
    report = LatencyReport.of([failed(0, "connection")], num_planned=1)
    assert report.to_json()["ttft_ms"]["count"] == 0
    assert "connection" in report.table()

"""Goodput: calls judged by the recipe's objectives, each once, failed ones included."""

from prometheus_client import CollectorRegistry

from cluster.config import ObjectivesConfig
from cluster.metrics import IngressMetrics

OBJECTIVES = ObjectivesConfig(time_to_first_token=1.0, time_per_output_token=0.1)


class Judged:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = IngressMetrics(self.registry, "m", OBJECTIVES)

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        """(met, missed) by objective."""
        return {
            objective: (self._count(objective, "met"), self._count(objective, "missed"))
            for objective in ("time_to_first_token", "time_per_output_token", "all")
        }

    def _count(self, objective: str, outcome: str) -> float | None:
        labels = {"model": "m", "objective": objective, "outcome": outcome}
        return self.registry.get_sample_value("nanoserve_objective_requests_total", labels)

    def call(self, first: float, each: float) -> None:
        self.metrics.first_token_came(first)
        self.metrics.judged(first, each)


def test_counts_begin_at_zero_so_that_the_first_call_is_seen_by_a_rate() -> None:
    judged = Judged()
    assert set(judged.counts().values()) == {(0, 0)}
    for objective, seconds in (("time_to_first_token", 1.0), ("time_per_output_token", 0.1)):
        labels = {"model": "m", "objective": objective}
        assert judged.registry.get_sample_value("nanoserve_objective_seconds", labels) == seconds


def test_an_answer_is_good_if_it_met_every_objective() -> None:
    judged = Judged()
    judged.call(1.0, 0.1)
    judged.call(1.5, 0.05)
    judged.call(0.2, 0.2)
    assert judged.counts() == {"time_to_first_token": (2, 1), "time_per_output_token": (2, 1), "all": (1, 2)}


def test_a_call_that_the_server_failed_is_not_good() -> None:
    judged = Judged()
    judged.metrics.failed(has_begun=False)
    judged.metrics.first_token_came(0.1)
    judged.metrics.failed(has_begun=True)
    assert judged.counts() == {"time_to_first_token": (1, 1), "time_per_output_token": (0, 0), "all": (0, 2)}

"""Metrics: every name once, well-formed, and read from the engine at scrape time."""

import re
from dataclasses import MISSING, fields
from urllib.request import urlopen

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import (
    ENGINE_METRICS,
    OPTIMUM_METRICS,
    PREFIX,
    TIMES_METRICS,
    EngineCollector,
    IngressMetrics,
    MetricsEndpoint,
    RouterCollector,
)
from engine import EngineStats, Loss, LossWaterfall


def test_names_follow_the_conventions() -> None:
    metrics = (*ENGINE_METRICS, *TIMES_METRICS, *OPTIMUM_METRICS)
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", metric.name)
        assert metric.name.endswith("_total") == metric.is_counter
        assert metric.help.endswith(".")


def test_every_field_of_the_stats_is_exported() -> None:
    """A distinct value per field must be seen again: nothing is forgotten, nothing is read from the wrong field."""
    numbers = {
        field.name: 1000.0 + index
        for index, field in enumerate(fields(EngineStats))
        if field.default_factory is MISSING
    }
    stats = EngineStats(**numbers)  # type: ignore[arg-type]
    exported = {metric.read(stats) for metric in (*ENGINE_METRICS, *TIMES_METRICS, *OPTIMUM_METRICS)}
    assert [name for name, value in numbers.items() if value not in exported] == []


def collected(stats: EngineStats, recent: LossWaterfall | None = None) -> dict[str, dict[str, float]]:
    """By name and the sample's own label; "" where it has none."""
    collector = EngineCollector(lambda: (stats, 1.0), model="m", replica="r1", recent=lambda: recent)
    found: dict[str, dict[str, float]] = {}
    for family in collector.collect():
        for sample in family.samples:
            own = [value for name, value in sample.labels.items() if name not in ("model", "replica")]
            found.setdefault(sample.name.removeprefix(PREFIX), {})["".join(own)] = sample.value
    return found


def test_losses_plans_and_the_percent_of_the_optimum_are_exported() -> None:
    stats = EngineStats(
        num_timed_steps=8,
        num_steps_by_plan={"sequential": 3, "split-2": 5},
        hidden_network_seconds=1.5,
        accounted_seconds=10.0,
        ideal_seconds=4.0,
        loss_seconds={Loss.CPU_GAP: 2.0, Loss.EXPOSED_NETWORK: 4.0},
        optimal_tokens_per_second=70.0,
    )
    found = collected(stats, LossWaterfall.between(EngineStats(), stats))
    assert found["plan_steps_total"] == {"sequential": 3, "split-2": 5}
    assert found["loss_seconds_total"] == {"cpu_gap": 2, "exposed_network": 4}
    assert found["overlap_saved_seconds_total"] == {"": 1.5}
    assert (found["ideal_seconds_total"], found["accounted_seconds_total"]) == ({"": 4}, {"": 10})
    assert (found["percent_of_optimal"], found["optimal_tokens_per_second"]) == ({"": 40}, {"": 70})


def test_an_unknown_optimum_is_missing_and_not_zero() -> None:
    found = collected(EngineStats(num_steps=5))
    assert not {"percent_of_optimal", "optimal_tokens_per_second", "ideal_seconds_total"} & found.keys()
    assert "loss_seconds_total" not in found and found["engine_steps_total"] == {"": 5}


def test_times_that_no_step_measured_are_missing_and_not_zero() -> None:
    names = {metric.name for metric in TIMES_METRICS}
    assert "overlap_saved_seconds_total" in names
    assert not names & collected(EngineStats(num_steps=5, device_seconds=2.0)).keys()
    found = collected(EngineStats(num_steps=5, num_timed_steps=5, gemm_seconds=1.5))
    assert names <= found.keys()
    assert (found["engine_gemm_seconds_total"], found["engine_network_seconds_total"]) == ({"": 1.5}, {"": 0})


def test_a_scrape_over_http_reads_the_engine_as_it_is() -> None:
    state = {"running": 3}
    registry = CollectorRegistry()
    registry.register(
        EngineCollector(
            lambda: (
                EngineStats(num_running=state["running"], num_blocks=10, num_used_blocks=4, num_finished={"length": 2}),
                12.5,
            ),
            model="m",
            replica="r1",
        )
    )
    endpoint = MetricsEndpoint(registry, "127.0.0.1")
    assert endpoint.address.startswith("127.0.0.1:")
    state["running"] = 5
    with urlopen(f"http://{endpoint.address}/metrics") as response:
        text = response.read().decode()
    endpoint.close()
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[PREFIX + "num_requests_running", None].value == 5
    assert samples[PREFIX + "kv_cache_usage_ratio", None].value == 0.4
    assert samples[PREFIX + "engine_uptime_seconds_total", None].value == 12.5
    assert samples[PREFIX + "engine_requests_finished_total", "length"].value == 2
    assert all(sample.labels["replica"] == "r1" for sample in samples.values())


def test_ingress_counters_carry_the_model() -> None:
    registry = CollectorRegistry()
    metrics = IngressMetrics(registry, "m")
    registry.register(RouterCollector(lambda: {"r1": (2, 30.0)}, "m"))
    metrics.answered(10, 5)
    metrics.unanswered(1, 2)
    metrics.routed("r1", 16)
    metrics.finished("stop")
    metrics.responded("/v1/models", 200)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(PREFIX + name, {"model": "m"} | labels)

    assert value("prompt_tokens_total") == 10
    assert value("generation_tokens_total") == 5
    assert value("unanswered_tokens_total", kind="generation") == 2
    assert value("routing_decisions_total", replica="r1") == 1
    assert value("routing_prefix_tokens_total") == 16
    assert value("request_success_total", finished_reason="stop") == 1
    assert value("http_responses_total", route="/v1/models", status="200") == 1
    assert value("replicas_ready") == 1
    assert value("routed_requests", replica="r1") == 2
    assert value("predicted_work_tokens", replica="r1") == 30
    metrics.routed("r2", 0)
    for _ in range(2):
        metrics.replica_gone("r1")
    assert value("routing_decisions_total", replica="r1") is None, "it ends with its replica"
    assert value("routing_decisions_total", replica="r2") == 1, "and no other does"

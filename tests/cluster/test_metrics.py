"""Metrics: every name once, well-formed, and read from the engine at scrape time."""

import re
from dataclasses import fields
from urllib.request import urlopen

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import (
    ENGINE_METRICS,
    PREFIX,
    EngineCollector,
    IngressMetrics,
    MetricsEndpoint,
    RouterCollector,
)
from engine import EngineStats


def test_names_follow_the_conventions() -> None:
    names = [metric.name for metric in ENGINE_METRICS]
    assert len(set(names)) == len(names)
    for metric in ENGINE_METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", metric.name)
        assert metric.name.endswith("_total") == metric.is_counter
        assert metric.help.endswith(".")


def test_every_field_of_the_stats_is_exported() -> None:
    """A distinct value per field must be seen again: nothing is forgotten, nothing is read from the wrong field."""
    numbers = [field.name for field in fields(EngineStats) if field.name != "num_finished"]
    stats = EngineStats(**{name: 1000 + index for index, name in enumerate(numbers)}, num_finished={"stop": 7})
    exported = {metric.read(stats) for metric in ENGINE_METRICS}
    missing = [name for name in numbers if getattr(stats, name) not in exported]
    assert missing == []


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
    assert value("routed_requests", replica="r1") == 2
    assert value("predicted_work_tokens", replica="r1") == 30

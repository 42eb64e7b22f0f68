"""What Prometheus is told to scrape: every process once, and the HAProxy of each node that has an ingress."""

from cluster.metrics_discovery import target_groups
from cluster.step_message import MetricsTarget

TARGETS = [
    MetricsTarget("ingress", "i1", "10.0.0.1:1000"),
    MetricsTarget("ingress", "i2", "10.0.0.1:1001"),
    MetricsTarget("ingress", "i3", "10.0.0.2:1000"),
    MetricsTarget("replica", "r1", "10.0.0.3:2000"),
]


def listed(environment: dict[str, str]) -> list[tuple[str, str]]:
    groups = target_groups(TARGETS, environment)
    return [(group["labels"]["nanoserve_process"], address) for group in groups for address in group["targets"]]


def test_every_process_is_listed_by_its_kind() -> None:
    assert listed({}) == [(target.kind, target.address) for target in TARGETS]


def test_haproxy_is_listed_once_for_every_node_with_an_ingress() -> None:
    enabled = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    assert listed(enabled)[4:] == [("haproxy", "10.0.0.1:9101"), ("haproxy", "10.0.0.2:9101")]
    elsewhere = enabled | {"RAY_SERVE_HAPROXY_METRICS_PORT": "7"}
    assert listed(elsewhere)[4:] == [("haproxy", "10.0.0.1:7"), ("haproxy", "10.0.0.2:7")]

"""The ports that Ray and Serve choose are those of the versions that are installed."""

from ray._private import ray_constants
from ray.serve._private import constants

from cluster.fixed_port import (
    HAPROXY_METRICS,
    HAPROXY_STATISTICS,
    PORTS_OF_EVERY_NODE,
    PORTS_OF_HEAD,
    RAY_DASHBOARD,
    RAY_HEAD,
    SERVE_PROXY,
)


def test_they_are_rays_and_serves_own() -> None:
    assert RAY_HEAD.number == ray_constants.DEFAULT_PORT
    assert RAY_DASHBOARD.number == ray_constants.DEFAULT_DASHBOARD_PORT
    assert HAPROXY_METRICS.number == constants.RAY_SERVE_HAPROXY_METRICS_PORT
    assert HAPROXY_STATISTICS.number == constants.RAY_SERVE_HAPROXY_STATS_PORT
    assert SERVE_PROXY.number == constants.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT


def test_none_is_wanted_twice() -> None:
    numbers = [port.number for port in PORTS_OF_HEAD + PORTS_OF_EVERY_NODE]
    assert len(set(numbers)) == len(numbers)

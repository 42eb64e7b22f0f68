"""`FixedPort`: what a cluster of `ray up` listens on at ports that Ray and Serve choose, each named once.

The API's port is the recipe's; Prometheus and Grafana go without where theirs are taken (`cluster.monitoring`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPort:
    """`program` is part of the command line of who may well have it."""

    number: int
    purpose: str
    program: str


RAY_HEAD = FixedPort(number=6379, purpose="Ray's head", program="gcs_server")
RAY_DASHBOARD = FixedPort(number=8265, purpose="Ray's dashboard", program="dashboard")
HAPROXY_STATISTICS = FixedPort(number=8404, purpose="HAProxy's statistics", program="haproxy")
HAPROXY_METRICS = FixedPort(number=9101, purpose="HAProxy's metrics", program="haproxy")
SERVE_PROXY = FixedPort(number=8500, purpose="Serve's own proxy", program="ray::")

PORTS_OF_HEAD = (RAY_HEAD, RAY_DASHBOARD)
PORTS_OF_EVERY_NODE = (HAPROXY_STATISTICS, HAPROXY_METRICS, SERVE_PROXY)

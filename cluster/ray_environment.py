"""The environment variables that make Ray and Serve fit nanoserve: fast path, private, quiet. Pure functions.

Ray reads them when it is imported, and its processes inherit them; so they are set before `import ray`. A cluster
started by others (Kubernetes) sets the same ones on its nodes.
"""

from dataclasses import dataclass
from pathlib import Path

_NEVER_SECONDS = 1_000_000_000
_LONGEST_STREAM_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePorts:
    """Free ports for what Serve and HAProxy listen on beside the API."""

    haproxy_stats: int
    haproxy_metrics: int
    fallback_http: int
    fallback_grpc: int


def serving_environment() -> dict[str, str]:
    """For any process that imports Serve: HAProxy in front, gRPC between processes, no usage statistics."""
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # by default a line is in the file once a thousand are
        "RAY_USAGE_STATS_ENABLED": "0",
        # Our metrics are our own (`cluster.metrics`); each process gathers Serve's ten times a second by default.
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        # Every 0.1 s by default, which takes the controller 4 % of a core, and the GCS more, while nothing happens.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # Routing is ours: Serve must not probe replicas for queue lengths when a router was idle.
        "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": str(_NEVER_SECONDS),
        # At every change of ingress processes HAProxy is replaced, and by default the old one cuts all streams that
        # still run after two minutes. The ports of processes that are gone would rest as long, which one app does
        # not need.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_LONGEST_STREAM_SECONDS),
        "RAY_SERVE_PORT_QUARANTINE_S": "60",
    }


def shared_environment(directory: Path, haproxy: Path, python_path: str, *, is_loopback: bool) -> dict[str, str]:
    """For every node that we start: state of HAProxy under `directory`, code at `python_path`, callers need a token.

    `is_loopback` keeps all of Ray to 127.0.0.1, as a cluster of one machine can be.
    """
    environment = serving_environment() | {
        # By default 15 for all of Ray's workers: ingress, HAProxy and ranks alike. Where these share cores, who has a
        # millisecond's work shall not wait for the model's threads (`cluster.rank` lowers those alone).
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "PYTHONPATH": python_path,
    }
    if is_loopback:  # despite its name the switch that makes Ray use the loopback interface, on any system
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return environment


def private_environment(
    directory: Path, ports: ServePorts, token: str, haproxy: Path, python_path: str
) -> dict[str, str]:
    """For a local cluster of our own: state under `directory`, loopback only, closed to other users by `token`."""
    return shared_environment(directory, haproxy, python_path, is_loopback=True) | {
        # Nobody reads Ray's own metrics here: the dashboard is left out, and ours are `cluster.metrics`.
        "RAY_enable_metrics_collection": "0",
        "RAY_event_stats": "0",
        "RAY_AUTH_TOKEN": token,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        # One machine: no load balancer elsewhere has to hear of a stop before it happens.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
        "TMPDIR": str(directory),  # what a killed process leaves in a temporary directory goes with ours
    }

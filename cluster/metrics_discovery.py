"""What `/metrics/targets` answers: every process of the cluster that has metrics, as Prometheus's HTTP service
discovery reads it (a list of `targets` with the `labels` they share).

HAProxy's own page is on every node that has an ingress, on the address that the node has in its cluster: Serve binds it
to all, `cluster.haproxy` to this one.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.fixed_port import HAPROXY_METRICS
from cluster.step_message import MetricsTarget

PROCESS_LABEL = "nanoserve_process"
HAPROXY = "haproxy"


def target_groups(
    targets: Sequence[MetricsTarget], environment: Mapping[str, str] = os.environ
) -> list[dict[str, Any]]:
    """The answer, from the endpoints that an ingress knows and the HAProxy in front of each ingress."""
    groups = [{"targets": [target.address], "labels": {PROCESS_LABEL: target.kind}} for target in targets]
    if environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        port = environment.get("RAY_SERVE_HAPROXY_METRICS_PORT", HAPROXY_METRICS.number)
        nodes = sorted({target.address.rpartition(":")[0] for target in targets if target.kind == "ingress"})
        groups += [{"targets": [f"{node}:{port}"], "labels": {PROCESS_LABEL: HAPROXY}} for node in nodes]
    return groups

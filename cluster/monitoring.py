"""Prometheus and Grafana beside a cluster's head, where they are installed: how they are to be run.

They listen on loopback, read `deploy/prometheus.yml` and `dashboards/*.json`, and keep their data in a folder of ours.
A Prometheus or Grafana of the user's own on the same port is left alone. `cluster.node_keeper` runs them.
"""

import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
RETENTION = "15d"
_GRAFANA_HOME = Path("/usr/share/grafana")


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A program to run beside Ray."""

    name: str
    port: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def companions(directory: Path, root: Path) -> list[Companion]:
    """Those that are installed here, with what they need to know written under `directory`."""
    found = []
    prometheus, configuration = shutil.which("prometheus"), root / "deploy" / "prometheus.yml"
    if prometheus is not None and configuration.is_file():
        data = directory / "prometheus"
        options = {
            "config.file": configuration,
            "storage.tsdb.path": data,
            "storage.tsdb.retention.time": RETENTION,
            "web.listen-address": f"127.0.0.1:{PROMETHEUS_PORT}",
        }
        command = (prometheus, *[f"--{key}={value}" for key, value in options.items()])
        found.append(Companion(name="Prometheus", port=PROMETHEUS_PORT, command=command))
    server = shutil.which("grafana-server") or shutil.which("grafana")
    if server is not None:
        command = (server, *(() if server.endswith("-server") else ("server",)))
        if _GRAFANA_HOME.is_dir():
            command += ("--homepath", str(_GRAFANA_HOME))
        environment = _grafana_environment(directory / "grafana", root / "dashboards")
        found.append(Companion(name="Grafana", port=GRAFANA_PORT, command=command, environment=environment))
    return found


def is_free(port: int) -> bool:
    """Whether a program could listen on the port of loopback."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _grafana_environment(directory: Path, dashboards: Path) -> dict[str, str]:
    """Grafana's settings as variables; writes the files by which it finds Prometheus and the dashboards."""
    provisioning = directory / "provisioning"
    prometheus = {
        "name": "Prometheus",
        "type": "prometheus",
        "uid": "prometheus",
        "access": "proxy",
        "isDefault": True,
        "url": f"http://127.0.0.1:{PROMETHEUS_PORT}",
    }
    folder = {"name": "nanoserve", "folder": "nanoserve", "type": "file", "options": {"path": str(dashboards)}}
    for kind, content in (("datasources", {"datasources": [prometheus]}), ("dashboards", {"providers": [folder]})):
        (provisioning / kind).mkdir(parents=True, exist_ok=True)
        (provisioning / kind / "nanoserve.yaml").write_text(yaml.safe_dump({"apiVersion": 1} | content))
    password = directory / "admin-password"
    if not password.exists():
        password.touch(0o600)
        password.write_text(secrets.token_hex(16))
    return {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(GRAFANA_PORT),
        "GF_PATHS_DATA": str(directory / "data"),
        "GF_PATHS_LOGS": str(directory / "logs"),
        "GF_PATHS_PLUGINS": str(directory / "plugins"),
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_SECURITY_ADMIN_PASSWORD__FILE": str(password),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",  # whoever may open a port of this machine's loopback may look
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }

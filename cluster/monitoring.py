"""Prometheus and Grafana beside a cluster's head, where they are installed: `python -m cluster.monitoring DIRECTORY`.

They listen on loopback, read `deploy/prometheus.yml` and `dashboards/*.json`, keep their data under DIRECTORY, and end
with the machine's Ray, however that ends. A Prometheus or Grafana of the user's own on the same port is left alone.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cluster.marked_processes import marked_processes, start_apart
from cluster.ray_node import ROOT, running_node

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
RETENTION = "15d"
_GRAFANA_HOME = Path("/usr/share/grafana")
_POLL_SECONDS = 1.0
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A program to run beside Ray."""

    name: str
    port: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def companions(directory: Path, root: Path = ROOT) -> list[Companion]:
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


def start_monitoring(directory: Path, environment: Mapping[str, str]) -> list[str]:
    """Have them run from now on, unless they do; what to tell the user. `environment` carries the mark of the node."""
    if any("cluster.monitoring" in process.command for process in marked_processes()):
        return []
    said, free = [], False
    for companion in companions(directory):
        if is_free(companion.port):
            free = True
            said.append(f"{companion.name} listens on http://127.0.0.1:{companion.port}.")
        else:
            said.append(
                f"{companion.name} is not started, since something listens on port {companion.port} already; "
                "docs/launch.md says how it can read this cluster."
            )
    if free:
        start_apart([sys.executable, "-m", "cluster.monitoring", str(directory)], environment, ROOT)
    return said


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


def main() -> None:
    """Start what is installed and free to start, and end it once Ray is gone."""
    directory = Path(sys.argv[1])
    running: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        for companion in companions(directory):
            if is_free(companion.port):
                with (directory / f"{companion.name.lower()}.log").open("ab") as log:
                    environment = os.environ | dict(companion.environment)
                    running.append(
                        subprocess.Popen(companion.command, env=environment, cwd=directory, stdout=log, stderr=log)
                    )
        while running_node() is not None and any(process.poll() is None for process in running):
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    main()

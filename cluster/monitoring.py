"""Prometheus and Grafana beside a cluster's head, where they are installed: how they are to be run.

They listen on loopback, read `dashboards/*.json` and what `deploy/prometheus.yml` says, with this cluster's places in
it, and keep their data in a folder of ours. A Prometheus or Grafana of the user's own on the same port is left alone.
`cluster.node_keeper` runs them, and `nanoserve deploy` tells Prometheus where the API is.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from cluster.marked_processes import marked_processes
from cluster.state_directory import ray_directory

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
RETENTION = "15d"
_SHIPPED, _CONFIGURATION = Path("deploy") / "prometheus.yml", "prometheus.yml"
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
    prometheus = shutil.which("prometheus")
    if prometheus is not None and (root / _SHIPPED).is_file():
        data = directory / "prometheus"
        configuration = directory / _CONFIGURATION
        if not configuration.exists():  # else the API is where it was, until a deployment says otherwise
            configuration.write_text(prometheus_configuration(root))
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


def prometheus_configuration(root: Path, api: str | None = None) -> str:
    """What is shipped, readable from another folder, for an API at the URL `api` (as it is shipped unless given)."""
    values = yaml.safe_load((root / _SHIPPED).read_text())
    values["rule_files"] = [str(root / _SHIPPED.parent / name) for name in values.get("rule_files", ())]
    for job in values["scrape_configs"]:
        for discovery in job.get("http_sd_configs", ()) if api is not None else ():
            discovery["url"] = api + urlsplit(discovery["url"]).path
        for discovery in job.get("file_sd_configs", ()):
            discovery["files"] = [str(ray_directory() / Path(name).name) for name in discovery["files"]]
    written: str = yaml.safe_dump(values, sort_keys=False)
    return written


def point_prometheus_at(api: str, directory: Path, root: Path) -> None:
    """Have the Prometheus that runs here, if one of ours does, follow the API at the URL `api`."""
    configuration = directory / _CONFIGURATION
    if not configuration.exists():
        return
    wanted = prometheus_configuration(root, api)
    if configuration.read_text() == wanted:
        return
    fresh = configuration.with_suffix(".new")
    fresh.write_text(wanted)
    fresh.replace(configuration)
    for process in marked_processes():
        if process.runs("prometheus"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.process_id, signal.SIGHUP)  # it reads its configuration again


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

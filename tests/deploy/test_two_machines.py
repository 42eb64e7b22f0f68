"""A real `ray up` of two machines with a cable between them: the autoscaler starts the second one from the first."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.serve_command import until
from tests.deploy.conftest import MakeHost
from tests.deploy.emulated_host import EmulatedHost
from tests.deploy.launch import ROOT, edit_cluster_file, post, ray, scraped

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

HEAD, WORKER = "10.77.0.1", "10.77.0.2"
PORT = 8001  # Prometheus has to be told of another than 8000


@pytest.fixture(scope="module")
def hosts(make_host: MakeHost) -> tuple[EmulatedHost, EmulatedHost]:
    head, worker = make_host("a"), make_host("b")
    head.connect(f"{HEAD}/24", worker, f"{WORKER}/24")
    return head, worker


def test_two_machines(hosts: tuple[EmulatedHost, EmulatedHost], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {ROOT / 'deploy/demo_model/model'}\nname: demo\nreplicas: 2\ncache: 64MiB\nport: {PORT}\n"
    )
    file = edit_cluster_file(tmp_path / "rc.yaml", head_ip=HEAD, worker_ips=[WORKER], recipe=str(recipe))
    head, _ = hosts
    done = ray(head, "up", "-y", str(file))
    assert done.returncode == 0, done.stdout
    assert "1 of 2 machines take part; waiting for the others." in done.stdout
    for host in hosts:
        assert len(processes(host, "ServeReplica:nanoserve:Replica")) == 1
    tokens = {(host.files / ".ray" / "auth_token").read_text() for host in hosts}
    assert len(tokens) == 1
    for number in range(6):
        body = {"model": "demo", "prompt": f"{number} little birds", "max_tokens": 4, "temperature": 0}
        assert post(head, "/v1/completions", body, PORT)["usage"]["completion_tokens"] <= 4
    if shutil.which("prometheus") is not None:
        kinds = {"ingress", "replica", "haproxy"}
        until(lambda: kinds <= scraped(head), 120, "Prometheus to follow the API and both machines")
    cluster = [processes(host, "") for host in hosts]
    again = ray(head, "up", "-y", str(file))
    assert again.returncode == 0, again.stdout
    assert "nothing to do" in again.stdout
    assert all(before <= processes(host, "") for before, host in zip(cluster, hosts, strict=True))
    down = ray(head, "down", "-y", str(file))
    assert down.returncode == 0, down.stdout
    for host in hosts:
        host.wait_until_idle(300)


def processes(host: EmulatedHost, name: str) -> set[int]:
    return {pid for pid, line in host.processes().items() if line.startswith(f"ray::{name}") and "IDLE" not in line}

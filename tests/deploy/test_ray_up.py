"""A real `ray up` of ray_cluster.yaml on one machine: refused, launched, repeated, changed, ended. In this order."""

import json
import os
import re
import shutil
import signal
import stat
import threading
from pathlib import Path

import pytest

from tests.cluster.serve_command import until
from tests.deploy.conftest import MakeHost
from tests.deploy.emulated_host import EmulatedHost, held_port
from tests.deploy.launch import MANY_GPUS, ROOT, edit_cluster_file, nanoserve, nanoserve_ray, post, ray, scraped

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

PROMPT = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def host(make_host: MakeHost) -> EmulatedHost:
    return make_host("a")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edit_cluster_file(tmp_path_factory.mktemp("cluster") / "ray_cluster.yaml")


def recipe(path: Path, **keys: object) -> str:
    lines = {"model": ROOT / "deploy/demo_model/model", "name": "demo", "cache": "64MiB"} | keys
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return str(path)


def test_a_taken_port_is_said(host: EmulatedHost, file: Path) -> None:
    with held_port(host, 6379):
        done = ray(host, "up", "-y", str(file))
    assert done.returncode != 0
    assert "nanoserve: Cannot listen on 127.0.0.1:6379: Address already in use." in done.stdout
    assert not named(host, "raylet")


def test_a_model_for_more_gpus_than_there_are_is_refused(host: EmulatedHost, file: Path, tmp_path: Path) -> None:
    gpus = recipe(tmp_path / "gpu_recipe.yaml", device="cuda", replicas=MANY_GPUS)
    wants = edit_cluster_file(tmp_path / "gpu.yaml", recipe=gpus)
    done = ray(host, "up", "-y", str(wants))
    assert done.returncode != 0
    refusal = rf"need {MANY_GPUS} GPUs, all 1 of a replica on one node; 127\.0\.0\.1 has \d+\."
    assert re.search(refusal, done.stdout), done.stdout
    assert not named(host, "ServeReplica")


def test_what_was_started_can_be_ended_alone(host: EmulatedHost) -> None:
    with held_port(host, 7000):
        others = {pid for pid, line in host.processes().items() if "time.sleep" in line}
        assert len(host.processes()) > 10
        done = nanoserve_ray(host, "stop")
        assert done.returncode == 0, done.stdout
        left = {pid: line for pid, line in host.processes().items() if "ssh" not in line}
        assert left.keys() == others, left


def test_it_serves(host: EmulatedHost, file: Path) -> None:
    done = ray(host, "up", "-y", str(file))
    assert done.returncode == 0, done.stdout
    assert "nanoserve is ready: demo at http://127.0.0.1:8000/v1" in done.stdout
    answer = post(host, "/v1/completions", PROMPT)
    assert answer["usage"]["completion_tokens"] == 8
    token = host.files / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_what_is_executed_lies_where_nobody_else_may_write(host: EmulatedHost) -> None:
    state = f"/tmp/nanoserve-{os.getuid()}"
    programs = [line for line in host.processes().values() if "haproxy" in line.split()[0]]
    assert programs and all(f" -f {state}/" in line for line in programs), programs
    assert host.run("stat", "-c", "%a %u", state, seconds=60).stdout.split() == ["700", str(os.getuid())]
    assert (host.state / "haproxy").is_file(), "and it is the emulated machine's own"
    assert Path(state).name not in host.run("ls", "-A", "/tmp/ray", seconds=60).stdout.split()


def test_nothing_listens_beyond_the_machine(host: EmulatedHost) -> None:
    addresses = [address for address in host.listening() if not address.endswith(":22")]
    assert "127.0.0.1:8000" in addresses
    outside = [
        address for address in addresses if not address.startswith(("127.0.0.1:", "[::1]:", "[::ffff:127.0.0.1]:"))
    ]
    assert outside == []


def test_repeated_it_changes_nothing_and_requests_go_on(host: EmulatedHost, file: Path) -> None:
    before = host.processes()
    first = post(host, "/v1/completions", PROMPT)["choices"]
    answers = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(post(host, "/v1/completions", PROMPT)["choices"])

    asking = threading.Thread(target=ask)
    asking.start()
    again = ray(host, "up", "-y", str(file))
    done.set()
    asking.join()
    assert again.returncode == 0, again.stdout
    assert "Ray ran already at 127.0.0.1 as the head." in again.stdout
    assert "nothing to do" in again.stdout
    assert answers
    assert all(answer == first for answer in answers)
    # Ray ends workers that idle when it likes.
    of_the_cluster = {pid for pid, line in before.items() if "ray" in line and "ssh" not in line and "IDLE" not in line}
    assert of_the_cluster <= host.processes().keys()


def test_the_doctor_joins_the_cluster_of_the_machine(host: EmulatedHost) -> None:
    """From a shell that knows nothing of it, though every caller must show the token."""
    done = nanoserve(host, "doctor", "--json")
    findings = json.loads(done.stdout[done.stdout.index("{") :])["findings"]
    assert [finding for finding in findings if finding["level"] == "error"] == []
    ray_cluster = [(each["level"], each["where"], each["found"]) for each in findings if each["check"] == "ray cluster"]
    assert len(ray_cluster) == 1, ray_cluster
    level, where, found = ray_cluster[0]
    assert (level, where) == ("ok", "127.0.0.1:6379") and found.startswith("1 node with ")
    ports = [finding["found"] for finding in findings if finding["check"] == "ports"]
    assert any("Ray's head (`ray up`) runs there" in found for found in ports), ports
    assert any("HAProxy's metrics (`ray up`) runs there" in found for found in ports), ports


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus (Debian: apt install prometheus)")
def test_prometheus_follows_the_cluster_and_is_started_again(host: EmulatedHost) -> None:
    kinds = {"ingress", "replica", "haproxy"}
    until(lambda: scraped(host) == kinds, 120, "Prometheus to follow the cluster")
    (crashed,) = named(host, "prometheus")
    os.kill(crashed, signal.SIGKILL)
    until(lambda: named(host, "prometheus") - {crashed} and scraped(host) == kinds, 120, "another one to follow it")
    assert "Prometheus ended with status -9; trying again in 1 s." in (host.state / "prometheus.log").read_text()


def test_another_recipe_replaces_the_replicas_alone(host: EmulatedHost, tmp_path: Path) -> None:
    raylets, replicas = named(host, "raylet"), named(host, "ServeReplica:nanoserve:Replica")
    changed = edit_cluster_file(tmp_path / "other.yaml", recipe=recipe(tmp_path / "other_recipe.yaml", name="other"))
    done = ray(host, "up", "-y", str(changed))
    assert done.returncode == 0, done.stdout
    assert post(host, "/v1/completions", PROMPT | {"model": "other"})["model"] == "other"
    assert named(host, "raylet") == raylets
    assert not named(host, "ServeReplica:nanoserve:Replica") & replicas


def test_another_port_needs_another_cluster(host: EmulatedHost, tmp_path: Path) -> None:
    moved = edit_cluster_file(tmp_path / "moved.yaml", recipe=recipe(tmp_path / "moved_recipe.yaml", port=8001))
    done = ray(host, "up", "-y", str(moved))
    assert done.returncode != 0
    assert "listens on 127.0.0.1:8000 as long as the cluster lives" in done.stdout
    assert post(host, "/v1/completions", PROMPT | {"model": "other"})["model"] == "other"


def test_ray_down_leaves_nothing_running(host: EmulatedHost, file: Path) -> None:
    # Where the last `ray up` failed, `ray down` of Ray 2.60 takes the head for gone and stops nothing.
    assert ray(host, "up", "-y", str(file)).returncode == 0
    assert len(host.processes()) > 10
    done = ray(host, "down", "-y", str(file))
    assert done.returncode == 0, done.stdout
    host.wait_until_idle(300)


def named(host: EmulatedHost, part: str) -> set[int]:
    return {pid for pid, line in host.processes().items() if f"/{part} " in line or line.startswith(f"ray::{part}")}

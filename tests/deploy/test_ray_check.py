"""`nanoserve ray check` of a machine that is there, with real mistakes."""

from pathlib import Path

import pytest

from tests.deploy.conftest import MakeHost
from tests.deploy.emulated_host import EmulatedHost, held_port
from tests.deploy.launch import DEMO, MANY_GPUS, ROOT, edit_cluster_file, nanoserve_ray

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host(make_host: MakeHost) -> EmulatedHost:
    return make_host("c")


def test_a_machine_that_is_as_it_should_be(host: EmulatedHost, tmp_path: Path) -> None:
    done = nanoserve_ray(host, "check", str(edit_cluster_file(tmp_path / "c.yaml")))
    assert done.returncode == 0, done.stdout
    assert "127.0.0.1 can be reached" in done.stdout
    assert "can be launched: ray up -y" in done.stdout


def test_a_wrong_key_is_said(host: EmulatedHost, tmp_path: Path) -> None:
    key = tmp_path / "stranger"
    host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key), seconds=60)
    done = nanoserve_ray(host, "check", str(edit_cluster_file(tmp_path / "c.yaml", key=str(key))))
    assert done.returncode == 2
    assert f"127.0.0.1: ssh does not let root in with the key {key}" in done.stdout


def test_an_unreachable_machine_is_said(host: EmulatedHost, tmp_path: Path) -> None:
    done = nanoserve_ray(host, "check", str(edit_cluster_file(tmp_path / "c.yaml", head_ip="10.99.0.1")))
    assert done.returncode == 2
    assert "10.99.0.1: cannot be reached on port 22" in done.stdout


def test_taken_ports_and_missing_gpus_are_said(host: EmulatedHost, tmp_path: Path) -> None:
    recipe = tmp_path / "gpu.yaml"
    text = (ROOT / DEMO).read_text().replace("../demo_model", str(ROOT / "deploy/demo_model"))
    text = text.replace("device: auto", "device: cuda").replace("replicas: 1", f"replicas: {MANY_GPUS}")
    recipe.write_text(text)
    with held_port(host, 8404):
        done = nanoserve_ray(host, "check", str(edit_cluster_file(tmp_path / "c.yaml", recipe=str(recipe))))
    assert done.returncode == 2
    assert "127.0.0.1: port 8404 (HAProxy's statistics) is taken" in done.stdout
    assert f"need {MANY_GPUS} GPUs" in done.stdout

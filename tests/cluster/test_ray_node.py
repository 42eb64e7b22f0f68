"""How a machine is started: addresses, the mark that says whether to start anew, the token, and the processes."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import ray_node
from cluster.auth_token import make_token, require_token, token_file
from cluster.marked_processes import MARK, end_marked, marked_processes
from cluster.ray_node import RayNode
from engine import ConfigError

LOCAL = "provider: {type: local, head_ip: %s, worker_ips: %s}\nauth: {ssh_user: me}\n"


def head(path: Path, address: str, workers: str = "[]") -> RayNode:
    path.write_text(LOCAL % (address, workers))
    return RayNode.of_head(6379, path, None, ())


def test_one_machine_stays_on_loopback(tmp_path: Path) -> None:
    node = head(tmp_path / "c.yaml", "127.0.0.1")
    environment = node.environment(tmp_path, tmp_path / "haproxy")
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert environment["RAY_enable_autoscaler_v2"] == "0"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert {"--head", "--node-ip-address", "127.0.0.1", "--autoscaling-config"} <= set(node.command())


def test_a_head_with_workers_is_where_the_file_says(tmp_path: Path) -> None:
    node = head(tmp_path / "c.yaml", "10.0.0.1", "[10.0.0.2]")
    assert node.head == "10.0.0.1:6379"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in node.environment(tmp_path, tmp_path)


def test_a_worker_is_where_its_way_to_the_head_begins() -> None:
    node = RayNode.of_worker("127.0.0.1:6379", None, ("--num-gpus=2",))
    assert node.address == "127.0.0.1"
    assert node.command()[-1] == "--num-gpus=2"
    assert node.command()[-3:-1] == ["--address", "127.0.0.1:6379"]


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "no-such-host.invalid:6379"])
def test_a_heads_address_needs_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 10\.0\.0\.1:6379|has no address"):
        RayNode.of_worker(address, None, ())


def test_a_way_in_which_it_is_started_has_a_mark_of_its_own(tmp_path: Path) -> None:
    node = head(tmp_path / "c.yaml", "127.0.0.1")
    environment = node.environment(tmp_path, tmp_path)
    mark = ray_node._mark(node, environment)
    assert mark == ray_node._mark(head(tmp_path / "c.yaml", "127.0.0.1"), dict(environment))
    assert mark != ray_node._mark(node, environment | {"RAY_SERVE_LOG_TO_STDERR": "1"})
    assert mark != ray_node._mark(RayNode.of_worker("127.0.0.1:6379", None, ()), environment)


def test_a_head_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The head at 127\.0\.0\.1:1 cannot be reached"):
        ray_node._check_port(RayNode.of_worker("127.0.0.1:1", None, ()))


def test_the_token_is_made_once_and_is_ones_own(tmp_path: Path) -> None:
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "ray" / "token")}
    with pytest.raises(ConfigError, match="has no token of the Ray cluster to join"):
        require_token(environment)
    make_token(environment)
    path = token_file(environment)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text()
    assert len(token) == 64
    path.chmod(0o644)
    make_token(environment)
    assert path.read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    require_token(environment)
    require_token({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_TOKEN_PATH": "/nowhere"})


@pytest.fixture
def marked() -> Iterator[str]:
    """The mark of a process that starts another and ignores being asked to end."""
    mark = f"test-{os.getpid()}"
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(1, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {MARK: mark}, stdout=subprocess.PIPE
    ) as made:
        assert made.stdout is not None
        made.stdout.readline()
        try:
            yield mark
        finally:
            made.send_signal(signal.SIGKILL)


def test_processes_are_found_and_ended_by_their_mark(marked: str) -> None:
    found = [process for process in marked_processes() if process.mark == marked]
    assert len(found) == 2
    assert all(process.runs(Path(sys.executable).name) for process in found)
    assert end_marked(f"{marked}-other") == 0
    assert end_marked(marked, patience=0.5) == 2
    assert not [process for process in marked_processes() if process.mark == marked]

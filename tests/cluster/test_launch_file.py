"""What is read from a cluster file, before and after `ray up`, and what is refused."""

import json
from pathlib import Path

import pytest

from cluster.launch_file import LaunchFile
from engine import ConfigError

LOCAL = """
cluster_name: c
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}
auth: {ssh_user: me, ssh_private_key: ~/key}
file_mounts: {"/opt/code/cluster/": cluster}
head_start_ray_commands: [ray stop, "/opt/x/nanoserve deploy --wait-seconds=9 models/big.yaml --cluster-file f"]
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_file_before_ray_up(tmp_path: Path) -> None:
    launch = LaunchFile.load(written(tmp_path / "c.yaml", LOCAL))
    assert launch.machines == ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    assert launch.ssh_key == Path.home() / "key"
    assert (launch.min_workers, launch.recipe, launch.code) == (2, "models/big.yaml", "/opt/code")


def test_the_copy_that_ray_up_leaves_on_the_head(tmp_path: Path) -> None:
    prepared = {
        "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]},
        "auth": {"ssh_user": "me"},
        "available_node_types": {"local.cluster.node": {"min_workers": 1, "max_workers": 2}},
    }
    launch = LaunchFile.load(written(tmp_path / "c.yaml", json.dumps(prepared)))
    assert (launch.min_workers, launch.ssh_key, launch.recipe) == (1, None, "")


def test_a_head_reached_from_outside(tmp_path: Path) -> None:
    text = LOCAL.replace("head_ip: 10.0.0.1", "head_ip: 10.0.0.1, external_head_ip: 203.0.113.7")
    assert LaunchFile.load(written(tmp_path / "c.yaml", text)).machines[0] == "203.0.113.7"


def test_a_cloud_counts_the_workers_of_every_kind(tmp_path: Path) -> None:
    text = "provider: {type: aws}\navailable_node_types: {a: {min_workers: 2}, b: {}, c: {min_workers: 1}}\n"
    launch = LaunchFile.load(written(tmp_path / "c.yaml", text))
    assert (launch.provider, launch.min_workers) == ("aws", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("provider: {type: local, head_ip: 127.0.0.1, worker_ips: [10.0.0.2]}\nauth: {}", "means each worker itself"),
        ("provider: {type: local, head_ip: 10.0.0.2, worker_ips: [10.0.0.2]}\nauth: {}", "named twice"),
        ("provider: {type: local, worker_ips: []}\nauth: {}", "needs head_ip"),
        ("provider: {type: local, head_ip: a, worker_ips: []}", "the key 'auth' is missing"),
        ("model: x", "the key 'provider' is missing: is this a cluster file"),
        ("- 1", "the key 'provider' is missing"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_cannot_be_a_cluster_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaunchFile.load(written(tmp_path / "c.yaml", text))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml: No such file"):
        LaunchFile.load(tmp_path / "c.yaml")

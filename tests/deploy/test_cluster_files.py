"""The cluster files that are shipped: Ray takes them, they say the same, and what they name exists."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.launch_file import LaunchFile
from tests.deploy.launch import ROOT, edit_cluster_file

FILES = [ROOT / "ray_cluster.yaml", ROOT / "deploy/ray/aws.yaml", ROOT / "deploy/ray/gcp.yaml"]
SHARED = (
    "file_mounts",
    "rsync_exclude",
    "cluster_synced_files",
    "setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_takes_it(path: Path) -> None:
    config = prepare_config(copy.deepcopy(load(path)))
    validate_config(config)
    assert config["max_workers"] >= 0
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_it_names_is_there(path: Path) -> None:
    values = load(path)
    for remote, local in values["file_mounts"].items():
        assert remote == f"~/nanoserve/{local}"
        assert (ROOT / local).exists()
    commands = [command for key in SHARED[3:] for command in values[key]]
    for command in commands:
        program = ROOT / command.split()[0].removeprefix("~/nanoserve/")
        assert program.stat().st_mode & 0o111, f"{program} cannot be executed"
    launch = LaunchFile.load(path)
    assert (ROOT / launch.recipe).is_file()


@pytest.mark.parametrize("path", FILES[1:], ids=lambda path: path.name)
def test_clouds_differ_in_their_machines_only(path: Path) -> None:
    local, cloud = load(FILES[0]), load(path)
    assert {key: cloud[key] for key in SHARED} == {key: local[key] for key in SHARED}


def test_the_marked_values_are_all_that_a_cluster_of_ones_own_needs(tmp_path: Path) -> None:
    path = edit_cluster_file(tmp_path / "mine.yaml", head_ip="10.0.0.1", worker_ips=["10.0.0.2", "10.0.0.3"])
    launch = LaunchFile.load(path)
    assert launch.machines == ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    assert (launch.min_workers, launch.ssh_user, launch.code) == (2, "root", "~/nanoserve")
    prepared = prepare_config(load(path))
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2

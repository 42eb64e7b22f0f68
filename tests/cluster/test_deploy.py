"""`nanoserve deploy`: waiting for machines, what counts as the same, and mistakes before anything is contacted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import cli, deploy
from cluster.config import ServingConfig
from cluster.deployed_state import DeployedState
from cluster.narrator import StartError
from cluster.placement import NodeResources
from engine import ConfigError, MemoryUse
from tests.deploy.launch import ROOT

A, B = NodeResources("a", 2.0), NodeResources("b", 2.0)


@dataclass(slots=True)
class Listener:
    """A narrator that keeps what is said."""

    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def loading(self, done: int, total: int, num_ready: int, num_replicas: int) -> None: ...

    def doing(self, text: str) -> None: ...

    def memory(self, replicas: Mapping[str, Sequence[MemoryUse]]) -> None: ...


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "monitor.out"
    monkeypatch.setattr(deploy, "autoscaler_log", lambda: path)
    monkeypatch.setattr(deploy, "_POLL_SECONDS", 0.0)
    return path


def arriving(*steps: list[NodeResources]) -> Callable[[], list[NodeResources]]:
    remaining = list(steps)
    return lambda: remaining.pop(0) if len(remaining) > 1 else remaining[0]


def test_it_waits_for_the_machines_of_the_file(log: Path) -> None:
    listener = Listener()
    deploy._wait_for_nodes(arriving([A], [A], [A, B]), 2, 60.0, listener)
    assert listener.lines == ["1 of 2 machines take part; waiting for the others."]


def test_it_goes_on_without_those_that_never_come(log: Path) -> None:
    listener = Listener()
    deploy._wait_for_nodes(arriving([A]), 2, 0.0, listener)
    assert listener.lines[-1].startswith("Going on with 1 of 2 machines")


def test_a_machine_that_failed_ends_the_waiting_with_its_reason(log: Path) -> None:
    log.write_text("nanoserve: the disk of b is full\nNew status: update-failed\n")
    listener = Listener()
    with pytest.raises(StartError, match="another could not be started"):
        deploy._wait_for_nodes(arriving([A]), 2, 60.0, listener)
    assert listener.lines == ["A machine does not join: nanoserve: the disk of b is full"]


def application(status: str, message: str = "", **deployments: str) -> Any:
    """As Serve describes one; deployments by name, with what is said of them."""
    told = {name: SimpleNamespace(message=text) for name, text in deployments.items()}
    return SimpleNamespace(status=SimpleNamespace(value=status), message=message, deployments=told)


def test_an_update_ends_when_serve_says_so(log: Path) -> None:
    remaining = [application("DEPLOYING"), application("UNHEALTHY"), application("RUNNING")]
    deploy._wait_for_update(lambda: remaining.pop(0))
    assert not remaining


@pytest.mark.parametrize(
    ("failed", "reason"),
    [
        (application("DEPLOY_FAILED", "all of it", Replica="Rank 1 died: out of memory.", Ingress=""), "Rank 1 died"),
        (application("DEPLOY_FAILED", "no such import"), "no such import"),
        (None, "was taken from the cluster"),
    ],
)
def test_an_update_that_failed_is_not_waited_for(log: Path, failed: Any, reason: str) -> None:
    remaining = [application("DEPLOYING"), failed]
    with pytest.raises(StartError, match=reason):
        deploy._wait_for_update(lambda: remaining.pop(0))


def test_recipe_and_code_make_the_fingerprint(tmp_path: Path) -> None:
    for package in ("engine", "cluster"):
        (tmp_path / package).mkdir()
    code = tmp_path / "engine" / "a.py"
    code.write_text("x = 1\n")
    config = ServingConfig.parse({"model": ROOT / "deploy/demo_model/model"}, where="test")
    first = DeployedState.of(config, tmp_path)
    assert first == DeployedState.of(config, tmp_path)
    assert first.fingerprint != DeployedState.of(config.model_copy(update={"replicas": 2}), tmp_path).fingerprint
    code.write_text("x = 2\n")
    second = DeployedState.of(config, tmp_path)
    assert first.fingerprint != second.fingerprint
    (tmp_path / "engine" / "__pycache__").mkdir()
    (tmp_path / "engine" / "__pycache__" / "a.pyc").write_bytes(b"made by running it")
    assert second.fingerprint == DeployedState.of(config, tmp_path).fingerprint
    (tmp_path / "cluster" / "page.js").write_text('"use strict";\n')
    assert second.fingerprint != DeployedState.of(config, tmp_path).fingerprint, "what is served but no Python counts"


def test_without_ray_on_this_machine_it_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "running_node", lambda: None)
    outcome = CliRunner().invoke(cli.app, ["deploy", str(ROOT / "deploy/models/demo.yaml")])
    assert isinstance(outcome.exception, ConfigError)
    assert "No Ray of ours runs on this machine" in str(outcome.exception)


def test_ray_start_needs_to_know_its_part() -> None:
    for arguments in (["ray", "start"], ["ray", "start", "--head", "--address", "10.0.0.1:6379"]):
        outcome = CliRunner().invoke(cli.app, arguments)
        assert isinstance(outcome.exception, ConfigError)
        assert "either --head or --address" in str(outcome.exception)

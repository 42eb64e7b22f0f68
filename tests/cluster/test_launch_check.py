"""`nanoserve ray check`: what it makes of machines, of what ssh says, and of the autoscaler's log. Asks no machine."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.autoscaler_log import RESTARTED, complaints, current_part, has_given_up
from cluster.config import ServingConfig
from cluster.launch_check import ENVIRONMENT_BYTES, check_schema, local_problems, problems
from cluster.launch_file import LaunchFile
from cluster.machine_probe import Machine, explain, parse
from engine import ConfigError
from tests.deploy.launch import ROOT, edit_cluster_file

HEAD, WORKER = "10.0.0.1", "10.0.0.2"
GOOD = Machine(
    name=HEAD, python="/usr/bin/python3", has_rsync=True, num_cores=64, num_gpus=8, free_bytes=2 * ENVIRONMENT_BYTES
)


def launch(*workers: str) -> LaunchFile:
    return LaunchFile(
        path=Path("c.yaml"),
        provider="local",
        head_ip=HEAD,
        head_reached_at=HEAD,
        worker_ips=workers,
        ssh_user="me",
        ssh_key=Path("/home/me/.ssh/key"),
        recipe="r.yaml",
    )


def said(machines: Sequence[Machine], **recipe: object) -> list[str]:
    config = ServingConfig.parse({"model": ROOT / "deploy/demo_model/model"} | recipe, where="r.yaml")
    return problems(launch(*[machine.name for machine in machines[1:]]), machines, config)


def test_good_machines_have_no_problems() -> None:
    assert said([GOOD, replace(GOOD, name=WORKER)], tensor_parallel=8, replicas=2, device="cuda") == []


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (replace(GOOD, python=""), ["10.0.0.1: has no Python 3.11", "apt-get install python3"]),
        (replace(GOOD, has_rsync=False), ["10.0.0.1: has no rsync"]),
        (replace(GOOD, free_bytes=3 << 30), ["3.0 GiB free"]),
        (replace(GOOD, ports=frozenset({22, 6379})), ["port 6379 (Ray's head) is taken", "`ray stop`"]),
        (replace(GOOD, ports=frozenset({8000})), ["port 8000 (the API's) is taken", "change `port` in r.yaml"]),
        (replace(GOOD, absent=("/models/x/config.json",)), ["does not have /models/x/config.json"]),
    ],
)
def test_each_fault_is_said_with_its_remedy(machine: Machine, words: list[str]) -> None:
    (problem,) = said([machine])
    assert all(word in problem for word in words), problem


def test_what_a_running_node_holds_is_its_own() -> None:
    assert said([replace(GOOD, is_node=True, free_bytes=0, ports=frozenset({6379, 8000, 8404}))]) == []


def test_a_worker_needs_no_port_of_the_head() -> None:
    assert said([GOOD, replace(GOOD, name=WORKER, ports=frozenset({6379}))]) == []


def test_gpus_that_are_not_there_are_said() -> None:
    (problem,) = said([replace(GOOD, num_gpus=0)], device="cuda")
    assert "need 1 GPUs" in problem
    assert "nvidia-smi" in problem
    (problem,) = said([GOOD], tensor_parallel=8, replicas=2)
    assert "10.0.0.1 has 8" in problem


def test_a_shell_may_talk_before_the_probe_does() -> None:
    output = "Welcome! a=b\nprobe python=/usr/bin/python3\nprobe cores=4\nprobe gpus=\nprobe listening=1F40\n"
    machine = parse(HEAD, output + "probe free_kilobytes=1024\nprobe absent=/a=b\nprobe node=yes\n")
    assert machine == Machine(
        name=HEAD,
        python="/usr/bin/python3",
        num_cores=4,
        free_bytes=1 << 20,
        ports=frozenset({8000}),
        is_node=True,
        absent=("/a=b",),
    )


@pytest.mark.parametrize(
    ("name", "errors", "words"),
    [
        (
            HEAD,
            "me@10.0.0.1: Permission denied (publickey).",
            ["does not let me in", "ssh-copy-id", "/home/me/.ssh/key"],
        ),
        (HEAD, "@ WARNING: UNPROTECTED PRIVATE KEY FILE! @\nPermission denied", ["chmod 600 /home/me/.ssh/key"]),
        (WORKER, "ssh: connect to host 10.0.0.2: No route to host", ["from the head 10.0.0.1", "No route to host"]),
        (HEAD, "", ["ssh fails: no answer"]),
    ],
)
def test_what_ssh_says_is_explained(name: str, errors: str, words: list[str]) -> None:
    message = explain(launch(WORKER), name, errors)
    assert message.startswith(f"{name}: ")
    assert all(word in message for word in words), message


def test_the_key_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = edit_cluster_file(tmp_path / "c.yaml", key=str(tmp_path / "key"))
    (problem,) = [text for text in local_problems(LaunchFile.load(file), file) if "ssh_private_key" in text]
    assert "does not exist. Make one (ssh-keygen" in problem
    (tmp_path / "key").write_text("no key\n")
    (problem,) = [text for text in local_problems(LaunchFile.load(file), file) if "ssh_private_key" in text]
    assert "is no private key that ssh can use" in problem


def test_another_folder_than_the_projects_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = edit_cluster_file(tmp_path / "c.yaml")
    assert any("at the project's root" in problem for problem in local_problems(LaunchFile.load(file), file))


def test_what_ray_would_refuse_is_said_in_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = edit_cluster_file(tmp_path / "c.yaml")
    file.write_text(file.read_text().replace("setup_commands:", "set_up_commands:", 1))
    with pytest.raises(ConfigError, match=r"c\.yaml: top level: .*'set_up_commands' was unexpected"):
        check_schema(file)
    assert capfd.readouterr().out == ""


def test_the_autoscalers_log_is_read_from_its_last_start(tmp_path: Path) -> None:
    log = tmp_path / "monitor.out"
    assert current_part(log) == ""
    old = "2026 ERR New status: update-failed\nnanoserve: old\n"
    new = "2026 INFO x\nnanoserve: port 8404 is taken\nssh: connect to host b\nnanoserve: port 8404 is taken\n"
    log.write_text(f"{old}{RESTARTED}\n{new}")
    assert complaints(current_part(log)) == ["nanoserve: port 8404 is taken", "ssh: connect to host b"]
    assert not has_given_up(current_part(log))
    assert has_given_up(old)

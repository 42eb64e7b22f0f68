"""What checks think of readings made up here: at, above and below every border, and what they advise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import cli
from cluster.doctor.checkup import Checkup, exit_status, run_check
from cluster.doctor.clock import ClockOffset, judge_clocks, offset_of
from cluster.doctor.compiler import Compiler, judge_compiler
from cluster.doctor.disk_space import DiskSpace, judge_disks
from cluster.doctor.finding import Finding, Level, error, ok, warning
from cluster.doctor.leftovers import Leftovers, SeenProcess, is_server, judge_leftovers
from cluster.doctor.open_files import OpenFileLimit, judge_open_file_limit
from cluster.doctor.ports import PortUse, WantedPort, judge_ports
from cluster.doctor.ray_cluster import (
    RayAuthentication,
    RayCluster,
    RayNode,
    judge_authentication,
    judge_cluster,
    ray_to_join,
    read_authentication,
)
from cluster.doctor.server_health import ServerHealth, judge_server
from cluster.doctor.shared_memory import SharedMemory, judge_shared_memory
from cluster.doctor.socket_table import Process
from cluster.doctor.versions import Versions, judge_versions, read_versions
from cluster.marked_processes import MarkedProcess
from cluster.status.cluster_view import ReplicaState
from tests.cluster.status.views import replica, view

MIB, GIB = 1 << 20, 1 << 30


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level.value for finding in findings]


@pytest.mark.parametrize(
    ("total", "free", "level", "remedy"),
    [
        (24 * GIB, 24 * GIB, "ok", ""),
        (64 * MIB, 64 * MIB, "error", "--shm-size"),
        (512 * MIB, 500 * MIB, "warning", "remount,size=2G"),
        (2 * GIB, 50 * MIB, "error", "dead processes"),
        (None, None, "error", "mount -t tmpfs"),
    ],
)
def test_shared_memory(total: int | None, free: int | None, level: str, remedy: str) -> None:
    finding = judge_shared_memory(SharedMemory(path=Path("/dev/shm"), total=total, free=free))
    assert finding.level.value == level and remedy in finding.remedy


@pytest.mark.parametrize(
    ("free", "total", "is_writable", "level"),
    [
        (60 * GIB, 250 * GIB, True, "ok"),
        (10 * GIB, 250 * GIB, True, "warning"),
        (4 * GIB, 20 * GIB, True, "warning"),
        (GIB - 1, 20 * GIB, True, "error"),
        (60 * GIB, 250 * GIB, False, "error"),
    ],
)
def test_disks(free: int, total: int, is_writable: bool, level: str) -> None:
    space = DiskSpace(path=Path("/tmp"), purpose="Logs", free=free, total=total, is_writable=is_writable)
    assert levels(judge_disks([space])) == [level]


@pytest.mark.parametrize(
    ("soft", "hard", "level", "remedy"),
    [
        (65536, 65536, "ok", ""),
        (-1, -1, "ok", ""),
        (1024, 1 << 20, "warning", "ulimit -n 65536"),
        (256, 20_000, "error", "ulimit -n 20000"),
        (256, -1, "error", "ulimit -n 65536"),
        (1024, 4096, "warning", "limits.conf"),
    ],
)
def test_open_files(soft: int, hard: int, level: str, remedy: str) -> None:
    finding = judge_open_file_limit(OpenFileLimit(soft=soft, hard=hard))
    assert finding.level.value == level and remedy in finding.remedy


def test_clocks_are_off_only_for_sure() -> None:
    slow_answer = offset_of("far", sent=100.0, told=100.9, received=102.0)
    assert slow_answer.seconds == pytest.approx(-0.1) and slow_answer.uncertainty == 1.0
    assert levels(judge_clocks([slow_answer, ClockOffset(machine="b", seconds=1.2, uncertainty=1.0)])) == ["ok"]
    ahead, behind = judge_clocks(
        [ClockOffset(machine="a", seconds=60.0), ClockOffset(machine="b", seconds=-0.7), slow_answer]
    )
    assert (ahead.level, ahead.found, ahead.where) == (Level.ERROR, "Its clock is 60.0 s ahead.", "a")
    assert (behind.level, behind.found) == (Level.WARNING, "Its clock is 0.7 s behind.")
    assert "timedatectl" in ahead.remedy
    assert judge_clocks([]) == []


def test_versions() -> None:
    here = read_versions()
    assert here.is_declared and {"torch", "ray", "httpx"} <= set(here.required)
    assert "pytest" not in here.required, "extras are no need"
    assert levels(judge_versions(here)) == ["ok"]
    wrong = replace(
        here,
        python="3.9.1",
        installed=here.installed | {"torch": "2.15.0", "httpx": None},
    )
    found = {finding.found: finding for finding in judge_versions(wrong)}
    assert set(levels(list(found.values()))) == {"error"}
    assert "Python 3.9.1 does not fit >=3.11." in found
    assert "pip install 'torch<2.14,>=2.11'" in found["torch 2.15.0 does not fit <2.14,>=2.11."].remedy
    assert "httpx is not installed." in found
    bare = Versions(python="3.11.1", requires_python="", installed={}, required={}, is_declared=False)
    assert levels(judge_versions(bare)) == ["warning"]


def test_ports() -> None:
    api = WantedPort(port=8000, purpose="the API", is_needed=True)
    ray = WantedPort(port=6379, purpose="Ray's head", expected="gcs_server")
    nginx = Process(process_id=12, command="nginx: master")

    def judged(wanted: WantedPort, **known: object) -> Finding:
        (finding,) = judge_ports([PortUse(wanted=wanted, **known)])  # type: ignore[arg-type]
        return finding

    assert judged(api).level is Level.OK
    taken = judged(api, problem="Address already in use", holder=nginx)
    assert taken.level is Level.ERROR and "process 12 (nginx: master)" in taken.found and "--port" in taken.remedy
    assert "sudo ss" in judged(api, problem="Address already in use (while binding)").remedy
    assert "root's" in judged(replace(api, port=80), problem="Permission denied").remedy
    elsewhere = judged(replace(api, host="192.0.2.1"), problem="Cannot assign requested address")
    assert elsewhere.level is Level.ERROR and "--host" in elsewhere.remedy and "aken" not in elsewhere.found
    assert judged(api, problem="in use", holder=nginx, served_models=("demo",)).level is Level.OK
    assert judged(ray, problem="in use", holder=nginx).level is Level.WARNING
    assert judged(ray, problem="in use", holder=Process(process_id=1, command="/x/gcs_server --a")).level is Level.OK


def test_a_compiler_is_wanted_or_not() -> None:
    absent = Compiler(path=None, problem="g++ is not there")
    assert judge_compiler(absent, is_wanted=False).level is Level.OK
    finding = judge_compiler(absent, is_wanted=True)
    assert finding.level is Level.WARNING and "apt-get install g++" in finding.remedy
    assert judge_compiler(Compiler(path="/usr/bin/g++"), is_wanted=True).level is Level.OK


def test_rays_token(tmp_path: Path) -> None:
    unset = RayAuthentication(mode=None, has_token=False, file=tmp_path)
    assert judge_authentication(unset) == []
    (trap,) = judge_authentication(replace(unset, has_token=True))
    assert trap.level is Level.WARNING and "RAY_AUTH_MODE=disabled" in trap.remedy
    (missing,) = judge_authentication(replace(unset, mode="token"))
    assert missing.level is Level.ERROR and "get-auth-token" in missing.remedy
    assert judge_authentication(replace(unset, mode="disabled", has_token=True)) == []
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    read = read_authentication({"HOME": str(tmp_path)})
    assert (read.mode, read.has_token, read.file) == (None, True, tmp_path / ".ray" / "auth_token")
    (tmp_path / "empty").touch()
    assert not read_authentication({"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "empty")}).has_token


def test_the_cluster_of_this_machine_is_joined_as_it_was_started() -> None:
    raylet = MarkedProcess(
        process_id=1,
        command=("/x/raylet", "--gcs-address=10.0.0.1:6379"),
        environment={"RAY_AUTH_MODE": "token", "HOME": "/root"},
    )
    shell = {"HOME": "/home/me", "RAY_AUTH_MODE": "disabled"}
    as_started = ("10.0.0.1:6379", {"HOME": "/home/me", "RAY_AUTH_MODE": "token"})
    assert ray_to_join(None, raylet, shell) == as_started
    assert ray_to_join("10.0.0.1:6379", raylet, shell) == as_started
    assert ray_to_join("10.0.0.2:6379", raylet, shell) == ("10.0.0.2:6379", shell)
    assert ray_to_join(None, None, shell) == (None, shell)


def test_ray_clusters() -> None:
    node = RayNode(address="10.0.0.1", num_cpus=8, num_gpus=4)
    whole = RayCluster(address="10.0.0.1:6379", nodes=(node,))
    assert levels(judge_cluster(whole, 4)) == ["ok"]
    assert judge_cluster(whole)[0].found == "1 node with 8 CPUs and 4 GPUs."
    assert "take 8" in judge_cluster(whole, 8)[0].found
    assert levels(judge_cluster(replace(whole, num_dead=1))) == ["ok", "warning"]
    off = replace(whole, clocks=(ClockOffset(machine="10.0.0.2", seconds=9.0),))
    assert levels(judge_cluster(off)) == ["ok", "error"]
    refused = judge_cluster(replace(whole, problem="no", is_refused=True))[0]
    assert "token" in refused.found and "RAY_AUTH_TOKEN" in refused.remedy
    assert "ray start" in judge_cluster(replace(whole, problem="no answer"))[0].remedy
    assert "one version" in judge_cluster(replace(whole, problem="Version mismatch: 2.58"))[0].remedy


def test_servers() -> None:
    def judged(*replicas: object, **changes: object) -> list[Finding]:
        shown = view(*replicas, **changes)  # type: ignore[arg-type]
        return judge_server(ServerHealth(url="http://s", view=shown))

    assert levels(judged(replica("a"), replica("b"))) == ["ok"]
    assert levels(judged(replica("a"))) == ["ok", "warning"]
    assert levels(judged(replica("a", ReplicaState.FAILED, "no such file"))) == ["ok", "error", "error"]
    assert levels(judged(replica("a"), replica("b", ReplicaState.SILENT))) == ["ok", "warning", "warning"]
    assert "2 replicas had to be replaced" in judged(replica("a"), replica("b"), num_restarts=2)[1].found
    (silent,) = judge_server(ServerHealth(url="http://s", problem="Nothing answers."))
    assert silent.level is Level.ERROR and "nanoserve serve" in silent.remedy


def test_leftovers_are_those_without_a_server() -> None:
    alive, killed, empty = (Path(f"/tmp/nanoserve-{name}") for name in ("alive", "killed", "empty"))
    processes = (
        SeenProcess(process_id=1, parent=0, command="/sbin/init"),
        SeenProcess(process_id=10, parent=1, command="python /v/bin/nanoserve serve m --port 1"),
        SeenProcess(process_id=11, parent=10, command=f"gcs_server --temp-dir={alive} --x"),
        SeenProcess(process_id=12, parent=11, command=f"raylet {alive}/session"),
        SeenProcess(process_id=20, parent=1, command=f"gcs_server --temp-dir={killed} --x"),
        SeenProcess(process_id=21, parent=20, command=f"raylet {killed}/session"),
        SeenProcess(process_id=30, parent=1, command="vim /tmp/nanoserve-empty.txt"),
    )
    found = judge_leftovers(Leftovers(processes=processes, directories=(alive, killed, empty)))
    assert [(finding.level, finding.where) for finding in found] == [
        (Level.WARNING, str(killed)),
        (Level.WARNING, str(empty)),
    ]
    assert "kill 20 21" in found[0].remedy and "rm -r /tmp/nanoserve-empty" in found[1].remedy
    assert levels(judge_leftovers(Leftovers(processes=processes, directories=(alive,)))) == ["ok"]
    assert is_server(["python", "-m", "cluster.cli", "serve", "m"])
    assert not is_server(["nanoserve", "status"])
    assert is_server(["/v/bin/python", "/v/bin/nanoserve", "serve", "m"])


def test_a_check_that_fails_is_a_finding_and_stops_no_other() -> None:
    def broken() -> Finding:
        raise OSError("no such device")

    (finding,) = run_check("gpu", broken)
    assert finding.level is Level.WARNING and "OSError: no such device" in finding.found


def test_the_exit_status_is_that_of_the_worst() -> None:
    fine, odd, bad = ok("a", "b", "c"), warning("a", "b", "c", "d"), error("a", "b", "c", "d")
    assert exit_status([]) == exit_status([fine]) == 0
    assert exit_status([odd, fine]) == 1
    assert exit_status([bad, odd, fine]) == 2


def test_the_command_prints_lines_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [ok("disk", "Much [room].", "/tmp"), error("ports", "Taken.", "127.0.0.1:1", "Choose another.")]
    monkeypatch.setattr(Checkup, "findings", lambda self: iter(findings))
    plain = CliRunner().invoke(cli.app, ["doctor"])
    assert plain.exit_code == 2
    assert plain.output.splitlines() == [
        "ok       disk: Much [room].  [/tmp]",
        "ERROR    ports: Taken.  [127.0.0.1:1]",
        "         -> Choose another.",
        "1 error, 0 warnings.",
    ]
    told = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).output)
    assert told["status"] == 2
    assert told["findings"][1] == {
        "check": "ports",
        "level": "error",
        "found": "Taken.",
        "where": "127.0.0.1:1",
        "remedy": "Choose another.",
    }

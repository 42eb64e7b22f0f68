"""Prometheus and Grafana beside the head: what they are told, and that a port of somebody else's is left to them."""

import os
import shutil
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster import monitoring, node_keeper
from cluster.marked_processes import MARK, MarkedProcess
from cluster.monitoring import companions, is_free, point_prometheus_at, prometheus_configuration
from tests.cluster.serve_command import ROOT


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a configuration, and both programs on the PATH."""
    for name in ("prometheus", "grafana-server"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    (tmp_path / "state").mkdir()
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=lambda *_: ["models", "demo_model", "profiles"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_both_listen_on_loopback_and_keep_their_data_apart(programs: Path) -> None:
    prometheus, grafana = companions(programs / "state", programs)
    assert f"--config.file={programs}/state/prometheus.yml" in prometheus.command
    assert "--web.listen-address=127.0.0.1:9090" in prometheus.command
    assert grafana.environment["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    provisioning = programs / "state" / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "nanoserve.yaml").read_text())["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    folder = yaml.safe_load((provisioning / "dashboards" / "nanoserve.yaml").read_text())["providers"][0]
    assert folder["options"]["path"] == str(programs / "dashboards")
    password = Path(grafana.environment["GF_SECURITY_ADMIN_PASSWORD__FILE"])
    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    before = password.read_text()
    companions(programs / "state", programs)
    assert password.read_text() == before


def test_prometheus_reads_the_api_and_ray_where_they_are(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    shipped = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    ours, ray = yaml.safe_load(prometheus_configuration(programs, "http://10.0.0.1:8001"))["scrape_configs"]
    assert ours["http_sd_configs"] == [{"url": "http://10.0.0.1:8001/metrics/targets", "refresh_interval": "5s"}]
    assert ray["file_sd_configs"][0]["files"] == ["/elsewhere/ray/prom_metrics_service_discovery.json"]
    monkeypatch.delenv("RAY_TMPDIR")
    unchanged = yaml.safe_load(prometheus_configuration(programs))
    assert unchanged["rule_files"] == [str(programs / "deploy" / name) for name in shipped["rule_files"]]
    assert unchanged | {"rule_files": shipped["rule_files"]} == shipped


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: apt install prometheus)")
def test_prometheus_takes_what_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "prometheus.yml"
    file.write_text(prometheus_configuration(ROOT, "http://127.0.0.1:8001"))
    outcome = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True)
    assert outcome.returncode == 0 and "1 rule files found" in outcome.stdout, outcome.stdout + outcome.stderr


def test_a_deployment_elsewhere_is_followed(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    processes = [
        MarkedProcess(process_id=number, command=(program,), environment={MARK: "head-x"})
        for number, program in ((7, "/usr/bin/prometheus"), (8, "raylet"))
    ]
    monkeypatch.setattr(monitoring, "marked_processes", lambda: processes)
    monkeypatch.setattr(os, "kill", lambda *signalled: told.append(signalled))
    state = programs / "state"
    point_prometheus_at("http://127.0.0.1:8001", state, programs)
    assert not (state / "prometheus.yml").exists(), "none of ours runs here"
    companions(state, programs)
    point_prometheus_at("http://127.0.0.1:8000", state, programs)
    assert told == [], "it is there already"
    point_prometheus_at("http://127.0.0.1:8001", state, programs)
    assert told == [(7, signal.SIGHUP)]
    companions(state, programs)
    assert "127.0.0.1:8001" in (state / "prometheus.yml").read_text(), "a keeper that starts anew keeps it"


def test_nothing_is_started_where_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert companions(tmp_path, tmp_path) == []


def test_a_taken_port_is_left_to_who_has_it(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(node_keeper, "ROOT", programs)
    monkeypatch.setattr(node_keeper, "marked_processes", list)
    monkeypatch.setattr(node_keeper, "start_apart", lambda *command: started.append(command))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert not is_free(port)
        monkeypatch.setattr(monitoring, "PROMETHEUS_PORT", port)
        monkeypatch.setattr(monitoring, "GRAFANA_PORT", port)
        head, worker = (
            MarkedProcess(process_id=1, command=("raylet",), environment={MARK: mark})
            for mark in ("head-x", "worker-x")
        )
        lines = node_keeper.start_keeper(programs / "state", head)
        assert node_keeper.start_keeper(programs / "state", worker) == []
    assert [line.split(",")[0] for line in lines] == ["Prometheus is not started", "Grafana is not started"]
    assert len(started) == 2, "a machine has its keeper also where it runs neither"

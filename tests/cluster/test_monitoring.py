"""Prometheus and Grafana beside the head: what they are told, and that a port of somebody else's is left to them."""

import socket
import stat
from pathlib import Path

import pytest
import yaml

from cluster import monitoring, node_keeper
from cluster.marked_processes import MARK, MarkedProcess
from cluster.monitoring import companions, is_free


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a configuration, and both programs on the PATH."""
    for name in ("prometheus", "grafana-server"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "prometheus.yml").write_text("scrape_configs: []\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_both_listen_on_loopback_and_keep_their_data_apart(programs: Path) -> None:
    prometheus, grafana = companions(programs / "state", programs)
    assert f"--config.file={programs}/deploy/prometheus.yml" in prometheus.command
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

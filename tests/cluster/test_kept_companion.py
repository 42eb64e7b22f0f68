"""A program beside Ray is started, started again with growing pauses, and ended; its log says so."""

import time
from pathlib import Path

import pytest

from cluster.kept_companion import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, STEADY_SECONDS, KeptCompanion
from cluster.monitoring import Companion
from tests.cluster.serve_command import free_port, until

PATIENCE = 60.0


class Kept:
    """A shell script in the place of Prometheus, and a clock that is set by hand."""

    def __init__(self, directory: Path, script: str) -> None:
        self.directory = directory
        command = ("/bin/sh", "-c", f"echo start $WHO >> starts; {script}")
        self.port = free_port()
        companion = Companion(name="Prometheus", port=self.port, command=command, environment={"WHO": "me"})
        self.kept = KeptCompanion(companion, directory)
        self.now = 1000.0

    @property
    def starts(self) -> list[str]:
        file = self.directory / "starts"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def log(self) -> list[str]:
        file = self.directory / "prometheus.log"
        return [line for line in file.read_text().splitlines() if "nanoserve:" in line] if file.exists() else []

    def look(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.kept.look(self.now)

    def until_ended(self) -> None:
        """Look, while the clock stands still, until the end is noticed."""
        number = len(self.log)

        def is_noticed() -> bool:
            self.look()
            return len(self.log) > number

        until(is_noticed, PATIENCE, "the end of the program to be noticed")


def test_one_that_crashes_is_started_again_after_growing_pauses(tmp_path: Path) -> None:
    crashing = Kept(tmp_path, "exit 3")
    crashing.look()
    crashing.until_ended()
    assert crashing.starts == ["start me"]
    assert crashing.log[-1].endswith("nanoserve: Prometheus ended with status 3; trying again in 1 s.")
    pause = FIRST_PAUSE_SECONDS
    for number in range(2, 5):
        crashing.look(pause - 0.01)
        assert len(crashing.starts) == number - 1, "not before the pause is over"
        crashing.look(0.01)
        crashing.until_ended()
        assert len(crashing.starts) == number
        pause *= 2
        assert crashing.log[-1].endswith(f"trying again in {pause:.0f} s.")


def test_the_pause_has_a_limit_and_is_short_again_for_one_that_was_well(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "while [ ! -e stop ]; do sleep 0.01; done; rm stop; exit 0")
    kept.kept._pause = LONGEST_PAUSE_SECONDS
    kept.look()
    (tmp_path / "stop").touch()
    kept.until_ended()
    assert kept.log[-1].endswith(f"trying again in {LONGEST_PAUSE_SECONDS:.0f} s.")
    kept.look(LONGEST_PAUSE_SECONDS)
    kept.look(STEADY_SECONDS)
    (tmp_path / "stop").touch()
    kept.until_ended()
    assert kept.log[-1].endswith("ended with status 0; trying again in 1 s.")


def test_one_that_cannot_be_started_is_said(tmp_path: Path) -> None:
    absent = Companion(name="Grafana", port=free_port(), command=(str(tmp_path / "nowhere"),))
    KeptCompanion(absent, tmp_path).look(0.0)
    assert "Grafana cannot be started: " in (tmp_path / "grafana.log").read_text()


def test_a_port_that_somebody_took_meanwhile_is_left_to_him(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(tmp_path, "exit 1")
    monkeypatch.setattr("cluster.kept_companion.is_free", lambda port: port != kept.port)
    kept.look()
    assert kept.starts == [] and f"something else listens on port {kept.port}" in kept.log[0]


def test_it_is_ended_with_ray(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "exec sleep 600")
    kept.look()
    until(lambda: kept.starts, PATIENCE, "the start")
    process = kept.kept._process
    assert process is not None
    began = time.monotonic()
    kept.kept.end()
    assert process.returncode is not None and time.monotonic() - began < PATIENCE
    kept.kept.end()

"""The folder of our state on a machine is its user's alone, or refused."""

import os
import stat
from pathlib import Path

import pytest

from cluster.state_directory import state_directory
from engine import ConfigError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it would be."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path / f"nanoserve-{os.getuid()}"


def test_it_is_made_once_and_is_ones_own(place: Path) -> None:
    previous = os.umask(0)
    try:
        assert state_directory() == place
    finally:
        os.umask(previous)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    (place / "kept").touch()
    assert state_directory() == place
    assert (place / "kept").exists()


def test_it_does_not_lie_where_ray_lets_everybody_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    monkeypatch.setattr(Path, "mkdir", lambda self, **_: None)
    with pytest.raises(ConfigError, match=r"^/tmp/nanoserve-4000000000 cannot be made: No such file"):
        state_directory()


def test_a_link_is_refused(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    place.symlink_to(target)
    with pytest.raises(ConfigError, match=r"is a link, .* set RAY_TMPDIR"):
        state_directory()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o701])
def test_one_that_is_open_is_refused_and_left_as_it_is(place: Path, mode: int) -> None:
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(ConfigError, match=rf"is open to other users \(mode {mode:04o}\)"):
        state_directory()
    assert stat.S_IMODE(place.stat().st_mode) == mode


def test_somebody_elses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = os.getuid() + 1
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / f"nanoserve-{stranger}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    with pytest.raises(ConfigError, match=rf"belongs to user {stranger - 1}, not to you"):
        state_directory()


def test_a_file_or_a_place_that_is_not_there_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.touch()
    with pytest.raises(ConfigError, match="cannot be made: File exists"):
        state_directory()
    monkeypatch.setenv("RAY_TMPDIR", str(place.parent / "nowhere"))
    with pytest.raises(ConfigError, match="cannot be made: No such file"):
        state_directory()

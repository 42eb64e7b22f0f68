"""Folders of groups that were killed go when the next one is made; those in use, or of others, stay."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.rank_folder import RankFolder

_HOLDER = """
from cluster.rank_folder import RankFolder
folder = RankFolder()
(folder.path / "engine").touch()
print(folder.path, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def holder() -> tuple["subprocess.Popen[str]", Path]:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_of_a_killed_owner_goes_and_that_of_a_living_one_stays(place: Path) -> None:
    living, held = holder()
    killed, left = holder()
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    folder = RankFolder()
    assert held.is_dir() and not left.exists()
    assert folder.path.stat().st_mode & 0o077 == 0
    folder.remove()
    assert set(place.iterdir()) == {held}
    living.communicate("")


def test_what_is_no_folder_of_ours_stays(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "elsewhere/file").touch()
    (place / "nanoserve-ranks-link").symlink_to(place / "elsewhere")
    (place / "nanoserve-ranks-empty").mkdir()  # somebody is about to lock it
    RankFolder().remove()
    assert (place / "elsewhere/file").exists() and (place / "nanoserve-ranks-empty").is_dir()
    if os.getuid() == 0:
        other = place / "nanoserve-ranks-other"
        other.mkdir()
        (other / "engine").touch()
        os.chown(other, 12345, 12345)
        RankFolder().remove()
        assert other.is_dir()

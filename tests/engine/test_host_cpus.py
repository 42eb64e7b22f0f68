"""The CPUs at hand: those of the affinity, and no more than the quota of any control group around the process."""

import os
from pathlib import Path

import pytest

from engine import host_cpus
from engine.host_cpus import num_usable_cpus


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 CPUs whose control groups are made up here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(host_cpus, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(host_cpus, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_a_quota_it_is_the_affinity(groups: Path) -> None:
    assert num_usable_cpus() == 64, "no control groups at all"
    write(groups / "own", "0::/user.slice/a.scope\n")
    write(groups / "user.slice/a.scope/cpu.max", "max 100000\n")
    assert num_usable_cpus() == 64


@pytest.mark.parametrize(("quota", "expected"), [(400_000, 4), (250_000, 2), (50_000, 1), (12_800_000, 64)])
def test_a_containers_quota(groups: Path, quota: int, expected: int) -> None:
    write(groups / "own", "0::/\n")
    write(groups / "cpu.max", f"{quota} 100000\n")
    assert num_usable_cpus() == expected


def test_the_smallest_quota_around_it_counts(groups: Path) -> None:
    write(groups / "own", "0::/pods/one/container\n")
    write(groups / "pods/one/container/cpu.max", "max 100000\n")
    write(groups / "pods/one/cpu.max", "300000 100000\n")
    write(groups / "pods/cpu.max", "800000 100000\n")
    assert num_usable_cpus() == 3


def test_the_first_version_of_control_groups(groups: Path) -> None:
    write(groups / "own", "5:cpuset:/\n4:cpu,cpuacct:/docker/x\n0::/\n")
    write(groups / "cpu/docker/x/cpu.cfs_quota_us", "-1\n")
    write(groups / "cpu/docker/x/cpu.cfs_period_us", "100000\n")
    assert num_usable_cpus() == 64
    write(groups / "cpu/docker/x/cpu.cfs_quota_us", "600000\n")
    assert num_usable_cpus() == 6


def test_of_this_process() -> None:
    assert 1 <= num_usable_cpus() <= len(os.sched_getaffinity(0))
    first = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {first})
    try:
        assert num_usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)

"""Reports of replicas' starts, in a key-value store made up here: as many as replicas, and the lost ones counted."""

import pytest

from cluster import startup
from cluster.startup import StartupReport, clear_reports, read_reports


class Store:
    """What of Ray's `internal_kv` is used."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def _internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: str) -> None:
        self.values[key] = value

    def _internal_kv_get(self, key: bytes, namespace: str) -> bytes | None:
        return self.values.get(key)

    def _internal_kv_list(self, prefix: str, namespace: str) -> list[bytes]:
        return [key for key in self.values if key.startswith(prefix.encode())]

    def _internal_kv_del(self, key: bytes, namespace: str) -> None:
        self.values.pop(key, None)


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of replicas that have a process; to be changed."""
    replicas: set[str] = set()
    monkeypatch.setattr(startup, "internal_kv", Store())
    monkeypatch.setattr(startup, "_living_replicas", lambda: replicas)
    return replicas


def begun(living: set[str], replica_id: str) -> StartupReport:
    living.add(replica_id)
    report = StartupReport(replica_id)
    report.ready(1.0)
    return report


def restarts() -> int:
    return read_reports().num_lost


def known() -> set[str]:
    return set(read_reports().by_replica)


def test_scaling_up_and_down_is_no_restart_and_leaves_nothing(living: set[str]) -> None:
    reports = {name: begun(living, name) for name in "abc"}
    assert (known(), restarts()) == ({"a", "b", "c"}, 0)
    reports["b"].withdraw()
    living.remove("b")
    begun(living, "d")
    assert (known(), restarts()) == ({"a", "c", "d"}, 0)


def test_a_replica_that_died_is_counted_by_the_next_one_and_forgotten(living: set[str]) -> None:
    for number in range(20):
        begun(living, f"r{number}")
        assert (known(), restarts()) == ({f"r{number}"}, number)
        living.remove(f"r{number}")


def test_one_that_lost_its_engine_is_counted_while_its_process_ends(living: set[str]) -> None:
    kept, broken = begun(living, "kept"), begun(living, "broken")
    broken.lost()
    assert read_reports().by_replica["broken"].is_lost
    begun(living, "next")
    assert (known(), restarts()) == ({"kept", "next"}, 1)
    begun(living, "last").withdraw()
    kept.withdraw()
    assert (known(), restarts()) == ({"next"}, 1)


def test_the_count_outlives_those_who_counted(living: set[str]) -> None:
    first = begun(living, "first")
    begun(living, "dies")
    living.remove("dies")
    begun(living, "next").withdraw()
    living.remove("next")
    assert (known(), restarts()) == ({"first"}, 1)
    first.lost()
    begun(living, "another")
    assert (known(), restarts()) == ({"another"}, 2)


def test_two_that_begin_at_once_count_the_same_ones(living: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class BusyStore(Store):
        """Another replica begins while one reads the report of the lost one."""

        def _internal_kv_get(self, key: bytes, namespace: str) -> bytes | None:
            value = super()._internal_kv_get(key, namespace)
            if key.endswith(b"dies") and "other" not in living and "dies" not in living:
                begun(living, "other")
            return value

    monkeypatch.setattr(startup, "internal_kv", BusyStore())
    begun(living, "dies")
    living.remove("dies")
    begun(living, "next")
    assert (known(), restarts()) == ({"other", "next"}, 1)


def test_a_start_that_failed_stays_to_be_read_until_the_next(living: set[str]) -> None:
    living.add("a")
    StartupReport("a").failed(ValueError("no room"))
    living.remove("a")
    assert str(read_reports().by_replica["a"].error) == "no room"
    begun(living, "b")
    assert (known(), restarts()) == ({"b"}, 1)


def test_a_deployment_begins_at_nothing(living: set[str]) -> None:
    begun(living, "a")
    living.clear()
    begun(living, "b")
    clear_reports()
    assert (known(), restarts()) == (set(), 0)

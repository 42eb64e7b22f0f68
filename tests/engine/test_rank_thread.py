"""The rank's thread: in order, errors to who asked, everything that was asked for before the end."""

import threading

import pytest

from engine.rank_thread import RankThread


def test_functions_run_in_order_on_one_thread_of_its_own() -> None:
    thread = RankThread("rank under test")
    seen: list[tuple[int, str]] = []
    for number in range(100):
        thread.post(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc]
    assert thread.call(lambda: len(seen)) == 100
    assert seen == [(number, "rank under test") for number in range(100)]
    thread.close()


def test_errors_reach_the_caller_and_the_thread_goes_on() -> None:
    thread = RankThread("rank under test")
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda: 5) == 5
    thread.close()


def test_close_waits_for_what_was_asked_for() -> None:
    thread = RankThread("rank under test")
    gate, done = threading.Event(), threading.Event()

    def wait() -> None:
        gate.wait()
        done.set()

    thread.post(wait)
    threading.Timer(0.05, gate.set).start()
    thread.close()
    assert done.is_set()


def test_nothing_is_asked_of_a_closed_thread() -> None:
    thread = RankThread("rank under test")
    thread.close()
    with pytest.raises(RuntimeError, match="was closed"):
        thread.post(lambda: None)
    with pytest.raises(RuntimeError, match="was closed"):
        thread.call(lambda: 5)

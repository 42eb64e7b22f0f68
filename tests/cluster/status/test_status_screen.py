"""The lines of `nanoserve status`: what they say, and that they fit any terminal."""

import pytest
from rich.console import Console

from cluster.status.cluster_view import ClusterView, ReplicaState
from cluster.status.load_summary import load_of
from cluster.status.status_screen import LoadHistory, bar, draw_status, seconds, sparkline
from tests.cluster.status.views import replica, report, view

URL = "http://127.0.0.1:8000"


def lines(shown: ClusterView, width: int = 80, height: int = 24, history: LoadHistory | None = None) -> list[str]:
    text = draw_status(shown, URL, "12:34:56", width, height, history or LoadHistory())
    console = Console(width=max(width, 40), color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(text)
    return captured.get().splitlines()


def test_it_says_what_is_known() -> None:
    text = "\n".join(lines(view(replica("alpha"), replica("beta", num_running=7))))
    assert "nanoserve demo at http://127.0.0.1:8000" in text
    assert "2 of 2 replicas ready, 0 restarts" in text
    assert "6 running, 2 waiting" in text
    assert "25.0 %" in text
    assert "35.7 ms p50, 1.20 s p99 (25 calls in 60 s)" in text
    assert "Per token           -  no call in 60 s" in text
    assert "40.0 % of 2,000 tokens per second" in text
    assert "no requests 30.0 %, exposed attention 20.0 %" in text
    (beta,) = [line for line in text.splitlines() if line.startswith("beta")]
    assert beta.split()[1:9] == ["ready", "2", "7", "1", "25%", "50.0", "250", "40.0%"]


def test_what_is_wrong_is_said() -> None:
    shown = view(
        replica("a"),
        replica("b", ReplicaState.STARTING, "43 % of its weights read"),
        replica("c", ReplicaState.FAILED, "config.json\nis \x1b[31mmissing"),
        num_restarts=1,
    )
    text = "\n".join(lines(shown))
    assert "1 of 2 replicas ready, 1 restart," in text
    assert "b       starting   43 % of its weights read" in text
    assert "config.json is" in text and "\x1b" not in text, "what a server says moves no cursor"
    assert "No replica is there." in "\n".join(lines(view()))
    hostile = view(replica("a"), version="1\x1b[2J")
    assert "\x1b" not in "\n".join(lines(hostile)), "nor does its version"


def test_without_an_optimum_it_says_so() -> None:
    unknown = report(waterfall=None)
    text = "\n".join(lines(view(replica("a", waterfall=None), total=load_of([unknown]))))
    assert "Optimum       unknown: no GEMM peak was measured" in text
    assert "Lost to" not in text


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 200])
@pytest.mark.parametrize("height", [5, 24, 60])
def test_it_fits(width: int, height: int) -> None:
    history = LoadHistory()
    shown = view(*(replica(f"replica-{number:012}") for number in range(40)), models=("a-long-name" * 9,))
    for _ in range(100):
        history.add(shown)
    drawn = lines(shown, width, height, history)
    assert max(map(len, drawn)) <= max(40, width)
    assert len(drawn) <= max(height, 17)
    if height == 24:
        assert "more" in drawn[-1]


def test_small_drawings() -> None:
    assert sparkline([0, 5, 10], 10) == "▁▅█"
    assert sparkline([1, 2, 10], 2) == "▂█"
    assert sparkline([0, 0], 10) == "▁▁"
    assert sparkline([], 10) == sparkline([1, 2], 0) == ""
    assert bar(0.5, 4) == "██░░"
    assert bar(7.0, 4) == "████"
    assert [seconds(value) for value in (0.00449, 0.0357, 0.227, 1.234)] == ["4.49 ms", "35.7 ms", "227 ms", "1.23 s"]

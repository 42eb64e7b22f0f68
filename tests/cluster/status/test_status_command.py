"""`nanoserve status`: once where nobody watches, and live it says since when the server is silent."""

import json
import time

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import cli
from cluster.status import status_command
from cluster.status.cluster_client import ClusterClient, NoAnswerError
from cluster.status.cluster_view import ClusterView
from cluster.status.status_command import StatusDisplay
from tests.cluster.serve_command import free_port
from tests.cluster.status.views import replica, view

VIEW = view(replica("a"), replica("b"))


def client(answer: httpx.Response | Exception) -> ClusterClient:
    def respond(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://server:1/cluster"
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ClusterClient("http://server:1/v1/", httpx.MockTransport(respond))


def test_the_answer_is_read() -> None:
    with client(httpx.Response(200, content=VIEW.model_dump_json())) as asked:
        assert asked.view() == VIEW


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.ConnectError("refused"), "Nothing answers at http://server:1: refused."),
        (httpx.ReadTimeout("slow"), "http://server:1 does not answer within 5 s."),
        (httpx.Response(404), "status 404; is it nanoserve"),
        (httpx.Response(502), "status 502."),
        (httpx.Response(200, text="<html>"), "is not what nanoserve says"),
        (httpx.Response(200, json={"object": "list"}), "is not what nanoserve says"),
    ],
)
def test_no_answer_has_a_reason(answer: httpx.Response | Exception, message: str) -> None:
    with client(answer) as asked, pytest.raises(NoAnswerError, match=r".") as raised:
        asked.view()
    assert message in str(raised.value)


def test_where_nobody_watches_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClusterClient, "view", lambda self: VIEW)
    plain = CliRunner().invoke(cli.app, ["status"])
    assert plain.exit_code == 0
    assert "2 of 2 replicas ready" in plain.output and "\x1b" not in plain.output
    as_json = CliRunner().invoke(cli.app, ["status", "--json"])
    assert ClusterView.model_validate(json.loads(as_json.output)) == VIEW


def test_an_absent_server_is_status_1() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    outcome = CliRunner().invoke(cli.app, ["status", "--once", "--url", url])
    assert outcome.exit_code == 1
    assert f"Nothing answers at {url}" in outcome.stderr
    assert not outcome.stdout
    assert CliRunner().invoke(cli.app, ["status", "--once", "--url", "nonsense"]).exit_code == 1


def test_silence_is_told_with_its_length_and_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    console = Console(width=80, height=24, color_system=None)
    answers: list[httpx.Response] = []

    def respond(request: httpx.Request) -> httpx.Response:
        if not answers:
            raise httpx.ConnectError("refused")
        return answers.pop()

    display = StatusDisplay(ClusterClient("http://server:1", httpx.MockTransport(respond)), console)

    def shown() -> str:
        with console.capture() as captured:
            console.print(display.picture(now))
        return captured.get()

    display.look()
    now += 7
    display.look()
    assert f"No answer since {status_command.clock(1000.0)} (7 s). Nothing answers at http://server:1" in shown()
    answers.append(httpx.Response(200, content=VIEW.model_dump_json()))
    display.look()
    assert "No answer" not in shown() and "2 of 2 replicas ready" in shown()
    now += 60
    display.look()
    assert "(0 s)" in shown() and "2 of 2 replicas ready" in shown(), "the last numbers stay"

"""The routes for people, over a real socket: the page and its files, the JSON, the picture; the API is as it was."""

import asyncio
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import httpx
import pytest

from cluster.status import step_picture
from cluster.status.cluster_view import ClusterView
from cluster.status.routes import FILES, WEB
from cluster.step_recorder import StepRecorder
from engine import EngineDeadError, RecordedStep
from tests.cluster.test_ingress import Served, completion, served, tokenizer

__all__ = ["served", "tokenizer"]  # fixtures
Pair = tuple[Served, httpx.AsyncClient]


class _Links(HTMLParser):
    """What a page loads or leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [value for name in ("src", "href") if (value := given.get(name))]
        self.inline += sum(name == "style" or name.startswith("on") for name in given)
        self.inline += tag == "style" or (tag == "script" and "src" not in given)


class _Ranks:
    """One rank that records whatever step it is given."""

    def __init__(self) -> None:
        self.death: EngineDeadError | None = None
        self.pids = {0: 4711}
        self.recorder = StepRecorder(1)

    def watch(self) -> None:
        pass

    def step(self, number: int) -> None:
        if self.recorder.begins(number):
            self.recorder.take(
                RecordedStep(
                    rank=0, step=number, plan="p", num_tokens=1, num_decodes=1, began=0, seconds=0.1, events=()
                )
            )


@pytest.fixture
async def stepping(served: Pair) -> AsyncIterator[tuple[Served, httpx.AsyncClient, _Ranks]]:
    made, client = served
    made.replica.host._ranks = ranks = _Ranks()
    yield made, client, ranks


async def test_the_page_and_its_files_come_from_here_alone(served: Pair) -> None:
    _, client = served
    page = await client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    links = _Links()
    links.feed(page.text)
    assert links.inline == 0, "the policy allows nothing inline"
    assert {"/web/page.css", "/web/page.js", "/web/icon.svg", "/cluster"} <= set(links.found)
    for link in links.found:
        assert (await client.get(link)).status_code == 200, link
    for path, (_, media_type) in FILES.items():
        answer = await client.get(path)
        assert answer.headers["content-type"] == media_type
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", ""), "nothing comes from elsewhere"
    assert sorted(file.name for file in WEB.iterdir()) == sorted(name for name, _ in FILES.values())
    assert "innerHTML" not in (WEB / "page.js").read_text()


async def test_nothing_else_is_taken_from_the_api(served: Pair) -> None:
    _, client = served
    for path in ("/web/", "/web/page.py", "/web/%2e%2e/cli.py", "/page.css", "/index.html", "/timeline"):
        answer = await client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "unknown_url"
    for path in ("/", "/cluster", "/timeline.svg"):
        assert (await client.post(path)).json()["error"]["code"] == "method_not_allowed"


async def test_the_cluster_as_json(served: Pair) -> None:
    made, client = served
    assert (await client.post("/v1/completions", json=completion())).status_code == 200
    answer = await client.get("/cluster")
    assert answer.headers["cache-control"] == "no-store"
    view = ClusterView.model_validate_json(answer.content)
    assert (view.models, view.num_wanted, view.num_ready) == (("m", "alias"), 1, 1)
    assert view.ingress.id == "i1" and view.ingress.num_ingresses == 1
    first = view.ingress.time_to_first_token
    assert first is not None and first.num_calls == 1 and 0 < first.p50_seconds == first.p99_seconds < 60
    assert view.ingress.time_per_output_token is not None
    (replica,) = view.replicas
    assert (replica.id, replica.state, replica.node) == ("a", "ready", "127.0.0.1")
    assert replica.load is not None and replica.load.num_running == 0
    made.replica.fail_with = ConnectionResetError("gone")
    await asyncio.sleep(0.6)
    view = ClusterView.model_validate_json((await client.get("/cluster")).content)
    assert view.num_ready == 0 and view.replicas[0].state in {"silent", "connecting"}


async def test_an_idle_replica_says_so_in_the_picture(
    stepping: tuple[Served, httpx.AsyncClient, _Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.engine_host.STEP_SECONDS", 0.01)
    _, client, _ = stepping
    answer = await client.get("/timeline.svg")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/svg+xml"
    assert "Idle: no step ran." in answer.text
    ElementTree.fromstring(answer.text)


async def test_a_step_is_recorded_once_for_all_and_not_again_too_soon(
    stepping: tuple[Served, httpx.AsyncClient, _Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, ranks = stepping

    async def work() -> None:
        number = 0
        while True:
            ranks.step(number := number + 1)
            await asyncio.sleep(0.005)

    working = asyncio.create_task(work())
    answers = await asyncio.gather(*(client.get("/timeline.svg") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert "m, replica a" in answers[0].text and "plan p" in answers[0].text
    assert (await client.get("/timeline.svg")).text == answers[0].text
    monkeypatch.setattr(step_picture, "PAUSE_SECONDS", 0.0)
    assert (await client.get("/timeline.svg")).text != answers[0].text
    working.cancel()


async def test_without_a_replica_there_is_no_picture(served: Pair) -> None:
    made, client = served
    made.dispatcher.set_replicas(frozenset())
    answer = await client.get("/timeline.svg")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable"
    view = ClusterView.model_validate_json((await client.get("/cluster")).content)
    assert view.num_ready == 0 and view.total.percent_of_optimal is None

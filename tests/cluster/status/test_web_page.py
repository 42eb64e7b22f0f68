"""The page in a headless Chromium, before a server made up here: hostile names stay text, silence is told."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.status.cluster_view import ClusterView, ReplicaState
from cluster.status.routes import FILES, WEB
from tests.cluster.status.headless_browser import HeadlessBrowser, chromium
from tests.cluster.status.views import replica, view

PROGRAM = chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium to look at the page with"),
]
SECONDS = 60.0
MARKUP = "<img src=x onerror=document.title='taken'>"


class MadeUpServer:
    """The page's files, and whatever view of a cluster it is given; without one it answers with status 500."""

    def __init__(self) -> None:
        self.view: ClusterView | None = None
        made = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, kind, body = made.answer(self.path.partition("?")[0])
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        if path in FILES:
            name, kind = FILES[path]
            return 200, kind, (WEB / name).read_bytes()
        if path == "/cluster" and self.view is not None:
            return 200, "application/json", self.view.model_dump_json().encode()
        return 500, "application/json", b"{}"


@pytest.fixture
def server() -> Iterator[MadeUpServer]:
    made = MadeUpServer()
    thread = threading.Thread(target=made.http.serve_forever)
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


async def test_names_are_text_and_silence_is_told(server: MadeUpServer, tmp_path: Path) -> None:
    assert PROGRAM is not None
    server.view = view(
        replica(MARKUP),
        replica("b", ReplicaState.FAILED, f"no file {MARKUP}"),
        models=(MARKUP,),
        version=MARKUP,
        num_restarts=1,
    )
    text = "document.body.innerText"
    async with HeadlessBrowser.started(PROGRAM, tmp_path / "profile") as browser:
        await browser.look(width=390)
        await browser.open(f"http://127.0.0.1:{server.http.server_port}/")
        await browser.until(f"{text}.includes('1 of 2 replicas ready, 1 restart;')", SECONDS)
        await browser.until(f"{text}.includes('No step could be recorded')", SECONDS)  # this server draws none
        assert await browser.value("document.getElementById('timeline').offsetHeight") == 0, "nor is a broken one shown"
        assert await browser.value("document.querySelectorAll('img[src=x]').length") == 0
        assert await browser.value("document.title") == f"{MARKUP} - nanoserve"
        shown = await browser.value(text)
        assert f"no file {MARKUP}" in shown
        assert "40.0 % of 1,000 tokens per second" in shown and "exposed attention" in shown
        assert await browser.value("document.documentElement.scrollWidth") <= 390
        server.view = None
        await browser.until(f"{text}.includes('No answer since')", SECONDS)
        assert "status 500" in await browser.value(text) and "40.0 % of" in await browser.value(text)
        server.view = view(replica("a"), replica("b"))
        await browser.until(f"!{text}.includes('No answer since') && {text}.includes('2 of 2')", SECONDS)

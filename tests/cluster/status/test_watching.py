"""A real server under load, watched as people do: `nanoserve status` in tmux, and the page in a headless Chromium."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
from tests.cluster.serve_command import ROOT, Command, until
from tests.cluster.status.headless_browser import HeadlessBrowser, chromium

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SECONDS = 120.0
OPTIONS = "--tensor-parallel 2 --replicas 1 --threads 1 --cache 8MiB --name tiny --device cpu --plan-seconds 0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    checkpoint = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(checkpoint, sized_config(Architecture.LLAMA))
    command = Command(tmp_path_factory.mktemp("server"), checkpoint, *OPTIONS.split())
    try:
        command.wait_ready()
        yield command
    finally:
        command.close()


@pytest.fixture
def load(server: Command) -> Iterator[None]:
    """Two clients that always wait for an answer."""
    is_over = threading.Event()

    def ask() -> None:
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True}
        with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
            while not is_over.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    client.post("/v1/completions", json=body)
                is_over.wait(0.01)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    yield
    is_over.set()
    for client in clients:
        client.join()


class Terminal:
    """`nanoserve status` in a tmux of its own, 80 columns wide."""

    def __init__(self, directory: Path, url: str) -> None:
        self._tmux = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]
        status = f"{sys.executable} -m cluster.cli status --url {url}; echo ended with $?; sleep 600"
        self._run("new-session", "-d", "-x", "80", "-y", "24", "-s", "s", "-c", str(ROOT), status)

    def _run(self, *command: str) -> str:
        environment = os.environ | {"LC_ALL": "C.UTF-8"}
        outcome = subprocess.run(
            [*self._tmux, *command], env=environment, capture_output=True, text=True, check=True, encoding="utf-8"
        )
        return outcome.stdout

    @property
    def screen(self) -> str:
        return self._run("capture-pane", "-p", "-t", "s")

    def wait_for(self, pattern: str) -> str:
        until(lambda: re.search(pattern, self.screen), SECONDS, f"{pattern!r} in\n{self.screen}")
        return self.screen

    def interrupt(self) -> None:
        self._run("send-keys", "-t", "s", "C-c")

    def close(self) -> None:
        self._run("kill-server")


@pytest.mark.skipif(chromium() is None, reason="there is no Chromium to look at the page with")
@pytest.mark.usefixtures("load")
async def test_the_page_shows_the_load_and_a_step(server: Command, tmp_path: Path) -> None:
    program = chromium()
    assert program is not None
    async with HeadlessBrowser.started(program, tmp_path / "profile") as browser:
        await browser.look()
        await browser.open(f"http://127.0.0.1:{server.port}/")
        await browser.until("document.getElementById('summary')?.textContent.startsWith('1 of 1 replicas')", SECONDS)
        await browser.until("document.querySelectorAll('#replicas tr').length === 1", SECONDS)
        tokens = "parseFloat(document.querySelector('#tiles dd').textContent.replace(',', ''))"
        await browser.until(f"{tokens} > 0", SECONDS)
        await browser.until("document.querySelector('.spark').getAttribute('points').split(' ').length > 3", SECONDS)
        # A replica that was idle when the page came says so; asked again, it records a step.
        async with asyncio.timeout(SECONDS):
            while "rank 1 network" not in await asyncio.to_thread(_timeline, server):
                await asyncio.sleep(1)
        await browser.value("document.getElementById('record').click()")
        await browser.until("!document.getElementById('record').disabled", SECONDS)
        assert await browser.value("document.getElementById('timeline').naturalHeight") > 150
        light = await browser.picture()
        await browser.look(width=390, is_dark=True)
        assert await browser.value("document.documentElement.scrollWidth") <= 390, "a phone need not scroll sideways"
        assert light.startswith(b"\x89PNG") and light != await browser.picture()
        assert browser.complaints == []


def _timeline(server: Command) -> str:
    return httpx.get(f"http://127.0.0.1:{server.port}/timeline.svg", timeout=30).text


def test_the_doctor_knows_a_server_that_is_well(server: Command) -> None:
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "cluster.cli", "doctor", "--json", "--url", url, "--port", str(server.port)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    findings = json.loads(outcome.stdout)["findings"]
    assert [finding for finding in findings if finding["level"] == "error"] == []
    found = [finding["found"] for finding in findings]
    assert "Serves tiny, 1 of 1 replicas." in found
    assert any(each.startswith("nanoserve serves tiny there: process ") for each in found)
    assert server.state_directory is not None
    assert str(server.state_directory) not in {finding["where"] for finding in findings}, "it is no leftover"


@pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux to run it in")
@pytest.mark.usefixtures("load")
def test_status_follows_the_cluster_until_it_is_gone(server: Command, tmp_path: Path) -> None:
    """The last of this module: it ends the server."""
    terminal = Terminal(tmp_path, f"http://127.0.0.1:{server.port}")
    try:
        screen = terminal.wait_for(r"Tokens out +[1-9]")
        assert "1 of 1 replicas ready, 0 restarts" in screen
        screen = terminal.wait_for(r"First token +\S+ m?s p50")
        assert max(map(len, screen.splitlines())) <= 80
        first = re.search(r"\d\d:\d\d:\d\d", screen)
        assert first is not None
        until(lambda: first[0] not in terminal.screen, SECONDS, "the next look")
        os.kill(server.ranks()[0], signal.SIGKILL)
        terminal.wait_for(r"0 of 1 replicas ready")
        terminal.wait_for(r"1 of 1 replicas ready, 1 restart")
        assert server.signal(signal.SIGTERM) == 0
        screen = terminal.wait_for(r"No answer since \d\d:\d\d:\d\d")
        assert "Trying again every second" in " ".join(screen.split())
        assert "1 restart" in screen, "what was known stays"
        terminal.interrupt()
        assert "No answer" not in terminal.wait_for(r"ended with 0"), "the screen before is back"
    finally:
        terminal.close()

"""A headless Chromium, driven over its DevTools protocol: opens a page, runs expressions in it, takes pictures."""

import asyncio
import base64
import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
START_SECONDS = 60.0


def chromium() -> str | None:
    """The program, under whichever name it is there."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class HeadlessBrowser:
    """One page. `complaints` are its uncaught exceptions and console errors, those of its security policy included."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        self._reading = asyncio.create_task(self._read())

    @classmethod
    @asynccontextmanager
    async def started(cls, program: str, profile: Path) -> AsyncIterator[Self]:
        """A browser whose profile is this folder, until the end of the block."""
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as session:
                told = profile / "DevToolsActivePort"  # two lines, of which the first is the port
                while not (told.exists() and len(told.read_text().splitlines()) == 2):
                    assert process.poll() is None, "the browser ended"
                    await asyncio.sleep(0.1)
                port = told.read_text().splitlines()[0]
                async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                    page = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
            async with aiohttp.ClientSession() as session, session.ws_connect(page, max_msg_size=0) as socket:
                browser = cls(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await browser.command(f"{domain}.enable")
                yield browser
                browser._reading.cancel()
        finally:
            process.kill()
            process.wait()

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol."""
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(30):
            result: dict[str, Any] = await answer
        return result

    async def look(self, *, width: int = 1200, height: int = 1250, is_dark: bool = False) -> None:
        """Be a screen of this size and colour scheme."""
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[scheme])

    async def open(self, url: str) -> None:
        """Go there."""
        await self.command("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        result = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float) -> None:
        """Wait for an expression to be true."""
        async with asyncio.timeout(seconds):
            while not await self.value(expression):
                await asyncio.sleep(0.1)

    async def picture(self) -> bytes:
        """A PNG of the whole page."""
        size = await self.value("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = await self.command("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    async def _read(self) -> None:
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told.get("result", {}))
            elif told["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.complaints.append(told["params"]["entry"]["text"])

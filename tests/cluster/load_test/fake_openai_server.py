"""A server that speaks just enough of OpenAI's API, with delays that a test knows, and failures on demand.

What it does to a request is decided by the request's `behave` field (sent as an extra field): "fine", "refuse" (429),
"cut" (the stream ends early), "error" (an error event in the stream), "hang", or "reset" (the connection drops).
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeServer:
    """First output after `prefill_seconds`, then a chunk of `tokens_per_chunk` tokens each `chunk_seconds`."""

    prefill_seconds: float = 0.0
    chunk_seconds: float = 0.0
    tokens_per_chunk: int = 1
    has_usage: bool = True
    url: str = ""
    replica_metrics: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self._models),
            Route("/metrics/targets", self._metrics_targets),
            Route("/v1/completions", self._generate, methods=["POST"]),
            Route("/v1/chat/completions", self._generate, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    async def _metrics_targets(self, request: Request) -> Response:
        """What a nanoserve ingress lists; another server has no such path."""
        targets = [{"targets": [it], "labels": {"nanoserve_process": "replica"}} for it in self.replica_metrics]
        ingress = {"targets": ["127.0.0.1:1"], "labels": {"nanoserve_process": "ingress"}}
        return JSONResponse([ingress, *targets]) if targets else Response(status_code=404)

    async def _generate(self, request: Request) -> Response:
        self.arrivals.append(time.perf_counter())
        body = json.loads(await request.body())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if body.get("behave") == "refuse":
            return JSONResponse({"error": {"message": "too busy", "code": "rate_limit_exceeded"}}, status_code=429)
        return StreamingResponse(self._stream(body, "chat" in request.url.path), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], is_chat: bool) -> AsyncIterator[bytes]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            if is_chat:  # as real servers do, before there is any output
                yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            behaviour = body.get("behave", "fine")
            if behaviour == "hang":
                await asyncio.sleep(60)
            await asyncio.sleep(self.prefill_seconds)
            num_tokens = body["max_tokens"]
            for start in range(0, num_tokens, self.tokens_per_chunk):
                if start:
                    await asyncio.sleep(self.chunk_seconds)
                text = "word " * min(self.tokens_per_chunk, num_tokens - start)
                choice = {"delta": {"content": text}} if is_chat else {"text": text}
                yield event({"choices": [{"index": 0, "finish_reason": None, **choice}]})
                if behaviour == "cut":
                    return
                if behaviour == "reset":
                    raise ConnectionResetError
                if behaviour == "error":
                    yield event({"error": {"message": "the engine died", "code": "engine_dead"}})
                    break
            if self.has_usage:
                prompt = body.get("prompt") or body["messages"][0]["content"]
                num_prompt = len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split())
                usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
                yield event({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 1}}})
            yield b"data: [DONE]\n\n"
        finally:
            self.num_open -= 1


def event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Serve on a free port of the loopback interface, from a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        runner = uvicorn.Server(uvicorn.Config(server.app(), log_level="critical", lifespan="off"))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not runner.started:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield server
        finally:
            runner.should_exit = True
            runner.force_exit = True
            thread.join()

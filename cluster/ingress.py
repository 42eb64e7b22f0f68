"""The HTTP side of one ingress process: OpenAI's routes over a `Dispatcher`. Knows ASGI; not Ray.

A call that its client leaves, streaming or not, ends in the engine at once. Every error has OpenAI's shape, also for
unknown URLs. A stream's first bytes wait for its first token, so that what fails before is a plain HTTP error, and
never longer than `KEEP_ALIVE_SECONDS`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from opentelemetry.trace import Tracer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cluster.api_call import ApiCall, open_chat, open_completion
from cluster.api_error import ApiError
from cluster.call_metrics import CallMetrics
from cluster.config import LogsConfig
from cluster.dispatcher import Dispatcher, NoReplicaError
from cluster.exchange import CLIENT_LEFT, Exchange, ExchangeRecorder
from cluster.metrics import CALL_ROUTES, IngressMetrics
from cluster.metrics_discovery import target_groups
from cluster.open_call import OpenCall
from cluster.recent_latencies import RecentLatencies
from cluster.refusal_log import RefusalLog
from cluster.reply import KEEP_ALIVE_FRAME
from cluster.served_model import ServedModel, find_model, model_card, model_list
from cluster.status.cluster_watch import ClusterWatch, Deployment
from cluster.status.routes import add_status_routes
from cluster.status.step_picture import StepPicture
from cluster.tracing import NO_TRACER
from engine import FinishReason

KEEP_ALIVE_SECONDS = 10.0
THREAD_BODY_BYTES = 16_384  # tokenising more than this would hold up other streams for over a millisecond
_DRAINED_BODY_BYTES = 64_000_000  # of a body that is too large: clients read the answer only after sending theirs

Opener = Callable[[bytes, Mapping[str, ServedModel]], ApiCall]


class Ingress:
    """What the routes need: the models by name, the way to the replicas, the counters and the limit of a body.

    `deployment` is what people are shown; unless given, the models by their names. `logs` and `tracer` say what becomes
    of each `Exchange`.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        dispatcher: Dispatcher,
        metrics: IngressMetrics,
        max_body: int,
        deployment: Deployment | None = None,
        logs: LogsConfig | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        deployment = deployment or Deployment(models=tuple(models))
        self.latencies = RecentLatencies()
        self.refusals = RefusalLog()
        self.watch = ClusterWatch(deployment, dispatcher, self.latencies)
        self.step_picture = StepPicture(dispatcher, deployment.models[0])
        self.models = models
        self.dispatcher = dispatcher
        self.metrics = metrics
        self.max_body = max_body
        self.logs = logs or LogsConfig()
        self.tracer = tracer

    async def answer(self, http: Request, opener: Opener) -> Response:
        """Parse the body of a call and begin it; the response does the rest. Raises `ApiError`."""
        body = await read_body(http, self.max_body)
        arrived = time.monotonic()
        exchange = Exchange.of(http.scope)
        started = time.time_ns()
        if len(body) > THREAD_BODY_BYTES:
            call = await asyncio.to_thread(opener, body, self.models)
        else:
            call = opener(body, self.models)
        exchange.trace.tokenized(started, time.time_ns())
        if self.logs.prompts:
            exchange.facts["prompts"] = await asyncio.to_thread(_prompts, call)
        return CallResponse(self, call, exchange, arrived)

    def open(self, call: ApiCall, exchange: Exchange) -> OpenCall:
        """Send the requests of a call on their way; raises `ApiError`."""
        try:
            return self.dispatcher.open(call.requests, exchange)
        except NoReplicaError:
            reason = "No replica of the model is ready."
            self.refusals.refused(reason)
            raise ApiError.unavailable(reason, 2.0) from None


class CallResponse(Response):
    """Runs one call while its client is there, and writes the answer: at its end, or as it grows."""

    def __init__(self, ingress: Ingress, call: ApiCall, exchange: Exchange, arrived: float) -> None:
        self._ingress = ingress
        self._call = call
        self._exchange = exchange
        self._metrics = CallMetrics(ingress.metrics, ingress.latencies, call, arrived)
        self._has_begun = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. An error before the first byte is the response; after it, it is the stream's last frame."""
        leaving = asyncio.create_task(_cancel_on_disconnect(receive, asyncio.current_task()))
        try:
            await self._run(send)
        except asyncio.CancelledError:
            if not leaving.done():
                raise  # the server is stopping; else the client has left, and nobody waits for an answer
            self._exchange.left()
        except Exception as error:
            answer = ApiError.of(error)
            self._exchange.failed(answer, error)
            if answer.status >= 500:
                self._metrics.failed()
            if self._has_begun:
                await self._write(send, answer.frame(), is_last=True)
            else:
                await error_response(answer)(scope, receive, send)
        finally:
            leaving.cancel()
            self._metrics.close()
            self._exchange.facts |= self._metrics.facts()

    async def _run(self, send: Send) -> None:
        reply = self._call.reply
        if reply.done:  # nothing is to be generated
            await self._finish(send, reply.start())
            return
        with self._ingress.open(self._call, self._exchange) as open_call:
            pending = reply.start()
            async with aclosing(open_call.with_pauses(KEEP_ALIVE_SECONDS)) as arrivals:
                async for outputs in arrivals:
                    frames = reply.feed(outputs)
                    aborts = reply.take_aborts()
                    self._metrics.delivered(outputs, aborts)
                    open_call.abort(aborts, FinishReason.STOP)
                    if reply.done:
                        pending += frames
                        break
                    if self._call.stream and (frames or not outputs):
                        await self._write(send, pending + (frames or KEEP_ALIVE_FRAME))
                        pending = b""
        await self._finish(send, pending)

    async def _finish(self, send: Send, frames: bytes) -> None:
        self._metrics.answered()  # before the client can know, so that who has the answer finds it counted
        if self._call.stream:
            await self._write(send, frames, is_last=True)
        else:
            await self._write(send, self._call.reply.body(), is_last=True)

    async def _write(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        if not self._has_begun:
            self._has_begun = True
            if self._call.stream:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            else:
                headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})


def build_app(ingress: Ingress, on_stop: Callable[[], Any] | None = None) -> FastAPI:
    """The ASGI application; `on_stop` is awaited when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if on_stop is not None:
            await on_stop()

    app = FastAPI(title="nanoserve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(ExchangeRecorder, metrics=ingress.metrics, tracer=ingress.tracer, log_format=ingress.logs.format)
    _add_error_handlers(app, ingress.metrics)

    chat_route, completion_route = CALL_ROUTES

    @app.post(chat_route)
    async def chat_completions(http: Request) -> Response:
        return await ingress.answer(http, open_chat)

    @app.post(completion_route)
    async def completions(http: Request) -> Response:
        return await ingress.answer(http, open_completion)

    @app.get("/v1/models")
    async def models() -> Response:
        unique = {id(model): model for model in ingress.models.values()}
        return Response(model_list(unique.values()), media_type="application/json")

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return _json(model_card(find_model(ingress.models, name), name))

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if not ingress.dispatcher.is_ready:
            raise ApiError.unavailable("No replica of the model is ready.", 2.0)
        return _json({"status": "ready"})

    add_status_routes(app, ingress.watch, ingress.step_picture)

    @app.get("/metrics/targets")
    async def metrics_targets() -> Response:
        return _json(target_groups(ingress.dispatcher.metrics_targets))

    return app


async def read_body(http: Request, max_bytes: int) -> bytes:
    """The whole body; raises `ApiError` (413) for one that is too large, having let the client send its end."""
    chunks = []
    size = 0
    async for chunk in http.stream():
        size += len(chunk)
        if size <= max_bytes:
            chunks.append(chunk)
        elif size > _DRAINED_BODY_BYTES:
            break
    if size > max_bytes:
        raise ApiError.body_too_large(max_bytes)
    return b"".join(chunks)


def error_response(error: ApiError) -> Response:
    """An `ApiError` as HTTP."""
    return Response(error.body(), error.status, dict(error.headers), "application/json")


def _add_error_handlers(app: FastAPI, metrics: IngressMetrics) -> None:
    async def on_api_error(http: Request, error: Exception) -> Response:
        answer = ApiError.of(error)
        Exchange.of(http.scope).failed(answer, error)
        return error_response(answer)

    async def on_http_error(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        match error.status_code:
            case 404:
                answer = ApiError.not_found(http.url.path)
            case 405:
                answer = ApiError.method_not_allowed(http.method, http.url.path)
            case status:
                answer = ApiError(status, str(error.detail))
        answer.headers.update(error.headers or {})
        return await on_api_error(http, answer)

    async def on_disconnect(http: Request, error: Exception) -> Response:
        Exchange.of(http.scope).left()
        return Response(status_code=CLIENT_LEFT)

    async def on_bug(http: Request, error: Exception) -> Response:
        metrics.responded("unknown", 500)  # answered outside the middleware that counts
        return error_response(ApiError.internal())

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_bug)


def _prompts(call: ApiCall) -> list[str]:
    """As the model gets them."""
    prompts = dict.fromkeys(request.prompt_token_ids for request in call.requests)
    return [call.model.tokenizer.decode(prompt) for prompt in prompts]


async def _cancel_on_disconnect(receive: Receive, call: "asyncio.Task[Any] | None") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    assert call is not None
    call.cancel()


def _json(value: object) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), media_type="application/json")

"""`Exchange`: one HTTP request and its answer, from first byte to last: counted, traced, and logged in one line.

Routes add the facts that only they know. What clients write is never logged, prompts only where a recipe asks for it:
of an error that is the client's, its code and the field are enough.
"""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import Tracer
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_error import ApiError
from cluster.call_trace import CallTrace
from cluster.config import LogFormat
from cluster.metrics import CALL_ROUTES, IngressMetrics
from cluster.tracing import NO_TRACER
from engine import NanoserveError, Request, RequestId

logger = logging.getLogger(__name__)
CLIENT_LEFT = 499  # nginx's number, for an answer that nobody was there to read
_API_PREFIX = "/v1/"
_KEY = "nanoserve.exchange"


class Exchange:
    """What is known of one. `facts` are for the log and the trace: plain values, and no text of a client's."""

    def __init__(self, scope: Scope, tracer: Tracer) -> None:
        headers = Headers(scope=scope)
        self._method: str = scope["method"]
        self._path: str = scope.get("raw_path", b"").decode("latin-1").partition("?")[0] or scope["path"]
        self._started = time.monotonic()
        self._failure: BaseException | None = None
        self._status = 0
        self._request_id = headers.get("x-request-id", "")
        route = scope["path"]  # what routes go by: `%63` is `c`
        is_call = self._method == "POST" and route in CALL_ROUTES
        self.trace = CallTrace(tracer if is_call else NO_TRACER, f"POST {route}", headers)
        self.facts: dict[str, Any] = {}

    @classmethod
    def of(cls, scope: Scope) -> "Exchange":
        """The exchange that an ASGI scope belongs to."""
        exchange: Exchange = scope[_KEY]
        return exchange

    def dispatched(self, request: Request, replica_id: str, num_cached_tokens: int) -> Request:
        """A replica was chosen for one of its requests, which is returned as it shall go there."""
        replicas: list[str] = self.facts.setdefault("replicas", [])
        if replica_id not in replicas:
            replicas.append(replica_id)
        attributes: dict[str, AttributeValue] = {
            "nanoserve.replica": replica_id,
            "nanoserve.predicted_cached_tokens": num_cached_tokens,
        }
        return self.trace.dispatched(request, attributes)

    def returned(self, request_id: RequestId) -> None:
        """Nothing more will come for this request."""
        self.trace.returned(request_id)

    def failed(self, answer: ApiError, cause: BaseException) -> None:
        """It ends with this answer, as its status or inside a stream that has begun."""
        self.facts["error"] = answer.code or answer.type
        if answer.param is not None:
            self.facts["param"] = answer.param.partition(".")[0]  # names below it may be a client's
        if answer.status >= 500:
            self._failure = cause
            self.facts["cause"] = str(cause) if isinstance(cause, NanoserveError) else repr(cause)

    def left(self) -> None:
        """The client has not waited for the answer."""
        self._status = self._status or CLIENT_LEFT
        self.facts |= {"client_left": True}

    def begun(self, status: int) -> None:
        """The answer's head was written."""
        self._status = status

    def end(self, log_format: LogFormat) -> None:
        """Log and trace what is known now."""
        status = self._status or 500  # a bug: what answers it stands around this
        facts = {
            "request_id": self._request_id,
            "method": self._method,
            "path": self._path,
            "status": status,
            "seconds": round(time.monotonic() - self._started, 6),
            **self.facts,
        }
        self.trace.end(facts, None if self._failure is None else facts["cause"])
        # Of calls that nobody was there to take, `RefusalLog` warns for all together.
        level = logging.INFO if self._failure is None or isinstance(self._failure, ApiError) else logging.WARNING
        if status < 400 and not self._path.startswith(_API_PREFIX):
            level = logging.DEBUG  # probes, scrapes and pages, every few seconds
        if not logger.isEnabledFor(level):
            return
        if self.trace.trace_id:
            facts["trace_id"] = self.trace.trace_id
        message = f"{self._method} {self._path} {status}"
        if log_format is LogFormat.TEXT:
            message = f"{message} {_as_text(facts)}"
        is_bug = self._failure is not None and not isinstance(self._failure, NanoserveError)
        logger.log(level, "%s", message, extra=facts, exc_info=self._failure if is_bug else None)


class ExchangeRecorder:
    """An ASGI middleware: an `Exchange` for each request. Nothing between the bytes."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics, tracer: Tracer, log_format: LogFormat) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer
        self._log_format = log_format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[_KEY] = Exchange(scope, self._tracer)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.begun(message["status"])
                self._metrics.responded(_route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception as error:
            exchange.failed(ApiError.of(error), error)
            raise
        finally:
            exchange.end(self._log_format)


def _route(scope: Scope) -> str:
    """The route's pattern: clients must not be able to create metric labels."""
    route: Any = scope.get("route")
    return getattr(route, "path", "unknown")


def _as_text(facts: Mapping[str, Any]) -> str:
    """`key=value` of what the line does not begin with; a value that is not one plain word is written as JSON."""
    shown = {name: value for name, value in facts.items() if name not in {"request_id", "method", "path", "status"}}
    return " ".join(f"{name}={_one_word(value)}" for name, value in shown.items())


def _one_word(value: Any) -> str:
    text = str(value)
    plain = isinstance(value, str) and text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(value)

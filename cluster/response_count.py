"""`ResponseCount`: counts every answer by route and status. Plain ASGI, nothing between the bytes.

Serve itself gives each answer its X-Request-Id: the client's own, or a new one.
"""

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.metrics import IngressMetrics


class ResponseCount:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responded(_route(scope), message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def _route(scope: Scope) -> str:
    """The route's pattern: clients must not be able to create metric labels."""
    route: Any = scope.get("route")
    return getattr(route, "path", "unknown")

"""`CallTrace`: the spans of one HTTP call in its ingress. They belong to the caller's trace, where it has one (W3C).

POST /v1/chat/completions       from the first byte of the request to the last of the answer
  tokenize                      from the body to token ids
  dispatch                      one per request: from the choice of its replica to its last token, as seen here
    generate ...                in the replica: `cluster.request_trace`
"""

from collections.abc import Mapping
from dataclasses import replace

from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from engine import Request, RequestId

_PROPAGATOR = TraceContextTextMapPropagator()
# Facts by OpenTelemetry's conventions; others are ours.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "response_id": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "error": "error.type",
}
_NOT_TRACED = {"prompts", "seconds"}  # a client's text; and what the span itself says


class CallTrace:
    """Begins with the call. What is told after `end` is ignored."""

    def __init__(self, tracer: Tracer, name: str, headers: Mapping[str, str]) -> None:
        """`headers` may have the caller's `traceparent` and `tracestate`, in lower case."""
        self._tracer = tracer
        self._span = tracer.start_span(name, _PROPAGATOR.extract(headers), SpanKind.SERVER)
        self._context = set_span_in_context(self._span)
        self._dispatches: dict[RequestId, Span] = {}

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty where the call belongs to no trace."""
        context = self._span.get_span_context()
        return format(context.trace_id, "032x") if context.is_valid else ""

    def tokenized(self, started: int, ended: int) -> None:
        """The body has become token ids, in that time (Unix nanoseconds)."""
        self._tracer.start_span("tokenize", self._context, start_time=started).end(ended)

    def dispatched(self, request: Request, attributes: Mapping[str, AttributeValue]) -> Request:
        """A replica was chosen; the request as it shall go there, knowing its trace."""
        if not self._span.get_span_context().is_valid:
            return request
        span = self._tracer.start_span("dispatch", self._context, SpanKind.CLIENT, attributes)
        self._dispatches[request.request_id] = span
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(span))
        return replace(request, trace_context=carrier["traceparent"])

    def returned(self, request_id: RequestId) -> None:
        """Nothing more will come for this request."""
        span = self._dispatches.pop(request_id, None)
        if span is not None:
            span.end()

    def end(self, facts: Mapping[str, AttributeValue], error: str | None) -> None:
        """The answer has been written; `error` is what the server, not the client, did wrong."""
        if not self._span.is_recording():
            return
        traced = {name: value for name, value in facts.items() if name not in _NOT_TRACED}
        self._span.set_attributes({_ATTRIBUTES.get(name, f"nanoserve.{name}"): traced[name] for name in traced})
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()

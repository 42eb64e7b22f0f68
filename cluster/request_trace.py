"""`RequestTrace`: the spans of one request in its replica, made at its end from the engine's own clock.

generate        from its arrival to its end; a child of the ingress's `dispatch`
  queue         until it was first part of a step
  prefill       until its first token
  decode        until its last
"""

import time

from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine import FinishedRequest

_PROPAGATOR = TraceContextTextMapPropagator()


class RequestTrace:
    """Tell it every request that ends; those that belong to no sampled trace cost a microsecond."""

    def __init__(self, tracer: Tracer, model: str, replica_id: str) -> None:
        self._tracer = tracer
        self._model = model
        self._replica_id = replica_id

    def finished(self, request: FinishedRequest) -> None:
        """`LLMEngine`'s `on_finished`."""
        if not request.request.trace_context:
            return
        parent = _PROPAGATOR.extract({"traceparent": request.request.trace_context})
        if not get_current_span(parent).get_span_context().trace_flags.sampled:
            return
        to_unix = time.time_ns() - time.monotonic_ns()

        def unix(seconds: float) -> int:
            return int(seconds * 1e9) + to_unix

        arrived, ended = unix(request.arrived_at), unix(request.ended_at)
        span = self._tracer.start_span("generate", parent, SpanKind.SERVER, start_time=arrived)
        context = set_span_in_context(span)
        begins = [("queue", request.arrived_at), ("prefill", request.scheduled_at), ("decode", request.first_token_at)]
        phases = [(name, unix(at)) for name, at in begins if at is not None]
        ends = [at for _, at in phases[1:]] + [ended]
        for (name, begin), end in zip(phases, ends, strict=True):
            self._tracer.start_span(name, context, start_time=begin).end(end)
        self._describe(span, request)
        span.end(ended)

    def _describe(self, span: Span, request: FinishedRequest) -> None:
        span.set_attributes(
            {
                "gen_ai.request.model": self._model,
                "gen_ai.request.id": request.request.request_id,
                "gen_ai.request.max_tokens": request.request.sampling.max_tokens,
                "gen_ai.request.temperature": request.request.sampling.temperature,
                "gen_ai.request.top_p": request.request.sampling.top_p,
                "gen_ai.usage.input_tokens": len(request.request.prompt_token_ids),
                "gen_ai.usage.output_tokens": request.num_generated_tokens,
                "nanoserve.replica": self._replica_id,
                "nanoserve.cached_tokens": request.num_cached_tokens,
                "nanoserve.preemptions": request.num_preemptions,
            }
        )
        if request.finish_reason is not None:
            span.set_attribute("gen_ai.response.finish_reasons", [request.finish_reason.value])
        else:
            span.set_status(StatusCode.ERROR, "The engine died.")

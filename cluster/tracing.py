"""`Tracing`: the way of one process's spans to a collector of OpenTelemetry; without one, nothing is recorded.

Span processors and the exporter are an optional part of the installation (`pip install "nanoserve[tracing]"`), and
what else they can be told comes from OpenTelemetry's own variables: `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`,
`OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_*`.
"""

import os
from importlib.util import find_spec
from typing import Protocol

from opentelemetry.trace import NoOpTracer, Tracer

from cluster.config import TracingConfig
from engine import ConfigError

NO_TRACER: Tracer = NoOpTracer()
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_EXPORT_SECONDS = 3.0  # of one attempt: a process that ends while its collector is away waits for no more than this


class Exporter(Protocol):
    """What holds finished spans, and sends them from a thread of its own."""

    def shutdown(self) -> None:
        """Send what is left."""
        ...


class Tracing:
    """`tracer` makes spans; `close` sends what is left, in at most a few seconds."""

    def __init__(self, tracer: Tracer = NO_TRACER, exporter: Exporter | None = None) -> None:
        self.tracer = tracer
        self._exporter = exporter

    @classmethod
    def open(cls, config: TracingConfig, kind: str, process_id: str) -> "Tracing":
        """For a process of that `kind` ("ingress", "replica"); raises `ConfigError` where the exporter is missing."""
        check_tracing(config)
        if config.endpoint is None:
            return cls()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        service = os.environ.get("OTEL_SERVICE_NAME", "nanoserve")
        resource = Resource.create(
            {"service.name": service, "service.instance.id": process_id, "nanoserve.process": kind}
        )
        provider = TracerProvider(ParentBased(TraceIdRatioBased(config.sample_ratio)), resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(config.endpoint, timeout=_EXPORT_SECONDS)))
        return cls(provider.get_tracer("nanoserve"), provider)

    def close(self) -> None:
        """Idempotent. It blocks."""
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.shutdown()


def check_tracing(config: TracingConfig) -> None:
    """Raise `ConfigError` where spans are asked for and what sends them is not installed."""
    if config.endpoint is not None and not _is_installed(_EXPORTER):
        raise ConfigError(
            "tracing.endpoint needs OpenTelemetry's exporter, which is not installed here: install nanoserve with "
            'its extra "tracing" (pip install -e ".[tracing]", or pip install opentelemetry-exporter-otlp-proto-http).'
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it would lie in
        return False

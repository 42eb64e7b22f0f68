"""Spans need a part of the installation that is optional, and say so."""

import pytest

from cluster import tracing
from cluster.config import TracingConfig
from cluster.tracing import NO_TRACER, Tracing, check_tracing
from engine import ConfigError

CONFIG = TracingConfig(endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("exporter", ["opentelemetry.exporter.none.proto", "opentelemetry.nothing"])
def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch, exporter: str) -> None:
    monkeypatch.setattr(tracing, "_EXPORTER", exporter)
    with pytest.raises(ConfigError, match=r"tracing\.endpoint needs OpenTelemetry's exporter.*pip install"):
        check_tracing(CONFIG)
    check_tracing(TracingConfig())


def test_nothing_is_recorded_without_an_endpoint() -> None:
    off = Tracing.open(TracingConfig(), "ingress", "i1")
    assert off.tracer is NO_TRACER
    off.close()


def test_the_ratio_decides_where_the_caller_has_not() -> None:
    never = Tracing.open(CONFIG.model_copy(update={"sample_ratio": 0.0}), "ingress", "i1")
    assert not never.tracer.start_span("x").is_recording()
    never.close()
    never.close()

"""Every metric that nanoserve exports: name, help and labels, once. Dashboards and alerts import the names from here.

Each process has its own registry and its own endpoint (`MetricsEndpoint`); the ingress lists all of them for
Prometheus. Where vLLM has an established metric the same suffix is used, after the prefix `nanoserve_`.

Two counts of tokens, on purpose. `nanoserve_prompt_tokens_total` and `nanoserve_generation_tokens_total` are counted
by the ingress when a call ends well, from the `usage` of its answer: they equal exactly what clients were told, stop
strings included. Calls that ended otherwise (a disconnect, an error) add to `nanoserve_unanswered_tokens_total`.
`nanoserve_engine_*` is what the engine computed, as it computes it: throughput is read from those. What each rank did
is in `cluster.rank_metrics`, memory in `cluster.memory_metrics`.

Percent of the optimum over any range is the rate of `nanoserve_ideal_seconds_total` divided by that of
`nanoserve_accounted_seconds_total`; the losses explain the rest, and `nanoserve_skipped_head_seconds_total` is how much
they may exceed it by. All of these are missing, not zero, where no GEMM peak was measured. So are the parts of the
device time (`TIMES_METRICS`) where no step measured them, as on GPUs.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.config import ObjectivesConfig
from engine import EngineStats, FinishReason, LossWaterfall

PREFIX = "nanoserve_"
ENGINE_LABELS = ("model", "replica")
INGRESS_LABELS = ("model",)
MET, MISSED = "met", "missed"
CALL_ROUTES = ("/v1/chat/completions", "/v1/completions")
DEFAULT_OBJECTIVES = ObjectivesConfig()

LATENCY_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2.0)


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """One number of `EngineStats`, read when Prometheus asks."""

    name: str
    help: str
    read: Callable[[EngineStats], float]
    is_counter: bool = False


def _usage(stats: EngineStats) -> float:
    return stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0


ENGINE_METRICS = (
    EngineMetric("num_requests_running", "Requests computing tokens.", lambda stats: stats.num_running),
    EngineMetric("num_requests_waiting", "Requests queued in the engine.", lambda stats: stats.num_waiting),
    EngineMetric("kv_cache_usage_ratio", "Share of the KV blocks that sequences hold, 0 to 1.", _usage),
    EngineMetric("kv_blocks", "KV blocks of one rank.", lambda stats: stats.num_blocks),
    EngineMetric("kv_blocks_used", "KV blocks that sequences hold.", lambda stats: stats.num_used_blocks),
    EngineMetric("kv_blocks_cached", "Free KV blocks that still hold a prefix.", lambda stats: stats.num_cached_blocks),
    EngineMetric("kv_blocks_free", "KV blocks nobody holds.", lambda stats: stats.num_blocks - stats.num_used_blocks),
    EngineMetric("kv_block_size_tokens", "Tokens per KV block.", lambda stats: stats.block_size),
    EngineMetric("engine_steps_total", "Steps run.", lambda stats: stats.num_steps, True),
    EngineMetric("engine_batch_tokens_total", "Tokens computed, of all steps.", lambda s: s.num_batch_tokens, True),
    EngineMetric("engine_prompt_tokens_total", "Prompt tokens started on.", lambda s: s.num_prompt_tokens, True),
    EngineMetric(
        "engine_generated_tokens_total", "Tokens drawn and delivered.", lambda s: s.num_generated_tokens, True
    ),
    EngineMetric(
        "engine_discarded_tokens_total",
        "Tokens computed in vain: after the end of a sequence, or again after a preemption.",
        lambda stats: stats.num_discarded_tokens,
        True,
    ),
    EngineMetric("prefix_cache_queries_total", "Prompt tokens looked up.", lambda s: s.num_prompt_tokens, True),
    EngineMetric("prefix_cache_hits_total", "Prompt tokens found cached.", lambda s: s.num_cached_prompt_tokens, True),
    EngineMetric("num_preemptions_total", "Sequences that gave up their blocks.", lambda s: s.num_preemptions, True),
    EngineMetric("engine_device_seconds_total", "Time the ranks computed.", lambda s: s.device_seconds, True),
    EngineMetric(
        "engine_padding_tokens_total", "Rows computed to fill a batch.", lambda stats: stats.num_padding_tokens, True
    ),
    EngineMetric("engine_schedule_seconds_total", "Time spent composing batches.", lambda s: s.schedule_seconds, True),
    EngineMetric("engine_busy_seconds_total", "Time with a step in flight.", lambda s: s.busy_seconds, True),
    EngineMetric(
        "request_queue_seconds_total", "Time requests waited before their first step.", lambda s: s.queue_seconds, True
    ),
    EngineMetric(
        "engine_seconds_since_step",
        "How long requests have been open without the end of a step; 0 without requests.",
        lambda stats: stats.seconds_since_step,
    ),
)
TIMES_METRICS = (
    EngineMetric(
        "engine_timed_steps_total", "Steps whose device time is known by its parts.", lambda s: s.num_timed_steps, True
    ),
    EngineMetric("engine_gemm_seconds_total", "Device time in matrix products.", lambda s: s.gemm_seconds, True),
    EngineMetric("engine_attention_seconds_total", "Device time in attention.", lambda s: s.attention_seconds, True),
    EngineMetric("engine_network_seconds_total", "Time collectives were in flight.", lambda s: s.network_seconds, True),
    EngineMetric(
        "engine_exposed_network_seconds_total",
        "Time the ranks waited for collectives.",
        lambda stats: stats.exposed_network_seconds,
        True,
    ),
    EngineMetric(
        "overlap_saved_seconds_total",
        "Time collectives were in flight while the ranks computed.",
        lambda stats: stats.hidden_network_seconds,
        True,
    ),
)
OPTIMUM_METRICS = (
    EngineMetric(
        "accounted_seconds_total",
        "Time up to the last step's end, as losses count.",
        lambda s: s.accounted_seconds,
        True,
    ),
    EngineMetric("ideal_seconds_total", "Time the useful tokens take at the optimum.", lambda s: s.ideal_seconds, True),
    EngineMetric(
        "skipped_head_seconds_total",
        "The part of the ideal time that prompt tokens skip, having no logits.",
        lambda stats: stats.skipped_head_seconds,
        True,
    ),
    EngineMetric(
        "optimal_tokens_per_second",
        "What the measured GEMM peak of the group allows.",
        lambda stats: stats.optimal_tokens_per_second or 0.0,
    ),
)
LOSS_SECONDS = "loss_seconds_total"
PLAN_STEPS = "plan_steps_total"
PERCENT_OF_OPTIMAL = "percent_of_optimal"
ENGINE_FINISHED = "engine_requests_finished_total"
ENGINE_UPTIME = "engine_uptime_seconds_total"


class EngineCollector(Collector):
    """Turns a replica's `EngineStats` into metrics at scrape time; costs a running engine nothing.

    `recent` gives the waterfall of the last seconds, however often somebody scrapes.
    """

    def __init__(
        self,
        read: Callable[[], tuple[EngineStats, float]],
        *,
        model: str,
        replica: str,
        recent: Callable[[], LossWaterfall | None] = lambda: None,
    ) -> None:
        self._read = read
        self._recent = recent
        self._labels = [model, replica]

    def collect(self) -> Iterator[Metric]:
        """One sample per metric, or per value of its own label."""
        stats, uptime = self._read()
        for metric in (*ENGINE_METRICS, *(TIMES_METRICS if stats.num_timed_steps else ())):
            yield self._family(metric.name, metric.help, metric.read(stats), is_counter=metric.is_counter)
        yield self._family(ENGINE_UPTIME, "Time since the engine was ready; idle is uptime less busy.", uptime)
        yield self._by(ENGINE_FINISHED, "Requests the engine ended.", "finished_reason", stats.num_finished)
        yield self._by(PLAN_STEPS, "Steps run with each plan.", "plan", stats.num_steps_by_plan)
        if stats.optimal_tokens_per_second is not None:
            for metric in OPTIMUM_METRICS:
                yield self._family(metric.name, metric.help, metric.read(stats), is_counter=metric.is_counter)
            by_loss = {loss.value: seconds for loss, seconds in stats.loss_seconds.items()}
            yield self._by(LOSS_SECONDS, "Time lost against the optimum, by cause.", "loss", by_loss)
        if (recent := self._recent()) is not None:
            text = "Useful tokens per second of the last seconds, of the optimum."
            yield self._family(PERCENT_OF_OPTIMAL, text, recent.percent_of_optimal, is_counter=False)

    def _by(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=[*ENGINE_LABELS, label])
        for key, value in sorted(values.items()):
            family.add_metric([*self._labels, key], value)
        return family

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read an engine that is still loading."""
        return ()

    def _family(self, name: str, text: str, value: float, *, is_counter: bool = True) -> Metric:
        kind = CounterMetricFamily if is_counter else GaugeMetricFamily
        family: CounterMetricFamily | GaugeMetricFamily = kind(PREFIX + name, text, labels=list(ENGINE_LABELS))
        family.add_metric(self._labels, value)
        return family


class Objective(StrEnum):
    """What an answer is judged by. Goodput is what meets ALL, which no failed call does."""

    FIRST_TOKEN = "time_to_first_token"
    OUTPUT_TOKEN = "time_per_output_token"
    ALL = "all"


class IngressMetrics:
    """What one ingress process counts and times."""

    def __init__(
        self, registry: CollectorRegistry, model: str, objectives: ObjectivesConfig = DEFAULT_OBJECTIVES
    ) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, [*INGRESS_LABELS, *labels], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(PREFIX + name, text, INGRESS_LABELS, registry=registry, buckets=buckets)
            return metric.labels(model)

        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that nobody reads
        self._model = model
        self._responses = counter("http_responses_total", "HTTP answers.", "route", "status")
        self._success = counter("request_success_total", "Requests answered to their end.", "finished_reason")
        self._unanswered = counter("unanswered_tokens_total", "Tokens of calls without an answer.", "kind")
        self._decisions = counter("routing_decisions_total", "Requests sent to each replica.", "replica")
        self._replica_events = counter("replica_events_total", "Replicas that joined, were lost or left.", "event")
        self._judged = counter(
            "objective_requests_total",
            "Calls that met or missed an objective; failed ones missed all.",
            "objective",
            "outcome",
        )
        self._objectives = objectives
        limits = Gauge(
            PREFIX + "objective_seconds", "What an objective allows.", [*INGRESS_LABELS, "objective"], registry=registry
        )
        limits.labels(model, Objective.FIRST_TOKEN).set(objectives.time_to_first_token)
        limits.labels(model, Objective.OUTPUT_TOKEN).set(objectives.time_per_output_token)
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens in `usage`.").labels(model)
        self._generation_tokens = counter("generation_tokens_total", "Completion tokens in `usage`.").labels(model)
        self._affinity_tokens = counter(
            "routing_prefix_tokens_total", "Prompt tokens that routing expected to be cached where it sent them."
        ).labels(model)
        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the request's last byte to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between deliveries of tokens of a request, one or more each.", TOKEN_BUCKETS
        )
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after a request's first.", TOKEN_BUCKETS
        )
        self.request_latency = histogram(
            "e2e_request_latency_seconds", "From a request's last byte to its last token.", LATENCY_BUCKETS
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Series whose labels are known: a rate needs a zero to begin at, or the first event is lost."""
        for objective in Objective:
            for outcome in (MET, MISSED):
                self._judged.labels(self._model, objective, outcome)
        for event in ("joined", "lost", "left"):
            self._replica_events.labels(self._model, event)
        for kind in ("prompt", "generation"):
            self._unanswered.labels(self._model, kind)
        for route in CALL_ROUTES:
            for status in (200, 400, 500, 503):
                self._responses.labels(self._model, route, str(status))
        for reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._success.labels(self._model, reason.value)

    def first_token_came(self, seconds: float) -> None:
        """The first token of a call, `seconds` after its body."""
        self._time_to_first_token.observe(seconds)
        self._judge(Objective.FIRST_TOKEN, seconds <= self._objectives.time_to_first_token)

    def judged(self, first_token_seconds: float, per_token_seconds: float) -> None:
        """A call was answered, this fast."""
        is_smooth = per_token_seconds <= self._objectives.time_per_output_token
        self._judge(Objective.OUTPUT_TOKEN, is_smooth)
        self._judge(Objective.ALL, is_smooth and first_token_seconds <= self._objectives.time_to_first_token)

    def failed(self, *, has_begun: bool) -> None:
        """A call was given up by the server, after its first token or before."""
        self._judge(Objective.ALL, False)
        if not has_begun:
            self._judge(Objective.FIRST_TOKEN, False)

    def replica_changed(self, event: str) -> None:
        """A replica came or went; see `cluster.dispatcher.ReplicaEvent`."""
        self._replica_events.labels(self._model, event).inc()

    def _judge(self, objective: "Objective", is_met: bool) -> None:
        self._judged.labels(self._model, objective, MET if is_met else MISSED).inc()

    def responded(self, route: str, status: int) -> None:
        """An HTTP answer was begun; `route` is the path's pattern, never a client's text."""
        self._responses.labels(self._model, route, str(status)).inc()

    def finished(self, reason: str) -> None:
        """One choice of a call ended well."""
        self._success.labels(self._model, reason).inc()

    def answered(self, prompt_tokens: int, completion_tokens: int) -> None:
        """A call ended well with this `usage`."""
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(completion_tokens)

    def unanswered(self, prompt_tokens: int, completion_tokens: int) -> None:
        """A call ended early; nobody was told this usage."""
        self._unanswered.labels(self._model, "prompt").inc(prompt_tokens)
        self._unanswered.labels(self._model, "generation").inc(completion_tokens)

    def routed(self, replica: str, cached_tokens: int) -> None:
        """A request was sent to `replica`, which should have `cached_tokens` of its prompt."""
        self._decisions.labels(self._model, replica).inc()
        self._affinity_tokens.inc(cached_tokens)

    def replica_gone(self, replica: str) -> None:
        """`replica` will never be sent a request again: its series ends, or they would be as many as ever lived."""
        with contextlib.suppress(KeyError):  # of one that was never sent any
            self._decisions.remove(self._model, replica)


class RouterCollector(Collector):
    """What the router of one ingress believes about each replica, read at scrape time."""

    def __init__(self, read: Callable[[], dict[str, tuple[int, float]]], model: str) -> None:
        self._read = read
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """How many replicas there are, requests this ingress has open on each, and the work it predicts there."""
        labels = [*INGRESS_LABELS, "replica"]
        loads = self._read()
        ready = GaugeMetricFamily(PREFIX + "replicas_ready", "Replicas that take requests.", labels=INGRESS_LABELS)
        ready.add_metric([self._model], len(loads))
        requests = GaugeMetricFamily(PREFIX + "routed_requests", "Requests open, by replica.", labels=labels)
        work = GaugeMetricFamily(PREFIX + "predicted_work_tokens", "Work predicted, by replica.", labels=labels)
        for replica, (num_requests, tokens) in loads.items():
            requests.add_metric([self._model, replica], num_requests)
            work.add_metric([self._model, replica], tokens)
        yield from (ready, requests, work)

    def describe(self) -> Iterable[Metric]:
        """Nothing, for the same reason as `EngineCollector`."""
        return ()


class MetricsEndpoint:
    """A process's own /metrics, on a free port of `host`."""

    def __init__(self, registry: CollectorRegistry, host: str) -> None:
        self._server, self._thread = start_http_server(0, addr=host, registry=registry)
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening."""
        threading.Thread(target=self._server.shutdown, daemon=True).start()
        self._server.server_close()

"""*Serving*: what clients see: requests, tokens, latencies against their objectives, goodput, queues and errors."""

from typing import Any

from dashboards.panel import (
    BAD,
    GOOD,
    OBJECTIVE,
    Query,
    graph,
    heat,
    higher_is_better,
    lower_is_better,
    number,
)
from dashboards.query import CALLS, engine, engine_rate, ingress, ingress_rate, or_zero, quantile, share, total
from dashboards.row import Row

QUANTILES = (0.5, 0.9, 0.99)
_MET = 'outcome="met"'
_ALL = 'objective="all"'
_HAPROXY = 'nanoserve_process="haproxy"'


def rows() -> list[Row]:
    """From the whole to the parts."""
    return [
        Row("Now", _now()),
        Row("Throughput", _throughput()),
        Row("Latency", _latency()),
        Row("Trouble", _trouble()),
    ]


def _answers(*matchers: str) -> str:
    return ingress_rate("http_responses_total", CALLS, *matchers)


def _now() -> list[Any]:
    server_errors = or_zero(_answers('status=~"5.."'))
    return [
        number("Requests", "Completions answered per second, whatever the answer.", "reqps", _answers()),
        number(
            "Tokens in",
            "Prompt tokens of the requests begun per second, those found in the prefix cache included.",
            "suffix: tok/s",
            engine_rate("engine_prompt_tokens_total"),
            decimals=0,
        ),
        number(
            "Tokens out",
            "Tokens drawn and delivered per second.",
            "suffix: tok/s",
            engine_rate("engine_generated_tokens_total"),
            decimals=0,
        ),
        number(
            "Goodput",
            "Share of the calls that met every objective (time to first token and time per output token). A call that "
            "the server failed met none; one that its client left is not counted.",
            "percentunit",
            share(ingress_rate("objective_requests_total", _ALL, _MET), ingress_rate("objective_requests_total", _ALL)),
            steps=higher_is_better(0.9, 0.99),
        ),
        number(
            "Waiting", "Requests queued in the engines.", "short", total(engine("num_requests_waiting")), decimals=0
        ),
        number(
            "Server errors",
            "Share of the completions answered with a status of 500 or more.",
            "percentunit",
            share(f"({server_errors})", _answers()),
            steps=lower_is_better(0.001, 0.01),
        ),
    ]


def _throughput() -> list[Any]:
    return [
        graph(
            "Answers by status",
            "Completions per second by HTTP status. 4xx are the clients' mistakes, 5xx ours.",
            "reqps",
            Query(_by_status(), "{{status}}"),
            stacked=True,
        ),
        graph(
            "Tokens per second",
            "In: prompt tokens of requests begun; cached: those found in the prefix cache. Out: tokens delivered.",
            "suffix: tok/s",
            Query(engine_rate("engine_prompt_tokens_total"), "in"),
            Query(engine_rate("prefix_cache_hits_total"), "in, cached"),
            Query(engine_rate("engine_generated_tokens_total"), "out"),
        ),
        graph(
            "Goodput",
            "Calls per second that met every objective, and those that missed one.",
            "reqps",
            Query(ingress_rate("objective_requests_total", _ALL, _MET), "within objectives"),
            Query(ingress_rate("objective_requests_total", _ALL, 'outcome="missed"'), "missed"),
            stacked=True,
        ),
        graph(
            "Tokens per request",
            "Mean lengths, from the `usage` that clients were told.",
            "suffix: tok",
            Query(share(ingress_rate("prompt_tokens_total"), _answers('status="200"')), "prompt"),
            Query(share(ingress_rate("generation_tokens_total"), _answers('status="200"')), "completion"),
        ),
        graph(
            "Ends",
            "Choices per second by how they ended: stop (an end of sequence or a stop string) or length (max_tokens).",
            "reqps",
            Query(ingress_rate("request_success_total", by="finished_reason"), "{{finished_reason}}"),
            stacked=True,
        ),
        graph(
            "Within objectives",
            "Share of the calls within each objective; the dashed lines are 90 % and 99 %. The alerts' budget is 1 %.",
            "percentunit",
            Query(
                share(
                    ingress_rate("objective_requests_total", _MET, by="objective"),
                    ingress_rate("objective_requests_total", by="objective"),
                ),
                "{{objective}}",
            ),
            steps=higher_is_better(0.9, 0.99),
            maximum=1,
        ),
    ]


def _by_status() -> str:
    return ingress_rate("http_responses_total", CALLS, by="status")


def _latency() -> list[Any]:
    return [
        _quantiles(
            "Time to first token (TTFT)",
            "From the last byte of a request to its first token: queue, prefill and transport.",
            "time_to_first_token_seconds",
            "time_to_first_token",
        ),
        _quantiles(
            "Time per output token (TPOT)",
            "Mean time per token of a request after its first.",
            "request_time_per_output_token_seconds",
            "time_per_output_token",
        ),
        _quantiles(
            "Inter-token latency (ITL)",
            "Between two deliveries of tokens of one request, one or more each: what a reader sees as stutter.",
            "inter_token_latency_seconds",
        ),
        _quantiles(
            "End to end (E2E)",
            "From the last byte of a request to its last token; long answers take long.",
            "e2e_request_latency_seconds",
        ),
        heat(
            "TTFT, distribution",
            "Calls per second by their time to first token. Two bands are two kinds of requests, such as long prompts.",
            "s",
            ingress_rate("time_to_first_token_seconds_bucket", by="le"),
        ),
        graph(
            "Waiting before the first step",
            "Mean time that requests wait in an engine's queue: seconds waited per second, per request ended.",
            "s",
            Query(
                share(
                    engine_rate("request_queue_seconds_total", by="replica"),
                    engine_rate("engine_requests_finished_total", by="replica"),
                ),
                "{{replica}}",
            ),
        ),
    ]


def _quantiles(title: str, description: str, histogram: str, objective: str | None = None) -> Any:
    queries = [Query(quantile(part, histogram), f"p{100 * part:.0f}") for part in QUANTILES]
    if objective is not None:
        matcher = f'objective="{objective}"'
        queries.append(Query(f"max({ingress('objective_seconds', matcher)})", OBJECTIVE))
        description += " The dashed line is the recipe's objective."
    return graph(title, description, "s", *queries)


def _trouble() -> list[Any]:
    return [
        graph(
            "Requests in the engines",
            "Running: computing tokens. Waiting: no room yet for their KV cache, or no free row.",
            "short",
            Query(total(engine("num_requests_running")), "running"),
            Query(total(engine("num_requests_waiting")), "waiting"),
        ),
        graph(
            "Errors",
            "Answers per second that were not 200: by route, without unknown URLs' names.",
            "reqps",
            Query(or_zero(ingress_rate("http_responses_total", 'status=~"4.."')), "4xx"),
            Query(or_zero(ingress_rate("http_responses_total", 'status=~"5.."')), "5xx"),
            Query(
                or_zero(f'sum(rate(haproxy_frontend_http_responses_total{{{_HAPROXY},code="5xx"}}[$__rate_interval]))'),
                "5xx as HAProxy counts",
            ),
            steps=((None, GOOD), (0.1, BAD)),
        ),
        graph(
            "Tokens without an answer",
            "Tokens per second of calls that ended early: their client left, or the server failed.",
            "suffix: tok/s",
            Query(ingress_rate("unanswered_tokens_total", by="kind"), "{{kind}}"),
        ),
    ]

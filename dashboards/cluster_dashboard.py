"""*Cluster*: how load, KV cache and memory are spread over replicas, and who came, left, restarted or hangs."""

from typing import Any

from dashboards.panel import (
    BAD,
    CALM,
    GOOD,
    WARN,
    Column,
    Query,
    graph,
    higher_is_better,
    lower_is_better,
    number,
    table,
)
from dashboards.query import (
    WINDOW,
    engine,
    engine_rate,
    ingress,
    ingress_rate,
    share,
    total,
)
from dashboards.row import Row

_STARTS = "ray_serve_deployment_replica_starts_total"
_NANOSERVE = 'job="nanoserve"'
_KV_STEPS = ((None, GOOD), (0.85, WARN), (0.97, BAD))


def rows() -> list[Row]:
    """From the whole to the parts."""
    return [
        Row("Now", [*_now(), _table()]),
        Row("Routing", _routing()),
        Row("KV cache", _kv_cache()),
        Row("Life and death", _life()),
        Row("Machines", _machines()),
    ]


def _now() -> list[Any]:
    lost = f"sum(increase({ingress('replica_events_total', _event('lost'))}[1h]))"
    return [
        number(
            "Replicas ready",
            "Replicas that the ingress which knows most of them can send requests to.",
            "short",
            f"max({ingress('replicas_ready')})",
            steps=higher_is_better(1, 1),
            decimals=0,
        ),
        number(
            "Not scraped",
            "Processes that service discovery lists and Prometheus cannot read.",
            "short",
            f"count(up{{{_NANOSERVE}}} == 0) or vector(0)",
            steps=lower_is_better(1, 2),
            decimals=0,
        ),
        number("Open requests", "Running and waiting, everywhere.", "short", total(_open()), decimals=0),
        number(
            "Fullest KV cache",
            "Share of its KV blocks that the fullest replica has given to sequences.",
            "percentunit",
            f"max({engine('kv_cache_usage_ratio')})",
            steps=_KV_STEPS,
        ),
        number(
            "Prefix hits",
            "Share of the prompt tokens that were found in a replica's prefix cache.",
            "percentunit",
            share(engine_rate("prefix_cache_hits_total"), engine_rate("prefix_cache_queries_total")),
        ),
        number(
            "Replicas lost, 1 h",
            "Replicas that died, or whose connection did, in the last hour; every ingress counts them.",
            "short",
            lost,
            steps=lower_is_better(1, 3),
            decimals=0,
        ),
    ]


def _event(event: str) -> str:
    return f'event="{event}"'


def _open() -> str:
    return f"{engine('num_requests_running')} + {engine('num_requests_waiting')}"


def _table() -> Any:
    def by_replica(expression: str) -> str:
        return f"sum by (replica) ({expression})"

    return table(
        "Replicas",
        "Every replica that was scraped last. A replica that Serve replaced comes back under a new name.",
        "replica",
        "Replica",
        [
            Column(by_replica(engine("engine_uptime_seconds_total")), "Up for", "s"),
            Column(by_replica(engine("num_requests_running")), "Running", "short"),
            Column(by_replica(engine("num_requests_waiting")), "Waiting", "short"),
            Column(by_replica(engine("kv_cache_usage_ratio")), "KV in use", "percentunit", _KV_STEPS),
            Column(by_replica(engine("kv_blocks")), "KV blocks", "short"),
            Column(engine_rate("engine_prompt_tokens_total", by="replica"), "In tok/s", "short"),
            Column(engine_rate("engine_generated_tokens_total", by="replica"), "Out tok/s", "short"),
            Column(by_replica(engine("percent_of_optimal")), "% of optimal", "percent"),
            Column(by_replica(engine("engine_seconds_since_step")), "Since step", "s", lower_is_better(10, 30)),
        ],
    )


def _routing() -> list[Any]:
    mean = total(ingress("predicted_work_tokens"), "replica")
    decided = ingress_rate("routing_decisions_total", by="replica")
    return [
        graph(
            "Requests routed",
            "Requests per second sent to each replica.",
            "reqps",
            Query(decided, "{{replica}}"),
            stacked=True,
        ),
        graph(
            "Predicted work",
            "Tokens that the router expects each replica to compute still; it sends a request where this is least.",
            "suffix: tok",
            Query(mean, "{{replica}}"),
        ),
        graph(
            "Imbalance",
            "Standard deviation over mean: of the work predicted per replica, and of the tokens computed per second. "
            "0 is even; unlike prompts and prefix affinity make some.",
            "percentunit",
            Query(f"stddev({mean}) / (avg({mean}) > 0)", "predicted work"),
            Query(_spread(engine_rate("engine_batch_tokens_total", by="replica")), "tokens computed"),
            steps=lower_is_better(0.5, 1.0),
        ),
        graph(
            "Open requests, as ingresses see them",
            "Requests that ingresses have sent to each replica and that have not ended.",
            "short",
            Query(total(ingress("routed_requests"), "replica"), "{{replica}}"),
        ),
        graph(
            "Requests in each replica",
            "Running (computing tokens) and waiting (for KV blocks or a free row), as engines see them.",
            "short",
            Query(engine("num_requests_running"), "{{replica}} running"),
            Query(engine("num_requests_waiting"), "{{replica}} waiting"),
        ),
        graph(
            "Prefix affinity",
            "Prompt tokens per second that routing expected to be cached where it sent them, and that were. A gap "
            "means that blocks are evicted before they are used again.",
            "suffix: tok/s",
            Query(ingress_rate("routing_prefix_tokens_total"), "expected"),
            Query(engine_rate("prefix_cache_hits_total"), "found"),
        ),
    ]


def _spread(by_replica: str) -> str:
    return f"stddev({by_replica}) / (avg({by_replica}) > 0)"


def _kv_cache() -> list[Any]:
    return [
        graph(
            "KV blocks in use",
            "Share of the KV blocks that sequences hold. Near 1, requests wait; it is not a fault while nobody does.",
            "percentunit",
            Query(engine("kv_cache_usage_ratio"), "{{replica}}"),
            steps=_KV_STEPS,
            maximum=1,
            span=6,
        ),
        graph(
            "KV blocks of all replicas",
            "In use: held by sequences. Prefix: free, but still hold a prefix that a request may hit. Empty: the rest.",
            "short",
            Query(total(engine("kv_blocks_used")), "in use"),
            Query(total(engine("kv_blocks_cached")), "prefix"),
            Query(f"{total(engine('kv_blocks_free'))} - {total(engine('kv_blocks_cached'))}", "empty"),
            stacked=True,
            span=6,
        ),
        graph(
            "Prefix hits by replica",
            "Share of the prompt tokens found cached.",
            "percentunit",
            Query(
                share(
                    engine_rate("prefix_cache_hits_total", by="replica"),
                    engine_rate("prefix_cache_queries_total", by="replica"),
                ),
                "{{replica}}",
            ),
            maximum=1,
            span=6,
        ),
        graph(
            "Preemptions",
            "Sequences per second that had to give up their blocks and are computed again. Normal operation has none.",
            "ops",
            Query(engine_rate("num_preemptions_total", by="replica"), "{{replica}}"),
            steps=((None, CALM), (0.1, BAD)),
            span=6,
        ),
    ]


def _life() -> list[Any]:
    started = f"{_STARTS} unless {_STARTS} offset 5m"  # a counter of its own, at 1, for every replica
    return [
        graph(
            "Replicas ready",
            "What each ingress can send requests to.",
            "short",
            Query(ingress("replicas_ready"), "{{instance}}"),
        ),
        graph(
            "Replicas that came and went",
            "In the last minute: joined, lost (it died, or the way to it did) or left (Serve took it out of service).",
            "short",
            Query(f"sum by (event) (increase({ingress('replica_events_total')}[1m]))", "{{event}}"),
        ),
        graph(
            "Uptime",
            "A line that ends and another that begins at 0 is a replica that was replaced.",
            "s",
            Query(engine("engine_uptime_seconds_total"), "{{replica}}"),
        ),
        graph(
            "Since the last step",
            "How long requests have been open without the end of a step: the watchdog's number. Without requests 0.",
            "s",
            Query(engine("engine_seconds_since_step"), "{{replica}}"),
            steps=lower_is_better(10, 30),
        ),
        graph(
            "Processes scraped",
            "By kind. Ray's own endpoints are those of job ray.",
            "short",
            Query(f"sum by (nanoserve_process) (up{{{_NANOSERVE}}})", "{{nanoserve_process}}"),
            Query('sum(up{job="ray"})', "ray"),
        ),
        graph(
            "Starts, as Serve counts them",
            "Replica and ingress processes that Ray Serve started in the last five minutes.",
            "short",
            Query(f"count by (deployment) ({started}) or 0 * count by (deployment) ({_STARTS})", "{{deployment}}"),
        ),
    ]


def _machines() -> list[Any]:
    return [
        graph(
            "Memory of each process",
            "Resident memory of replicas and ranks, as the kernel counts it.",
            "bytes",
            Query(engine("resident_memory_bytes"), "{{replica}} {{process}}"),
        ),
        graph(
            "Memory by its parts",
            "Of all processes when they were ready. Unexplained may be below 0: parts that are not resident in full.",
            "bytes",
            Query(f"sum by (part) ({engine('memory_bytes')}) > 0", "{{part}}"),
            stacked=True,
        ),
        graph(
            "Processors and GPUs of each node",
            "Busy share, as Ray's node agents see it.",
            "percent",
            Query("ray_node_cpu_utilization", "CPU {{instance}}"),
            Query("ray_node_gpus_utilization", "GPU {{GpuIndex}} {{instance}}"),
            maximum=100,
            steps=((None, GOOD), (95, WARN)),
        ),
        graph(
            "Memory of each node",
            "In use, of all the node has.",
            "percentunit",
            Query("ray_node_mem_used / ray_node_mem_total", "{{instance}}"),
            maximum=1,
            steps=lower_is_better(0.85, 0.95),
        ),
        graph(
            "HAProxy",
            "Connections open in front of the ingresses.",
            "short",
            Query(
                'sum by (instance) (haproxy_process_current_connections{nanoserve_process="haproxy"})', "{{instance}}"
            ),
        ),
        graph(
            "Engine loop",
            "Share of the time that each engine composes batches, on its one thread.",
            "percentunit",
            Query(f"rate({engine('engine_schedule_seconds_total')}[{WINDOW}])", "{{replica}}"),
            steps=lower_is_better(0.3, 0.6),
        ),
    ]

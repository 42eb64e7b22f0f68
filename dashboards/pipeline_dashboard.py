"""*Pipeline*: how far from the optimum the ranks are and why: losses, plans, overlap, lanes, ranks."""

from typing import Any

from dashboards.panel import Query, bars, graph, higher_is_better, lower_is_better, number
from dashboards.query import WINDOW, engine, engine_rate, rate, share, total
from dashboards.row import Row

_PERCENT_STEPS = higher_is_better(20, 50)
_STEPS = engine_rate("engine_steps_total")


def rows() -> list[Row]:
    """From the whole to the parts."""
    return [
        Row("Now", _now()),
        Row("Where the time goes", _losses()),
        Row("Plans, overlap and lanes", _pipeline()),
        Row("Ranks and steps", _ranks()),
    ]


def _percent(by: str = "") -> str:
    return "100 * " + share(engine_rate("ideal_seconds_total", by=by), engine_rate("accounted_seconds_total", by=by))


def _now() -> list[Any]:
    optimum = total(engine("optimal_tokens_per_second"))
    return [
        number(
            "Percent of optimal",
            "Useful tokens per second, of what the measured GEMM peak would allow (peak / 2 x active parameters), over "
            "the last seconds. Missing where no peak was measured.",
            "percent",
            f"avg({engine('percent_of_optimal')})",
            steps=_PERCENT_STEPS,
        ),
        number("Optimum", "Tokens per second that all replicas could compute.", "suffix: tok/s", optimum, decimals=0),
        number(
            "Computed",
            "Tokens per second that steps computed, prompts and answers.",
            "suffix: tok/s",
            engine_rate("engine_batch_tokens_total"),
            decimals=0,
        ),
        number(
            "Batch",
            "Mean tokens per step. The plan's dense batch is the recipe's max_batch_tokens.",
            "suffix: tok",
            share(engine_rate("engine_batch_tokens_total"), _STEPS),
            decimals=0,
        ),
        number(
            "Network hidden",
            "Share of the time of collectives during which ranks computed something else: what overlap saves.",
            "percentunit",
            share(engine_rate("overlap_saved_seconds_total"), engine_rate("engine_network_seconds_total")),
        ),
        number("Step", "Mean device time of a step.", "s", share(engine_rate("engine_device_seconds_total"), _STEPS)),
    ]


def _losses() -> list[Any]:
    whole = f"scalar({engine_rate('accounted_seconds_total')})"
    useful = f"({engine_rate('ideal_seconds_total')} - {engine_rate('skipped_head_seconds_total')}) / {whole}"
    by_loss = f"{engine_rate('loss_seconds_total', by='loss')} / {whole} > 0"
    busy = share(
        engine_rate("engine_busy_seconds_total", by="replica"), engine_rate("engine_uptime_seconds_total", by="replica")
    )
    recent = f"sum by (loss) (increase({engine('loss_seconds_total')}[5m]))"
    return [
        graph(
            "Loss waterfall",
            "Every second of the replicas: what the useful tokens would take at the optimum (less the output head, "
            "which prompt tokens skip), and what took the rest. It adds up to 100 %.",
            "percentunit",
            Query(useful, "useful, at the optimum"),
            Query(by_loss, "{{loss}}"),
            span=16,
            stacked=True,
        ),
        bars(
            "Losses, last 5 minutes",
            "The same, as shares of the last five minutes, largest first.",
            "percentunit",
            Query(
                f"sort_desc({recent} / scalar(sum(increase({engine('accounted_seconds_total')}[5m]))) > 0)", "{{loss}}"
            ),
        ),
        graph(
            "Percent of optimal by replica",
            "Over the rate window. Low without requests is no fault; low while busy is (PercentOfOptimalLow).",
            "percent",
            Query(_percent("replica"), "{{replica}}"),
            steps=_PERCENT_STEPS,
        ),
        graph(
            "Busy",
            "Share of the time with a step in flight.",
            "percentunit",
            Query(busy, "{{replica}}"),
            maximum=1,
        ),
        graph(
            "Tokens in vain",
            "Tokens per second that nobody gets: discarded (after an end of sequence, or computed again after a "
            "preemption), and rows computed to fill a batch.",
            "suffix: tok/s",
            Query(engine_rate("engine_discarded_tokens_total"), "discarded"),
            Query(engine_rate("engine_padding_tokens_total"), "padding"),
        ),
    ]


def _pipeline() -> list[Any]:
    device = engine_rate("engine_device_seconds_total", by="replica")
    exposed = engine_rate("engine_exposed_network_seconds_total", by="replica")
    network = engine_rate("engine_network_seconds_total", by="replica")
    return [
        graph(
            "Plan in use",
            "Steps per second by the schedule that ran. Small batches run sequentially whatever plans there are.",
            "ops",
            Query(engine_rate("plan_steps_total", by="plan"), "{{plan}}"),
            stacked=True,
        ),
        graph(
            "Overlap saved",
            "Seconds per second that collectives were in flight while the ranks computed: what a sequential run would "
            "have waited.",
            "percentunit",
            Query(engine_rate("overlap_saved_seconds_total", by="replica"), "{{replica}}"),
        ),
        graph(
            "Lane utilisation",
            "Share of the device time of steps in which the compute lane computed, and in which a collective was in "
            "flight. Their sum above 1 is overlap. Measured on CPUs.",
            "percentunit",
            Query(f"({device} - {exposed}) / ({device} > 0)", "compute {{replica}}"),
            Query(share(network, device), "network {{replica}}"),
        ),
    ]


def _ranks() -> list[Any]:
    steps = rate(engine("rank_steps_total"))
    timed = engine_rate("engine_timed_steps_total")
    rest = " - ".join(
        engine_rate(name)
        for name in (
            "engine_device_seconds_total",
            "engine_gemm_seconds_total",
            "engine_attention_seconds_total",
            "engine_exposed_network_seconds_total",
        )
    )
    behind = f"max by (replica) ({engine('rank_steps_total')}) - min by (replica) ({engine('rank_steps_total')})"
    return [
        graph(
            "Step time by rank",
            "Mean device time of a step on each rank, waiting for the others included.",
            "s",
            Query(share(rate(engine("rank_device_seconds_total")), steps), "{{replica}} rank {{rank}}"),
        ),
        graph(
            "Waiting by rank",
            "Mean time per step that each rank waits for collectives. The slow rank is the one that waits least.",
            "s",
            Query(share(rate(engine("rank_exposed_network_seconds_total")), steps), "{{replica}} rank {{rank}}"),
        ),
        graph(
            "Ranks behind",
            "Steps between the first and the last rank of a group: 0 or 1, unless one hangs.",
            "short",
            Query(behind, "{{replica}}"),
            steps=lower_is_better(2, 10),
        ),
        graph(
            "Parts of a step",
            "Mean time per step, where steps measure it: products, attention, waiting for the network, the rest.",
            "s",
            Query(share(engine_rate("engine_gemm_seconds_total"), timed), "GEMM"),
            Query(share(engine_rate("engine_attention_seconds_total"), timed), "attention"),
            Query(share(engine_rate("engine_exposed_network_seconds_total"), timed), "exposed network"),
            Query(share(f"({rest})", timed), "other"),
            stacked=True,
        ),
        graph(
            "Steps per second",
            "Of each replica.",
            "ops",
            Query(engine_rate("engine_steps_total", by="replica"), "{{replica}}"),
        ),
        graph(
            "Between steps",
            "Per step: composing the batch, and everything that is not device time while requests are open.",
            "s",
            Query(share(engine_rate("engine_schedule_seconds_total"), _STEPS), "composing"),
            Query(share(rate_of_gap(), _STEPS), "CPU gap"),
        ),
    ]


def rate_of_gap() -> str:
    """Seconds per second in which requests were open and nothing was computed."""
    return f"sum(rate({engine('loss_seconds_total', _loss('cpu_gap'))}[{WINDOW}]))"


def _loss(loss: str) -> str:
    return f'loss="{loss}"'

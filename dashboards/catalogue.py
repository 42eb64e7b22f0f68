"""Every metric that nanoserve exports, as its own collectors describe it: names, kinds, labels and help for dashboards,
documentation and tests, so that none of these can speak of a metric that does not exist. Run as a program, it prints
the table of docs/observe.md.
"""

import os
from dataclasses import dataclass
from functools import cache

from prometheus_client import CollectorRegistry

from cluster.memory_metrics import MemoryCollector
from cluster.metrics import PREFIX, EngineCollector, IngressMetrics, RouterCollector
from cluster.rank_meter import RankReading
from cluster.rank_metrics import RankCollector
from engine import EngineStats, Loss, LossWaterfall, MemoryMeter, MemoryPart, MemoryUse

_HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")
_EVERYTHING = EngineStats(  # what makes every metric appear
    num_timed_steps=1,
    num_finished={"stop": 1},
    num_steps_by_plan={"sequential": 1},
    accounted_seconds=1.0,
    loss_seconds={Loss.CPU_GAP: 1.0},
    optimal_tokens_per_second=1.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A metric: its whole name, "counter", "gauge" or "histogram", its labels, its help, and who exports it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    process: str


class _OneStep:
    """A rank's meter that has seen a step."""

    rank = 0

    def read(self) -> RankReading:
        return RankReading(num_steps=1, num_timed_steps=1, device_seconds=1.0, exposed_network_seconds=0.0)


@cache
def catalogue() -> dict[str, Described]:
    """By whole name, in the order of export; counters with their `_total`, histograms without a suffix."""
    return {metric.name: metric for metric in (*_of_ingress(), *_of_replica())}


def series_name(name: str) -> str:
    """The whole name of the metric `name`, which has a histogram's suffix if it is one; raises `KeyError` for none."""
    whole = PREFIX + name
    metric = catalogue().get(metric_of(whole))
    if metric is None or (metric.kind == "histogram") == (metric.name == whole):
        raise KeyError(f"{whole} is no series of nanoserve (cluster/metrics.py); a histogram's has a suffix.")
    return whole


def metric_of(series: str) -> str:
    """The metric to which a series' name belongs."""
    if series in catalogue():
        return series
    return next((series.removesuffix(end) for end in _HISTOGRAM_SUFFIXES if series.endswith(end)), series)


def _of_ingress() -> list[Described]:
    registry = CollectorRegistry()
    metrics = IngressMetrics(registry, "m")
    metrics.responded("/v1/models", 200)
    metrics.routed("r", 0)
    registry.register(RouterCollector(lambda: {"r": (0, 0.0)}, "m"))
    return _described(registry, "ingress")


def _of_replica() -> list[Described]:
    registry = CollectorRegistry()
    recent = LossWaterfall.between(EngineStats(), _EVERYTHING)
    registry.register(EngineCollector(lambda: (_EVERYTHING, 1.0), model="m", replica="r", recent=lambda: recent))
    registry.register(RankCollector([_OneStep()], model="m", replica="r"))
    registry.register(MemoryCollector([_some_memory()], model="m", replica="r"))
    return _described(registry, "replica")


def _some_memory() -> MemoryUse:
    use = MemoryMeter().use("rank 0", os.getpid(), {MemoryPart.WEIGHTS: 1}, cache_budget=1)
    assert use is not None, "the kernel tells a process its own memory"
    return use


def _described(registry: CollectorRegistry, process: str) -> list[Described]:
    found = []
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = tuple(label for label in family.samples[0].labels if label != "le")
        found.append(Described(name=name, kind=family.type, labels=labels, help=family.documentation, process=process))
    return found


def row(metric: Described) -> str:
    """Of the table of docs/observe.md."""
    return f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |"


if __name__ == "__main__":
    print("\n".join(map(row, catalogue().values())))

"""Metrics of memory: what the processes of a replica hold, by its parts as they were at the start, and in total now.

`nanoserve_memory_bytes` has the parts, and what none of them explains as the part "unexplained": their sum was the
resident memory when the replica was ready. `nanoserve_resident_memory_bytes` is read when Prometheus asks.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metrics import ENGINE_LABELS, PREFIX
from engine import MemoryUse

MEMORY = "memory_bytes"
RESIDENT_MEMORY = "resident_memory_bytes"
CACHE_BUDGET = "kv_cache_budget_bytes"
UNEXPLAINED = "unexplained"


class MemoryCollector(Collector):
    """Of one replica and its ranks, which share a node with it."""

    def __init__(self, uses: Sequence[MemoryUse], *, model: str, replica: str) -> None:
        self._uses = uses
        self._labels = [model, replica]

    def collect(self) -> Iterator[Metric]:
        """A sample per process, or per process and part."""
        process_labels = [*ENGINE_LABELS, "process"]
        parts = GaugeMetricFamily(
            PREFIX + MEMORY, "Resident memory at the start, by part.", labels=[*process_labels, "part"]
        )
        resident = GaugeMetricFamily(PREFIX + RESIDENT_MEMORY, "Resident memory now.", labels=process_labels)
        budget = GaugeMetricFamily(PREFIX + CACHE_BUDGET, "What the KV cache may take.", labels=process_labels)
        for use in self._uses:
            labels = [*self._labels, use.process]
            for part, num_bytes in use.parts.items():
                parts.add_metric([*labels, part.value], num_bytes)
            parts.add_metric([*labels, UNEXPLAINED], use.unexplained)
            if use.cache_budget is not None:
                budget.add_metric(labels, use.cache_budget)
            if (now := _resident_bytes(use.pid)) is not None:
                resident.add_metric(labels, now)
        yield from (parts, resident, budget)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not collect."""
        return ()


def _resident_bytes(pid: int) -> int | None:
    """From statm, which costs the kernel nothing, unlike smaps_rollup; None for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None

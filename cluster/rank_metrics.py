"""Metrics of the ranks of one replica, each told apart by its own label: who is slow, and who waits for whom.

All ranks run every step. Where they wait for each other in collectives their step times are alike, and the slow one
is the one that waits least.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metrics import ENGINE_LABELS, PREFIX
from cluster.rank_meter import RankReading


class Meter(Protocol):
    """What a `RankMeter` is to this module."""

    @property
    def rank(self) -> int: ...

    def read(self) -> RankReading: ...


class RankCollector(Collector):
    """Reads the meters when Prometheus asks. What ranks waited is missing, not zero, where no step measured it."""

    def __init__(self, meters: Sequence[Meter], *, model: str, replica: str) -> None:
        self._meters = meters
        self._labels = [model, replica]

    def collect(self) -> Iterator[Metric]:
        """A sample per rank."""
        steps = _family("rank_steps_total", "Steps each rank has finished.")
        device = _family("rank_device_seconds_total", "Time each rank's steps took.")
        waited = _family("rank_exposed_network_seconds_total", "Time each rank waited for collectives.")
        for meter in self._meters:
            reading = meter.read()
            labels = [*self._labels, str(meter.rank)]
            steps.add_metric(labels, reading.num_steps)
            device.add_metric(labels, reading.device_seconds)
            if reading.num_timed_steps:
                waited.add_metric(labels, reading.exposed_network_seconds)
        yield from (steps, device, waited)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not collect."""
        return ()


def _family(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=[*ENGINE_LABELS, "rank"])

"""From what replicas report to what people read: a `LoadView` of one replica, or of all together."""

from collections.abc import Sequence

from cluster.replica_report import ReplicaReport
from cluster.status.cluster_view import LoadView, LossView
from engine import LossWaterfall

_SMALLEST_PERCENT = 0.05  # what would be shown as 0.0 is not shown


def load_of(reports: Sequence[ReplicaReport]) -> LoadView:
    """The load of these replicas together; of none: nothing."""
    waterfalls = [report.waterfall for report in reports if report.waterfall is not None]
    waterfall = LossWaterfall.combined(waterfalls) if waterfalls else None
    return LoadView(
        num_running=sum(report.num_running for report in reports),
        num_waiting=sum(report.num_waiting for report in reports),
        kv_usage=sum(report.kv_usage for report in reports) / max(1, len(reports)),
        num_preemptions=sum(report.num_preemptions for report in reports),
        prompt_tokens_per_second=sum(report.prompt_tokens_per_second for report in reports),
        generated_tokens_per_second=sum(report.generated_tokens_per_second for report in reports),
        percent_of_optimal=None if waterfall is None else waterfall.percent_of_optimal,
        optimal_tokens_per_second=None if waterfall is None else waterfall.optimal_tokens_per_second,
        losses=() if waterfall is None else tuple(_losses(waterfall)),
    )


def _losses(waterfall: LossWaterfall) -> list[LossView]:
    losses = [
        LossView(loss=loss.value, description=loss.description, percent=waterfall.percent(seconds))
        for loss, seconds in waterfall.seconds.items()
    ]
    return sorted((loss for loss in losses if loss.percent >= _SMALLEST_PERCENT), key=lambda loss: -loss.percent)

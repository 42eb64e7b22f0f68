"""`PlanChoice`: which schedule a batch runs by, from the batch alone, so that every rank picks the same."""

from collections.abc import Iterator

from engine.pipeline.plan_set import PlanSet
from engine.pipeline.schedule import Schedule
from engine.pipeline.token_bucket import token_sizes

SEQUENTIAL = "sequential"


class PlanChoice:
    """The schedules of one model: those of `plans`, and the sequential one for every batch without a plan."""

    def __init__(self, sequential: Schedule, plans: PlanSet | None = None) -> None:
        self._sequential = sequential
        self._plans = plans

    @property
    def has_plans(self) -> bool:
        """Whether anything was ever planned, if only to find that nothing is faster."""
        return self._plans is not None

    def of(self, num_decodes: int, num_prefills: int) -> tuple[str, Schedule]:
        """Name and schedule for a batch of so many tokens of each kind."""
        plan = None if self._plans is None else self._plans.lookup(num_decodes, num_prefills)
        if plan is None or plan.schedule is None:
            return SEQUENTIAL, self._sequential
        return f"{plan.num_decodes}+{plan.num_prefills}", plan.schedule

    def padded(self, max_batch_tokens: int) -> Iterator[tuple[Schedule, int, int]]:
        """(schedule, rows, most decodes) of the steps that batches which run by a schedule are padded to.

        A batch gets no more rows by its plan than it would get without: those of the next of `token_sizes`, which the
        dense batch of a loaded engine is itself.
        """
        sizes = token_sizes(max_batch_tokens)
        for smallest, size in zip((0, *sizes), sizes, strict=False):
            yield self._sequential, size, size
            for schedule, bucket in () if self._plans is None else self._plans.served:
                batches = bucket.sizes(self._plans.max_batch_tokens) if self._plans is not None else range(0)
                if smallest < batches.stop - 1 and batches.start <= size:
                    yield schedule, size, bucket.share.most_decodes(size)

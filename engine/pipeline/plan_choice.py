"""`PlanChoice`: which schedule a batch runs by, from the batch alone, so that every rank picks the same."""

from engine.pipeline.plan_set import PlanSet
from engine.pipeline.schedule import Schedule

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

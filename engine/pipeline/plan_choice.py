"""`PlanChoice`: which schedule a batch runs by, from the batch alone, so that every rank picks the same."""

from collections.abc import Callable

from engine.pipeline.schedule import Schedule

SEQUENTIAL = "sequential"
Lookup = Callable[[int, int], tuple[str, Schedule] | None]


class PlanChoice:
    """The schedules of one model; `lookup(num_decodes, num_prefills)` names one, or none for a batch without a plan."""

    def __init__(self, sequential: Schedule, lookup: Lookup = lambda num_decodes, num_prefills: None) -> None:
        self._sequential = sequential
        self._lookup = lookup

    def of(self, num_decodes: int, num_prefills: int) -> tuple[str, Schedule]:
        """Name and schedule for a batch of so many tokens of each kind; a schedule that it does not fit is not used."""
        found = self._lookup(num_decodes, num_prefills)
        if found is None or not found[1].fits(num_decodes, num_prefills):
            return SEQUENTIAL, self._sequential
        return found

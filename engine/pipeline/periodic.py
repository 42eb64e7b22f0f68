"""From the times of one period to a `Schedule`: the order on each lane, and who belongs to which layer."""

from collections.abc import Sequence

from engine.pipeline.instance import Instance
from engine.pipeline.ordering import PeriodicOrder
from engine.pipeline.schedule import Schedule


def schedule_of(instance: Instance, order: PeriodicOrder, *, divides_units: bool) -> Schedule:
    """The order as a schedule that begins with the first nano-operation of a layer."""
    periods = _periods(instance, order)
    times = [start + order.period * count for start, count in zip(order.starts, periods, strict=True)]
    origin = min(times[index] for index in instance.first)
    places = [divmod(time - origin, order.period) for time in times]
    in_order = sorted(range(len(places)), key=lambda index: places[index][1])
    starts = tuple(instance.operations[index].lane for index in in_order) if divides_units else ()
    lanes = {
        lane: tuple(
            instance.operations[index].step(order.modes[index].share, places[index][0])
            for index in sorted(mine, key=in_order.index)
        )
        for lane, mine in instance.lanes.items()
    }
    return Schedule(instance.cut, lanes, starts)


def _periods(instance: Instance, order: PeriodicOrder) -> Sequence[int]:
    """The fewest whole periods by which each nano-operation must come later for all dependencies to hold."""
    periods = [0] * len(order.starts)
    for _ in range(len(periods) + 1):
        is_changed = False
        for i, j, lag in instance.edges:
            end = order.starts[i] + order.modes[i].duration
            needed = periods[i] - lag - (order.starts[j] - end) // order.period
            if needed > periods[j]:
                periods[j], is_changed = needed, True
        if not is_changed:
            return periods
    raise AssertionError("the order of a period contradicts itself")

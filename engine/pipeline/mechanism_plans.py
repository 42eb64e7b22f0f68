"""Plans by every mechanism that a profile knows: a search for each, and one sequential step to compare all with."""

from collections.abc import Callable
from dataclasses import replace

from engine.batch_shape import BatchShape
from engine.pipeline.cost_model import CostModel
from engine.pipeline.overlap_costs import OverlapCosts
from engine.pipeline.plan import Candidate, Plan
from engine.pipeline.profile import MeasuredCosts

# A planner that has been told all but the prices.
Search = Callable[[CostModel], Plan]


def plan_by(prices: OverlapCosts, search: Search, sequential: Candidate) -> Plan:
    """What the search finds with the prices of a mechanism, beside the `sequential` schedule as it is without overlap:
    that has the whole device.
    """
    found = search(prices)
    candidates = tuple(
        replace(candidate, schedule=schedule)
        for candidate in found.candidates
        if (schedule := prices.overlapped(candidate.schedule)) is not None
    )
    best = min((sequential, *candidates), key=lambda candidate: candidate.step_seconds)
    bound = min(found.lower_bound_seconds, best.period_seconds)
    return replace(found, best=best, sequential=sequential, candidates=candidates, lower_bound_seconds=bound)


def plans_by_mechanism(
    costs: MeasuredCosts, shape: BatchShape, search: Callable[[CostModel, float], Plan], seconds: float
) -> list[Plan]:
    """The plan by streams with any shares first; where units are divided, then one by each mechanism of the profile
    with the same share for all steps of a lane. In about so many seconds each.

    By streams that is a part of what the first search goes through, but one that is solved in a fraction of the time.
    `search` takes prices and seconds. On a CPU there is the first plan alone.
    """
    first = search(costs, seconds)
    mechanisms = costs.profile.mechanisms if costs.shares_units else ()
    prices = (OverlapCosts.of(mechanism, costs, shape) for mechanism in mechanisms)
    return [first, *(plan_by(found, lambda price: search(price, seconds), first.sequential) for found in prices)]

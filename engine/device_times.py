"""`DeviceTimes`: where the time of a step on a GPU went, by what its parts were measured to take by themselves.

A step is one graph, or queued far ahead of the device: nothing inside it can be timed while it serves. Measured of each
step is its whole time, by two events of the device. It is shared out here by the seconds that each kind of operation
took alone at the start (`engine.device_probe`), with straight lines between the sizes: the sum is a measurement, the
shares are a model. They are right as far as all kinds are slowed alike: heat and power, which slow products most, and
gaps between small kernels are spread over everything, and so is drawing that filters, which was measured without.

Operations on lanes beside the compute lane count only with what the step took longer than the compute lane would alone:
so long nothing hid them. That they slowed what ran beside them is in it, under their names. A step that is slower than
everything one after the other is shared out as if it had been run so.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.batch import Batch, StepTimes
from engine.operation import Resource, TokenKind
from engine.pipeline.cost_law import CostLaw
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.schedule import Lane, Schedule
from engine.pipeline.sequential import sequential_schedule
from engine.pipeline.stopwatch import Cost
from engine.step_work import StepWork


class StepPart(StrEnum):
    """What is measured apart. `DRAWING` is the last norm and drawing, by the default way of sampling."""

    PRODUCTS = "products"
    DECODE_ATTENTION = "decode_attention"
    PREFILL_ATTENTION = "prefill_attention"
    COLLECTIVES = "collectives"
    REST = "rest"
    HEAD_PRODUCT = "head_product"
    HEAD_COLLECTIVE = "head_collective"
    DRAWING = "drawing"

    @property
    def cost(self) -> Cost:
        """What its time is counted as."""
        return _COSTS[self]


_COSTS = {
    StepPart.PRODUCTS: Cost.GEMM,
    StepPart.DECODE_ATTENTION: Cost.ATTENTION,
    StepPart.PREFILL_ATTENTION: Cost.ATTENTION,
    StepPart.COLLECTIVES: Cost.NETWORK,
    StepPart.REST: Cost.OTHER,
    StepPart.HEAD_PRODUCT: Cost.GEMM,
    StepPart.HEAD_COLLECTIVE: Cost.NETWORK,
    StepPart.DRAWING: Cost.OTHER,
}
_OF_ROWS = (StepPart.PRODUCTS, StepPart.COLLECTIVES, StepPart.REST)
_OF_DRAWS = (StepPart.HEAD_PRODUCT, StepPart.HEAD_COLLECTIVE, StepPart.DRAWING)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """Of one rank's model. `laws` are of the parts that it has, over all layers; `windows` those of its attention."""

    laws: Mapping[StepPart, CostLaw]
    graph: OperationGraph
    windows: tuple[int | None, ...]
    _beside: dict[Schedule, frozenset[StepPart]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of_step(
        self, batch: Batch, schedule: Schedule, num_padding_tokens: int, overlaps: bool
    ) -> Callable[[float], StepTimes]:
        """What shares out the seconds of this step once they are known; `overlaps`: lanes ran beside one another.

        Nothing is computed before that.
        """

        def times(seconds: float) -> StepTimes:
            work = StepWork.of(batch, schedule.cut, self.windows, num_padding_tokens)
            beside = self._parts_beside(schedule) if overlaps else frozenset[StepPart]()
            return shared_out(seconds, self.alone(work), beside)

        return times

    def alone(self, work: StepWork) -> dict[StepPart, float]:
        """The seconds of each part by itself; those that the model has not take none."""
        shape = work.shape
        seconds = dict.fromkeys(StepPart, 0.0)
        for part, law in self.laws.items():
            if part in _OF_ROWS:
                seconds[part] = sum(law.seconds(rows, 0.0) for rows in work.num_rows)
            elif part in _OF_DRAWS:
                seconds[part] = law.seconds(work.num_drawn, 0.0)
            elif part is StepPart.DECODE_ATTENTION:
                seconds[part] = law.seconds(shape.num_decodes, shape.decode_context)
            else:
                seconds[part] = law.seconds(shape.num_prefills, shape.prefill_context)
        return seconds

    def _parts_beside(self, schedule: Schedule) -> frozenset[StepPart]:
        if schedule not in self._beside:
            self._beside[schedule] = parts_beside(schedule, self.graph)
        return self._beside[schedule]


def parts_beside(schedule: Schedule, graph: OperationGraph) -> frozenset[StepPart]:
    """The parts that a schedule places on other lanes than the one that computes, some of it or all; of the sequential
    one, whose collectives are waited for, none.
    """
    if schedule == sequential_schedule(graph):
        return frozenset()
    found = (
        _part_of(graph.by_name[step.node])
        for lane, steps in schedule.lanes.items()
        if lane is not Lane.COMPUTE
        for step in steps
    )
    return frozenset(part for part in found if part is not None)


def _part_of(node: Node) -> StepPart | None:
    """None for what has no lane but the compute lane."""
    if node.resource is Resource.NETWORK:
        return StepPart.COLLECTIVES
    if not node.cache_reads:
        return None
    return StepPart.DECODE_ATTENTION if node.tokens is TokenKind.DECODE else StepPart.PREFILL_ATTENTION


def shared_out(seconds: float, alone: Mapping[StepPart, float], beside: Collection[StepPart]) -> StepTimes:
    """The seconds of a step by cost, in proportion to what its parts take `alone`; some ran `beside` the others.

    What is in no named part is memory-bound rest, so they all add up to `seconds`.
    """
    on_lane = sum(taken for part, taken in alone.items() if part not in beside)
    off_lane = sum(taken for part, taken in alone.items() if part in beside)
    hidden = max(0.0, min(off_lane, on_lane + off_lane - seconds))
    exposed = 1 - hidden / off_lane if off_lane > 0 else 0.0
    booked = on_lane + off_lane - hidden
    scale = seconds / booked if booked > 0 else 0.0
    by_cost = dict.fromkeys(Cost, 0.0)
    in_flight = 0.0
    for part, taken in alone.items():
        by_cost[part.cost] += scale * taken * (exposed if part in beside else 1.0)
        if part.cost is Cost.NETWORK:
            in_flight += taken * (max(1.0, scale) if part in beside else scale)
    return StepTimes(
        gemm_seconds=by_cost[Cost.GEMM],
        attention_seconds=by_cost[Cost.ATTENTION],
        exposed_network_seconds=by_cost[Cost.NETWORK],
        network_seconds=min(seconds, in_flight),
    )
